/* Kernels: arithmetic on rows of float32. No allocation, no globals, no knowledge of models.
 *
 * A row is n floats, contiguous. Results do not depend on how a caller splits rows over threads.
 */
#ifndef MIEN_KERNELS_H
#define MIEN_KERNELS_H

#include <stdbool.h>
#include <stddef.h>

/* x[i] += v[i], rounded once, as ggml's own add does. Returns the squared length of what the row
 * really moved by, sum (x_after - x_before)^2, which float32 rounding can make less than |v|^2. */
double mien_add(float *x, const float *v, size_t n);

/* out[i] = x[i] + y[i]. `out` may be x or y. */
void mien_sum(float *out, const float *x, const float *y, size_t n);

/* out[i] = (float) sum_k c[k] * v[k][i], summed in double in the order of k, rounded once. */
void mien_combine(float *out, const float *const *v, const double *c, size_t k, size_t n);

bool mien_is_finite(const float *x, size_t n);

#endif
