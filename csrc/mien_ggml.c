#include "mien_ggml.h"

#include <string.h>

enum { GGML_TYPE_F32 = 0, GGML_N_TASKS_MAX = -1, SCAN_MAX = 1024 };

/* Half of a graph's nodes. A block ends in a sum, perhaps a norm, a scale or a view of it, and not in
 * one of these; their names need not be read, and a name that has left the caches is what an ask costs. */
static const char *const never_outputs[] = {"MUL_MAT", "MUL_MAT_ID", "ROPE",     "SOFT_MAX",      "SET_ROWS",
                                            "PERMUTE", "TRANSPOSE",  "GET_ROWS", "FLASH_ATTN_EXT"};

#define NAME(result, name, arguments) #name,
static const char *const symbol_names[] = {MIEN_GGML_FUNCTIONS(NAME, NAME)};
#define IS_NEEDED(result, name, arguments) true,
#define IS_WANTED(result, name, arguments) false,
static const bool symbol_needed[] = {MIEN_GGML_FUNCTIONS(IS_NEEDED, IS_WANTED)};
enum { N_SYMBOLS = sizeof symbol_names / sizeof *symbol_names };

_Static_assert(sizeof(mien_ggml) == N_SYMBOLS * sizeof(void *), "one pointer a function");
_Static_assert(sizeof(mien_custom_function) == sizeof(void *), "code and data pointers are alike");

size_t mien_ggml_symbol_count(void) { return N_SYMBOLS; }

const char *mien_ggml_symbol(size_t i) { return i < N_SYMBOLS ? symbol_names[i] : NULL; }

bool mien_ggml_load(mien_ggml *ggml, void *const *symbols, bool *all) {
    *all = true;
    for (size_t i = 0; i < N_SYMBOLS; i++) {
        if (!symbols[i] && symbol_needed[i]) return false;
        *all = *all && symbols[i];
    }
    memcpy(ggml, symbols, sizeof *ggml);
    return true;
}

/* ---- finding the layout ------------------------------------------------------------------------- */

/* Operation parameters are int32s, so a pointer among them need not be aligned as one. */
static bool find_pointer(const ggml_tensor *t, size_t size, const void *value, size_t *offset) {
    for (size_t at = 0; at + sizeof value <= size; at += sizeof(int32_t))
        if (mien_pointer_at(t, at) == value) {
            *offset = at;
            return true;
        }
    return false;
}

/* The number of t's operation if it is called `name`, else -1. ggml_op_name does not check its argument,
 * so the count goes up and ends at the operation that t is known to have. */
static int32_t op_number(const mien_ggml *ggml, const ggml_tensor *t, const char *name) {
    if (strcmp(ggml->ggml_op_desc(t), name)) return -1;
    int32_t op = 1;
    while (strcmp(ggml->ggml_op_name(op), name)) op++;
    return op;
}

/* The operations below number `known`, which is one that there is. */
static void find_operations(const mien_ggml *ggml, mien_layout *layout, int32_t known) {
    const size_t n = sizeof never_outputs / sizeof *never_outputs, room = sizeof layout->never / sizeof(bool);
    for (int32_t op = 1; op < known && (size_t)op < room; op++) {
        const char *name = ggml->ggml_op_name(op);
        for (size_t i = 0; i < n; i++)
            if (!strcmp(name, never_outputs[i])) layout->never[op] = true;
        if (!strcmp(name, "MUL_MAT")) layout->op_multiply = op;
        if (!strcmp(name, "GET_ROWS")) layout->op_gather = op;
        if (!strcmp(name, "ROPE")) layout->op_rotate = op;
    }
}

/* Makes tensors through the public API and looks for their known values. Each is followed by a spare, or
 * another, so that scanning a whole tensor_overhead from its start stays inside the context's memory. */
static const char *find_in(mien_layout *layout, const mien_ggml *ggml, ggml_context *context,
                           mien_custom_function function, void *const *users, unsigned char *const *images,
                           size_t count) {
    const size_t size = ggml->ggml_tensor_overhead() < SCAN_MAX ? ggml->ggml_tensor_overhead() : SCAN_MAX;
    ggml_tensor *a = ggml->ggml_new_tensor_2d(context, GGML_TYPE_F32, 7, 3);
    ggml_tensor *b = ggml->ggml_new_tensor_2d(context, GGML_TYPE_F32, 7, 3);
    if (!a || !b) return "tensors can't be made";
    ggml_tensor *sum = ggml->ggml_add(context, a, b);
    if (!sum) return "tensors can't be made";
    int32_t op_custom = 0;
    for (size_t i = 0; i < count; i++) {
        ggml_tensor *custom = ggml->ggml_map_custom2(context, a, b, function, GGML_N_TASKS_MAX, users[i]);
        if (!custom || !ggml->ggml_new_tensor_2d(context, GGML_TYPE_F32, 1, 1)) return "tensors can't be made";
        size_t at, user;
        void *address;
        memcpy(&address, &function, sizeof address);
        if (!find_pointer(custom, size, address, &at) || !find_pointer(custom, size, users[i], &user) ||
            at < sizeof(int32_t) || user <= at)
            return "a custom operation's parameters were not found";
        const size_t op = at - sizeof(int32_t), image_size = user + sizeof(void *) - op;
        if (image_size > MIEN_IMAGE_MAX || (i && (op != layout->op || image_size != layout->image_size)))
            return "a custom operation's parameters are not where they should be";
        layout->op = op;
        layout->image_size = image_size;
        layout->op_add = op_number(ggml, sum, "ADD");
        op_custom = op_number(ggml, custom, "MAP_CUSTOM2");
        if (layout->op_add < 0 || mien_int_at(sum, op) != layout->op_add || mien_int_at(custom, op) != op_custom)
            return "the operation's number does not verify";
        memcpy(images[i], (char *)custom + op, image_size);
    }
    find_operations(ggml, layout, op_custom);
    if (!find_pointer(sum, size, a, &layout->sources) ||
        mien_pointer_at(sum, layout->sources + sizeof(void *)) != b)
        return "the operation's sources were not found";
    ggml_buffer_type *cpu = ggml->ggml_backend_cpu_buffer_type();
    ggml_buffer *buffer = ggml->ggml_backend_alloc_ctx_tensors_from_buft(context, cpu);
    if (!buffer) return "a buffer can't be made";
    const bool found = find_pointer(a, size, buffer, &layout->buffer) &&
                       mien_pointer_at(b, layout->buffer) == (void *)buffer &&
                       ggml->ggml_backend_buffer_get_type(buffer) == cpu;
    ggml->ggml_backend_buffer_free(buffer);
    return found ? NULL : "the tensor's buffer was not found";
}

const char *mien_layout_find(mien_layout *layout, const mien_ggml *ggml, mien_custom_function function,
                             void *const *users, unsigned char *const *images, size_t count) {
    *layout = (mien_layout){0};
    ggml_init_params parameters = {ggml->ggml_tensor_overhead() * (2 * count + 8) + SCAN_MAX, NULL, true};
    ggml_context *context = ggml->ggml_init(parameters);
    if (!context) return "a context can't be made";
    const char *problem = find_in(layout, ggml, context, function, users, images, count);
    ggml->ggml_free(context);
    if (problem) *layout = (mien_layout){0};
    return problem;
}
