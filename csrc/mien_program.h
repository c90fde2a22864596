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
    MIEN_ERR_SHAPE = 2,       /* a size is not positive, differs at one place, or is of another model */
    MIEN_ERR_LAYER = 3,       /* a layer that the model does not have, or the same one twice in a term */
    MIEN_ERR_SITE = 4,        /* an unknown site */
    MIEN_ERR_OP = 5,          /* an unknown operation */
    MIEN_ERR_NOT_FINITE = 6,  /* a coefficient or a combined direction is NaN or infinite */
    MIEN_ERR_SYMBOL = 7,      /* the runtime's library lacks a function that every path needs */
    MIEN_ERR_TENSOR = 8,      /* a site's tensor is not contiguous rows of float32 of the program's width */
    MIEN_ERR_NOT_MET = 9,     /* a place of the program was never evaluated */
    MIEN_ERR_NOT_APPLIED = 10, /* a place was evaluated and its rows were not steered */
    MIEN_ERR_GATE = 11,       /* a gate that there is not, or too many at one place */
    MIEN_ERR_ROWS = 12        /* which token each row of a micro-batch is could not be told */
} mien_status;

/* In the order in which they act at a place. */
typedef enum {
    MIEN_OP_ABLATE = 0,       /* mien_project without levels */
    MIEN_OP_CLAMP = 1,        /* mien_project with some */
    MIEN_OP_EDIT = 2,         /* mien_edit */
    MIEN_OP_SCALE = 3,        /* mien_scale; few non-zero values: mien_scale_at */
    MIEN_OP_ADD = 4,          /* mien_add; few non-zero values: mien_add_at */
    MIEN_OP_ADD_KEEP_NORM = 5, /* mien_add_keep_norm */
    MIEN_OP_FORBID = 6,       /* mien_forbid the experts whose value is not zero */
    MIEN_OP_FORCE = 7         /* mien_force them */
} mien_op;
enum { MIEN_OPS = 8 };

typedef enum {
    MIEN_SITE_RESIDUAL = 0,
    MIEN_SITE_ATTENTION = 1,
    MIEN_SITE_MLP = 2,
    MIEN_SITE_HEADS = 3,
    MIEN_SITE_NEURONS = 4,
    MIEN_SITE_EXPERTS = 5
} mien_site;
enum { MIEN_SITES = 6, MIEN_TERM_GATES = 4, MIEN_PLACE_GATES = 32 };

/* A direction that reads rows: <row, h> - offset, at each of `layers`. */
typedef struct {
    int32_t width;            /* floats in a row */
    size_t n_rows;
    const int32_t *layers;    /* n_rows, ascending */
    const float *rows;        /* n_rows x width */
    const double *offsets;    /* n_rows */
} mien_readout;

/* Open where above < readout < below, both widened by `hysteresis` while open; with `latch` it stays open
 * for the rest of the reply. It reads the row before anything acts on it. */
typedef struct {
    mien_readout readout;
    double above, below, hysteresis;
    bool latch;
} mien_gate;

/* Which tokens of a reply, counted from 0: [start, stop). The share of the dose grows over the first `ramp`
 * of them to 1, and halves every `decay` (infinite: never). {0, INT32_MAX, 0, infinity} is no window: it
 * holds on every token, of a prompt, too. */
typedef struct {
    int32_t start, stop, ramp;
    double decay;
} mien_window;

/* One term of a recipe: `coefficient` times what `op` does with a vector that has `rank` rows at each of
 * `layers`. */
typedef struct {
    mien_op op;
    mien_site site;
    double coefficient;
    int32_t width, rank;      /* rank is 1 but for ablate and clamp */
    size_t n_rows;            /* layers */
    const int32_t *layers;    /* n_rows, ascending */
    const float *rows;        /* n_rows x rank x width; of ablate and clamp orthonormal a layer, or zero */
    const float *targets;     /* of clamp: n_rows x width, what shall be in the span */
    const double *biases;     /* of edit: n_rows */
    double margin;            /* of edit */
    mien_window window;
    size_t n_gates;
    int32_t gates[4];         /* MIEN_TERM_GATES; into the gates of mien_program_new; all must be open */
} mien_term;

typedef struct mien_program mien_program;
typedef struct mien_memory mien_memory;

/* What a row is: the number of its token in the reply, -1 for a prompt's, and what the program's gates
 * remember of its sequence (NULL: nothing). */
typedef struct {
    int32_t reply;
    mien_memory *memory;
} mien_token;

/* What was done to some rows: how many were changed, and the sum over them of the squared length that each
 * moved by. At the experts' logits it counts the logits that were set, in place of lengths. */
typedef struct {
    double squared;
    int64_t rows;
} mien_shift;

/* Compile `terms` into `*out`, with one reference held by the caller. Neighbouring terms of one operation,
 * site, window and set of gates fold where they add up: into one direction a layer, float(sum of
 * coefficient * row), summed in double in the order of the terms. An operation that would do nothing is
 * left out, and so is a term at a layer where one of its gates has no row. Nothing that is passed is kept.
 * On error `*out` is NULL. */
mien_status mien_program_new(mien_program **out, int32_t n_layer, const mien_term *terms, size_t n_terms,
                             const mien_gate *gates, size_t n_gates);

/* NULL is allowed and stays NULL. Both may be called from any thread. */
mien_program *mien_program_retain(mien_program *program);
void mien_program_release(mien_program *program);

/* The layers with an operation at `site`, ascending: the first `room` of them are written to `layers`.
 * Returns how many there are. */
int32_t mien_program_layers(const mien_program *program, mien_site site, int32_t *layers, int32_t room);

/* How many floats a row has at (site, layer); 0 where the program does nothing there. */
int32_t mien_program_width(const mien_program *program, mien_site site, int32_t layer);

/* The direction (width floats, the program's own) of the first operation `op` at (site, layer) that has
 * neither window nor gates; NULL where the program has none there. */
const float *mien_program_direction(const mien_program *program, mien_site site, int32_t layer, mien_op op);

/* Apply what the program does at (site, layer) to `n_rows` contiguous rows, in place. tokens: n_rows, those
 * of one sequence in their order; NULL: all of a prompt. copy: room for mien_program_copy floats, which no
 * other thread uses meanwhile, to measure the shift of several operations together; NULL: the shift is the sum
 * of theirs one by one. Allocates nothing. */
mien_shift mien_program_apply(const mien_program *program, mien_site site, int32_t layer, float *rows,
                              size_t n_rows, const mien_token *tokens, float *copy);

/* The width of the widest place where several operations act one after another; 0 if there is none. */
size_t mien_program_copy(const mien_program *program);

/* mien_program_apply on rows and tokens that the caller has as addresses: a caller in Python saves itself the
 * making of pointers. Room for a copy is allocated; if there is no memory for it, the shift is that of the
 * operations one by one. */
mien_shift mien_program_apply_at(const mien_program *program, mien_site site, int32_t layer, uintptr_t rows,
                                 size_t n_rows, uintptr_t tokens);

/* mien_program_apply_at on the residual stream of a prompt; returns the squared length alone. */
double mien_program_steer_at(const mien_program *program, int32_t layer, uintptr_t rows, size_t n_rows);

/* Whether rows at (site, layer) must be applied in their order by one thread: gates remember there. */
bool mien_program_ordered(const mien_program *program, mien_site site, int32_t layer);

/* Whether what it does depends on a token's number in the reply: a window, or gates that remember; and
 * whether there are such gates. */
bool mien_program_counts(const mien_program *program);
bool mien_program_remembers(const mien_program *program);

/* Whether it was compiled for a model of that many layers. NULL fits any. */
bool mien_program_fits(const mien_program *program, int32_t n_layer);

/* Whether the program does anything at (site, layer), or at any layer of it. */
bool mien_program_acts(const mien_program *program, mien_site site, int32_t layer);
bool mien_program_has(const mien_program *program, mien_site site);

/* What the gates of `program` remember of one sequence: whether each was open, by token of the reply, so
 * that a reply that is taken back some tokens and goes on is decided as if it had never gone further. It is
 * counted as a program is. */
mien_status mien_memory_new(mien_memory **out, const mien_program *program);
mien_memory *mien_memory_retain(mien_memory *memory);
void mien_memory_release(mien_memory *memory);

/* Make room for tokens 0 to replies - 1. Not while the memory is in use. */
mien_status mien_memory_reserve(mien_memory *memory, int32_t replies);

/* A probe: the readouts of several vectors at once. It never changes and is counted as a program is. */
typedef struct mien_probe mien_probe;
mien_status mien_probe_new(mien_probe **out, int32_t n_layer, const mien_readout *readouts, size_t n_readouts);
mien_probe *mien_probe_retain(mien_probe *probe);
void mien_probe_release(mien_probe *probe);

/* Read n_rows contiguous rows at `layer`: out[r * n_readouts + i] is readout i of row r, NaN where it has
 * no row at that layer. */
void mien_probe_read(const mien_probe *probe, int32_t layer, const float *rows, size_t n_rows, float *out);
void mien_probe_read_at(const mien_probe *probe, int32_t layer, uintptr_t rows, size_t n_rows, uintptr_t out);
/* cdef: end */

/* Its shape. */
int32_t mien_probe_layers(const mien_probe *probe);
int32_t mien_probe_width(const mien_probe *probe);
size_t mien_probe_count(const mien_probe *probe);

#endif
