/* Program: a recipe compiled for one model. Per layer and site, a short list of operations.
 *
 * A program never changes after it is made, so any number of threads may apply it at once. It is
 * counted: whoever keeps a pointer retains it, and the last release frees it.
 */
#ifndef MIEN_PROGRAM_H
#define MIEN_PROGRAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cdef: begin */
typedef enum {
    MIEN_OK = 0,
    MIEN_ERR_MEMORY = 1,      /* an allocation failed, or a size does not fit in size_t */
    MIEN_ERR_SHAPE = 2,       /* n_layer or n_embd is not positive, or of another model */
    MIEN_ERR_LAYER = 3,       /* a layer that the model does not have, or the same one twice in a term */
    MIEN_ERR_SITE = 4,        /* an unknown site */
    MIEN_ERR_OP = 5,          /* an unknown operation */
    MIEN_ERR_NOT_FINITE = 6,  /* a coefficient or a combined direction is NaN or infinite */
    MIEN_ERR_SYMBOL = 7,      /* the runtime's library lacks a function that every path needs */
    MIEN_ERR_TENSOR = 8,      /* a block's output is not contiguous rows of n_embd float32 */
    MIEN_ERR_NOT_MET = 9,     /* a layer of the program was never evaluated */
    MIEN_ERR_NOT_APPLIED = 10 /* a layer was evaluated and its rows were not steered */
} mien_status;

/* In the order in which they act at a place. */
typedef enum {
    MIEN_OP_ADD = 0,          /* see mien_add */
    MIEN_OP_ADD_KEEP_NORM = 1 /* see mien_add_keep_norm */
} mien_op;
enum { MIEN_OPS = 2 };

typedef enum { MIEN_SITE_RESIDUAL = 0 } mien_site;
enum { MIEN_SITES = 1 };

/* One term of a recipe: `coefficient` times a vector that has a row at each of `layers`. */
typedef struct {
    mien_op op;
    mien_site site;
    double coefficient;
    size_t n_rows;
    const int32_t *layers;    /* n_rows */
    const float *rows;        /* n_rows x n_embd */
} mien_term;

typedef struct mien_program mien_program;

/* Compile `terms` into `*out`, with one reference held by the caller. All terms of one operation at one
 * place fold into one direction: float(sum of coefficient * row), summed in double in the order of the
 * terms. An operation whose direction is zero everywhere is left out. The terms are not kept.
 * On error `*out` is NULL. */
mien_status mien_program_new(mien_program **out, int32_t n_layer, int32_t n_embd,
                             const mien_term *terms, size_t n_terms);

/* NULL is allowed and stays NULL. Both may be called from any thread. */
mien_program *mien_program_retain(mien_program *program);
void mien_program_release(mien_program *program);

/* The layers with an operation at `site`, ascending, written to `layers` (room for n_layer).
 * Returns how many. */
int32_t mien_program_layers(const mien_program *program, mien_site site, int32_t *layers);

/* The direction (n_embd floats, the program's own) of operation `op` at (site, layer); NULL where the
 * program has none there. */
const float *mien_program_direction(const mien_program *program, mien_site site, int32_t layer, mien_op op);

/* Apply what the program does at (site, layer) to `n_rows` contiguous rows, in place. Returns the sum
 * over the rows of the squared length that each moved by; 0 where the program has nothing there. */
double mien_program_apply(const mien_program *program, mien_site site, int32_t layer,
                          float *rows, size_t n_rows);

/* The same at the residual stream, on rows that the caller has as an address: a caller in Python saves
 * itself the making of a pointer. */
double mien_program_apply_at(const mien_program *program, int32_t layer, uintptr_t rows, size_t n_rows);

/* Whether it was compiled for that shape of model. NULL fits any. */
bool mien_program_fits(const mien_program *program, int32_t n_layer, int32_t n_embd);

/* Whether the program does anything at (site, layer). */
bool mien_program_acts(const mien_program *program, mien_site site, int32_t layer);
/* cdef: end */

#endif
