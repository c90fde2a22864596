#include "mien_batch.h"

#include <stdlib.h>
#include <string.h>

/* ---- sequences ---------------------------------------------------------------------------------- */

static bool alike(const mien_sequence *a, const mien_sequence *b) {
    return a->prompt == b->prompt && a->response == b->response;
}

/* The `count` sequences of a token: number 0 where the batch tells none. */
static const int32_t *sequences_of(const mien_batch *batch, int32_t token, int32_t *count) {
    static const int32_t zero = 0;
    const int32_t *sequences = batch->sequences ? batch->sequences[token] : NULL;
    *count = sequences && batch->n_sequences ? batch->n_sequences[token] : 1;
    return sequences ? sequences : &zero;
}

int32_t mien_batch_sequence(const mien_batch *batch, int32_t token, const mien_sequence *sequences, int32_t n) {
    int32_t count;
    const int32_t *its = sequences_of(batch, token, &count);
    for (int32_t i = 0; i < count; i++)
        if (its[i] < 0 || its[i] >= n || !alike(&sequences[its[i]], &sequences[its[0]])) return -1;
    return count > 0 ? its[0] : -1;
}

/* Whether logits are computed for a token; without `outputs` only for the batch's last. */
static bool is_output(const mien_batch *batch, int32_t token) {
    return batch->outputs ? batch->outputs[token] : token == batch->n_tokens - 1;
}

/* What came before `position` and was not seen, a copy or a state that was loaded, was given. Returns whether
 * a reply continues with several tokens. */
static bool follow(mien_sequence *sequence, int32_t position, bool output, uint64_t serial) {
    const bool unseen = position > sequence->next;
    const bool more = sequence->seen == serial, rest = sequence->silent && position == sequence->next;
    const bool continued = more && sequence->replied && sequence->replied != serial;
    sequence->seen = serial;
    sequence->next = position + 1;
    sequence->silent = !output;
    if (sequence->told) return false;
    if (more || rest || position == 0) {
        sequence->reply_from = position + 1;
        sequence->replied = 0;
        return continued;
    }
    if (unseen || sequence->reply_from > position) sequence->reply_from = position;
    if (!sequence->replied) sequence->replied = serial;
    return false;
}

mien_status mien_batch_follow(const mien_batch *batch, mien_sequence *sequences, int32_t n, uint64_t serial,
                              bool *continued) {
    *continued = false;
    for (int32_t t = 0; t < batch->n_tokens; t++)
        if (mien_batch_sequence(batch, t, sequences, n) < 0) return MIEN_ERR_ROWS;
    /* A sequence's only token in the batch is taken for one more; a second shows that both were given. */
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        int32_t count;
        const int32_t *its = sequences_of(batch, t, &count);
        const int32_t position = batch->positions ? batch->positions[t] : sequences[its[0]].next;
        for (int32_t i = 0; i < count; i++)
            if (follow(&sequences[its[i]], position, is_output(batch, t), serial)) *continued = true;
    }
    return MIEN_OK;
}

/* The position of a token after mien_batch_follow. llama.cpp counts on where a batch has none: for the first
 * of the token's sequences. */
static int32_t position_of(const mien_batch *batch, int32_t token, const mien_sequence *sequences) {
    if (batch->positions) return batch->positions[token];
    int32_t count, left = batch->n_tokens - token;
    const int32_t first = sequences_of(batch, token, &count)[0];
    for (int32_t t = token; t < batch->n_tokens && batch->sequences; t++)
        left -= sequences_of(batch, t, &count)[0] != first;
    return sequences[first].next - left;
}

/* ---- orders ------------------------------------------------------------------------------------- */

static bool has_sequence(const mien_batch *batch, int32_t token, int32_t sequence) {
    int32_t count;
    const int32_t *its = sequences_of(batch, token, &count);
    for (int32_t i = 0; i < count; i++)
        if (its[i] == sequence) return true;
    return false;
}

static bool share_a_sequence(const mien_batch *batch, int32_t a, int32_t b) {
    int32_t count;
    const int32_t *its = sequences_of(batch, a, &count);
    for (int32_t i = 0; i < count; i++)
        if (has_sequence(batch, b, its[i])) return true;
    return false;
}

static bool has_all_of(const mien_batch *batch, int32_t a, int32_t b) {
    int32_t count;
    const int32_t *its = sequences_of(batch, b, &count);
    for (int32_t i = 0; i < count; i++)
        if (!has_sequence(batch, a, its[i])) return false;
    return true;
}

static bool same_sequences(const mien_batch *batch, int32_t a, int32_t b) {
    return has_all_of(batch, a, b) && has_all_of(batch, b, a);
}

/* The first token from `from` on that is of the same sequences as `like` and not used yet; n_tokens if none. */
static int32_t next_like(const mien_batch *batch, const int32_t *used, int32_t like, int32_t from) {
    while (from < batch->n_tokens && (used[from] || !same_sequences(batch, like, from))) from++;
    return from;
}

/* As llama.cpp's split_equal: micro-batches of as many tokens of each sequence in it, sequence after
 * sequence. `sequential`: only of sequences whose numbers follow each other. used, heads, cursors: n_tokens. */
static void equal_order(const mien_batch *batch, int32_t n_ubatch, bool sequential, int32_t *order, int32_t *used,
                        int32_t *heads, int32_t *cursors) {
    const int32_t n = batch->n_tokens;
    memset(used, 0, (size_t)n * sizeof *used);
    for (int32_t done = 0; done < n;) {
        int32_t n_heads = 0, last = -1;
        for (int32_t t = 0; t < n && n_heads <= n_ubatch; t++) {
            bool fits = !used[t];
            for (int32_t h = 0; h < n_heads && fits; h++) fits = !share_a_sequence(batch, heads[h], t);
            int32_t count;
            const int32_t sequence = sequences_of(batch, t, &count)[0];
            if (fits && sequential && n_heads) fits = sequence == last + 1;
            if (!fits) continue;
            heads[n_heads++] = next_like(batch, used, t, 0); /* one before t did not fit `last` then */
            last = sequence;
        }
        /* how many of each there can be */
        int32_t rounds = 0;
        memcpy(cursors, heads, (size_t)n_heads * sizeof *heads);
        for (bool more = true; more;) {
            rounds++;
            more = (rounds + 1) * n_heads <= n_ubatch;
            for (int32_t h = 0; h < n_heads && more; h++) {
                cursors[h] = next_like(batch, used, heads[h], cursors[h] + 1);
                more = cursors[h] < n;
            }
        }
        for (int32_t h = 0; h < n_heads; h++) {
            int32_t t = heads[h];
            for (int32_t r = 0; r < rounds; r++) {
                order[done++] = t;
                used[t] = 1;
                if (r + 1 < rounds) t = next_like(batch, used, heads[h], t + 1);
            }
        }
    }
}

/* ---- an evaluation ------------------------------------------------------------------------------ */

static void free_rows(mien_rows *rows) {
    free(rows->token);
    free(rows->sequence);
    free(rows->program);
    free(rows->what);
}

void mien_evaluation_free(mien_evaluation *evaluation) {
    free_rows(&evaluation->tokens);
    free_rows(&evaluation->all);
    free_rows(&evaluation->outputs);
    for (int i = 0; i < MIEN_ORDERS; i++) free(evaluation->orders[i]);
    free(evaluation->scratch);
    *evaluation = (mien_evaluation){0};
}

static bool grow_rows(mien_rows *rows, size_t n) {
    rows->token = malloc(n * sizeof *rows->token);
    rows->sequence = malloc(n * sizeof *rows->sequence);
    rows->program = malloc(n * sizeof *rows->program);
    rows->what = malloc(n * sizeof *rows->what);
    return rows->token && rows->sequence && rows->program && rows->what;
}

static bool grow(mien_evaluation *evaluation, int32_t n_tokens) {
    if (n_tokens <= evaluation->capacity) return true;
    mien_evaluation_free(evaluation);
    const size_t n = (size_t)n_tokens;
    bool all = grow_rows(&evaluation->tokens, n) && grow_rows(&evaluation->all, n) &&
               grow_rows(&evaluation->outputs, n);
    for (int i = 0; i < MIEN_ORDERS; i++) all = (evaluation->orders[i] = malloc(n * sizeof(int32_t))) && all;
    evaluation->scratch = malloc(3 * n * sizeof(int32_t));
    if (!all || !evaluation->scratch) {
        mien_evaluation_free(evaluation);
        return false;
    }
    evaluation->capacity = n_tokens;
    return true;
}

mien_status mien_evaluation_begin(mien_evaluation *evaluation, const mien_batch *batch,
                                  const mien_sequence *sequences, int32_t n, int32_t n_ubatch,
                                  const mien_order *orders) {
    evaluation->n_tokens = 0;
    if (!grow(evaluation, batch->n_tokens)) return MIEN_ERR_MEMORY;
    evaluation->all.n = evaluation->outputs.n = 0;
    evaluation->ids = batch->ids;
    evaluation->positions = batch->positions;
    evaluation->output = batch->outputs;
    evaluation->n_orders = evaluation->order = 0;
    bool one_sequence = true;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const int32_t number = mien_batch_sequence(batch, t, sequences, n);
        const mien_sequence *sequence = &sequences[number];
        const int32_t reply = position_of(batch, t, sequences) - sequence->reply_from;
        evaluation->tokens.token[t] = t;
        evaluation->tokens.sequence[t] = number;
        evaluation->tokens.program[t] = reply >= 0 ? sequence->response : sequence->prompt;
        evaluation->tokens.what[t] =
            reply >= 0 ? (mien_token){reply, sequence->memory} : (mien_token){-1, NULL};
        if (reply >= 0 && sequence->memory) {
            const mien_status status = mien_memory_reserve(sequence->memory, reply + 1);
            if (status != MIEN_OK) return status;
        }
        one_sequence = one_sequence && same_sequences(batch, 0, t);
    }
    int32_t *used = evaluation->scratch, *heads = used + batch->n_tokens, *cursors = heads + batch->n_tokens;
    for (int i = 0; i < MIEN_ORDERS && !one_sequence && orders[i] != MIEN_ORDER_NONE; i++) {
        int32_t *order = evaluation->orders[evaluation->n_orders++];
        if (orders[i] == MIEN_ORDER_SIMPLE)
            for (int32_t t = 0; t < batch->n_tokens; t++) order[t] = t;
        else
            equal_order(batch, n_ubatch, orders[i] == MIEN_ORDER_SEQUENTIAL, order, used, heads, cursors);
    }
    evaluation->n_tokens = batch->n_tokens;
    evaluation->tokens.n = batch->n_tokens;
    return MIEN_OK;
}

bool mien_evaluation_needs_inputs(const mien_evaluation *evaluation) { return evaluation->n_orders > 0; }

static void put(mien_rows *rows, const mien_rows *tokens, int32_t token) {
    rows->token[rows->n] = token;
    rows->sequence[rows->n] = tokens->sequence[token];
    rows->program[rows->n] = tokens->program[token];
    rows->what[rows->n++] = tokens->what[token];
}

static bool agrees(const int32_t *order, const int32_t *of_batch, int32_t n, const int32_t *of_graph) {
    for (int32_t r = 0; of_batch && of_graph && r < n; r++)
        if (of_batch[order[r]] != of_graph[r]) return false;
    return true;
}

/* The order that holds for this graph, too. One that held for graphs before may give way to the next only
 * where that has the same tokens in them: else they were taken for others. Positions tell sequences apart that
 * repeat the same tokens. */
static const int32_t *order_of(mien_evaluation *evaluation, int32_t before, int32_t n, const int32_t *ids,
                               const int32_t *positions) {
    if (!(ids && evaluation->ids) && !(positions && evaluation->positions)) return NULL;
    const int32_t *held = NULL;
    for (; evaluation->order < evaluation->n_orders; evaluation->order++) {
        const int32_t *order = evaluation->orders[evaluation->order];
        if (held && memcmp(order, held, (size_t)before * sizeof *order)) continue;
        if (agrees(order + before, evaluation->ids, n, ids) &&
            agrees(order + before, evaluation->positions, n, positions))
            return order;
        if (!held) held = order;
    }
    return NULL;
}

bool mien_evaluation_graph(mien_evaluation *evaluation, int32_t before, int32_t n, const int32_t *ids,
                           const int32_t *positions) {
    evaluation->all.n = evaluation->outputs.n = 0;
    if (before < 0 || n > evaluation->n_tokens - before) return false;
    const int32_t *order = evaluation->n_orders ? order_of(evaluation, before, n, ids, positions) : NULL;
    if (evaluation->n_orders && !order) return false;
    for (int32_t r = 0; r < n; r++) {
        const int32_t token = order ? order[before + r] : before + r;
        put(&evaluation->all, &evaluation->tokens, token);
        const bool output = evaluation->output ? evaluation->output[token] : token == evaluation->n_tokens - 1;
        if (output) put(&evaluation->outputs, &evaluation->tokens, token);
    }
    return true;
}

const mien_rows *mien_evaluation_rows(const mien_evaluation *evaluation, int64_t rows) {
    if (rows == evaluation->all.n) return &evaluation->all;
    return rows == evaluation->outputs.n ? &evaluation->outputs : NULL;
}
