#include "mien_kernels.h"

#include <math.h>

/* One build, the best instruction set of the machine it runs on. Contraction to fused multiply-add is
 * off (see build.py), so every variant gives the same bits. Sanitizers can't start with such clones. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && !defined(MIEN_PORTABLE)
#define VARIANTS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VARIANTS
#endif

#ifdef __GNUC__
#define INLINED static inline __attribute__((always_inline))
#else
#define INLINED static inline
#endif

enum { LANES = 8, BLOCK = 256 };

VARIANTS double mien_add(float *x, const float *v, size_t n) {
    double lane[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++) {
            const float before = x[i + j], after = before + v[i + j];
            const double moved = (double)after - (double)before;
            x[i + j] = after;
            lane[j] += moved * moved;
        }
    double total = 0;
    for (; i < n; i++) {
        const float before = x[i], after = before + v[i];
        const double moved = (double)after - (double)before;
        x[i] = after;
        total += moved * moved;
    }
    for (size_t j = 0; j < LANES; j++) total += lane[j];
    return total;
}

/* x = (x + a + v) * |x + a| / |x + a + v|; `a` may be NULL for zero. Squares are summed in double: no
 * float's overflows there. Inlined into each variant, once with `a` and once without. */
INLINED double add_keep_norm(float *x, const float *a, const float *v, size_t n) {
    double before[LANES] = {0}, after[LANES] = {0}, lane[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++) {
            const float h = a ? x[i + j] + a[i + j] : x[i + j], sum = h + v[i + j];
            before[j] += (double)h * (double)h;
            after[j] += (double)sum * (double)sum;
        }
    for (size_t j = 0; i < n; i++, j++) {
        const float h = a ? x[i] + a[i] : x[i], sum = h + v[i];
        before[j] += (double)h * (double)h;
        after[j] += (double)sum * (double)sum;
    }
    double total_before = 0, total_after = 0;
    for (size_t j = 0; j < LANES; j++) total_before += before[j], total_after += after[j];
    const double scale = total_after > 0 ? sqrt(total_before / total_after) : 0;
    for (i = 0; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++) {
            const float old = x[i + j], sum = (a ? old + a[i + j] : old) + v[i + j];
            const float new = (float)((double)sum * scale);
            const double moved = (double)new - (double)old;
            x[i + j] = new;
            lane[j] += moved * moved;
        }
    for (size_t j = 0; i < n; i++, j++) {
        const float old = x[i], sum = (a ? old + a[i] : old) + v[i];
        const float new = (float)((double)sum * scale);
        const double moved = (double)new - (double)old;
        x[i] = new;
        lane[j] += moved * moved;
    }
    double total = 0;
    for (size_t j = 0; j < LANES; j++) total += lane[j];
    return total;
}

VARIANTS double mien_add_keep_norm(float *x, const float *v, size_t n) { return add_keep_norm(x, NULL, v, n); }

VARIANTS double mien_add_then_keep_norm(float *x, const float *a, const float *v, size_t n) {
    return add_keep_norm(x, a, v, n);
}

VARIANTS void mien_sum(float *out, const float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = x[i] + y[i];
}

VARIANTS void mien_combine(float *out, const float *const *v, const double *c, size_t k, size_t n) {
    for (size_t start = 0; start < n; start += BLOCK) {
        const size_t m = n - start < BLOCK ? n - start : BLOCK;
        double sum[BLOCK] = {0};
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
