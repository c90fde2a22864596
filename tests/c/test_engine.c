/* The kernels and the program, without a hook: every claim of their headers, and every status. */
#include "testing.h"

#include <float.h>
#include <math.h>
#include <pthread.h>

#include "mien_kernels.h"
#include "mien_program.h"

enum { GUARDS = 8, ROOM = 70, LAYERS = 6, EMBD = 21 };

#define LENGTH(array) (sizeof(array) / sizeof *(array))

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
    return (mien_term){MIEN_OP_ADD, MIEN_SITE_RESIDUAL, coefficient, n_rows, layers, values};
}

static mien_term norm_kept(mien_term kept) {
    kept.op = MIEN_OP_ADD_KEEP_NORM;
    return kept;
}

static mien_program *compiled(const mien_term *terms, size_t n_terms) {
    mien_program *program = NULL;
    CHECK(mien_program_new(&program, LAYERS, EMBD, terms, n_terms) == MIEN_OK);
    return program;
}

static void every_refusal_has_its_status(void) {
    static const int32_t good[] = {1, 2, 5}, negative[] = {-1, 2}, too_large[] = {1, LAYERS}, twice[] = {1, 2, 2},
                         falling[] = {1, 3, 2};
    static float nan_row[EMBD], infinite_row[EMBD], huge_row[EMBD];
    nan_row[EMBD - 1] = NAN;
    infinite_row[0] = INFINITY;
    fill(huge_row, EMBD, FLT_MAX);
    mien_term unknown_op = term(1, 3, good, rows[0]), unknown_site = unknown_op, negative_op = unknown_op;
    unknown_op.op = (mien_op)MIEN_OPS;
    negative_op.op = (mien_op)-1;
    unknown_site.site = (mien_site)MIEN_SITES;
    const struct {
        int32_t n_layer, n_embd;
        mien_term term;
        mien_status status;
    } table[] = {
        {0, EMBD, term(1, 3, good, rows[0]), MIEN_ERR_SHAPE},
        {-1, EMBD, term(1, 3, good, rows[0]), MIEN_ERR_SHAPE},
        {LAYERS, 0, term(1, 3, good, rows[0]), MIEN_ERR_SHAPE},
        {LAYERS, INT32_MIN, term(1, 3, good, rows[0]), MIEN_ERR_SHAPE},
        {LAYERS, EMBD, unknown_op, MIEN_ERR_OP},
        {LAYERS, EMBD, negative_op, MIEN_ERR_OP},
        {LAYERS, EMBD, unknown_site, MIEN_ERR_SITE},
        {LAYERS, EMBD, term(1, 2, negative, rows[0]), MIEN_ERR_LAYER},
        {LAYERS, EMBD, term(1, 2, too_large, rows[0]), MIEN_ERR_LAYER},
        {LAYERS, EMBD, term(1, 3, twice, rows[0]), MIEN_ERR_LAYER},
        {LAYERS, EMBD, term(1, 3, falling, rows[0]), MIEN_ERR_LAYER},
        {LAYERS, EMBD, term(NAN, 3, good, rows[0]), MIEN_ERR_NOT_FINITE},
        {LAYERS, EMBD, term(INFINITY, 3, good, rows[0]), MIEN_ERR_NOT_FINITE},
        {LAYERS, EMBD, term(-INFINITY, 0, good, rows[0]), MIEN_ERR_NOT_FINITE},
        {LAYERS, EMBD, term(1, 1, good, nan_row), MIEN_ERR_NOT_FINITE},
        {LAYERS, EMBD, term(0, 1, good, infinite_row), MIEN_ERR_NOT_FINITE},
        {LAYERS, EMBD, term(1.001, 1, good, huge_row), MIEN_ERR_NOT_FINITE}, /* overflows float */
        {LAYERS, EMBD, term(DBL_MAX, 1, good, huge_row), MIEN_ERR_NOT_FINITE}, /* and double */
    };
    for (size_t i = 0; i < 2 * LENGTH(table); i++) {
        /* behind a good term, so that the check of each term is what refuses; of both operations */
        const size_t row = i / 2;
        const bool known = table[row].status != MIEN_ERR_OP;
        const mien_term refused = i % 2 && known ? norm_kept(table[row].term) : table[row].term;
        const mien_term terms[] = {term(0.5, 3, good, rows[1]), refused};
        const long before = live_blocks;
        mien_program *program = (mien_program *)&program;
        const mien_status status = mien_program_new(&program, table[row].n_layer, table[row].n_embd, terms, 2);
        if (!CHECK(status == table[row].status)) printf("  row %zu of the table gave %d\n", row, status);
        CHECK(program == NULL);
        CHECK(live_blocks == before);
    }
    mien_program *program = (mien_program *)&program;
    CHECK(mien_program_new(&program, LAYERS, EMBD, NULL, SIZE_MAX) == MIEN_ERR_MEMORY);
    CHECK(program == NULL);
}

static void a_failing_allocation_is_reported_and_leaks_nothing(void) {
    const int32_t layers[] = {1, 4};
    const mien_term terms[] = {term(1, 2, layers, rows[0]), norm_kept(term(0.5, 2, layers, rows[1]))};
    const long before = live_blocks;
    mien_program *program = NULL;
    mien_status status = MIEN_ERR_MEMORY;
    long k = 0;
    for (; k < 100 && status != MIEN_OK; k++) {
        program = (mien_program *)&program;
        fail_after = k;
        status = mien_program_new(&program, LAYERS, EMBD, terms, 2);
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
    CHECK(mien_program_layers(program, MIEN_SITE_RESIDUAL, layers) == 4);
    CHECK(layers[0] == 0 && layers[1] == 2 && layers[2] == 3 && layers[3] == 5);
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        float row[EMBD] = {0};
        mien_program_apply(program, MIEN_SITE_RESIDUAL, layer, row, 1);
        CHECK(same_bits(row, expected[layer], EMBD));
        CHECK(mien_program_acts(program, MIEN_SITE_RESIDUAL, layer) == (layer != 1 && layer != 4));
    }
    mien_program_release(program);
}

static void terms_of_two_operations_do_not_fold_together(void) {
    const int32_t at_a[] = {0, 2, 3}, at_b[] = {2, 5}, at_c[] = {2, 3}, at_d[] = {0, 2};
    const double a = 0.7, b = -1.1, c = 0.3, d = 2.5;
    const mien_term terms[] = {norm_kept(term(b, 2, at_b, rows[1])), term(a, 3, at_a, rows[0]),
                               norm_kept(term(d, 2, at_d, rows[3])), term(c, 2, at_c, rows[2])};
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
    static const bool has[LAYERS][MIEN_OPS] = {{true, true}, {0}, {true, true}, {true, false}, {0}, {false, true}};
    mien_program *program = compiled(terms, LENGTH(terms));
    int32_t layers[LAYERS];
    CHECK(mien_program_layers(program, MIEN_SITE_RESIDUAL, layers) == 4);
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
        CHECK(about(mien_program_apply(program, MIEN_SITE_RESIDUAL, layer, row, 1), moved));
        CHECK(same_bits(row, by_hand, EMBD));
        CHECK(mien_program_acts(program, MIEN_SITE_RESIDUAL, layer) == (layer != 1 && layer != 4));
    }
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
        mien_program_apply(program, MIEN_SITE_RESIDUAL, 4, data, N);
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
        CHECK(mien_program_layers(program, MIEN_SITE_RESIDUAL, found) == table[i].acting);
        CHECK(mien_program_acts(program, MIEN_SITE_RESIDUAL, 1) == (table[i].acting == 1));
        CHECK(!mien_program_acts(program, MIEN_SITE_RESIDUAL, 2));
        float row[EMBD];
        fill(row, EMBD, -0.0f); /* adding any zero would change its sign */
        CHECK(mien_program_apply(program, MIEN_SITE_RESIDUAL, 2, row, 1) == 0.0);
        CHECK(signbit(row[0]) && signbit(row[EMBD - 1]));
        mien_program_release(program);
    }
    mien_program *program = compiled(NULL, 0);
    CHECK(mien_program_layers(program, MIEN_SITE_RESIDUAL, NULL) == 0);
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
        CHECK(about(mien_program_apply(program, MIEN_SITE_RESIDUAL, 4, data + EMBD, n), moved));
        CHECK(same_bits(data, expected, LENGTH(data)));
    }
    static const int32_t elsewhere[] = {0, 2, 5, -1, LAYERS, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < LENGTH(elsewhere); i++) {
        CHECK(mien_program_apply(program, MIEN_SITE_RESIDUAL, elsewhere[i], data + EMBD, N) == 0.0);
        CHECK(!mien_program_acts(program, MIEN_SITE_RESIDUAL, elsewhere[i]));
    }
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        CHECK(mien_program_apply(program, (mien_site)MIEN_SITES, layer, data + EMBD, N) == 0.0);
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
    CHECK(about(mien_program_apply(program, MIEN_SITE_RESIDUAL, 4, data + EMBD, N), moved));
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
    mien_program_apply(program, MIEN_SITE_RESIDUAL, 3, out, 1);
    CHECK(same_bits(out, row, EMBD));
    mien_program_release(program);
}

static void no_program_does_nothing(void) {
    int32_t layers[LAYERS] = {-5};
    float row[EMBD];
    fill(row, EMBD, 3.0f);
    CHECK(mien_program_retain(NULL) == NULL);
    mien_program_release(NULL);
    CHECK(mien_program_layers(NULL, MIEN_SITE_RESIDUAL, layers) == 0 && layers[0] == -5);
    CHECK(!mien_program_acts(NULL, MIEN_SITE_RESIDUAL, 1));
    CHECK(mien_program_apply(NULL, MIEN_SITE_RESIDUAL, 1, row, 1) == 0.0);
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
        mien_program_apply(mine, MIEN_SITE_RESIDUAL, 1, row, 1);
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
    a_failing_allocation_is_reported_and_leaks_nothing();
    terms_fold_into_one_direction_a_layer();
    terms_of_two_operations_do_not_fold_together();
    an_add_acts_first_whatever_the_order_of_the_terms();
    a_direction_is_had_only_where_there_is_one();
    a_zero_direction_is_no_operation();
    apply_changes_its_rows_and_nothing_around_them();
    apply_keeps_the_norm_of_each_row_on_its_own();
    a_program_keeps_no_pointer_to_its_terms();
    no_program_does_nothing();
    the_last_of_many_threads_frees_the_program();
    return verdict();
}
