#include "mien_kernels.h"

#include <math.h>
#include <string.h>

/* One build, the best instruction set of the machine it runs on. Contraction to fused multiply-add is
 * off (see build.py), so every variant gives the same bits. The clones are chosen by the dynamic linker of
 * glibc; musl's cannot do that (no IFUNC), and the sanitizers can't start with them. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) && !defined(MIEN_PORTABLE)
#define VARIANTS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VARIANTS
#endif

#define INLINED static inline __attribute__((always_inline))

/* Rows are walked in WAYS vectors of LANES floats, each with a sum of its own, so that no addition waits
 * for the one before. Written out, because compilers do not find it in a loop over an array of sums, and
 * would take the widest registers: a processor needs microseconds to wake those up for one row. */
enum { LANES = 8, WAYS = 4, STEP = LANES * WAYS, BLOCK = 1024 };
enum { COMBINED = 256, TOGETHER = 4, PROJECTED = 256 };
typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t masks __attribute__((vector_size(LANES * sizeof(int32_t))));

#define LOAD(to, from) memcpy(&(to), (from), sizeof(lanes))
#define STORE(to, from) memcpy((to), &(from), sizeof(lanes))

/* Unrolled by order: left to itself, gcc keeps some of the sums in memory. */
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 4")
#endif
#define EACH_WAY UNROLLED for (size_t w = 0; w < WAYS; w++)
#define EACH_ROW UNROLLED for (size_t j = 0; j < rows; j++)

/* Squares and products are summed in float over a block, and in double over blocks: that is several times
 * as fast as double throughout, and good to a few parts in a million. A block whose sum leaves what float
 * squares can hold is done again in double; so huge and tiny rows are right, too. */
INLINED double total_of(const lanes sums[WAYS], double rest) {
    const lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float part[LANES];
    STORE(part, sum);
    for (size_t width = LANES / 2; width; width /= 2)
        for (size_t j = 0; j < width; j++) part[j] += part[j + width];
    return (double)part[0] + rest;
}

INLINED bool must_widen(double sum) { return !(sum >= 1e-20 && sum <= 1e38); }

INLINED size_t block_from(size_t start, size_t n) { return n - start < BLOCK ? n - start : BLOCK; }

/* What goes over a row once more begins at its end, which was read last and is the nearest: a row and a
 * direction of 4096 fill the first cache. */
#define EACH_BLOCK_BACK(i, n) for (size_t i = ((n) + BLOCK - 1) / BLOCK * BLOCK; i && (i -= BLOCK, true);)

/* A change of x, one float or a vector of them. `how` is a constant where a block is walked, and so is a c
 * of 1: each caller is compiled for its own case. */
typedef enum { ADD, ADD_BOTH, SCALE } change_kind;
#define CHANGED(x, v, other) \
    (how == SCALE ? (x) * (1.0f + (v) * c) : how == ADD_BOTH ? (x) + ((v) * c + (other) * d) : (x) + (v) * c)

/* x += c v, x += c v + d other, or x *= 1 + c v, over at most BLOCK floats; returns sum (x_after - x)^2. The
 * row as it came is kept for a sum that must be done again: cheaper than to go over the row twice. */
INLINED double change_block(change_kind how, float *x, const float *v, float c, const float *other, float d,
                            size_t n) {
    float old[BLOCK];
    lanes sums[WAYS] = {0}, before, after, step, second = {0};
    double sum = 0;
    size_t i = 0;
    for (; i + STEP <= n; i += STEP)
        EACH_WAY {
            LOAD(before, x + i + w * LANES);
            LOAD(step, v + i + w * LANES);
            if (how == ADD_BOTH) LOAD(second, other + i + w * LANES);
            after = CHANGED(before, step, second);
            STORE(old + i + w * LANES, before);
            STORE(x + i + w * LANES, after);
            step = after - before;
            sums[w] += step * step;
        }
    for (; i < n; i++) {
        old[i] = x[i];
        x[i] = CHANGED(old[i], v[i], other[i]);
        const float moved = x[i] - old[i];
        sum += (double)moved * (double)moved;
    }
    sum = total_of(sums, sum);
    if (must_widen(sum)) {
        sum = 0;
        for (i = 0; i < n; i++) {
            const double moved = (double)x[i] - (double)old[i];
            sum += moved * moved;
        }
    }
    return sum;
}

INLINED double change(change_kind how, float *x, const float *v, float c, size_t n) {
    double total = 0;
    for (size_t i = 0; i < n; i += BLOCK)
        total += change_block(how, x + i, v + i, c, NULL, 0, block_from(i, n));
    return total;
}

VARIANTS double mien_add(float *x, const float *v, size_t n) { return change(ADD, x, v, 1.0f, n); }

VARIANTS double mien_add_scaled(float *x, const float *v, float c, size_t n) {
    return change(ADD, x, v, c, n);
}

VARIANTS double mien_scale(float *x, const float *v, float c, size_t n) { return change(SCALE, x, v, c, n); }

typedef struct {
    double before, after; /* squared lengths of x + a and of x + a + c v */
} lengths;

/* `a` may be NULL for zero; each caller is compiled once with it and once without. */
INLINED float sum_at(const float *x, const float *a, size_t i) { return a ? x[i] + a[i] : x[i]; }

/* Over at most BLOCK floats. */
INLINED lengths lengths_of(const float *x, const float *a, const float *v, float c, size_t n) {
    lanes before[WAYS] = {0}, after[WAYS] = {0}, h, d;
    lengths rest = {0, 0};
    size_t i = 0;
    for (; i + STEP <= n; i += STEP)
        EACH_WAY {
            LOAD(h, x + i + w * LANES);
            if (a) {
                LOAD(d, a + i + w * LANES);
                h += d;
            }
            LOAD(d, v + i + w * LANES);
            before[w] += h * h;
            h += d * c;
            after[w] += h * h;
        }
    for (; i < n; i++) {
        const float base = sum_at(x, a, i), sum = base + v[i] * c;
        rest.before += (double)base * (double)base;
        rest.after += (double)sum * (double)sum;
    }
    lengths found = {total_of(before, rest.before), total_of(after, rest.after)};
    if (must_widen(found.before) || must_widen(found.after)) {
        found = (lengths){0, 0};
        for (i = 0; i < n; i++) {
            const float base = sum_at(x, a, i), sum = base + v[i] * c;
            found.before += (double)base * (double)base;
            found.after += (double)sum * (double)sum;
        }
    }
    return found;
}

/* x = (x + a + c v) * scale over at most BLOCK floats; returns the squared length that x moved by. wide: the
 * row's squares need double. */
INLINED double rescale(float *x, const float *a, const float *v, float c, double scale, bool wide, size_t n) {
    const float factor = (float)scale;
    lanes sums[WAYS] = {0}, old, h, d;
    double sum = 0;
    size_t i = 0;
    for (; !wide && i + STEP <= n; i += STEP)
        EACH_WAY {
            LOAD(old, x + i + w * LANES);
            h = old;
            if (a) {
                LOAD(d, a + i + w * LANES);
                h += d;
            }
            LOAD(d, v + i + w * LANES);
            h = (h + d * c) * factor;
            STORE(x + i + w * LANES, h);
            d = h - old;
            sums[w] += d * d;
        }
    for (; i < n; i++) {
        const float before = x[i], after = sum_at(x, a, i) + v[i] * c;
        x[i] = wide ? (float)((double)after * scale) : after * factor;
        const double moved = (double)x[i] - (double)before;
        sum += moved * moved;
    }
    return total_of(sums, sum);
}

INLINED double add_keep_norm(float *x, const float *a, const float *v, float c, size_t n) {
    lengths total = {0, 0};
    for (size_t i = 0; i < n; i += BLOCK) {
        const lengths block = lengths_of(x + i, a ? a + i : NULL, v + i, c, block_from(i, n));
        total.before += block.before;
        total.after += block.after;
    }
    const double scale = total.after > 0 ? sqrt(total.before / total.after) : 0;
    const bool wide = must_widen(total.before) || must_widen(total.after) || !(scale < 1e30);
    double moved = 0;
    EACH_BLOCK_BACK(i, n)
        moved += rescale(x + i, a ? a + i : NULL, v + i, c, scale, wide, block_from(i, n));
    return moved;
}

VARIANTS double mien_add_keep_norm(float *x, const float *v, size_t n) {
    return add_keep_norm(x, NULL, v, 1.0f, n);
}

VARIANTS double mien_add_keep_norm_scaled(float *x, const float *v, float c, size_t n) {
    return add_keep_norm(x, NULL, v, c, n);
}

VARIANTS double mien_add_then_keep_norm(float *x, const float *a, const float *v, size_t n) {
    return add_keep_norm(x, a, v, 1.0f, n);
}

/* <x, v> in double, in sums of their own as above. */
INLINED double dot_wide(const float *x, const float *v, size_t n) {
    double sums[WAYS] = {0}, sum = 0;
    size_t i = 0;
    for (; i + WAYS <= n; i += WAYS)
        EACH_WAY sums[w] += (double)x[i + w] * (double)v[i + w];
    for (; i < n; i++) sum += (double)x[i] * (double)v[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]) + sum;
}

/* out[j] += <x, v + j * stride> over at most BLOCK floats, for up to TOGETHER rows of v: x is loaded once
 * for all of them, and each has the sums that it would have alone. */
INLINED void dots_block(double *out, const float *x, const float *v, size_t stride, size_t rows, size_t n) {
    lanes sums[TOGETHER][WAYS] = {0}, h, d;
    double rest[TOGETHER] = {0};
    size_t i = 0;
    for (; i + STEP <= n; i += STEP)
        EACH_WAY {
            LOAD(h, x + i + w * LANES);
            EACH_ROW {
                LOAD(d, v + j * stride + i + w * LANES);
                sums[j][w] += h * d;
            }
        }
    for (; i < n; i++)
        EACH_ROW rest[j] += (double)x[i] * (double)v[j * stride + i];
    EACH_ROW {
        const double sum = total_of(sums[j], rest[j]);
        out[j] += must_widen(fabs(sum)) ? dot_wide(x, v + j * stride, n) : sum;
    }
}

INLINED void dots(double *out, const float *x, const float *v, size_t stride, size_t k, size_t n) {
    for (size_t j = 0; j < k; j++) out[j] = 0;
    size_t j = 0;
    for (; k - j >= TOGETHER; j += TOGETHER)
        for (size_t i = 0; i < n; i += BLOCK)
            dots_block(out + j, x + i, v + j * stride + i, stride, TOGETHER, block_from(i, n));
    for (; k - j >= 2; j += 2)
        for (size_t i = 0; i < n; i += BLOCK)
            dots_block(out + j, x + i, v + j * stride + i, stride, 2, block_from(i, n));
    for (; j < k; j++)
        for (size_t i = 0; i < n; i += BLOCK)
            dots_block(out + j, x + i, v + j * stride + i, stride, 1, block_from(i, n));
}

VARIANTS double mien_dot(const float *x, const float *v, size_t n) {
    double dot;
    dots(&dot, x, v, 0, 1, n);
    return dot;
}

VARIANTS void mien_dots(double *out, const float *x, const float *v, size_t stride, size_t k, size_t n) {
    dots(out, x, v, stride, k, n);
}

/* Whether a factor keeps its precision as a float, and leaves room for sums of products. */
INLINED bool is_narrow(double c) { return c == 0 || (fabs(c) >= 1e-30 && fabs(c) <= 1e30); }

/* x += sum_j c[j] v_j in double, rounded once: for factors that float can't hold. */
INLINED double move_wide(float *x, const float *v, size_t stride, size_t k, const double *c, size_t n) {
    double total = 0;
    for (size_t i = 0; i < n; i++) {
        double sum = 0;
        for (size_t j = 0; j < k; j++) sum += c[j] * (double)v[j * stride + i];
        const double before = x[i];
        x[i] = (float)(before + sum);
        total += ((double)x[i] - before) * ((double)x[i] - before);
    }
    return total;
}

/* x += c v */
INLINED double move_along(float *x, const float *v, double c, size_t n) {
    if (c == 0) return 0;
    if (!is_narrow(c)) return move_wide(x, v, 0, 1, &c, n);
    double total = 0;
    EACH_BLOCK_BACK(i, n) total += change_block(ADD, x + i, v + i, (float)c, NULL, 0, block_from(i, n));
    return total;
}

/* out = sum_j c[j] v_j over at most BLOCK floats. */
INLINED void sum_block(float *out, const float *v, size_t stride, size_t k, const float *c, size_t n) {
    lanes h;
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        lanes sums[WAYS] = {0};
        for (size_t j = 0; j < k; j++)
            EACH_WAY {
                LOAD(h, v + j * stride + i + w * LANES);
                sums[w] += h * c[j];
            }
        EACH_WAY STORE(out + i + w * LANES, sums[w]);
    }
    for (; i < n; i++) {
        float sum = 0.0f;
        for (size_t j = 0; j < k; j++) sum += v[j * stride + i] * c[j];
        out[i] = sum;
    }
}

/* x += sum_j c[j] v_j, for k of at most PROJECTED. */
INLINED double move(float *x, const float *v, size_t stride, size_t k, const double *c, size_t n) {
    if (k == 1) return move_along(x, v, c[0], n);
    float narrow[PROJECTED], delta[BLOCK];
    bool fits = true;
    for (size_t j = 0; j < k; j++) {
        fits = fits && is_narrow(c[j]);
        narrow[j] = (float)c[j];
    }
    if (!fits) return move_wide(x, v, stride, k, c, n);
    const size_t last = k - 1;
    double total = 0;
    EACH_BLOCK_BACK(i, n) {
        const size_t m = block_from(i, n);
        const float *rest = delta; /* all but the last row: one alone is used where it stands */
        float factor = 1.0f;
        if (k == 2)
            rest = v + i, factor = narrow[0];
        else
            sum_block(delta, v + i, stride, last, narrow, m);
        total += change_block(ADD_BOTH, x + i, v + last * stride + i, narrow[last], rest, factor, m);
    }
    return total;
}

INLINED double project(float *x, const float *basis, size_t stride, size_t k, const double *levels,
                       double strength, size_t n) {
    double c[PROJECTED];
    dots(c, x, basis, stride, k, n);
    for (size_t j = 0; j < k; j++) c[j] = strength * ((levels ? levels[j] : 0) - c[j]);
    return move(x, basis, stride, k, c, n);
}

VARIANTS double mien_project(float *x, const float *basis, size_t stride, size_t k, const double *levels,
                             double strength, size_t n) {
    double total = 0;
    for (size_t from = 0; from < k; from += PROJECTED)
        total += project(x, basis + from * stride, stride, k - from < PROJECTED ? k - from : PROJECTED,
                         levels ? levels + from : NULL, strength, n);
    return total;
}

VARIANTS double mien_edit(float *x, const float *w, double square, double bias, double margin,
                          double strength, size_t n) {
    double score;
    dots(&score, x, w, 0, 1, n);
    score += bias;
    return score < margin ? move_along(x, w, strength * (margin - score) / square, n) : 0;
}

/* The entries are gathered, changed as a row of their own, and put back: many at once, in vectors. */
INLINED double change_at(change_kind how, float *x, const int32_t *at, const float *v, float c,
                         size_t count) {
    float gathered[BLOCK];
    double total = 0;
    for (size_t from = 0; from < count; from += BLOCK) {
        const size_t m = block_from(from, count);
        for (size_t j = 0; j < m; j++) gathered[j] = x[at[from + j]];
        total += change_block(how, gathered, v + from, c, NULL, 0, m);
        for (size_t j = 0; j < m; j++) x[at[from + j]] = gathered[j];
    }
    return total;
}

VARIANTS double mien_add_at(float *x, const int32_t *at, const float *v, float c, size_t count) {
    return change_at(ADD, x, at, v, c, count);
}

VARIANTS double mien_scale_at(float *x, const int32_t *at, const float *v, float c, size_t count) {
    return change_at(SCALE, x, at, v, c, count);
}

static double set_at(float *x, const int32_t *at, size_t count, float value) {
    size_t changed = 0;
    for (size_t j = 0; j < count; j++) {
        changed += x[at[j]] != value;
        x[at[j]] = value;
    }
    return (double)changed;
}

double mien_forbid(float *x, const int32_t *at, size_t count, size_t n) {
    (void)n; /* so that it is called as mien_force is */
    return set_at(x, at, count, -INFINITY);
}

/* No NaN is larger than anything, so it is passed over. */
INLINED float largest(const float *x, size_t n) {
    lanes tops[WAYS], h;
    float top = -INFINITY, part[STEP];
    size_t i = 0;
    EACH_WAY tops[w] = (lanes){0} - INFINITY;
    for (; i + STEP <= n; i += STEP)
        EACH_WAY {
            LOAD(h, x + i + w * LANES);
            const masks larger = h > tops[w];
            tops[w] = (lanes)((larger & (masks)h) | (~larger & (masks)tops[w]));
        }
    EACH_WAY STORE(part + w * LANES, tops[w]);
    for (size_t j = 0; j < STEP; j++) top = part[j] > top ? part[j] : top;
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* So much that the softmax of a forced logit is above that of the largest, too, which those of neighbouring
 * floats need not be. */
static const float FORCED_ABOVE = 0x1p-10f;

VARIANTS double mien_force(float *x, const int32_t *at, size_t count, size_t n) {
    const float top = largest(x, n);
    return set_at(x, at, count, fmaxf(nextafterf(top, INFINITY), top + FORCED_ABOVE));
}

VARIANTS void mien_sum(float *out, const float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = x[i] + y[i];
}

VARIANTS void mien_combine(float *out, const float *const *v, const double *c, size_t k, size_t n) {
    for (size_t start = 0; start < n; start += COMBINED) {
        const size_t m = n - start < COMBINED ? n - start : COMBINED;
        double sum[COMBINED] = {0};
        for (size_t t = 0; t < k; t++) {
            const float *row = v[t] + start;
            for (size_t i = 0; i < m; i++) sum[i] += c[t] * (double)row[i];
        }
        for (size_t i = 0; i < m; i++) out[start + i] = (float)sum[i];
    }
}

/* x - x is 0 for a finite x and NaN for NaN and infinity, and so is any sum that meets one. */
VARIANTS bool mien_is_finite(const float *x, size_t n) {
    float lane[2 * LANES] = {0};
    size_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (size_t j = 0; j < 2 * LANES; j++) lane[j] += x[i + j] - x[i + j];
    float total = 0;
    for (; i < n; i++) total += x[i] - x[i];
    for (size_t j = 0; j < 2 * LANES; j++) total += lane[j];
    return total == 0.0f;
}
