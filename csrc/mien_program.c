#include "mien_program.h"

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "mien_kernels.h"

typedef struct {
    mien_op op;
    const float *direction;   /* n_embd, inside the program's own block */
} operation;

typedef struct {
    size_t first, count;      /* into operations */
} place;

/* One block: this header, then places (MIEN_SITES x n_layer), operations, and the floats, aligned. */
struct mien_program {
    _Atomic size_t references;
    int32_t n_layer, n_embd;
    place *places;
    operation *operations;
    float *floats;
};

enum { ALIGN = 64 };

static size_t aligned(size_t size) { return (size + ALIGN - 1) / ALIGN * ALIGN; }

static bool is_zero(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (x[i] != 0.0f) return false;
    return true;
}

static mien_status check_term(const mien_term *term, int32_t n_layer) {
    if (term->op != MIEN_OP_ADD && term->op != MIEN_OP_ADD_KEEP_NORM) return MIEN_ERR_OP;
    if (term->site != MIEN_SITE_RESIDUAL) return MIEN_ERR_SITE;
    if (!isfinite(term->coefficient)) return MIEN_ERR_NOT_FINITE;
    for (size_t r = 0; r < term->n_rows; r++) {
        if (term->layers[r] < 0 || term->layers[r] >= n_layer) return MIEN_ERR_LAYER;
        if (r > 0 && term->layers[r] <= term->layers[r - 1]) return MIEN_ERR_LAYER;
    }
    return MIEN_OK;
}

/* An empty program with room for `capacity` operations of one direction each. */
static mien_program *allocate(int32_t n_layer, int32_t n_embd, size_t capacity) {
    const size_t n_places = (size_t)MIEN_SITES * (size_t)n_layer;
    const size_t row = aligned((size_t)n_embd * sizeof(float));
    const size_t head = aligned(sizeof(mien_program)), places = aligned(n_places * sizeof(place));
    if (capacity > (SIZE_MAX - head - places - 2 * ALIGN) / (row + sizeof(operation))) return NULL;
    const size_t operations = aligned(capacity * sizeof(operation));
    char *block = aligned_alloc(ALIGN, head + places + operations + capacity * row);
    if (!block) return NULL;
    memset(block, 0, head + places + operations);
    mien_program *program = (mien_program *)block;
    atomic_init(&program->references, 1);
    program->n_layer = n_layer;
    program->n_embd = n_embd;
    program->places = (place *)(block + head);
    program->operations = (operation *)(block + head + places);
    program->floats = (float *)(block + head + places + operations);
    return program;
}

/* The rows that the terms of one operation have at one layer. Each term's layers ascend, so `next` walks
 * them once. */
static size_t gather(const mien_term *terms, size_t n_terms, mien_op op, size_t *next, int32_t layer,
                     size_t n_embd, const float **rows, double *coefficients) {
    size_t found = 0;
    for (size_t t = 0; t < n_terms; t++) {
        if (terms[t].op != op || next[t] == terms[t].n_rows || terms[t].layers[next[t]] != layer) continue;
        rows[found] = terms[t].rows + next[t]++ * n_embd;
        coefficients[found++] = terms[t].coefficient;
    }
    return found;
}

mien_status mien_program_new(mien_program **out, int32_t n_layer, int32_t n_embd,
                             const mien_term *terms, size_t n_terms) {
    *out = NULL;
    if (n_layer <= 0 || n_embd <= 0) return MIEN_ERR_SHAPE;
    if (n_terms > SIZE_MAX / sizeof(double)) return MIEN_ERR_MEMORY;
    for (size_t t = 0; t < n_terms; t++) {
        const mien_status status = check_term(&terms[t], n_layer);
        if (status != MIEN_OK) return status;
    }
    mien_status status = MIEN_ERR_MEMORY;
    const float **rows = calloc(n_terms + 1, sizeof *rows);
    double *coefficients = calloc(n_terms + 1, sizeof *coefficients);
    size_t *next = calloc(n_terms + 1, sizeof *next);
    bool *used = calloc((size_t)n_layer * MIEN_OPS, sizeof *used);
    mien_program *program = NULL;
    if (!rows || !coefficients || !next || !used) goto done;

    size_t capacity = 0;
    for (size_t t = 0; t < n_terms; t++)
        for (size_t r = 0; r < terms[t].n_rows; r++) {
            bool *seen = &used[(size_t)terms[t].layers[r] * MIEN_OPS + (size_t)terms[t].op];
            if (!*seen) *seen = true, capacity++;
        }
    program = allocate(n_layer, n_embd, capacity);
    if (!program) goto done;

    const size_t n = (size_t)n_embd, stride = aligned(n * sizeof(float)) / sizeof(float);
    size_t made = 0;
    for (int32_t layer = 0; layer < n_layer; layer++) {
        place *here = &program->places[(size_t)MIEN_SITE_RESIDUAL * (size_t)n_layer + (size_t)layer];
        here->first = made;
        for (int i = 0; i < MIEN_OPS; i++) {
            const mien_op op = (mien_op)i;
            if (!used[(size_t)layer * MIEN_OPS + (size_t)op]) continue;
            float *direction = program->floats + made * stride;
            const size_t found = gather(terms, n_terms, op, next, layer, n, rows, coefficients);
            mien_combine(direction, rows, coefficients, found, n);
            if (!mien_is_finite(direction, n)) {
                status = MIEN_ERR_NOT_FINITE;
                goto done;
            }
            if (is_zero(direction, n)) continue;
            program->operations[made++] = (operation){op, direction};
            here->count++;
        }
    }
    *out = program;
    program = NULL;
    status = MIEN_OK;
done:
    mien_program_release(program);
    free(used);
    free(next);
    free(coefficients);
    free(rows);
    return status;
}

mien_program *mien_program_retain(mien_program *program) {
    if (program) atomic_fetch_add_explicit(&program->references, 1, memory_order_relaxed);
    return program;
}

void mien_program_release(mien_program *program) {
    if (program && atomic_fetch_sub_explicit(&program->references, 1, memory_order_acq_rel) == 1) free(program);
}

static const place *find(const mien_program *program, mien_site site, int32_t layer) {
    if (!program || site != MIEN_SITE_RESIDUAL || layer < 0 || layer >= program->n_layer) return NULL;
    const place *here = &program->places[(size_t)site * (size_t)program->n_layer + (size_t)layer];
    return here->count ? here : NULL;
}

int32_t mien_program_layers(const mien_program *program, mien_site site, int32_t *layers) {
    int32_t count = 0;
    for (int32_t layer = 0; program && layer < program->n_layer; layer++)
        if (find(program, site, layer)) layers[count++] = layer;
    return count;
}

bool mien_program_fits(const mien_program *program, int32_t n_layer, int32_t n_embd) {
    return !program || (program->n_layer == n_layer && program->n_embd == n_embd);
}

bool mien_program_acts(const mien_program *program, mien_site site, int32_t layer) {
    return find(program, site, layer) != NULL;
}

const float *mien_program_direction(const mien_program *program, mien_site site, int32_t layer, mien_op op) {
    const place *here = find(program, site, layer);
    for (size_t o = 0; here && o < here->count; o++)
        if (program->operations[here->first + o].op == op) return program->operations[here->first + o].direction;
    return NULL;
}

double mien_program_apply(const mien_program *program, mien_site site, int32_t layer,
                          float *rows, size_t n_rows) {
    const place *here = find(program, site, layer);
    double moved = 0;
    if (!here) return moved;
    const size_t n = (size_t)program->n_embd;
    const operation *first = &program->operations[here->first], *second = first + 1;
    for (size_t r = 0; r < n_rows; r++) {
        float *row = rows + r * n;
        if (here->count == MIEN_OPS)
            moved += mien_add_then_keep_norm(row, first->direction, second->direction, n);
        else if (first->op == MIEN_OP_ADD_KEEP_NORM)
            moved += mien_add_keep_norm(row, first->direction, n);
        else
            moved += mien_add(row, first->direction, n);
    }
    return moved;
}

double mien_program_apply_at(const mien_program *program, int32_t layer, uintptr_t rows, size_t n_rows) {
    return mien_program_apply(program, MIEN_SITE_RESIDUAL, layer, (float *)rows, n_rows);
}
