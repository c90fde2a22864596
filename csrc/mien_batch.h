/* Batch: which token of which sequence each row of a micro-batch is, and what acts on it.
 *
 * llama.cpp cuts a batch into micro-batches and may put its tokens into another order. Which one is worked
 * out here by the rules that it goes by, and checked against the tokens that a graph really got.
 */
#ifndef MIEN_BATCH_H
#define MIEN_BATCH_H

#include "mien_program.h"

/* cdef: begin */
/* How llama.cpp cuts a batch of several sequences: as it stands; or into micro-batches of as many tokens of
 * each sequence in it, sequence after sequence, of any or only of sequences whose numbers follow each other. */
typedef enum {
    MIEN_ORDER_NONE = 0,
    MIEN_ORDER_SIMPLE = 1,
    MIEN_ORDER_EQUAL = 2,
    MIEN_ORDER_SEQUENTIAL = 3
} mien_order;
/* cdef: end */

/* A llama_batch as it was found in memory. Of its pointers all but `ids` may be NULL, as there. */
typedef struct {
    int32_t n_tokens;
    const int32_t *ids;               /* NULL where it holds embeddings */
    const int32_t *positions;
    const int32_t *n_sequences;
    int32_t *const *sequences;
    const int8_t *outputs;
} mien_batch;

/* One sequence of a context. */
typedef struct {
    mien_program *prompt, *response;  /* borrowed: of the setting that acts */
    mien_memory *memory;              /* owned: of the response's gates; NULL where they remember nothing */
    uint64_t generation;              /* the mien_acting's, for which the memory was made */
    int32_t reply_from;               /* the position of the reply's first token */
    int32_t next;                     /* the position after the last token that was seen */
    bool told;                        /* reply_from was given, not worked out */
    bool silent;                      /* the last token that was seen asked for no logits */
    uint64_t seen;                    /* the batch in which it was last */
    uint64_t replied;                 /* the batch in which its reply was taken to begin; 0: it has not */
} mien_sequence;

/* Rows of a graph: for each the number of its token in the batch, its sequence, what acts on it, and what it
 * is to that. */
typedef struct {
    int64_t n;
    int32_t *token, *sequence;
    mien_program **program;
    mien_token *what;
} mien_rows;

enum { MIEN_ORDERS = 2 };

/* The batch that is being evaluated. Zeroed, it is empty. */
typedef struct {
    int32_t n_tokens, capacity;
    mien_rows tokens;                 /* by number in the batch */
    mien_rows all, outputs;           /* of the graph that runs: every token, and those with logits */
    const int32_t *ids, *positions;
    const int8_t *output;
    int32_t *orders[MIEN_ORDERS];     /* in which the micro-batches, one after another, may have the tokens */
    int n_orders;                     /* 0: as the batch stands */
    int order;                        /* the one that holds so far */
    int32_t *scratch;
} mien_evaluation;

/* The sequence that a token belongs to; -1 where there is no such sequence, or several that are not steered
 * alike. */
int32_t mien_batch_sequence(const mien_batch *batch, int32_t token, const mien_sequence *sequences, int32_t n);

/* Work out, for each sequence in the batch whose reply was not told, where it begins: several tokens at
 * once, or the first of all, are given; one more is the reply's, unless the token before asked for no logits,
 * from which it could have been drawn. Takes down the positions seen. `serial`: a number above 0 that no batch
 * before had. *continued: whether a reply that had begun in an earlier batch continues with several tokens, which
 * count as given. */
mien_status mien_batch_follow(const mien_batch *batch, mien_sequence *sequences, int32_t n, uint64_t serial,
                              bool *continued);

/* Fill in what acts on each token, after mien_batch_follow. orders: MIEN_ORDERS, the first being the rule and
 * the second what is done where that can't be kept to. On error nothing is known of the batch. */
mien_status mien_evaluation_begin(mien_evaluation *evaluation, const mien_batch *batch,
                                  const mien_sequence *sequences, int32_t n, int32_t n_ubatch,
                                  const mien_order *orders);

/* Whether the inputs of a graph, ids and positions, must be known to tell the order. */
bool mien_evaluation_needs_inputs(const mien_evaluation *evaluation);

/* A graph has `n` tokens, the first of them being token number `before` in the order of the micro-batches;
 * ids, positions: theirs, or NULL for what can't be read. False if no order agrees with them, or if several
 * are possible and neither is known. */
bool mien_evaluation_graph(mien_evaluation *evaluation, int32_t before, int32_t n, const int32_t *ids,
                           const int32_t *positions);

/* Which rows a tensor of the running graph has: all, or those with logits; NULL for neither. */
const mien_rows *mien_evaluation_rows(const mien_evaluation *evaluation, int64_t rows);

void mien_evaluation_free(mien_evaluation *evaluation);

#endif
