/* Kernels: arithmetic on rows of float32. No allocation, no globals, no knowledge of models.
 *
 * A row is n floats, contiguous, at any alignment. Results do not depend on how a caller splits rows over
 * threads. A NaN in a row is kept, and goes wherever the formula takes it.
 */
#ifndef MIEN_KERNELS_H
#define MIEN_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* x[i] += v[i], rounded once, as ggml's own add does. Returns the squared length of what the row
 * really moved by, sum (x_after - x_before)^2, which float32 rounding can make less than |v|^2; good to
 * a few parts in a million, as in the other kernels. */
double mien_add(float *x, const float *v, size_t n);

/* x[i] = (x[i] + v[i]) * |x| / |x + v|: the row keeps its Euclidean length. Where x + v is zero there is
 * no direction to scale, and the row becomes zero. The scale is good to float32's precision. Returns what
 * mien_add returns. */
double mien_add_keep_norm(float *x, const float *v, size_t n);

/* mien_add and mien_add_keep_norm of c v, each product rounded to float first; c of 1 gives their bits. */
double mien_add_scaled(float *x, const float *v, float c, size_t n);
double mien_add_keep_norm_scaled(float *x, const float *v, float c, size_t n);

/* mien_add of `a` and mien_add_keep_norm of `v`, to the same bits in one go: what is returned is how far
 * the two together moved the row. */
double mien_add_then_keep_norm(float *x, const float *a, const float *v, size_t n);

/* x[i] *= 1 + c v[i], every step rounded to float. Returns what mien_add returns. */
double mien_scale(float *x, const float *v, float c, size_t n);

/* <x, v> = sum x[i] v[i], good to a few parts in a million of sum |x[i] v[i]|. */
double mien_dot(const float *x, const float *v, size_t n);

/* out[j] = mien_dot of x and the row at v + j * stride, to the same bits, for each of k rows. */
void mien_dots(double *out, const float *x, const float *v, size_t stride, size_t k, size_t n);

/* x += strength * sum_j (levels[j] - <q_j, x>) q_j, where the q_j are the rows of `basis`, k of them,
 * `stride` floats apart. They must be orthonormal; rows of zeros are allowed and do nothing. levels: what x
 * shall have of each, NULL for zeros: at strength 1 that is a clamp, and without levels ablation. The
 * <q_j, x> come out right to a few parts in a million of |x|. Returns what mien_add returns.
 *
 * All <q_j, x> are taken of the row as it came, up to a k of 256. More rows are done 256 at a time, which is
 * the same up to rounding because they are orthonormal; so are the squared lengths then, which add up. */
double mien_project(float *x, const float *basis, size_t stride, size_t k, const double *levels,
                    double strength, size_t n);

/* The least change of x that brings a linear probe up to a margin. With s = <w, x> + bias:
 * x += strength * (margin - s) / square * w where s < margin; other rows stay as they are, bit for bit, and
 * so do those whose s is NaN. square: <w, w>, above zero. Returns what mien_add returns, 0 for a row that
 * stays. The formula is that of "Probing then Editing" (arXiv 2504.10227). */
double mien_edit(float *x, const float *w, double square, double bias, double margin, double strength,
                 size_t n);

/* mien_add_scaled and mien_scale of some entries alone: x[at[j]] += c v[j], x[at[j]] *= 1 + c v[j]. The
 * `count` indices ascend, so no entry is changed twice. */
double mien_add_at(float *x, const int32_t *at, const float *v, float c, size_t count);
double mien_scale_at(float *x, const int32_t *at, const float *v, float c, size_t count);

/* For a row of n router logits: x[at[j]] = -infinity, so that no such expert is selected. Returns how many
 * entries that changed, because a squared length would be infinite. */
double mien_forbid(float *x, const int32_t *at, size_t count, size_t n);

/* x[at[j]] = 2^-10 above the largest of the row as it came, and the next float at least, so that each such
 * expert is selected before all others and weighs as much as the strongest. NaN and -infinity are passed
 * over: a row of nothing else gets -FLT_MAX. Above FLT_MAX and above infinity there is only infinity.
 * Returns how many entries that changed. */
double mien_force(float *x, const int32_t *at, size_t count, size_t n);

/* out[i] = x[i] + y[i]. `out` may be x or y. */
void mien_sum(float *out, const float *x, const float *y, size_t n);

/* out[i] = (float) sum_k c[k] * v[k][i], summed in double in the order of k, rounded once. */
void mien_combine(float *out, const float *const *v, const double *c, size_t k, size_t n);

bool mien_is_finite(const float *x, size_t n);

#endif
