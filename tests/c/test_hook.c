/* The llama.cpp hook against a ggml of our own: the same functions by name, a tensor laid out as the real
 * one is or in ways that must be found out, and a scheduler that asks and computes as the real one does. */
#include "testing.h"

#include <math.h>
#include <pthread.h>

#include "mien_llama.h"

enum { LAYERS = 4, EMBD = 12, MAX_ROWS = 8, MAX_NODES = 2 * LAYERS + 5, MAX_SYMBOLS = 64 };

#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* ---- a fake ggml -------------------------------------------------------------------------------- */

enum { TYPE_F32 = 0, TYPE_F16 = 1 };
enum { OP_NONE, OP_DUP, OP_ADD, OP_MUL, OP_GATHER, OP_MAP_CUSTOM2, OP_COUNT };

typedef struct {
    int unused;
} fake_buffer_type;

typedef struct {
    fake_buffer_type *type;
} fake_buffer;

typedef struct fake_tensor fake_tensor;
struct fake_tensor {
    int32_t type;
    fake_buffer *buffer;
    int64_t ne[4];
    size_t nb[4];
    int32_t op;
    int32_t op_params[16]; /* not aligned for pointers, as in ggml */
    int32_t flags;
    fake_tensor *src[10];
    void *data;
    char name[64];
    float *device; /* where the values of a device tensor are; `data` leads nowhere then */
};

typedef void (*custom_function)(fake_tensor *, const fake_tensor *, const fake_tensor *, int, int, void *);
typedef struct {
    custom_function function;
    int n_tasks;
    void *user;
} custom_params;

typedef struct {
    size_t mem_size;
    void *mem_buffer;
    bool no_alloc;
} init_params;

typedef struct {
    char *memory;
    size_t used, size;
    int n_tensors;
    fake_tensor *tensors[MAX_SYMBOLS];
} fake_context;

/* What is odd about this ggml. */
typedef enum {
    SOUND,
    LARGE_TENSORS,
    NO_CONTEXT,
    NO_TENSORS,
    NO_ADD,
    NO_CUSTOM,
    CUSTOM_STORES_NOTHING,
    USER_DATA_FIRST,
    USER_DATA_FAR,
    PARAMS_MOVE,
    OP_ELSEWHERE,
    OP_NAMES_DIFFER,
    SOURCES_APART,
    NO_BUFFER,
    BUFFERS_HIDDEN,
    BUFFER_TYPES_LIE
} oddity;
static oddity odd;

static fake_buffer_type cpu_type, device_type;
static fake_buffer cpu_buffer = {&cpu_type}, device_buffer = {&device_type};
static long tensor_gets, tensor_sets;

static const char *ggml_get_name(const fake_tensor *t) { return t->name; }
static void *ggml_get_data(const fake_tensor *t) { return t->data; }
static int64_t ggml_nrows(const fake_tensor *t) { return t->ne[1] * t->ne[2] * t->ne[3]; }
static int64_t ggml_nelements(const fake_tensor *t) { return t->ne[0] * ggml_nrows(t); }

static size_t ggml_nbytes(const fake_tensor *t) {
    if (!ggml_nelements(t)) return 0;
    size_t bytes = t->type == TYPE_F32 ? 4 : 2;
    for (int i = 0; i < 4; i++) bytes += (size_t)(t->ne[i] - 1) * t->nb[i];
    return bytes;
}

static bool ggml_is_contiguous(const fake_tensor *t) {
    size_t expected = t->type == TYPE_F32 ? 4 : 2;
    for (int i = 0; i < 4; i++) {
        if (t->nb[i] != expected) return false;
        expected *= (size_t)t->ne[i];
    }
    return true;
}

static float *values(const fake_tensor *t) { return t->device ? t->device : t->data; }

static void ggml_backend_tensor_get(const fake_tensor *t, void *to, size_t offset, size_t size) {
    CHECK(offset + size <= ggml_nbytes(t));
    memcpy(to, (char *)values(t) + offset, size);
    tensor_gets++;
}

static void ggml_backend_tensor_set(fake_tensor *t, const void *from, size_t offset, size_t size) {
    CHECK(offset + size <= ggml_nbytes(t));
    memcpy((char *)values(t) + offset, from, size);
    tensor_sets++;
}

enum { OBJECT_HEADER = 32 };

static size_t ggml_tensor_overhead(void) {
    return odd == LARGE_TENSORS ? 8192 : OBJECT_HEADER + sizeof(fake_tensor);
}

static fake_context *ggml_init(init_params parameters) {
    CHECK(parameters.no_alloc && !parameters.mem_buffer);
    if (odd == NO_CONTEXT) return NULL;
    fake_context *context = calloc(1, sizeof *context);
    context->size = parameters.mem_size;
    context->memory = malloc(parameters.mem_size);
    memset(context->memory, 0xA5, parameters.mem_size);
    return context;
}

static void ggml_free(fake_context *context) {
    free(context->memory);
    free(context);
}

static void shape(fake_tensor *t, int32_t type, int64_t columns, int64_t n_rows) {
    const size_t size = type == TYPE_F32 ? 4 : 2;
    t->type = type;
    t->ne[0] = columns, t->ne[1] = n_rows, t->ne[2] = t->ne[3] = 1;
    t->nb[0] = size, t->nb[1] = size * (size_t)columns, t->nb[2] = t->nb[3] = t->nb[1] * (size_t)n_rows;
}

static fake_tensor *ggml_new_tensor_2d(fake_context *context, int type, int64_t columns, int64_t n_rows) {
    if (odd == NO_TENSORS || !CHECK(context->used + ggml_tensor_overhead() <= context->size)) return NULL;
    fake_tensor *t = (fake_tensor *)(context->memory + context->used + OBJECT_HEADER);
    context->used += ggml_tensor_overhead();
    memset(t, 0, sizeof *t);
    shape(t, type, columns, n_rows);
    context->tensors[context->n_tensors++] = t;
    return t;
}

static void set_op(fake_tensor *t, int32_t op) { *(odd == OP_ELSEWHERE ? &t->flags : &t->op) = op; }

static fake_tensor *ggml_add(fake_context *context, fake_tensor *a, fake_tensor *b) {
    fake_tensor *t = odd == NO_ADD ? NULL : ggml_new_tensor_2d(context, a->type, a->ne[0], a->ne[1]);
    if (!t) return NULL;
    set_op(t, OP_ADD);
    t->src[0] = a;
    t->src[odd == SOURCES_APART ? 2 : 1] = b;
    return t;
}

static fake_tensor *ggml_map_custom2(fake_context *context, fake_tensor *a, fake_tensor *b, custom_function function,
                                     int n_tasks, void *user) {
    fake_tensor *t = odd == NO_CUSTOM ? NULL : ggml_new_tensor_2d(context, a->type, a->ne[0], a->ne[1]);
    if (!t) return NULL;
    custom_params params;
    memset(&params, 0, sizeof params);
    params.function = function, params.n_tasks = n_tasks, params.user = user;
    set_op(t, OP_MAP_CUSTOM2);
    t->src[0] = a, t->src[1] = b;
    if (odd == USER_DATA_FIRST) {
        memcpy(t->op_params, &user, sizeof user);
        memcpy(t->op_params + 4, &function, sizeof function);
    } else if (odd == USER_DATA_FAR) {
        memcpy(t->op_params, &function, sizeof function);
        memcpy(t->name + 8, &user, sizeof user);
    } else if (odd != CUSTOM_STORES_NOTHING) {
        const int shift = odd == PARAMS_MOVE ? context->n_tensors - 4 : 0; /* none for the first */
        memcpy(t->op_params + shift, &params, sizeof params);
    }
    return t;
}

static const char *ggml_op_name(int op) {
    static const char *const names[] = {"NONE", "DUP", "ADD", "MUL", "GATHER", "MAP_CUSTOM2"};
    if (odd == OP_NAMES_DIFFER) return "SOMETHING";
    return CHECK(op >= 0 && op < OP_COUNT) ? names[op] : ""; /* the real one does not check */
}

static const char *ggml_op_desc(const fake_tensor *t) { return ggml_op_name(odd == OP_ELSEWHERE ? t->flags : t->op); }

static bool ggml_are_same_shape(const fake_tensor *a, const fake_tensor *b) {
    return !memcmp(a->ne, b->ne, sizeof a->ne);
}

static fake_buffer_type *ggml_backend_cpu_buffer_type(void) { return &cpu_type; }

static fake_buffer *ggml_backend_alloc_ctx_tensors_from_buft(fake_context *context, fake_buffer_type *type) {
    if (odd == NO_BUFFER) return NULL;
    fake_buffer *buffer = malloc(sizeof *buffer);
    buffer->type = type;
    for (int i = 0; i < context->n_tensors && odd != BUFFERS_HIDDEN; i++) context->tensors[i]->buffer = buffer;
    return buffer;
}

static fake_buffer_type *ggml_backend_buffer_get_type(fake_buffer *buffer) {
    return odd == BUFFER_TYPES_LIE ? NULL : buffer->type;
}

static void ggml_backend_buffer_free(fake_buffer *buffer) { free(buffer); }

typedef void (*any_function)(void);
static const struct {
    const char *name;
    any_function address;
    bool needed;
} fake_ggml[] = {
    {"ggml_get_name", (any_function)ggml_get_name, true},
    {"ggml_get_data", (any_function)ggml_get_data, true},
    {"ggml_nrows", (any_function)ggml_nrows, true},
    {"ggml_nelements", (any_function)ggml_nelements, true},
    {"ggml_nbytes", (any_function)ggml_nbytes, true},
    {"ggml_is_contiguous", (any_function)ggml_is_contiguous, true},
    {"ggml_backend_tensor_get", (any_function)ggml_backend_tensor_get, true},
    {"ggml_backend_tensor_set", (any_function)ggml_backend_tensor_set, true},
    {"ggml_init", (any_function)ggml_init, false},
    {"ggml_free", (any_function)ggml_free, false},
    {"ggml_tensor_overhead", (any_function)ggml_tensor_overhead, false},
    {"ggml_new_tensor_2d", (any_function)ggml_new_tensor_2d, false},
    {"ggml_add", (any_function)ggml_add, false},
    {"ggml_map_custom2", (any_function)ggml_map_custom2, false},
    {"ggml_op_name", (any_function)ggml_op_name, false},
    {"ggml_op_desc", (any_function)ggml_op_desc, false},
    {"ggml_are_same_shape", (any_function)ggml_are_same_shape, false},
    {"ggml_backend_cpu_buffer_type", (any_function)ggml_backend_cpu_buffer_type, false},
    {"ggml_backend_alloc_ctx_tensors_from_buft", (any_function)ggml_backend_alloc_ctx_tensors_from_buft, false},
    {"ggml_backend_buffer_get_type", (any_function)ggml_backend_buffer_get_type, false},
    {"ggml_backend_buffer_free", (any_function)ggml_backend_buffer_free, false},
};

/* The addresses in the hook's order, without the function `lacking`. */
static void find_symbols(void **addresses, const char *lacking) {
    CHECK(mien_hook_symbol_count() <= MAX_SYMBOLS);
    for (size_t i = 0; i < mien_hook_symbol_count(); i++) {
        addresses[i] = NULL;
        for (size_t f = 0; f < LENGTH(fake_ggml); f++)
            if (!strcmp(fake_ggml[f].name, mien_hook_symbol(i)) && (!lacking || strcmp(lacking, mien_hook_symbol(i))))
                memcpy(&addresses[i], &fake_ggml[f].address, sizeof(void *));
    }
}

static mien_hook *new_hook(mien_path path) {
    void *addresses[MAX_SYMBOLS];
    mien_hook *hook = NULL;
    find_symbols(addresses, NULL);
    CHECK(mien_hook_new(&hook, addresses, LAYERS, EMBD, path) == MIEN_OK);
    return hook;
}

/* ---- a fake model and its scheduler ------------------------------------------------------------- */

/* One micro-batch: x = input; at each layer x = x + delta. The last block keeps `n_outputs` rows. */
typedef struct {
    int64_t n_rows, n_outputs;
    int32_t output_rows[MAX_ROWS];
    fake_tensor leaves[LAYERS + 1], tensors[MAX_NODES];
    float leaf_data[LAYERS + 1][MAX_ROWS * EMBD], data[MAX_NODES][MAX_ROWS * EMBD];
    int n_nodes;
    fake_tensor *outputs[LAYERS];
    float seen[LAYERS][MAX_ROWS * EMBD]; /* each block's output as the next node finds it */
    const fake_tensor *never_computed;
} graph;

static fake_tensor *add_node(graph *g, int32_t op, const char *name, int64_t n_rows, fake_tensor *a, fake_tensor *b) {
    fake_tensor *t = &g->tensors[g->n_nodes];
    shape(t, TYPE_F32, EMBD, n_rows);
    t->buffer = &cpu_buffer;
    t->data = g->data[g->n_nodes++];
    t->op = op;
    t->src[0] = a, t->src[1] = b;
    snprintf(t->name, sizeof t->name, "%s", name);
    return t;
}

static graph *new_graph(int64_t n_rows, const int8_t *outputs) {
    graph *g = calloc(1, sizeof *g);
    g->n_rows = n_rows;
    for (int32_t i = 0; i < n_rows; i++)
        if (!outputs || outputs[i]) g->output_rows[g->n_outputs++] = i;
    for (int i = 0; i <= LAYERS; i++) {
        shape(&g->leaves[i], TYPE_F32, EMBD, n_rows);
        fill_random(g->leaf_data[i], MAX_ROWS * EMBD);
        g->leaves[i].buffer = &cpu_buffer;
        g->leaves[i].data = g->leaf_data[i];
    }
    fake_tensor *x = add_node(g, OP_DUP, "inp_embd", n_rows, &g->leaves[LAYERS], NULL);
    for (int i = 0; i < LAYERS; i++) {
        char name[64];
        snprintf(name, sizeof name, "ffn_out-%d", i);
        fake_tensor *delta = add_node(g, OP_DUP, name, n_rows, &g->leaves[i], NULL);
        if (i == LAYERS - 1 && g->n_outputs != n_rows) {
            x = add_node(g, OP_GATHER, "node_1", g->n_outputs, x, NULL);
            delta = add_node(g, OP_GATHER, "node_2", g->n_outputs, delta, NULL);
        }
        snprintf(name, sizeof name, "l_out-%d", i);
        fake_tensor *sum = add_node(g, OP_ADD, name, x->ne[1], x, delta);
        if (i % 2) sum->data = x->data; /* ggml's allocator adds in place where it can */
        g->outputs[i] = x = sum;
        if (i == 1) x = add_node(g, OP_DUP, "CPU#l_out-1#0", n_rows, x, NULL); /* the scheduler's copies */
    }
    return g;
}

/* As ggml does where a graph can't be used again: the same nodes, made anew in the same memory. */
static void rebuild(graph *g) {
    for (int layer = 0; layer < LAYERS; layer++) {
        memset(g->outputs[layer]->op_params, 0, sizeof g->outputs[layer]->op_params);
        g->outputs[layer]->op = OP_ADD;
    }
}

/* Layer 1 is computed on a device, from where the graph has its output copied back. */
static void make_device(graph *g) {
    fake_tensor *t = g->outputs[1];
    t->buffer = &device_buffer;
    t->device = g->data[t - g->tensors];
    t->data = (void *)(uintptr_t)16;
}

static bool real_threads; /* else one calls after the other */

typedef struct {
    fake_tensor *t;
    custom_params params;
    int ith, nth;
} custom_task;

static void *run_task(void *argument) {
    const custom_task *task = argument;
    task->params.function(task->t, task->t->src[0], task->t->src[1], task->ith, task->nth, task->params.user);
    return NULL;
}

static void compute(const graph *g, fake_tensor *t, int nth) {
    if (t == g->never_computed) return;
    const size_t n = (size_t)t->ne[0], n_rows = (size_t)t->ne[1];
    const float *a = values(t->src[0]), *b = t->src[1] ? values(t->src[1]) : NULL;
    float *out = values(t);
    if (t->op == OP_MAP_CUSTOM2) {
        custom_task tasks[8];
        pthread_t threads[8];
        for (int i = 0; i < nth; i++) {
            tasks[i].t = t, tasks[i].ith = i, tasks[i].nth = nth;
            memcpy(&tasks[i].params, t->op_params, sizeof tasks[i].params);
            CHECK(tasks[i].params.n_tasks == -1);
            if (!real_threads)
                run_task(&tasks[i]);
            else
                CHECK(!pthread_create(&threads[i], NULL, run_task, &tasks[i]));
        }
        for (int i = 0; real_threads && i < nth; i++) pthread_join(threads[i], NULL);
        return;
    }
    for (size_t r = 0; r < n_rows; r++)
        for (size_t i = 0; i < n; i++)
            switch (t->op) {
            case OP_DUP: out[r * n + i] = a[r * n + i]; break;
            case OP_GATHER: out[r * n + i] = a[(size_t)g->output_rows[r] * n + i]; break;
            case OP_ADD: out[r * n + i] = a[r * n + i] + b[r % (size_t)t->src[1]->ne[1] * n + i]; break;
            case OP_MUL: out[r * n + i] = a[r * n + i] * b[r * n + i]; break;
            default: CHECK(!"an operation that there is");
            }
}

static void keep_output(graph *g, const fake_tensor *t) {
    for (int layer = 0; layer < LAYERS; layer++)
        if (g->outputs[layer] == t) memcpy(g->seen[layer], values(t), ggml_nbytes(t));
}

/* As ggml_backend_sched does: ask node after node until one is wanted, compute them all, hand that one
 * over. False where the callback stopped it. */
static bool evaluate(graph *g, mien_hook *hook, int nth) {
    for (int first = 0; first < g->n_nodes;) {
        int last = first;
        bool wanted = mien_hook_eval(&g->tensors[last], true, hook);
        while (!wanted && last + 1 < g->n_nodes) wanted = mien_hook_eval(&g->tensors[++last], true, hook);
        for (; first <= last; first++) {
            compute(g, &g->tensors[first], nth);
            if (first == last && wanted && !mien_hook_eval(&g->tensors[last], false, hook)) return false;
            keep_output(g, &g->tensors[first]);
        }
    }
    return true;
}

/* ---- what a program should do ------------------------------------------------------------------- */

typedef struct {
    bool at[LAYERS];
    float direction[LAYERS][EMBD];
    mien_program *program;
} steer;

static const steer nothing;

/* One acting at each of the layers in `layers`, a string of digits. */
static steer new_steer(const char *layers) {
    steer s = {{0}, {{0}}, NULL};
    int32_t ids[LAYERS];
    float rows[LAYERS * EMBD];
    size_t count = 0;
    for (; layers[count]; count++) {
        ids[count] = layers[count] - '0';
        s.at[ids[count]] = true;
        fill_random(s.direction[ids[count]], EMBD);
        memcpy(rows + count * EMBD, s.direction[ids[count]], sizeof s.direction[0]);
    }
    const mien_term term = {MIEN_OP_ADD, MIEN_SITE_RESIDUAL, 1.0, count, ids, rows};
    CHECK(mien_program_new(&s.program, LAYERS, EMBD, &term, 1) == MIEN_OK);
    return s;
}

/* The blocks' outputs under `s`, long-hand, and the squared shift at each layer. */
static void long_hand(const graph *g, const steer *s, float out[LAYERS][MAX_ROWS * EMBD], double moved[LAYERS]) {
    for (int64_t r = 0; r < g->n_rows; r++) {
        float x[EMBD];
        memcpy(x, g->leaf_data[LAYERS] + r * EMBD, sizeof x);
        for (int layer = 0; layer < LAYERS; layer++) {
            int64_t at = r;
            if (layer == LAYERS - 1)
                for (at = 0; at < g->n_outputs && g->output_rows[at] != r;) at++;
            if (layer == LAYERS - 1 && at == g->n_outputs) continue;
            if (!r || (layer == LAYERS - 1 && !at)) moved[layer] = 0;
            for (int i = 0; i < EMBD; i++) {
                x[i] = x[i] + g->leaf_data[layer][r * EMBD + i];
                if (!s->at[layer]) continue;
                const float before = x[i];
                x[i] = before + s->direction[layer][i];
                moved[layer] += ((double)x[i] - (double)before) * ((double)x[i] - (double)before);
            }
            memcpy(out[layer] + at * EMBD, x, sizeof x);
        }
    }
}

static bool outputs_are(const graph *g, const steer *s) {
    float expected[LAYERS][MAX_ROWS * EMBD];
    double moved[LAYERS];
    long_hand(g, s, expected, moved);
    bool same = true;
    for (int layer = 0; layer < LAYERS; layer++)
        same = same && same_bits(g->seen[layer], expected[layer], (size_t)g->outputs[layer]->ne[1] * EMBD);
    return same;
}

static bool applied_is(const mien_hook *hook, const graph *g, const steer *s, const mien_path paths[LAYERS]) {
    float expected[LAYERS][MAX_ROWS * EMBD];
    double moved[LAYERS] = {0};
    long_hand(g, s, expected, moved);
    bool right = true;
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        const mien_applied applied = mien_hook_applied(hook, layer);
        right = right && applied.met && applied.rows == (s->at[layer] ? g->outputs[layer]->ne[1] : 0) &&
                applied.path == (s->at[layer] ? paths[layer] : MIEN_PATH_AUTO) &&
                about(applied.moved, s->at[layer] ? moved[layer] : 0);
    }
    return right;
}

static mien_status decode(mien_hook *hook, const steer *s, graph *g, int nth) {
    mien_hook_begin(hook, s->program);
    CHECK(evaluate(g, hook, nth));
    return mien_hook_end(hook);
}

static const mien_path all_in_graph[] = {MIEN_PATH_IN_GRAPH, MIEN_PATH_IN_GRAPH, MIEN_PATH_IN_GRAPH,
                                         MIEN_PATH_IN_GRAPH};
static const mien_path all_post[] = {MIEN_PATH_POST, MIEN_PATH_POST, MIEN_PATH_POST, MIEN_PATH_POST};
static const mien_path both_paths[] = {MIEN_PATH_IN_GRAPH, MIEN_PATH_POST};

/* ---- making a hook ------------------------------------------------------------------------------ */

static void the_symbols_are_the_ones_that_ggml_has(void) {
    void *addresses[MAX_SYMBOLS];
    find_symbols(addresses, NULL);
    CHECK(mien_hook_symbol_count() == LENGTH(fake_ggml));
    for (size_t i = 0; i < mien_hook_symbol_count(); i++) CHECK(addresses[i]);
    CHECK(!mien_hook_symbol(mien_hook_symbol_count()));
}

static void the_layout_decides_the_path_and_the_reason(void) {
    static const struct {
        oddity odd;
        mien_path asked, path;
        const char *reason;
    } table[] = {
        {SOUND, MIEN_PATH_AUTO, MIEN_PATH_IN_GRAPH, "the tensor layout was verified"},
        {SOUND, MIEN_PATH_IN_GRAPH, MIEN_PATH_IN_GRAPH, "the tensor layout was verified"},
        {SOUND, MIEN_PATH_POST, MIEN_PATH_POST, "asked for"},
        {LARGE_TENSORS, MIEN_PATH_AUTO, MIEN_PATH_IN_GRAPH, "the tensor layout was verified"},
        {NO_CONTEXT, MIEN_PATH_AUTO, MIEN_PATH_POST, "a context can't be made"},
        {NO_TENSORS, MIEN_PATH_AUTO, MIEN_PATH_POST, "tensors can't be made"},
        {NO_ADD, MIEN_PATH_AUTO, MIEN_PATH_POST, "tensors can't be made"},
        {NO_CUSTOM, MIEN_PATH_AUTO, MIEN_PATH_POST, "tensors can't be made"},
        {CUSTOM_STORES_NOTHING, MIEN_PATH_AUTO, MIEN_PATH_POST, "a custom operation's parameters were not found"},
        {USER_DATA_FIRST, MIEN_PATH_IN_GRAPH, MIEN_PATH_POST, "a custom operation's parameters were not found"},
        {USER_DATA_FAR, MIEN_PATH_AUTO, MIEN_PATH_POST, "a custom operation's parameters are not where they should be"},
        {PARAMS_MOVE, MIEN_PATH_AUTO, MIEN_PATH_POST, "a custom operation's parameters are not where they should be"},
        {OP_ELSEWHERE, MIEN_PATH_IN_GRAPH, MIEN_PATH_POST, "the operation's number does not verify"},
        {OP_NAMES_DIFFER, MIEN_PATH_AUTO, MIEN_PATH_POST, "the operation's number does not verify"},
        {SOURCES_APART, MIEN_PATH_AUTO, MIEN_PATH_POST, "the operation's sources were not found"},
        {NO_BUFFER, MIEN_PATH_AUTO, MIEN_PATH_POST, "a buffer can't be made"},
        {BUFFERS_HIDDEN, MIEN_PATH_AUTO, MIEN_PATH_POST, "the tensor's buffer was not found"},
        {BUFFER_TYPES_LIE, MIEN_PATH_AUTO, MIEN_PATH_POST, "the tensor's buffer was not found"},
    };
    graph *g = new_graph(3, NULL);
    const steer s = new_steer("123");
    for (size_t i = 0; i < LENGTH(table); i++) {
        odd = table[i].odd;
        const long before = live_blocks;
        mien_hook *hook = new_hook(table[i].asked);
        if (!CHECK(!strcmp(mien_hook_reason(hook), table[i].reason)))
            printf("  row %zu of the table gave: %s\n", i, mien_hook_reason(hook));
        CHECK(mien_hook_path(hook) == table[i].path);
        CHECK(live_blocks == before + 1); /* what the probe made is gone */
        CHECK(decode(hook, &s, g, 2) == MIEN_OK);
        CHECK(outputs_are(g, &s));
        CHECK(applied_is(hook, g, &s, table[i].path == MIEN_PATH_POST ? all_post : all_in_graph));
        CHECK(decode(hook, &nothing, g, 2) == MIEN_OK); /* the graph is the next row's */
        mien_hook_free(hook);
        CHECK(live_blocks == before);
    }
    odd = SOUND;
    mien_program_release(s.program);
    free(g);
}

static void a_lacking_function_is_an_error_where_needed_and_a_reason_where_not(void) {
    graph *g = new_graph(2, NULL);
    const steer s = new_steer("2");
    for (size_t f = 0; f < LENGTH(fake_ggml); f++) {
        void *addresses[MAX_SYMBOLS];
        mien_hook *hook = (mien_hook *)g;
        find_symbols(addresses, fake_ggml[f].name);
        const mien_status status = mien_hook_new(&hook, addresses, LAYERS, EMBD, MIEN_PATH_AUTO);
        if (fake_ggml[f].needed) {
            CHECK(status == MIEN_ERR_SYMBOL);
            CHECK(!hook);
            continue;
        }
        CHECK(status == MIEN_OK);
        CHECK(mien_hook_path(hook) == MIEN_PATH_POST);
        CHECK(!strcmp(mien_hook_reason(hook), "the library lacks functions that it needs"));
        CHECK(decode(hook, &s, g, 1) == MIEN_OK);
        CHECK(outputs_are(g, &s));
        mien_hook_free(hook);
    }
    mien_program_release(s.program);
    free(g);
}

static void a_model_without_layers_or_width_is_refused(void) {
    static const int32_t shapes[][2] = {{0, EMBD}, {-1, EMBD}, {LAYERS, 0}, {LAYERS, -8}, {INT32_MIN, INT32_MIN}};
    void *addresses[MAX_SYMBOLS];
    find_symbols(addresses, NULL);
    for (size_t i = 0; i < LENGTH(shapes); i++) {
        mien_hook *hook = (mien_hook *)addresses;
        CHECK(mien_hook_new(&hook, addresses, shapes[i][0], shapes[i][1], MIEN_PATH_AUTO) == MIEN_ERR_SHAPE);
        CHECK(!hook);
    }
    mien_hook_free(NULL);
}

static void a_program_of_another_model_is_refused_and_nothing_changes(void) {
    static const int32_t shapes[][2] = {{LAYERS + 1, EMBD}, {LAYERS - 1, EMBD}, {LAYERS, EMBD + 1}, {LAYERS, EMBD - 1}};
    graph *g = new_graph(3, NULL);
    const steer s = new_steer("1");
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    CHECK(mien_hook_swap(hook, s.program) == MIEN_OK);
    for (size_t i = 0; i < LENGTH(shapes); i++) {
        mien_program *other;
        CHECK(mien_program_new(&other, shapes[i][0], shapes[i][1], NULL, 0) == MIEN_OK);
        CHECK(mien_hook_swap(hook, other) == MIEN_ERR_SHAPE);
        CHECK(mien_hook_begin(hook, other) == MIEN_ERR_SHAPE);
        mien_program_release(other);
    }
    CHECK(evaluate(g, hook, 1));
    CHECK(outputs_are(g, &s)); /* what was swapped in before is still there */
    mien_hook_free(hook);
    mien_program_release(s.program);
    free(g);
}

static void failing_allocations_are_reported(void) {
    void *addresses[MAX_SYMBOLS];
    find_symbols(addresses, NULL);
    mien_hook *hook = (mien_hook *)addresses;
    fail_after = 0;
    CHECK(mien_hook_new(&hook, addresses, LAYERS, EMBD, MIEN_PATH_AUTO) == MIEN_ERR_MEMORY);
    fail_after = -1;
    CHECK(!hook);

    graph *g = new_graph(3, NULL);
    const steer s = new_steer("1");
    make_device(g); /* its rows go through memory that the hook allocates */
    hook = new_hook(MIEN_PATH_AUTO);
    fail_after = 0;
    CHECK(decode(hook, &s, g, 1) == MIEN_ERR_MEMORY);
    fail_after = -1;
    CHECK(outputs_are(g, &nothing));
    CHECK(decode(hook, &s, g, 1) == MIEN_OK);
    CHECK(outputs_are(g, &s));
    mien_hook_free(hook);
    mien_program_release(s.program);
    free(g);
}

/* ---- steering ----------------------------------------------------------------------------------- */

static void steering_is_plain_plus_direction_bit_for_bit(void) {
    static const char *const where[] = {"1", "3", "0123", "02"};
    for (size_t p = 0; p < LENGTH(both_paths); p++)
        for (size_t w = 0; w < LENGTH(where); w++)
            for (int64_t n_rows = 1; n_rows <= MAX_ROWS; n_rows++)
                for (int nth = 1; nth <= 3; nth++) {
                    mien_hook *hook = new_hook(both_paths[p]);
                    const steer s = new_steer(where[w]);
                    graph *g = new_graph(n_rows, NULL);
                    CHECK(decode(hook, &s, g, nth) == MIEN_OK);
                    CHECK(outputs_are(g, &s));
                    CHECK(applied_is(hook, g, &s, both_paths[p] == MIEN_PATH_POST ? all_post : all_in_graph));
                    mien_hook_free(hook);
                    mien_program_release(s.program);
                    free(g);
                }
}

static void host_rows_are_steered_without_a_copy(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook(both_paths[p]);
        const steer s = new_steer("123");
        graph *g = new_graph(4, NULL);
        const long copies = tensor_gets + tensor_sets;
        decode(hook, &s, g, 2);
        CHECK(tensor_gets + tensor_sets == copies);
        mien_hook_free(hook);
        mien_program_release(s.program);
        free(g);
    }
}

static void clearing_puts_the_nodes_bytes_back(void) {
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    const steer s = new_steer("13");
    graph *g = new_graph(3, NULL), *other = new_graph(5, NULL);
    fake_tensor fresh[MAX_NODES], other_fresh[MAX_NODES];
    memcpy(fresh, g->tensors, sizeof fresh);
    memcpy(other_fresh, other->tensors, sizeof other_fresh);

    CHECK(decode(hook, &nothing, g, 1) == MIEN_OK);
    CHECK(!memcmp(fresh, g->tensors, sizeof fresh));
    CHECK(outputs_are(g, &nothing));
    CHECK(decode(hook, &s, g, 1) == MIEN_OK && decode(hook, &s, other, 1) == MIEN_OK);
    for (int i = 0; i < g->n_nodes; i++) {
        const bool steered = &g->tensors[i] == g->outputs[1] || &g->tensors[i] == g->outputs[3];
        CHECK(steered == !!memcmp(&fresh[i], &g->tensors[i], sizeof fresh[i]));
    }
    CHECK(decode(hook, &nothing, g, 1) == MIEN_OK && decode(hook, &nothing, other, 1) == MIEN_OK);
    CHECK(!memcmp(fresh, g->tensors, sizeof fresh));
    CHECK(!memcmp(other_fresh, other->tensors, sizeof other_fresh));
    CHECK(outputs_are(g, &nothing) && outputs_are(other, &nothing));
    mien_hook_free(hook);
    mien_program_release(s.program);
    free(g);
    free(other);
}

static void a_graph_is_reused_across_swaps(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook(both_paths[p]);
        const steer a = new_steer("12"), b = new_steer("23");
        const steer *const order[] = {&a, &b, &a, &nothing, &nothing, &b, &b, &nothing, &a};
        graph *g = new_graph(3, NULL);
        for (size_t i = 0; i < LENGTH(order); i++) {
            CHECK(decode(hook, order[i], g, 2) == MIEN_OK);
            CHECK(outputs_are(g, order[i]));
            if (i == 5) rebuild(g);
        }
        mien_hook_free(hook);
        mien_program_release(a.program);
        mien_program_release(b.program);
        free(g);
    }
}

static void two_hooks_share_nothing(void) {
    mien_hook *one = new_hook(MIEN_PATH_AUTO), *two = new_hook(MIEN_PATH_AUTO);
    const steer a = new_steer("12"), b = new_steer("3");
    graph *g = new_graph(3, NULL), *h = new_graph(2, NULL);
    mien_hook_begin(one, a.program);
    mien_hook_begin(two, b.program);
    CHECK(evaluate(g, one, 2) && evaluate(h, two, 2));
    CHECK(mien_hook_end(one) == MIEN_OK && mien_hook_end(two) == MIEN_OK);
    CHECK(outputs_are(g, &a) && applied_is(one, g, &a, all_in_graph));
    CHECK(outputs_are(h, &b) && applied_is(two, h, &b, all_in_graph));
    mien_hook_free(one);
    CHECK(decode(two, &b, h, 1) == MIEN_OK && outputs_are(h, &b));
    mien_hook_free(two);
    mien_program_release(a.program);
    mien_program_release(b.program);
    free(g);
    free(h);
}

static void a_micro_batch_without_outputs_has_no_rows_in_the_last_block(void) {
    static const int8_t none[MAX_ROWS] = {0};
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook(both_paths[p]);
        const steer s = new_steer("13");
        graph *g = new_graph(4, none);
        CHECK(decode(hook, &s, g, 3) == MIEN_OK);
        CHECK(outputs_are(g, &s));
        CHECK(mien_hook_applied(hook, 1).rows == 4 && mien_hook_applied(hook, 3).rows == 0);
        mien_hook_free(hook);
        mien_program_release(s.program);
        free(g);
    }
}

/* ---- which nodes -------------------------------------------------------------------------------- */

static void other_names_are_left_alone(void) {
    static const char *const names[] = {"l_out-1 (view)", "l_out-",  "l_out-x",   "l_out-99999999", "l_out-4",
                                        "l_out-0000001",  "ffn_out-1", "l_out--1", "l_out-1x",       "l_out",
                                        "",               "xl_out-1"};
    graph *g = new_graph(2, NULL);
    const steer s = new_steer("0123");
    fake_tensor *t = g->outputs[1];
    float data[2 * EMBD];
    memcpy(data, t->data, sizeof data);
    for (size_t p = 0; p < LENGTH(both_paths); p++)
        for (size_t i = 0; i < LENGTH(names); i++) {
            mien_hook *hook = new_hook(both_paths[p]);
            snprintf(t->name, sizeof t->name, "%s", names[i]);
            const fake_tensor before = *t;
            mien_hook_begin(hook, s.program);
            CHECK(!mien_hook_eval(t, true, hook));
            CHECK(mien_hook_eval(t, false, hook)); /* false would stop the evaluation */
            for (int32_t layer = 0; layer < LAYERS; layer++) CHECK(!mien_hook_applied(hook, layer).met);
            CHECK(mien_hook_end(hook) == MIEN_ERR_NOT_MET);
            CHECK(!memcmp(&before, t, sizeof before));
            CHECK(same_bits(data, t->data, LENGTH(data)));
            mien_hook_free(hook);
        }
    mien_program_release(s.program);
    free(g);
}

/* The outputs of layer 1 that only the path after computation can steer. */
static void make_copy(graph *g) { g->outputs[1]->op = OP_DUP, g->outputs[1]->src[1] = NULL; }
static void make_product(graph *g) { g->outputs[1]->op = OP_MUL; }
static void make_broadcast(graph *g) { shape(g->outputs[1]->src[1], TYPE_F32, EMBD, 1); }
static void make_bufferless(graph *g) { g->outputs[1]->buffer = NULL; }

static void what_cannot_be_patched_is_steered_after_computation(void) {
    static void (*const odd_ones[])(graph *) = {make_copy, make_product, make_broadcast, make_device, make_bufferless};
    static const mien_path mixed[] = {MIEN_PATH_IN_GRAPH, MIEN_PATH_POST, MIEN_PATH_IN_GRAPH, MIEN_PATH_IN_GRAPH};
    for (size_t i = 0; i < LENGTH(odd_ones); i++) {
        mien_hook *hook = new_hook(MIEN_PATH_AUTO);
        const steer s = new_steer("12");
        graph *plain = new_graph(3, NULL);
        odd_ones[i](plain);
        const fake_tensor before = *plain->outputs[1];
        CHECK(decode(hook, &nothing, plain, 2) == MIEN_OK);
        float expected[MAX_ROWS * EMBD];
        for (int at = 0; at < 3 * EMBD; at++) expected[at] = plain->seen[1][at] + s.direction[1][at % EMBD];
        CHECK(decode(hook, &s, plain, 2) == MIEN_OK);
        CHECK(same_bits(plain->seen[1], expected, 3 * EMBD));
        for (int32_t layer = 1; layer <= 2; layer++) {
            CHECK(mien_hook_applied(hook, layer).path == mixed[layer]);
            CHECK(mien_hook_applied(hook, layer).rows == 3);
        }
        CHECK(!memcmp(&before, plain->outputs[1], sizeof before));
        mien_hook_free(hook);
        mien_program_release(s.program);
        free(plain);
    }
}

static void device_rows_are_copied_there_and_back(void) {
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    const steer s = new_steer("1");
    graph *g = new_graph(3, NULL);
    make_device(g);
    const long gets = tensor_gets, sets = tensor_sets;
    CHECK(decode(hook, &s, g, 1) == MIEN_OK);
    CHECK(outputs_are(g, &s));
    CHECK(tensor_gets == gets + 1 && tensor_sets == sets + 1);
    mien_hook_free(hook);
    mien_program_release(s.program);
    free(g);
}

/* ---- steering that did not happen --------------------------------------------------------------- */

static void make_wide(graph *g) { shape(g->outputs[2], TYPE_F32, EMBD / 2, 6); }
static void make_half(graph *g) { shape(g->outputs[2], TYPE_F16, EMBD, 3); }
static void make_strided(graph *g) { g->outputs[2]->nb[1] += 4; }
static void make_permuted(graph *g) {
    fake_tensor *t = g->outputs[2]; /* as many bytes, other strides */
    t->nb[0] = 3 * sizeof(float), t->nb[1] = sizeof(float);
}

static void an_output_of_another_form_is_an_error_and_untouched(void) {
    static void (*const forms[])(graph *) = {make_wide, make_half, make_strided, make_permuted};
    for (size_t p = 0; p < LENGTH(both_paths); p++)
        for (size_t i = 0; i < LENGTH(forms); i++) {
            mien_hook *hook = new_hook(both_paths[p]);
            const steer s = new_steer("2");
            graph *g = new_graph(3, NULL);
            mien_hook_begin(hook, s.program);
            CHECK(evaluate(g, hook, 1)); /* the micro-batch before it is as it should be */
            CHECK(outputs_are(g, &s));
            rebuild(g);
            forms[i](g);
            const fake_tensor before = *g->outputs[2];
            float data[MAX_ROWS * EMBD];
            memcpy(data, values(g->outputs[2]), sizeof data);
            CHECK(!mien_hook_eval(g->outputs[2], true, hook));
            CHECK(!memcmp(&before, g->outputs[2], sizeof before));
            CHECK(mien_hook_eval(g->outputs[2], false, hook));
            CHECK(same_bits(data, values(g->outputs[2]), MAX_ROWS * EMBD));
            CHECK(mien_hook_end(hook) == MIEN_ERR_TENSOR);
            mien_hook_begin(hook, NULL); /* and no matter where nothing acts there */
            mien_hook_eval(g->outputs[2], true, hook);
            CHECK(mien_hook_end(hook) == MIEN_OK);
            mien_hook_free(hook);
            mien_program_release(s.program);
            free(g);
        }
}

static void a_layer_never_evaluated_is_an_error(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook(both_paths[p]);
        const steer s = new_steer("13");
        graph *g = new_graph(2, NULL);
        mien_hook_begin(hook, s.program);
        CHECK(mien_hook_end(hook) == MIEN_ERR_NOT_MET);
        const int all = g->n_nodes;
        g->n_nodes -= 1; /* the last is l_out-3 */
        CHECK(decode(hook, &s, g, 1) == MIEN_ERR_NOT_MET);
        CHECK(!mien_hook_applied(hook, 3).met && mien_hook_applied(hook, 1).met);
        g->n_nodes = all;
        CHECK(decode(hook, &s, g, 1) == MIEN_OK);
        mien_hook_free(hook);
        mien_program_release(s.program);
        free(g);
    }
}

static void a_patched_node_that_never_runs_is_an_error(void) {
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    const steer s = new_steer("12");
    graph *g = new_graph(2, NULL);
    g->never_computed = g->outputs[2];
    CHECK(decode(hook, &s, g, 2) == MIEN_ERR_NOT_APPLIED);
    CHECK(mien_hook_applied(hook, 1).rows == 2 && mien_hook_applied(hook, 2).rows == 0);
    g->never_computed = NULL;
    CHECK(decode(hook, &s, g, 2) == MIEN_OK);
    CHECK(outputs_are(g, &s));
    mien_hook_free(hook);
    mien_program_release(s.program);
    free(g);
}

static void layers_that_there_are_not_have_nothing_applied(void) {
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    static const int32_t layers[] = {-1, LAYERS, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < LENGTH(layers); i++) {
        const mien_applied applied = mien_hook_applied(hook, layers[i]);
        CHECK(!applied.met && !applied.rows && applied.moved == 0 && applied.path == MIEN_PATH_AUTO);
    }
    mien_hook_free(hook);
}

/* ---- capture ------------------------------------------------------------------------------------ */

static void capture_takes_the_window_of_every_micro_batch(void) {
    static const int8_t flags[] = {1, 1, 1, 0, 1, 0, 0, 0, 0, 1};
    static const int64_t sizes[] = {3, 3, 2, 2}; /* with all, one, no and one output */
    static const int32_t windows[][2] = {{0, 10}, {0, 1}, {9, 1}, {2, 5}, {7, 3}, {8, 6}, {-2, 4}, {20, 3}};
    static const int32_t layers[] = {3, 0, 2};
    enum { TOKENS = 10, N = LENGTH(layers) };
    for (size_t p = 0; p < LENGTH(both_paths); p++)
        for (size_t w = 0; w < LENGTH(windows); w++)
            for (int device = 0; device < 2; device++) {
                const int32_t first = windows[w][0], count = windows[w][1];
                mien_hook *hook = new_hook(both_paths[p]);
                const steer s = new_steer("123");
                float *buffer = malloc(N * (size_t)count * EMBD * sizeof(float));
                float expected[N][TOKENS][EMBD];
                fill(buffer, N * (size_t)count * EMBD, -1.5f);
                fill(expected[0][0], N * TOKENS * EMBD, -1.5f);
                mien_hook_capture(hook, buffer, layers, N, first, count, flags);
                mien_hook_begin(hook, s.program);
                int64_t token = 0;
                for (size_t b = 0; b < LENGTH(sizes); token += sizes[b++]) {
                    graph *g = new_graph(sizes[b], flags + token);
                    if (device) make_device(g);
                    CHECK(evaluate(g, hook, 2));
                    CHECK(outputs_are(g, &s));
                    for (size_t l = 0; l < N; l++)
                        for (int64_t r = 0; r < g->outputs[layers[l]]->ne[1]; r++) {
                            const int64_t at = token + (layers[l] == LAYERS - 1 ? g->output_rows[r] : r);
                            memcpy(expected[l][at], g->seen[layers[l]] + r * EMBD, sizeof expected[l][at]);
                        }
                    free(g);
                }
                CHECK(mien_hook_end(hook) == MIEN_OK);
                CHECK(mien_hook_applied(hook, 1).rows == TOKENS && mien_hook_applied(hook, 3).rows == 5);
                for (size_t l = 0; l < N; l++)
                    for (int32_t i = 0; i < count; i++) {
                        const float *row = buffer + (l * (size_t)count + (size_t)i) * EMBD;
                        const bool inside = first + i >= 0 && first + i < TOKENS;
                        CHECK(inside ? same_bits(row, expected[l][first + i], EMBD) : all_are(row, EMBD, -1.5f));
                    }
                mien_hook_free(hook);
                mien_program_release(s.program);
                free(buffer);
            }
}

static void capture_needs_no_steering_and_can_be_turned_off(void) {
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    graph *g = new_graph(2, NULL);
    fake_tensor fresh[MAX_NODES];
    memcpy(fresh, g->tensors, sizeof fresh);
    const int32_t layers[] = {-1, 1, LAYERS, 3};
    float buffer[4 * 2 * EMBD], kept[LENGTH(buffer)];
    fill(buffer, LENGTH(buffer), -1.5f);
    mien_hook_capture(hook, buffer, layers, 4, 0, 2, NULL);
    CHECK(evaluate(g, hook, 1)); /* outside of begin..end nothing is captured */
    CHECK(all_are(buffer, LENGTH(buffer), -1.5f));
    CHECK(decode(hook, &nothing, g, 1) == MIEN_OK);
    CHECK(same_bits(buffer + 2 * EMBD, g->seen[1], 2 * EMBD));
    CHECK(same_bits(buffer + 6 * EMBD, g->seen[3], 2 * EMBD));
    CHECK(all_are(buffer, 2 * EMBD, -1.5f) && all_are(buffer + 4 * EMBD, 2 * EMBD, -1.5f));
    CHECK(!memcmp(fresh, g->tensors, sizeof fresh));
    memcpy(kept, buffer, sizeof kept);
    mien_hook_capture(hook, NULL, NULL, 0, 0, 0, NULL);
    fill_random(g->leaf_data[0], MAX_ROWS * EMBD);
    CHECK(decode(hook, &nothing, g, 1) == MIEN_OK);
    CHECK(same_bits(buffer, kept, LENGTH(buffer)));
    mien_hook_free(hook);
    free(g);
}

static void capture_of_rows_that_are_not_the_tokens_is_an_error(void) {
    static const int8_t one[] = {0, 1, 0};
    static const int32_t layers[] = {3};
    float buffer[3 * EMBD];
    fill(buffer, LENGTH(buffer), -1.5f);
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    graph *g = new_graph(3, one);
    mien_hook_capture(hook, buffer, layers, 1, 0, 3, NULL); /* which rows are left is not known */
    CHECK(decode(hook, &nothing, g, 1) == MIEN_ERR_TENSOR);
    mien_hook_capture(hook, buffer, (const int32_t[]){2}, 1, 0, 3, one);
    for (int i = 0; i < g->n_nodes; i++)
        if (&g->tensors[i] == g->outputs[2]) shape(g->outputs[2], TYPE_F32, EMBD, 2);
    mien_hook_begin(hook, NULL);
    for (int layer = 0; layer < 3; layer++) {
        mien_hook_eval(g->outputs[layer], true, hook);
        mien_hook_eval(g->outputs[layer], false, hook);
    }
    CHECK(mien_hook_end(hook) == MIEN_ERR_TENSOR);
    CHECK(all_are(buffer, LENGTH(buffer), -1.5f));
    make_half(g);
    mien_hook_begin(hook, NULL);
    CHECK(!mien_hook_eval(g->outputs[2], true, hook));
    CHECK(mien_hook_end(hook) == MIEN_ERR_TENSOR);
    CHECK(all_are(buffer, LENGTH(buffer), -1.5f));
    mien_hook_free(hook);
    free(g);
}

/* ---- swapping ----------------------------------------------------------------------------------- */

static void an_evaluation_outside_of_a_decode_takes_what_was_swapped_in_last(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook(both_paths[p]);
        const steer a = new_steer("12"), b = new_steer("123");
        graph *g = new_graph(3, NULL);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &nothing));
        mien_hook_swap(hook, a.program);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &a));
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &a));
        mien_hook_swap(hook, a.program);
        mien_hook_swap(hook, b.program);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &b));
        CHECK(applied_is(hook, g, &b, p ? all_post : all_in_graph)); /* of this graph alone */

        mien_hook_begin(hook, a.program); /* a decode is what it was begun with, whatever is swapped in */
        mien_hook_swap(hook, NULL);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &a));
        mien_hook_swap(hook, b.program);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &a));
        CHECK(mien_hook_end(hook) == MIEN_OK);
        CHECK(mien_hook_applied(hook, 1).rows == 6);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &b));
        mien_hook_swap(hook, NULL);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &nothing));
        mien_hook_free(hook);
        mien_program_release(a.program);
        mien_program_release(b.program);
        free(g);
    }
}

static void the_hook_keeps_what_it_was_given_and_lets_go_of_it(void) {
    const long before = live_blocks;
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    const long with_hook = live_blocks;
    for (int i = 0; i < 3; i++) {
        const steer s = new_steer("1"); /* the hook's is the only reference left */
        mien_hook_swap(hook, s.program);
        mien_program_release(s.program);
        CHECK(live_blocks == with_hook + 1);
    }
    graph *g = new_graph(2, NULL);
    evaluate(g, hook, 1);
    mien_hook_swap(hook, NULL);
    evaluate(g, hook, 1);
    free(g);
    CHECK(live_blocks == with_hook);
    const steer s = new_steer("1"), t = new_steer("2");
    mien_hook_begin(hook, s.program);
    mien_hook_swap(hook, t.program);
    mien_program_release(s.program);
    mien_program_release(t.program);
    mien_hook_free(hook); /* in the middle of a decode, even */
    CHECK(live_blocks == before);
}

enum { APPLIERS = 2, APPLIED_EACH = 500000, EVALUATIONS = 400, PATIENCE = 100000 };

typedef struct {
    mien_hook *hook;
    const steer *choices[3];
    atomic_bool done;
} shared_state;

static void *keep_swapping(void *argument) {
    shared_state *shared = argument;
    for (size_t i = 0; !shared->done; i++) mien_hook_swap(shared->hook, shared->choices[i % 3]->program);
    return NULL;
}

static void *keep_applying(void *argument) {
    shared_state *shared = argument;
    long wrong = 0;
    for (int i = 0; i < APPLIED_EACH; i++) {
        const steer *s = shared->choices[i % 2];
        float row[EMBD] = {0};
        mien_program *program = mien_program_retain(s->program);
        mien_program_apply(program, MIEN_SITE_RESIDUAL, 2, row, 1);
        wrong += !same_bits(row, s->direction[2], EMBD);
        mien_program_release(program);
    }
    CHECK(!wrong);
    return NULL;
}

static void a_graph_is_of_one_program_while_others_are_swapped_in(void) {
    const long before = live_blocks;
    const steer a = new_steer("123"), b = new_steer("12");
    shared_state shared = {new_hook(MIEN_PATH_AUTO), {&a, &b, &nothing}, false};
    graph *g = new_graph(5, NULL);
    pthread_t swapper, appliers[APPLIERS];
    long met[3] = {0}, mixed = 0;
    real_threads = true;
    CHECK(!pthread_create(&swapper, NULL, keep_swapping, &shared));
    for (int i = 0; i < APPLIERS; i++) CHECK(!pthread_create(&appliers[i], NULL, keep_applying, &shared));
    for (int i = 0; i < EVALUATIONS || (i < PATIENCE && !(met[0] && met[1] && met[2])); i++) {
        CHECK(evaluate(g, shared.hook, 3));
        bool found = false;
        for (int c = 0; c < 3 && !found; c++) met[c] += found = outputs_are(g, shared.choices[c]);
        mixed += !found;
    }
    for (int i = 0; i < APPLIERS; i++) pthread_join(appliers[i], NULL);
    shared.done = true;
    pthread_join(swapper, NULL);
    real_threads = false;
    CHECK(!mixed);
    CHECK(met[0] && met[1] && met[2]);
    mien_hook_free(shared.hook);
    mien_program_release(a.program);
    mien_program_release(b.program);
    free(g);
    CHECK(live_blocks == before);
}

int main(void) {
    the_symbols_are_the_ones_that_ggml_has();
    the_layout_decides_the_path_and_the_reason();
    a_lacking_function_is_an_error_where_needed_and_a_reason_where_not();
    a_model_without_layers_or_width_is_refused();
    a_program_of_another_model_is_refused_and_nothing_changes();
    failing_allocations_are_reported();
    steering_is_plain_plus_direction_bit_for_bit();
    host_rows_are_steered_without_a_copy();
    clearing_puts_the_nodes_bytes_back();
    a_graph_is_reused_across_swaps();
    two_hooks_share_nothing();
    a_micro_batch_without_outputs_has_no_rows_in_the_last_block();
    other_names_are_left_alone();
    what_cannot_be_patched_is_steered_after_computation();
    device_rows_are_copied_there_and_back();
    an_output_of_another_form_is_an_error_and_untouched();
    a_layer_never_evaluated_is_an_error();
    a_patched_node_that_never_runs_is_an_error();
    layers_that_there_are_not_have_nothing_applied();
    capture_takes_the_window_of_every_micro_batch();
    capture_needs_no_steering_and_can_be_turned_off();
    capture_of_rows_that_are_not_the_tokens_is_an_error();
    an_evaluation_outside_of_a_decode_takes_what_was_swapped_in_last();
    the_hook_keeps_what_it_was_given_and_lets_go_of_it();
    a_graph_is_of_one_program_while_others_are_swapped_in();
    return verdict();
}
