#include "mien_program.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "mien_kernels.h"

/* Few enough of a row's values are not zero that going to each of them is quicker. */
enum { SPARSE = 4, ALIGN = 64 };

typedef struct {
    mien_op op;
    bool always;                /* it has neither window nor gates */
    mien_window window;
    uint32_t gates;             /* a bit for each of the place's gates that must be open */
    double strength;            /* of ablate, clamp and edit */
    double bias, margin, square; /* of edit */
    size_t rank;                /* of ablate and clamp; of edit 1 */
    const float *direction;     /* rank rows; of a sparse operation its values */
    const double *levels;       /* of clamp: rank of them */
    const int32_t *at;          /* of a sparse operation, force and forbid: ascending */
    size_t count;               /* how many values in `direction` and `at` */
} operation;

typedef struct {
    const mien_gate *gate;      /* its readout's pointers are not the program's own: see `row` */
    const float *row;
    double offset;
    size_t remembered;          /* its place in a memory; SIZE_MAX if it remembers nothing */
} opening;

typedef struct {
    int32_t width;
    bool ordered;
    size_t first, count;        /* into operations */
    size_t first_gate, n_gates; /* into openings */
} place;

/* One block: this header, then places (MIEN_SITES x n_layer), gates, openings, operations, at, and the
 * floats, aligned. */
struct mien_program {
    _Atomic size_t references;
    int32_t n_layer;
    bool has[MIEN_SITES], counts;
    size_t n_remembered;
    size_t copy;                /* see mien_program_copy */
    place *places;
    mien_gate *gates;
    opening *openings;
    operation *operations;
    int32_t *at;
    float *floats;
};

struct mien_memory {
    _Atomic size_t references;
    size_t n;                   /* gates that remember, over all places */
    int32_t capacity;
    unsigned char *open;        /* capacity x n */
};

/* In the order in which they act at a place. */
static const mien_op acting_order[MIEN_OPS] = {MIEN_OP_ABLATE, MIEN_OP_CLAMP,         MIEN_OP_EDIT,   MIEN_OP_SCALE,
                                               MIEN_OP_ADD,    MIEN_OP_ADD_KEEP_NORM, MIEN_OP_FORBID, MIEN_OP_FORCE};

/* Whether terms of that operation add up to one. */
static bool folds(mien_op op) {
    switch (op) {
        case MIEN_OP_ABLATE:
        case MIEN_OP_CLAMP:
        case MIEN_OP_EDIT:
            return false;
        case MIEN_OP_SCALE:
        case MIEN_OP_ADD:
        case MIEN_OP_ADD_KEEP_NORM:
        case MIEN_OP_FORBID:
        case MIEN_OP_FORCE:
            return true;
    }
    return false;
}

static bool has_window(const mien_window *window) {
    return window->start || window->stop != INT32_MAX || window->ramp || isfinite(window->decay);
}

static bool remembers(const mien_gate *gate) { return gate->latch || gate->hysteresis > 0; }

/* ---- sizes -------------------------------------------------------------------------------------- */

static size_t aligned(size_t size) { return (size + ALIGN - 1) / ALIGN * ALIGN; }

static size_t stride_of(int32_t width) { return aligned((size_t)width * sizeof(float)) / sizeof(float); }

/* *total += aligned(count * size); false where that does not fit. */
static bool add_size(size_t *total, size_t count, size_t size) {
    if (size && count > (SIZE_MAX - 2 * ALIGN) / size) return false;
    const size_t more = aligned(count * size);
    if (more > SIZE_MAX - *total) return false;
    *total += more;
    return true;
}

/* ---- checks ------------------------------------------------------------------------------------- */

static mien_status check_layers(const int32_t *layers, size_t n, int32_t n_layer) {
    for (size_t r = 0; r < n; r++) {
        if (layers[r] < 0 || layers[r] >= n_layer) return MIEN_ERR_LAYER;
        if (r > 0 && layers[r] <= layers[r - 1]) return MIEN_ERR_LAYER;
    }
    return MIEN_OK;
}

static mien_status check_readout(const mien_readout *readout, int32_t n_layer) {
    if (readout->width <= 0) return MIEN_ERR_SHAPE;
    return check_layers(readout->layers, readout->n_rows, n_layer);
}

static mien_status check_gate(const mien_gate *gate, int32_t n_layer) {
    if (isnan(gate->above) || isnan(gate->below) || !(gate->hysteresis >= 0) || isinf(gate->hysteresis))
        return MIEN_ERR_NOT_FINITE;
    const mien_readout *readout = &gate->readout;
    const mien_status status = check_readout(readout, n_layer);
    if (status != MIEN_OK) return status;
    for (size_t r = 0; r < readout->n_rows; r++)
        if (!isfinite(readout->offsets[r])) return MIEN_ERR_NOT_FINITE;
    return mien_is_finite(readout->rows, readout->n_rows * (size_t)readout->width) ? MIEN_OK : MIEN_ERR_NOT_FINITE;
}

static mien_status check_term(const mien_term *term, int32_t n_layer, const mien_gate *gates, size_t n_gates) {
    if ((int)term->op < 0 || (int)term->op >= MIEN_OPS) return MIEN_ERR_OP;
    if ((int)term->site < 0 || (int)term->site >= MIEN_SITES) return MIEN_ERR_SITE;
    if (!isfinite(term->coefficient) || !isfinite(term->margin)) return MIEN_ERR_NOT_FINITE;
    if (isnan(term->window.decay) || term->window.decay <= 0) return MIEN_ERR_NOT_FINITE;
    const bool subspace = term->op == MIEN_OP_ABLATE || term->op == MIEN_OP_CLAMP;
    if (term->width <= 0 || term->rank <= 0 || term->rank > INT32_MAX / 2 || (term->rank > 1 && !subspace)) return MIEN_ERR_SHAPE;
    if ((term->op == MIEN_OP_CLAMP && !term->targets) || (term->op == MIEN_OP_EDIT && !term->biases))
        return MIEN_ERR_SHAPE;
    if (term->n_gates > MIEN_TERM_GATES) return MIEN_ERR_GATE;
    for (size_t g = 0; g < term->n_gates; g++) {
        if (term->gates[g] < 0 || (size_t)term->gates[g] >= n_gates) return MIEN_ERR_GATE;
        if (gates[term->gates[g]].readout.width != term->width) return MIEN_ERR_SHAPE;
    }
    return check_layers(term->layers, term->n_rows, n_layer);
}

/* ---- compiling ---------------------------------------------------------------------------------- */

/* Neighbouring terms that make one operation a layer. */
typedef struct {
    const mien_term *terms;
    size_t n;
} group;

static bool same_manner(const mien_term *a, const mien_term *b) {
    return folds(a->op) && a->op == b->op && a->site == b->site && a->width == b->width &&
           a->n_gates == b->n_gates && !memcmp(a->gates, b->gates, a->n_gates * sizeof *a->gates) &&
           a->window.start == b->window.start && a->window.stop == b->window.stop &&
           a->window.ramp == b->window.ramp && a->window.decay == b->window.decay;
}

static group next_group(const mien_term *terms, size_t n_terms, size_t from) {
    group found = {terms + from, 1};
    while (from + found.n < n_terms && same_manner(found.terms, &terms[from + found.n])) found.n++;
    return found;
}

/* The number of the term's (or readout's) row at `layer`, or SIZE_MAX. */
static size_t row_at(const int32_t *layers, size_t n, int32_t layer) {
    size_t low = 0, high = n;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (layers[middle] < layer)
            low = middle + 1;
        else
            high = middle;
    }
    return low < n && layers[low] == layer ? low : SIZE_MAX;
}

typedef struct {
    size_t operations, openings, at, floats;
} used;

/* An upper bound of what the terms need. */
static bool count(used *need, const mien_term *terms, size_t n_terms, const mien_gate *gates, size_t n_gates,
                  int32_t n_layer, bool *seen) {
    size_t sum = 0; /* only its not overflowing matters */
    *need = (used){0, 0, 0, 0};
    for (size_t g = 0; g < n_gates; g++) {
        const size_t rows = gates[g].readout.n_rows, stride = stride_of(gates[g].readout.width);
        if (!add_size(&sum, rows, stride * sizeof(float))) return false;
        need->floats += rows * stride;
    }
    for (size_t from = 0; from < n_terms;) {
        const group terms_here = next_group(terms, n_terms, from);
        const mien_term *term = terms_here.terms;
        const size_t stride = stride_of(term->width);
        const size_t levels = term->op == MIEN_OP_CLAMP ? stride_of(2 * term->rank) : 0;
        const size_t floats = (size_t)term->rank * stride + levels;
        memset(seen, 0, (size_t)n_layer * sizeof *seen);
        for (size_t t = 0; t < terms_here.n; t++)
            for (size_t r = 0; r < term[t].n_rows; r++) {
                bool *first = &seen[term[t].layers[r]];
                if (*first) continue;
                *first = true;
                if (!add_size(&sum, floats, sizeof(float) + sizeof(int32_t))) return false;
                need->operations++;
                need->openings += term->n_gates;
                need->floats += floats;
                if (folds(term->op) && term->site != MIEN_SITE_RESIDUAL) need->at += stride;
            }
        from += terms_here.n;
    }
    return add_size(&sum, need->operations, sizeof(operation)) && add_size(&sum, need->openings, sizeof(opening));
}

static mien_program *allocate(int32_t n_layer, const used *need, size_t n_gates) {
    size_t size = 0, starts[6];
    const size_t counts[6] = {(size_t)MIEN_SITES * (size_t)n_layer, n_gates, need->openings,
                              need->operations, need->at, need->floats};
    const size_t sizes[6] = {sizeof(place), sizeof(mien_gate), sizeof(opening), sizeof(operation), sizeof(int32_t),
                             sizeof(float)};
    if (!add_size(&size, 1, sizeof(mien_program))) return NULL;
    for (int i = 0; i < 6; i++) {
        starts[i] = size;
        if (!add_size(&size, counts[i], sizes[i])) return NULL;
    }
    char *block = aligned_alloc(ALIGN, size);
    if (!block) return NULL;
    memset(block, 0, starts[5]);
    mien_program *program = (mien_program *)block;
    atomic_init(&program->references, 1);
    program->n_layer = n_layer;
    program->places = (place *)(block + starts[0]);
    program->gates = (mien_gate *)(block + starts[1]);
    program->openings = (opening *)(block + starts[2]);
    program->operations = (operation *)(block + starts[3]);
    program->at = (int32_t *)(block + starts[4]);
    program->floats = (float *)(block + starts[5]);
    return program;
}

static float *take_row(mien_program *program, used *made, int32_t width) {
    float *row = program->floats + made->floats;
    made->floats += stride_of(width);
    return row;
}

/* The gates of the program, each with rows of its own; they are found by `row_at` as they came. */
static void copy_gates(mien_program *program, used *made, const mien_gate *gates, size_t n_gates) {
    for (size_t g = 0; g < n_gates; g++) {
        program->gates[g] = gates[g];
        const mien_readout *readout = &gates[g].readout;
        program->gates[g].readout.rows = program->floats + made->floats;
        for (size_t r = 0; r < readout->n_rows; r++)
            memcpy(take_row(program, made, readout->width), readout->rows + r * (size_t)readout->width,
                   (size_t)readout->width * sizeof(float));
    }
}

/* Whether every gate of the term has a row at `layer`. */
static bool gates_read(const mien_term *term, const mien_gate *gates, int32_t layer) {
    for (size_t g = 0; g < term->n_gates; g++) {
        const mien_readout *readout = &gates[term->gates[g]].readout;
        if (row_at(readout->layers, readout->n_rows, layer) == SIZE_MAX) return false;
    }
    return true;
}

/* The bit of the gate among those of the place, which it joins if it is new there; 0 if there are too many. */
static uint32_t open_bit(mien_program *program, used *made, place *here, const mien_gate *gate, int32_t layer) {
    for (size_t i = 0; i < here->n_gates; i++)
        if (program->openings[here->first_gate + i].gate == gate) return (uint32_t)1 << i;
    if (here->n_gates == MIEN_PLACE_GATES) return 0;
    const size_t r = row_at(gate->readout.layers, gate->readout.n_rows, layer);
    opening *made_here = &program->openings[made->openings++];
    made_here->gate = gate;
    made_here->row = gate->readout.rows + r * stride_of(gate->readout.width);
    made_here->offset = gate->readout.offsets[r];
    made_here->remembered = SIZE_MAX;
    if (remembers(gate)) {
        made_here->remembered = program->n_remembered++;
        here->ordered = true;
    }
    return (uint32_t)1 << here->n_gates++;
}

/* Where few values are not zero, keep only those, at the row's beginning, and where they are. */
static void make_sparse(mien_program *program, used *made, operation *op, float *row, size_t n) {
    const bool marks = op->op == MIEN_OP_FORBID || op->op == MIEN_OP_FORCE;
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += row[i] != 0.0f;
    if (!marks && count * SPARSE > n) return;
    int32_t *at = program->at + made->at;
    count = 0;
    for (size_t i = 0; i < n; i++)
        if (row[i] != 0.0f) {
            at[count] = (int32_t)i;
            row[count++] = row[i];
        }
    made->at += count;
    op->at = at;
    op->count = count;
}

static bool is_zero(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (x[i] != 0.0f) return false;
    return true;
}

/* Fills in `op` for the group at `layer`. MIEN_ERR_LAYER: there is nothing to do there. */
static mien_status make_operation(mien_program *program, used *made, operation *op, const group *terms,
                                  int32_t layer, const float **rows, double *coefficients) {
    const mien_term *term = terms->terms;
    const size_t n = (size_t)term->width;
    float *direction = program->floats + made->floats;
    op->op = term->op;
    if (folds(term->op)) {
        size_t found = 0;
        for (size_t t = 0; t < terms->n; t++) {
            const size_t r = row_at(term[t].layers, term[t].n_rows, layer);
            if (r == SIZE_MAX) continue;
            rows[found] = term[t].rows + r * n;
            coefficients[found++] = term[t].coefficient;
        }
        if (!found) return MIEN_ERR_LAYER;
        mien_combine(direction, rows, coefficients, found, n);
        if (!mien_is_finite(direction, n)) return MIEN_ERR_NOT_FINITE;
        if (is_zero(direction, n)) return MIEN_ERR_LAYER;
        take_row(program, made, term->width);
        if (term->site != MIEN_SITE_RESIDUAL && term->op != MIEN_OP_ADD_KEEP_NORM)
            make_sparse(program, made, op, direction, n);
    } else {
        const size_t r = row_at(term->layers, term->n_rows, layer);
        if (r == SIZE_MAX) return MIEN_ERR_LAYER;
        const float *from = term->rows + r * (size_t)term->rank * n;
        if (!mien_is_finite(from, (size_t)term->rank * n)) return MIEN_ERR_NOT_FINITE;
        if (is_zero(from, (size_t)term->rank * n) || term->coefficient == 0) return MIEN_ERR_LAYER;
        op->rank = 0;
        for (size_t k = 0; k < (size_t)term->rank; k++) /* what is left over of a basis is zero */
            if (!is_zero(from + k * n, n)) {
                memcpy(take_row(program, made, term->width), from + k * n, n * sizeof(float));
                op->rank++;
            }
        if (term->op == MIEN_OP_CLAMP) {
            const float *target = term->targets + r * n;
            if (!mien_is_finite(target, n)) return MIEN_ERR_NOT_FINITE;
            double *levels = (double *)take_row(program, made, 2 * term->rank);
            mien_dots(levels, target, direction, stride_of(term->width), op->rank, n);
            op->levels = levels;
        }
        if (term->op == MIEN_OP_EDIT) {
            op->bias = term->biases[r];
            op->margin = term->margin;
            op->square = mien_dot(from, from, n);
            if (!isfinite(op->bias) || !isfinite(op->square)) return MIEN_ERR_NOT_FINITE;
            if (op->square <= 0) return MIEN_ERR_LAYER;
        }
    }
    op->direction = direction;
    op->strength = term->coefficient;
    op->window = term->window;
    op->always = !term->n_gates && !has_window(&term->window);
    return MIEN_OK;
}

/* Everything at one place. */
static mien_status make_place(mien_program *program, used *made, mien_site site, int32_t layer,
                              const mien_term *terms, size_t n_terms, const float **rows, double *coefficients) {
    place *here = &program->places[(size_t)site * (size_t)program->n_layer + (size_t)layer];
    here->first = made->operations;
    here->first_gate = made->openings;
    for (int i = 0; i < MIEN_OPS; i++)
        for (size_t from = 0; from < n_terms;) {
            const group found = next_group(terms, n_terms, from);
            const mien_term *term = found.terms;
            from += found.n;
            if (term->op != acting_order[i] || term->site != site || !gates_read(term, program->gates, layer)) continue;
            operation op = {0};
            const mien_status status = make_operation(program, made, &op, &found, layer, rows, coefficients);
            if (status == MIEN_ERR_LAYER) continue;
            if (status != MIEN_OK) return status;
            if (here->width && here->width != term->width) return MIEN_ERR_SHAPE;
            here->width = term->width;
            for (size_t g = 0; g < term->n_gates; g++) {
                const uint32_t bit = open_bit(program, made, here, &program->gates[term->gates[g]], layer);
                if (!bit) return MIEN_ERR_GATE;
                op.gates |= bit;
            }
            program->operations[made->operations++] = op;
            here->count++;
            program->has[site] = true;
            program->counts = program->counts || has_window(&term->window);
        }
    if (here->count > 1 && (size_t)here->width > program->copy) program->copy = (size_t)here->width;
    return MIEN_OK;
}

mien_status mien_program_new(mien_program **out, int32_t n_layer, const mien_term *terms, size_t n_terms,
                             const mien_gate *gates, size_t n_gates) {
    *out = NULL;
    if (n_layer <= 0) return MIEN_ERR_SHAPE;
    if (n_terms > SIZE_MAX / sizeof(double) - 1) return MIEN_ERR_MEMORY;
    mien_status status = MIEN_OK;
    for (size_t g = 0; g < n_gates && status == MIEN_OK; g++) status = check_gate(&gates[g], n_layer);
    for (size_t t = 0; t < n_terms && status == MIEN_OK; t++) status = check_term(&terms[t], n_layer, gates, n_gates);
    if (status != MIEN_OK) return status;

    status = MIEN_ERR_MEMORY;
    const float **rows = calloc(n_terms + 1, sizeof *rows);
    double *coefficients = calloc(n_terms + 1, sizeof *coefficients);
    bool *seen = calloc((size_t)n_layer, sizeof *seen);
    mien_program *program = NULL;
    used need, made = {0, 0, 0, 0};
    if (!rows || !coefficients || !seen || !count(&need, terms, n_terms, gates, n_gates, n_layer, seen)) goto done;
    program = allocate(n_layer, &need, n_gates);
    if (!program) goto done;
    copy_gates(program, &made, gates, n_gates);
    status = MIEN_OK;
    bool here[MIEN_SITES] = {false};
    for (size_t t = 0; t < n_terms; t++) here[terms[t].site] = true;
    for (int site = 0; site < MIEN_SITES; site++)
        for (int32_t layer = 0; here[site] && layer < n_layer && status == MIEN_OK; layer++)
            status = make_place(program, &made, (mien_site)site, layer, terms, n_terms, rows, coefficients);
    for (size_t g = 0; g < n_gates; g++) program->gates[g].readout = (mien_readout){0}; /* not the program's */
    if (status == MIEN_OK) {
        *out = program;
        program = NULL;
    }
done:
    mien_program_release(program);
    free(seen);
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

/* ---- asking ------------------------------------------------------------------------------------- */

static const place *find(const mien_program *program, mien_site site, int32_t layer) {
    if (!program || (int)site < 0 || (int)site >= MIEN_SITES || layer < 0 || layer >= program->n_layer) return NULL;
    const place *here = &program->places[(size_t)site * (size_t)program->n_layer + (size_t)layer];
    return here->count ? here : NULL;
}

int32_t mien_program_layers(const mien_program *program, mien_site site, int32_t *layers, int32_t room) {
    int32_t found = 0;
    for (int32_t layer = 0; program && layer < program->n_layer; layer++)
        if (find(program, site, layer)) {
            if (found < room) layers[found] = layer;
            found++;
        }
    return found;
}

int32_t mien_program_width(const mien_program *program, mien_site site, int32_t layer) {
    const place *here = find(program, site, layer);
    return here ? here->width : 0;
}

bool mien_program_fits(const mien_program *program, int32_t n_layer) {
    return !program || program->n_layer == n_layer;
}

bool mien_program_acts(const mien_program *program, mien_site site, int32_t layer) {
    return find(program, site, layer) != NULL;
}

bool mien_program_has(const mien_program *program, mien_site site) {
    return program && (int)site >= 0 && (int)site < MIEN_SITES && program->has[site];
}

bool mien_program_counts(const mien_program *program) {
    return program && (program->counts || program->n_remembered);
}

bool mien_program_remembers(const mien_program *program) { return program && program->n_remembered; }

bool mien_program_ordered(const mien_program *program, mien_site site, int32_t layer) {
    const place *here = find(program, site, layer);
    return here && here->ordered;
}

const float *mien_program_direction(const mien_program *program, mien_site site, int32_t layer, mien_op op) {
    const place *here = find(program, site, layer);
    for (size_t o = 0; here && o < here->count; o++) {
        const operation *found = &program->operations[here->first + o];
        if (found->op == op && found->always && !found->at) return found->direction;
    }
    return NULL;
}

/* ---- applying ----------------------------------------------------------------------------------- */

static double share_at(const mien_window *window, int32_t reply) {
    if (!has_window(window)) return 1;
    if (reply < 0 || reply < window->start || reply >= window->stop) return 0;
    const double since = (double)reply - (double)window->start;
    double share = window->ramp && since + 1 < window->ramp ? (since + 1) / window->ramp : 1;
    if (isfinite(window->decay)) share *= exp2(-since / window->decay);
    return share;
}

static unsigned char *remembered(const opening *gate, const mien_token *token, int32_t reply) {
    mien_memory *memory = token->memory;
    if (!memory || gate->remembered >= memory->n || reply < 0 || reply >= memory->capacity) return NULL;
    return &memory->open[(size_t)reply * memory->n + gate->remembered];
}

/* A bit for each gate that is open for the row. */
static uint32_t open_gates(const mien_program *program, const place *here, const float *x, const mien_token *token) {
    uint32_t open = 0;
    for (size_t i = 0; i < here->n_gates; i++) {
        const opening *gate = &program->openings[here->first_gate + i];
        const double value = mien_dot(x, gate->row, (size_t)here->width) - gate->offset;
        const unsigned char *was = remembered(gate, token, token->reply - 1);
        const bool before = was && *was;
        const double slack = before ? gate->gate->hysteresis : 0;
        const bool is_open = (value > gate->gate->above - slack && value < gate->gate->below + slack) ||
                             (before && gate->gate->latch);
        unsigned char *is = remembered(gate, token, token->reply);
        if (is) *is = is_open;
        if (is_open) open |= (uint32_t)1 << i;
    }
    return open;
}

static double run(const operation *op, float *x, size_t n, double share) {
    const float c = (float)share;
    switch (op->op) {
        case MIEN_OP_ABLATE:
        case MIEN_OP_CLAMP:
            return mien_project(x, op->direction, stride_of((int32_t)n), op->rank, op->levels, op->strength * share, n);
        case MIEN_OP_EDIT:
            return mien_edit(x, op->direction, op->square, op->bias, op->margin, op->strength * share, n);
        case MIEN_OP_SCALE:
            if (op->at) return mien_scale_at(x, op->at, op->direction, c, op->count);
            return mien_scale(x, op->direction, c, n);
        case MIEN_OP_ADD:
            if (op->at) return mien_add_at(x, op->at, op->direction, c, op->count);
            return share == 1 ? mien_add(x, op->direction, n) : mien_add_scaled(x, op->direction, c, n);
        case MIEN_OP_ADD_KEEP_NORM:
            return share == 1 ? mien_add_keep_norm(x, op->direction, n)
                              : mien_add_keep_norm_scaled(x, op->direction, c, n);
        case MIEN_OP_FORBID:
            return mien_forbid(x, op->at, op->count, n);
        case MIEN_OP_FORCE:
            return mien_force(x, op->at, op->count, n);
    }
    return 0;
}

/* All operations of the place on one row. `before`: room for a copy, or NULL. */
static mien_shift apply_row(const mien_program *program, const place *here, mien_site site, float *x,
                            const mien_token *token, float *before) {
    const size_t n = (size_t)here->width;
    const operation *operations = &program->operations[here->first];
    const uint32_t open = here->n_gates ? open_gates(program, here, x, token) : 0;
    mien_shift shift = {0, 0};
    size_t acted = 0;
    bool moved = false; /* where a row is on the right side of a probe, say, it stays as it was */
    for (size_t o = 0; o < here->count; o++) {
        const operation *op = &operations[o];
        if ((op->gates & open) != op->gates) continue;
        const double share = op->always ? 1 : share_at(&op->window, token->reply);
        if (share == 0) continue;
        if (before && !acted) memcpy(before, x, n * sizeof(float));
        const double squared = run(op, x, n, share);
        shift.squared += squared;
        moved = moved || squared != 0;
        acted++;
    }
    shift.rows = moved;
    if (acted > 1 && before && site != MIEN_SITE_EXPERTS) {
        for (size_t i = 0; i < n; i++) before[i] = x[i] - before[i];
        shift.squared = mien_dot(before, before, n);
    }
    return shift;
}

mien_shift mien_program_apply(const mien_program *program, mien_site site, int32_t layer, float *rows,
                              size_t n_rows, const mien_token *tokens, float *copy) {
    static const mien_token of_prompt = {-1, NULL};
    const place *here = find(program, site, layer);
    mien_shift shift = {0, 0};
    if (!here) return shift;
    const size_t n = (size_t)here->width;
    const operation *first = &program->operations[here->first], *second = first + 1;
    const bool pair = here->count == 2 && first->always && second->always && !first->at &&
                      first->op == MIEN_OP_ADD && second->op == MIEN_OP_ADD_KEEP_NORM;
    if (pair || (here->count == 1 && first->always)) {
        for (size_t r = 0; r < n_rows; r++) {
            float *x = rows + r * n;
            const double squared = pair ? mien_add_then_keep_norm(x, first->direction, second->direction, n)
                                        : run(first, x, n, 1);
            shift.squared += squared;
            shift.rows += squared != 0;
        }
        return shift;
    }
    float *before = here->count > 1 ? copy : NULL;
    for (size_t r = 0; r < n_rows; r++) {
        const mien_shift one =
            apply_row(program, here, site, rows + r * n, tokens ? &tokens[r] : &of_prompt, before);
        shift.squared += one.squared;
        shift.rows += one.rows;
    }
    return shift;
}

size_t mien_program_copy(const mien_program *program) { return program ? program->copy : 0; }

mien_shift mien_program_apply_at(const mien_program *program, mien_site site, int32_t layer, uintptr_t rows,
                                 size_t n_rows, uintptr_t tokens) {
    const place *here = find(program, site, layer);
    float *copy = here && here->count > 1 ? malloc((size_t)here->width * sizeof *copy) : NULL;
    const mien_shift shift =
        mien_program_apply(program, site, layer, (float *)rows, n_rows, (const mien_token *)tokens, copy);
    free(copy);
    return shift;
}

double mien_program_steer_at(const mien_program *program, int32_t layer, uintptr_t rows, size_t n_rows) {
    return mien_program_apply_at(program, MIEN_SITE_RESIDUAL, layer, rows, n_rows, 0).squared;
}

/* ---- what gates remember ------------------------------------------------------------------------ */

mien_status mien_memory_new(mien_memory **out, const mien_program *program) {
    *out = calloc(1, sizeof **out);
    if (!*out) return MIEN_ERR_MEMORY;
    atomic_init(&(*out)->references, 1);
    (*out)->n = program ? program->n_remembered : 0;
    return MIEN_OK;
}

mien_memory *mien_memory_retain(mien_memory *memory) {
    if (memory) atomic_fetch_add_explicit(&memory->references, 1, memory_order_relaxed);
    return memory;
}

void mien_memory_release(mien_memory *memory) {
    if (!memory || atomic_fetch_sub_explicit(&memory->references, 1, memory_order_acq_rel) != 1) return;
    free(memory->open);
    free(memory);
}

mien_status mien_memory_reserve(mien_memory *memory, int32_t replies) {
    if (replies <= memory->capacity || !memory->n) return MIEN_OK;
    int32_t grown = memory->capacity ? memory->capacity : 64;
    while (grown < replies) grown = grown > INT32_MAX / 2 ? INT32_MAX : grown * 2;
    if ((size_t)grown > SIZE_MAX / memory->n) return MIEN_ERR_MEMORY;
    unsigned char *open = realloc(memory->open, (size_t)grown * memory->n);
    if (!open) return MIEN_ERR_MEMORY;
    memset(open + (size_t)memory->capacity * memory->n, 0, (size_t)(grown - memory->capacity) * memory->n);
    memory->open = open;
    memory->capacity = grown;
    return MIEN_OK;
}

/* ---- probes ------------------------------------------------------------------------------------- */

/* One block: this header, then offsets (n_layer x count) and rows (n_layer x count x stride), aligned. */
struct mien_probe {
    _Atomic size_t references;
    int32_t n_layer, width;
    size_t count, stride;
    double *offsets;            /* NaN where there is no row */
    float *rows;
};

mien_status mien_probe_new(mien_probe **out, int32_t n_layer, const mien_readout *readouts, size_t n_readouts) {
    *out = NULL;
    if (n_layer <= 0 || !n_readouts) return MIEN_ERR_SHAPE;
    const int32_t width = readouts[0].width;
    for (size_t i = 0; i < n_readouts; i++) {
        const mien_status status = check_readout(&readouts[i], n_layer);
        if (status != MIEN_OK) return status;
        if (readouts[i].width != width) return MIEN_ERR_SHAPE;
        if (!mien_is_finite(readouts[i].rows, readouts[i].n_rows * (size_t)width)) return MIEN_ERR_NOT_FINITE;
    }
    size_t size = 0;
    const size_t stride = stride_of(width), head = aligned(sizeof(mien_probe));
    if (n_readouts > SIZE_MAX / (size_t)n_layer) return MIEN_ERR_MEMORY;
    const size_t places = (size_t)n_layer * n_readouts;
    if (!add_size(&size, places, sizeof(double))) return MIEN_ERR_MEMORY;
    const size_t offsets = size;
    if (!add_size(&size, places, stride * sizeof(float)) || !add_size(&size, 1, head)) return MIEN_ERR_MEMORY;
    char *block = aligned_alloc(ALIGN, size);
    if (!block) return MIEN_ERR_MEMORY;
    memset(block, 0, size);
    mien_probe *probe = (mien_probe *)block;
    atomic_init(&probe->references, 1);
    probe->n_layer = n_layer;
    probe->width = width;
    probe->count = n_readouts;
    probe->stride = stride;
    probe->offsets = (double *)(block + head);
    probe->rows = (float *)(block + head + offsets);
    for (size_t i = 0; i < places; i++) probe->offsets[i] = NAN;
    for (size_t i = 0; i < n_readouts; i++)
        for (size_t r = 0; r < readouts[i].n_rows; r++) {
            const size_t at = (size_t)readouts[i].layers[r] * n_readouts + i;
            probe->offsets[at] = readouts[i].offsets[r];
            memcpy(probe->rows + at * stride, readouts[i].rows + r * (size_t)width, (size_t)width * sizeof(float));
        }
    *out = probe;
    return MIEN_OK;
}

mien_probe *mien_probe_retain(mien_probe *probe) {
    if (probe) atomic_fetch_add_explicit(&probe->references, 1, memory_order_relaxed);
    return probe;
}

void mien_probe_release(mien_probe *probe) {
    if (probe && atomic_fetch_sub_explicit(&probe->references, 1, memory_order_acq_rel) == 1) free(probe);
}

int32_t mien_probe_layers(const mien_probe *probe) { return probe->n_layer; }

int32_t mien_probe_width(const mien_probe *probe) { return probe->width; }

size_t mien_probe_count(const mien_probe *probe) { return probe->count; }

void mien_probe_read(const mien_probe *probe, int32_t layer, const float *rows, size_t n_rows, float *out) {
    enum { AT_ONCE = 16 };
    double dots[AT_ONCE];
    if (layer < 0 || layer >= probe->n_layer) return;
    const size_t n = (size_t)probe->width, at = (size_t)layer * probe->count;
    for (size_t r = 0; r < n_rows; r++)
        for (size_t i = 0; i < probe->count; i += AT_ONCE) {
            const size_t k = probe->count - i < AT_ONCE ? probe->count - i : AT_ONCE;
            mien_dots(dots, rows + r * n, probe->rows + (at + i) * probe->stride, probe->stride, k, n);
            for (size_t j = 0; j < k; j++) out[r * probe->count + i + j] = (float)(dots[j] - probe->offsets[at + i + j]);
        }
}

void mien_probe_read_at(const mien_probe *probe, int32_t layer, uintptr_t rows, size_t n_rows, uintptr_t out) {
    mien_probe_read(probe, layer, (const float *)rows, n_rows, (float *)out);
}
