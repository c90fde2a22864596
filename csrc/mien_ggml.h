/* ggml, as seen from outside: built without its headers, its public functions are handed in by address, and
 * the little that must be known of ggml_tensor is found by experiment and verified. */
#ifndef MIEN_GGML_H
#define MIEN_GGML_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct ggml_tensor ggml_tensor;
typedef struct ggml_context ggml_context;
typedef struct ggml_buffer ggml_buffer;
typedef struct ggml_buffer_type ggml_buffer_type;
typedef struct {
    size_t mem_size;
    void *mem_buffer;
    bool no_alloc;
} ggml_init_params; /* passed by value to ggml_init */
typedef void (*mien_custom_function)(ggml_tensor *, const ggml_tensor *, const ggml_tensor *, int, int, void *);

/* NEEDED without them nothing works; WANTED is what the in-graph path takes as well. */
#define MIEN_GGML_FUNCTIONS(NEEDED, WANTED)                                                              \
    NEEDED(const char *, ggml_get_name, (const ggml_tensor *))                                           \
    NEEDED(void *, ggml_get_data, (const ggml_tensor *))                                                 \
    NEEDED(int64_t, ggml_nrows, (const ggml_tensor *))                                                   \
    NEEDED(int64_t, ggml_nelements, (const ggml_tensor *))                                               \
    NEEDED(size_t, ggml_nbytes, (const ggml_tensor *))                                                   \
    NEEDED(bool, ggml_is_contiguous, (const ggml_tensor *))                                              \
    NEEDED(void, ggml_backend_tensor_get, (const ggml_tensor *, void *, size_t, size_t))                 \
    NEEDED(void, ggml_backend_tensor_set, (ggml_tensor *, const void *, size_t, size_t))                 \
    WANTED(ggml_context *, ggml_init, (ggml_init_params))                                                \
    WANTED(void, ggml_free, (ggml_context *))                                                            \
    WANTED(size_t, ggml_tensor_overhead, (void))                                                         \
    WANTED(ggml_tensor *, ggml_new_tensor_2d, (ggml_context *, int, int64_t, int64_t))                   \
    WANTED(ggml_tensor *, ggml_add, (ggml_context *, ggml_tensor *, ggml_tensor *))                      \
    WANTED(ggml_tensor *, ggml_map_custom2,                                                              \
           (ggml_context *, ggml_tensor *, ggml_tensor *, mien_custom_function, int, void *))            \
    WANTED(const char *, ggml_op_name, (int))                                                            \
    WANTED(const char *, ggml_op_desc, (const ggml_tensor *))                                            \
    WANTED(bool, ggml_are_same_shape, (const ggml_tensor *, const ggml_tensor *))                        \
    WANTED(ggml_buffer_type *, ggml_backend_cpu_buffer_type, (void))                                     \
    WANTED(ggml_buffer *, ggml_backend_alloc_ctx_tensors_from_buft, (ggml_context *, ggml_buffer_type *)) \
    WANTED(ggml_buffer_type *, ggml_backend_buffer_get_type, (ggml_buffer *))                            \
    WANTED(void, ggml_backend_buffer_free, (ggml_buffer *))

#define MIEN_FIELD(result, name, arguments) result(*name) arguments;
typedef struct {
    MIEN_GGML_FUNCTIONS(MIEN_FIELD, MIEN_FIELD)
} mien_ggml;

enum { MIEN_IMAGE_MAX = 4 + 64 };

/* Where a ggml_tensor keeps what must be read or changed, in bytes from its start. The operation (an
 * int32) is followed by its parameters; a custom operation's begin with function, tasks, user data. */
typedef struct {
    size_t op, sources, buffer;
    size_t image_size;          /* from op to the end of the user data; 0: nothing was found */
    int32_t op_add, op_multiply, op_gather, op_rotate; /* ADD, MUL_MAT, GET_ROWS, ROPE; 0 if there is none */
    bool never[128];            /* by operation: whether it can't make a block's output */
} mien_layout;

/* The functions by name, in order: i from 0 to the count - 1. */
size_t mien_ggml_symbol_count(void);
const char *mien_ggml_symbol(size_t i);

/* Take the functions' addresses, in that order. False where one that is needed is NULL; `all`: whether none
 * is. */
bool mien_ggml_load(mien_ggml *ggml, void *const *symbols, bool *all);

/* Find the layout, and for each of `count` users the image of a custom operation that calls `function` with
 * it: layout->image_size bytes at images[i]. NULL when everything was found and agrees, else what was not;
 * the layout is then empty. */
const char *mien_layout_find(mien_layout *layout, const mien_ggml *ggml, mien_custom_function function,
                             void *const *users, unsigned char *const *images, size_t count);

static inline void *mien_pointer_at(const ggml_tensor *t, size_t offset) {
    void *value;
    memcpy(&value, (const char *)t + offset, sizeof value);
    return value;
}

static inline int32_t mien_int_at(const ggml_tensor *t, size_t offset) {
    int32_t value;
    memcpy(&value, (const char *)t + offset, sizeof value);
    return value;
}

#endif
