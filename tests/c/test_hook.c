/* The llama.cpp hook against a ggml of our own: the same functions by name, a tensor laid out as the real
 * one is or in ways that must be found out, a model with every site, and a scheduler that asks and computes
 * as the real one does. */
#include "testing.h"

#include <math.h>
#include <pthread.h>

#include "mien_batch.h"
#include "mien_llama.h"

enum {
    LAYERS = 4,
    EMBD = 12,
    EXPERTS = 5,
    MAX_ROWS = 8,
    MAX_NODES = 7 * LAYERS + 4,
    MAX_SYMBOLS = 64,
    MAX_TOKENS = 16,
    MAX_REPLY = 64,
    N_SEQUENCES = 3
};

#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* ---- a fake ggml -------------------------------------------------------------------------------- */

enum { TYPE_F32 = 0, TYPE_F16 = 1, TYPE_I32 = 26 };
enum { OP_NONE, OP_DUP, OP_ADD, OP_MUL, OP_MUL_MAT, OP_GET_ROWS, OP_ARGSORT, OP_MAP_CUSTOM2, OP_COUNT };

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
static long tensor_gets, tensor_sets, product_names; /* names that were read of products and look-ups */

static const char *ggml_get_name(const fake_tensor *t) {
    product_names += t->op == OP_MUL_MAT || t->op == OP_GET_ROWS;
    return t->name;
}

static void *ggml_get_data(const fake_tensor *t) { return t->data; }
static int64_t ggml_nrows(const fake_tensor *t) { return t->ne[1] * t->ne[2] * t->ne[3]; }
static int64_t ggml_nelements(const fake_tensor *t) { return t->ne[0] * ggml_nrows(t); }
static size_t size_of(int32_t type) { return type == TYPE_F16 ? 2 : 4; }

static size_t ggml_nbytes(const fake_tensor *t) {
    if (!ggml_nelements(t)) return 0;
    size_t bytes = size_of(t->type);
    for (int i = 0; i < 4; i++) bytes += (size_t)(t->ne[i] - 1) * t->nb[i];
    return bytes;
}

static bool ggml_is_contiguous(const fake_tensor *t) {
    size_t expected = size_of(t->type);
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

static void ggml_free(fake_context *context) {
    free(context->memory);
    free(context);
}

static fake_context *ggml_init(init_params parameters) {
    CHECK(parameters.no_alloc && !parameters.mem_buffer);
    fake_context *context = odd == NO_CONTEXT ? NULL : calloc(1, sizeof *context);
    if (!context) return NULL;
    context->size = parameters.mem_size;
    context->memory = malloc(parameters.mem_size);
    if (!context->memory) {
        ggml_free(context);
        return NULL;
    }
    memset(context->memory, 0xA5, parameters.mem_size);
    return context;
}

static void shape(fake_tensor *t, int32_t type, int64_t columns, int64_t n_rows) {
    const size_t size = size_of(type);
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
    static const char *const names[] = {"NONE", "DUP", "ADD", "MUL", "MUL_MAT", "GET_ROWS", "ARGSORT", "MAP_CUSTOM2"};
    if (odd == OP_NAMES_DIFFER) return "SOMETHING";
    return CHECK(op >= 0 && op < OP_COUNT) ? names[op] : ""; /* the real one does not check */
}

static const char *ggml_op_desc(const fake_tensor *t) { return ggml_op_name(odd == OP_ELSEWHERE ? t->flags : t->op); }

static bool ggml_are_same_shape(const fake_tensor *a, const fake_tensor *b) {
    return !memcmp(a->ne, b->ne, sizeof a->ne);
}

static fake_buffer_type *ggml_backend_cpu_buffer_type(void) { return &cpu_type; }

static fake_buffer *ggml_backend_alloc_ctx_tensors_from_buft(fake_context *context, fake_buffer_type *type) {
    fake_buffer *buffer = odd == NO_BUFFER ? NULL : malloc(sizeof *buffer);
    if (!buffer) return NULL;
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

/* ---- a fake llama_batch ------------------------------------------------------------------------- */

/* Its fields are not where the real one has them. */
typedef struct {
    int8_t *logits;
    int32_t other, n_tokens;
    int32_t **seq_id;
    float *embd;
    int32_t *token, *n_seq_id, *pos;
} fake_batch;

static const mien_batch_layout fields = {offsetof(fake_batch, n_tokens), offsetof(fake_batch, token),
                                         offsetof(fake_batch, pos),      offsetof(fake_batch, n_seq_id),
                                         offsetof(fake_batch, seq_id),   offsetof(fake_batch, logits)};

/* One of an array's own. Not to be copied: it points into itself. */
typedef struct {
    fake_batch batch;
    int32_t ids[MAX_TOKENS], positions[MAX_TOKENS], counts[MAX_TOKENS], sets[MAX_TOKENS][N_SEQUENCES];
    int32_t *sequences[MAX_TOKENS];
    int8_t outputs[MAX_TOKENS];
} tokens;

/* Of words like "0@5*": the token of sequence 0 at position 5, whose logits are asked for. */
static void read_tokens(tokens *made, const char *words) {
    memset(made, 0, sizeof *made);
    int32_t n = 0;
    for (const char *at = words; *at; n++) {
        made->ids[n] = 1000 - 3 * n;
        made->sequences[n] = made->sets[n];
        for (; *at != '@'; at++) made->sets[n][made->counts[n]++] = *at - '0';
        char *end;
        made->positions[n] = (int32_t)strtol(at + 1, &end, 10);
        made->outputs[n] = *end == '*';
        at = end + (*end == '*');
        while (*at == ' ') at++;
    }
    made->batch = (fake_batch){made->outputs, 0, n, made->sequences, NULL, made->ids, made->counts, made->positions};
}

/* As llama_batch_get_one makes it: of one sequence, whose positions count on. outputs: NULL for the last
 * token's alone. */
static void plain_tokens(tokens *made, int32_t n, const int8_t *outputs) {
    memset(made, 0, sizeof *made);
    for (int32_t i = 0; i < n; i++) made->ids[i] = 1000 - 3 * i;
    if (outputs) memcpy(made->outputs, outputs, (size_t)n);
    made->batch = (fake_batch){outputs ? made->outputs : NULL, 0, n, NULL, NULL, made->ids, NULL, NULL};
}

static mien_status begin(mien_hook *hook, const tokens *given) {
    return mien_hook_begin(hook, (uintptr_t)&given->batch);
}

/* ---- making hooks ------------------------------------------------------------------------------- */

/* What was swapped into each hook: mien_hook_swap takes it for all sequences at once. */
static struct {
    const mien_hook *hook;
    mien_acting acting[N_SEQUENCES];
    int32_t n;
} swapped[16];
static uint64_t generations;

static size_t swapped_of(const mien_hook *hook) {
    static size_t newest;
    for (size_t i = 0; i < LENGTH(swapped); i++)
        if (swapped[i].hook == hook) return i;
    newest = (newest + 1) % LENGTH(swapped);
    memset(&swapped[newest], 0, sizeof swapped[newest]);
    swapped[newest].hook = hook;
    swapped[newest].n = 1;
    return newest;
}

static mien_status set_batching(mien_hook *hook, const mien_batch_layout *layout, const mien_batching *batching) {
    const mien_status status = mien_hook_set_batching(hook, layout, batching);
    const size_t at = swapped_of(hook);
    if (status == MIEN_OK) {
        memset(swapped[at].acting, 0, sizeof swapped[at].acting);
        swapped[at].n = batching->n_sequences;
    }
    return status;
}

/* What acts on one sequence, or (-1) on all. */
static mien_status swap_at(mien_hook *hook, int32_t sequence, mien_program *prompt, mien_program *response) {
    const size_t at = swapped_of(hook);
    mien_acting acting[N_SEQUENCES];
    memcpy(acting, swapped[at].acting, sizeof acting);
    for (int32_t i = 0; i < swapped[at].n; i++)
        if (sequence < 0 || i == sequence) acting[i] = (mien_acting){prompt, response, ++generations};
    const mien_status status = mien_hook_swap(hook, acting, swapped[at].n, ++generations);
    if (status == MIEN_OK) memcpy(swapped[at].acting, acting, sizeof acting);
    return status;
}

static mien_probe *watching;

static mien_status watch_with(mien_hook *hook, mien_probe *probe) {
    const mien_status status = mien_hook_watch(hook, probe, NULL, NULL, 0);
    if (status == MIEN_OK) watching = probe;
    return status;
}

static void watch_into(mien_hook *hook, float *before, float *after) {
    CHECK(mien_hook_watch(hook, watching, before, after, MAX_TOKENS) == MIEN_OK);
}

static mien_hook *new_hook_of(mien_path path, int32_t n_sequences, int32_t n_ubatch, mien_order rule,
                              mien_order other) {
    void *addresses[MAX_SYMBOLS];
    mien_hook *hook = NULL;
    find_symbols(addresses, NULL);
    CHECK(mien_hook_new(&hook, addresses, LAYERS, EMBD, path) == MIEN_OK);
    const mien_batching batching = {n_sequences, n_ubatch, {rule, other}};
    CHECK(set_batching(hook, &fields, &batching) == MIEN_OK);
    return hook;
}

static mien_hook *new_hook(mien_path path) { return new_hook_of(path, 1, 512, MIEN_ORDER_NONE, MIEN_ORDER_NONE); }

/* ---- a fake model and its scheduler ------------------------------------------------------------- */

static struct {
    fake_tensor weights[LAYERS], biases[LAYERS], scales[LAYERS], routers[LAYERS];
    float weight_data[LAYERS][EMBD * EMBD], bias_data[LAYERS][EMBD], scale_data[LAYERS][EMBD];
    float router_data[LAYERS][EXPERTS * EMBD];
} model;

static void make_leaf(fake_tensor *t, float *data, int64_t columns, int64_t n_rows) {
    shape(t, TYPE_F32, columns, n_rows);
    fill_random(data, (size_t)(columns * n_rows));
    t->buffer = &cpu_buffer;
    t->data = data;
}

static void make_model(void) {
    for (int i = 0; i < LAYERS; i++) {
        make_leaf(&model.weights[i], model.weight_data[i], EMBD, EMBD);
        make_leaf(&model.biases[i], model.bias_data[i], EMBD, 1);
        make_leaf(&model.scales[i], model.scale_data[i], EMBD, 1);
        make_leaf(&model.routers[i], model.router_data[i], EMBD, EXPERTS);
    }
}

/* One micro-batch: x = a row for each token; at each layer, of a leaf of its own, heads; delta = (weight heads
 * + bias) scale; logits = router heads; chosen = the experts by their logits; x = x + delta. The last block
 * keeps `n_outputs` rows. */
typedef struct {
    int64_t n_rows, n_outputs;
    int32_t output_rows[MAX_ROWS], id_data[MAX_ROWS];
    int8_t flags[MAX_ROWS];
    fake_tensor leaves[LAYERS + 1], ids, out_ids, tensors[MAX_NODES];
    float leaf_data[LAYERS + 1][MAX_ROWS * EMBD], data[MAX_NODES][MAX_ROWS * EMBD];
    int n_nodes;
    fake_tensor *heads[LAYERS], *logits[LAYERS], *chosen[LAYERS], *outputs[LAYERS];
    float seen[LAYERS][MAX_ROWS * EMBD]; /* each block's output as the next node finds it */
    const fake_tensor *never_computed;
} graph;

static fake_tensor *add_node(graph *g, int32_t op, const char *name, int layer, fake_tensor *a, fake_tensor *b) {
    fake_tensor *t = &g->tensors[g->n_nodes];
    const bool product = op == OP_MUL_MAT, gather = op == OP_GET_ROWS;
    shape(t, op == OP_ARGSORT ? TYPE_I32 : TYPE_F32, product ? a->ne[1] : a->ne[0],
          product ? b->ne[1] : gather ? b->ne[0] : a->ne[1]);
    t->buffer = &cpu_buffer;
    t->data = g->data[g->n_nodes++];
    t->op = op;
    t->src[0] = a, t->src[1] = b;
    snprintf(t->name, sizeof t->name, layer < 0 ? "%s" : "%s-%d", name, layer);
    return t;
}

static void make_ids(fake_tensor *t, const char *name, int32_t *data, int64_t n) {
    shape(t, TYPE_I32, n, 1);
    t->buffer = &cpu_buffer;
    t->data = data;
    snprintf(t->name, sizeof t->name, "%s", name);
}

static void refill(graph *g) {
    for (int i = 0; i <= LAYERS; i++) fill_random(g->leaf_data[i], MAX_ROWS * EMBD);
}

/* outputs: whose logits are asked for; NULL: all. */
static graph *new_graph(int64_t n_rows, const int8_t *outputs) {
    graph *g = calloc(1, sizeof *g);
    g->n_rows = n_rows;
    for (int32_t i = 0; i < n_rows; i++) {
        g->id_data[i] = 1000 - 3 * i;
        g->flags[i] = outputs ? outputs[i] : 1;
        if (g->flags[i]) g->output_rows[g->n_outputs++] = i;
    }
    for (int i = 0; i <= LAYERS; i++) make_leaf(&g->leaves[i], g->leaf_data[i], EMBD, n_rows);
    refill(g);
    make_ids(&g->ids, "inp_tokens", g->id_data, n_rows);
    make_ids(&g->out_ids, "inp_out_ids", g->output_rows, g->n_outputs);
    fake_tensor *x = add_node(g, OP_GET_ROWS, "inp_embd", -1, &g->leaves[LAYERS], &g->ids);
    for (int i = 0; i < LAYERS; i++) {
        g->heads[i] = add_node(g, OP_DUP, "kqv_out", i, &g->leaves[i], NULL);
        fake_tensor *product = add_node(g, OP_MUL_MAT, "node_product", -1, &model.weights[i], g->heads[i]);
        g->logits[i] = add_node(g, OP_MUL_MAT, "ffn_moe_logits", i, &model.routers[i], g->heads[i]);
        fake_tensor *biased = add_node(g, OP_ADD, "node_biased", -1, product, &model.biases[i]);
        g->chosen[i] = add_node(g, OP_ARGSORT, "ffn_moe_argsort", i, g->logits[i], NULL);
        fake_tensor *delta = add_node(g, OP_MUL, "ffn_out", i, biased, &model.scales[i]);
        if (i == LAYERS - 1 && g->n_outputs != n_rows) {
            x = add_node(g, OP_GET_ROWS, "node_1", -1, x, &g->out_ids);
            delta = add_node(g, OP_GET_ROWS, "node_2", -1, delta, &g->out_ids);
        }
        fake_tensor *sum = add_node(g, OP_ADD, "l_out", i, x, delta);
        if (i % 2) sum->data = x->data; /* ggml's allocator adds in place where it can */
        g->outputs[i] = x = sum;
        if (i == 1) x = add_node(g, OP_DUP, "CPU#l_out-1#0", -1, x, NULL); /* the scheduler's copies */
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

static bool real_threads; /* else one calls after the other, the last one first */

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

static void run_custom(fake_tensor *t, int nth) {
    custom_task tasks[8];
    pthread_t threads[8];
    for (int i = nth - 1; i >= 0; i--) {
        tasks[i].t = t, tasks[i].ith = i, tasks[i].nth = nth;
        memcpy(&tasks[i].params, t->op_params, sizeof tasks[i].params);
        CHECK(tasks[i].params.n_tasks == -1);
        if (!real_threads)
            run_task(&tasks[i]);
        else
            CHECK(!pthread_create(&threads[i], NULL, run_task, &tasks[i]));
    }
    for (int i = 0; real_threads && i < nth; i++) pthread_join(threads[i], NULL);
}

static void multiply(float *out, const float *weight, const float *x, size_t n_out) {
    for (size_t j = 0; j < n_out; j++) {
        out[j] = 0;
        for (size_t i = 0; i < EMBD; i++) out[j] = out[j] + weight[j * EMBD + i] * x[i];
    }
}

/* The experts by their logits, the highest first. */
static void choose(int32_t *order, const float *logits) {
    for (int32_t i = 0; i < EXPERTS; i++) {
        int at = 0;
        for (int32_t j = 0; j < EXPERTS; j++) at += logits[j] > logits[i] || (logits[j] == logits[i] && j < i);
        order[at] = i;
    }
}

static void compute_row(const fake_tensor *t, size_t r) {
    const fake_tensor *a = t->src[0], *b = t->src[1];
    const size_t n = (size_t)t->ne[0];
    float *out = values(t) + r * n;
    if (t->op == OP_MUL_MAT) {
        multiply(out, values(a), values(b) + r * EMBD, n);
        return;
    }
    const bool by_output = t->op == OP_GET_ROWS && !strcmp(b->name, "inp_out_ids");
    const float *from = values(a) + (by_output ? (size_t)((int32_t *)b->data)[r] : r) * n;
    const float *other = b && t->op != OP_GET_ROWS ? values(b) + r % (size_t)b->ne[1] * n : NULL;
    if (t->op == OP_ARGSORT) choose((int32_t *)(void *)out, from);
    for (size_t i = 0; i < n && t->op != OP_ARGSORT; i++)
        switch (t->op) {
            case OP_DUP:
            case OP_GET_ROWS: out[i] = from[i]; break;
            case OP_ADD: out[i] = from[i] + other[i]; break;
            case OP_MUL: out[i] = from[i] * other[i]; break;
            default: CHECK(!"an operation that there is");
        }
}

static void compute(const graph *g, fake_tensor *t, int nth) {
    if (t == g->never_computed) return;
    if (t->op == OP_MAP_CUSTOM2)
        run_custom(t, nth);
    else
        for (int64_t r = 0; r < t->ne[1]; r++) compute_row(t, (size_t)r);
}

static void keep_output(graph *g, const fake_tensor *t) {
    for (int layer = 0; layer < LAYERS; layer++)
        if (g->outputs[layer] == t) memcpy(g->seen[layer], values(t), ggml_nbytes(t));
}

/* As ggml_backend_sched does: ask node after node until one is wanted, compute them all, hand that one
 * over. False where the callback stopped it. Of the nodes from `first` on, before `end`. */
static bool evaluate_some(graph *g, mien_hook *hook, int nth, int first, int end) {
    while (first < end) {
        int last = first;
        bool wanted = mien_hook_eval(&g->tensors[last], true, hook);
        while (!wanted && last + 1 < end) wanted = mien_hook_eval(&g->tensors[++last], true, hook);
        for (; first <= last; first++) {
            compute(g, &g->tensors[first], nth);
            if (first == last && wanted && !mien_hook_eval(&g->tensors[last], false, hook)) return false;
            keep_output(g, &g->tensors[first]);
        }
    }
    return true;
}

static bool evaluate(graph *g, mien_hook *hook, int nth) { return evaluate_some(g, hook, nth, 0, g->n_nodes); }

/* ---- what a program should do ------------------------------------------------------------------- */

/* Where it acts in the graph; at the product it may be with the bias or the scale that is put on it. */
typedef enum { AT_OUTPUT, AT_HEADS, AT_PRODUCT, AT_BIASED, AT_SCALED, AT_LOGITS } where;

typedef struct {
    where where;
    mien_site site;
    bool at[LAYERS];
    float direction[LAYERS][EMBD];
    bool windowed, gated, latch;
    int32_t start, stop, ramp;
    float above, hysteresis; /* of the gate, which reads a row's first float */
    mien_program *program;
} steer;

static const steer nothing;

static int32_t width_at(where where) { return where == AT_LOGITS ? EXPERTS : EMBD; }

/* Like `kind`, at each of the layers in `layers`, a string of digits. */
static steer new_steer_like(const steer *kind, const char *layers) {
    steer s = *kind;
    int32_t ids[LAYERS];
    float rows[LAYERS * EMBD], reads[LAYERS * EMBD] = {0};
    const double offsets[LAYERS] = {0};
    const int32_t width = width_at(s.where);
    size_t n = 0;
    for (; layers[n]; n++) {
        float *direction = s.direction[ids[n] = layers[n] - '0'];
        s.at[ids[n]] = true;
        fill_random(direction, (size_t)width);
        for (int i = 0; s.where == AT_LOGITS && i < EXPERTS; i++) direction[i] = i == 1 || i == 3; /* forbidden */
        memcpy(rows + n * (size_t)width, direction, (size_t)width * sizeof(float));
        reads[n * (size_t)width] = 1;
    }
    const mien_gate gate = {{width, n, ids, reads, offsets}, s.above, INFINITY, s.hysteresis, s.latch};
    mien_term term = {.op = s.where == AT_LOGITS ? MIEN_OP_FORBID : MIEN_OP_ADD, .site = s.site, .coefficient = 1.0,
                      .width = width, .rank = 1, .n_rows = n, .layers = ids, .rows = rows,
                      .window = {0, INT32_MAX, 0, INFINITY}, .n_gates = s.gated};
    if (s.windowed) term.window.start = s.start, term.window.stop = s.stop, term.window.ramp = s.ramp;
    CHECK(mien_program_new(&s.program, LAYERS, &term, 1, &gate, s.gated) == MIEN_OK);
    return s;
}

static steer new_steer(const char *layers) { return new_steer_like(&nothing, layers); }

/* What the gates of one sequence have been, by token of the reply. */
typedef struct {
    bool open[MAX_REPLY][LAYERS];
} history;

/* What acts on a row. */
typedef struct {
    const steer *steer;
    int32_t reply;
    history *history;
} acting;

/* What it does, long-hand. Whether it does anything. */
static bool act(const acting *who, where where, int layer, float *x, double *moved) {
    const steer *s = who->steer;
    if (s->where != where || !s->at[layer]) return false;
    if (s->gated) {
        const bool remembers = who->history && who->reply >= 0;
        const bool before = remembers && who->reply > 0 && who->history->open[who->reply - 1][layer];
        const bool open = x[0] > s->above - (before ? s->hysteresis : 0) || (before && s->latch);
        if (remembers) who->history->open[who->reply][layer] = open;
        if (!open) return false;
    }
    float share = 1;
    if (s->windowed) {
        if (who->reply < s->start || who->reply >= s->stop) return false;
        const int32_t since = who->reply - s->start + 1;
        if (since < s->ramp) share = (float)((double)since / s->ramp);
    }
    for (int i = 0; i < width_at(where); i++) {
        const float before = x[i], step = share * s->direction[layer][i];
        if (where == AT_LOGITS) {
            if (step != 0.0f) x[i] = -INFINITY;
            *moved += step != 0.0f;
        } else {
            x[i] = before + step;
            *moved += ((double)x[i] - (double)before) * ((double)x[i] - (double)before);
        }
    }
    return true;
}

typedef struct {
    float before[LAYERS][MAX_ROWS * EMBD], after[LAYERS][MAX_ROWS * EMBD]; /* the blocks' outputs */
    int32_t chosen[LAYERS][MAX_ROWS * EXPERTS];
    int64_t rows[LAYERS]; /* on which something was done, and how far they moved */
    double moved[LAYERS];
} hand;

/* What each row of the graph should be, where `who[r]` acts on row r. */
static void long_hand(const graph *g, const acting *who, hand *out) {
    memset(out, 0, sizeof *out);
    for (int64_t r = 0; r < g->n_rows; r++) {
        float x[EMBD], heads[EMBD], delta[EMBD], logits[EXPERTS];
        memcpy(x, g->leaf_data[LAYERS] + r * EMBD, sizeof x);
        for (int layer = 0; layer < LAYERS; layer++) {
            double *moved = &out->moved[layer];
            int64_t *rows = &out->rows[layer];
            memcpy(heads, g->leaf_data[layer] + r * EMBD, sizeof heads);
            *rows += act(&who[r], AT_HEADS, layer, heads, moved);
            multiply(delta, model.weight_data[layer], heads, EMBD);
            *rows += act(&who[r], AT_PRODUCT, layer, delta, moved);
            for (int i = 0; i < EMBD; i++) delta[i] = delta[i] + model.bias_data[layer][i];
            *rows += act(&who[r], AT_BIASED, layer, delta, moved);
            for (int i = 0; i < EMBD; i++) delta[i] = delta[i] * model.scale_data[layer][i];
            *rows += act(&who[r], AT_SCALED, layer, delta, moved);
            multiply(logits, model.router_data[layer], heads, EXPERTS);
            *rows += act(&who[r], AT_LOGITS, layer, logits, moved);
            choose(out->chosen[layer] + r * EXPERTS, logits);
            int64_t at = r;
            if (layer == LAYERS - 1)
                for (at = 0; at < g->n_outputs && g->output_rows[at] != r;) at++;
            if (layer == LAYERS - 1 && at == g->n_outputs) continue;
            for (int i = 0; i < EMBD; i++) x[i] = x[i] + delta[i];
            memcpy(out->before[layer] + at * EMBD, x, sizeof x);
            *rows += act(&who[r], AT_OUTPUT, layer, x, moved);
            memcpy(out->after[layer] + at * EMBD, x, sizeof x);
        }
    }
}

static bool is_as(const graph *g, const hand *expected) {
    bool same = true;
    for (int layer = 0; layer < LAYERS; layer++)
        same = same && same_bits(g->seen[layer], expected->after[layer], (size_t)g->outputs[layer]->ne[1] * EMBD) &&
               !memcmp(g->chosen[layer]->data, expected->chosen[layer], (size_t)g->n_rows * EXPERTS * sizeof(int32_t));
    return same;
}

/* As a prompt's rows would be, or those outside of a decode. */
static void long_hand_alike(const graph *g, const steer *s, hand *out) {
    acting who[MAX_ROWS];
    for (int r = 0; r < MAX_ROWS; r++) who[r] = (acting){s, -1, NULL};
    long_hand(g, who, out);
}

static bool outputs_are(const graph *g, const steer *s) {
    hand expected;
    long_hand_alike(g, s, &expected);
    return is_as(g, &expected);
}

static bool applied_is(const mien_hook *hook, const graph *g, const steer *s, const mien_path paths[LAYERS]) {
    hand expected;
    long_hand_alike(g, s, &expected);
    bool right = true;
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        const mien_applied applied = mien_hook_applied(hook, s->site, layer);
        right = right && applied.met && applied.rows == expected.rows[layer] &&
                applied.path == (s->at[layer] ? paths[layer] : MIEN_PATH_AUTO) &&
                about(applied.moved, expected.moved[layer]);
    }
    return right;
}

static void swap_in(mien_hook *hook, const steer *s) {
    CHECK(swap_at(hook, -1, s->program, s->program) == MIEN_OK);
}

/* The beginning of a decode of `n` tokens, or of those of a graph. */
static void begin_plain(mien_hook *hook, const steer *s, tokens *given, int32_t n, const int8_t *outputs) {
    plain_tokens(given, n, outputs);
    swap_in(hook, s);
    CHECK(begin(hook, given) == MIEN_OK);
}

static mien_status decode(mien_hook *hook, const steer *s, graph *g, int nth) {
    tokens given;
    begin_plain(hook, s, &given, (int32_t)g->n_rows, g->flags);
    CHECK(evaluate(g, hook, nth));
    return mien_hook_end(hook);
}

static mien_applied applied_at(const mien_hook *hook, int32_t layer) {
    return mien_hook_applied(hook, MIEN_SITE_RESIDUAL, layer);
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

enum { ROW_BLOCKS = 3 * 4 + MIEN_ORDERS + 1, HOOK_BLOCKS = 3 }; /* the hook, its sequences, and what is pinned */

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
        CHECK(live_blocks == before + HOOK_BLOCKS); /* what the probe made is gone */
        const bool known = table[i].odd == SOUND || table[i].odd == LARGE_TENSORS;
        product_names = 0;
        CHECK(decode(hook, &s, g, 2) == MIEN_OK);
        CHECK(known == !product_names); /* no block ends in one, and a name that is read costs */
        CHECK(outputs_are(g, &s));
        CHECK(applied_is(hook, g, &s, table[i].path == MIEN_PATH_POST ? all_post : all_in_graph));
        CHECK(mien_hook_source(hook, g->outputs[2], 0) == (known ? g->outputs[2]->src[0] : NULL));
        CHECK(mien_hook_source(hook, g->outputs[2], 1) == (known ? g->outputs[2]->src[1] : NULL));
        CHECK(!mien_hook_source(hook, g->outputs[2], -1) && !mien_hook_source(hook, g->outputs[2], 2));
        CHECK(decode(hook, &nothing, g, 2) == MIEN_OK); /* the graph is the next row's */
        mien_hook_free(hook);
        CHECK(live_blocks == before);
    }
    odd = SOUND;
    mien_program_release(s.program);
    free(g);
}

static void a_lacking_function_is_an_error_where_needed_and_a_reason_where_not(void) {
    const mien_batching one = {1, 512, {MIEN_ORDER_NONE, MIEN_ORDER_NONE}};
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
        CHECK(status == MIEN_OK && set_batching(hook, &fields, &one) == MIEN_OK);
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
    static const int32_t shapes[][2] = {{0, EMBD}, {-1, EMBD}, {LAYERS, 0}, {LAYERS, -8}, {INT32_MIN, INT32_MIN},
                                        {INT32_MAX, EMBD}};
    void *addresses[MAX_SYMBOLS];
    find_symbols(addresses, NULL);
    for (size_t i = 0; i < LENGTH(shapes); i++) {
        mien_hook *hook = (mien_hook *)addresses;
        CHECK(mien_hook_new(&hook, addresses, shapes[i][0], shapes[i][1], MIEN_PATH_AUTO) == MIEN_ERR_SHAPE);
        CHECK(!hook);
    }
    mien_hook_free(NULL);
}

static void a_context_of_no_sequence_or_no_tokens_is_refused_and_nothing_changes(void) {
    static const mien_batching wrong[] = {{0, 8, {0, 0}}, {-1, 8, {0, 0}}, {2, 0, {0, 0}}, {2, -3, {0, 0}},
                                          {INT32_MAX, 8, {0, 0}}};
    graph *g = new_graph(2, NULL);
    const steer s = new_steer("1");
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    swap_in(hook, &s);
    for (size_t i = 0; i < LENGTH(wrong); i++)
        CHECK(set_batching(hook, &fields, &wrong[i]) == MIEN_ERR_SHAPE);
    CHECK(evaluate(g, hook, 1) && outputs_are(g, &s));
    const mien_batching two = {2, 8, {MIEN_ORDER_SIMPLE, MIEN_ORDER_NONE}};
    CHECK(set_batching(hook, &fields, &two) == MIEN_OK); /* and what was swapped in is gone */
    CHECK(evaluate(g, hook, 1) && outputs_are(g, &nothing));
    mien_hook_free(hook);
    mien_program_release(s.program);
    free(g);
}

/* One that adds ones in layer 1. */
static mien_program *new_program_of(int32_t n_layer, mien_site site, int32_t width) {
    static const float ones[EMBD + 1] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    static const int32_t layers[] = {1};
    const mien_term term = {.op = MIEN_OP_ADD, .site = site, .coefficient = 1, .width = width, .rank = 1, .n_rows = 1,
                            .layers = layers, .rows = ones, .window = {0, INT32_MAX, 0, INFINITY}};
    mien_program *program = NULL;
    CHECK(mien_program_new(&program, n_layer, &term, 1, NULL, 0) == MIEN_OK);
    return program;
}

static void a_program_of_another_model_is_refused_and_nothing_changes(void) {
    static const struct {
        int32_t n_layer, width;
        mien_site site;
    } table[] = {{LAYERS + 1, EMBD, MIEN_SITE_RESIDUAL}, {LAYERS - 1, EMBD, MIEN_SITE_RESIDUAL},
                 {LAYERS, EMBD + 1, MIEN_SITE_RESIDUAL}, {LAYERS, EMBD - 1, MIEN_SITE_RESIDUAL},
                 {LAYERS, EMBD, MIEN_SITE_HEADS},  /* located with other rows */
                 {LAYERS, EMBD, MIEN_SITE_MLP}};   /* not located at all */
    graph *g = new_graph(3, NULL);
    const steer s = new_steer("1");
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    CHECK(mien_hook_locate(hook, MIEN_SITE_HEADS, 1, EMBD - 2, "kqv_out", NULL, 0) == MIEN_OK);
    swap_in(hook, &s);
    const long before = live_blocks;
    for (size_t i = 0; i < LENGTH(table); i++) {
        mien_program *other = new_program_of(table[i].n_layer, table[i].site, table[i].width);
        CHECK(swap_at(hook, -1, other, NULL) == MIEN_ERR_SHAPE);
        CHECK(swap_at(hook, 0, NULL, other) == MIEN_ERR_SHAPE);
        CHECK(swap_at(hook, 0, other, other) == MIEN_ERR_SHAPE);
        mien_program_release(other);
    }
    static const int32_t counts[] = {0, -1, 2, INT32_MAX, INT32_MIN};
    static const mien_acting none[2];
    for (size_t i = 0; i < LENGTH(counts); i++) CHECK(mien_hook_swap(hook, none, counts[i], 9) == MIEN_ERR_ROWS);
    CHECK(live_blocks == before);
    CHECK(evaluate(g, hook, 1));
    CHECK(outputs_are(g, &s)); /* what was swapped in before is still there */
    mien_hook_free(hook);
    mien_program_release(s.program);
    free(g);
}

/* ---- failing allocations ------------------------------------------------------------------------ */

static void a_hook_is_made_whole_or_not_at_all(void) {
    void *addresses[MAX_SYMBOLS];
    find_symbols(addresses, NULL);
    const long before = live_blocks;
    graph *g = new_graph(2, NULL);
    const steer s = new_steer("12");
    const mien_batching one = {1, 512, {MIEN_ORDER_NONE, MIEN_ORDER_NONE}};
    bool whole = false;
    for (long after = 0; !whole; after++) {
        mien_hook *hook = (mien_hook *)addresses;
        fail_after = after;
        const mien_status status = mien_hook_new(&hook, addresses, LAYERS, EMBD, MIEN_PATH_AUTO);
        fail_after = -1;
        CHECK(status == (hook ? MIEN_OK : MIEN_ERR_MEMORY));
        if (!hook) continue;
        whole = mien_hook_path(hook) == MIEN_PATH_IN_GRAPH; /* without memory to find out it is not */
        CHECK(set_batching(hook, &fields, &one) == MIEN_OK);
        CHECK(decode(hook, &s, g, 1) == MIEN_OK && outputs_are(g, &s));
        mien_hook_free(hook);
    }
    free(g);
    mien_program_release(s.program);
    CHECK(live_blocks == before);
}

static mien_status set_three(mien_hook *hook) {
    const mien_batching three = {3, 8, {MIEN_ORDER_SIMPLE, MIEN_ORDER_EQUAL}};
    return set_batching(hook, &fields, &three);
}

static const steer *latched; /* what the two below swap in */
static mien_status swap_every(mien_hook *hook) { return swap_at(hook, -1, latched->program, latched->program); }
static mien_status swap_one(mien_hook *hook) { return swap_at(hook, 2, latched->program, latched->program); }

static mien_status begin_one(mien_hook *hook) {
    static tokens given;
    read_tokens(&given, "0@0 1@0 2@0 0@1 1@1 2@1 2@2 2@3*");
    mien_hook_tell_reply(hook, 2, 1);
    return begin(hook, &given);
}

static mien_status locate_one(mien_hook *hook) {
    return mien_hook_locate(hook, MIEN_SITE_MLP, 2, EMBD, "", &model.weights[2], 0);
}

static void whatever_allocation_fails_the_hook_stays_as_it_was(void) {
    static mien_status (*const calls[])(mien_hook *) = {set_three, swap_every, swap_one, begin_one, locate_one};
    const steer s = new_steer("13"), latching = new_steer_like(&(steer){.gated = true, .latch = true}, "02");
    latched = &latching;
    graph *g = new_graph(2, NULL);
    const long before = live_blocks;
    for (size_t c = 0; c < LENGTH(calls); c++) {
        bool done = false;
        for (long after = 0; !done; after++) {
            mien_hook *hook = new_hook_of(MIEN_PATH_AUTO, 3, 8, MIEN_ORDER_SIMPLE, MIEN_ORDER_EQUAL);
            swap_in(hook, calls[c] == begin_one ? &latching : &s);
            const long with_hook = live_blocks;
            fail_after = after;
            const mien_status status = calls[c](hook);
            fail_after = -1;
            done = status == MIEN_OK;
            CHECK(done || status == MIEN_ERR_MEMORY);
            if (!done && calls[c] != begin_one) {
                CHECK(live_blocks == with_hook);
                CHECK(evaluate(g, hook, 1) && outputs_are(g, &s));
            }
            CHECK(calls[c](hook) == MIEN_OK);
            CHECK(decode(hook, &s, g, 1) == MIEN_OK && outputs_are(g, &s));
            mien_hook_free(hook);
            rebuild(g);
            CHECK(live_blocks == before);
        }
    }
    mien_program_release(s.program);
    mien_program_release(latching.program);
    free(g);
}

static void rows_that_find_no_memory_are_an_error(void) {
    graph *g = new_graph(3, NULL);
    const steer s = new_steer("1");
    make_device(g); /* its rows go through memory that the hook allocates */
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    tokens given;
    begin_plain(hook, &s, &given, 3, NULL);
    fail_after = 0;
    CHECK(evaluate(g, hook, 1));
    fail_after = -1;
    CHECK(mien_hook_end(hook) == MIEN_ERR_MEMORY);
    CHECK(outputs_are(g, &nothing));
    CHECK(decode(hook, &s, g, 1) == MIEN_OK);
    CHECK(outputs_are(g, &s));
    mien_hook_free(hook);

    hook = new_hook_of(MIEN_PATH_AUTO, 2, 8, MIEN_ORDER_SIMPLE, MIEN_ORDER_NONE); /* and ids that find none */
    CHECK(swap_at(hook, 1, s.program, s.program) == MIEN_OK);
    read_tokens(&given, "0@0* 1@0* 1@1*");
    CHECK(begin(hook, &given) == MIEN_OK);
    fail_after = 0;
    CHECK(evaluate(g, hook, 1));
    fail_after = -1;
    CHECK(mien_hook_end(hook) == MIEN_ERR_MEMORY);
    CHECK(outputs_are(g, &nothing));
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
    tokens for_one, for_two;
    begin_plain(one, &a, &for_one, 3, NULL);
    begin_plain(two, &b, &for_two, 2, NULL);
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
        CHECK(applied_at(hook, 1).rows == 4 && applied_at(hook, 3).rows == 0);
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
            tokens given;
            begin_plain(hook, &s, &given, 2, NULL);
            CHECK(!mien_hook_eval(t, true, hook));
            CHECK(mien_hook_eval(t, false, hook)); /* false would stop the evaluation */
            for (int32_t layer = 0; layer < LAYERS; layer++) CHECK(!applied_at(hook, layer).met);
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
            CHECK(applied_at(hook, layer).path == mixed[layer]);
            CHECK(applied_at(hook, layer).rows == 3);
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

static void make_wide(fake_tensor *t) { shape(t, TYPE_F32, EMBD / 2, 6); }
static void make_half(fake_tensor *t) { shape(t, TYPE_F16, EMBD, 3); }
static void make_strided(fake_tensor *t) { t->nb[1] += 4; }
static void make_permuted(fake_tensor *t) { t->nb[0] = 3 * sizeof(float), t->nb[1] = sizeof(float); }
static void (*const other_forms[])(fake_tensor *) = {make_wide, make_half, make_strided, make_permuted};

static void an_output_of_another_form_is_an_error_and_untouched(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++)
        for (size_t i = 0; i < LENGTH(other_forms); i++) {
            mien_hook *hook = new_hook(both_paths[p]);
            const steer s = new_steer("2");
            graph *g = new_graph(3, NULL);
            tokens given;
            begin_plain(hook, &s, &given, 6, NULL);
            CHECK(evaluate(g, hook, 1)); /* the micro-batch before it is as it should be */
            CHECK(outputs_are(g, &s));
            rebuild(g);
            other_forms[i](g->outputs[2]);
            const fake_tensor before = *g->outputs[2];
            float data[MAX_ROWS * EMBD];
            memcpy(data, values(g->outputs[2]), sizeof data);
            CHECK(!mien_hook_eval(g->outputs[2], true, hook));
            CHECK(!memcmp(&before, g->outputs[2], sizeof before));
            CHECK(mien_hook_eval(g->outputs[2], false, hook));
            CHECK(same_bits(data, values(g->outputs[2]), MAX_ROWS * EMBD));
            CHECK(mien_hook_end(hook) == MIEN_ERR_TENSOR);
            begin_plain(hook, &nothing, &given, 3, NULL); /* and no matter where nothing acts there */
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
        tokens given;
        begin_plain(hook, &s, &given, 2, NULL);
        CHECK(mien_hook_end(hook) == MIEN_ERR_NOT_MET);
        const int all = g->n_nodes;
        g->n_nodes -= 1; /* the last is l_out-3 */
        CHECK(decode(hook, &s, g, 1) == MIEN_ERR_NOT_MET);
        CHECK(!applied_at(hook, 3).met && applied_at(hook, 1).met);
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
    CHECK(applied_at(hook, 1).rows == 2 && applied_at(hook, 2).rows == 0);
    g->never_computed = NULL;
    CHECK(decode(hook, &s, g, 2) == MIEN_OK);
    CHECK(outputs_are(g, &s));
    mien_hook_free(hook);
    mien_program_release(s.program);
    free(g);
}

static void places_that_there_are_not_have_nothing_applied(void) {
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    static const int32_t numbers[] = {-1, LAYERS, MIEN_SITES, INT32_MAX, INT32_MIN}; /* none a site that is met */
    for (size_t i = 0; i < LENGTH(numbers); i++)
        for (int of_site = 0; of_site < 2; of_site++) {
            const mien_applied applied =
                of_site ? mien_hook_applied(hook, (mien_site)numbers[i], 1) : applied_at(hook, numbers[i]);
            CHECK(!applied.met && !applied.rows && applied.moved == 0 && applied.path == MIEN_PATH_AUTO);
        }
    mien_hook_free(hook);
}

/* ---- sites -------------------------------------------------------------------------------------- */

/* Where a site is, and by what it is found. */
typedef struct {
    where where;
    mien_site site;
    const char *stem; /* NULL: by its weight, which is the router's at the logits */
    int32_t tail;
} place;

static const place every_place[] = {
    {AT_HEADS, MIEN_SITE_HEADS, "kqv_out", 0},   {AT_HEADS, MIEN_SITE_NEURONS, "kqv_out", 0},
    {AT_SCALED, MIEN_SITE_MLP, "ffn_out", 0},    {AT_PRODUCT, MIEN_SITE_ATTENTION, NULL, 0},
    {AT_BIASED, MIEN_SITE_ATTENTION, NULL, 1},   {AT_SCALED, MIEN_SITE_ATTENTION, NULL, 2},
    {AT_PRODUCT, MIEN_SITE_MLP, NULL, 0},        {AT_SCALED, MIEN_SITE_MLP, NULL, 2},
    {AT_LOGITS, MIEN_SITE_EXPERTS, NULL, 0},     {AT_OUTPUT, MIEN_SITE_RESIDUAL, "l_out", 0},
};

static mien_status locate(mien_hook *hook, const place *at, int32_t layer) {
    const void *weight = at->where == AT_LOGITS ? &model.routers[layer] : &model.weights[layer];
    return mien_hook_locate(hook, at->site, layer, width_at(at->where), at->stem ? at->stem : "",
                            at->stem ? NULL : weight, at->tail);
}

static void locate_all(mien_hook *hook, const place *at) {
    for (int32_t layer = 0; layer < LAYERS; layer++) CHECK(locate(hook, at, layer) == MIEN_OK);
}

static steer new_steer_at(const place *at, const char *layers) {
    return new_steer_like(&(steer){.where = at->where, .site = at->site}, layers);
}

static void a_site_is_steered_where_it_was_located(void) {
    static const int8_t flags[] = {0, 1, 0, 1, 1};
    for (size_t p = 0; p < LENGTH(both_paths); p++)
        for (size_t i = 0; i < LENGTH(every_place); i++)
            for (int nth = 1; nth <= 3; nth += 2) {
                const place *at = &every_place[i];
                mien_hook *hook = new_hook(both_paths[p]);
                graph *g = new_graph(5, flags);
                fake_tensor fresh[MAX_NODES];
                memcpy(fresh, g->tensors, sizeof fresh);
                locate_all(hook, at);
                const steer s = new_steer_at(at, "0123"), few = new_steer_at(at, "2");
                const mien_status status = decode(hook, &s, g, nth);
                if (!CHECK(status == MIEN_OK && outputs_are(g, &s))) printf("  place %zu: status %d\n", i, (int)status);
                const bool patched = at->site == MIEN_SITE_RESIDUAL && both_paths[p] == MIEN_PATH_IN_GRAPH;
                CHECK(applied_is(hook, g, &s, patched ? all_in_graph : all_post));
                CHECK(patched || !memcmp(fresh, g->tensors, sizeof fresh));
                CHECK(decode(hook, &few, g, nth) == MIEN_OK && outputs_are(g, &few));
                CHECK(decode(hook, &nothing, g, nth) == MIEN_OK && outputs_are(g, &nothing));
                swap_in(hook, &s); /* outside of a decode, too */
                CHECK(evaluate(g, hook, nth) && outputs_are(g, &s));
                mien_hook_free(hook);
                mien_program_release(s.program);
                mien_program_release(few.program);
                free(g);
            }
}

static void several_sites_are_steered_in_one_graph(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook(both_paths[p]);
        graph *g = new_graph(4, NULL);
        float rows[MIEN_SITES][EMBD], x[EMBD], delta[EMBD];
        mien_term terms[3];
        static const int32_t layers[] = {0};
        static const place places[] = {{AT_HEADS, MIEN_SITE_HEADS, "kqv_out", 0}, {AT_BIASED, MIEN_SITE_MLP, NULL, 1},
                                       {AT_OUTPUT, MIEN_SITE_RESIDUAL, "l_out", 0}};
        for (int i = 0; i < 3; i++) {
            locate_all(hook, &places[i]);
            fill_random(rows[i], EMBD);
            terms[i] = (mien_term){.op = MIEN_OP_ADD, .site = places[i].site, .coefficient = 1, .width = EMBD,
                                   .rank = 1, .n_rows = 1, .layers = layers, .rows = rows[i],
                                   .window = {0, INT32_MAX, 0, INFINITY}};
        }
        steer all = nothing;
        CHECK(mien_program_new(&all.program, LAYERS, terms, 3, NULL, 0) == MIEN_OK);
        CHECK(decode(hook, &all, g, 2) == MIEN_OK);
        for (int64_t r = 0; r < 4; r++) {
            for (int i = 0; i < EMBD; i++) x[i] = g->leaf_data[0][r * EMBD + i] + rows[0][i];
            multiply(delta, model.weight_data[0], x, EMBD);
            for (int i = 0; i < EMBD; i++) {
                delta[i] = (delta[i] + model.bias_data[0][i] + rows[1][i]) * model.scale_data[0][i];
                x[i] = g->leaf_data[LAYERS][r * EMBD + i] + delta[i] + rows[2][i];
            }
            CHECK(same_bits(g->seen[0] + r * EMBD, x, EMBD));
        }
        for (int i = 0; i < 3; i++) CHECK(mien_hook_applied(hook, places[i].site, 0).rows == 4);
        mien_hook_free(hook);
        mien_program_release(all.program);
        free(g);
    }
}

static void a_place_that_never_comes_is_an_error(void) {
    static const fake_tensor elsewhere;
    static const place by_name = {AT_HEADS, MIEN_SITE_HEADS, "kqv_out", 0},
                       by_weight = {AT_PRODUCT, MIEN_SITE_ATTENTION, NULL, 0};
    static const struct {
        const place *at;
        const char *stem; /* where it is said to be at layer 1 */
        const void *weight;
        int32_t tail;
    } table[] = {{&by_name, "kqv", NULL, 0},
                 {&by_weight, "", &elsewhere, 0},
                 {&by_weight, "", &model.weights[1], 4},
                 {&by_weight, "kqv", NULL, 0}}; /* no longer by its weight */
    for (size_t p = 0; p < LENGTH(both_paths); p++)
        for (size_t i = 0; i < LENGTH(table); i++) {
            mien_hook *hook = new_hook(both_paths[p]);
            graph *g = new_graph(2, NULL);
            const mien_site site = table[i].at->site;
            const steer s = new_steer_at(table[i].at, "12");
            locate_all(hook, table[i].at);
            CHECK(mien_hook_locate(hook, site, 1, EMBD, table[i].stem, table[i].weight, table[i].tail) == MIEN_OK);
            CHECK(decode(hook, &s, g, 1) == MIEN_ERR_NOT_MET);
            CHECK(!mien_hook_applied(hook, site, 1).met && mien_hook_applied(hook, site, 2).rows == 2);
            steer one = s;
            one.at[1] = false;
            CHECK(outputs_are(g, &one));
            mien_hook_free(hook);
            mien_program_release(s.program);
            free(g);
        }
    odd = BUFFERS_HIDDEN; /* where the layout is not known nothing is found by its weight */
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    odd = SOUND;
    graph *g = new_graph(2, NULL);
    const steer s = new_steer_at(&by_weight, "2");
    locate_all(hook, &by_weight);
    CHECK(decode(hook, &s, g, 1) == MIEN_ERR_NOT_MET && outputs_are(g, &nothing));
    mien_hook_free(hook);
    mien_program_release(s.program);
    free(g);
}

static void a_place_can_be_located_anew(void) {
    static const place by_name = {AT_SCALED, MIEN_SITE_MLP, "ffn_out", 0},
                       by_weight = {AT_BIASED, MIEN_SITE_MLP, NULL, 1};
    static const place *const order[] = {&by_name, &by_weight, &by_name, &by_weight};
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    graph *g = new_graph(2, NULL);
    for (size_t i = 0; i < LENGTH(order); i++) {
        locate_all(hook, order[i]);
        const steer s = new_steer_at(order[i], "013");
        CHECK(decode(hook, &s, g, 1) == MIEN_OK && outputs_are(g, &s));
        mien_program_release(s.program);
    }
    mien_hook_free(hook);
    free(g);
}

/* As in Step 3.5: the next block calls it what it takes it for, and what follows the last has no number. */
static void a_block_is_told_by_the_name_of_what_its_output_goes_into(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook(both_paths[p]);
        graph *g = new_graph(3, NULL);
        for (int32_t layer = 0; layer < LAYERS; layer++) {
            char stem[32];
            snprintf(stem, sizeof stem, layer < LAYERS - 1 ? "=norm_in-%d" : "=h_next", (int)layer + 1);
            snprintf(g->outputs[layer]->name, sizeof g->outputs[layer]->name, "%s", stem + 1);
            CHECK(mien_hook_locate(hook, MIEN_SITE_RESIDUAL, layer, EMBD, stem, NULL, 0) == MIEN_OK);
        }
        const steer s = new_steer("0123"), last = new_steer("3");
        char *name = g->outputs[LAYERS - 1]->name;
        snprintf(name, sizeof g->outputs[0]->name, "h_next-%d", LAYERS);
        CHECK(decode(hook, &last, g, 1) == MIEN_ERR_NOT_MET && outputs_are(g, &nothing));
        *strrchr(name, '-') = 0;
        CHECK(decode(hook, &last, g, 1) == MIEN_OK && outputs_are(g, &last));
        CHECK(decode(hook, &s, g, 1) == MIEN_OK && outputs_are(g, &s));
        mien_hook_free(hook);
        mien_program_release(s.program);
        mien_program_release(last.program);
        free(g);
    }
}

static void rows_of_another_form_at_a_site_are_an_error_and_untouched(void) {
    static const place at = {AT_HEADS, MIEN_SITE_HEADS, "kqv_out", 0};
    for (size_t i = 0; i < LENGTH(other_forms); i++) {
        mien_hook *hook = new_hook(MIEN_PATH_AUTO);
        locate_all(hook, &at);
        const steer s = new_steer_at(&at, "2");
        graph *g = new_graph(3, NULL);
        tokens given;
        begin_plain(hook, &s, &given, 3, NULL);
        const int until = (int)(g->heads[2] - g->tensors);
        CHECK(evaluate_some(g, hook, 1, 0, until));
        other_forms[i](g->heads[2]);
        float data[MAX_ROWS * EMBD];
        memcpy(data, values(g->heads[2]), sizeof data);
        CHECK(!mien_hook_eval(g->heads[2], true, hook) && mien_hook_eval(g->heads[2], false, hook));
        CHECK(same_bits(data, values(g->heads[2]), MAX_ROWS * EMBD));
        CHECK(mien_hook_end(hook) == MIEN_ERR_TENSOR);
        mien_hook_free(hook);
        mien_program_release(s.program);
        free(g);
    }
}

static void the_residual_stream_can_have_another_name(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook(both_paths[p]);
        const steer s = new_steer("13");
        graph *g = new_graph(3, NULL);
        for (int32_t layer = 0; layer < LAYERS; layer++) {
            snprintf(g->outputs[layer]->name, sizeof g->outputs[layer]->name, "block_end-%d", (int)layer);
            snprintf(g->heads[layer]->name, sizeof g->heads[layer]->name, "l_out-%d", (int)layer);
        }
        for (int32_t layer = 0; layer < LAYERS; layer++)
            CHECK(mien_hook_locate(hook, MIEN_SITE_RESIDUAL, layer, EMBD, "block_end", NULL, 0) == MIEN_OK);
        CHECK(decode(hook, &s, g, 2) == MIEN_OK);
        CHECK(outputs_are(g, &s));
        CHECK(applied_is(hook, g, &s, p ? all_post : all_in_graph));
        mien_hook_free(hook);
        mien_program_release(s.program);
        free(g);
    }
}

static void a_place_that_cannot_be_is_refused(void) {
    static const struct {
        mien_site site;
        int32_t layer, width;
        const char *stem;
        int32_t tail;
        mien_status status;
    } table[] = {
        {(mien_site)-1, 0, EMBD, "x", 0, MIEN_ERR_SITE},
        {(mien_site)MIEN_SITES, 0, EMBD, "x", 0, MIEN_ERR_SITE},
        {MIEN_SITE_MLP, -1, EMBD, "x", 0, MIEN_ERR_LAYER},
        {MIEN_SITE_MLP, LAYERS, EMBD, "x", 0, MIEN_ERR_LAYER},
        {MIEN_SITE_MLP, 0, 0, "x", 0, MIEN_ERR_SHAPE},
        {MIEN_SITE_MLP, 0, -EMBD, "x", 0, MIEN_ERR_SHAPE},
        {MIEN_SITE_MLP, 0, EMBD, "x", -1, MIEN_ERR_SHAPE},
        {MIEN_SITE_MLP, 0, EMBD, "a_stem_that_is_32_characters_long", 0, MIEN_ERR_SHAPE},
        {MIEN_SITE_MLP, 0, EMBD, "a_stem_of_31_characters_is_good", 0, MIEN_OK},
    };
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    for (size_t i = 0; i < LENGTH(table); i++)
        CHECK(mien_hook_locate(hook, table[i].site, table[i].layer, table[i].width, table[i].stem, NULL,
                               table[i].tail) == table[i].status);
    static const place at = {AT_SCALED, MIEN_SITE_MLP, "a_stem_of_31_characters_is_good", 0};
    const steer s = new_steer_at(&at, "0");
    graph *g = new_graph(2, NULL);
    for (fake_tensor *t = g->tensors; t < g->tensors + g->n_nodes; t++)
        if (!strcmp(t->name, "ffn_out-0")) snprintf(t->name, sizeof t->name, "%s-0", at.stem);
    CHECK(decode(hook, &s, g, 1) == MIEN_OK && outputs_are(g, &s));
    mien_hook_free(hook);
    mien_program_release(s.program);
    free(g);
}

/* ---- scouting ----------------------------------------------------------------------------------- */

static void scouting_lists_every_node_and_steers_nothing(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        const steer s = new_steer("13"), windowed = new_steer_like(&(steer){.windowed = true, .stop = 9}, "012");
        graph *g = new_graph(3, NULL);
        mien_hook *hook = new_hook(both_paths[p]);
        for (int round = 0; round < 3; round++) {
            void *const *nodes;
            mien_hook_tell_reply(hook, 0, 0);
            if (round == 1) CHECK(decode(hook, &windowed, g, 1) == MIEN_OK); /* its nodes look for their rows */
            swap_in(hook, round ? &nothing : &s);
            mien_hook_scout(hook);
            CHECK(evaluate(g, hook, 2) && outputs_are(g, &nothing));
            CHECK(mien_hook_nodes(hook, &nodes) == (size_t)g->n_nodes);
            for (int i = 0; i < g->n_nodes; i++) CHECK(nodes[i] == &g->tensors[i]);
        }
        CHECK(decode(hook, &s, g, 1) == MIEN_OK && outputs_are(g, &s));
        mien_hook_free(hook);
        mien_program_release(s.program);
        mien_program_release(windowed.program);
        free(g);
    }
}

static void nodes_that_find_no_memory_are_left_out(void) {
    const long before = live_blocks;
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    graph *g = new_graph(3, NULL);
    void *const *nodes;
    mien_hook_scout(hook);
    fail_after = 0;
    CHECK(evaluate(g, hook, 1));
    fail_after = -1;
    CHECK(mien_hook_nodes(hook, &nodes) == 0);
    CHECK(outputs_are(g, &nothing));
    mien_hook_free(hook);
    free(g);
    CHECK(live_blocks == before);
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
                mien_hook_capture(hook, buffer, layers, N, first, count);
                tokens given;
                begin_plain(hook, &s, &given, TOKENS, flags);
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
                CHECK(applied_at(hook, 1).rows == TOKENS && applied_at(hook, 3).rows == 5);
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
    mien_hook_capture(hook, buffer, layers, 4, 0, 2);
    CHECK(evaluate(g, hook, 1)); /* outside of begin..end nothing is captured */
    CHECK(all_are(buffer, LENGTH(buffer), -1.5f));
    CHECK(decode(hook, &nothing, g, 1) == MIEN_OK);
    CHECK(same_bits(buffer + 2 * EMBD, g->seen[1], 2 * EMBD));
    CHECK(same_bits(buffer + 6 * EMBD, g->seen[3], 2 * EMBD));
    CHECK(all_are(buffer, 2 * EMBD, -1.5f) && all_are(buffer + 4 * EMBD, 2 * EMBD, -1.5f));
    CHECK(!memcmp(fresh, g->tensors, sizeof fresh));
    memcpy(kept, buffer, sizeof kept);
    mien_hook_capture(hook, NULL, NULL, 0, 0, 0);
    refill(g);
    CHECK(decode(hook, &nothing, g, 1) == MIEN_OK);
    CHECK(same_bits(buffer, kept, LENGTH(buffer)));
    mien_hook_free(hook);
    free(g);
}

static void capture_of_rows_that_are_not_the_tokens_is_an_error(void) {
    static const int8_t one[] = {0, 1, 0}, two[] = {1, 1, 0};
    static const int32_t layers[] = {3}, earlier[] = {2};
    float buffer[3 * EMBD];
    fill(buffer, LENGTH(buffer), -1.5f);
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    graph *g = new_graph(3, one);
    tokens given;
    mien_hook_capture(hook, buffer, layers, 1, 0, 3);
    begin_plain(hook, &nothing, &given, 3, two); /* which of them are left is not known */
    CHECK(evaluate(g, hook, 1));
    CHECK(mien_hook_end(hook) == MIEN_ERR_ROWS);
    mien_hook_capture(hook, buffer, earlier, 1, 0, 3);
    shape(g->outputs[2], TYPE_F32, EMBD, 2);
    begin_plain(hook, &nothing, &given, 3, one);
    for (int layer = 0; layer < 3; layer++) {
        mien_hook_eval(g->outputs[layer], true, hook);
        mien_hook_eval(g->outputs[layer], false, hook);
    }
    CHECK(mien_hook_end(hook) == MIEN_ERR_ROWS);
    CHECK(all_are(buffer, LENGTH(buffer), -1.5f));
    make_half(g->outputs[2]);
    begin_plain(hook, &nothing, &given, 3, one);
    CHECK(!mien_hook_eval(g->outputs[2], true, hook));
    CHECK(mien_hook_end(hook) == MIEN_ERR_TENSOR);
    CHECK(all_are(buffer, LENGTH(buffer), -1.5f));
    mien_hook_free(hook);
    free(g);
}

/* ---- watching ----------------------------------------------------------------------------------- */

enum { VECTORS = 3 };

/* The first vector has a row at every layer, the second at layer 2 alone, the third at none. */
static mien_probe *new_probe(int32_t n_layer, int32_t width) {
    static float rows[VECTORS][(LAYERS + 1) * (EMBD + 1)];
    static const double offsets[] = {0.5, -1, 0, 2, 3};
    static const int32_t every[] = {0, 1, 2, 3, 4}, second[] = {2};
    fill_random(rows[0], sizeof rows / sizeof(float));
    const mien_readout readouts[VECTORS] = {{width, (size_t)n_layer, every, rows[0], offsets},
                                            {width, 1, second, rows[1], offsets}, {width, 0, NULL, NULL, NULL}};
    mien_probe *probe = NULL;
    CHECK(mien_probe_new(&probe, n_layer, readouts, VECTORS) == MIEN_OK);
    return probe;
}

static bool probe_reads(const mien_probe *probe, int32_t layer, const float *row, const float *got) {
    float expected[VECTORS];
    mien_probe_read(probe, layer, row, 1, expected);
    return same_bits(got, expected, VECTORS);
}

static void a_probe_reads_rows_before_and_after_steering(void) {
    static const int8_t flags[] = {0, 1, 0, 0, 0, 1, 1};
    static const int64_t sizes[] = {3, 2, 2};
    enum { TOKENS = 7 };
    for (size_t p = 0; p < LENGTH(both_paths); p++)
        for (int kind = 0; kind < 3; kind++) /* steered, on a device, by nothing */
            for (int nth = 1; nth <= 3; nth++) {
                mien_hook *hook = new_hook(both_paths[p]);
                const steer s = kind == 2 ? nothing : new_steer("13");
                mien_probe *probe = new_probe(LAYERS, EMBD);
                float before[TOKENS][LAYERS][VECTORS], after[TOKENS][LAYERS][VECTORS];
                fill(before[0][0], sizeof before / sizeof(float), -1.5f);
                fill(after[0][0], sizeof after / sizeof(float), -1.5f);
                CHECK(watch_with(hook, probe) == MIEN_OK);
                watch_into(hook, before[0][0], after[0][0]);
                tokens given;
                begin_plain(hook, &s, &given, TOKENS, flags);
                int64_t token = 0;
                real_threads = true;
                for (size_t b = 0; b < LENGTH(sizes); token += sizes[b++]) {
                    graph *g = new_graph(sizes[b], flags + token);
                    if (kind == 1) make_device(g);
                    CHECK(evaluate(g, hook, nth));
                    hand expected;
                    long_hand_alike(g, &s, &expected);
                    CHECK(is_as(g, &expected));
                    for (int32_t layer = 0; layer < LAYERS; layer++) {
                        const bool last = layer == LAYERS - 1, patched = g->outputs[layer]->op == OP_MAP_CUSTOM2;
                        CHECK(patched == (!p && !(kind == 1 && layer == 1)));
                        for (int32_t r = 0; r < sizes[b]; r++) {
                            int64_t at = last ? 0 : r;
                            while (last && at < g->n_outputs && g->output_rows[at] != r) at++;
                            const float *got[] = {before[token + r][layer], after[token + r][layer]};
                            if (last && at == g->n_outputs) {
                                CHECK(all_are(got[0], VECTORS, -1.5f) && all_are(got[1], VECTORS, -1.5f));
                                continue;
                            }
                            CHECK(probe_reads(probe, layer, expected.before[layer] + at * EMBD, got[0]));
                            CHECK(probe_reads(probe, layer, expected.after[layer] + at * EMBD, got[1]));
                            CHECK(layer == 2 ? !isnan(got[0][1]) : isnan(got[0][1]));
                        }
                    }
                    free(g);
                }
                real_threads = false;
                CHECK(mien_hook_end(hook) == MIEN_OK);
                const mien_path there = p || kind == 1 ? MIEN_PATH_POST : MIEN_PATH_IN_GRAPH;
                const mien_path acted = s.at[1] ? there : MIEN_PATH_AUTO;
                CHECK(applied_at(hook, 0).path == MIEN_PATH_AUTO && applied_at(hook, 0).rows == 0);
                CHECK(applied_at(hook, 1).path == acted && applied_at(hook, 1).rows == (s.at[1] ? TOKENS : 0));
                mien_hook_free(hook);
                mien_probe_release(probe);
                mien_program_release(s.program);
            }
}

static void watching_can_be_turned_off_and_either_side_left_out(void) {
    const long at_first = live_blocks;
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    graph *g = new_graph(2, NULL);
    fake_tensor fresh[MAX_NODES];
    memcpy(fresh, g->tensors, sizeof fresh);
    mien_probe *probe = new_probe(LAYERS, EMBD);
    CHECK(watch_with(hook, probe) == MIEN_OK);
    mien_probe_release(probe); /* the hook's is the only reference left */
    float read[2][LAYERS][VECTORS], kept[2][LAYERS][VECTORS];
    for (int side = 0; side < 3; side++) {
        fill(read[0][0], sizeof read / sizeof(float), -1.5f);
        watch_into(hook, side == 1 ? read[0][0] : NULL, side == 2 ? read[0][0] : NULL);
        CHECK(decode(hook, &nothing, g, 2) == MIEN_OK && outputs_are(g, &nothing));
        CHECK((side == 0) == all_are(read[0][0], VECTORS, -1.5f));
    }
    memcpy(kept, read, sizeof kept);
    refill(g);
    CHECK(evaluate(g, hook, 1) && outputs_are(g, &nothing)); /* outside of begin..end nothing is read */
    CHECK(!memcmp(kept, read, sizeof kept));
    CHECK(watch_with(hook, NULL) == MIEN_OK);
    CHECK(decode(hook, &nothing, g, 1) == MIEN_OK);
    CHECK(!memcmp(kept, read, sizeof kept));
    CHECK(!memcmp(fresh, g->tensors, sizeof fresh));
    mien_hook_free(hook);
    free(g);
    CHECK(live_blocks == at_first);
}

static void a_probe_of_another_model_is_refused_and_nothing_changes(void) {
    static const int32_t shapes[][2] = {{LAYERS + 1, EMBD}, {LAYERS - 1, EMBD}, {LAYERS, EMBD + 1}, {LAYERS, EMBD - 1}};
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    graph *g = new_graph(1, NULL);
    mien_probe *probe = new_probe(LAYERS, EMBD);
    CHECK(watch_with(hook, probe) == MIEN_OK);
    float read[LAYERS][VECTORS];
    watch_into(hook, read[0], NULL);
    for (size_t i = 0; i < LENGTH(shapes); i++) {
        mien_probe *other = new_probe(shapes[i][0], shapes[i][1]);
        CHECK(watch_with(hook, other) == MIEN_ERR_SHAPE);
        mien_probe_release(other);
    }
    CHECK(decode(hook, &nothing, g, 1) == MIEN_OK);
    for (int32_t layer = 0; layer < LAYERS; layer++) CHECK(probe_reads(probe, layer, g->seen[layer], read[layer]));
    mien_hook_free(hook);
    mien_probe_release(probe);
    free(g);
}

/* A block's output of another width has no rows to copy or to read. */
static void what_is_read_must_have_the_models_width(void) {
    static const int32_t layers[] = {2};
    float buffer[2 * EMBD], read[2][LAYERS][VECTORS];
    for (int watched = 0; watched < 2; watched++) {
        mien_hook *hook = new_hook(MIEN_PATH_AUTO);
        graph *g = new_graph(2, NULL);
        CHECK(mien_hook_locate(hook, MIEN_SITE_RESIDUAL, 2, EXPERTS, "ffn_moe_argsort", NULL, 0) == MIEN_OK);
        mien_probe *probe = new_probe(LAYERS, EMBD);
        if (watched) {
            CHECK(watch_with(hook, probe) == MIEN_OK);
            watch_into(hook, read[0][0], NULL);
        } else {
            mien_hook_capture(hook, buffer, layers, 1, 0, 2);
        }
        CHECK(decode(hook, &nothing, g, 1) == MIEN_ERR_TENSOR);
        mien_hook_free(hook);
        mien_probe_release(probe);
        free(g);
    }
}

static void what_is_asked_for_after_begin_is_too_late(void) {
    static const int32_t layers[] = {1};
    float buffer[2 * EMBD], read[2][LAYERS][VECTORS];
    for (int watched = 0; watched < 2; watched++) {
        mien_hook *hook = new_hook(MIEN_PATH_AUTO);
        graph *g = new_graph(2, NULL);
        mien_probe *probe = new_probe(LAYERS, EMBD);
        tokens given;
        begin_plain(hook, &nothing, &given, 2, NULL);
        if (watched) {
            CHECK(watch_with(hook, probe) == MIEN_OK);
            watch_into(hook, read[0][0], NULL);
        } else {
            mien_hook_capture(hook, buffer, layers, 1, 0, 2);
        }
        CHECK(evaluate(g, hook, 1));
        CHECK(mien_hook_end(hook) == MIEN_ERR_ROWS);
        mien_hook_free(hook);
        mien_probe_release(probe);
        free(g);
    }
}

/* ---- experts ------------------------------------------------------------------------------------ */

static void count_long_hand(const graph *g, int32_t used, int64_t counts[LAYERS][EXPERTS]) {
    for (int layer = 0; layer < LAYERS; layer++)
        for (int64_t r = 0; r < g->n_rows; r++)
            for (int32_t k = 0; k < used; k++) counts[layer][((int32_t *)g->chosen[layer]->data)[r * EXPERTS + k]]++;
}

static void experts_are_counted_by_how_often_they_are_chosen(void) {
    static const place router = {AT_LOGITS, MIEN_SITE_EXPERTS, NULL, 0};
    for (size_t p = 0; p < LENGTH(both_paths); p++)
        for (int32_t used = 0; used <= EXPERTS + 3; used++) {
            mien_hook *hook = new_hook(both_paths[p]);
            int64_t counts[LAYERS][EXPERTS] = {{0}}, expected[LAYERS][EXPERTS] = {{0}};
            mien_hook_count(hook, counts[0], EXPERTS, used, "ffn_moe_argsort");
            locate_all(hook, &router);
            const steer s = new_steer_at(&router, "12");
            for (int round = 0; round < 4; round++) {
                graph *g = new_graph(2 + round, NULL);
                const bool outside = round == 3; /* of begin..end, too */
                CHECK(outside ? evaluate(g, hook, 1) : decode(hook, round % 2 ? &s : &nothing, g, 1) == MIEN_OK);
                count_long_hand(g, used < EXPERTS ? used : EXPERTS, expected);
                CHECK(!memcmp(counts, expected, sizeof counts));
                free(g);
            }
            mien_hook_count(hook, NULL, 0, 0, "");
            graph *g = new_graph(2, NULL);
            CHECK(decode(hook, &s, g, 1) == MIEN_OK && outputs_are(g, &s));
            CHECK(!memcmp(counts, expected, sizeof counts));
            mien_hook_free(hook);
            mien_program_release(s.program);
            free(g);
        }
}

static void choices_that_cannot_be_read_are_an_error(void) {
    int64_t counts[LAYERS][EXPERTS] = {{0}}, zero[LAYERS][EXPERTS] = {{0}};
    graph *g = new_graph(3, NULL);
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    mien_hook_count(hook, counts[0], EXPERTS - 1, 2, "ffn_moe_argsort"); /* of another width */
    CHECK(decode(hook, &nothing, g, 1) == MIEN_ERR_TENSOR);
    mien_hook_count(hook, counts[0], EXPERTS, 2, "ffn_moe_argsort");
    tokens given;
    begin_plain(hook, &nothing, &given, 3, NULL);
    fail_after = 0;
    CHECK(evaluate(g, hook, 1));
    fail_after = -1;
    CHECK(mien_hook_end(hook) == MIEN_ERR_MEMORY);
    mien_hook_count(hook, counts[0], EXPERTS, 2, "a_stem_that_is_32_characters_long"); /* none is */
    CHECK(decode(hook, &nothing, g, 1) == MIEN_OK);
    CHECK(!memcmp(counts, zero, sizeof zero));
    mien_hook_free(hook);
    free(g);
}

/* ---- sequences ---------------------------------------------------------------------------------- */

/* Decode `given` as llama.cpp does, cut as `cut` says: numbers of tokens, with bars between the micro-batches.
 * who: what should act on each of the tokens. right: whether all came out so. */
static mien_status decode_cut(mien_hook *hook, const tokens *given, const char *cut, const acting *who, int nth,
                              bool *right) {
    int64_t rows[LAYERS] = {0};
    double moved[LAYERS] = {0};
    int32_t sequences[MAX_TOKENS], replies[MAX_TOKENS];
    *right = true;
    CHECK(begin(hook, given) == MIEN_OK);
    for (const char *at = cut; *at;) {
        int32_t n = 0, numbers[MAX_ROWS];
        for (; *at && *at != '|'; at += *at == ' ') {
            char *end;
            numbers[n++] = (int32_t)strtol(at, &end, 10);
            at = end;
        }
        at += *at == '|';
        int8_t flags[MAX_ROWS];
        acting acts[MAX_ROWS];
        for (int32_t r = 0; r < n; r++) flags[r] = given->outputs[numbers[r]], acts[r] = who[numbers[r]];
        graph *g = new_graph(n, flags);
        for (int32_t r = 0; r < n; r++) g->id_data[r] = given->ids[numbers[r]];
        CHECK(evaluate(g, hook, nth));
        hand expected;
        long_hand(g, acts, &expected);
        *right = *right && is_as(g, &expected);
        for (int layer = 0; layer < LAYERS; layer++) {
            rows[layer] += expected.rows[layer];
            moved[layer] += expected.moved[layer];
        }
        free(g);
    }
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        mien_applied all = {0, 0, MIEN_PATH_AUTO, false};
        for (int site = 0; site < MIEN_SITES; site++) {
            const mien_applied applied = mien_hook_applied(hook, (mien_site)site, layer);
            all.rows += applied.rows, all.moved += applied.moved;
        }
        *right = *right && all.rows == rows[layer] && about(all.moved, moved[layer]);
    }
    *right = *right && mien_hook_tokens(hook, sequences, replies, MAX_TOKENS) == given->batch.n_tokens;
    for (int32_t t = 0; t < given->batch.n_tokens; t++)
        *right = *right && sequences[t] == (given->batch.seq_id ? given->sets[t][0] : 0) && replies[t] == who[t].reply;
    return mien_hook_end(hook);
}

/* What acts on the tokens: on each sequence's prompt and on its reply; replies: their numbers there. */
static void fill_in(acting *who, const tokens *given, const steer *const on[][2], history *memories,
                    const int32_t *replies) {
    for (int32_t t = 0; t < given->batch.n_tokens; t++) {
        const int32_t sequence = given->sets[t][0];
        who[t] = (acting){on[sequence][replies[t] >= 0], replies[t], &memories[sequence]};
    }
}

static void every_sequence_has_its_own_programs(void) {
    static const mien_order rules[] = {MIEN_ORDER_SIMPLE, MIEN_ORDER_EQUAL, MIEN_ORDER_SEQUENTIAL};
    static const struct {
        const char *words, *cuts[LENGTH(rules)]; /* of at most four tokens */
        int32_t replies[MAX_TOKENS];
    } passes[] = {
        {"0@0 2@0 1@0 0@1 2@1 0@2* 1@1* 2@2*",
         {"0 1 2 3|4 5 6 7", "0 1 2|3 4 6|5 7", "0 2 1|3 6 4|5|7"},
         {-1, -1, -1, -1, -1, -1, -1, -1}},
        {"0@3* 1@2 2@3* 1@3*", {"0 1 2 3", "0 1 2|3", "0 1 2|3"}, {0, -1, 0, -1}},
        {"2@4* 0@4* 1@4*", {"0 1 2", "0 1 2", "0|1 2"}, {1, 1, 0}},
        {"1@5* 2@5* 0@5*", {"0 1 2", "0 1 2", "0 1|2"}, {1, 2, 2}},
        {"0@6 1@6 0@7 0@8* 1@7*", {"0 1 2 3|4", "0 2 1 4|3", "0 2 1 4|3"}, {-1, -1, -1, -1, -1}}, /* another turn */
    };
    static const place places[][4] = { /* all at one site; each at one of its own */
        {{AT_OUTPUT, MIEN_SITE_RESIDUAL, "l_out", 0}, {AT_OUTPUT, MIEN_SITE_RESIDUAL, "l_out", 0},
         {AT_OUTPUT, MIEN_SITE_RESIDUAL, "l_out", 0}, {AT_OUTPUT, MIEN_SITE_RESIDUAL, "l_out", 0}},
        {{AT_HEADS, MIEN_SITE_HEADS, "kqv_out", 0}, {AT_OUTPUT, MIEN_SITE_RESIDUAL, "l_out", 0},
         {AT_BIASED, MIEN_SITE_MLP, NULL, 1}, {AT_SCALED, MIEN_SITE_ATTENTION, "ffn_out", 0}},
    };
    for (size_t p = 0; p < 2 * LENGTH(both_paths); p++)
        for (size_t rule = 0; rule < LENGTH(rules); rule++)
            for (int nth = 1; nth <= 3; nth++) {
                mien_hook *hook = new_hook_of(both_paths[p / 2], 3, 4, rules[rule], MIEN_ORDER_NONE);
                const place *at = places[p % 2];
                for (int i = 0; i < 4; i++) locate_all(hook, &at[i]);
                const steer a = new_steer_at(&at[0], "12"), c = new_steer_at(&at[2], "3"),
                            b = new_steer_like(&(steer){.where = at[1].where, .site = at[1].site, .gated = true,
                                                        .latch = true, .above = 2}, "013"),
                            d = new_steer_like(&(steer){.where = at[3].where, .site = at[3].site, .windowed = true,
                                                        .stop = 2, .ramp = 3}, "23");
                const steer *const on[][2] = {{&a, &b}, {&nothing, &d}, {&c, &nothing}};
                history memories[3] = {{{{0}}}};
                for (int32_t i = 0; i < 3; i++)
                    CHECK(swap_at(hook, i, on[i][0]->program, on[i][1]->program) == MIEN_OK);
                real_threads = nth > 1;
                for (size_t i = 0; i < LENGTH(passes); i++) {
                    tokens given;
                    acting who[MAX_TOKENS];
                    bool right;
                    read_tokens(&given, passes[i].words);
                    fill_in(who, &given, on, memories, passes[i].replies);
                    CHECK(decode_cut(hook, &given, passes[i].cuts[rule], who, nth, &right) == MIEN_OK);
                    if (!CHECK(right)) printf("  path %zu, rule %zu, pass %zu, %d threads\n", p, rule, i, nth);
                }
                real_threads = false;
                mien_hook_free(hook);
                mien_program_release(a.program);
                mien_program_release(b.program);
                mien_program_release(c.program);
                mien_program_release(d.program);
            }
}

/* The rule is simple, and equal what is done where it can't be kept to. */
static void graphs_that_do_not_have_the_tokens_in_an_order_are_an_error(void) {
    static const struct {
        const char *words, *cut;
        mien_status status;
        int same[2]; /* these two tokens' ids are the same */
    } table[] = {
        {"0@0 0@1 1@0* 1@1* 0@2 0@3*", "0 1|2 3|4 5", MIEN_OK, {0}},
        {"0@0 0@1 1@0* 1@1* 0@2 0@3*", "0 2|1 3|4 5", MIEN_OK, {0}},
        {"0@0 1@0 0@1 0@2 1@1* 1@2*", "0 1|2 4|3 5", MIEN_OK, {0}},      /* known by the second graph */
        {"0@0 0@1 0@2 1@0 1@1 1@2*", "0 3|1 4|2 5", MIEN_ERR_ROWS, {1, 3}}, /* the first was taken for 0 1 */
        {"0@0 0@1 1@0* 1@1* 0@2 0@3*", "0 1|1 3|4 5", MIEN_ERR_ROWS, {0}},
    };
    for (size_t i = 0; i < LENGTH(table); i++) {
        mien_hook *hook = new_hook_of(MIEN_PATH_AUTO, 2, 2, MIEN_ORDER_SIMPLE, MIEN_ORDER_EQUAL);
        const steer a = new_steer("12"), b = new_steer("023");
        const steer *const on[][2] = {{&a, &a}, {&b, &b}};
        history memories[2];
        const int32_t replies[] = {-1, -1, -1, -1, -1, -1};
        for (int32_t s = 0; s < 2; s++) CHECK(swap_at(hook, s, on[s][0]->program, NULL) == MIEN_OK);
        tokens given;
        acting who[MAX_TOKENS];
        bool right;
        read_tokens(&given, table[i].words);
        given.ids[table[i].same[0]] = given.ids[table[i].same[1]];
        fill_in(who, &given, on, memories, replies);
        CHECK(decode_cut(hook, &given, table[i].cut, who, 1, &right) == table[i].status);
        CHECK(right == (table[i].status == MIEN_OK));
        mien_hook_free(hook);
        mien_program_release(a.program);
        mien_program_release(b.program);
    }
}

static void name_ids_otherwise(graph *g) { snprintf(g->ids.name, sizeof g->ids.name, "CPU#inp_tokens#0"); }
static void halve_ids(graph *g) { g->ids.nb[0] = 2, shape(&g->ids, TYPE_F16, 2, 1); }
static void have_no_ids(graph *g) { shape(&g->ids, TYPE_I32, 0, 1); }
static void have_more_ids(graph *g) { shape(&g->ids, TYPE_I32, 3, 1); }
static void have_other_ids(graph *g) { g->id_data[0]++; }
static void swap_ids(graph *g) { g->id_data[0] -= 3, g->id_data[1] += 3; }
static void look_nothing_up(graph *g) { g->tensors[0].op = OP_DUP, g->tensors[0].src[1] = NULL; }

/* Embeddings of tokens that are changed before they get a name, as by a LoRA. */
static void leave_unnamed(graph *g) { snprintf(g->tensors[0].name, sizeof g->tensors[0].name, "node_0"); }

/* As llama.cpp's graph of embeddings, which has the nodes for tokens as well. */
static void look_up_in_vain(graph *g) { g->outputs[0]->src[0] = &g->leaves[LAYERS]; }

static void rows_whose_tokens_cannot_be_told_are_left_alone(void) {
    static void (*const changes[])(graph *) = {name_ids_otherwise, halve_ids, have_no_ids, have_more_ids,
                                               have_other_ids, swap_ids, look_nothing_up};
    const steer a = new_steer("013"), b = new_steer("02");
    for (size_t p = 0; p < LENGTH(both_paths); p++)
        for (size_t i = 0; i <= LENGTH(changes); i++) {
            mien_hook *hook = new_hook_of(both_paths[p], 2, 8, MIEN_ORDER_SIMPLE, MIEN_ORDER_NONE);
            graph *g = new_graph(2, NULL);
            tokens given;
            read_tokens(&given, "0@0* 1@0*");
            swap_in(hook, &a);
            CHECK(swap_at(hook, 1, b.program, b.program) == MIEN_OK);
            CHECK(begin(hook, &given) == MIEN_OK && evaluate(g, hook, 1) && mien_hook_end(hook) == MIEN_OK);
            if (i < LENGTH(changes))
                changes[i](g);
            else
                given.batch.token = NULL; /* embeddings */
            CHECK(begin(hook, &given) == MIEN_OK && evaluate(g, hook, 1));
            CHECK(mien_hook_end(hook) == MIEN_ERR_ROWS);
            CHECK(outputs_are(g, &nothing));
            swap_in(hook, &a); /* where the same acts on all, they need not be told */
            CHECK(begin(hook, &given) == MIEN_OK && evaluate(g, hook, 1) && mien_hook_end(hook) == MIEN_OK);
            CHECK(outputs_are(g, &a));
            mien_hook_free(hook);
            free(g);
        }
    mien_program_release(a.program);
    mien_program_release(b.program);
}

/* A model whose first place is met where only rows with logits are left: the ids tell how many tokens there are. */
static void a_graph_has_as_many_tokens_as_ids(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook_of(both_paths[p], 2, 3, MIEN_ORDER_SIMPLE, MIEN_ORDER_NONE);
        const steer a = new_steer("3"), b = new_steer("3");
        tokens given;
        read_tokens(&given, "0@0 1@0* 0@1 1@1 0@2* 1@2*");
        for (int32_t s = 0; s < 2; s++) CHECK(swap_at(hook, s, (s ? b : a).program, NULL) == MIEN_OK);
        CHECK(begin(hook, &given) == MIEN_OK);
        for (int i = 0; i < 2; i++) {
            graph *g = new_graph(3, given.outputs + 3 * i);
            const acting who[] = {{i ? &b : &a, -1, NULL}, {i ? &a : &b, -1, NULL}, {i ? &b : &a, -1, NULL}};
            for (int layer = 0; layer < LAYERS - 1; layer++) memcpy(g->outputs[layer]->name, "x", 2);
            memcpy(g->id_data, given.ids + 3 * i, sizeof(int32_t[3]));
            CHECK(evaluate(g, hook, 2));
            hand expected;
            long_hand(g, who, &expected);
            CHECK(is_as(g, &expected));
            free(g);
        }
        CHECK(mien_hook_end(hook) == MIEN_OK);
        mien_hook_free(hook);
        mien_program_release(a.program);
        mien_program_release(b.program);
    }
}

static void one_sequence_needs_no_ids(void) {
    const steer a = new_steer_like(&(steer){.windowed = true, .stop = 5, .ramp = 4}, "013");
    mien_hook *hook = new_hook_of(MIEN_PATH_AUTO, 2, 8, MIEN_ORDER_SEQUENTIAL, MIEN_ORDER_NONE);
    graph *g = new_graph(2, NULL);
    tokens given;
    read_tokens(&given, "1@5* 1@6*");
    given.batch.token = NULL;
    look_nothing_up(g);
    CHECK(swap_at(hook, 1, NULL, a.program) == MIEN_OK);
    mien_hook_tell_reply(hook, 1, 4);
    CHECK(begin(hook, &given) == MIEN_OK && evaluate(g, hook, 1) && mien_hook_end(hook) == MIEN_OK);
    const acting who[] = {{&a, 1, NULL}, {&a, 2, NULL}};
    hand expected;
    long_hand(g, who, &expected);
    CHECK(is_as(g, &expected));
    mien_hook_free(hook);
    mien_program_release(a.program);
    free(g);
}

static void a_shared_token_is_of_sequences_that_are_steered_alike(void) {
    mien_hook *hook = new_hook_of(MIEN_PATH_AUTO, 3, 8, MIEN_ORDER_SIMPLE, MIEN_ORDER_NONE);
    const steer a = new_steer("12"), b = new_steer("3");
    const steer *const on[][2] = {{&a, &b}, {&a, &b}, {&nothing, &nothing}};
    history memories[3];
    static const int32_t given_ones[] = {-1, -1, -1}, replies[] = {0, -1, 0};
    for (int32_t s = 0; s < 2; s++) CHECK(swap_at(hook, s, a.program, b.program) == MIEN_OK);
    tokens given;
    acting who[MAX_TOKENS];
    bool right;
    read_tokens(&given, "01@0 2@0 10@1*");
    fill_in(who, &given, on, memories, given_ones);
    CHECK(decode_cut(hook, &given, "0 1 2", who, 2, &right) == MIEN_OK && right);
    CHECK(mien_hook_reply(hook, 0) == 2 && mien_hook_reply(hook, 1) == 2);
    read_tokens(&given, "1@2* 2@1* 0@2*");
    given.sets[1][0] = 2;
    mien_hook_tell_reply(hook, 2, 9);
    fill_in(who, &given, on, memories, replies);
    CHECK(decode_cut(hook, &given, "0 1 2", who, 2, &right) == MIEN_OK && right);

    static const char *const wrong[] = {"02@0* 1@0", "1@0 012@1", "20@4*", "3@0*", "0@0 13@1", "/@0"};
    for (size_t i = 0; i < LENGTH(wrong); i++) {
        graph *g = new_graph(2, NULL);
        const int64_t strays = mien_hook_unsteered(hook);
        read_tokens(&given, wrong[i]);
        CHECK(begin(hook, &given) == MIEN_ERR_ROWS);
        int32_t none[] = {77, 77, 77};
        CHECK(mien_hook_tokens(hook, none, none, 3) == 0);
        CHECK(none[0] == 77 && none[1] == 77 && none[2] == 77);
        CHECK(evaluate(g, hook, 1) && outputs_are(g, &nothing)); /* it has not begun */
        CHECK(mien_hook_unsteered(hook) == strays + 1);
        CHECK(mien_hook_end(hook) == MIEN_OK);
        free(g);
    }
    swap_in(hook, &nothing);
    mien_hook_free(hook);
    mien_program_release(a.program);
    mien_program_release(b.program);
}

/* ---- windows and gates -------------------------------------------------------------------------- */

static void sequences_that_there_are_not_have_no_reply(void) {
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    static const int32_t numbers[] = {-1, 1, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < LENGTH(numbers); i++) {
        mien_hook_tell_reply(hook, numbers[i], 3);
        mien_hook_place(hook, numbers[i], 3, 4, true);
        mien_hook_shift(hook, numbers[i], 2);
        CHECK(mien_hook_begin_anew(hook, numbers[i]) == MIEN_OK);
        CHECK(mien_hook_reply(hook, numbers[i]) == INT32_MAX && mien_hook_next(hook, numbers[i]) == 0);
        CHECK(!mien_hook_silent(hook, numbers[i]));
    }
    CHECK(mien_hook_reply(hook, 0) == INT32_MAX && mien_hook_next(hook, 0) == 0);
    mien_hook_tell_reply(hook, 0, 3);
    CHECK(mien_hook_reply(hook, 0) == 3);
    mien_hook_free(hook);
}

enum { WORK_OUT = -1, AS_BEFORE = -2 };

static void a_window_goes_by_the_number_in_the_reply(void) {
    static const struct {
        int32_t told;
        const char *words;
        int32_t replies[4], reply;
    } steps[] = {
        {AS_BEFORE, "0@0 0@1 0@2*", {-1, -1, -1}, 3},
        {AS_BEFORE, "0@3*", {0}, 3},
        {AS_BEFORE, "0@4*", {1}, 3},
        {AS_BEFORE, "0@5*", {2}, 3},
        {AS_BEFORE, "0@6*", {3}, 3},
        {AS_BEFORE, "0@4*", {1}, 3}, /* some of it taken back */
        {AS_BEFORE, "0@5*", {2}, 3},
        {AS_BEFORE, "0@0 0@1*", {-1, -1}, 2}, /* another prompt */
        {AS_BEFORE, "0@2*", {0}, 2},
        {AS_BEFORE, "0@3*", {1}, 2},
        {1, "0@0 0@1* 0@2* 0@3*", {-1, 0, 1, 2}, 1}, /* what only the caller can know */
        {AS_BEFORE, "0@4*", {3}, 1},
        {3, "0@2* 0@3* 0@4*", {-1, 0, 1}, 3},
        {WORK_OUT, "0@0 0@1*", {-1, -1}, 2},
        {AS_BEFORE, "0@2*", {0}, 2},
    };
    static const steer kinds[] = {{.windowed = true, .start = 1, .stop = 3},
                                  {.windowed = true, .stop = INT32_MAX, .ramp = 3},
                                  {.windowed = true, .stop = 1}};
    for (size_t p = 0; p < LENGTH(both_paths); p++)
        for (size_t k = 0; k < LENGTH(kinds); k++) {
            mien_hook *hook = new_hook(both_paths[p]);
            const steer a = new_steer("2"), b = new_steer_like(&kinds[k], "013");
            const steer *const on[][2] = {{k % 2 ? &a : &b, &b}};
            history memory;
            CHECK(swap_at(hook, 0, on[0][0]->program, b.program) == MIEN_OK);
            for (size_t i = 0; i < LENGTH(steps); i++) {
                tokens given;
                acting who[MAX_TOKENS];
                bool right;
                if (steps[i].told != AS_BEFORE) mien_hook_tell_reply(hook, 0, steps[i].told);
                read_tokens(&given, steps[i].words);
                fill_in(who, &given, on, &memory, steps[i].replies);
                static const char *const cuts[] = {"", "0", "0 1", "0 1|2", "0|1 2 3"}; /* for as many tokens */
                CHECK(decode_cut(hook, &given, cuts[given.batch.n_tokens], who, 2, &right) == MIEN_OK);
                if (!CHECK(right && mien_hook_reply(hook, 0) == steps[i].reply)) printf("  kind %zu, step %zu\n", k, i);
            }
            mien_hook_free(hook);
            mien_program_release(a.program);
            mien_program_release(b.program);
        }
}

static void a_reply_goes_on_where_it_was_moved_to(void) {
    static const struct {
        char what; /* shift by `a`, or place at `a` and `b`, or nothing */
        int32_t a, b;
        bool without_positions;
        const char *words;
        int32_t replies[2], reply, next;
    } steps[] = {
        {0, 0, 0, false, "0@0 0@1*", {-1, -1}, 2, 2},
        {0, 0, 0, false, "0@2*", {0}, 2, 3},
        {0, 0, 0, false, "0@3*", {1}, 2, 4},
        {'s', -1, 0, false, "0@3*", {2}, 1, 4},
        {'s', 7, 0, true, "0@99*", {3}, 8, 12},
        {'s', -10, 0, false, "0@2*", {4}, -2, 3}, /* its beginning was discarded, even */
        {0, 0, 0, true, "0@99*", {5}, -2, 4},
        {'p', 6, 8, true, "0@99*", {2}, 6, 9},    /* another state of it */
        {0, 0, 0, true, "0@99*", {3}, 6, 10},
        {'p', -5, 1, false, "0@1*", {6}, -5, 2},
        {0, 0, 0, true, "0@98 0@99*", {-1, -1}, 4, 4},
        {'p', INT32_MAX, 0, false, "0@0 0@1*", {-1, -1}, 2, 2},
        {'p', INT32_MAX, 3, false, "0@3*", {0}, 3, 4},
        {'q', 1, 5, false, "0@5*", {-1}, 6, 6}, /* it can't have been drawn */
        {'p', 1, 5, false, "0@5*", {4}, 1, 6},
    };
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    const steer s = new_steer_like(&(steer){.windowed = true, .start = 1, .stop = 5, .ramp = 3}, "02");
    const steer *const on[][2] = {{&nothing, &s}};
    history memory;
    mien_hook_shift(hook, 0, 3); /* of a reply that has not begun */
    CHECK(mien_hook_reply(hook, 0) == INT32_MAX && mien_hook_next(hook, 0) == 3);
    CHECK(swap_at(hook, 0, NULL, s.program) == MIEN_OK);
    for (size_t i = 0; i < LENGTH(steps); i++) {
        tokens given;
        acting who[MAX_TOKENS];
        bool right;
        if (steps[i].what == 's') mien_hook_shift(hook, 0, steps[i].a);
        if (steps[i].what == 'p') mien_hook_place(hook, 0, steps[i].a, steps[i].b, false);
        if (steps[i].what == 'q') mien_hook_place(hook, 0, steps[i].a, steps[i].b, true);
        if (steps[i].what) CHECK(mien_hook_silent(hook, 0) == (steps[i].what == 'q'));
        read_tokens(&given, steps[i].words);
        if (steps[i].without_positions) given.batch.pos = NULL;
        fill_in(who, &given, on, &memory, steps[i].replies);
        CHECK(decode_cut(hook, &given, given.batch.n_tokens == 2 ? "0 1" : "0", who, 1, &right) == MIEN_OK);
        CHECK(mien_hook_reply(hook, 0) == steps[i].reply && mien_hook_next(hook, 0) == steps[i].next);
        if (!CHECK(right)) printf("  step %zu\n", i);
    }
    mien_hook_free(hook);
    mien_program_release(s.program);
}

/* Decode one token at `position`, which is number `reply`, in a graph of one row. */
static bool decode_one(mien_hook *hook, graph *g, int32_t position, const acting *who, int nth) {
    tokens given;
    read_tokens(&given, "0@0*");
    given.positions[0] = position;
    CHECK(begin(hook, &given) == MIEN_OK && evaluate(g, hook, nth));
    CHECK(mien_hook_end(hook) == MIEN_OK);
    hand expected;
    long_hand(g, who, &expected);
    return is_as(g, &expected);
}

static void gates_remember_a_reply_that_is_taken_back(void) {
    static const steer kinds[] = {{.gated = true, .latch = true, .above = 8},
                                  {.gated = true, .hysteresis = 9, .above = 2},
                                  {.gated = true, .latch = true, .hysteresis = 3, .above = 7}};
    enum { REPLY = 12, FROM = 5 };
    static float data[REPLY][LAYERS + 1][MAX_ROWS * EMBD], seen[REPLY][LAYERS][MAX_ROWS * EMBD];
    for (size_t p = 0; p < LENGTH(both_paths); p++)
        for (size_t k = 0; k < LENGTH(kinds); k++)
            for (int32_t back = 0; back < REPLY; back += 3) {
                mien_hook *hook = new_hook(both_paths[p]);
                const steer s = new_steer_like(&kinds[k], "0123");
                graph *g = new_graph(1, NULL);
                history memory = {{{0}}}, anew = {{{0}}};
                swap_in(hook, &s);
                mien_hook_tell_reply(hook, 0, FROM);
                for (int32_t i = 0; i < REPLY; i++) {
                    refill(g);
                    memcpy(data[i], g->leaf_data, sizeof data[i]);
                    CHECK(decode_one(hook, g, FROM + i, &(acting){&s, i, &memory}, 2));
                    memcpy(seen[i], g->seen, sizeof seen[i]);
                }
                for (int32_t i = back; i < REPLY; i++) { /* the same once more */
                    memcpy(g->leaf_data, data[i], sizeof data[i]);
                    CHECK(decode_one(hook, g, FROM + i, &(acting){&s, i, &memory}, 2));
                    CHECK(!memcmp(seen[i], g->seen, sizeof seen[i]));
                }
                hand unused;
                for (int32_t i = 0; i < back; i++) { /* and another way, as if there had been no first */
                    memcpy(g->leaf_data, data[i], sizeof data[i]);
                    long_hand(g, &(acting){&s, i, &anew}, &unused);
                }
                for (int32_t i = back; i < REPLY; i++) {
                    refill(g);
                    CHECK(decode_one(hook, g, FROM + i, &(acting){&s, i, &anew}, 2));
                }
                mien_hook_free(hook);
                mien_program_release(s.program);
                free(g);
            }
}

/* What a gate above 0 reads at every layer has the sign of this. */
static void set_sign(graph *g, int64_t row, bool positive) {
    g->leaf_data[LAYERS][row * EMBD] = positive ? 1e5f : -1e5f;
}

static void a_reply_or_a_swap_begins_gates_anew(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook(both_paths[p]);
        const steer s = new_steer_like(&(steer){.gated = true, .latch = true}, "012");
        graph *g = new_graph(1, NULL), *prompt = new_graph(2, NULL);
        swap_in(hook, &s);
        for (int round = 0; round < 3; round++) {
            history memory = {{{0}}};
            tokens given;
            read_tokens(&given, "0@0 0@1*"); /* another prompt: another reply */
            if (round < 2) {
                CHECK(begin(hook, &given) == MIEN_OK && evaluate(prompt, hook, 1));
                CHECK(mien_hook_end(hook) == MIEN_OK);
            }
            static const bool positive[] = {false, true, false, false};
            const int32_t from = round == 2 ? 4 : 0; /* it goes on where the one before was */
            for (int32_t i = from; i < from + 4; i++) {
                set_sign(g, 0, positive[i - from]);
                CHECK(decode_one(hook, g, 2 + i, &(acting){&s, i, &memory}, 1));
                CHECK(applied_at(hook, 1).rows == (i > from));
            }
            if (round == 1) swap_in(hook, &s); /* the same one, even */
        }
        mien_hook_free(hook);
        mien_program_release(s.program);
        free(g);
        free(prompt);
    }
}

/* anew: not by a swap, but told to. */
static void one_sequences_gates_begin_anew(bool anew) {
    mien_hook *hook = new_hook_of(MIEN_PATH_AUTO, 2, 8, MIEN_ORDER_SIMPLE, MIEN_ORDER_NONE);
    const steer s = new_steer_like(&(steer){.gated = true, .latch = true}, "02");
    history memories[2] = {{{{0}}}};
    graph *g = new_graph(2, NULL);
    swap_in(hook, &s);
    for (int32_t i = 0; i < 4; i++) {
        tokens given;
        read_tokens(&given, "0@0* 1@0*");
        given.positions[0] = given.positions[1] = 7 + i;
        set_sign(g, 0, i == 0);
        set_sign(g, 1, i == 0);
        if (i == 2) {
            const long before = live_blocks;
            fail_after = 0; /* then nothing changes */
            if (anew) CHECK(mien_hook_begin_anew(hook, 1) == MIEN_ERR_MEMORY);
            fail_after = -1;
            CHECK(live_blocks == before);
        }
        if (i == 3) {
            CHECK((anew ? mien_hook_begin_anew(hook, 1) : swap_at(hook, 1, s.program, s.program)) == MIEN_OK);
            memset(&memories[1], 0, sizeof memories[1]);
        }
        const acting who[] = {{&s, i, &memories[0]}, {&s, i, &memories[1]}};
        CHECK(begin(hook, &given) == MIEN_OK && evaluate(g, hook, 2) && mien_hook_end(hook) == MIEN_OK);
        hand expected;
        long_hand(g, who, &expected);
        CHECK(is_as(g, &expected));
        CHECK(applied_at(hook, 0).rows == (i < 3 ? 2 : 1));
    }
    mien_hook_free(hook);
    mien_program_release(s.program);
    free(g);
}

static void what_a_sequences_gates_remember_is_its_own(void) {
    one_sequences_gates_begin_anew(false);
    one_sequences_gates_begin_anew(true);
}

static void gates_that_remember_are_run_in_order_by_one_thread(void) {
    enum { ROUNDS = 40 };
    const steer s = new_steer_like(&(steer){.gated = true, .latch = true}, "0123");
    for (int round = 0; round < ROUNDS; round++) {
        real_threads = round % 4 < 2;
        mien_hook *hook = new_hook(both_paths[round % 2]);
        graph *g = new_graph(MAX_ROWS, NULL);
        history memory = {{{0}}};
        acting who[MAX_ROWS];
        const int first = round % (MAX_ROWS + 1);
        for (int r = 0; r < MAX_ROWS; r++) {
            set_sign(g, r, r == first);
            who[r] = (acting){&s, r + 1, &memory};
        }
        swap_in(hook, &s);
        mien_hook_tell_reply(hook, 0, 0);
        tokens given;
        read_tokens(&given, "0@1* 0@2* 0@3* 0@4* 0@5* 0@6* 0@7* 0@8*");
        CHECK(begin(hook, &given) == MIEN_OK && evaluate(g, hook, 1 + round % 3) && mien_hook_end(hook) == MIEN_OK);
        hand expected;
        long_hand(g, who, &expected);
        CHECK(is_as(g, &expected));
        CHECK(applied_at(hook, 2).rows == MAX_ROWS - first);
        mien_hook_free(hook);
        free(g);
    }
    real_threads = false;
    mien_program_release(s.program);
}

/* ---- outside of a decode ------------------------------------------------------------------------ */

static void an_evaluation_outside_of_a_decode_takes_what_was_swapped_in_last(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook(both_paths[p]);
        const steer a = new_steer("12"), b = new_steer("123");
        graph *g = new_graph(3, NULL);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &nothing));
        CHECK(swap_at(hook, -1, b.program, a.program) == MIEN_OK); /* several tokens at once are given */
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &b));
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &b));
        swap_in(hook, &a);
        swap_in(hook, &b);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &b));
        CHECK(applied_is(hook, g, &b, p ? all_post : all_in_graph)); /* of this graph alone */

        tokens given;
        begin_plain(hook, &a, &given, 6, NULL); /* a decode is what it was begun with, whatever is swapped in */
        swap_in(hook, &nothing);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &a));
        swap_in(hook, &b);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &a));
        CHECK(mien_hook_end(hook) == MIEN_OK);
        CHECK(applied_at(hook, 1).rows == 6);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &b));
        swap_in(hook, &nothing);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &nothing));
        CHECK(mien_hook_unsteered(hook) == 0); /* nothing that should have been done was not */
        mien_hook_free(hook);
        mien_program_release(a.program);
        mien_program_release(b.program);
        free(g);
    }
}

static void sequences_that_are_steered_differently_are_not_steered_outside_of_a_decode(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook_of(both_paths[p], 3, 8, MIEN_ORDER_SIMPLE, MIEN_ORDER_NONE);
        const steer a = new_steer("12"), b = new_steer("03");
        graph *g = new_graph(3, NULL);
        swap_in(hook, &a);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &a) && mien_hook_unsteered(hook) == 0);
        CHECK(swap_at(hook, 2, a.program, b.program) == MIEN_OK);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &nothing) && mien_hook_unsteered(hook) == 1);
        CHECK(swap_at(hook, 2, b.program, a.program) == MIEN_OK);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &nothing) && mien_hook_unsteered(hook) == 2);
        tokens given;
        read_tokens(&given, "0@0* 1@0* 1@1*");
        CHECK(begin(hook, &given) == MIEN_OK && evaluate(g, hook, 2) && mien_hook_end(hook) == MIEN_OK);
        CHECK(outputs_are(g, &a) && mien_hook_unsteered(hook) == 2);
        CHECK(swap_at(hook, 2, a.program, a.program) == MIEN_OK);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &a) && mien_hook_unsteered(hook) == 2);
        mien_hook_free(hook);
        mien_program_release(a.program);
        mien_program_release(b.program);
        free(g);
    }
}

/* What the decode before knew of its tokens, and the programs that acted there, are gone. */
static void nothing_of_a_decode_is_left_outside_of_it(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook_of(both_paths[p], 2, 8, MIEN_ORDER_SIMPLE, MIEN_ORDER_NONE);
        const steer a = new_steer("012"), b = new_steer("23"), c = new_steer("13");
        graph *g = new_graph(3, NULL);
        CHECK(swap_at(hook, 0, a.program, a.program) == MIEN_OK);
        CHECK(swap_at(hook, 1, b.program, b.program) == MIEN_OK);
        mien_program_release(a.program);
        mien_program_release(b.program);
        tokens given;
        read_tokens(&given, "0@0* 1@0* 1@1*");
        CHECK(begin(hook, &given) == MIEN_OK && evaluate(g, hook, 2) && mien_hook_end(hook) == MIEN_OK);
        swap_in(hook, &c); /* the last reference to the others is gone */
        memset(&given, 0x55, sizeof given);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &c));
        swap_in(hook, &nothing);
        CHECK(evaluate(g, hook, 2) && outputs_are(g, &nothing));
        mien_hook_free(hook);
        mien_program_release(c.program);
        free(g);
    }
}

static void what_is_evaluated_outside_of_a_decode_is_followed(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook(both_paths[p]);
        const steer latching = new_steer_like(&(steer){.gated = true, .latch = true}, "012"),
                    windowed = new_steer_like(&(steer){.windowed = true, .stop = 100, .ramp = 8}, "012");
        graph *g = new_graph(4, NULL), *one = new_graph(1, NULL);
        history memory = {{{0}}};
        hand expected;
        swap_in(hook, &latching);
        mien_hook_tell_reply(hook, 0, 0);
        set_sign(one, 0, false);
        CHECK(decode_one(hook, one, 0, &(acting){&latching, 0, &memory}, 1));
        for (int r = 0; r < 4; r++) set_sign(g, r, r == 1);
        CHECK(evaluate(g, hook, 3));
        const acting latched_ones[] = {{&latching, 1, &memory}, {&latching, 2, &memory}, {&latching, 3, &memory}, {&latching, 4, &memory}};
        long_hand(g, latched_ones, &expected);
        CHECK(is_as(g, &expected) && applied_at(hook, 1).rows == 3);
        swap_in(hook, &windowed);
        CHECK(evaluate(g, hook, 3));
        const acting grown[] = {{&windowed, 5, NULL}, {&windowed, 6, NULL}, {&windowed, 7, NULL}, {&windowed, 8, NULL}};
        long_hand(g, grown, &expected);
        CHECK(is_as(g, &expected));
        mien_hook_tell_reply(hook, 0, -1);
        CHECK(evaluate(g, hook, 3) && outputs_are(g, &nothing)); /* given, as several at once are */
        CHECK(applied_at(hook, 1).met && applied_at(hook, 1).rows == 0);
        CHECK(evaluate(one, hook, 1));
        long_hand(one, &(acting){&windowed, 0, NULL}, &expected); /* one more is a reply's */
        CHECK(is_as(one, &expected));
        leave_unnamed(one);
        CHECK(evaluate(one, hook, 1));
        long_hand(one, &(acting){&windowed, 1, NULL}, &expected);
        CHECK(is_as(one, &expected));
        look_up_in_vain(one);
        CHECK(evaluate(one, hook, 1) && outputs_are(one, &nothing)); /* and embeddings are given */
        look_nothing_up(one);
        CHECK(evaluate(one, hook, 1) && outputs_are(one, &nothing));
        static const int32_t noted[][2] = {{4, 0}, {4, 0}, {4, 4}, {1, 0}, {1, 0}, {1, 1}, {1, 1}};
        mien_stray strays[LENGTH(noted) + 1];
        CHECK(mien_hook_strays(hook, strays, LENGTH(strays)) == LENGTH(noted));
        for (size_t i = 0; i < LENGTH(noted); i++)
            CHECK(strays[i].position == -1 && strays[i].rows == noted[i][0] && strays[i].given == noted[i][1]);
        CHECK(strays[0].id != strays[1].id && strays[1].id == strays[6].id && strays[6].id == mien_hook_acted(hook));
        CHECK(mien_hook_strays(hook, strays, LENGTH(strays)) == 0 && mien_hook_unsteered(hook) == 0);
        for (int i = 0; i < 100; i++) evaluate(one, hook, 1); /* more than there is room for */
        CHECK(mien_hook_strays(hook, strays, LENGTH(strays)) == -1 && mien_hook_strays(hook, strays, LENGTH(strays)) == 0);
        mien_hook_free(hook);
        mien_program_release(latching.program);
        mien_program_release(windowed.program);
        free(g);
        free(one);
    }
}

/* Which of several sequences a token is of is not known, so neither is its number in a reply. */
static void windows_of_several_sequences_need_a_decode(void) {
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        mien_hook *hook = new_hook_of(both_paths[p], 2, 8, MIEN_ORDER_SIMPLE, MIEN_ORDER_NONE);
        const steer windowed = new_steer_like(&(steer){.windowed = true, .stop = 100}, "012"), plain = new_steer("1");
        graph *g = new_graph(1, NULL);
        CHECK(mien_hook_acted(hook) == 0);
        swap_in(hook, &windowed);
        CHECK(evaluate(g, hook, 1) && outputs_are(g, &nothing) && mien_hook_unsteered(hook) == 1);
        CHECK(swap_at(hook, -1, NULL, plain.program) == MIEN_OK);
        CHECK(evaluate(g, hook, 1) && outputs_are(g, &nothing) && mien_hook_unsteered(hook) == 2);
        swap_in(hook, &plain);
        CHECK(evaluate(g, hook, 1) && outputs_are(g, &plain) && mien_hook_unsteered(hook) == 2);
        mien_hook_free(hook);
        mien_program_release(windowed.program);
        mien_program_release(plain.program);
        free(g);
    }
}

/* ---- swapping ----------------------------------------------------------------------------------- */

static void a_swap_within_a_graph_waits_for_the_next(void) {
    for (size_t i = 0; i < LENGTH(every_place); i++) {
        const place *at = &every_place[i];
        mien_hook *hook = new_hook(MIEN_PATH_AUTO);
        locate_all(hook, at);
        const steer s = new_steer_at(at, "0123"), residual = new_steer("02");
        const steer *const others[] = {&nothing, &residual};
        graph *g = new_graph(3, NULL);
        const int middle = (int)(g->outputs[1] - g->tensors) + 1;
        for (int k = 0; k < 2; k++) {
            swap_in(hook, &s);
            CHECK(evaluate_some(g, hook, 1, 0, middle));
            swap_in(hook, others[k]);
            CHECK(evaluate_some(g, hook, 1, middle, g->n_nodes) && outputs_are(g, &s));
            CHECK(evaluate_some(g, hook, 1, 0, middle));
            swap_in(hook, &s);
            CHECK(evaluate_some(g, hook, 1, middle, g->n_nodes) && outputs_are(g, others[k]));
        }
        mien_hook_free(hook);
        mien_program_release(s.program);
        mien_program_release(residual.program);
        free(g);
    }
}

static void the_hook_keeps_what_it_was_given_and_lets_go_of_it(void) {
    const long before = live_blocks;
    mien_hook *hook = new_hook(MIEN_PATH_AUTO);
    const long with_hook = live_blocks;
    for (int i = 0; i < 3; i++) {
        const steer s = new_steer("1"), t = new_steer("1"); /* the hook's is the only reference left */
        CHECK(swap_at(hook, i - 1 < 0 ? -1 : 0, s.program, t.program) == MIEN_OK);
        mien_program_release(s.program);
        mien_program_release(t.program);
        CHECK(live_blocks == with_hook + 3); /* with what is set, which keeps them */
    }
    graph *g = new_graph(2, NULL);
    evaluate(g, hook, 1);
    swap_in(hook, &nothing);
    evaluate(g, hook, 1);
    free(g);
    CHECK(live_blocks == with_hook + 2 + ROW_BLOCKS); /* that nothing is set, the graph's positions, and its rows */
    const steer s = new_steer_like(&(steer){.gated = true, .latch = true}, "1"), t = new_steer("2");
    tokens given;
    begin_plain(hook, &s, &given, 1, NULL);
    swap_in(hook, &t);
    mien_program_release(s.program);
    mien_program_release(t.program);
    mien_hook_free(hook); /* in the middle of a decode, even */
    CHECK(live_blocks == before);
}

enum { APPLIERS = 2, APPLIED_EACH = 500000, EVALUATIONS = 400, PATIENCE = 100000, CHOICES = 4, SWAPS = 10000 };

typedef struct {
    mien_hook *hook;
    const steer *choices[CHOICES];
    atomic_bool done;
} shared_state;

static void *keep_swapping(void *argument) {
    shared_state *shared = argument;
    for (size_t i = 0; !shared->done; i++) swap_in(shared->hook, shared->choices[i % 3]);
    return NULL;
}

static void *keep_applying(void *argument) {
    shared_state *shared = argument;
    long wrong = 0;
    for (int i = 0; i < APPLIED_EACH; i++) {
        const steer *s = shared->choices[i % 2];
        float row[EMBD] = {0};
        mien_program *program = mien_program_retain(s->program);
        mien_program_apply(program, MIEN_SITE_RESIDUAL, 2, row, 1, NULL, NULL);
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

/* Of all sequences or of one, 10,000 times. */
static void *swap_often(void *argument) {
    shared_state *shared = argument;
    for (int i = 0; i < SWAPS; i++) {
        mien_program *program = shared->choices[i * 7 / 3 % CHOICES]->program;
        CHECK(swap_at(shared->hook, i % 3 - 1, program, program) == MIEN_OK);
    }
    shared->done = true;
    return NULL;
}

/* The choice that acted on the rows of `sequence` in both graphs of a decode; CHOICES where none did. */
static int choice_of(const shared_state *shared, graph *const graphs[2], int sequence) {
    for (int c = 0; c < CHOICES; c++) {
        bool same = true;
        for (int i = 0; i < 2; i++) {
            const acting who[] = {{shared->choices[c], 1 + i, NULL}, {shared->choices[c], 1 + i, NULL}};
            hand expected;
            long_hand(graphs[i], who, &expected);
            for (int layer = 0, at = sequence * EMBD; layer < LAYERS && same; layer++)
                same = same_bits(graphs[i]->seen[layer] + at, expected.after[layer] + at, EMBD);
        }
        if (same) return c;
    }
    return CHOICES;
}

/* Two sequences, whose replies have a token in each of two micro-batches. The gate is always open. */
static void a_decode_is_of_one_program_a_sequence_while_others_are_swapped_in(void) {
    const long before = live_blocks;
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        const steer plain = new_steer("123"),
                    windowed = new_steer_like(&(steer){.windowed = true, .start = 1, .stop = 9, .ramp = 3}, "02"),
                    gated = new_steer_like(&(steer){.gated = true, .latch = true, .above = -1e9f}, "013");
        mien_hook *hook = new_hook_of(both_paths[p], 2, 2, MIEN_ORDER_SIMPLE, MIEN_ORDER_EQUAL);
        shared_state shared = {hook, {&plain, &windowed, &gated, &nothing}, false};
        graph *const graphs[] = {new_graph(2, NULL), new_graph(2, NULL)};
        tokens given;
        read_tokens(&given, "0@7* 1@7* 0@8* 1@8*");
        for (int i = 0; i < 4; i++) graphs[i / 2]->id_data[i % 2] = given.ids[i];
        for (int32_t s = 0; s < 2; s++) mien_hook_tell_reply(hook, s, 6);
        long met[CHOICES + 1] = {0}, evaluated = 0;
        pthread_t swapper;
        real_threads = true;
        CHECK(!pthread_create(&swapper, NULL, swap_often, &shared));
        for (; !shared.done || evaluated < EVALUATIONS; evaluated++) {
            CHECK(begin(hook, &given) == MIEN_OK);
            for (int i = 0; i < 2; i++) CHECK(evaluate(graphs[i], hook, 2));
            CHECK(mien_hook_end(hook) == MIEN_OK);
            for (int s = 0; s < 2; s++) met[choice_of(&shared, graphs, s)]++;
        }
        pthread_join(swapper, NULL);
        real_threads = false;
        CHECK(!met[CHOICES]); /* a mixture */
        CHECK(met[0] + met[1] + met[2] + met[3] == 2 * evaluated);
        mien_hook_free(hook);
        for (int i = 0; i < 2; i++) free(graphs[i]);
        mien_program_release(plain.program);
        mien_program_release(windowed.program);
        mien_program_release(gated.program);
    }
    CHECK(live_blocks == before);
}

/* Where a decode of two graphs is read into. Made anew for each decode, so that a write after it was turned off is a
 * write to freed memory. */
enum { READ_ROWS = 3, READ_TOKENS = 2 * READ_ROWS };

typedef struct {
    mien_probe *probe;
    float before[READ_TOKENS][LAYERS][VECTORS], after[READ_TOKENS][LAYERS][VECTORS];
    float captured[2][READ_TOKENS][EMBD]; /* of layers 2 and 1 */
    int64_t counts[LAYERS][EXPERTS];
} reading;

static const int32_t read_layers[2] = {2, 1};

/* kinds: a bit for what is watched, captured and counted. */
static reading *read_into(mien_hook *hook, unsigned kinds) {
    reading *made = malloc(sizeof *made);
    memset(made, 0, sizeof *made);
    fill(made->before[0][0], sizeof made->before / sizeof(float), -1.5f);
    fill(made->after[0][0], sizeof made->after / sizeof(float), -1.5f);
    fill(made->captured[0][0], sizeof made->captured / sizeof(float), -1.5f);
    if (kinds & 1) made->probe = new_probe(LAYERS, EMBD);
    CHECK(mien_hook_watch(hook, made->probe, made->before[0][0], made->after[0][0], READ_TOKENS) == MIEN_OK);
    mien_hook_capture(hook, kinds & 2 ? made->captured[0][0] : NULL, read_layers, 2, 0, READ_TOKENS);
    mien_hook_count(hook, kinds & 4 ? made->counts[0] : NULL, EXPERTS, 2, "ffn_moe_argsort");
    return made;
}

static void free_reading(reading *made) {
    if (made) {
        mien_probe_release(made->probe);
        memset(made, 0x7f, sizeof *made);
    }
    free(made);
}

/* Of graph i, on whose rows `expected` was done. */
static bool is_read(const reading *made, unsigned kinds, const graph *g, int i, const hand *expected) {
    bool right = true;
    for (int r = 0; r < READ_ROWS; r++) {
        const int token = i * READ_ROWS + r;
        for (int32_t layer = 0; layer < LAYERS; layer++) {
            const float *before = made->before[token][layer], *after = made->after[token][layer];
            if (kinds & 1)
                right = right && probe_reads(made->probe, layer, expected->before[layer] + r * EMBD, before) &&
                        probe_reads(made->probe, layer, expected->after[layer] + r * EMBD, after);
            else
                right = right && all_are(before, VECTORS, -1.5f) && all_are(after, VECTORS, -1.5f);
        }
        for (int l = 0; l < 2; l++)
            right = right && (kinds & 2 ? same_bits(made->captured[l][token], g->seen[read_layers[l]] + r * EMBD, EMBD)
                                        : all_are(made->captured[l][token], EMBD, -1.5f));
    }
    return right;
}

static void *swap_until_done(void *argument) {
    shared_state *shared = argument;
    for (size_t i = 0; !shared->done; i++) swap_in(shared->hook, shared->choices[i % CHOICES]);
    return NULL;
}

static void what_is_read_is_of_what_acted_while_others_are_swapped_in(void) {
    const long blocks = live_blocks;
    for (size_t p = 0; p < LENGTH(both_paths); p++) {
        const steer plain = new_steer("123"),
                    windowed = new_steer_like(&(steer){.windowed = true, .start = 1, .stop = 9, .ramp = 3}, "02"),
                    gated = new_steer_like(&(steer){.gated = true, .latch = true, .above = -1e9f}, "013");
        mien_hook *hook = new_hook(both_paths[p]);
        shared_state shared = {hook, {&plain, &windowed, &gated, &nothing}, false};
        graph *const graphs[] = {new_graph(READ_ROWS, NULL), new_graph(READ_ROWS, NULL)};
        tokens given;
        read_tokens(&given, "0@7* 0@8* 0@9* 0@10* 0@11* 0@12*");
        mien_hook_tell_reply(hook, 0, 6);
        reading *before = NULL;
        long met[CHOICES] = {0}, mixed = 0, misread = 0;
        pthread_t swapper;
        real_threads = true;
        CHECK(!pthread_create(&swapper, NULL, swap_until_done, &shared));
        for (unsigned n = 0; n < EVALUATIONS || (n < PATIENCE && !(met[0] && met[1] && met[2] && met[3])); n++) {
            const unsigned kinds = n * 5 % 8;
            reading *made = read_into(hook, kinds);
            free_reading(before); /* nothing knows of it any more */
            before = made;
            int64_t counts[LAYERS][EXPERTS] = {{0}};
            CHECK(begin(hook, &given) == MIEN_OK);
            for (int i = 0; i < 2; i++) CHECK(evaluate(graphs[i], hook, 3));
            CHECK(mien_hook_end(hook) == MIEN_OK);
            int found = CHOICES;
            for (int c = 0; c < CHOICES && found == CHOICES; c++) {
                bool same = true, right = true;
                for (int i = 0; i < 2 && same; i++) {
                    acting who[READ_ROWS];
                    for (int r = 0; r < READ_ROWS; r++) who[r] = (acting){shared.choices[c], 1 + i * READ_ROWS + r, NULL};
                    hand expected;
                    long_hand(graphs[i], who, &expected);
                    for (int layer = 0; layer < LAYERS; layer++)
                        same = same && same_bits(graphs[i]->seen[layer], expected.after[layer], READ_ROWS * EMBD);
                    right = right && same && is_read(made, kinds, graphs[i], i, &expected);
                }
                if (!same) continue;
                found = c;
                met[c]++;
                misread += !right;
            }
            mixed += found == CHOICES;
            for (int i = 0; i < 2 && kinds & 4; i++) count_long_hand(graphs[i], 2, counts);
            misread += !!memcmp(counts, made->counts, sizeof counts);
        }
        shared.done = true;
        pthread_join(swapper, NULL);
        real_threads = false;
        CHECK(!mixed && !misread);
        CHECK(met[0] && met[1] && met[2] && met[3]);
        mien_hook_free(hook);
        free_reading(before);
        for (int i = 0; i < 2; i++) free(graphs[i]);
        mien_program_release(plain.program);
        mien_program_release(windowed.program);
        mien_program_release(gated.program);
    }
    CHECK(live_blocks == blocks);
}

int main(void) {
    make_model();
    the_symbols_are_the_ones_that_ggml_has();
    the_layout_decides_the_path_and_the_reason();
    a_lacking_function_is_an_error_where_needed_and_a_reason_where_not();
    a_model_without_layers_or_width_is_refused();
    a_context_of_no_sequence_or_no_tokens_is_refused_and_nothing_changes();
    a_program_of_another_model_is_refused_and_nothing_changes();
    a_hook_is_made_whole_or_not_at_all();
    whatever_allocation_fails_the_hook_stays_as_it_was();
    rows_that_find_no_memory_are_an_error();
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
    places_that_there_are_not_have_nothing_applied();
    a_site_is_steered_where_it_was_located();
    several_sites_are_steered_in_one_graph();
    a_place_that_never_comes_is_an_error();
    a_place_can_be_located_anew();
    a_block_is_told_by_the_name_of_what_its_output_goes_into();
    rows_of_another_form_at_a_site_are_an_error_and_untouched();
    the_residual_stream_can_have_another_name();
    a_place_that_cannot_be_is_refused();
    scouting_lists_every_node_and_steers_nothing();
    nodes_that_find_no_memory_are_left_out();
    capture_takes_the_window_of_every_micro_batch();
    capture_needs_no_steering_and_can_be_turned_off();
    capture_of_rows_that_are_not_the_tokens_is_an_error();
    a_probe_reads_rows_before_and_after_steering();
    watching_can_be_turned_off_and_either_side_left_out();
    a_probe_of_another_model_is_refused_and_nothing_changes();
    what_is_read_must_have_the_models_width();
    what_is_asked_for_after_begin_is_too_late();
    experts_are_counted_by_how_often_they_are_chosen();
    choices_that_cannot_be_read_are_an_error();
    every_sequence_has_its_own_programs();
    graphs_that_do_not_have_the_tokens_in_an_order_are_an_error();
    rows_whose_tokens_cannot_be_told_are_left_alone();
    a_graph_has_as_many_tokens_as_ids();
    one_sequence_needs_no_ids();
    a_shared_token_is_of_sequences_that_are_steered_alike();
    sequences_that_there_are_not_have_no_reply();
    a_window_goes_by_the_number_in_the_reply();
    a_reply_goes_on_where_it_was_moved_to();
    gates_remember_a_reply_that_is_taken_back();
    a_reply_or_a_swap_begins_gates_anew();
    what_a_sequences_gates_remember_is_its_own();
    gates_that_remember_are_run_in_order_by_one_thread();
    an_evaluation_outside_of_a_decode_takes_what_was_swapped_in_last();
    sequences_that_are_steered_differently_are_not_steered_outside_of_a_decode();
    nothing_of_a_decode_is_left_outside_of_it();
    what_is_evaluated_outside_of_a_decode_is_followed();
    windows_of_several_sequences_need_a_decode();
    a_swap_within_a_graph_waits_for_the_next();
    the_hook_keeps_what_it_was_given_and_lets_go_of_it();
    a_graph_is_of_one_program_while_others_are_swapped_in();
    a_decode_is_of_one_program_a_sequence_while_others_are_swapped_in();
    what_is_read_is_of_what_acted_while_others_are_swapped_in();
    return verdict();
}
