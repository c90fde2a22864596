/* The kernels and the program, without a hook: every claim of their headers, and every status. */
#include "testing.h"

#include <float.h>
#include <math.h>
#include <pthread.h>

#include "mien_kernels.h"
#include "mien_program.h"

enum { GUARDS = 8, ROOM = 70, LAYERS = 6, EMBD = 21 };

#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* With room for a copy of a row, a thread's own. */
static mien_shift apply(const mien_program *program, mien_site site, int32_t layer, float *rows, size_t n_rows,
                        const mien_token *tokens) {
    static _Thread_local float copy[1 << 12];
    return mien_program_copy(program) > LENGTH(copy) ? (mien_shift){NAN, -1}
                                                     : mien_program_apply(program, site, layer, rows, n_rows, tokens, copy);
}

/* ---- kernels ------------------------------------------------------------------------------------ */

static void add_is_the_plain_loop_at_every_length_and_alignment(void) {
    float x[ROOM + 2 * GUARDS], v[ROOM + GUARDS], expected[ROOM + 2 * GUARDS];
    for (size_t n = 0; n <= ROOM; n++)
        for (size_t shift = 0; shift < GUARDS; shift++) {
            fill_random(x, LENGTH(x));
            fill_random(v, LENGTH(v));
            memcpy(expected, x, sizeof x);
            float *from = x + shift, *to = expected + shift;
            const float *direction = v + (shift * 3) % GUARDS;
            double moved = 0;
            for (size_t i = 0; i < n; i++) {
                to[i] = to[i] + direction[i];
                moved += ((double)to[i] - (double)from[i]) * ((double)to[i] - (double)from[i]);
            }
            CHECK(about(mien_add(from, direction, n), moved));
            CHECK(same_bits(x, expected, LENGTH(x))); /* the floats around the row too */
        }
}

static void add_returns_the_exact_squared_shift(void) {
    float x[100], v[100];
    double squares = 0;
    for (int i = 0; i < 100; i++) {
        x[i] = (float)(i - 50);
        v[i] = (float)i / 8;
        squares += (double)v[i] * v[i];
    }
    CHECK(mien_add(x, v, 100) == squares);
    fill(v, 100, 0.0f);
    CHECK(mien_add(x, v, 100) == 0.0);
}

static void add_reports_no_shift_where_rounding_absorbs_the_vector(void) {
    float x[17], v[17];
    fill(x, 17, 1e30f);
    fill(v, 17, 1.0f);
    CHECK(mien_add(x, v, 17) == 0.0);
    CHECK(all_are(x, 17, 1e30f));

    fill(x, 17, 16777216.0f); /* 2^24: adding 3 lands on a multiple of 2 */
    fill(v, 17, 3.0f);
    CHECK(mien_add(x, v, 17) == 17 * 16.0);
    CHECK(all_are(x, 17, 16777220.0f));
}

static void add_does_not_overflow_in_its_sum_of_squares(void) {
    float x[9], v[9];
    fill(x, 9, 0.0f);
    fill(v, 9, 1e30f);
    CHECK(about(mien_add(x, v, 9), 9 * (double)1e30f * (double)1e30f));
}

/* What mien_add_keep_norm says it does, one float after the other. */
static void plain_add_keep_norm(float *x, const float *v, size_t n) {
    double before = 0, after = 0;
    for (size_t i = 0; i < n; i++) {
        const double a = x[i], b = x[i] + v[i];
        before += a * a;
        after += b * b;
    }
    for (size_t i = 0; i < n; i++) x[i] = after > 0 ? (float)((double)(x[i] + v[i]) * sqrt(before / after)) : 0.0f;
}

/* The scale is good to float's precision: a result may be a few floats off, also where they are sparse. */
static bool alike(const float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (nextafterf(x[i], y[i]) != y[i] && !(fabsf(x[i] - y[i]) <= 4e-7f * fabsf(y[i]))) return false;
    return true;
}

static double squared_shift(const float *before, const float *after, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += ((double)after[i] - (double)before[i]) * ((double)after[i] - (double)before[i]);
    return sum;
}

static double norm(const float *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

static void add_keep_norm_is_the_plain_loop_at_every_length_and_alignment(void) {
    float x[ROOM + 2 * GUARDS], v[ROOM + GUARDS], before[ROOM + 2 * GUARDS], expected[ROOM + 2 * GUARDS];
    for (size_t n = 0; n <= ROOM; n++)
        for (size_t shift = 0; shift < GUARDS; shift++) {
            fill_random(x, LENGTH(x));
            fill_random(v, LENGTH(v));
            memcpy(before, x, sizeof x);
            memcpy(expected, x, sizeof x);
            const float *direction = v + (shift * 3) % GUARDS;
            plain_add_keep_norm(expected + shift, direction, n);
            const double moved = mien_add_keep_norm(x + shift, direction, n);
            CHECK(alike(x + shift, expected + shift, n));
            CHECK(about(moved, squared_shift(before + shift, x + shift, n)));
            CHECK(same_bits(x, before, shift)); /* the floats around the row too */
            CHECK(same_bits(x + shift + n, before + shift + n, LENGTH(x) - shift - n));
            const double length = norm(before + shift, n);
            CHECK(fabs(norm(x + shift, n) - length) <= 1e-6 * length);
        }
}

/* Rows are walked in blocks; in the first one nothing moves, and in the last one it is huge. */
static void long_rows_are_the_plain_loop_over_every_block(void) {
    enum { LONG = 2500 };
    static const size_t sizes[] = {1023, 1024, 1025, 2048, 2079, 2080, LONG};
    static float x[LONG], v[LONG], before[LONG], expected[LONG];
    for (size_t s = 0; s < LENGTH(sizes); s++)
        for (int huge = 0; huge < 2; huge++) {
            const size_t n = sizes[s];
            fill_random(before, n);
            fill_random(v, n);
            fill(v, n < 1024 ? n / 2 : 1024, 0.0f);
            for (size_t i = 2048; huge && i < n; i++) v[i] *= 1e25f;
            memcpy(x, before, sizeof x);
            for (size_t i = 0; i < n; i++) expected[i] = before[i] + v[i];
            CHECK(about(mien_add(x, v, n), squared_shift(before, expected, n)));
            CHECK(same_bits(x, expected, n));
            memcpy(x, before, sizeof x);
            memcpy(expected, before, sizeof x);
            plain_add_keep_norm(expected, v, n);
            const double moved = mien_add_keep_norm(x, v, n);
            CHECK(about(moved, squared_shift(before, x, n)));
            CHECK(alike(x, expected, n));
        }
}

static void add_then_keep_norm_is_one_after_the_other(void) {
    float x[ROOM + 2 * GUARDS], a[ROOM + GUARDS], v[ROOM + GUARDS];
    float before[ROOM + 2 * GUARDS], expected[ROOM + 2 * GUARDS];
    for (size_t n = 0; n <= ROOM; n++)
        for (size_t shift = 0; shift < GUARDS; shift++) {
            fill_random(x, LENGTH(x));
            fill_random(a, LENGTH(a));
            fill_random(v, LENGTH(v));
            memcpy(before, x, sizeof x);
            memcpy(expected, x, sizeof x);
            const float *first = a + (shift * 5) % GUARDS, *second = v + (shift * 3) % GUARDS;
            mien_add(expected + shift, first, n);
            mien_add_keep_norm(expected + shift, second, n);
            const double moved = mien_add_then_keep_norm(x + shift, first, second, n);
            CHECK(same_bits(x, expected, LENGTH(x)));
            CHECK(about(moved, squared_shift(before + shift, x + shift, n)));
        }
}

static void add_then_keep_norm_leaves_nothing_where_nothing_is_left(void) {
    float x[ROOM], a[ROOM], v[ROOM];
    for (size_t n = 0; n <= ROOM; n++) {
        fill_random(x, n);
        fill_random(v, n);
        for (size_t i = 0; i < n; i++) a[i] = -x[i];
        mien_add_then_keep_norm(x, a, v, n); /* no length to keep */
        CHECK(all_are(x, n, 0.0f));
        for (size_t i = 0; i < n; i++) x[i] = a[i] = v[i], v[i] *= -2;
        mien_add_then_keep_norm(x, a, v, n); /* no direction left */
        CHECK(all_are(x, n, 0.0f));
    }
}

/* A float counts for the norm wherever it stands. */
static void add_keep_norm_minds_every_position(void) {
    float x[ROOM], v[ROOM];
    for (size_t n = 2; n <= ROOM; n++)
        for (size_t i = 0; i < n; i++) {
            const size_t other = (i + n / 2) % n;
            fill(x, n, 0.0f);
            fill(v, n, 0.0f);
            x[i] = 3.0f;
            v[other] = -4.0f;
            const double moved = mien_add_keep_norm(x, v, n);
            CHECK(about(moved, (1.8f - 3.0) * (1.8f - 3.0) + 2.4f * (double)2.4f));
            CHECK(fabsf(x[i] - 1.8f) < 5e-7f && fabsf(x[other] + 2.4f) < 5e-7f);
            x[i] = x[other] = 0.0f;
            CHECK(all_are(x, n, 0.0f));
        }
}

static void add_keep_norm_leaves_nothing_where_nothing_is_left(void) {
    float x[ROOM], v[ROOM];
    for (size_t n = 0; n <= ROOM; n++) {
        fill_random(x, n);
        for (size_t i = 0; i < n; i++) v[i] = -x[i];
        const double squares = norm(x, n) * norm(x, n);
        CHECK(fabs(mien_add_keep_norm(x, v, n) - squares) <= 1e-6 * squares);
        CHECK(all_are(x, n, 0.0f)); /* not NaN */
    }
}

static void add_keep_norm_keeps_an_empty_row_empty(void) {
    float x[ROOM], v[ROOM];
    for (size_t n = 0; n <= ROOM; n++) {
        fill(x, n, n % 2 ? 0.0f : -0.0f);
        fill_random(v, n);
        CHECK(mien_add_keep_norm(x, v, n) == 0.0);
        CHECK(all_are(x, n, 0.0f));
    }
}

static void add_keep_norm_reports_no_shift_where_rounding_absorbs_the_vector(void) {
    float x[17], v[17];
    fill(x, 17, 1e30f);
    fill(v, 17, 1.0f);
    CHECK(mien_add_keep_norm(x, v, 17) == 0.0);
    CHECK(all_are(x, 17, 1e30f));
    fill_random(x, 17);
    memcpy(v, x, sizeof x);
    CHECK(mien_add_keep_norm(x, v, 17) == 0.0); /* twice the row, and half of that */
    CHECK(same_bits(x, v, 17));
}

static void add_keep_norm_neither_overflows_nor_underflows(void) {
    static const float sizes[] = {1e30f, 1.7e37f, 1e-30f, 1e-40f, 1.0f};
    float x[ROOM], v[ROOM], before[ROOM], expected[ROOM];
    for (size_t n = 1; n <= ROOM; n += 23)
        for (size_t a = 0; a < LENGTH(sizes); a++)
            for (size_t b = 0; b < LENGTH(sizes); b++) {
                fill_random(x, n);
                fill_random(v, n);
                for (size_t i = 0; i < n; i++) x[i] *= sizes[a], v[i] *= sizes[b];
                memcpy(before, x, sizeof x);
                memcpy(expected, x, sizeof x);
                plain_add_keep_norm(expected, v, n);
                const double moved = mien_add_keep_norm(x, v, n);
                CHECK(alike(x, expected, n));
                CHECK(mien_is_finite(x, n));
                CHECK(about(moved, squared_shift(before, x, n)));
                CHECK(fabs(norm(x, n) - norm(before, n)) <= 1e-6 * norm(before, n) + n * (double)FLT_TRUE_MIN);
            }
}

static void sum_may_write_over_either_side(void) {
    float x[ROOM], y[ROOM], expected[ROOM], out[ROOM];
    for (size_t n = 0; n <= ROOM; n++) {
        fill_random(x, n);
        fill_random(y, n);
        for (size_t i = 0; i < n; i++) expected[i] = x[i] + y[i];
        mien_sum(out, x, y, n);
        CHECK(same_bits(out, expected, n));
        memcpy(out, x, sizeof x);
        mien_sum(out, out, y, n);
        CHECK(same_bits(out, expected, n));
        memcpy(out, y, sizeof y);
        mien_sum(out, x, out, n);
        CHECK(same_bits(out, expected, n));
    }
    for (size_t i = 0; i < ROOM; i++) expected[i] = y[i] + y[i];
    mien_sum(y, y, y, ROOM);
    CHECK(same_bits(y, expected, ROOM));
}

static void combine_is_the_long_hand_sum_in_double(void) {
    static const size_t sizes[] = {0, 1, 7, 8, 255, 256, 257, 511, 512, 600};
    float rows[5][600], out[601];
    const float *v[] = {rows[0], rows[1], rows[2], rows[3], rows[4]};
    const double c[] = {0.7, -1.3, 1e-7, 12345.678, -0.1};
    for (size_t i = 0; i < LENGTH(rows); i++) fill_random(rows[i], LENGTH(rows[i]));
    for (size_t k = 0; k <= LENGTH(c); k++)
        for (size_t s = 0; s < LENGTH(sizes); s++) {
            const size_t n = sizes[s];
            float expected[601];
            fill(out, LENGTH(out), -7.0f);
            fill(expected, LENGTH(expected), -7.0f);
            for (size_t i = 0; i < n; i++) {
                double sum = 0;
                for (size_t t = 0; t < k; t++) sum += c[t] * (double)v[t][i];
                expected[i] = (float)sum;
            }
            mien_combine(out, v, c, k, n);
            CHECK(same_bits(out, expected, LENGTH(out)));
        }
}

static void combine_adds_in_order_and_rounds_once(void) {
    const float big = 1e16f, one = 1.0f, tiny = 0x1p-24f;
    float out;
    /* in double, (big + 1) - big loses the 1 and (big - big) + 1 keeps it */
    mien_combine(&out, (const float *[]){&big, &one, &big}, (double[]){1, 1, -1}, 3, 1);
    CHECK(out == 0.0f);
    mien_combine(&out, (const float *[]){&big, &big, &one}, (double[]){1, -1, 1}, 3, 1);
    CHECK(out == 1.0f);
    /* 1 + 2^-24 rounds to 1 in float, twice it does not */
    mien_combine(&out, (const float *[]){&one, &tiny, &tiny}, (double[]){1, 1, 1}, 3, 1);
    CHECK(out == 1.0f + FLT_EPSILON);
}

static void finite_is_told_at_every_position(void) {
    static const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    float x[ROOM + 1] = {0};
    CHECK(mien_is_finite(x, 0));
    for (size_t n = 1; n <= ROOM; n++) {
        fill_random(x, n);
        x[n] = NAN; /* beyond the end */
        CHECK(mien_is_finite(x, n));
        for (size_t i = 0; i < n; i++)
            for (size_t b = 0; b < LENGTH(bad); b++) {
                const float kept = x[i];
                x[i] = bad[b];
                CHECK(!mien_is_finite(x, n));
                x[i] = kept;
            }
    }
    fill(x, ROOM, INFINITY);
    x[3] = -INFINITY;
    CHECK(!mien_is_finite(x, ROOM));
}

static void huge_and_denormal_values_are_finite(void) {
    float x[ROOM];
    fill(x, ROOM, FLT_MAX);
    CHECK(mien_is_finite(x, ROOM));
    fill(x, ROOM, -FLT_MAX);
    CHECK(mien_is_finite(x, ROOM));
    fill(x, ROOM, FLT_TRUE_MIN);
    CHECK(mien_is_finite(x, ROOM));
}

/* ---- programs ----------------------------------------------------------------------------------- */

static float rows[4][LAYERS * EMBD];

static mien_term term(double coefficient, size_t n_rows, const int32_t *layers, const float *values) {
    return (mien_term){.op = MIEN_OP_ADD,
                       .site = MIEN_SITE_RESIDUAL,
                       .coefficient = coefficient,
                       .width = EMBD,
                       .rank = 1,
                       .n_rows = n_rows,
                       .layers = layers,
                       .rows = values,
                       .window = {0, INT32_MAX, 0, INFINITY}};
}

static mien_term norm_kept(mien_term kept) {
    kept.op = MIEN_OP_ADD_KEEP_NORM;
    return kept;
}

static mien_program *compiled(const mien_term *terms, size_t n_terms) {
    mien_program *program = NULL;
    CHECK(mien_program_new(&program, LAYERS, terms, n_terms, NULL, 0) == MIEN_OK);
    return program;
}

static void every_refusal_has_its_status(void) {
    static const int32_t good[] = {1, 2, 5}, negative[] = {-1, 2}, too_large[] = {1, LAYERS}, twice[] = {1, 2, 2},
                         falling[] = {1, 3, 2};
    static float nan_row[EMBD], infinite_row[EMBD], huge_row[EMBD];
    static const double biases[] = {0, 0, 0}, bad_biases[] = {0, NAN, 0};
    nan_row[EMBD - 1] = NAN;
    infinite_row[0] = INFINITY;
    fill(huge_row, EMBD, FLT_MAX);
    const mien_term one = term(1, 3, good, rows[0]);
    mien_term op = one, no_op = one, site = one, no_site = one, flat = one, narrow = one, no_rank = one, ranks = one,
              aimless = one, no_probe = one, bad_bias = one, bad_target = one, bad_basis = one, bad_margin = one,
              no_decay = one, nan_decay = one, gates = one, gate = one, no_gate = one, long_probe = one;
    op.op = (mien_op)MIEN_OPS;
    no_op.op = (mien_op)-1;
    site.site = (mien_site)MIEN_SITES;
    no_site.site = (mien_site)-1;
    flat.width = 0;
    narrow.width = INT32_MIN;
    no_rank.rank = 0;
    ranks.rank = 2;
    aimless.op = MIEN_OP_CLAMP;
    bad_target = bad_basis = aimless;
    bad_target.targets = infinite_row;
    bad_target.n_rows = 1;
    bad_basis.rows = nan_row;
    bad_basis.targets = rows[1];
    bad_basis.n_rows = 1;
    no_probe.op = MIEN_OP_EDIT;
    bad_bias = bad_margin = long_probe = no_probe;
    bad_bias.biases = bad_biases;
    bad_margin.biases = long_probe.biases = biases;
    bad_margin.margin = INFINITY;
    long_probe.rows = nan_row;
    long_probe.n_rows = 1;
    no_decay.window.decay = 0;
    nan_decay.window.decay = NAN;
    gates.n_gates = MIEN_TERM_GATES + 1;
    gate.n_gates = no_gate.n_gates = 1;
    no_gate.gates[0] = -1;
    const struct {
        int32_t n_layer;
        mien_term term;
        mien_status status;
    } table[] = {
        {0, one, MIEN_ERR_SHAPE},
        {-1, one, MIEN_ERR_SHAPE},
        {LAYERS, flat, MIEN_ERR_SHAPE},
        {LAYERS, narrow, MIEN_ERR_SHAPE},
        {LAYERS, no_rank, MIEN_ERR_SHAPE},
        {LAYERS, ranks, MIEN_ERR_SHAPE},
        {LAYERS, aimless, MIEN_ERR_SHAPE},
        {LAYERS, no_probe, MIEN_ERR_SHAPE},
        {LAYERS, op, MIEN_ERR_OP},
        {LAYERS, no_op, MIEN_ERR_OP},
        {LAYERS, site, MIEN_ERR_SITE},
        {LAYERS, no_site, MIEN_ERR_SITE},
        {LAYERS, gates, MIEN_ERR_GATE},
        {LAYERS, gate, MIEN_ERR_GATE}, /* there is none */
        {LAYERS, no_gate, MIEN_ERR_GATE},
        {LAYERS, term(1, 2, negative, rows[0]), MIEN_ERR_LAYER},
        {LAYERS, term(1, 2, too_large, rows[0]), MIEN_ERR_LAYER},
        {LAYERS, term(1, 3, twice, rows[0]), MIEN_ERR_LAYER},
        {LAYERS, term(1, 3, falling, rows[0]), MIEN_ERR_LAYER},
        {LAYERS, term(NAN, 3, good, rows[0]), MIEN_ERR_NOT_FINITE},
        {LAYERS, term(INFINITY, 3, good, rows[0]), MIEN_ERR_NOT_FINITE},
        {LAYERS, term(-INFINITY, 0, good, rows[0]), MIEN_ERR_NOT_FINITE},
        {LAYERS, term(1, 1, good, nan_row), MIEN_ERR_NOT_FINITE},
        {LAYERS, term(0, 1, good, infinite_row), MIEN_ERR_NOT_FINITE},
        {LAYERS, term(1.001, 1, good, huge_row), MIEN_ERR_NOT_FINITE}, /* overflows float */
        {LAYERS, term(DBL_MAX, 1, good, huge_row), MIEN_ERR_NOT_FINITE}, /* and double */
        {LAYERS, bad_target, MIEN_ERR_NOT_FINITE},
        {LAYERS, bad_basis, MIEN_ERR_NOT_FINITE},
        {LAYERS, bad_bias, MIEN_ERR_NOT_FINITE},
        {LAYERS, bad_margin, MIEN_ERR_NOT_FINITE},
        {LAYERS, long_probe, MIEN_ERR_NOT_FINITE},
        {LAYERS, no_decay, MIEN_ERR_NOT_FINITE},
        {LAYERS, nan_decay, MIEN_ERR_NOT_FINITE},
    };
    for (size_t i = 0; i < 2 * LENGTH(table); i++) {
        /* behind a good term, so that the check of each term is what refuses; of both kinds of adding */
        const size_t row = i / 2;
        const bool adds = table[row].term.op == MIEN_OP_ADD;
        const mien_term refused = i % 2 && adds ? norm_kept(table[row].term) : table[row].term;
        const mien_term terms[] = {term(0.5, 3, good, rows[1]), refused};
        const long before = live_blocks;
        mien_program *program = (mien_program *)&program;
        const mien_status status = mien_program_new(&program, table[row].n_layer, terms, 2, NULL, 0);
        if (!CHECK(status == table[row].status)) printf("  row %zu of the table gave %d\n", row, status);
        CHECK(program == NULL);
        CHECK(live_blocks == before);
    }
    mien_program *program = (mien_program *)&program;
    CHECK(mien_program_new(&program, LAYERS, NULL, SIZE_MAX, NULL, 0) == MIEN_ERR_MEMORY);
    CHECK(program == NULL);
}

static void one_place_has_one_width(void) {
    static const int32_t here[] = {2}, there[] = {3};
    mien_term narrow = term(1, 1, here, rows[0]), elsewhere = term(1, 1, there, rows[0]);
    narrow.width = elsewhere.width = EMBD - 1;
    mien_term other_op = norm_kept(narrow), other_site = narrow;
    other_site.site = MIEN_SITE_HEADS;
    const mien_term wide = term(1, 1, here, rows[1]);
    const struct {
        mien_term term;
        mien_status status;
    } table[] = {{narrow, MIEN_ERR_SHAPE}, {other_op, MIEN_ERR_SHAPE}, {elsewhere, MIEN_OK}, {other_site, MIEN_OK}};
    for (size_t i = 0; i < LENGTH(table); i++) {
        mien_program *program = NULL;
        CHECK(mien_program_new(&program, LAYERS, (mien_term[]){wide, table[i].term}, 2, NULL, 0) == table[i].status);
        mien_program_release(program);
    }
}

/* Readouts that open where the row's first float, less `offset`, is above `above`; at layers 1 and 4. */
static const int32_t gate_layers[] = {1, 4};
static float gate_rows[2 * EMBD];
static const double no_offsets[] = {0, 0};

static mien_gate gate_above(double above) {
    gate_rows[0] = gate_rows[EMBD] = 1.0f;
    return (mien_gate){{EMBD, 2, gate_layers, gate_rows, no_offsets}, above, INFINITY, 0, false};
}

static mien_term gated(mien_term of, int32_t gate) {
    of.gates[of.n_gates++] = gate;
    return of;
}

static void every_refusal_of_a_gate_has_its_status(void) {
    static const int32_t twice[] = {1, 1}, too_large[] = {1, LAYERS};
    static const double nan_offsets[] = {0, NAN};
    static float nan_rows[2 * EMBD];
    nan_rows[2 * EMBD - 1] = NAN;
    const mien_gate one = gate_above(0);
    mien_gate above = one, below = one, slack = one, no_slack = one, endless = one, flat = one, layer = one,
              layers = one, offset = one, row = one, narrow = one;
    above.above = NAN;
    below.below = NAN;
    slack.hysteresis = -1;
    no_slack.hysteresis = NAN;
    endless.hysteresis = INFINITY;
    flat.readout.width = 0;
    layer.readout.layers = twice;
    layers.readout.layers = too_large;
    offset.readout.offsets = nan_offsets;
    row.readout.rows = nan_rows;
    narrow.readout.width = EMBD - 1;
    const struct {
        mien_gate gate;
        mien_status status;
    } table[] = {
        {above, MIEN_ERR_NOT_FINITE},   {below, MIEN_ERR_NOT_FINITE},  {slack, MIEN_ERR_NOT_FINITE},
        {no_slack, MIEN_ERR_NOT_FINITE}, {endless, MIEN_ERR_NOT_FINITE}, {offset, MIEN_ERR_NOT_FINITE},
        {row, MIEN_ERR_NOT_FINITE},     {flat, MIEN_ERR_SHAPE},        {narrow, MIEN_ERR_SHAPE},
        {layer, MIEN_ERR_LAYER},        {layers, MIEN_ERR_LAYER},      {one, MIEN_OK},
    };
    for (size_t i = 0; i < LENGTH(table); i++) {
        const mien_term terms[] = {gated(term(1, 2, gate_layers, rows[0]), 1)};
        const mien_gate gates[] = {one, table[i].gate};
        const long before = live_blocks;
        mien_program *program = (mien_program *)&program;
        const mien_status status = mien_program_new(&program, LAYERS, terms, 1, gates, 2);
        if (!CHECK(status == table[i].status)) printf("  row %zu of the table gave %d\n", i, status);
        CHECK((program != NULL) == (status == MIEN_OK));
        mien_program_release(program);
        CHECK(live_blocks == before);
    }
}

static void a_place_has_room_for_so_many_gates(void) {
    enum { MANY = MIEN_PLACE_GATES + 1 };
    mien_gate gates[MANY];
    mien_term terms[MANY];
    for (int32_t i = 0; i < MANY; i++) {
        gates[i] = gate_above(i);
        terms[i] = gated(term(1, 2, gate_layers, rows[0]), i);
    }
    mien_program *program = NULL;
    CHECK(mien_program_new(&program, LAYERS, terms, MANY, gates, MANY) == MIEN_ERR_GATE && !program);
    CHECK(mien_program_new(&program, LAYERS, terms, MANY - 1, gates, MANY) == MIEN_OK);
    float row[EMBD] = {5.5f}, expected[EMBD] = {5.5f}; /* above 0 to 5 */
    for (int i = 0; i < 6; i++)
        for (size_t k = 0; k < EMBD; k++) expected[k] += rows[0][k];
    apply(program, MIEN_SITE_RESIDUAL, 1, row, 1, NULL);
    CHECK(same_bits(row, expected, EMBD));
    mien_program_release(program);
}

/* Of every operation and site, with windows and gates, some of which remember; at layers 1 and 4. */
enum { KINDS = 12 };
static float unit_rows[2 * EMBD], few_rows[2 * EMBD], aims[2 * EMBD];
static const double biases_of_two[] = {0.5, -0.5};

static void terms_of_every_kind(mien_term terms[KINDS], mien_gate gates[2]) {
    unit_rows[3] = unit_rows[EMBD + 3] = 1.0f;
    few_rows[2] = few_rows[EMBD + 5] = 0.5f;
    aims[3] = aims[EMBD + 3] = 2.0f;
    for (int i = 0; i < KINDS; i++) terms[i] = term(0.75, 2, gate_layers, rows[i % 4]);
    for (int i = 0; i < 3; i++) terms[i].op = (mien_op)i, terms[i].rows = unit_rows;
    terms[MIEN_OP_CLAMP].targets = aims;
    terms[MIEN_OP_EDIT].biases = biases_of_two;
    terms[MIEN_OP_EDIT].margin = 3;
    terms[3].op = MIEN_OP_SCALE;
    terms[4].window = (mien_window){1, 9, 2, 4};
    terms[5].op = MIEN_OP_ADD_KEEP_NORM;
    terms[6].op = MIEN_OP_FORBID, terms[7].op = MIEN_OP_FORCE;
    terms[6].site = terms[7].site = MIEN_SITE_EXPERTS;
    terms[6].rows = few_rows, terms[7].rows = unit_rows;
    terms[8].site = MIEN_SITE_NEURONS, terms[8].rows = few_rows; /* sparse */
    terms[9].site = MIEN_SITE_NEURONS, terms[9].op = MIEN_OP_SCALE, terms[9].rows = few_rows;
    terms[10] = gated(term(1, 2, gate_layers, rows[1]), 0);
    terms[11] = gated(gated(term(-1, 2, gate_layers, rows[2]), 1), 0);
    terms[11].site = MIEN_SITE_HEADS;
    gates[0] = gates[1] = gate_above(0);
    gates[0].latch = true;
    gates[1].hysteresis = 1;
}

static mien_program *of_every_kind(void) {
    mien_term terms[KINDS];
    mien_gate gates[2];
    terms_of_every_kind(terms, gates);
    mien_program *program = NULL;
    CHECK(mien_program_new(&program, LAYERS, terms, KINDS, gates, 2) == MIEN_OK);
    return program;
}

static void a_failing_allocation_is_reported_and_leaks_nothing(void) {
    mien_term terms[KINDS];
    mien_gate gates[2];
    terms_of_every_kind(terms, gates);
    const long before = live_blocks;
    mien_program *program = NULL;
    mien_status status = MIEN_ERR_MEMORY;
    long k = 0;
    for (; k < 100 && status != MIEN_OK; k++) {
        program = (mien_program *)&program;
        fail_after = k;
        status = mien_program_new(&program, LAYERS, terms, KINDS, gates, 2);
        fail_after = -1;
        if (status == MIEN_OK) break;
        CHECK(status == MIEN_ERR_MEMORY);
        CHECK(program == NULL);
        CHECK(live_blocks == before);
    }
    CHECK(k > 0 && status == MIEN_OK);
    CHECK(live_blocks == before + 1); /* a program is one block */
    mien_program_release(program);
    CHECK(live_blocks == before);
}

static void a_program_knows_its_places(void) {
    mien_program *program = of_every_kind(), *plain = compiled((mien_term[]){term(1, 2, gate_layers, rows[0])}, 1);
    static const bool has[MIEN_SITES] = {true, false, false, true, true, true};
    int32_t layers[LAYERS];
    for (int site = -1; site <= MIEN_SITES; site++) {
        const bool here = site >= 0 && site < MIEN_SITES && has[site];
        CHECK(mien_program_has(program, (mien_site)site) == here);
        CHECK(mien_program_has(plain, (mien_site)site) == (site == MIEN_SITE_RESIDUAL));
        CHECK(mien_program_layers(program, (mien_site)site, layers, LAYERS) == (here ? 2 : 0));
        if (here) CHECK(layers[0] == 1 && layers[1] == 4);
        for (int32_t layer = -1; layer <= LAYERS; layer++) {
            const bool acts = here && (layer == 1 || layer == 4);
            CHECK(mien_program_acts(program, (mien_site)site, layer) == acts);
            CHECK(mien_program_width(program, (mien_site)site, layer) == (acts ? EMBD : 0));
            const bool remembers = acts && (site == MIEN_SITE_RESIDUAL || site == MIEN_SITE_HEADS);
            CHECK(mien_program_ordered(program, (mien_site)site, layer) == remembers);
            CHECK(!mien_program_ordered(plain, (mien_site)site, layer));
        }
    }
    CHECK(mien_program_counts(program) && mien_program_remembers(program));
    CHECK(!mien_program_counts(plain) && !mien_program_remembers(plain));
    CHECK(!mien_program_counts(NULL) && !mien_program_remembers(NULL) && !mien_program_has(NULL, MIEN_SITE_RESIDUAL));
    CHECK(mien_program_fits(program, LAYERS) && !mien_program_fits(program, LAYERS + 1));
    CHECK(mien_program_fits(NULL, LAYERS + 1));
    mien_program_release(program);
    mien_program_release(plain);
}

/* With floats around the rows, which stay, and without memory for a copy of a row. */
static void no_operation_leaves_its_rows(void) {
    enum { N = 7 };
    mien_program *program = of_every_kind();
    mien_memory *memory = NULL, *other = NULL;
    CHECK(mien_memory_new(&memory, program) == MIEN_OK && mien_memory_reserve(memory, N) == MIEN_OK);
    CHECK(mien_memory_new(&other, program) == MIEN_OK && mien_memory_reserve(other, N) == MIEN_OK);
    float data[(N + 2) * EMBD], before[LENGTH(data)], again[LENGTH(data)];
    mien_token tokens[N], same[N];
    for (int32_t i = 0; i < N; i++) {
        tokens[i] = (mien_token){i - 1, memory};
        same[i] = (mien_token){i - 1, other};
    }
    for (int site = 0; site < MIEN_SITES; site++)
        for (int32_t layer = 0; layer < LAYERS; layer++) {
            fill_random(data, LENGTH(data));
            memcpy(before, data, sizeof data);
            memcpy(again, data, sizeof data);
            const mien_shift shift = apply(program, (mien_site)site, layer, data + EMBD, N, tokens);
            CHECK(same_bits(data, before, EMBD));
            CHECK(same_bits(data + (N + 1) * EMBD, before + (N + 1) * EMBD, EMBD));
            size_t moved = 0;
            for (size_t r = 1; r <= N; r++) moved += !same_bits(data + r * EMBD, before + r * EMBD, EMBD);
            CHECK(shift.rows == (int64_t)moved);
            if (site != MIEN_SITE_EXPERTS)
                CHECK(fabs(shift.squared - squared_shift(before, data, LENGTH(data))) <= 1e-5 * shift.squared);
            const mien_shift poor = mien_program_apply(program, (mien_site)site, layer, again + EMBD, N, same, NULL);
            CHECK(same_bits(again, data, LENGTH(data)));
            CHECK(poor.rows == shift.rows && (poor.squared > 0) == (shift.squared > 0));
            const mien_shift at = mien_program_apply_at(program, (mien_site)site, layer, (uintptr_t)(before + EMBD), N,
                                                        (uintptr_t)same);
            CHECK(same_bits(before, data, LENGTH(data)) && at.rows == shift.rows && at.squared == shift.squared);
        }
    mien_memory_release(memory);
    mien_memory_release(other);
    mien_program_release(program);
}

/* More directions than the row has floats, and zeros among them, as a basis may come. */
static void a_subspace_may_have_any_rank(void) {
    enum { WIDE = 5, RANK = 40 };
    static float basis[RANK * WIDE], target[WIDE] = {1, 2, 3, 0, 0};
    const int32_t layer[] = {2};
    memset(basis, 0, sizeof basis);
    for (size_t i = 0; i < 3; i++) basis[(i * 13 + 1) * WIDE + i] = 1.0f;
    for (int op = MIEN_OP_ABLATE; op <= MIEN_OP_CLAMP; op++)
        for (int32_t rank = 1; rank <= RANK; rank++) {
            mien_term one = term(1, 1, layer, basis);
            one.op = (mien_op)op;
            one.width = WIDE;
            one.rank = rank;
            one.targets = target;
            mien_program *program = compiled(&one, 1);
            const size_t held = rank > 27 ? 3 : rank > 14 ? 2 : rank > 1 ? 1 : 0;
            float row[] = {7, 7, 7, 7, 7};
            apply(program, MIEN_SITE_RESIDUAL, 2, row, 1, NULL);
            for (size_t i = 0; i < WIDE; i++)
                CHECK(row[i] == (i >= held ? 7.0f : op == MIEN_OP_CLAMP ? target[i] : 0.0f));
            mien_program_release(program);
        }
}

static void a_window_has_its_share_at_each_token(void) {
    const int32_t layer[] = {2};
    static float ones[EMBD];
    fill(ones, EMBD, 1.0f);
    static const struct {
        mien_window window;
        float shares[7]; /* of tokens -1 to 5 */
    } table[] = {
        {{0, INT32_MAX, 0, INFINITY}, {1, 1, 1, 1, 1, 1, 1}},
        {{2, INT32_MAX, 0, INFINITY}, {0, 0, 0, 1, 1, 1, 1}},
        {{0, 2, 0, INFINITY}, {0, 1, 1, 0, 0, 0, 0}},
        {{1, 3, 0, INFINITY}, {0, 0, 1, 1, 0, 0, 0}},
        {{0, INT32_MAX, 4, INFINITY}, {0, 0.25f, 0.5f, 0.75f, 1, 1, 1}},
        {{0, INT32_MAX, 0, 2}, {0, 1, 0.70710678f, 0.5f, 0.35355339f, 0.25f, 0.17677669f}},
        {{1, 5, 2, 1}, {0, 0, 0.5f, 0.5f, 0.25f, 0.125f, 0}},
        {{0, INT32_MAX, 0, 1e-300}, {0, 1, 0, 0, 0, 0, 0}},
    };
    for (size_t w = 0; w < LENGTH(table); w++) {
        mien_term one = term(1, 1, layer, ones);
        one.window = table[w].window;
        mien_program *program = compiled(&one, 1);
        for (int32_t i = 0; i < 7; i++) {
            float row[EMBD] = {0};
            const mien_token token = {i - 1, NULL};
            const mien_shift shift = apply(program, MIEN_SITE_RESIDUAL, 2, row, 1, &token);
            CHECK(all_are(row, EMBD, table[w].shares[i]));
            CHECK(shift.rows == (table[w].shares[i] != 0));
        }
        CHECK(!mien_program_direction(program, MIEN_SITE_RESIDUAL, 2, MIEN_OP_ADD) == (w > 0));
        CHECK(mien_program_counts(program) == (w > 0));
        mien_program_release(program);
    }
}

/* ---- what gates remember ------------------------------------------------------------------------ */

/* Whether each of n tokens, from number `from` of the reply, was acted on: their readouts are `values`. */
static unsigned opened(const mien_program *program, mien_memory *memory, int32_t from, const float *values, int32_t n) {
    unsigned found = 0;
    for (int32_t i = 0; i < n; i++) {
        float row[EMBD] = {values[i]};
        const mien_token token = {from + i, memory};
        found |= (unsigned)apply(program, MIEN_SITE_RESIDUAL, 1, row, 1, &token).rows << i;
    }
    return found;
}

static mien_program *latching(void) {
    mien_gate gate = gate_above(0.5);
    gate.latch = true;
    const mien_term one = gated(term(1, 2, gate_layers, rows[0]), 0);
    mien_program *program = NULL;
    CHECK(mien_program_new(&program, LAYERS, &one, 1, &gate, 1) == MIEN_OK);
    return program;
}

static void a_reply_taken_back_is_decided_as_if_it_had_not_gone_further(void) {
    mien_program *program = latching();
    mien_memory *memory = NULL;
    CHECK(mien_memory_new(&memory, program) == MIEN_OK && mien_memory_reserve(memory, 8) == MIEN_OK);
    static const float first[] = {0, 0, 0, 1, 0, 0, 0, 0}, second[] = {0, 0, 1, 0};
    CHECK(opened(program, memory, 0, first, 8) == 0xf8);
    CHECK(opened(program, memory, 2, second, 4) == 0xc); /* the 1 at token 3 is not said any more */
    CHECK(opened(program, memory, 6, first, 2) == 0x3);  /* but that at token 4 is */
    CHECK(opened(program, memory, 0, second, 4) == 0xc); /* another reply */
    CHECK(opened(program, memory, -1, &second[2], 1) == 1);
    CHECK(opened(program, memory, 0, first, 1) == 0); /* a prompt's token opens nothing for the reply */
    mien_memory_release(memory);
    mien_program_release(program);
}

static void a_memory_grows_and_keeps_what_it_holds(void) {
    mien_program *program = latching();
    mien_memory *memory = NULL;
    static const float one[] = {1}, none[200] = {0};
    CHECK(mien_memory_new(&memory, program) == MIEN_OK);
    CHECK(opened(program, memory, 0, one, 1) == 1); /* without room nothing is remembered */
    CHECK(opened(program, memory, 1, none, 1) == 0);
    CHECK(mien_memory_reserve(memory, 0) == MIEN_OK && mien_memory_reserve(memory, 1) == MIEN_OK);
    CHECK(opened(program, memory, 0, one, 1) == 1);
    for (int32_t reply = 1; reply < 1000; reply++) {
        CHECK(mien_memory_reserve(memory, reply + 1) == MIEN_OK);
        CHECK(opened(program, memory, reply, none, 1) == 1);
    }
    CHECK(mien_memory_reserve(memory, 3) == MIEN_OK); /* it never shrinks */
    CHECK(opened(program, memory, 999, none, 1) == 1);
    mien_memory_release(memory);
    mien_program_release(program);
}

static void a_memory_lives_as_long_as_it_is_held(void) {
    const long before = live_blocks;
    mien_program *program = latching(), *plain = compiled(NULL, 0);
    mien_memory *memory = (mien_memory *)&memory;
    fail_after = 0;
    CHECK(mien_memory_new(&memory, program) == MIEN_ERR_MEMORY);
    fail_after = -1;
    CHECK(memory == NULL);
    CHECK(mien_memory_new(&memory, program) == MIEN_OK);
    fail_after = 0;
    CHECK(mien_memory_reserve(memory, 9) == MIEN_ERR_MEMORY);
    fail_after = -1;
    static const float one[] = {1, 0};
    CHECK(opened(program, memory, 0, one, 2) == 1); /* still usable, and empty */
    CHECK(mien_memory_reserve(memory, 70) == MIEN_OK);
    CHECK(opened(program, memory, 0, one, 2) == 3);
    fail_after = 0;
    CHECK(mien_memory_reserve(memory, 5000) == MIEN_ERR_MEMORY);
    fail_after = -1;
    CHECK(opened(program, memory, 1, &one[1], 1) == 1); /* what it held is there */
    CHECK(mien_memory_retain(memory) == memory);
    mien_memory_release(memory);
    CHECK(opened(program, memory, 1, &one[1], 1) == 1);
    mien_memory_release(memory);
    /* Of a program that remembers nothing it takes no room, and of another one it is not written. */
    CHECK(mien_memory_new(&memory, plain) == MIEN_OK && mien_memory_reserve(memory, INT32_MAX) == MIEN_OK);
    CHECK(opened(program, memory, 0, one, 2) == 1);
    mien_memory_release(memory);
    CHECK(mien_memory_new(&memory, NULL) == MIEN_OK);
    mien_memory_release(memory);
    CHECK(mien_memory_retain(NULL) == NULL);
    mien_memory_release(NULL);
    mien_program_release(program);
    mien_program_release(plain);
    CHECK(live_blocks == before);
}

/* ---- probes ------------------------------------------------------------------------------------- */

enum { READOUTS = 37 };

/* Readout i is at layers 1 and 4, or at 4 alone, with offset i. */
static mien_probe *probe_of_many(void) {
    static float values[READOUTS][2 * EMBD];
    static double offsets[READOUTS][2];
    static const int32_t only_four[] = {4};
    mien_readout readouts[READOUTS];
    for (int i = 0; i < READOUTS; i++) {
        for (size_t k = 0; k < 2 * EMBD; k++) values[i][k] = rows[i % 4][(k + (size_t)i) % (LAYERS * EMBD)];
        offsets[i][0] = offsets[i][1] = i;
        readouts[i] = (mien_readout){EMBD, i % 3 ? 2 : 1, i % 3 ? gate_layers : only_four, values[i], offsets[i]};
    }
    mien_probe *probe = NULL;
    const long before = live_blocks;
    CHECK(mien_probe_new(&probe, LAYERS, readouts, READOUTS) == MIEN_OK);
    CHECK(live_blocks == before + 1);
    for (size_t i = 0; i < READOUTS; i++) fill(values[i], 2 * EMBD, NAN); /* nothing is kept of it */
    return probe;
}

static void a_probe_reads_every_vector_of_every_row(void) {
    enum { N = 3 };
    mien_probe *probe = probe_of_many();
    CHECK(mien_probe_layers(probe) == LAYERS && mien_probe_width(probe) == EMBD && mien_probe_count(probe) == READOUTS);
    float data[N * EMBD], out[N * READOUTS + 1], at[N * READOUTS + 1], v[EMBD];
    fill_random(data, LENGTH(data));
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        fill(out, LENGTH(out), -7.0f);
        memcpy(at, out, sizeof out);
        mien_probe_read(probe, layer, data, N, out);
        mien_probe_read_at(probe, layer, (uintptr_t)data, N, (uintptr_t)at);
        CHECK(!memcmp(at, out, sizeof out) && out[N * READOUTS] == -7.0f);
        for (size_t r = 0; r < N; r++)
            for (size_t i = 0; i < READOUTS; i++) {
                const float found = out[r * READOUTS + i];
                const bool there = layer == 4 || (layer == 1 && i % 3);
                const size_t from = layer == 4 && i % 3 ? EMBD : 0;
                for (size_t k = 0; k < EMBD; k++) v[k] = rows[i % 4][(from + k + i) % (LAYERS * EMBD)];
                CHECK(there ? found == (float)(mien_dot(data + r * EMBD, v, EMBD) - (double)i) : isnan(found));
            }
    }
    fill(out, LENGTH(out), -7.0f);
    mien_probe_read(probe, -1, data, N, out);
    mien_probe_read(probe, LAYERS, data, N, out);
    mien_probe_read(probe, 4, data, 0, out);
    CHECK(all_are(out, LENGTH(out), -7.0f));
    mien_probe_release(probe);
}

static void every_refusal_of_a_probe_has_its_status(void) {
    static const int32_t twice[] = {1, 1}, negative[] = {-1, 2};
    static float nan_rows[2 * EMBD];
    nan_rows[EMBD] = NAN;
    const mien_readout one = {EMBD, 2, gate_layers, rows[0], no_offsets};
    mien_readout flat = one, narrow = one, layer = one, low = one, row = one;
    flat.width = 0;
    narrow.width = EMBD - 1;
    layer.layers = twice;
    low.layers = negative;
    row.rows = nan_rows;
    const struct {
        int32_t n_layer;
        size_t n;
        mien_readout second;
        mien_status status;
    } table[] = {
        {0, 2, one, MIEN_ERR_SHAPE},        {LAYERS, 0, one, MIEN_ERR_SHAPE},  {LAYERS, 2, flat, MIEN_ERR_SHAPE},
        {LAYERS, 2, narrow, MIEN_ERR_SHAPE}, {LAYERS, 2, layer, MIEN_ERR_LAYER}, {LAYERS, 2, low, MIEN_ERR_LAYER},
        {4, 2, one, MIEN_ERR_LAYER},        {LAYERS, 2, row, MIEN_ERR_NOT_FINITE}, {LAYERS, 2, one, MIEN_OK},
    };
    for (size_t i = 0; i < LENGTH(table); i++) {
        const mien_readout readouts[] = {one, table[i].second};
        const long before = live_blocks;
        mien_probe *probe = (mien_probe *)&probe;
        CHECK(mien_probe_new(&probe, table[i].n_layer, readouts, table[i].n) == table[i].status);
        CHECK((probe != NULL) == (table[i].status == MIEN_OK));
        mien_probe_release(probe);
        CHECK(live_blocks == before);
    }
    mien_probe *probe = (mien_probe *)&probe;
    fail_after = 0;
    CHECK(mien_probe_new(&probe, LAYERS, &one, 1) == MIEN_ERR_MEMORY && !probe);
    fail_after = -1;
    CHECK(mien_probe_retain(NULL) == NULL);
    mien_probe_release(NULL);
}

static void terms_fold_into_one_direction_a_layer(void) {
    const int32_t at_a[] = {0, 2, 3}, at_b[] = {2, 5}, at_c[] = {2, 3};
    const double a = 0.7, b = -1.1, c = 0.3;
    const mien_term terms[] = {term(a, 3, at_a, rows[0]), term(b, 2, at_b, rows[1]), term(c, 2, at_c, rows[2])};
    const float *const r0 = rows[0], *const r1 = rows[1], *const r2 = rows[2];
    float expected[LAYERS][EMBD] = {{0}};
    for (size_t i = 0; i < EMBD; i++) {
        expected[0][i] = (float)(a * (double)r0[i]);
        expected[2][i] = (float)(a * (double)r0[EMBD + i] + b * (double)r1[i] + c * (double)r2[i]);
        expected[3][i] = (float)(a * (double)r0[2 * EMBD + i] + c * (double)r2[EMBD + i]);
        expected[5][i] = (float)(b * (double)r1[EMBD + i]);
    }
    mien_program *program = compiled(terms, 3);
    int32_t layers[LAYERS];
    CHECK(mien_program_layers(program, MIEN_SITE_RESIDUAL, layers, LAYERS) == 4);
    CHECK(layers[0] == 0 && layers[1] == 2 && layers[2] == 3 && layers[3] == 5);
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        float row[EMBD] = {0};
        apply(program, MIEN_SITE_RESIDUAL, layer, row, 1, NULL);
        CHECK(same_bits(row, expected[layer], EMBD));
        CHECK(mien_program_acts(program, MIEN_SITE_RESIDUAL, layer) == (layer != 1 && layer != 4));
    }
    mien_program_release(program);
}

static void terms_of_two_operations_do_not_fold_together(void) {
    const int32_t at_a[] = {0, 2, 3}, at_b[] = {2, 5}, at_c[] = {2, 3}, at_d[] = {0, 2};
    const double a = 0.7, b = -1.1, c = 0.3, d = 2.5;
    const mien_term terms[] = {norm_kept(term(b, 2, at_b, rows[1])), norm_kept(term(d, 2, at_d, rows[3])),
                               term(a, 3, at_a, rows[0]), term(c, 2, at_c, rows[2])};
    const float *const r0 = rows[0], *const r1 = rows[1], *const r2 = rows[2], *const r3 = rows[3];
    float expected[LAYERS][MIEN_OPS][EMBD];
    memset(expected, 0, sizeof expected);
    for (size_t i = 0; i < EMBD; i++) {
        expected[0][MIEN_OP_ADD][i] = (float)(a * (double)r0[i]);
        expected[0][MIEN_OP_ADD_KEEP_NORM][i] = (float)(d * (double)r3[i]);
        expected[2][MIEN_OP_ADD][i] = (float)(a * (double)r0[EMBD + i] + c * (double)r2[i]);
        expected[2][MIEN_OP_ADD_KEEP_NORM][i] = (float)(b * (double)r1[i] + d * (double)r3[EMBD + i]);
        expected[3][MIEN_OP_ADD][i] = (float)(a * (double)r0[2 * EMBD + i] + c * (double)r2[EMBD + i]);
        expected[5][MIEN_OP_ADD_KEEP_NORM][i] = (float)(b * (double)r1[EMBD + i]);
    }
    bool has[LAYERS][MIEN_OPS] = {{0}};
    has[0][MIEN_OP_ADD] = has[2][MIEN_OP_ADD] = has[3][MIEN_OP_ADD] = true;
    has[0][MIEN_OP_ADD_KEEP_NORM] = has[2][MIEN_OP_ADD_KEEP_NORM] = has[5][MIEN_OP_ADD_KEEP_NORM] = true;
    mien_program *program = compiled(terms, LENGTH(terms));
    int32_t layers[LAYERS];
    CHECK(mien_program_layers(program, MIEN_SITE_RESIDUAL, layers, LAYERS) == 4);
    CHECK(layers[0] == 0 && layers[1] == 2 && layers[2] == 3 && layers[3] == 5);
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        float row[EMBD], by_hand[EMBD];
        fill_random(row, EMBD);
        memcpy(by_hand, row, sizeof row);
        for (int op = 0; op < MIEN_OPS; op++) {
            const float *direction = mien_program_direction(program, MIEN_SITE_RESIDUAL, layer, (mien_op)op);
            CHECK((direction != NULL) == has[layer][op]);
            if (direction) CHECK(same_bits(direction, expected[layer][op], EMBD));
        }
        if (has[layer][MIEN_OP_ADD]) mien_add(by_hand, expected[layer][MIEN_OP_ADD], EMBD);
        if (has[layer][MIEN_OP_ADD_KEEP_NORM])
            mien_add_keep_norm(by_hand, expected[layer][MIEN_OP_ADD_KEEP_NORM], EMBD);
        const double moved = squared_shift(row, by_hand, EMBD);
        CHECK(about(apply(program, MIEN_SITE_RESIDUAL, layer, row, 1, NULL).squared, moved));
        CHECK(same_bits(row, by_hand, EMBD));
        CHECK(mien_program_acts(program, MIEN_SITE_RESIDUAL, layer) == (layer != 1 && layer != 4));
    }
    mien_program_release(program);
}

/* Terms that are not neighbours act one after another, which is the same but for rounding. */
static void terms_that_stand_apart_act_one_after_another(void) {
    const int32_t layer[] = {4};
    const mien_term terms[] = {term(1, 1, layer, rows[0]), norm_kept(term(1, 1, layer, rows[1])),
                               term(1, 1, layer, rows[2])};
    mien_program *program = compiled(terms, 3);
    float row[EMBD], by_hand[EMBD];
    fill_random(row, EMBD);
    memcpy(by_hand, row, sizeof row);
    mien_add(by_hand, rows[0], EMBD);
    mien_add(by_hand, rows[2], EMBD);
    mien_add_keep_norm(by_hand, rows[1], EMBD);
    const double moved = squared_shift(row, by_hand, EMBD);
    CHECK(about(apply(program, MIEN_SITE_RESIDUAL, 4, row, 1, NULL).squared, moved));
    CHECK(same_bits(row, by_hand, EMBD));
    mien_program_release(program);
}

static void an_add_acts_first_whatever_the_order_of_the_terms(void) {
    const int32_t layers[] = {4};
    static float east[EMBD], north[EMBD];
    east[0] = 4.0f;
    north[1] = 4.0f;
    const mien_term one_way[] = {term(1, 1, layers, east), norm_kept(term(1, 1, layers, north))};
    const mien_term other_way[] = {one_way[1], one_way[0]};
    const mien_term *const ways[] = {one_way, other_way};
    for (size_t way = 0; way < LENGTH(ways); way++) {
        mien_program *program = compiled(ways[way], 2);
        enum { N = 3 };
        float data[N * EMBD] = {0};
        for (size_t r = 0; r < N; r++) data[r * EMBD + 1] = 3.0f;
        apply(program, MIEN_SITE_RESIDUAL, 4, data, N, NULL);
        for (size_t r = 0; r < N; r++) { /* (0, 3), (4, 3) of length 5, (4, 7) as long as that */
            CHECK(fabs(data[r * EMBD] - 4 * 5 / sqrt(65)) < 1e-6);
            CHECK(fabs(data[r * EMBD + 1] - 7 * 5 / sqrt(65)) < 1e-6);
            CHECK(all_are(data + r * EMBD + 2, EMBD - 2, 0.0f));
        }
        mien_program_release(program);
    }
}

static void a_direction_is_had_only_where_there_is_one(void) {
    const int32_t layers[] = {1, 4}, only_four[] = {4};
    const mien_term terms[] = {term(1, 2, layers, rows[0]), norm_kept(term(1, 1, only_four, rows[1])),
                               norm_kept(term(-1, 1, only_four, rows[1]))};
    const mien_term alone[] = {norm_kept(term(1, 2, layers, rows[0]))};
    mien_program *program = compiled(terms, 3), *kept = compiled(alone, 1);
    for (int32_t r = 0; r < 2; r++) {
        const float *added = mien_program_direction(program, MIEN_SITE_RESIDUAL, layers[r], MIEN_OP_ADD);
        const float *norm_kept_one = mien_program_direction(kept, MIEN_SITE_RESIDUAL, layers[r], MIEN_OP_ADD_KEEP_NORM);
        CHECK(added && same_bits(added, rows[0] + r * EMBD, EMBD));
        CHECK(norm_kept_one && same_bits(norm_kept_one, rows[0] + r * EMBD, EMBD));
        CHECK(!mien_program_direction(program, MIEN_SITE_RESIDUAL, layers[r], MIEN_OP_ADD_KEEP_NORM));
        CHECK(!mien_program_direction(kept, MIEN_SITE_RESIDUAL, layers[r], MIEN_OP_ADD));
        CHECK(!mien_program_direction(program, MIEN_SITE_RESIDUAL, layers[r], (mien_op)MIEN_OPS));
        CHECK(!mien_program_direction(program, (mien_site)MIEN_SITES, layers[r], MIEN_OP_ADD));
        CHECK(!mien_program_direction(NULL, MIEN_SITE_RESIDUAL, layers[r], MIEN_OP_ADD));
    }
    static const int32_t elsewhere[] = {0, 2, 3, 5, -1, LAYERS, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < LENGTH(elsewhere); i++)
        for (int op = 0; op < MIEN_OPS; op++)
            CHECK(!mien_program_direction(program, MIEN_SITE_RESIDUAL, elsewhere[i], (mien_op)op));
    mien_program_release(program);
    mien_program_release(kept);
}

static void a_zero_direction_is_no_operation(void) {
    const int32_t layers[] = {1, 2}, only_two[] = {2};
    static float tiny[2 * EMBD];
    fill(tiny, 2 * EMBD, FLT_TRUE_MIN);
    const struct {
        mien_term terms[2];
        int32_t acting;
    } table[] = {
        {{term(1, 2, layers, rows[0]), term(-1, 2, layers, rows[0])}, 0},
        {{term(0, 2, layers, rows[0]), term(-0.0, 2, layers, rows[1])}, 0},
        {{term(0.25, 2, layers, tiny), term(0, 0, NULL, NULL)}, 0}, /* rounds to zero */
        {{term(1, 2, layers, rows[0]), term(-1, 1, only_two, rows[0] + EMBD)}, 1},
        {{norm_kept(term(1, 2, layers, rows[0])), norm_kept(term(-1, 2, layers, rows[0]))}, 0},
        {{norm_kept(term(0, 2, layers, rows[0])), term(0, 2, layers, rows[0])}, 0},
        {{norm_kept(term(0.25, 2, layers, tiny)), term(0, 0, NULL, NULL)}, 0},
        {{term(1, 1, layers, rows[0]), norm_kept(term(0, 2, layers, rows[0]))}, 1},
        {{norm_kept(term(1, 1, layers, rows[0])), term(0, 2, layers, rows[0])}, 1},
    };
    for (size_t i = 0; i < LENGTH(table); i++) {
        mien_program *program = compiled(table[i].terms, 2);
        int32_t found[LAYERS];
        CHECK(mien_program_layers(program, MIEN_SITE_RESIDUAL, found, LAYERS) == table[i].acting);
        CHECK(mien_program_acts(program, MIEN_SITE_RESIDUAL, 1) == (table[i].acting == 1));
        CHECK(!mien_program_acts(program, MIEN_SITE_RESIDUAL, 2));
        float row[EMBD];
        fill(row, EMBD, -0.0f); /* adding any zero would change its sign */
        CHECK(apply(program, MIEN_SITE_RESIDUAL, 2, row, 1, NULL).squared == 0.0);
        CHECK(signbit(row[0]) && signbit(row[EMBD - 1]));
        mien_program_release(program);
    }
    mien_program *program = compiled(NULL, 0);
    CHECK(mien_program_layers(program, MIEN_SITE_RESIDUAL, NULL, LAYERS) == 0);
    mien_program_release(program);
}

static void apply_changes_its_rows_and_nothing_around_them(void) {
    const int32_t layers[] = {1, 4};
    const mien_term terms[] = {term(1, 2, layers, rows[0])};
    mien_program *program = compiled(terms, 1);
    enum { N = 5 };
    float data[(N + 2) * EMBD], expected[(N + 2) * EMBD];
    for (size_t n = 0; n <= N; n++) {
        fill_random(data, LENGTH(data));
        memcpy(expected, data, sizeof data);
        double moved = 0;
        for (size_t i = EMBD; i < (n + 1) * EMBD; i++) {
            expected[i] += rows[0][EMBD + i % EMBD];
            moved += ((double)expected[i] - (double)data[i]) * ((double)expected[i] - (double)data[i]);
        }
        CHECK(about(apply(program, MIEN_SITE_RESIDUAL, 4, data + EMBD, n, NULL).squared, moved));
        CHECK(same_bits(data, expected, LENGTH(data)));
    }
    static const int32_t elsewhere[] = {0, 2, 5, -1, LAYERS, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < LENGTH(elsewhere); i++) {
        CHECK(apply(program, MIEN_SITE_RESIDUAL, elsewhere[i], data + EMBD, N, NULL).squared == 0.0);
        CHECK(!mien_program_acts(program, MIEN_SITE_RESIDUAL, elsewhere[i]));
    }
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        CHECK(apply(program, (mien_site)MIEN_SITES, layer, data + EMBD, N, NULL).squared == 0.0);
        CHECK(!mien_program_acts(program, (mien_site)MIEN_SITES, layer));
    }
    CHECK(same_bits(data, expected, LENGTH(data)));
    mien_program_release(program);
}

static void apply_keeps_the_norm_of_each_row_on_its_own(void) {
    const int32_t layers[] = {4};
    const mien_term terms[] = {norm_kept(term(1, 1, layers, rows[0]))};
    mien_program *program = compiled(terms, 1);
    enum { N = 4 };
    static const float sizes[N] = {1.0f, 0.0f, 1e6f, 1e-6f};
    float data[(N + 2) * EMBD], expected[(N + 2) * EMBD];
    fill_random(data, LENGTH(data));
    for (size_t i = 0; i < N * EMBD; i++) data[EMBD + i] *= sizes[i / EMBD];
    memcpy(expected, data, sizeof data);
    double moved = 0;
    for (size_t r = 1; r <= N; r++) moved += mien_add_keep_norm(expected + r * EMBD, rows[0], EMBD);
    CHECK(about(apply(program, MIEN_SITE_RESIDUAL, 4, data + EMBD, N, NULL).squared, moved));
    CHECK(same_bits(data, expected, LENGTH(data)));
    mien_program_release(program);
}

static void a_program_keeps_no_pointer_to_its_terms(void) {
    int32_t layers[] = {3};
    float row[EMBD], values[EMBD], out[EMBD] = {0};
    fill_random(values, EMBD);
    memcpy(row, values, sizeof row);
    mien_term terms[] = {term(1, 1, layers, values)};
    mien_program *program = compiled(terms, 1);
    fill(values, EMBD, NAN);
    layers[0] = 0;
    terms[0].n_rows = 0;
    apply(program, MIEN_SITE_RESIDUAL, 3, out, 1, NULL);
    CHECK(same_bits(out, row, EMBD));
    mien_program_release(program);
}

static void no_program_does_nothing(void) {
    int32_t layers[LAYERS] = {-5};
    float row[EMBD];
    fill(row, EMBD, 3.0f);
    CHECK(mien_program_retain(NULL) == NULL);
    mien_program_release(NULL);
    CHECK(mien_program_layers(NULL, MIEN_SITE_RESIDUAL, layers, LAYERS) == 0 && layers[0] == -5);
    CHECK(!mien_program_acts(NULL, MIEN_SITE_RESIDUAL, 1));
    CHECK(apply(NULL, MIEN_SITE_RESIDUAL, 1, row, 1, NULL).squared == 0.0);
    CHECK(all_are(row, EMBD, 3.0f));
}

/* ---- threads ------------------------------------------------------------------------------------ */

enum { THREADS = 4, ROUNDS = 50000 };

static void *retain_apply_release(void *argument) {
    mien_program *shared = argument;
    long wrong = 0;
    for (int i = 0; i < ROUNDS; i++) {
        float row[EMBD] = {0};
        mien_program *mine = mien_program_retain(shared);
        apply(mine, MIEN_SITE_RESIDUAL, 1, row, 1, NULL);
        wrong += !same_bits(row, rows[0], EMBD);
        mien_program_release(mine);
    }
    CHECK(wrong == 0);
    mien_program_release(shared); /* the reference that this thread was given */
    return NULL;
}

static void the_last_of_many_threads_frees_the_program(void) {
    const long before = live_blocks;
    const int32_t layers[] = {1};
    const mien_term terms[] = {term(1, 1, layers, rows[0])};
    mien_program *program = compiled(terms, 1);
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        mien_program_retain(program);
        CHECK(!pthread_create(&threads[i], NULL, retain_apply_release, program));
    }
    mien_program_release(program);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    CHECK(live_blocks == before);
}

/* A program that is swapped for another while threads apply whichever is the one now, each with memories of
 * its own sequence, as a hook does. */
typedef struct {
    pthread_mutex_t lock;
    mien_program *now;
    mien_probe *probe;
    atomic_bool done;
} shared;

static void *apply_what_is_now(void *argument) {
    enum { N = 9 };
    shared *all = argument;
    long wrong = 0;
    while (!all->done) {
        pthread_mutex_lock(&all->lock);
        mien_program *mine = mien_program_retain(all->now);
        mien_probe *probe = mien_probe_retain(all->probe);
        pthread_mutex_unlock(&all->lock);
        mien_memory *memory = NULL;
        wrong += mien_memory_new(&memory, mine) != MIEN_OK || mien_memory_reserve(memory, N) != MIEN_OK;
        float data[2][N * EMBD], out[N * READOUTS];
        mien_token tokens[N];
        for (int32_t i = 0; i < N; i++) tokens[i] = (mien_token){i, memory};
        for (int k = 0; k < 2; k++) { /* all at once, and one by one: a new reply each */
            for (size_t i = 0; i < N * EMBD; i++) data[k][i] = (float)(i * 7 % 11) - 5;
            for (size_t i = 0; i < (k ? N : 1); i++)
                apply(mine, MIEN_SITE_RESIDUAL, 1, data[k] + i * EMBD, k ? 1 : N, tokens + i);
        }
        wrong += !same_bits(data[0], data[1], N * EMBD);
        mien_probe_read(probe, 1, data[0], N, out);
        mien_memory_release(memory);
        mien_program_release(mine);
        mien_probe_release(probe);
    }
    CHECK(wrong == 0);
    return NULL;
}

static void programs_are_swapped_while_others_apply_them(void) {
    const long before = live_blocks;
    shared all = {.now = of_every_kind(), .probe = probe_of_many(), .done = false};
    pthread_mutex_init(&all.lock, NULL);
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) CHECK(!pthread_create(&threads[i], NULL, apply_what_is_now, &all));
    for (int i = 0; i < 300; i++) {
        mien_program *next = i % 3 ? of_every_kind() : latching();
        pthread_mutex_lock(&all.lock);
        mien_program *old = all.now;
        all.now = next;
        pthread_mutex_unlock(&all.lock);
        mien_program_release(old); /* while it may be applied */
    }
    all.done = true;
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    mien_program_release(all.now);
    mien_probe_release(all.probe);
    pthread_mutex_destroy(&all.lock);
    CHECK(live_blocks == before);
}

int main(void) {
    for (size_t i = 0; i < LENGTH(rows); i++) fill_random(rows[i], LENGTH(rows[i]));
    add_is_the_plain_loop_at_every_length_and_alignment();
    add_returns_the_exact_squared_shift();
    add_reports_no_shift_where_rounding_absorbs_the_vector();
    add_does_not_overflow_in_its_sum_of_squares();
    add_keep_norm_is_the_plain_loop_at_every_length_and_alignment();
    long_rows_are_the_plain_loop_over_every_block();
    add_then_keep_norm_is_one_after_the_other();
    add_then_keep_norm_leaves_nothing_where_nothing_is_left();
    add_keep_norm_minds_every_position();
    add_keep_norm_leaves_nothing_where_nothing_is_left();
    add_keep_norm_keeps_an_empty_row_empty();
    add_keep_norm_reports_no_shift_where_rounding_absorbs_the_vector();
    add_keep_norm_neither_overflows_nor_underflows();
    sum_may_write_over_either_side();
    combine_is_the_long_hand_sum_in_double();
    combine_adds_in_order_and_rounds_once();
    finite_is_told_at_every_position();
    huge_and_denormal_values_are_finite();
    every_refusal_has_its_status();
    one_place_has_one_width();
    every_refusal_of_a_gate_has_its_status();
    a_place_has_room_for_so_many_gates();
    a_program_knows_its_places();
    no_operation_leaves_its_rows();
    a_subspace_may_have_any_rank();
    a_window_has_its_share_at_each_token();
    a_reply_taken_back_is_decided_as_if_it_had_not_gone_further();
    a_memory_grows_and_keeps_what_it_holds();
    a_memory_lives_as_long_as_it_is_held();
    a_probe_reads_every_vector_of_every_row();
    every_refusal_of_a_probe_has_its_status();
    a_failing_allocation_is_reported_and_leaks_nothing();
    terms_fold_into_one_direction_a_layer();
    terms_of_two_operations_do_not_fold_together();
    terms_that_stand_apart_act_one_after_another();
    an_add_acts_first_whatever_the_order_of_the_terms();
    a_direction_is_had_only_where_there_is_one();
    a_zero_direction_is_no_operation();
    apply_changes_its_rows_and_nothing_around_them();
    apply_keeps_the_norm_of_each_row_on_its_own();
    a_program_keeps_no_pointer_to_its_terms();
    no_program_does_nothing();
    the_last_of_many_threads_frees_the_program();
    programs_are_swapped_while_others_apply_them();
    return verdict();
}
