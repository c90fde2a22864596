#include "mien_kernels.h"

#include <math.h>
#include <string.h>

/* One build, the best instruction set of the machine it runs on. Contraction to fused multiply-add is
 * off (see build.py), so every variant gives the same bits. Sanitizers can't start with such clones. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && !defined(MIEN_PORTABLE)
#define VARIANTS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VARIANTS
#endif

#define INLINED static inline __attribute__((always_inline))

/* Rows are walked in WAYS vectors of LANES floats, each with a sum of its own, so that no addition waits
 * for the one before. Written out, because compilers do not find it in a loop over an array of sums, and
 * would take the widest registers: a processor needs microseconds to wake those up for one row. */
enum { LANES = 8, WAYS = 4, STEP = LANES * WAYS, BLOCK = 1024, COMBINED = 256 };
typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));

#define LOAD(to, from) memcpy(&(to), (from), sizeof(lanes))
#define STORE(to, from) memcpy((to), &(from), sizeof(lanes))
#define EACH_WAY for (size_t w = 0; w < WAYS; w++)

/* Squares are summed in float over a block, and in double over blocks: that is several times as fast as
 * double throughout, and good to a few parts in a million. A block whose sum leaves what float squares can hold is done again
 * in double; so huge and tiny rows are right, too. */
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

/* x += v over at most BLOCK floats; returns sum (fl(x + v) - x)^2. */
INLINED double add_block(float *x, const float *v, size_t n) {
    lanes sums[WAYS] = {0}, h, d;
    double sum = 0;
    size_t i = 0;
    for (; i + STEP <= n; i += STEP)
        EACH_WAY {
            LOAD(h, x + i + w * LANES);
            LOAD(d, v + i + w * LANES);
            d = h + d - h;
            sums[w] += d * d;
        }
    for (; i < n; i++) {
        const float moved = x[i] + v[i] - x[i];
        sum += (double)moved * (double)moved;
    }
    sum = total_of(sums, sum);
    if (must_widen(sum)) {
        sum = 0;
        for (i = 0; i < n; i++) {
            const float after = x[i] + v[i];
            const double moved = (double)after - (double)x[i];
            sum += moved * moved;
        }
    }
    for (i = 0; i + STEP <= n; i += STEP)
        EACH_WAY {
            LOAD(h, x + i + w * LANES);
            LOAD(d, v + i + w * LANES);
            h += d;
            STORE(x + i + w * LANES, h);
        }
    for (; i < n; i++) x[i] += v[i];
    return sum;
}

VARIANTS double mien_add(float *x, const float *v, size_t n) {
    double total = 0;
    for (size_t i = 0; i < n; i += BLOCK) total += add_block(x + i, v + i, block_from(i, n));
    return total;
}

typedef struct {
    double before, after; /* squared lengths of x + a and of x + a + v */
} lengths;

/* `a` may be NULL for zero; each caller is compiled once with it and once without. */
INLINED float sum_at(const float *x, const float *a, size_t i) { return a ? x[i] + a[i] : x[i]; }

/* Over at most BLOCK floats. */
INLINED lengths lengths_of(const float *x, const float *a, const float *v, size_t n) {
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
            h += d;
            after[w] += h * h;
        }
    for (; i < n; i++) {
        const float base = sum_at(x, a, i), sum = base + v[i];
        rest.before += (double)base * (double)base;
        rest.after += (double)sum * (double)sum;
    }
    lengths found = {total_of(before, rest.before), total_of(after, rest.after)};
    if (must_widen(found.before) || must_widen(found.after)) {
        found = (lengths){0, 0};
        for (i = 0; i < n; i++) {
            const float base = sum_at(x, a, i), sum = base + v[i];
            found.before += (double)base * (double)base;
            found.after += (double)sum * (double)sum;
        }
    }
    return found;
}

/* x = (x + a + v) * scale over at most BLOCK floats; returns the squared length that x moved by. wide: the
 * row's squares need double. */
INLINED double rescale(float *x, const float *a, const float *v, double scale, bool wide, size_t n) {
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
            h = (h + d) * factor;
            STORE(x + i + w * LANES, h);
            d = h - old;
            sums[w] += d * d;
        }
    for (; i < n; i++) {
        const float before = x[i], after = sum_at(x, a, i) + v[i];
        x[i] = wide ? (float)((double)after * scale) : after * factor;
        const double moved = (double)x[i] - (double)before;
        sum += moved * moved;
    }
    return total_of(sums, sum);
}

INLINED double add_keep_norm(float *x, const float *a, const float *v, size_t n) {
    lengths total = {0, 0};
    for (size_t i = 0; i < n; i += BLOCK) {
        const lengths block = lengths_of(x + i, a ? a + i : NULL, v + i, block_from(i, n));
        total.before += block.before;
        total.after += block.after;
    }
    const double scale = total.after > 0 ? sqrt(total.before / total.after) : 0;
    const bool wide = must_widen(total.before) || must_widen(total.after) || !(scale < 1e30);
    double moved = 0;
    for (size_t i = 0; i < n; i += BLOCK)
        moved += rescale(x + i, a ? a + i : NULL, v + i, scale, wide, block_from(i, n));
    return moved;
}

VARIANTS double mien_add_keep_norm(float *x, const float *v, size_t n) { return add_keep_norm(x, NULL, v, n); }

VARIANTS double mien_add_then_keep_norm(float *x, const float *a, const float *v, size_t n) {
    return add_keep_norm(x, a, v, n);
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
