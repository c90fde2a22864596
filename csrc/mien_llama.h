/* The llama.cpp hook: an evaluation callback that steers, reads and captures activations.
 *
 * Built without llama.cpp's headers: see mien_ggml.h. One hook belongs to one llama_context; two hooks share
 * nothing.
 *
 * Threads: swap may be called from any thread at any time, and never waits. Everything else belongs to the
 * thread that calls llama_decode on the context, between two decodes.
 */
#ifndef MIEN_LLAMA_H
#define MIEN_LLAMA_H

#include "mien_batch.h"
#include "mien_program.h"

/* cdef: begin */
typedef struct mien_hook mien_hook;

typedef enum {
    MIEN_PATH_AUTO = 0,       /* in-graph where it verifies; of a place: none */
    MIEN_PATH_IN_GRAPH = 1,   /* steer inside the graph, on llama.cpp's own threads */
    MIEN_PATH_POST = 2        /* steer activations after they are computed */
} mien_path;

/* What happened at a place in the last begin..end. */
typedef struct {
    int64_t rows;             /* rows that were changed */
    double moved;             /* sum over those rows of the squared length that each moved by */
    mien_path path;           /* how; AUTO where nothing was to be done */
    bool met;                 /* the place was seen */
} mien_applied;

/* Where a llama_batch has its fields, in bytes. */
typedef struct {
    size_t n_tokens, token, pos, n_seq_id, seq_id, logits;
} mien_batch_layout;

/* How llama.cpp cuts batches of this context into micro-batches. orders: the rule, and what is done where it
 * can't be kept to; see mien_order. */
typedef struct {
    int32_t n_sequences, n_ubatch;
    mien_order orders[2];
} mien_batching;

/* What acts on one sequence: on what it is given, and on its reply; NULL is nothing. Gates keep their state
 * while `generation` stays the same. */
typedef struct {
    mien_program *prompt, *response;
    uint64_t generation;
} mien_acting;

/* A graph that was evaluated outside of begin..end: where its tokens are (position -1: that could not be
 * read), how many of them, from the first on, counted as given, and the id of what acted. */
typedef struct {
    int32_t position, rows, given;
    uint64_t id;
} mien_stray;

/* The functions that the hook needs of the runtime's library, by name: i from 0 to count - 1. */
size_t mien_hook_symbol_count(void);
const char *mien_hook_symbol(size_t i);

/* Make a hook. symbols: addresses in the order of mien_hook_symbol, NULL for what the library lacks;
 * the library must stay loaded. path: MIEN_PATH_POST rules the in-graph path out; else it is taken where
 * it verifies, and mien_hook_path says which it became. On error `*out` is NULL. Free it only after the
 * context is gone. */
mien_status mien_hook_new(mien_hook **out, void *const *symbols, int32_t n_layer, int32_t n_embd, mien_path path);
void mien_hook_free(mien_hook *hook);

/* How batches look; one sequence that is cut as it stands unless told. Programs that were swapped in are
 * gone. */
mien_status mien_hook_set_batching(mien_hook *hook, const mien_batch_layout *layout, const mien_batching *batching);

/* The path chosen, and why, as a sentence that lives as long as the program. */
mien_path mien_hook_path(const mien_hook *hook);
const char *mien_hook_reason(const mien_hook *hook);

/* The callback for llama_context_params.cb_eval; user_data is the hook. */
bool mien_hook_eval(void *tensor, bool ask, void *user_data);

/* ---- where the sites are ---- */

/* Take down the nodes of the graphs that are evaluated until mien_hook_nodes, which gives them: pointers to
 * ggml_tensors in the order in which they are computed, good until the next evaluation. */
void mien_hook_scout(mien_hook *hook);
size_t mien_hook_nodes(mien_hook *hook, void *const **nodes);

/* Source i (0 or 1) of a ggml_tensor; NULL where the layout did not verify. */
void *mien_hook_source(const mien_hook *hook, const void *tensor, int32_t i);

/* Rows of (site, layer), `width` floats each, are the node called "stem-layer"; or where `weight` is not NULL
 * the product with that tensor, or the node that comes `tail` nodes after it by their first sources. The
 * residual stream is "l_out" with n_embd floats unless told. There a stem "=NAME" is the node called NAME, which
 * ends in the number of the next layer, or, after the last, in none. MIEN_ERR_SHAPE: the stem is too long. */
mien_status mien_hook_locate(mien_hook *hook, mien_site site, int32_t layer, int32_t width, const char *stem,
                             const void *weight, int32_t tail);

/* ---- what acts ---- */

/* What acts in evaluations that begin from now on: one for all sequences (count 1), or one for each (count
 * n_sequences), in place of all that acted. The hook retains the programs. id: a number above 0 of the caller's,
 * which mien_hook_acted gives back. Nothing changes on an error: MIEN_ERR_SHAPE if a program was compiled for
 * another n_layer or for rows of another width, MIEN_ERR_ROWS for another count, MIEN_ERR_MEMORY. */
mien_status mien_hook_swap(mien_hook *hook, const mien_acting *acting, int32_t count, uint64_t id);

/* The id of what the last begin has pinned; 0 before any swap was met. */
uint64_t mien_hook_acted(const mien_hook *hook);

/* Tokens of `sequence` from `position` on are the reply, those before are given; -1: work it out from the
 * batches, see mien_batch_follow. */
void mien_hook_tell_reply(mien_hook *hook, int32_t sequence, int32_t position);

/* The later tokens of `sequence` were moved by `by` positions: its reply goes on where it was. */
void mien_hook_shift(mien_hook *hook, int32_t sequence, int32_t by);

/* Where its reply begins, as it was told or worked out, and where its next token is looked for. */
int32_t mien_hook_reply(const mien_hook *hook, int32_t sequence);
int32_t mien_hook_next(const mien_hook *hook, int32_t sequence);

/* Whether its last token asked for no logits, so that the next one is given. */
bool mien_hook_silent(const mien_hook *hook, int32_t sequence);

/* What llama.cpp keeps of `sequence` was moved, or loaded: its reply began at `reply_from`, which may be before
 * any position, and its next token comes at `next`. silent: whether the last one asked for no logits. */
void mien_hook_place(mien_hook *hook, int32_t sequence, int32_t reply_from, int32_t next, bool silent);

/* What llama.cpp kept of `sequence` from `position` on is gone: its next token is looked for there, at most. */
void mien_hook_rewind(mien_hook *hook, int32_t sequence, int32_t position);

/* The gates of `sequence` remember nothing. Nothing changes on an error: MIEN_ERR_MEMORY. */
mien_status mien_hook_begin_anew(mien_hook *hook, int32_t sequence);

/* How many threads llama.cpp computes with, at most: each gets room to measure the shift of several operations
 * together. */
void mien_hook_threads(mien_hook *hook, int32_t n);

/* Around one llama_decode. begin pins what acts for all of its micro-batches; batch: the address of the
 * llama_batch, which stays as it is until end. MIEN_ERR_ROWS: a token's sequence is none of the context's, or
 * it has several that are steered differently. MIEN_ERR_SHAPE: there is no room for the readouts of so many
 * tokens. end unpins and says whether everything asked for was done. */
mien_status mien_hook_begin(mien_hook *hook, uintptr_t batch);
mien_status mien_hook_end(mien_hook *hook);

/* Whether in the last begin a reply that had begun continued with several tokens, which then count as given: a
 * new turn, or drafts of which nobody told. */
bool mien_hook_continued(const mien_hook *hook);

/* An evaluation outside of begin..end (a picture's embeddings, somebody's own llama_decode) pins what acts a
 * graph at a time. What it is given and what is its reply is worked out as for a batch, from the graph's inputs;
 * embeddings are given. If that can't be known, because there are several sequences that are steered differently
 * or tokens that must be counted, nothing acts, and mien_hook_unsteered counts the graph. mien_hook_strays takes
 * out what was noted of all such graphs of one sequence since the last call: the first `room` of them are written.
 * Returns how many there are, -1 if there were too many to note. */
int64_t mien_hook_unsteered(const mien_hook *hook);
int32_t mien_hook_strays(mien_hook *hook, mien_stray *strays, int32_t room);

/* ---- what is read ---- */

/* For the next begin..end: copy block outputs, as they are after steering.
 * buffer: n_layers x count x n_embd floats; row (i, j) is token first + j of the batch at layers[i]. The last
 * block computes only tokens with logits, and the others are left as they were. NULL buffer: off. */
void mien_hook_capture(mien_hook *hook, float *buffer, const int32_t *layers, int32_t n_layers,
                       int32_t first, int32_t count);

/* For the decodes that begin from now on: read block outputs with `probe`, which is retained; NULL: no longer.
 * before and after, either of which may be NULL, are n_tokens x n_layer x (the probe's count) floats, in which
 * rows that are not computed are left as they were. MIEN_ERR_SHAPE: it is for another model. */
mien_status mien_hook_watch(mien_hook *hook, mien_probe *probe, float *before, float *after, int32_t n_tokens);

/* For what is evaluated from now on: count, at each layer that has experts, how often each is chosen. counts is
 * n_layer x n_expert; the first `used` of a row of the node "stem-layer" are a token's. NULL: no longer.
 * MIEN_ERR_SHAPE: the stem is too long, and nothing is counted. */
mien_status mien_hook_count(mien_hook *hook, int64_t *counts, int32_t n_expert, int32_t used, const char *stem);

/* What happened at a place in the last begin..end. */
mien_applied mien_hook_applied(const mien_hook *hook, mien_site site, int32_t layer);

/* For each of the first `room` tokens of the last begin..end: its sequence, and its number in the reply, -1 for a
 * given one. Returns how many tokens there are. */
int32_t mien_hook_tokens(const mien_hook *hook, int32_t *sequences, int32_t *replies, int32_t room);
/* cdef: end */

#endif
