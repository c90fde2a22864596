/* Batches without a hook: where replies begin, in which order llama.cpp's rules cut tokens into micro-batches,
 * and which token each row of a graph is. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function" /* there are no rows of floats here */
#include "testing.h"
#pragma GCC diagnostic pop

#include <math.h>

#include "mien_batch.h"

enum { MAX_TOKENS = 40, MAX_SEQUENCES = 6, AT_ONCE = 3 };

#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* ---- batches ------------------------------------------------------------------------------------ */

typedef struct {
    int32_t n, ids[MAX_TOKENS], positions[MAX_TOKENS], counts[MAX_TOKENS], sets[MAX_TOKENS][AT_ONCE];
    int32_t *sequences[MAX_TOKENS];
    int8_t outputs[MAX_TOKENS];
} tokens;

static bool is_number(int32_t sequence) { return sequence >= 0 && sequence < MAX_SEQUENCES; }

/* One for each word of `sequences`, whose digits are the token's sequences. Positions count on from `next`,
 * ids are all different. */
static void make_tokens(tokens *made, const char *sequences, int32_t next[MAX_SEQUENCES]) {
    memset(made, 0, sizeof *made);
    for (const char *at = sequences; *at; at++) {
        if (*at == ' ') {
            made->n++;
            continue;
        }
        const int32_t sequence = *at - '0', t = made->n;
        made->sequences[t] = made->sets[t];
        made->sets[t][made->counts[t]++] = sequence;
        made->ids[t] = 100 + 7 * t;
    }
    made->n += *sequences != 0;
    for (int32_t t = 0; t < made->n; t++)
        for (int32_t i = 0; i < made->counts[t]; i++)
            if (is_number(made->sets[t][i])) made->positions[t] = next[made->sets[t][i]]++;
}

static mien_batch batch_of(tokens *from) {
    const mien_batch batch = {from->n, from->ids, from->positions, from->counts, from->sequences, from->outputs};
    return batch;
}

static void new_sequences(mien_sequence sequences[MAX_SEQUENCES]) {
    memset(sequences, 0, MAX_SEQUENCES * sizeof *sequences);
    for (int i = 0; i < MAX_SEQUENCES; i++) sequences[i].reply_from = INT32_MAX;
}

/* No more than addresses to what only looks at addresses. */
static char somewhere[4];
static mien_program *program(int i) { return (mien_program *)(void *)&somewhere[i]; }

static bool continued; /* of the last mien_batch_follow */
static const mien_order no_orders[MIEN_ORDERS] = {MIEN_ORDER_NONE, MIEN_ORDER_NONE};

/* ---- sequences ---------------------------------------------------------------------------------- */

static void a_token_is_of_its_first_sequence_where_all_are_steered_alike(void) {
    mien_sequence sequences[MAX_SEQUENCES];
    new_sequences(sequences);
    sequences[2].response = program(0);
    sequences[3].response = program(0);
    sequences[4].prompt = program(0);
    static const struct {
        const char *sequences;
        int32_t expected;
    } table[] = {{"0", 0},   {"3", 3},   {"01", 0},  {"10", 1},  {"32", 3},  {"23", 2},  {"02", -1}, {"20", -1},
                 {"24", -1}, {"045", -1}, {"015", 0}, {"6", -1},  {"06", -1}, {"60", -1}, {"/", -1},  {"0/", -1}};
    for (size_t i = 0; i < LENGTH(table); i++) {
        int32_t next[MAX_SEQUENCES] = {0};
        tokens one;
        make_tokens(&one, table[i].sequences, next); /* '/' is number -1 */
        const mien_batch batch = batch_of(&one);
        if (!CHECK(mien_batch_sequence(&batch, 0, sequences, MAX_SEQUENCES) == table[i].expected))
            printf("  row %zu of the table\n", i);
    }
}

static void what_a_batch_leaves_out_is_one_sequence_number_0(void) {
    int32_t next[MAX_SEQUENCES] = {0};
    mien_sequence sequences[MAX_SEQUENCES];
    new_sequences(sequences);
    tokens two;
    make_tokens(&two, "12 3", next);
    mien_batch batch = batch_of(&two);
    batch.n_sequences = NULL; /* one each then */
    CHECK(mien_batch_sequence(&batch, 0, sequences, 2) == 1);
    batch.sequences = NULL;
    CHECK(mien_batch_sequence(&batch, 1, sequences, 2) == 0);
    batch = batch_of(&two);
    two.sequences[1] = NULL;
    CHECK(mien_batch_sequence(&batch, 1, sequences, 2) == 0);
    two.counts[0] = 0;
    CHECK(mien_batch_sequence(&batch, 0, sequences, MAX_SEQUENCES) == -1);
}

/* One batch after another: its tokens, where their positions count on from, and where the replies of
 * sequences 0 and 1 begin after it; 99 for one that has not begun. */
typedef struct {
    const char *sequences;
    int32_t from[2], reply[2];
} step;
enum { STEPS = 6, NOT_YET = 99 };

static void a_reply_begins_after_what_is_given_at_once(void) {
    static const step table[][STEPS] = {
        {{"0 0 0", {0}, {3, NOT_YET}}, {"0", {3}, {3, NOT_YET}}, {"0", {4}, {3, NOT_YET}}},
        {{"0", {0}, {1, NOT_YET}}, {"0", {1}, {1, NOT_YET}}},            /* a first token is given */
        {{"0", {7}, {7, NOT_YET}}, {"0", {8}, {7, NOT_YET}}},            /* of what was given nothing was seen */
        {{"0 0", {0}, {2, NOT_YET}}, {"0 0 0", {2}, {5, NOT_YET}}},      /* a prompt over two batches */
        {{"0 0", {0}, {2, NOT_YET}}, {"0", {2}, {2, NOT_YET}}, {"0 0", {3}, {5, NOT_YET}}, {"0", {5}, {5, NOT_YET}}},
        {{"0 0", {0}, {2, NOT_YET}}, {"0", {2}, {2, NOT_YET}}, {"0", {2}, {2, NOT_YET}}}, /* taken back */
        {{"0 0 0", {0}, {3, NOT_YET}}, {"0", {2}, {2, NOT_YET}}},        /* by more than the reply */
        {{"0 0 0", {0}, {3, NOT_YET}}, {"0", {3}, {3, NOT_YET}}, {"0 0", {0}, {2, NOT_YET}}}, /* another prompt */
        {{"0 1 0 1 1", {0, 0}, {2, 3}}, {"1 0", {2, 3}, {2, 3}}, {"1 0 1", {3, 4}, {2, 6}}},
        {{"0 1", {0, 0}, {1, 1}}, {"0 0 1", {1, 1}, {3, 1}}},
        {{"01 01 01", {0, 0}, {3, 3}}, {"1", {0, 3}, {3, 3}}, {"0", {3, 0}, {3, 3}}},
        {{"1 1", {0, 0}, {NOT_YET, 2}}, {"1", {0, 2}, {NOT_YET, 2}}, {"01 01 01 01", {0}, {4, 4}}, {"1", {0, 4}, {4, 4}}},
        {{"01 01 0 1 1", {0, 0}, {3, 4}}},
        {{"0 0 1", {0}, {2, 1}}, {"1", {0, 2}, {2, 2}}, {"1", {0, 3}, {2, 2}}, {"0", {9}, {9, 2}}}, /* unseen ones */
    };
    for (size_t i = 0; i < LENGTH(table); i++) {
        mien_sequence sequences[MAX_SEQUENCES];
        new_sequences(sequences);
        for (uint64_t s = 0; s < STEPS && table[i][s].sequences; s++) {
            const step *now = &table[i][s];
            int32_t next[MAX_SEQUENCES] = {now->from[0], now->from[1]};
            tokens given;
            make_tokens(&given, now->sequences, next);
            memset(given.outputs, 1, sizeof given.outputs);
            const mien_batch batch = batch_of(&given);
            CHECK(mien_batch_follow(&batch, sequences, MAX_SEQUENCES, s + 1, &continued) == MIEN_OK);
            for (int k = 0; k < 2; k++) {
                const int32_t expected = now->reply[k] == NOT_YET ? INT32_MAX : now->reply[k];
                if (!CHECK(sequences[k].reply_from == expected))
                    printf("  row %zu, step %d, sequence %d: %d\n", i, (int)s, k, (int)sequences[k].reply_from);
                if (strchr(now->sequences, '0' + k)) CHECK(sequences[k].next == next[k]);
            }
        }
    }
}

/* A token can't have been drawn from one that asked for no logits: so the rest of a prompt is known, even if it
 * is one token. */
static void what_follows_a_token_without_logits_is_given(void) {
    mien_sequence sequences[MAX_SEQUENCES];
    new_sequences(sequences);
    static const struct {
        const char *sequences;
        int8_t output;
        int32_t from, reply;
    } steps[] = {{"0 0 0", 0, 0, 3}, {"0", 0, 3, 4}, {"0", 1, 4, 5}, {"0", 1, 5, 5}, {"0", 0, 6, 5}, {"0", 1, 7, 8},
                 {"0", 0, 8, 8},     {"0", 1, 20, 20}}; /* not the next one: nobody knows what was between */
    for (uint64_t s = 0; s < LENGTH(steps); s++) {
        int32_t next[MAX_SEQUENCES] = {steps[s].from};
        tokens given;
        make_tokens(&given, steps[s].sequences, next);
        given.outputs[given.n - 1] = steps[s].output;
        const mien_batch batch = batch_of(&given);
        CHECK(mien_batch_follow(&batch, sequences, MAX_SEQUENCES, s + 1, &continued) == MIEN_OK && !continued);
        if (!CHECK(sequences[0].reply_from == steps[s].reply))
            printf("  step %d: %d\n", (int)s, (int)sequences[0].reply_from);
    }
}

static void a_reply_that_continues_with_several_tokens_is_noticed_unless_told(void) {
    for (int told = 0; told < 2; told++) {
        mien_sequence sequences[MAX_SEQUENCES];
        new_sequences(sequences);
        sequences[0].told = told;
        sequences[0].reply_from = 3;
        static const struct {
            const char *sequences;
            bool continued;
        } steps[] = {{"0 0 0", false}, {"0 0", false}, {"0", false},   {"0", false},  {"0 0 1", true}, {"0 0", false},
                     {"1 1", false},   {"0 1", false}, {"0 1 1", true}, {"0 0", true}, {"0", false}};
        int32_t next[MAX_SEQUENCES] = {0};
        for (uint64_t s = 0; s < LENGTH(steps); s++) {
            tokens given;
            make_tokens(&given, steps[s].sequences, next);
            memset(given.outputs, 1, sizeof given.outputs);
            const mien_batch batch = batch_of(&given);
            CHECK(mien_batch_follow(&batch, sequences, MAX_SEQUENCES, s + 1, &continued) == MIEN_OK);
            const bool other = !strcmp(steps[s].sequences, "0 1 1"); /* of sequence 1, of which nobody told */
            if (!CHECK(continued == (steps[s].continued && (!told || other)))) printf("  step %d\n", (int)s);
        }
    }
}

static void a_reply_that_was_told_stays(void) {
    mien_sequence sequences[MAX_SEQUENCES];
    new_sequences(sequences);
    sequences[0].told = true;
    sequences[0].reply_from = 2;
    static const char *const batches[] = {"0 0 0 0", "0", "0 0"};
    int32_t next[MAX_SEQUENCES] = {0};
    for (uint64_t s = 0; s < LENGTH(batches); s++) {
        tokens given;
        make_tokens(&given, batches[s], next);
        const mien_batch batch = batch_of(&given);
        CHECK(mien_batch_follow(&batch, sequences, MAX_SEQUENCES, s + 1, &continued) == MIEN_OK);
        CHECK(sequences[0].reply_from == 2);
    }
    CHECK(sequences[0].next == 7);
}

static void a_batch_with_a_token_of_no_sequence_changes_nothing(void) {
    mien_sequence sequences[MAX_SEQUENCES], before[MAX_SEQUENCES];
    new_sequences(sequences);
    sequences[1].prompt = program(0);
    memcpy(before, sequences, sizeof before);
    static const char *const batches[] = {"0 0 6", "0 01", "/ 0"};
    for (size_t i = 0; i < LENGTH(batches); i++) {
        int32_t next[MAX_SEQUENCES] = {0};
        tokens given;
        make_tokens(&given, batches[i], next);
        const mien_batch batch = batch_of(&given);
        CHECK(mien_batch_follow(&batch, sequences, MAX_SEQUENCES, 1, &continued) == MIEN_ERR_ROWS);
        CHECK(!memcmp(sequences, before, sizeof before));
    }
}

/* ---- what acts on a token ----------------------------------------------------------------------- */

static bool rows_are(const mien_rows *rows, const int32_t *numbers, int64_t n) {
    bool same = rows->n == n;
    for (int64_t r = 0; same && r < n; r++) same = rows->token[r] == numbers[r];
    return same;
}

static void a_token_has_its_sequences_program_and_its_number_in_the_reply(void) {
    mien_sequence sequences[MAX_SEQUENCES];
    new_sequences(sequences);
    sequences[0].prompt = program(0), sequences[0].response = program(1);
    sequences[1].response = program(2);
    sequences[0].told = sequences[1].told = true;
    sequences[0].reply_from = 6, sequences[1].reply_from = 0;
    int32_t next[MAX_SEQUENCES] = {5};
    tokens given;
    make_tokens(&given, "0 1 2 0 2 1 0", next);
    const mien_batch batch = batch_of(&given);
    mien_evaluation evaluation = {0};
    CHECK(mien_batch_follow(&batch, sequences, MAX_SEQUENCES, 1, &continued) == MIEN_OK);
    CHECK(mien_evaluation_begin(&evaluation, &batch, sequences, MAX_SEQUENCES, 8, no_orders) == MIEN_OK);
    static const int32_t replies[] = {-1, 0, -1, 0, -1, 1, 1}, of[] = {0, 1, 2, 0, 2, 1, 0};
    mien_program *const acting[] = {program(0), program(2), NULL, program(1), NULL, program(2), program(1)};
    CHECK(evaluation.n_tokens == 7 && rows_are(&evaluation.tokens, (const int32_t[]){0, 1, 2, 3, 4, 5, 6}, 7));
    for (int t = 0; t < 7; t++) {
        CHECK(evaluation.tokens.sequence[t] == of[t]);
        CHECK(evaluation.tokens.program[t] == acting[t]);
        CHECK(evaluation.tokens.what[t].reply == replies[t] && !evaluation.tokens.what[t].memory);
    }
    mien_evaluation_free(&evaluation);
}

static void positions_count_on_where_a_batch_has_none(void) {
    mien_sequence sequences[MAX_SEQUENCES];
    new_sequences(sequences);
    mien_evaluation evaluation = {0};
    static const struct {
        const char *sequences;
        int32_t replies[5];
    } table[] = {{"0 0 0", {-1, -1, -1}}, {"0", {0}},           {"0", {1}},
                 {"1 0 1", {-1, 2, -1}},  {"1 0", {0, 3}},      {"0 1 1 0", {-1, -1, -1, -1}},
                 {"1 0", {0, 0}},         {"2 2 0", {-1, -1, 1}}, {"2", {0}}};
    for (uint64_t i = 0; i < LENGTH(table); i++) {
        int32_t next[MAX_SEQUENCES] = {0};
        tokens given;
        make_tokens(&given, table[i].sequences, next);
        memset(given.outputs, 1, sizeof given.outputs);
        mien_batch batch = batch_of(&given);
        batch.positions = NULL;
        if (i < 3) batch.sequences = NULL, batch.n_sequences = NULL; /* as llama_batch_get_one makes it */
        CHECK(mien_batch_follow(&batch, sequences, MAX_SEQUENCES, i + 1, &continued) == MIEN_OK);
        CHECK(mien_evaluation_begin(&evaluation, &batch, sequences, MAX_SEQUENCES, 8, no_orders) == MIEN_OK);
        for (int32_t t = 0; t < batch.n_tokens; t++)
            if (!CHECK(evaluation.tokens.what[t].reply == table[i].replies[t]))
                printf("  row %d, token %d: %d\n", (int)i, (int)t, (int)evaluation.tokens.what[t].reply);
    }
    mien_evaluation_free(&evaluation);
}

/* ---- orders ------------------------------------------------------------------------------------- */

static const mien_order simple[MIEN_ORDERS] = {MIEN_ORDER_SIMPLE, MIEN_ORDER_NONE};
static const mien_order equal[MIEN_ORDERS] = {MIEN_ORDER_EQUAL, MIEN_ORDER_NONE};
static const mien_order sequential[MIEN_ORDERS] = {MIEN_ORDER_SEQUENTIAL, MIEN_ORDER_NONE};

static mien_evaluation begin(tokens *given, int32_t n_ubatch, const mien_order *orders) {
    mien_sequence sequences[MAX_SEQUENCES];
    new_sequences(sequences);
    const mien_batch batch = batch_of(given);
    mien_evaluation evaluation = {0};
    CHECK(mien_batch_follow(&batch, sequences, MAX_SEQUENCES, 1, &continued) == MIEN_OK);
    CHECK(mien_evaluation_begin(&evaluation, &batch, sequences, MAX_SEQUENCES, n_ubatch, orders) == MIEN_OK);
    return evaluation;
}

/* Worked out by hand from llama-batch.cpp; bars are where one micro-batch ends. */
static void orders_are_those_of_llama_cpp(void) {
    static const struct {
        const char *sequences;
        int32_t n_ubatch;
        const char *simple, *equal, *sequential;
    } table[] = {
        {"0 1", 8, "0 1", "0 1", "0 1"},
        {"1 0", 8, "0 1", "0 1", "0|1"},
        {"0 1 0 1", 8, "0 1 2 3", "0 2 1 3", "0 2 1 3"},
        {"0 0 1 1", 8, "0 1 2 3", "0 1 2 3", "0 1 2 3"},
        {"0 1 0 1", 2, "0 1|2 3", "0 1|2 3", "0 1|2 3"},
        {"0 1 0 1", 3, "0 1 2|3", "0 1|2 3", "0 1|2 3"},
        {"0 1 0 0", 8, "0 1 2 3", "0 1|2 3", "0 1|2 3"},              /* as many tokens of each */
        {"0 0 0 1", 8, "0 1 2 3", "0 3|1 2", "0 3|1 2"},
        {"0 0 0 0 0 1 1", 4, "0 1 2 3|4 5 6", "0 1 5 6|2 3 4", "0 1 5 6|2 3 4"},
        {"0 0 0 0 0 0 0 1 1", 4, "0 1 2 3|4 5 6 7|8", "0 1 7 8|2 3 4 5|6", "0 1 7 8|2 3 4 5|6"},
        {"0 1 2 0 1 2", 8, "0 1 2 3 4 5", "0 3 1 4 2 5", "0 3 1 4 2 5"},
        {"0 1 2 0 1 2", 4, "0 1 2 3|4 5", "0 1 2|3 4 5", "0 1 2|3 4 5"},
        {"0 2 0 2", 8, "0 1 2 3", "0 2 1 3", "0 2|1 3"},              /* 2 does not follow 0 */
        {"2 1 0", 8, "0 1 2", "0 1 2", "0|1|2"},
        {"2 3 0 1", 8, "0 1 2 3", "0 1 2 3", "0 1|2 3"},
        {"1 3 2 3 1", 8, "0 1 2 3 4", "0 1 2|3 4", "0 2 1|3|4"},      /* 3 fits only after 2, and begins at token 1 */
        {"0 1 2 3", 2, "0 1|2 3", "0 1 2|3", "0 1 2|3"},              /* one more than asked for: so does llama.cpp */
        {"0 1 2 2 0", 2, "0 1|2 3|4", "0 1 2|3 4", "0 1 2|3|4"},
        {"0 1 2 3", 1, "0|1|2|3", "0 1|2 3", "0 1|2 3"},
        {"0 1 1 0 0", 1, "0|1|2|3|4", "0 1|2 3|4", "0 1|2|3|4"},
        {"01 01 0 1", 8, "0 1 2 3", "0 1|2 3", NULL},                 /* shared tokens aren't cut with either's own */
        {"01 2 01 2", 8, "0 1 2 3", "0 2 1 3", NULL},
        {"01 10 2", 8, "0 1 2", "0 2|1", NULL},
        {"012 3 012 2 1 0", 8, "0 1 2 3 4 5", "0 1|2|3 4 5", NULL},
    };
    for (size_t i = 0; i < LENGTH(table); i++) {
        const char *const expected[] = {table[i].simple, table[i].equal, table[i].sequential};
        const mien_order *const orders[] = {simple, equal, sequential};
        for (int k = 0; k < 3; k++) {
            if (!expected[k]) continue;
            int32_t next[MAX_SEQUENCES] = {0};
            tokens given;
            make_tokens(&given, table[i].sequences, next);
            mien_evaluation evaluation = begin(&given, table[i].n_ubatch, orders[k]);
            CHECK(mien_evaluation_needs_inputs(&evaluation));
            const char *at = expected[k];
            for (int32_t done = 0; done < given.n;) { /* graph after graph */
                int32_t n = 0, numbers[MAX_TOKENS], ids[MAX_TOKENS];
                for (bool ends = false; !ends; at++) {
                    ends = !*at || *at == '|';
                    if (*at >= '0' && *at <= '9') numbers[n] = *at - '0', ids[n] = given.ids[numbers[n]], n++;
                    if (!*at) break;
                }
                const bool holds = mien_evaluation_graph(&evaluation, done, n, ids, NULL);
                if (!CHECK(holds && rows_are(&evaluation.all, numbers, n))) {
                    printf("  row %zu, order %d, from %d:", i, k, (int)done);
                    for (int32_t r = 0; r < given.n; r++) printf(" %d", (int)evaluation.orders[0][r]);
                    printf("\n");
                    break;
                }
                done += n;
            }
            mien_evaluation_free(&evaluation);
        }
    }
}

static void a_batch_of_one_sequence_needs_no_order(void) {
    static const char *const alone[] = {"0", "0 0 0", "2 2", "01 10 01"};
    for (size_t i = 0; i < LENGTH(alone); i++) {
        int32_t next[MAX_SEQUENCES] = {0};
        tokens given;
        make_tokens(&given, alone[i], next);
        mien_evaluation evaluation = begin(&given, 2, sequential);
        CHECK(!mien_evaluation_needs_inputs(&evaluation));
        CHECK(mien_evaluation_graph(&evaluation, 0, given.n, NULL, NULL));
        CHECK(rows_are(&evaluation.all, (const int32_t[]){0, 1, 2}, given.n));
        mien_evaluation_free(&evaluation);
    }
    int32_t next[MAX_SEQUENCES] = {0};
    tokens given;
    make_tokens(&given, "0 1 0", next);
    mien_evaluation evaluation = begin(&given, 2, no_orders); /* nor one that is cut as it stands */
    CHECK(!mien_evaluation_needs_inputs(&evaluation));
    mien_evaluation_free(&evaluation);
    mien_batch batch = batch_of(&given);
    batch.n_sequences = NULL; /* a sequence each */
    mien_sequence sequences[MAX_SEQUENCES];
    new_sequences(sequences);
    evaluation = (mien_evaluation){0};
    CHECK(mien_evaluation_begin(&evaluation, &batch, sequences, MAX_SEQUENCES, 8, equal) == MIEN_OK);
    CHECK(mien_evaluation_needs_inputs(&evaluation));
    CHECK(mien_evaluation_graph(&evaluation, 0, 2, (const int32_t[]){100, 107}, NULL));
    CHECK(mien_evaluation_graph(&evaluation, 2, 1, (const int32_t[]){114}, NULL));
    mien_evaluation_free(&evaluation);
}

/* Random batches of sequences and pairs of them, checked for what every order must have. */
static void every_order_has_each_token_once_and_each_sequence_in_its_order(void) {
    enum { ROUNDS = 3000 };
    for (int round = 0; round < ROUNDS; round++) {
        random_state = (uint32_t)round + 1;
        const int32_t n = 1 + (int32_t)(random_state * 2654435761u >> 8) % (MAX_TOKENS - 1);
        char words[3 * MAX_TOKENS + 1], *end = words;
        const int32_t n_sequences = 1 + (int32_t)fabsf(random_float() * 2);
        const int32_t n_ubatch = 1 + (int32_t)fabsf(random_float() * 5);
        for (int32_t t = 0; t < n; t++) {
            const int32_t first = (int32_t)fabsf(random_float() * 1e4f) % n_sequences;
            if (t) *end++ = ' ';
            *end++ = (char)('0' + first);
            const bool pair = round % 3 == 0 && random_float() > 1 && n_sequences > 1;
            if (pair) *end++ = (char)('0' + (first + 1) % n_sequences);
        }
        *end = 0;
        const mien_order *const orders[] = {simple, equal, sequential};
        for (int k = 0; k < 3; k++) {
            int32_t next[MAX_SEQUENCES] = {0}, last[MAX_SEQUENCES];
            tokens given;
            make_tokens(&given, words, next);
            mien_evaluation evaluation = begin(&given, n_ubatch, orders[k]);
            bool seen[MAX_TOKENS] = {false}, right = given.n == n;
            for (int i = 0; i < MAX_SEQUENCES; i++) last[i] = -1;
            for (int32_t r = 0; r < n && right && evaluation.n_orders; r++) {
                const int32_t t = evaluation.orders[0][r];
                right = t >= 0 && t < n && !seen[t];
                if (!right) break;
                seen[t] = true;
                bool lone = given.counts[t] == 1; /* a pair's tokens and one's own may change places */
                for (int32_t u = 0; u < n; u++) lone = lone && given.counts[u] == 1;
                const int32_t of = given.sets[t][0];
                right = !lone || t > last[of];
                last[of] = t;
            }
            if (!CHECK(right)) printf("  round %d, order %d: %s\n", round, k, words);
            mien_evaluation_free(&evaluation);
        }
    }
}

/* ---- graphs ------------------------------------------------------------------------------------- */

static void a_graphs_rows_are_all_its_tokens_or_those_with_logits(void) {
    int32_t next[MAX_SEQUENCES] = {0};
    tokens given;
    make_tokens(&given, "0 1 0 1 0", next); /* equal, of 4: 0 2 1 3, then 4 */
    given.outputs[1] = given.outputs[2] = given.outputs[4] = 1;
    const int32_t ids[] = {given.ids[0], given.ids[2], given.ids[1], given.ids[3], given.ids[4]};
    mien_evaluation evaluation = begin(&given, 4, equal);
    CHECK(mien_evaluation_graph(&evaluation, 0, 4, ids, NULL));
    CHECK(rows_are(mien_evaluation_rows(&evaluation, 4), (const int32_t[]){0, 2, 1, 3}, 4));
    CHECK(rows_are(mien_evaluation_rows(&evaluation, 2), (const int32_t[]){2, 1}, 2));
    CHECK(evaluation.all.sequence[2] == 1 && evaluation.all.what[1].reply == -1);
    CHECK(!mien_evaluation_rows(&evaluation, 3) && !mien_evaluation_rows(&evaluation, 0));
    CHECK(mien_evaluation_graph(&evaluation, 4, 1, ids + 4, NULL));
    CHECK(rows_are(mien_evaluation_rows(&evaluation, 1), (const int32_t[]){4}, 1));
    CHECK(!mien_evaluation_graph(&evaluation, 4, 2, ids + 3, NULL)); /* one more than there are */
    CHECK(!mien_evaluation_graph(&evaluation, -1, 1, ids, NULL));
    CHECK(!mien_evaluation_rows(&evaluation, 2));
    mien_evaluation_free(&evaluation);

    mien_batch batch = batch_of(&given);
    mien_sequence sequences[MAX_SEQUENCES];
    new_sequences(sequences);
    batch.outputs = NULL; /* the last token's then */
    evaluation = (mien_evaluation){0};
    CHECK(mien_evaluation_begin(&evaluation, &batch, sequences, MAX_SEQUENCES, 8, no_orders) == MIEN_OK);
    CHECK(mien_evaluation_graph(&evaluation, 0, 3, NULL, NULL));
    CHECK(mien_evaluation_rows(&evaluation, 0) && !mien_evaluation_rows(&evaluation, 1));
    CHECK(mien_evaluation_graph(&evaluation, 3, 2, NULL, NULL));
    CHECK(rows_are(mien_evaluation_rows(&evaluation, 1), (const int32_t[]){4}, 1));
    mien_evaluation_free(&evaluation);
}

/* The rule is simple, and equal what is done where it can't be kept to. */
static void an_order_holds_until_a_graphs_ids_say_otherwise(void) {
    static const mien_order both[MIEN_ORDERS] = {MIEN_ORDER_SIMPLE, MIEN_ORDER_EQUAL};
    static const struct {
        const char *sequences, *graphs, *expected; /* a graph's ids by number of the token; yes or no for each */
    } table[] = {
        {"0 1 0 1 0 1", "0 1|2 3|4 5", "yyy"},
        {"0 0 1 1 0 0", "0 2|1 3|4 5", "yyy"},     /* equal from the first graph on */
        {"0 1 0 0 1 1", "0 1|2 4|3 5", "yyy"},     /* from the second on: the first is the same in both */
        {"0 0 1 1 0 0", "0 1|1 3|4 5", "ynn"},     /* too late: the first was taken for other tokens */
        {"0 0 1 1 0 0", "0 2|2 3|4 5", "ynn"},     /* nor back again */
        {"0 0 1 1 0 0", "5 4|2 3|4 5", "nnn"},
        {"0 0 1 1 0 0", "0 1|2 3|4 4", "yyn"},
    };
    for (size_t i = 0; i < LENGTH(table); i++) {
        int32_t next[MAX_SEQUENCES] = {0};
        tokens given;
        make_tokens(&given, table[i].sequences, next);
        mien_evaluation evaluation = begin(&given, 2, both);
        for (int32_t graph = 0; graph < 3; graph++) {
            const int32_t numbers[] = {table[i].graphs[4 * graph] - '0', table[i].graphs[4 * graph + 2] - '0'};
            const int32_t ids[] = {given.ids[numbers[0]], given.ids[numbers[1]]};
            const bool holds = mien_evaluation_graph(&evaluation, 2 * graph, 2, ids, NULL);
            if (!CHECK(holds == (table[i].expected[graph] == 'y'))) printf("  row %zu, graph %d\n", i, (int)graph);
            CHECK(rows_are(&evaluation.all, numbers, holds ? 2 : 0));
        }
        mien_evaluation_free(&evaluation);
    }
}

static void without_ids_no_order_can_be_told(void) {
    int32_t next[MAX_SEQUENCES] = {0};
    tokens given;
    make_tokens(&given, "0 1", next);
    mien_evaluation evaluation = begin(&given, 2, simple);
    CHECK(!mien_evaluation_graph(&evaluation, 0, 2, NULL, NULL));
    CHECK(mien_evaluation_graph(&evaluation, 0, 2, given.ids, NULL));
    mien_evaluation_free(&evaluation);
    mien_batch batch = batch_of(&given);
    batch.ids = NULL; /* embeddings */
    mien_sequence sequences[MAX_SEQUENCES];
    new_sequences(sequences);
    evaluation = (mien_evaluation){0};
    CHECK(mien_evaluation_begin(&evaluation, &batch, sequences, MAX_SEQUENCES, 2, simple) == MIEN_OK);
    CHECK(!mien_evaluation_graph(&evaluation, 0, 2, given.ids, NULL));
    mien_evaluation_free(&evaluation);
}

/* ---- memory ------------------------------------------------------------------------------------- */

/* One that has a gate that stays open. */
static mien_program *new_latching(void) {
    static const int32_t layers[] = {0};
    static const float row[] = {1, 0};
    static const double offset[] = {0};
    const mien_gate gate = {{2, 1, layers, row, offset}, 0, INFINITY, 0, true};
    const mien_term term = {.op = MIEN_OP_ADD, .coefficient = 1, .width = 2, .rank = 1, .n_rows = 1, .layers = layers,
                            .rows = row, .window = {0, INT32_MAX, 0, INFINITY}, .n_gates = 1};
    mien_program *made;
    CHECK(mien_program_new(&made, 1, &term, 1, &gate, 1) == MIEN_OK);
    return made;
}

static void failing_allocations_leave_nothing_known_and_nothing_behind(void) {
    static const mien_order both[MIEN_ORDERS] = {MIEN_ORDER_SIMPLE, MIEN_ORDER_EQUAL};
    mien_program *latching = new_latching();
    const long before = live_blocks;
    for (long after = 0, done = 0, larger = 0; larger < 2; larger += done, after = done ? 0 : after + 1) {
        mien_sequence sequences[MAX_SEQUENCES];
        new_sequences(sequences);
        sequences[0].response = latching;
        sequences[0].told = true;
        sequences[0].reply_from = 2;
        CHECK(mien_memory_new(&sequences[0].memory, latching) == MIEN_OK);
        int32_t next[MAX_SEQUENCES] = {0};
        tokens few, many;
        make_tokens(&few, larger ? "1 2 1 2 1 2" : "1 2", next); /* of which there is room before */
        make_tokens(&many, "1 0 1 0 0", next); /* token 4 is the reply's, number 0 */
        mien_evaluation evaluation = begin(&few, 2, both);
        const mien_batch batch = batch_of(&many);
        CHECK(mien_batch_follow(&batch, sequences, MAX_SEQUENCES, 1, &continued) == MIEN_OK);
        fail_after = after;
        const mien_status status = mien_evaluation_begin(&evaluation, &batch, sequences, MAX_SEQUENCES, 4, both);
        fail_after = -1;
        done = status == MIEN_OK;
        CHECK(done || status == MIEN_ERR_MEMORY);
        if (!done) {
            CHECK(evaluation.n_tokens == 0);
            CHECK(!mien_evaluation_graph(&evaluation, 0, 1, many.ids, NULL));
            CHECK(mien_evaluation_begin(&evaluation, &batch, sequences, MAX_SEQUENCES, 4, both) == MIEN_OK);
        }
        CHECK(evaluation.n_tokens == 5 && evaluation.tokens.what[4].reply == 0);
        CHECK(evaluation.tokens.what[4].memory == sequences[0].memory);
        CHECK(evaluation.tokens.what[1].reply == -1 && !evaluation.tokens.what[1].memory);
        mien_evaluation_free(&evaluation);
        mien_evaluation_free(&evaluation); /* zeroed, it is empty */
        mien_memory_release(sequences[0].memory);
        CHECK(live_blocks == before);
    }
    mien_program_release(latching);
}

/* Two sequences repeat the same tokens: only positions tell in which order they stand. */
static void positions_tell_what_repeated_tokens_do_not(void) {
    int32_t next[MAX_SEQUENCES] = {0};
    tokens given;
    make_tokens(&given, "0 0 0 0 1 1 1 1", next);
    for (int32_t t = 0; t < given.n; t++) given.ids[t] = 5;
    const mien_order both[MIEN_ORDERS] = {MIEN_ORDER_SIMPLE, MIEN_ORDER_EQUAL};
    mien_evaluation evaluation = begin(&given, 4, both);
    static const int32_t ids[] = {5, 5, 5, 5}, mixed[] = {0, 1, 0, 1}, whole[] = {0, 1, 2, 3}, neither[] = {3, 2, 1, 0};
    CHECK(!mien_evaluation_graph(&evaluation, 0, 4, NULL, NULL));
    evaluation.order = 0;
    CHECK(mien_evaluation_graph(&evaluation, 0, 4, ids, mixed));
    CHECK(rows_are(&evaluation.all, (const int32_t[]){0, 1, 4, 5}, 4));
    evaluation.order = 0;
    CHECK(mien_evaluation_graph(&evaluation, 0, 4, NULL, whole)); /* of embeddings no ids are known */
    CHECK(rows_are(&evaluation.all, (const int32_t[]){0, 1, 2, 3}, 4));
    CHECK(!mien_evaluation_graph(&evaluation, 4, 4, ids, neither));
    mien_evaluation_free(&evaluation);
}

int main(void) {
    a_token_is_of_its_first_sequence_where_all_are_steered_alike();
    what_a_batch_leaves_out_is_one_sequence_number_0();
    a_reply_begins_after_what_is_given_at_once();
    what_follows_a_token_without_logits_is_given();
    a_reply_that_continues_with_several_tokens_is_noticed_unless_told();
    a_reply_that_was_told_stays();
    a_batch_with_a_token_of_no_sequence_changes_nothing();
    a_token_has_its_sequences_program_and_its_number_in_the_reply();
    positions_count_on_where_a_batch_has_none();
    orders_are_those_of_llama_cpp();
    a_batch_of_one_sequence_needs_no_order();
    every_order_has_each_token_once_and_each_sequence_in_its_order();
    a_graphs_rows_are_all_its_tokens_or_those_with_logits();
    an_order_holds_until_a_graphs_ids_say_otherwise();
    without_ids_no_order_can_be_told();
    failing_allocations_leave_nothing_known_and_nothing_behind();
    positions_tell_what_repeated_tokens_do_not();
    return verdict();
}
