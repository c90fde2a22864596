#include "mien_llama.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "mien_kernels.h"

/* ---- ggml, as seen from outside ----------------------------------------------------------------- */

typedef struct ggml_tensor ggml_tensor;
typedef struct ggml_context ggml_context;
typedef struct ggml_buffer ggml_buffer;
typedef struct ggml_buffer_type ggml_buffer_type;
typedef struct {
    size_t mem_size;
    void *mem_buffer;
    bool no_alloc;
} ggml_init_params; /* passed by value to ggml_init */
typedef void (*custom_function)(ggml_tensor *, const ggml_tensor *, const ggml_tensor *, int, int, void *);

enum { GGML_TYPE_F32 = 0, GGML_N_TASKS_MAX = -1 };

/* NEEDED without them nothing works; WANTED is what the in-graph path takes as well. */
#define FUNCTIONS(NEEDED, WANTED)                                                                        \
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
           (ggml_context *, ggml_tensor *, ggml_tensor *, custom_function, int, void *))                 \
    WANTED(const char *, ggml_op_name, (int))                                                            \
    WANTED(const char *, ggml_op_desc, (const ggml_tensor *))                                            \
    WANTED(bool, ggml_are_same_shape, (const ggml_tensor *, const ggml_tensor *))                        \
    WANTED(ggml_buffer_type *, ggml_backend_cpu_buffer_type, (void))                                     \
    WANTED(ggml_buffer *, ggml_backend_alloc_ctx_tensors_from_buft, (ggml_context *, ggml_buffer_type *)) \
    WANTED(ggml_buffer_type *, ggml_backend_buffer_get_type, (ggml_buffer *))                            \
    WANTED(void, ggml_backend_buffer_free, (ggml_buffer *))

#define FIELD(result, name, arguments) result(*name) arguments;
typedef struct {
    FUNCTIONS(FIELD, FIELD)
} ggml_functions;

#define NAME(result, name, arguments) #name,
static const char *const symbol_names[] = {FUNCTIONS(NAME, NAME)};
#define IS_NEEDED(result, name, arguments) true,
#define IS_WANTED(result, name, arguments) false,
static const bool symbol_needed[] = {FUNCTIONS(IS_NEEDED, IS_WANTED)};
enum { N_SYMBOLS = sizeof symbol_names / sizeof *symbol_names };

_Static_assert(sizeof(ggml_functions) == N_SYMBOLS * sizeof(void *), "one pointer a function");
_Static_assert(sizeof(custom_function) == sizeof(void *), "code and data pointers are alike");

size_t mien_hook_symbol_count(void) { return N_SYMBOLS; }

const char *mien_hook_symbol(size_t i) { return i < N_SYMBOLS ? symbol_names[i] : NULL; }

/* ---- the hook ----------------------------------------------------------------------------------- */

/* Where a ggml_tensor keeps what we must read or change, in bytes from its start. The operation (an
 * int32) is followed by its parameters; a custom operation's begin with function, tasks, user data. */
typedef struct {
    size_t op, sources, buffer;
    size_t image_size;          /* from op to the end of the user data */
    int32_t op_add;
    bool never[128];            /* by operation: whether it can't make a block's output */
} tensor_layout;

enum { IMAGE_MAX = 4 + 64, SCAN_MAX = 1024 };

/* Half of a graph's nodes. A block ends in a sum, perhaps a norm, a scale or a view of it, and not in
 * one of these; their names need not be read, and a name that has left the caches is what an ask costs. */
static const char *const never_outputs[] = {"MUL_MAT", "MUL_MAT_ID", "ROPE",     "SOFT_MAX",      "SET_ROWS",
                                            "PERMUTE", "TRANSPOSE",  "GET_ROWS", "FLASH_ATTN_EXT"};

/* One a layer, at an address that patched nodes keep: they find the program through it, so a swap
 * touches no node. */
typedef struct {
    mien_hook *hook;
    int32_t layer;
    bool met, post, captured;
    mien_path path;
    int64_t expected;                       /* rows that the graphs have at this layer */
    _Atomic int64_t rows;                   /* rows steered */
    _Atomic double moved;
    int32_t capture_at;                     /* index in the capture buffer, or -1 */
    unsigned char custom[IMAGE_MAX];        /* op and parameters of our custom operation */
    unsigned char original[IMAGE_MAX];      /* of the ADD that it replaced */
} layer_slot;

struct mien_hook {
    ggml_functions ggml;
    tensor_layout layout;
    mien_path path;
    const char *reason;
    int32_t n_layer, n_embd;

    atomic_flag lock;                       /* guards `next`: held for a few instructions */
    mien_program *next;                     /* retained */
    mien_program *pinned;                   /* retained; what the running graph applies */
    bool in_scope;
    mien_status error;                      /* the first of this scope */

    int32_t last_layer;                     /* asked for last in this graph */
    int64_t graph_tokens, tokens_before;    /* in this graph; in the earlier graphs of this scope */

    struct {
        float *buffer;
        int32_t first, count;
        const int8_t *outputs;
    } capture;

    float *scratch;                         /* rows on their way from and to a device */
    size_t scratch_size;
    layer_slot slots[];
};

static void lock(mien_hook *hook) {
    while (atomic_flag_test_and_set_explicit(&hook->lock, memory_order_acquire)) {}
}

static void unlock(mien_hook *hook) { atomic_flag_clear_explicit(&hook->lock, memory_order_release); }

static void fail(mien_hook *hook, mien_status status) {
    if (hook->error == MIEN_OK) hook->error = status;
}

static void pin(mien_hook *hook, mien_program *program) {
    mien_program *old = hook->pinned;
    hook->pinned = program;
    mien_program_release(old);
}

static void note_steered(layer_slot *slot, int64_t rows, double moved) {
    atomic_fetch_add_explicit(&slot->rows, rows, memory_order_relaxed);
    double sum = atomic_load_explicit(&slot->moved, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&slot->moved, &sum, sum + moved, memory_order_relaxed,
                                                  memory_order_relaxed)) {}
}

/* ---- in the graph ------------------------------------------------------------------------------- */

/* dst = a + b, then the program on each row: what the node did, and ours. ggml calls it once a thread;
 * rows are split, never a row, so that the sums of a row don't depend on the number of threads. */
static void add_and_steer(ggml_tensor *dst, const ggml_tensor *a, const ggml_tensor *b, int ith, int nth, void *user) {
    layer_slot *slot = user;
    mien_hook *hook = slot->hook;
    const ggml_functions *ggml = &hook->ggml;
    const int64_t rows = ggml->ggml_nrows(dst), first = rows * ith / nth, last = rows * (ith + 1) / nth;
    if (first == last) return;
    const size_t n = (size_t)hook->n_embd, offset = (size_t)first * n, count = (size_t)(last - first);
    float *out = (float *)ggml->ggml_get_data(dst) + offset;
    mien_sum(out, (const float *)ggml->ggml_get_data(a) + offset, (const float *)ggml->ggml_get_data(b) + offset,
             count * n);
    note_steered(slot, last - first,
                 mien_program_apply(hook->pinned, MIEN_SITE_RESIDUAL, slot->layer, out, count));
}

/* Contiguous rows of n_embd float32: what every path needs. */
static bool is_rows(const mien_hook *hook, const ggml_tensor *t) {
    const ggml_functions *ggml = &hook->ggml;
    const int64_t elements = ggml->ggml_nelements(t);
    return ggml->ggml_nrows(t) * hook->n_embd == elements &&
           ggml->ggml_nbytes(t) == (size_t)elements * sizeof(float) && ggml->ggml_is_contiguous(t);
}

static void *pointer_at(const ggml_tensor *t, size_t offset) {
    void *value;
    memcpy(&value, (const char *)t + offset, sizeof value);
    return value;
}

static int32_t int_at(const ggml_tensor *t, size_t offset) {
    int32_t value;
    memcpy(&value, (const char *)t + offset, sizeof value);
    return value;
}

static bool in_cpu_memory(const mien_hook *hook, const ggml_tensor *t) {
    ggml_buffer *buffer = pointer_at(t, hook->layout.buffer);
    return buffer &&
           hook->ggml.ggml_backend_buffer_get_type(buffer) == hook->ggml.ggml_backend_cpu_buffer_type();
}

static bool is_ours(const layer_slot *slot, const ggml_tensor *t) {
    const tensor_layout *layout = &slot->hook->layout;
    return !memcmp((const char *)t + layout->op, slot->custom, layout->image_size);
}

/* An ADD of two like tensors that the CPU computes. Not so: a control vector set through llama.cpp
 * itself (its second source is one row), a scaled output, a layer on a device. */
static bool can_patch(const mien_hook *hook, const ggml_tensor *t) {
    if (int_at(t, hook->layout.op) != hook->layout.op_add || !in_cpu_memory(hook, t)) return false;
    const ggml_tensor *a = pointer_at(t, hook->layout.sources);
    const ggml_tensor *b = pointer_at(t, hook->layout.sources + sizeof(void *));
    return a && b && is_rows(hook, a) && is_rows(hook, b) && hook->ggml.ggml_are_same_shape(t, a) &&
           hook->ggml.ggml_are_same_shape(t, b);
}

static void patch(layer_slot *slot, ggml_tensor *t) {
    const tensor_layout *layout = &slot->hook->layout;
    memcpy(slot->original, (char *)t + layout->op, layout->image_size);
    memcpy((char *)t + layout->op, slot->custom, layout->image_size);
}

static void put_back(layer_slot *slot, ggml_tensor *t) {
    const tensor_layout *layout = &slot->hook->layout;
    memcpy((char *)t + layout->op, slot->original, layout->image_size);
}

/* ---- after the computation ---------------------------------------------------------------------- */

static float *scratch(mien_hook *hook, size_t size) {
    if (size > hook->scratch_size) {
        float *grown = realloc(hook->scratch, size);
        if (!grown) return NULL;
        hook->scratch = grown;
        hook->scratch_size = size;
    }
    return hook->scratch;
}

static void steer_computed(layer_slot *slot, ggml_tensor *t, int64_t rows) {
    mien_hook *hook = slot->hook;
    const size_t size = (size_t)rows * (size_t)hook->n_embd * sizeof(float);
    const bool direct = hook->layout.image_size && in_cpu_memory(hook, t);
    float *data = direct ? hook->ggml.ggml_get_data(t) : scratch(hook, size);
    if (!data) {
        fail(hook, MIEN_ERR_MEMORY);
        return;
    }
    if (!direct) hook->ggml.ggml_backend_tensor_get(t, data, 0, size);
    const double moved = mien_program_apply(hook->pinned, MIEN_SITE_RESIDUAL, slot->layer, data, (size_t)rows);
    if (!direct) hook->ggml.ggml_backend_tensor_set(t, data, 0, size);
    note_steered(slot, rows, moved);
}

/* Row r of a block's output is token r of the micro-batch, but in the last block only tokens whose
 * logits are asked for are left. Copies the rows whose token is in [first, first + count). */
static void capture_computed(layer_slot *slot, const ggml_tensor *t, int64_t rows) {
    mien_hook *hook = slot->hook;
    const size_t n = (size_t)hook->n_embd, row = n * sizeof(float);
    const bool only_outputs = slot->layer == hook->n_layer - 1 && rows != hook->graph_tokens;
    if (only_outputs ? !hook->capture.outputs : rows != hook->graph_tokens) {
        fail(hook, MIEN_ERR_TENSOR);
        return;
    }
    float *to = hook->capture.buffer + (size_t)slot->capture_at * (size_t)hook->capture.count * n;
    int64_t r = 0;
    for (int64_t i = 0; i < hook->graph_tokens && r < rows; i++) {
        const int64_t token = hook->tokens_before + i;
        if (only_outputs && !hook->capture.outputs[token]) continue;
        const int64_t index = token - hook->capture.first;
        if (index >= 0 && index < hook->capture.count)
            hook->ggml.ggml_backend_tensor_get(t, to + (size_t)index * n, (size_t)r * row, row);
        r++;
    }
}

/* ---- the callback ------------------------------------------------------------------------------- */

/* The N of a node named "l_out-N", else -1. Views of it carry a suffix and are not it. */
static int32_t layer_of(const char *name) {
    static const char prefix[] = "l_out-";
    if (strncmp(name, prefix, sizeof prefix - 1)) return -1;
    const char *digit = name + sizeof prefix - 1;
    int32_t layer = 0, digits = 0;
    for (; *digit >= '0' && *digit <= '9' && digits < 6; digit++, digits++) layer = layer * 10 + (*digit - '0');
    return digits && !*digit ? layer : -1;
}

static void forget_graphs(mien_hook *hook) {
    hook->last_layer = -1;
    hook->graph_tokens = hook->tokens_before = 0;
    hook->error = MIEN_OK;
    for (int32_t i = 0; i < hook->n_layer; i++) {
        layer_slot *slot = &hook->slots[i];
        slot->met = slot->post = slot->captured = false;
        slot->path = MIEN_PATH_AUTO;
        slot->expected = 0;
        atomic_store_explicit(&slot->rows, 0, memory_order_relaxed);
        atomic_store_explicit(&slot->moved, 0.0, memory_order_relaxed);
    }
}

/* Layers are asked for in ascending order, so one that does not ascend begins the next micro-batch. */
static void begin_graph(mien_hook *hook, int64_t rows) {
    if (!hook->in_scope) {
        forget_graphs(hook);
        lock(hook);
        mien_program *program = mien_program_retain(hook->next);
        unlock(hook);
        pin(hook, program);
    }
    hook->tokens_before += hook->graph_tokens;
    hook->graph_tokens = rows;
}

static bool on_ask(layer_slot *slot, ggml_tensor *t) {
    mien_hook *hook = slot->hook;
    const int64_t rows = hook->ggml.ggml_nrows(t);
    if (hook->last_layer < 0 || slot->layer <= hook->last_layer) begin_graph(hook, rows);
    hook->last_layer = slot->layer;
    slot->met = true;

    const bool patched = hook->path == MIEN_PATH_IN_GRAPH && is_ours(slot, t);
    const bool acts = mien_program_acts(hook->pinned, MIEN_SITE_RESIDUAL, slot->layer);
    slot->captured = hook->in_scope && hook->capture.buffer && slot->capture_at >= 0;
    if ((acts || slot->captured) && !is_rows(hook, t)) {
        fail(hook, MIEN_ERR_TENSOR);
        slot->captured = slot->post = false;
        return false;
    }
    slot->post = acts;
    if (acts) {
        slot->expected += rows;
        slot->path = MIEN_PATH_POST;
        if (patched || (hook->path == MIEN_PATH_IN_GRAPH && can_patch(hook, t))) {
            if (!patched) patch(slot, t);
            slot->path = MIEN_PATH_IN_GRAPH;
            slot->post = false;
        }
    } else if (patched) {
        put_back(slot, t);
    }
    return slot->post || slot->captured;
}

bool mien_hook_eval(void *tensor, bool ask, void *user_data) {
    mien_hook *hook = user_data;
    ggml_tensor *t = tensor;
    if (ask && hook->path == MIEN_PATH_IN_GRAPH) {
        const int32_t op = int_at(t, hook->layout.op);
        if (op > 0 && (size_t)op < sizeof hook->layout.never / sizeof(bool) && hook->layout.never[op]) return false;
    }
    const int32_t layer = layer_of(hook->ggml.ggml_get_name(t));
    if (layer < 0 || layer >= hook->n_layer) return !ask; /* false after a computation would stop it */
    layer_slot *slot = &hook->slots[layer];
    if (ask) return on_ask(slot, t);
    const int64_t rows = hook->ggml.ggml_nrows(t);
    if (slot->post && rows) steer_computed(slot, t, rows);
    if (slot->captured && rows) capture_computed(slot, t, rows);
    return true;
}

/* ---- finding the layout ------------------------------------------------------------------------- */

/* Operation parameters are int32s, so a pointer among them need not be aligned as one. */
static bool find_pointer(const ggml_tensor *t, size_t size, const void *value, size_t *offset) {
    for (size_t at = 0; at + sizeof value <= size; at += sizeof(int32_t))
        if (pointer_at(t, at) == value) {
            *offset = at;
            return true;
        }
    return false;
}

/* The number of t's operation if it is called `name`, else -1. ggml_op_name does not check its argument,
 * so the count goes up and ends at the operation that t is known to have. */
static int32_t op_number(const ggml_functions *ggml, const ggml_tensor *t, const char *name) {
    if (strcmp(ggml->ggml_op_desc(t), name)) return -1;
    int32_t op = 1;
    while (strcmp(ggml->ggml_op_name(op), name)) op++;
    return op;
}

static void find_never_outputs(const ggml_functions *ggml, tensor_layout *layout, int32_t known) {
    const size_t n = sizeof never_outputs / sizeof *never_outputs, room = sizeof layout->never / sizeof(bool);
    for (int32_t op = 1; op < known && (size_t)op < room; op++)
        for (size_t i = 0; i < n; i++)
            if (!strcmp(ggml->ggml_op_name(op), never_outputs[i])) layout->never[op] = true;
}

/* Makes tensors through the public API and looks for their known values. NULL when everything was
 * found and agrees, else what was not. `tensors` holds a spare at the end, so that scanning a whole
 * tensor_overhead from the start of another stays inside the context's memory. */
static const char *find_layout(mien_hook *hook, ggml_context *context) {
    const ggml_functions *ggml = &hook->ggml;
    tensor_layout *layout = &hook->layout;
    const size_t size = ggml->ggml_tensor_overhead() < SCAN_MAX ? ggml->ggml_tensor_overhead() : SCAN_MAX;
    ggml_tensor *a = ggml->ggml_new_tensor_2d(context, GGML_TYPE_F32, 7, 3);
    ggml_tensor *b = ggml->ggml_new_tensor_2d(context, GGML_TYPE_F32, 7, 3);
    if (!a || !b) return "tensors can't be made";
    ggml_tensor *sum = ggml->ggml_add(context, a, b);
    if (!sum) return "tensors can't be made";
    int32_t op_custom = 0;
    for (int32_t i = 0; i < hook->n_layer; i++) {
        layer_slot *slot = &hook->slots[i];
        ggml_tensor *custom = ggml->ggml_map_custom2(context, a, b, add_and_steer, GGML_N_TASKS_MAX, slot);
        if (!custom || !ggml->ggml_new_tensor_2d(context, GGML_TYPE_F32, 1, 1)) return "tensors can't be made";
        size_t function, user;
        custom_function steer = add_and_steer;
        void *address;
        memcpy(&address, &steer, sizeof address);
        if (!find_pointer(custom, size, address, &function) || !find_pointer(custom, size, slot, &user) ||
            function < sizeof(int32_t) || user <= function)
            return "a custom operation's parameters were not found";
        const size_t op = function - sizeof(int32_t), image_size = user + sizeof(void *) - op;
        if (image_size > IMAGE_MAX || (i && (op != layout->op || image_size != layout->image_size)))
            return "a custom operation's parameters are not where they should be";
        layout->op = op;
        layout->image_size = image_size;
        layout->op_add = op_number(ggml, sum, "ADD");
        op_custom = op_number(ggml, custom, "MAP_CUSTOM2");
        if (layout->op_add < 0 || int_at(sum, op) != layout->op_add || int_at(custom, op) != op_custom)
            return "the operation's number does not verify";
        memcpy(slot->custom, (char *)custom + op, image_size);
    }
    find_never_outputs(ggml, layout, op_custom);
    if (!find_pointer(sum, size, a, &layout->sources) || pointer_at(sum, layout->sources + sizeof(void *)) != b)
        return "the operation's sources were not found";
    ggml_buffer *buffer =
        ggml->ggml_backend_alloc_ctx_tensors_from_buft(context, ggml->ggml_backend_cpu_buffer_type());
    if (!buffer) return "a buffer can't be made";
    const bool found = find_pointer(a, size, buffer, &layout->buffer) &&
                       pointer_at(b, layout->buffer) == (void *)buffer && in_cpu_memory(hook, a);
    ggml->ggml_backend_buffer_free(buffer);
    return found ? NULL : "the tensor's buffer was not found";
}

static const char *probe(mien_hook *hook) {
    const ggml_functions *ggml = &hook->ggml;
    const size_t tensors = 2 * (size_t)hook->n_layer + 8;
    ggml_init_params parameters = {ggml->ggml_tensor_overhead() * tensors + SCAN_MAX, NULL, true};
    ggml_context *context = ggml->ggml_init(parameters);
    if (!context) return "a context can't be made";
    const char *problem = find_layout(hook, context);
    ggml->ggml_free(context);
    if (problem) hook->layout = (tensor_layout){0};
    return problem;
}

/* ---- life --------------------------------------------------------------------------------------- */

mien_status mien_hook_new(mien_hook **out, void *const *symbols, int32_t n_layer, int32_t n_embd, mien_path path) {
    *out = NULL;
    if (n_layer <= 0 || n_embd <= 0 || (size_t)n_layer > (SIZE_MAX - sizeof(mien_hook)) / sizeof(layer_slot))
        return MIEN_ERR_SHAPE;
    bool all = true;
    for (size_t i = 0; i < N_SYMBOLS; i++) {
        if (!symbols[i] && symbol_needed[i]) return MIEN_ERR_SYMBOL;
        all = all && symbols[i];
    }
    mien_hook *hook = calloc(1, sizeof(mien_hook) + (size_t)n_layer * sizeof(layer_slot));
    if (!hook) return MIEN_ERR_MEMORY;
    memcpy(&hook->ggml, symbols, sizeof hook->ggml);
    hook->n_layer = n_layer;
    hook->n_embd = n_embd;
    atomic_flag_clear(&hook->lock);
    for (int32_t i = 0; i < n_layer; i++) {
        hook->slots[i].hook = hook;
        hook->slots[i].layer = i;
        hook->slots[i].capture_at = -1;
        atomic_init(&hook->slots[i].rows, 0);
        atomic_init(&hook->slots[i].moved, 0.0);
    }
    forget_graphs(hook);

    const char *problem = all ? probe(hook) : "the library lacks functions that it needs";
    hook->path = problem || path == MIEN_PATH_POST ? MIEN_PATH_POST : MIEN_PATH_IN_GRAPH;
    hook->reason = problem ? problem : path == MIEN_PATH_POST ? "asked for" : "the tensor layout was verified";
    *out = hook;
    return MIEN_OK;
}

void mien_hook_free(mien_hook *hook) {
    if (!hook) return;
    mien_program_release(hook->next);
    mien_program_release(hook->pinned);
    free(hook->scratch);
    free(hook);
}

mien_path mien_hook_path(const mien_hook *hook) { return hook->path; }

const char *mien_hook_reason(const mien_hook *hook) { return hook->reason; }

mien_status mien_hook_swap(mien_hook *hook, mien_program *program) {
    if (!mien_program_fits(program, hook->n_layer, hook->n_embd)) return MIEN_ERR_SHAPE;
    mien_program_retain(program);
    lock(hook);
    mien_program *old = hook->next;
    hook->next = program;
    unlock(hook);
    mien_program_release(old);
    return MIEN_OK;
}

/* ---- a decode ----------------------------------------------------------------------------------- */

mien_status mien_hook_begin(mien_hook *hook, mien_program *program) {
    if (!mien_program_fits(program, hook->n_layer, hook->n_embd)) return MIEN_ERR_SHAPE;
    forget_graphs(hook);
    pin(hook, mien_program_retain(program));
    hook->in_scope = true;
    return MIEN_OK;
}

mien_status mien_hook_end(mien_hook *hook) {
    mien_status status = hook->error;
    for (int32_t i = 0; i < hook->n_layer && status == MIEN_OK; i++) {
        layer_slot *slot = &hook->slots[i];
        if (!mien_program_acts(hook->pinned, MIEN_SITE_RESIDUAL, i)) continue;
        if (!slot->met)
            status = MIEN_ERR_NOT_MET;
        else if (atomic_load_explicit(&slot->rows, memory_order_relaxed) != slot->expected)
            status = MIEN_ERR_NOT_APPLIED;
    }
    hook->in_scope = false;
    hook->last_layer = -1;
    pin(hook, NULL);
    return status;
}

void mien_hook_capture(mien_hook *hook, float *buffer, const int32_t *layers, int32_t n_layers,
                       int32_t first, int32_t count, const int8_t *outputs) {
    for (int32_t i = 0; i < hook->n_layer; i++) hook->slots[i].capture_at = -1;
    for (int32_t i = 0; buffer && i < n_layers; i++)
        if (layers[i] >= 0 && layers[i] < hook->n_layer) hook->slots[layers[i]].capture_at = i;
    hook->capture.buffer = buffer;
    hook->capture.first = first;
    hook->capture.count = count;
    hook->capture.outputs = outputs;
}

mien_applied mien_hook_applied(const mien_hook *hook, int32_t layer) {
    if (layer < 0 || layer >= hook->n_layer) return (mien_applied){0, 0.0, MIEN_PATH_AUTO, false};
    const layer_slot *slot = &hook->slots[layer];
    return (mien_applied){atomic_load_explicit(&slot->rows, memory_order_relaxed),
                          atomic_load_explicit(&slot->moved, memory_order_relaxed), slot->path, slot->met};
}
