/* Kernels: arithmetic on rows of float32. No allocation, no globals, no knowledge of models.
 *
 * A row is n floats, contiguous. Results do not depend on how a caller splits rows over threads.
 */
#ifndef MIEN_KERNELS_H
#define MIEN_KERNELS_H

#include <stdbool.h>
#include <stddef.h>

/* x[i] += v[i], rounded once, as ggml's own add does. Returns the squared length of what the row
 * really moved by, sum (x_after - x_before)^2, which float32 rounding can make less than |v|^2; good to
 * a few parts in a million, as in the other kernels. */
double mien_add(float *x, const float *v, size_t n);

/* x[i] = (x[i] + v[i]) * |x| / |x + v|: the row keeps its Euclidean length. Where x + v is zero there is
 * no direction to scale, and the row becomes zero. The scale is good to float32's precision. Returns what
 * mien_add returns. */
double mien_add_keep_norm(float *x, const float *v, size_t n);

/* mien_add of `a` and mien_add_keep_norm of `v`, to the same bits in one go: what is returned is how far
 * the two together moved the row. */
double mien_add_then_keep_norm(float *x, const float *a, const float *v, size_t n);

/* out[i] = x[i] + y[i]. `out` may be x or y. */
void mien_sum(float *out, const float *x, const float *y, size_t n);

/* out[i] = (float) sum_k c[k] * v[k][i], summed in double in the order of k, rounded once. */
void mien_combine(float *out, const float *const *v, const double *c, size_t k, size_t n);

bool mien_is_finite(const float *x, size_t n);

#endif
