/* What both test programs need: CHECK, allocations that can be made to fail, and random rows.
 * Include it once a program; link with the --wrap flags of the Makefile. */
#ifndef MIEN_TESTING_H
#define MIEN_TESTING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- checks ------------------------------------------------------------------------------------- */

static atomic_long checks, failures;

#define CHECK(claim) check(claim, #claim, __FILE__, __LINE__)

static bool check(bool holds, const char *claim, const char *file, int line) {
    checks++;
    if (!holds && ++failures <= 20) printf("%s:%d: not so: %s\n", file, line, claim);
    return holds;
}

/* What a program's main returns. */
static int verdict(void) {
    printf("%ld checks", (long)checks);
    if (failures) printf(", %ld failed", (long)failures);
    printf("\n");
    return failures ? 1 : 0;
}

/* ---- allocations -------------------------------------------------------------------------------- */

static atomic_long live_blocks;      /* allocated and not freed */
static atomic_long fail_after = -1;  /* allocations that still succeed; -1: all */

static bool must_fail(void) {
    long left = fail_after;
    if (left > 0) fail_after = left - 1;
    return left == 0;
}

static void *counted(void *block) {
    if (block) live_blocks++;
    return block;
}

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
void *__real_realloc(void *block, size_t size);
void __real_free(void *block);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size);
void *__wrap_realloc(void *block, size_t size);
void __wrap_free(void *block);

void *__wrap_malloc(size_t size) { return must_fail() ? NULL : counted(__real_malloc(size)); }

void *__wrap_calloc(size_t count, size_t size) { return must_fail() ? NULL : counted(__real_calloc(count, size)); }

void *__wrap_aligned_alloc(size_t alignment, size_t size) {
    return must_fail() ? NULL : counted(__real_aligned_alloc(alignment, size));
}

void *__wrap_realloc(void *block, size_t size) {
    if (must_fail()) return NULL;
    return block ? __real_realloc(block, size) : counted(__real_malloc(size));
}

void __wrap_free(void *block) {
    if (block) live_blocks--;
    __real_free(block);
}

/* ---- rows --------------------------------------------------------------------------------------- */

static uint32_t random_state = 1;

/* About normal in size, every bit of the mantissa in use. */
static float random_float(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return ((float)(random_state >> 8) / 8388608.0f - 1.0f) * 3.0f;
}

static void fill_random(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = random_float();
}

static void fill(float *x, size_t n, float value) {
    for (size_t i = 0; i < n; i++) x[i] = value;
}

static bool same_bits(const float *x, const float *y, size_t n) { return !n || !memcmp(x, y, n * sizeof *x); }

static bool all_are(const float *x, size_t n, float value) {
    for (size_t i = 0; i < n; i++)
        if (x[i] != value) return false;
    return true;
}

/* Squared lengths are good to a few parts in a million: see mien_kernels.h. */
static bool about(double got, double expected) {
    const double difference = got > expected ? got - expected : expected - got;
    return difference <= 4e-6 * expected;
}

#endif
