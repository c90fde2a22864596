/* The llama.cpp hook: an evaluation callback that steers and captures block outputs.
 *
 * Built without llama.cpp's headers: its public functions are handed in by address, and the little
 * that must be known of ggml_tensor is found by experiment and verified (see mien_llama.c). One hook
 * belongs to one llama_context; two hooks share nothing.
 *
 * Threads: mien_hook_swap may be called from any thread at any time. begin, end, capture and applied
 * belong to the thread that calls llama_decode on the context.
 */
#ifndef MIEN_LLAMA_H
#define MIEN_LLAMA_H

#include "mien_program.h"

/* cdef: begin */
typedef struct mien_hook mien_hook;

typedef enum {
    MIEN_PATH_AUTO = 0,       /* in-graph where it verifies; of a layer: none */
    MIEN_PATH_IN_GRAPH = 1,   /* steer inside the graph, on llama.cpp's own threads */
    MIEN_PATH_POST = 2        /* steer each block's output after it is computed */
} mien_path;

/* What happened at a layer in the last begin..end. */
typedef struct {
    int64_t rows;             /* rows steered */
    double moved;             /* sum over those rows of the squared length that each moved by */
    mien_path path;           /* how; AUTO where nothing was done */
    bool met;                 /* the layer's output was seen */
} mien_applied;

/* The functions that the hook needs of the runtime's library, by name: i from 0 to count - 1. */
size_t mien_hook_symbol_count(void);
const char *mien_hook_symbol(size_t i);

/* Make a hook. symbols: addresses in the order of mien_hook_symbol, NULL for what the library lacks;
 * the library must stay loaded. path: MIEN_PATH_POST rules the in-graph path out; else it is taken where
 * it verifies, and mien_hook_path says which it became. On error `*out` is NULL. Free it only after the
 * context is gone. */
mien_status mien_hook_new(mien_hook **out, void *const *symbols, int32_t n_layer, int32_t n_embd, mien_path path);
void mien_hook_free(mien_hook *hook);

/* The path chosen, and why, as a sentence that lives as long as the program. */
mien_path mien_hook_path(const mien_hook *hook);
const char *mien_hook_reason(const mien_hook *hook);

/* The callback for llama_context_params.cb_eval; user_data is the hook. */
bool mien_hook_eval(void *tensor, bool ask, void *user_data);

/* The program for evaluations that begin from now on; NULL is none. The hook retains it.
 * MIEN_ERR_SHAPE, and nothing changes, where it was compiled for another n_layer or n_embd. */
mien_status mien_hook_swap(mien_hook *hook, mien_program *program);

/* Around one llama_decode. begin pins `program` for all of its micro-batches, with the same status as
 * swap; end unpins it and says whether everything asked for was done. An evaluation outside of begin..end pins what was swapped in
 * last, a graph at a time. */
mien_status mien_hook_begin(mien_hook *hook, mien_program *program);
mien_status mien_hook_end(mien_hook *hook);

/* For the next begin..end: copy block outputs, as they are after steering.
 * buffer: n_layers x count x n_embd floats; row (i, j) is token first + j of the decode at layers[i].
 * outputs: for each token of the decode whether its logits are asked for; the last block computes only
 * those rows, and the others are left as they were. NULL buffer turns capture off. */
void mien_hook_capture(mien_hook *hook, float *buffer, const int32_t *layers, int32_t n_layers,
                       int32_t first, int32_t count, const int8_t *outputs);

/* What happened at `layer` in the last begin..end. */
mien_applied mien_hook_applied(const mien_hook *hook, int32_t layer);
/* cdef: end */

#endif
