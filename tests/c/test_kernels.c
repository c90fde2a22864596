/* The kernels of the operators beyond add: each beside a plain loop in double, and bit for bit where their
 * header says so. mien_add, mien_add_keep_norm, mien_sum and mien_combine are in test_engine.c. */
#include "testing.h"

#include <float.h>
#include <math.h>

#include "mien_kernels.h"

enum { GUARDS = 8, ROOM = 70, LONG = 2500, RANK = 300 };

#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* Around the vectors of 8 and the blocks of 1024 floats. */
static const size_t sizes[] = {1, 2, 7, 8, 31, 32, 33, 64, 70, 576, 1023, 1024, 1025, 1057, 2048, 2080, LONG};
static const float doses[] = {1.0f, 0.7f, -1.3f, 0.0f, 1e-3f, 40.0f};

/* ---- what is compared --------------------------------------------------------------------------- */

static double plain_dot(const float *x, const float *v, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)v[i];
    return sum;
}

static double sizes_dot(const float *x, const float *v, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += fabs((double)x[i] * (double)v[i]);
    return sum;
}

static double norm(const float *x, size_t n) { return sqrt(plain_dot(x, x, n)); }

static double squared_shift(const float *before, const float *after, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += ((double)after[i] - (double)before[i]) * ((double)after[i] - (double)before[i]);
    return sum;
}

/* Every float within `tolerance` of what it should be, and of the denormals around it. */
static bool close_to(const float *x, const double *expected, size_t n, double tolerance) {
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)x[i] - expected[i]) <= tolerance + (double)FLT_TRUE_MIN)) return false;
    return true;
}

static bool same_value(double a, double b) { return !memcmp(&a, &b, sizeof a); }

static void fill_scaled(float *x, size_t n, float size) {
    fill_random(x, n);
    for (size_t i = 0; i < n; i++) x[i] *= size;
}

/* k orthonormal rows of n floats, `stride` apart. */
static void make_basis(float *basis, size_t stride, size_t k, size_t n) {
    static double rows[RANK][RANK];
    for (size_t j = 0; j < k; j++) {
        double *row = rows[j], length = 0;
        for (size_t i = 0; i < n; i++) row[i] = random_float();
        for (size_t twice = 0; twice < 2; twice++)
            for (size_t other = 0; other < j; other++) {
                double dot = 0;
                for (size_t i = 0; i < n; i++) dot += row[i] * rows[other][i];
                for (size_t i = 0; i < n; i++) row[i] -= dot * rows[other][i];
            }
        for (size_t i = 0; i < n; i++) length += row[i] * row[i];
        for (size_t i = 0; i < n; i++) row[i] /= sqrt(length);
        for (size_t i = 0; i < n; i++) basis[j * stride + i] = (float)row[i];
    }
}

/* ---- add and scale ------------------------------------------------------------------------------ */

static void scaled_adds_are_those_of_the_rounded_products(void) {
    static float x[LONG + GUARDS], before[LONG + GUARDS], expected[LONG + GUARDS], v[LONG + GUARDS], cv[LONG];
    for (size_t s = 0; s < LENGTH(sizes); s++)
        for (size_t d = 0; d < LENGTH(doses); d++)
            for (size_t shift = 0; shift < GUARDS; shift += 3) {
                const size_t n = sizes[s];
                const float *direction = v + (shift * 3) % GUARDS;
                fill_random(before, LENGTH(before));
                fill_random(v, LENGTH(v));
                for (size_t i = 0; i < n; i++) cv[i] = doses[d] * direction[i];
                for (int keep = 0; keep < 2; keep++) {
                    memcpy(x, before, sizeof x);
                    memcpy(expected, before, sizeof x);
                    const double moved = keep ? mien_add_keep_norm_scaled(x + shift, direction, doses[d], n)
                                              : mien_add_scaled(x + shift, direction, doses[d], n);
                    const double apart = keep ? mien_add_keep_norm(expected + shift, cv, n)
                                              : mien_add(expected + shift, cv, n);
                    CHECK(same_bits(x, expected, LENGTH(x))); /* the floats around the row too */
                    CHECK(same_value(moved, apart));
                    CHECK(about(moved, squared_shift(before, x, LENGTH(x))));
                }
            }
}

static void a_dose_of_one_gives_the_bits_of_the_plain_add(void) {
    static const float magnitudes[] = {1.0f, 1e30f, 3e37f, 1e-20f, 1e-30f, 1e-40f, 0.0f};
    static float x[LONG], expected[LONG], v[LONG];
    for (size_t a = 0; a < LENGTH(magnitudes); a++)
        for (size_t b = 0; b < LENGTH(magnitudes); b++)
            for (size_t s = 0; s < LENGTH(sizes); s++) {
                const size_t n = sizes[s];
                fill_scaled(v, n, magnitudes[b]);
                for (int keep = 0; keep < 2; keep++) {
                    fill_scaled(x, n, magnitudes[a]);
                    memcpy(expected, x, sizeof x);
                    const double moved =
                        keep ? mien_add_keep_norm_scaled(x, v, 1.0f, n) : mien_add_scaled(x, v, 1.0f, n);
                    const double apart = keep ? mien_add_keep_norm(expected, v, n) : mien_add(expected, v, n);
                    CHECK(same_bits(x, expected, n));
                    CHECK(same_value(moved, apart));
                }
            }
}

static void scale_is_the_plain_loop_at_every_length_and_alignment(void) {
    static float x[LONG + GUARDS], before[LONG + GUARDS], expected[LONG + GUARDS], v[LONG + GUARDS];
    for (size_t s = 0; s < LENGTH(sizes); s++)
        for (size_t d = 0; d < LENGTH(doses); d++)
            for (size_t shift = 0; shift < GUARDS; shift++) {
                const size_t n = sizes[s];
                const float *factors = v + (shift * 3) % GUARDS;
                fill_random(x, LENGTH(x));
                fill_random(v, LENGTH(v));
                memcpy(before, x, sizeof x);
                memcpy(expected, x, sizeof x);
                for (size_t i = 0; i < n; i++) {
                    const float product = doses[d] * factors[i];
                    const float factor = 1.0f + product;
                    expected[shift + i] *= factor;
                }
                const double moved = mien_scale(x + shift, factors, doses[d], n);
                CHECK(same_bits(x, expected, LENGTH(x)));
                CHECK(about(moved, squared_shift(before, x, LENGTH(x))));
            }
}

static void scale_by_minus_one_leaves_nothing(void) {
    float x[ROOM], v[ROOM];
    fill(v, ROOM, 0.5f);
    for (size_t n = 0; n <= ROOM; n++) {
        fill_random(x, n);
        const double square = plain_dot(x, x, n);
        CHECK(about(mien_scale(x, v, -2.0f, n), square));
        CHECK(all_are(x, n, 0.0f));
    }
}

static void shifts_are_right_where_float_squares_are_not(void) {
    static const float magnitudes[] = {1e30f, 1e37f, 1e-20f, 1e-30f, 1e-40f};
    static float x[LONG], before[LONG], v[LONG];
    for (size_t m = 0; m < LENGTH(magnitudes); m++)
        for (size_t s = 0; s < LENGTH(sizes); s++) {
            const size_t n = sizes[s];
            fill_scaled(before, n, magnitudes[m]);
            fill_random(v, n);
            memcpy(x, before, sizeof x);
            double moved = mien_scale(x, v, 0.5f, n);
            CHECK(about(moved, squared_shift(before, x, n)));
            CHECK(mien_is_finite(x, n));
            memcpy(x, before, sizeof x);
            moved = mien_add_scaled(x, v, magnitudes[m], n);
            CHECK(about(moved, squared_shift(before, x, n)));
            CHECK(mien_is_finite(x, n));
        }
}

/* ---- dots --------------------------------------------------------------------------------------- */

static void dot_is_the_plain_loop_at_every_length_and_alignment(void) {
    static float x[LONG + GUARDS], v[LONG + GUARDS];
    fill_random(x, LENGTH(x));
    fill_random(v, LENGTH(v));
    CHECK(mien_dot(x, v, 0) == 0.0);
    for (size_t s = 0; s < LENGTH(sizes); s++)
        for (size_t shift = 0; shift < GUARDS; shift++) {
            const float *a = x + shift, *b = v + (shift * 3) % GUARDS;
            const double tolerance = 4e-6 * sizes_dot(a, b, sizes[s]);
            CHECK(fabs(mien_dot(a, b, sizes[s]) - plain_dot(a, b, sizes[s])) <= tolerance);
        }
}

static void an_unaligned_row_has_the_same_dot(void) {
    static float x[LONG + GUARDS], v[LONG + GUARDS], a[LONG], b[LONG];
    fill_random(a, LONG);
    fill_random(b, LONG);
    const double expected = mien_dot(a, b, LONG);
    for (size_t shift = 0; shift < GUARDS; shift++) {
        memcpy(x + shift, a, sizeof a);
        memcpy(v + GUARDS - shift, b, sizeof b);
        CHECK(same_value(mien_dot(x + shift, v + GUARDS - shift, LONG), expected));
    }
}

/* A float counts wherever it stands. */
static void dot_minds_every_position(void) {
    float x[ROOM] = {0}, v[ROOM] = {0};
    for (size_t n = 1; n <= ROOM; n++)
        for (size_t i = 0; i < n; i++) {
            x[i] = 3.0f;
            v[i] = -0.5f;
            CHECK(mien_dot(x, v, n) == -1.5);
            CHECK(mien_dot(x, v, i) == 0.0);
            x[i] = v[i] = 0.0f;
        }
}

static void many_dots_have_the_bits_of_single_ones(void) {
    enum { ROWS = 11, STRIDE = LONG + 5 };
    static float x[LONG], v[ROWS * STRIDE];
    static const float magnitudes[ROWS] = {1, 0, 1e30f, 1, 1e-30f, 1, 1e-40f, 3e37f, 1, 1, 1e-20f};
    for (size_t j = 0; j < ROWS; j++) fill_scaled(v + j * STRIDE, STRIDE, magnitudes[j]);
    fill_random(x, LONG);
    for (size_t s = 0; s < LENGTH(sizes); s++)
        for (size_t k = 0; k <= ROWS; k++) {
            double out[ROWS + 1];
            for (size_t j = 0; j <= ROWS; j++) out[j] = -7;
            mien_dots(out, x, v, STRIDE, k, sizes[s]);
            for (size_t j = 0; j < k; j++) CHECK(same_value(out[j], mien_dot(x, v + j * STRIDE, sizes[s])));
            for (size_t j = k; j <= ROWS; j++) CHECK(out[j] == -7.0);
        }
}

static void dot_neither_overflows_nor_underflows(void) {
    static const float magnitudes[] = {1e30f, 1e38f, 1e-20f, 1e-30f, 1e-40f, 1.0f, 0.0f};
    static float x[LONG], v[LONG];
    for (size_t a = 0; a < LENGTH(magnitudes); a++)
        for (size_t b = 0; b < LENGTH(magnitudes); b++)
            for (size_t s = 0; s < LENGTH(sizes); s++) {
                fill_scaled(x, sizes[s], magnitudes[a]);
                fill_scaled(v, sizes[s], magnitudes[b]);
                const double tolerance = 4e-6 * sizes_dot(x, v, sizes[s]);
                CHECK(fabs(mien_dot(x, v, sizes[s]) - plain_dot(x, v, sizes[s])) <= tolerance);
            }
}

static void a_dot_that_cancels_is_done_again(void) {
    float x[64], v[64];
    fill(x, 64, 1e25f);
    for (int i = 0; i < 64; i++) v[i] = i < 32 ? 1e25f : -1e25f; /* infinity and its opposite in float */
    CHECK(mien_dot(x, v, 64) == 0.0);
    x[40] = 0.0f;
    CHECK(about(mien_dot(x, v, 64), (double)1e25f * (double)1e25f));
}

static void nan_and_infinity_go_through_a_dot(void) {
    static float x[LONG], v[LONG];
    double out[5];
    for (size_t at = 0; at < LONG; at += 97) {
        fill_random(x, LONG);
        fill(v, LONG, 1.0f);
        x[at] = NAN;
        CHECK(isnan(mien_dot(x, v, LONG)));
        mien_dots(out, x, v, 0, 5, LONG);
        for (int j = 0; j < 5; j++) CHECK(isnan(out[j]));
        x[at] = -INFINITY;
        CHECK(mien_dot(x, v, LONG) == -(double)INFINITY);
    }
}

/* ---- project ------------------------------------------------------------------------------------ */

/* The formula in double, one dot after the other. */
static void plain_project(double *out, const float *x, const float *basis, size_t stride, size_t k,
                          const double *levels, double strength, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = (double)x[i];
    for (size_t j = 0; j < k; j++) {
        const double c = strength * ((levels ? levels[j] : 0) - plain_dot(x, basis + j * stride, n));
        for (size_t i = 0; i < n; i++) out[i] += c * (double)basis[j * stride + i];
    }
}

static void fill_levels(double *levels, size_t k, double size) {
    for (size_t j = 0; j < k; j++) levels[j] = (double)random_float() * size;
}

static double levels_norm(const double *levels, size_t k) {
    double square = 0;
    for (size_t j = 0; j < k; j++) square += levels[j] * levels[j];
    return sqrt(square);
}

static void project_is_the_plain_loop(void) {
    static const size_t lengths[] = {1, 7, 32, 33, 70, 289}, ranks[] = {1, 2, 3, 4, 5, 8, 16, 17};
    static const double strengths[] = {1, 0.3, -2, 0};
    enum { STRIDE = 291, GUARDED = 300 };
    static float basis[17 * STRIDE], x[GUARDED], before[GUARDED];
    static double expected[GUARDED], levels[17];
    for (size_t l = 0; l < LENGTH(lengths); l++)
        for (size_t r = 0; r < LENGTH(ranks) && ranks[r] <= lengths[l]; r++) {
            const size_t n = lengths[l], k = ranks[r];
            make_basis(basis, STRIDE, k, n);
            for (size_t s = 0; s < LENGTH(strengths); s++)
                for (size_t shift = 0; shift < GUARDS; shift += 3)
                    for (int targeted = 0; targeted < 2; targeted++) {
                        const double *to = targeted ? levels : NULL;
                        fill_random(before, LENGTH(before));
                        fill_levels(levels, k, 3);
                        memcpy(x, before, sizeof x);
                        plain_project(expected, x + shift, basis, STRIDE, k, to, strengths[s], n);
                        const double moved = mien_project(x + shift, basis, STRIDE, k, to, strengths[s], n);
                        const double size = norm(before + shift, n) + levels_norm(levels, k);
                        CHECK(close_to(x + shift, expected, n, 2e-6 * size));
                        CHECK(about(moved, squared_shift(before, x, LENGTH(x))));
                        CHECK(same_bits(x, before, shift));
                        CHECK(same_bits(x + shift + n, before + shift + n, LENGTH(x) - shift - n));
                    }
        }
}

static void project_ablates_and_clamps(void) {
    enum { N = 290, K = 17 };
    static float basis[K * N], x[N];
    double levels[K];
    make_basis(basis, N, K, N);
    for (size_t k = 1; k <= K; k++) {
        fill_random(x, N);
        const double size = norm(x, N);
        mien_project(x, basis, N, k, NULL, 1, N);
        for (size_t j = 0; j < K; j++) {
            const double left = plain_dot(x, basis + j * N, N);
            CHECK(j >= k || fabs(left) <= 2e-6 * size);
        }
        for (size_t j = 0; j < k; j++) levels[j] = (double)(j + 1);
        fill_random(x, N);
        mien_project(x, basis, N, k, levels, 1, N);
        for (size_t j = 0; j < k; j++)
            CHECK(fabs(plain_dot(x, basis + j * N, N) - (double)(j + 1)) <= 4e-6 * (size + levels_norm(levels, k)));
        CHECK(mien_project(x, basis, N, k, levels, 1, N) <= 1e-10 * size * size); /* it is there already */
    }
}

/* Blocks of 1024 floats; the axes are a basis of any length. */
static void project_minds_every_position(void) {
    static float basis[3 * LONG], x[LONG], before[LONG];
    static const double levels[] = {2.5, 2.5, 2.5};
    for (size_t at = 5; at < LONG; at += 83)
        for (size_t k = 1; k <= 3; k++) {
            const size_t axes[] = {at, at - 3, LONG - at};
            if (axes[2] == axes[0] || axes[2] == axes[1]) continue;
            fill(basis, LENGTH(basis), 0.0f);
            for (size_t j = 0; j < k; j++) basis[j * LONG + axes[j]] = 1.0f;
            fill_random(before, LONG);
            memcpy(x, before, sizeof x);
            double square = 0;
            for (size_t j = 0; j < k; j++) square += (double)before[axes[j]] * (double)before[axes[j]];
            CHECK(about(mien_project(x, basis, LONG, k, NULL, 1, LONG), square));
            for (size_t j = 0; j < k; j++) {
                CHECK(x[axes[j]] == 0.0f);
                x[axes[j]] = before[axes[j]];
            }
            for (size_t i = 0; i < LONG; i++) CHECK(x[i] == before[i]);
            mien_project(x, basis, LONG, k, levels, 1, LONG);
            for (size_t j = 0; j < k; j++) CHECK(fabsf(x[axes[j]] - 2.5f) <= 1e-6f);
        }
}

static void rows_of_zeros_do_nothing_to_a_projection(void) {
    enum { N = 70, K = 6 };
    static float basis[K * N], padded[2 * K * N], x[N], expected[N];
    make_basis(basis, N, K, N);
    for (size_t j = 0; j < K; j++) memcpy(padded + (2 * j + 1) * N, basis + j * N, N * sizeof *basis);
    for (size_t k = 1; k <= K; k++) {
        fill_random(x, N);
        memcpy(expected, x, sizeof x);
        const double moved = mien_project(x, padded, N, 2 * k, NULL, 1, N);
        CHECK(about(moved, mien_project(expected, basis, N, k, NULL, 1, N)));
        for (size_t i = 0; i < N; i++) CHECK(fabsf(x[i] - expected[i]) <= 1e-6f);
    }
    fill_random(x, N);
    x[3] = -0.0f;
    memcpy(expected, x, sizeof x);
    CHECK(mien_project(x, padded, N, 1, NULL, 1, N) == 0.0 && mien_project(x, padded, N, 1, NULL, -1, N) == 0.0);
    CHECK(same_bits(x, expected, N));
    fill(x, N, 0.0f);
    CHECK(mien_project(x, basis, N, K, NULL, 1, N) == 0.0);
    CHECK(all_are(x, N, 0.0f));
}

static void project_takes_more_rows_than_it_keeps_dots_of(void) {
    static float basis[RANK * RANK], x[RANK], before[RANK];
    static double expected[RANK], levels[RANK];
    static const size_t ranks[] = {255, 256, 257, RANK};
    make_basis(basis, RANK, RANK, RANK);
    for (size_t r = 0; r < LENGTH(ranks); r++)
        for (int targeted = 0; targeted < 2; targeted++) {
            const double *to = targeted ? levels : NULL;
            fill_random(before, RANK);
            fill_levels(levels, RANK, 1);
            memcpy(x, before, sizeof x);
            plain_project(expected, x, basis, RANK, ranks[r], to, 0.9, RANK);
            const double moved = mien_project(x, basis, RANK, ranks[r], to, 0.9, RANK);
            const double size = plain_dot(before, before, RANK) + pow(levels_norm(levels, RANK), 2);
            CHECK(close_to(x, expected, RANK, 4e-6 * sqrt(size)));
            CHECK(fabs(moved - squared_shift(before, x, RANK)) <= 4e-6 * size);
        }
    /* the whole space: only the levels are left */
    mien_project(x, basis, RANK, RANK, levels, 1, RANK);
    for (size_t j = 0; j < RANK; j++)
        CHECK(fabs(plain_dot(x, basis + j * RANK, RANK) - levels[j]) <= 1e-5 * levels_norm(levels, RANK));
    CHECK(mien_project(x, basis, RANK, RANK, levels, 1, RANK) <= 4e-6 * pow(levels_norm(levels, RANK), 2));
}

static void project_neither_overflows_nor_underflows(void) {
    static const float magnitudes[] = {1e30f, 1e36f, 3e37f, 1e-20f, 1e-30f, 1e-40f};
    static float basis[5 * RANK], x[RANK], before[RANK];
    static double expected[RANK], levels[5];
    make_basis(basis, RANK, 5, RANK);
    for (size_t m = 0; m < LENGTH(magnitudes); m++)
        for (size_t k = 1; k <= 5; k++)
            for (int targeted = 0; targeted < 2; targeted++) {
                const double *to = targeted ? levels : NULL;
                fill_scaled(before, RANK, magnitudes[m]);
                fill_levels(levels, k, (double)magnitudes[m]);
                memcpy(x, before, sizeof x);
                plain_project(expected, x, basis, RANK, k, to, 1, RANK);
                const double moved = mien_project(x, basis, RANK, k, to, 1, RANK);
                const double size = norm(before, RANK) + levels_norm(levels, k);
                CHECK(close_to(x, expected, RANK, 2e-6 * size + (double)k * (double)FLT_TRUE_MIN));
                CHECK(about(moved, squared_shift(before, x, RANK)));
            }
}

/* ---- edit --------------------------------------------------------------------------------------- */

static void edit_brings_the_probe_up_to_the_margin(void) {
    static const double strengths[] = {1, 0.25, 2};
    static float x[LONG + GUARDS], before[LONG + GUARDS], w[LONG + GUARDS];
    static double expected[LONG];
    for (size_t s = 0; s < LENGTH(sizes); s++)
        for (size_t t = 0; t < LENGTH(strengths); t++)
            for (size_t shift = 0; shift < GUARDS; shift += 3) {
                const size_t n = sizes[s];
                const float *probe = w + (shift * 3) % GUARDS;
                fill_random(before, LENGTH(before));
                fill_random(w, LENGTH(w));
                memcpy(x, before, sizeof x);
                const double square = plain_dot(probe, probe, n), bias = -0.5;
                const double score = plain_dot(x + shift, probe, n) + bias;
                const double margin = score + 3 + (double)n / 100;
                const double step = strengths[t] * (margin - score) / square;
                for (size_t i = 0; i < n; i++)
                    expected[i] = (double)before[shift + i] + step * (double)probe[i];
                const double moved = mien_edit(x + shift, probe, square, bias, margin, strengths[t], n);
                const double size = norm(before + shift, n) + fabs(step) * sqrt(square);
                CHECK(close_to(x + shift, expected, n, 2e-6 * size));
                CHECK(about(moved, squared_shift(before, x, LENGTH(x))));
                const double reached = plain_dot(x + shift, probe, n) + bias;
                CHECK(fabs(reached - (score + strengths[t] * (margin - score))) <=
                      4e-6 * (sizes_dot(x + shift, probe, n) + fabs(margin)));
                CHECK(same_bits(x, before, shift));
                CHECK(same_bits(x + shift + n, before + shift + n, LENGTH(x) - shift - n));
            }
}

static void edit_leaves_a_row_that_scores_enough(void) {
    static float x[LONG], before[LONG], w[LONG];
    for (size_t s = 0; s < LENGTH(sizes); s++) {
        const size_t n = sizes[s];
        fill_random(before, n);
        fill_random(w, n);
        before[0] = -0.0f;
        memcpy(x, before, sizeof x);
        const double square = plain_dot(w, w, n), score = mien_dot(x, w, n) + 0.25;
        CHECK(mien_edit(x, w, square, 0.25, score, 1, n) == 0.0); /* not less than itself */
        CHECK(mien_edit(x, w, square, 0.25, score - 1, 1, n) == 0.0);
        CHECK(mien_edit(x, w, square, 0.25, -(double)INFINITY, 1, n) == 0.0);
        CHECK(same_bits(x, before, n));
        CHECK(mien_edit(x, w, square, 0.25, score + 1, 1, n) > 0.0);
        fill_random(x, n);
        x[n / 2] = NAN;
        memcpy(before, x, sizeof x);
        CHECK(mien_edit(x, w, square, 0.25, score + 1, 1, n) == 0.0);
        CHECK(same_bits(x, before, n));
    }
}

static void edit_takes_a_probe_of_any_size(void) {
    static const float magnitudes[] = {1e-25f, 1e-38f, 1e25f, 1e37f};
    static float x[ROOM], before[ROOM], w[ROOM];
    static double expected[ROOM];
    for (size_t m = 0; m < LENGTH(magnitudes); m++)
        for (size_t n = 1; n <= ROOM; n++) {
            fill_scaled(before, n, 1e-4f);
            fill_scaled(w, n, magnitudes[m]);
            memcpy(x, before, sizeof x);
            const double square = plain_dot(w, w, n), score = plain_dot(x, w, n);
            const double margin = score + 2e-4 * sqrt(square);
            for (size_t i = 0; i < n; i++) expected[i] = (double)x[i] + 2e-4 / sqrt(square) * (double)w[i];
            const double moved = mien_edit(x, w, square, 0, margin, 1, n);
            CHECK(about(moved, squared_shift(before, x, n)));
            CHECK(close_to(x, expected, n, 2e-9));
        }
}

/* ---- some entries alone ------------------------------------------------------------------------- */

/* A third of the row, and never its first float. */
static size_t choose(int32_t *at, size_t n) {
    size_t count = 0;
    for (size_t i = 1; i < n; i++)
        if (random_float() > 1.0f) at[count++] = (int32_t)i;
    return count;
}

static void change_at_is_the_change_of_those_entries_as_a_row(void) {
    enum { WIDE = 5 * LONG };
    static float x[WIDE], before[WIDE], v[WIDE], chosen[WIDE];
    static int32_t at[WIDE];
    for (size_t s = 0; s <= LENGTH(sizes); s++)
        for (size_t d = 0; d < LENGTH(doses); d++)
            for (int scaling = 0; scaling < 2; scaling++) {
                const size_t n = s < LENGTH(sizes) ? sizes[s] : WIDE, count = choose(at, n);
                fill_random(before, WIDE);
                fill_random(v, count);
                memcpy(x, before, sizeof x);
                for (size_t j = 0; j < count; j++) chosen[j] = x[at[j]];
                const double moved = scaling ? mien_scale_at(x, at, v, doses[d], count)
                                             : mien_add_at(x, at, v, doses[d], count);
                const double apart = scaling ? mien_scale(chosen, v, doses[d], count)
                                             : mien_add_scaled(chosen, v, doses[d], count);
                CHECK(same_value(moved, apart));
                CHECK(about(moved, squared_shift(before, x, WIDE)));
                for (size_t j = 0; j < count; j++) before[at[j]] = chosen[j];
                CHECK(same_bits(x, before, WIDE));
            }
}

/* What a forced logit becomes where this is the largest. */
static float above(float largest) { return fmaxf(nextafterf(largest, INFINITY), largest + 0x1p-10f); }

static void forbid_and_force_set_what_they_are_given(void) {
    static float x[LONG], expected[LONG];
    static int32_t at[LONG];
    for (size_t s = 0; s < LENGTH(sizes); s++)
        for (int forcing = 0; forcing < 2; forcing++) {
            const size_t n = sizes[s], count = choose(at, n);
            fill_random(x, LONG);
            memcpy(expected, x, sizeof x);
            float top = x[0];
            for (size_t i = 0; i < n; i++) top = fmaxf(top, x[i]);
            const float value = forcing ? above(top) : -INFINITY;
            for (size_t j = 0; j < count; j++) expected[at[j]] = value;
            CHECK((forcing ? mien_force(x, at, count, n) : mien_forbid(x, at, count, n)) == (double)count);
            CHECK(same_bits(x, expected, LONG));
            CHECK(forcing || mien_forbid(x, at, count, n) == 0.0);
        }
}

static void force_finds_the_largest_wherever_it_stands(void) {
    float x[ROOM];
    for (size_t n = 2; n <= ROOM; n++)
        for (size_t i = 0; i < n; i++) {
            const int32_t at = i == 0;
            fill(x, n, -3.0f);
            x[i] = -2.0f;
            CHECK(mien_force(x, &at, 1, n) == 1.0);
            CHECK(x[at] == -2.0f + 0x1p-10f);
        }
}

static void force_has_its_edges(void) {
    static const struct {
        float others, forced, result;
    } table[] = {
        {-INFINITY, -INFINITY, -FLT_MAX}, /* every expert forbidden */
        {-INFINITY, -5.0f, -5.0f},        /* the forced one is the largest as it came */
        {-INFINITY, NAN, -FLT_MAX},
        {NAN, 1.0f, 1.0f},
        {NAN, NAN, -FLT_MAX},
        {-0.0f, -1.0f, 0.0f},
        {FLT_MAX, 0.0f, INFINITY},
        {INFINITY, 0.0f, INFINITY},
        {-1e-40f, -1.0f, -1e-40f},
        {1e6f, -1.0f, 1e6f}, /* where floats are further apart */
    };
    float x[ROOM];
    for (size_t t = 0; t < LENGTH(table); t++)
        for (size_t n = 2; n <= ROOM; n++) {
            const int32_t at = (int32_t)n / 2;
            fill(x, n, table[t].others);
            x[at] = table[t].forced;
            const bool next = table[t].result > -FLT_MAX && isfinite(table[t].result);
            CHECK(mien_force(x, &at, 1, n) == 1.0);
            CHECK(x[at] == (next ? above(table[t].result) : table[t].result));
            for (size_t i = 0; i < n; i++)
                CHECK(i == (size_t)at || (isnan(table[t].others) ? isnan(x[i]) : x[i] == table[t].others));
        }
}

/* ---- nothing, and no number --------------------------------------------------------------------- */

static void an_empty_row_stays_and_counts_for_nothing(void) {
    float x[] = {3.0f}, v[] = {2.0f};
    double out[] = {5, 5, 5};
    const int32_t at[] = {0};
    CHECK(mien_add_scaled(x, v, 2.0f, 0) == 0.0 && mien_add_keep_norm_scaled(x, v, 2.0f, 0) == 0.0);
    CHECK(mien_scale(x, v, 2.0f, 0) == 0.0 && mien_project(x, v, 1, 1, NULL, 1, 0) == 0.0);
    CHECK(mien_project(x, v, 0, 3, out, 1, 0) == 0.0 && mien_edit(x, v, 4, -1, 0, 1, 0) == 0.0);
    CHECK(mien_add_at(x, at, v, 2.0f, 0) == 0.0 && mien_scale_at(x, at, v, 2.0f, 0) == 0.0);
    CHECK(mien_forbid(x, at, 0, 1) == 0.0 && mien_force(x, at, 0, 1) == 0.0);
    mien_dots(out, x, v, 1, 1, 0);
    CHECK(out[0] == 0.0 && out[1] == 5.0 && x[0] == 3.0f);
}

static void zero_directions_leave_the_row(void) {
    static float x[LONG], before[LONG], zero[LONG];
    static const double levels[5];
    static int32_t at[LONG];
    for (int32_t i = 0; i < LONG; i++) at[i] = i;
    for (size_t s = 0; s < LENGTH(sizes); s++) {
        const size_t n = sizes[s];
        fill_random(before, n);
        memcpy(x, before, sizeof x);
        CHECK(mien_add_scaled(x, zero, 3.0f, n) == 0.0);
        CHECK(mien_add_keep_norm_scaled(x, zero, 3.0f, n) == 0.0);
        CHECK(mien_scale(x, zero, 3.0f, n) == 0.0);
        CHECK(mien_project(x, zero, 0, 5, NULL, 1, n) == 0.0);
        CHECK(mien_project(x, zero, 0, 5, levels, 1, n) == 0.0);
        CHECK(mien_add_at(x, at, zero, 3.0f, n) == 0.0);
        CHECK(mien_scale_at(x, at, zero, 3.0f, n) == 0.0);
        CHECK(same_bits(x, before, n));
    }
}

static void nan_stays_in_the_row_and_tells_in_the_shift(void) {
    static float x[LONG], v[LONG];
    static int32_t at[LONG];
    static float basis[5 * LONG];
    static const double levels[] = {1, 2, 3, 4, 5};
    for (int32_t i = 0; i < LONG; i++) at[i] = i;
    for (size_t j = 0; j < 5; j++) basis[j * LONG + j] = 1.0f;
    for (size_t s = 0; s < LENGTH(sizes); s++)
        for (int op = 0; op < 9; op++) {
            const size_t n = sizes[s], bad = n / 2, k = n < 5 ? 1 : 5;
            double moved = 0;
            fill_random(x, n);
            fill_random(v, n);
            x[bad] = NAN;
            if (op == 0) moved = mien_add_scaled(x, v, 2.0f, n);
            if (op == 1) moved = mien_add_keep_norm_scaled(x, v, 2.0f, n);
            if (op == 2) moved = mien_scale(x, v, 2.0f, n);
            if (op == 3) moved = mien_project(x, basis, LONG, 1, NULL, 1, n);
            if (op == 4) moved = mien_project(x, basis, LONG, 1, levels, 1, n);
            if (op == 5) moved = mien_project(x, basis, LONG, k, NULL, 1, n);
            if (op == 6) moved = mien_project(x, basis, LONG, k, levels, 1, n);
            if (op == 7) moved = mien_add_at(x, at, v, 2.0f, n);
            if (op == 8) moved = mien_scale_at(x, at, v, 2.0f, n);
            CHECK(isnan(moved) && isnan(x[bad]));
        }
}

int main(void) {
    scaled_adds_are_those_of_the_rounded_products();
    a_dose_of_one_gives_the_bits_of_the_plain_add();
    scale_is_the_plain_loop_at_every_length_and_alignment();
    scale_by_minus_one_leaves_nothing();
    shifts_are_right_where_float_squares_are_not();
    dot_is_the_plain_loop_at_every_length_and_alignment();
    an_unaligned_row_has_the_same_dot();
    dot_minds_every_position();
    many_dots_have_the_bits_of_single_ones();
    dot_neither_overflows_nor_underflows();
    a_dot_that_cancels_is_done_again();
    nan_and_infinity_go_through_a_dot();
    project_is_the_plain_loop();
    project_ablates_and_clamps();
    project_minds_every_position();
    rows_of_zeros_do_nothing_to_a_projection();
    project_takes_more_rows_than_it_keeps_dots_of();
    project_neither_overflows_nor_underflows();
    edit_brings_the_probe_up_to_the_margin();
    edit_leaves_a_row_that_scores_enough();
    edit_takes_a_probe_of_any_size();
    change_at_is_the_change_of_those_entries_as_a_row();
    forbid_and_force_set_what_they_are_given();
    force_finds_the_largest_wherever_it_stands();
    force_has_its_edges();
    an_empty_row_stays_and_counts_for_nothing();
    zero_directions_leave_the_row();
    nan_stays_in_the_row_and_tells_in_the_shift();
    return verdict();
}
