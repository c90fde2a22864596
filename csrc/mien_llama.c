#include "mien_llama.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "mien_batch.h"
#include "mien_ggml.h"
#include "mien_kernels.h"

enum { STEM_MAX = 31, RESIDUAL = 1u << MIEN_SITE_RESIDUAL };

/* One a place, at an address that patched nodes keep: they find the program through it, so a swap touches no
 * node. */
typedef struct {
    mien_hook *hook;
    mien_site site;
    int32_t layer, width;                   /* width 0: it is not known where it is */
    char stem[STEM_MAX + 1];                /* where it is: see mien_hook_locate */
    const void *weight;
    int32_t tail;

    bool met, post, captured, watched, ordered;
    mien_path path;
    uint64_t graph;                         /* in which it was last asked for */
    int64_t expected;                       /* rows that the graphs have here */
    const mien_rows *rows;                  /* of the running graph, where they must be told apart */
    _Atomic int64_t done, changed;          /* rows that went through the program, and that it changed */
    _Atomic double moved;
    int32_t capture_at;                     /* index in the capture buffer, or -1 */
    unsigned char custom[MIEN_IMAGE_MAX];   /* op and parameters of our custom operation */
    unsigned char original[MIEN_IMAGE_MAX]; /* of the ADD that it replaced */
} slot;

typedef struct {
    const void *weight;
    slot *at;
} weighed;

struct mien_hook {
    mien_ggml ggml;
    mien_layout layout;
    mien_path path;
    const char *reason;
    int32_t n_layer, n_embd;
    mien_batch_layout fields;
    mien_batching batching;

    atomic_flag lock;                       /* guards `next` and `alike`: held for a few instructions */
    mien_sequence *next;                    /* n_sequences; only what acts, retained */
    bool alike;                             /* all of them */
    _Atomic uint32_t next_sites;            /* a bit for each site where any of them acts */

    mien_sequence *now;                     /* n_sequences; what acts is retained in a scope */
    mien_program **pinned;                  /* the different programs that act on the running graph */
    int32_t n_pinned;
    uint32_t sites;                         /* where they act */
    bool in_scope, by_row;                  /* by_row: which token a row is must be known */
    uint64_t serial;                        /* of the scope */
    mien_status error;                      /* the first of this scope */
    int64_t strays;

    mien_evaluation evaluation;
    uint64_t graph;                         /* its number */
    int32_t last_layer;                     /* asked for last in this graph */
    int64_t graph_tokens, tokens_before;    /* in this graph; in the earlier graphs of this scope */
    int32_t *ids, n_ids, ids_size;          /* tokens of the graph that begins; n_ids -1: not read */

    const ggml_tensor *pending;             /* asked for: it comes back computed */
    slot *pending_slot;
    struct {
        const ggml_tensor *node;            /* the first source of the next node of the tail */
        slot *at;
        int32_t left;
    } tail;
    weighed *weights;                       /* ascending */
    size_t n_weights;
    uint32_t by_weight;                     /* sites with weights */

    struct {
        float *buffer;
        int32_t first, count;
    } capture;
    struct {
        mien_probe *probe;                  /* retained */
        float *before, *after;
    } watch;
    struct {
        int64_t *counts;
        int32_t n_expert, used;
        char stem[STEM_MAX + 1];
    } count;

    bool scouting;
    void **nodes;
    size_t n_nodes, nodes_size;

    void *scratch;                          /* rows on their way from and to a device */
    size_t scratch_size;
    slot slots[];                           /* MIEN_SITES x n_layer */
};

size_t mien_hook_symbol_count(void) { return mien_ggml_symbol_count(); }

const char *mien_hook_symbol(size_t i) { return mien_ggml_symbol(i); }

static void lock(mien_hook *hook) {
    while (atomic_flag_test_and_set_explicit(&hook->lock, memory_order_acquire)) {}
}

static void unlock(mien_hook *hook) { atomic_flag_clear_explicit(&hook->lock, memory_order_release); }

static void fail(mien_hook *hook, mien_status status) {
    if (hook->error == MIEN_OK) hook->error = status;
}

static slot *slot_at(mien_hook *hook, mien_site site, int32_t layer) {
    return &hook->slots[(size_t)site * (size_t)hook->n_layer + (size_t)layer];
}

static uint32_t sites_of(const mien_program *program) {
    uint32_t sites = 0;
    for (int site = 0; site < MIEN_SITES; site++)
        if (mien_program_has(program, (mien_site)site)) sites |= 1u << site;
    return sites;
}

static void pin(mien_hook *hook, mien_program *program) {
    for (int32_t i = 0; i < hook->n_pinned; i++)
        if (hook->pinned[i] == program) return;
    if (program) hook->pinned[hook->n_pinned++] = mien_program_retain(program);
    hook->sites |= sites_of(program);
}

static void unpin(mien_hook *hook) {
    for (int32_t i = 0; i < hook->n_pinned; i++) mien_program_release(hook->pinned[i]);
    hook->n_pinned = 0;
    hook->sites = 0;
}

static bool acts_at(const mien_hook *hook, const slot *here) {
    for (int32_t i = 0; i < hook->n_pinned; i++)
        if (mien_program_acts(hook->pinned[i], here->site, here->layer)) return true;
    return false;
}

static void note_steered(slot *here, int64_t rows, mien_shift shift) {
    atomic_fetch_add_explicit(&here->done, rows, memory_order_relaxed);
    atomic_fetch_add_explicit(&here->changed, shift.rows, memory_order_relaxed);
    double sum = atomic_load_explicit(&here->moved, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&here->moved, &sum, sum + shift.squared, memory_order_relaxed,
                                                  memory_order_relaxed)) {}
}

/* ---- rows --------------------------------------------------------------------------------------- */

static void read_rows(const slot *here, const float *data, int64_t first, int64_t last, float *into) {
    const mien_hook *hook = here->hook;
    if (!into) return;
    const size_t count = mien_probe_count(hook->watch.probe);
    for (int64_t r = first; r < last; r++) {
        const size_t place = (size_t)here->rows->token[r] * (size_t)hook->n_layer + (size_t)here->layer;
        mien_probe_read(hook->watch.probe, here->layer, data + (size_t)r * (size_t)here->width, 1, into + place * count);
    }
}

/* Of rows that nothing changed. */
static void copy_readouts(const slot *here, int64_t first, int64_t last) {
    const mien_hook *hook = here->hook;
    if (!hook->watch.after) return;
    const size_t count = mien_probe_count(hook->watch.probe);
    for (int64_t r = first; r < last; r++) {
        const size_t place = (size_t)here->rows->token[r] * (size_t)hook->n_layer + (size_t)here->layer;
        memcpy(hook->watch.after + place * count, hook->watch.before + place * count, count * sizeof(float));
    }
}

/* Steer and read rows first to last of `data`, which holds the tensor's rows from row 0 on. */
static void steer_rows(slot *here, float *data, int64_t first, int64_t last) {
    mien_hook *hook = here->hook;
    const size_t width = (size_t)here->width;
    mien_shift shift = {0, 0};
    if (here->watched) read_rows(here, data, first, last, hook->watch.before);
    if (!here->rows) {
        shift = mien_program_apply(hook->n_pinned ? hook->pinned[0] : NULL, here->site, here->layer,
                                   data + (size_t)first * width, (size_t)(last - first), NULL);
    } else {
        for (int64_t r = first, end; r < last; r = end) { /* neighbours on which the same acts */
            for (end = r + 1; end < last && here->rows->program[end] == here->rows->program[r];) end++;
            const mien_shift some =
                mien_program_apply(here->rows->program[r], here->site, here->layer, data + (size_t)r * width,
                                   (size_t)(end - r), &here->rows->what[r]);
            shift.squared += some.squared;
            shift.rows += some.rows;
        }
    }
    if (here->watched) {
        if (shift.rows || !hook->watch.before)
            read_rows(here, data, first, last, hook->watch.after);
        else
            copy_readouts(here, first, last);
    }
    note_steered(here, last - first, shift);
}

/* ---- in the graph ------------------------------------------------------------------------------- */

/* dst = a + b, then the program on each row: what the node did, and ours. ggml calls it once a thread;
 * rows are split, never a row, so that the sums of a row don't depend on the number of threads. Where gates
 * remember the token before, one thread has all rows. */
static void add_and_steer(ggml_tensor *dst, const ggml_tensor *a, const ggml_tensor *b, int ith, int nth, void *user) {
    slot *here = user;
    const mien_ggml *ggml = &here->hook->ggml;
    const int64_t rows = ggml->ggml_nrows(dst);
    if (here->ordered) {
        if (ith) return;
        nth = 1;
    }
    const int64_t first = rows * ith / nth, last = rows * (ith + 1) / nth;
    if (first == last) return;
    const size_t n = (size_t)here->width, offset = (size_t)first * n;
    float *out = ggml->ggml_get_data(dst);
    mien_sum(out + offset, (const float *)ggml->ggml_get_data(a) + offset,
             (const float *)ggml->ggml_get_data(b) + offset, (size_t)(last - first) * n);
    steer_rows(here, out, first, last);
}

/* Contiguous rows of `width` float32: what every path needs. */
static bool is_rows(const mien_hook *hook, const ggml_tensor *t, int32_t width) {
    const mien_ggml *ggml = &hook->ggml;
    const int64_t elements = ggml->ggml_nelements(t);
    return ggml->ggml_nrows(t) * width == elements &&
           ggml->ggml_nbytes(t) == (size_t)elements * sizeof(float) && ggml->ggml_is_contiguous(t);
}

static bool in_cpu_memory(const mien_hook *hook, const ggml_tensor *t) {
    ggml_buffer *buffer = mien_pointer_at(t, hook->layout.buffer);
    return buffer &&
           hook->ggml.ggml_backend_buffer_get_type(buffer) == hook->ggml.ggml_backend_cpu_buffer_type();
}

static bool is_ours(const slot *here, const ggml_tensor *t) {
    const mien_layout *layout = &here->hook->layout;
    return !memcmp((const char *)t + layout->op, here->custom, layout->image_size);
}

/* An ADD of two like tensors that the CPU computes. Not so: a control vector set through llama.cpp
 * itself (its second source is one row), a scaled output, a layer on a device. */
static bool can_patch(const slot *here, const ggml_tensor *t) {
    const mien_hook *hook = here->hook;
    if (mien_int_at(t, hook->layout.op) != hook->layout.op_add || !in_cpu_memory(hook, t)) return false;
    const ggml_tensor *a = mien_pointer_at(t, hook->layout.sources);
    const ggml_tensor *b = mien_pointer_at(t, hook->layout.sources + sizeof(void *));
    return a && b && is_rows(hook, a, here->width) && is_rows(hook, b, here->width) &&
           hook->ggml.ggml_are_same_shape(t, a) && hook->ggml.ggml_are_same_shape(t, b);
}

static void patch(slot *here, ggml_tensor *t) {
    const mien_layout *layout = &here->hook->layout;
    memcpy(here->original, (char *)t + layout->op, layout->image_size);
    memcpy((char *)t + layout->op, here->custom, layout->image_size);
}

static void put_back(slot *here, ggml_tensor *t) {
    const mien_layout *layout = &here->hook->layout;
    memcpy((char *)t + layout->op, here->original, layout->image_size);
}

/* ---- after the computation ---------------------------------------------------------------------- */

static void *scratch(mien_hook *hook, size_t size) {
    if (size > hook->scratch_size) {
        void *grown = realloc(hook->scratch, size);
        if (!grown) return NULL;
        hook->scratch = grown;
        hook->scratch_size = size;
    }
    return hook->scratch;
}

static void steer_computed(slot *here, ggml_tensor *t, int64_t rows) {
    mien_hook *hook = here->hook;
    const size_t size = (size_t)rows * (size_t)here->width * sizeof(float);
    const bool direct = hook->layout.image_size && in_cpu_memory(hook, t);
    float *data = direct ? hook->ggml.ggml_get_data(t) : scratch(hook, size);
    if (!data) {
        fail(hook, MIEN_ERR_MEMORY);
        return;
    }
    if (!direct) hook->ggml.ggml_backend_tensor_get(t, data, 0, size);
    steer_rows(here, data, 0, rows);
    if (!direct) hook->ggml.ggml_backend_tensor_set(t, data, 0, size);
}

/* Copies the rows whose token is in [first, first + count). */
static void capture_computed(slot *here, const ggml_tensor *t, int64_t rows) {
    mien_hook *hook = here->hook;
    const size_t n = (size_t)hook->n_embd, row = n * sizeof(float);
    float *to = hook->capture.buffer + (size_t)here->capture_at * (size_t)hook->capture.count * n;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t index = here->rows->token[r] - hook->capture.first;
        if (index >= 0 && index < hook->capture.count)
            hook->ggml.ggml_backend_tensor_get(t, to + (size_t)index * n, (size_t)r * row, row);
    }
}

static void count_computed(mien_hook *hook, const ggml_tensor *t, int32_t layer) {
    const mien_ggml *ggml = &hook->ggml;
    const int64_t rows = ggml->ggml_nrows(t), n = hook->count.n_expert;
    const size_t size = (size_t)rows * (size_t)n * sizeof(int32_t);
    int32_t *chosen = scratch(hook, size);
    if (!chosen || ggml->ggml_nelements(t) != rows * n || ggml->ggml_nbytes(t) != size || !ggml->ggml_is_contiguous(t)) {
        fail(hook, chosen ? MIEN_ERR_TENSOR : MIEN_ERR_MEMORY);
        return;
    }
    ggml->ggml_backend_tensor_get(t, chosen, 0, size);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < hook->count.used && k < n; k++) {
            const int32_t expert = chosen[r * n + k];
            if (expert >= 0 && expert < n) hook->count.counts[(int64_t)layer * n + expert]++;
        }
}

/* ---- graphs ------------------------------------------------------------------------------------- */

static void forget_graphs(mien_hook *hook) {
    hook->last_layer = -1;
    hook->graph_tokens = hook->tokens_before = 0;
    hook->n_ids = -1;
    hook->tail.left = 0;
    hook->error = MIEN_OK;
    for (int32_t i = 0; i < MIEN_SITES * hook->n_layer; i++) {
        slot *here = &hook->slots[i];
        here->met = here->post = here->captured = here->watched = here->ordered = false;
        here->rows = NULL;
        here->path = MIEN_PATH_AUTO;
        here->expected = 0;
        atomic_store_explicit(&here->done, 0, memory_order_relaxed);
        atomic_store_explicit(&here->changed, 0, memory_order_relaxed);
        atomic_store_explicit(&here->moved, 0.0, memory_order_relaxed);
    }
}

/* The tokens of the graph that begins, from the node that looks up their embeddings. */
static void read_ids(mien_hook *hook, const ggml_tensor *t) {
    const mien_ggml *ggml = &hook->ggml;
    const ggml_tensor *ids = mien_pointer_at(t, hook->layout.sources + sizeof(void *));
    if (!ids || strcmp(ggml->ggml_get_name(ids), "inp_tokens")) return;
    const int64_t n = ggml->ggml_nelements(ids);
    if (n <= 0 || n > hook->evaluation.n_tokens || ggml->ggml_nbytes(ids) != (size_t)n * sizeof(int32_t)) return;
    if (n > hook->ids_size) {
        int32_t *grown = realloc(hook->ids, (size_t)n * sizeof *grown);
        if (!grown) {
            fail(hook, MIEN_ERR_MEMORY);
            return;
        }
        hook->ids = grown;
        hook->ids_size = (int32_t)n;
    }
    ggml->ggml_backend_tensor_get(ids, hook->ids, 0, (size_t)n * sizeof(int32_t));
    hook->n_ids = (int32_t)n;
}

static void begin_graph(mien_hook *hook, int64_t rows) {
    hook->graph++;
    hook->tail.left = 0;
    if (!hook->in_scope) {
        forget_graphs(hook);
        unpin(hook);
        lock(hook);
        if (hook->alike)
            pin(hook, hook->next[0].response);
        else
            hook->strays++;
        unlock(hook);
    }
    hook->tokens_before += hook->graph_tokens;
    hook->graph_tokens = rows;
    if (!hook->by_row) return;
    const int32_t *ids = hook->n_ids >= 0 ? hook->ids : NULL;
    if (ids) hook->graph_tokens = hook->n_ids;
    hook->n_ids = -1;
    if (!mien_evaluation_graph(&hook->evaluation, (int32_t)hook->tokens_before, (int32_t)hook->graph_tokens, ids))
        fail(hook, MIEN_ERR_ROWS);
}

/* Layers are asked for in ascending order, so one that does not ascend, or a place that is asked for again,
 * begins the next micro-batch. */
static void follow_graph(slot *here, int64_t rows) {
    mien_hook *hook = here->hook;
    if (hook->last_layer < 0 || here->layer < hook->last_layer || here->graph == hook->graph) begin_graph(hook, rows);
    hook->last_layer = here->layer;
    here->graph = hook->graph;
}

static bool on_ask(slot *here, ggml_tensor *t) {
    mien_hook *hook = here->hook;
    const int64_t rows = hook->ggml.ggml_nrows(t);
    follow_graph(here, rows);
    here->met = true;

    const bool residual = here->site == MIEN_SITE_RESIDUAL;
    const bool patched = residual && hook->path == MIEN_PATH_IN_GRAPH && is_ours(here, t);
    bool acts = acts_at(hook, here);
    here->captured = residual && hook->in_scope && hook->capture.buffer && here->capture_at >= 0;
    here->watched = residual && hook->in_scope && hook->watch.probe;
    here->rows = hook->by_row ? mien_evaluation_rows(&hook->evaluation, rows) : NULL;
    mien_status problem = MIEN_OK;
    if (acts || here->captured || here->watched) {
        const bool read = here->captured || here->watched;
        if (!is_rows(hook, t, here->width) || (read && here->width != hook->n_embd)) problem = MIEN_ERR_TENSOR;
        else if ((hook->by_row || read) && !here->rows) problem = MIEN_ERR_ROWS;
    }
    if (problem != MIEN_OK) {
        fail(hook, problem);
        acts = here->captured = here->watched = false;
    }
    here->post = acts || here->watched;
    here->ordered = false;
    if (here->post) {
        here->expected += rows;
        here->path = acts ? MIEN_PATH_POST : MIEN_PATH_AUTO;
        for (int32_t i = 0; i < hook->n_pinned && here->rows; i++)
            here->ordered = here->ordered || mien_program_ordered(hook->pinned[i], here->site, here->layer);
        if (patched || (residual && hook->path == MIEN_PATH_IN_GRAPH && can_patch(here, t))) {
            if (!patched) patch(here, t);
            if (acts) here->path = MIEN_PATH_IN_GRAPH;
            here->post = false;
        }
    } else if (patched) {
        put_back(here, t);
    }
    return here->post || here->captured;
}

/* ---- the callback ------------------------------------------------------------------------------- */

/* The layer N of a node named "stem-N", and how long the stem is; -1 for other names. Views carry a suffix
 * after the number and are not it. */
static int32_t layer_of(const char *name, size_t *stem) {
    const char *dash = strrchr(name, '-');
    if (!dash) return -1;
    const char *digit = dash + 1;
    int32_t layer = 0, digits = 0;
    for (; *digit >= '0' && *digit <= '9' && digits < 6; digit++, digits++) layer = layer * 10 + (*digit - '0');
    *stem = (size_t)(dash - name);
    return digits && !*digit ? layer : -1;
}

static bool is_stem(const char *stem, const char *name, size_t length) {
    return length <= STEM_MAX && !strncmp(stem, name, length) && !stem[length];
}

static int compare_weights(const void *a, const void *b) {
    const uintptr_t x = (uintptr_t)((const weighed *)a)->weight, y = (uintptr_t)((const weighed *)b)->weight;
    return (x > y) - (x < y);
}

/* The place whose weight the product `t` is made with, or NULL. */
static slot *weighed_slot(const mien_hook *hook, const ggml_tensor *t, uint32_t sites) {
    const weighed key = {mien_pointer_at(t, hook->layout.sources), NULL};
    const weighed *found = bsearch(&key, hook->weights, hook->n_weights, sizeof key, compare_weights);
    return found && (sites & 1u << found->at->site) ? found->at : NULL;
}

static bool wait_for(mien_hook *hook, const ggml_tensor *t, slot *here) {
    hook->pending = t;
    hook->pending_slot = here;
    return true;
}

static bool ask_slot(slot *here, ggml_tensor *t) {
    return on_ask(here, t) && wait_for(here->hook, t, here);
}

static bool ask_named(mien_hook *hook, ggml_tensor *t, uint32_t sites) {
    size_t length;
    const char *name = hook->ggml.ggml_get_name(t);
    const int32_t layer = layer_of(name, &length);
    if (layer < 0 || layer >= hook->n_layer) return false;
    for (int site = 0; site < MIEN_SITES; site++) {
        if (!(sites & 1u << site)) continue;
        slot *here = slot_at(hook, (mien_site)site, layer);
        if (here->width && !here->weight && is_stem(here->stem, name, length)) return ask_slot(here, t);
    }
    if (hook->count.counts && is_stem(hook->count.stem, name, length)) return wait_for(hook, t, NULL);
    return false;
}

static bool ask(mien_hook *hook, ggml_tensor *t) {
    const mien_layout *layout = &hook->layout;
    uint32_t sites = RESIDUAL | hook->sites;
    if (!hook->in_scope) sites |= atomic_load_explicit(&hook->next_sites, memory_order_relaxed);
    if (layout->image_size) {
        const int32_t op = mien_int_at(t, layout->op);
        if (hook->tail.left && mien_pointer_at(t, layout->sources) == hook->tail.node) {
            hook->tail.node = t;
            if (!--hook->tail.left) return ask_slot(hook->tail.at, t);
        }
        if (op == layout->op_multiply && (sites & hook->by_weight)) {
            slot *here = weighed_slot(hook, t, sites);
            if (here && !here->tail) return ask_slot(here, t);
            if (here) {
                hook->tail.node = t;
                hook->tail.at = here;
                hook->tail.left = here->tail;
            }
        }
        if (op == layout->op_gather && hook->in_scope && hook->by_row &&
            mien_evaluation_needs_ids(&hook->evaluation))
            read_ids(hook, t);
        if (op > 0 && (size_t)op < sizeof layout->never / sizeof(bool) && layout->never[op]) return false;
    }
    return ask_named(hook, t, sites);
}

static void note_node(mien_hook *hook, void *t) {
    if (hook->n_nodes == hook->nodes_size) {
        const size_t size = hook->nodes_size ? 2 * hook->nodes_size : 1024;
        void **grown = realloc(hook->nodes, size * sizeof *grown);
        if (!grown) return;
        hook->nodes = grown;
        hook->nodes_size = size;
    }
    hook->nodes[hook->n_nodes++] = t;
}

bool mien_hook_eval(void *tensor, bool asked, void *user_data) {
    mien_hook *hook = user_data;
    ggml_tensor *t = tensor;
    if (hook->scouting) {
        if (asked) note_node(hook, t);
        return !asked;
    }
    if (asked) return ask(hook, t);
    if (t != hook->pending) return true; /* false after a computation would stop it */
    hook->pending = NULL;
    slot *here = hook->pending_slot;
    const int64_t rows = hook->ggml.ggml_nrows(t);
    if (!here) {
        size_t length;
        if (rows) count_computed(hook, t, layer_of(hook->ggml.ggml_get_name(t), &length));
        return true;
    }
    if (here->post && rows) steer_computed(here, t, rows);
    if (here->captured && rows) capture_computed(here, t, rows);
    return true;
}

/* ---- life --------------------------------------------------------------------------------------- */

static void release_sequence(mien_sequence *sequence) {
    mien_program_release(sequence->prompt);
    mien_program_release(sequence->response);
    mien_memory_release(sequence->memory);
    sequence->prompt = sequence->response = NULL;
    sequence->memory = NULL;
}

static void leave_scope(mien_hook *hook) {
    for (int32_t i = 0; i < hook->batching.n_sequences; i++) release_sequence(&hook->now[i]);
    unpin(hook);
    hook->in_scope = hook->by_row = false;
    hook->last_layer = -1;
}

static void free_sequences(mien_hook *hook) {
    leave_scope(hook);
    for (int32_t i = 0; i < hook->batching.n_sequences; i++) release_sequence(&hook->next[i]);
    free(hook->next);
    free(hook->now);
    free(hook->pinned);
}

static void init_slots(mien_hook *hook) {
    for (int32_t i = 0; i < MIEN_SITES * hook->n_layer; i++) {
        slot *here = &hook->slots[i];
        here->hook = hook;
        here->site = (mien_site)(i / hook->n_layer);
        here->layer = i % hook->n_layer;
        here->capture_at = -1;
        atomic_init(&here->done, 0);
        atomic_init(&here->changed, 0);
        atomic_init(&here->moved, 0.0);
    }
    for (int32_t i = 0; i < hook->n_layer; i++)
        mien_hook_locate(hook, MIEN_SITE_RESIDUAL, i, hook->n_embd, "l_out", NULL, 0);
}

/* NULL if the layout was found, else why not, or that there was no memory. */
static const char *probe_layout(mien_hook *hook) {
    const size_t n = (size_t)hook->n_layer;
    void **users = malloc(n * sizeof *users);
    unsigned char **images = malloc(n * sizeof *images);
    const char *problem = "there is no memory to find it out";
    if (users && images) {
        for (size_t i = 0; i < n; i++) users[i] = &hook->slots[i], images[i] = hook->slots[i].custom;
        problem = mien_layout_find(&hook->layout, &hook->ggml, add_and_steer, users, images, n);
    }
    free(users);
    free(images);
    return problem;
}

mien_status mien_hook_new(mien_hook **out, void *const *symbols, int32_t n_layer, int32_t n_embd, mien_path path) {
    *out = NULL;
    if (n_layer <= 0 || n_embd <= 0 || n_layer > INT32_MAX / MIEN_SITES ||
        (size_t)n_layer > (SIZE_MAX - sizeof(mien_hook)) / sizeof(slot) / MIEN_SITES)
        return MIEN_ERR_SHAPE;
    mien_hook *hook = calloc(1, sizeof(mien_hook) + (size_t)MIEN_SITES * (size_t)n_layer * sizeof(slot));
    if (!hook) return MIEN_ERR_MEMORY;
    bool all;
    if (!mien_ggml_load(&hook->ggml, symbols, &all)) {
        free(hook);
        return MIEN_ERR_SYMBOL;
    }
    hook->n_layer = n_layer;
    hook->n_embd = n_embd;
    atomic_flag_clear(&hook->lock);
    atomic_init(&hook->next_sites, 0);
    init_slots(hook);
    forget_graphs(hook);
    static const mien_batching one_sequence = {1, 1, {MIEN_ORDER_NONE, MIEN_ORDER_NONE}};
    static const mien_batch_layout no_fields;
    if (mien_hook_set_batching(hook, &no_fields, &one_sequence) != MIEN_OK) {
        mien_hook_free(hook);
        return MIEN_ERR_MEMORY;
    }
    const char *problem = all ? probe_layout(hook) : "the library lacks functions that it needs";
    hook->path = problem || path == MIEN_PATH_POST ? MIEN_PATH_POST : MIEN_PATH_IN_GRAPH;
    hook->reason = problem ? problem : path == MIEN_PATH_POST ? "asked for" : "the tensor layout was verified";
    *out = hook;
    return MIEN_OK;
}

void mien_hook_free(mien_hook *hook) {
    if (!hook) return;
    free_sequences(hook);
    mien_evaluation_free(&hook->evaluation);
    mien_probe_release(hook->watch.probe);
    free(hook->weights);
    free(hook->ids);
    free(hook->nodes);
    free(hook->scratch);
    free(hook);
}

mien_status mien_hook_set_batching(mien_hook *hook, const mien_batch_layout *layout, const mien_batching *batching) {
    const int32_t n = batching->n_sequences;
    if (n <= 0 || n > INT32_MAX / 2 || batching->n_ubatch <= 0) return MIEN_ERR_SHAPE;
    mien_sequence *next = calloc((size_t)n, sizeof *next), *now = calloc((size_t)n, sizeof *now);
    mien_program **pinned = calloc(2 * (size_t)n, sizeof(mien_program *));
    if (!next || !now || !pinned) {
        free(next);
        free(now);
        free(pinned);
        return MIEN_ERR_MEMORY;
    }
    for (int32_t i = 0; i < n; i++) now[i].reply_from = INT32_MAX;
    free_sequences(hook);
    hook->next = next;
    hook->now = now;
    hook->pinned = pinned;
    hook->alike = true;
    atomic_store(&hook->next_sites, 0);
    hook->fields = *layout;
    hook->batching = *batching;
    return MIEN_OK;
}

mien_path mien_hook_path(const mien_hook *hook) { return hook->path; }

const char *mien_hook_reason(const mien_hook *hook) { return hook->reason; }

/* ---- sites -------------------------------------------------------------------------------------- */

void mien_hook_scout(mien_hook *hook) {
    forget_graphs(hook); /* nodes that were patched find nothing to do */
    leave_scope(hook);
    hook->scouting = true;
    hook->n_nodes = 0;
}

size_t mien_hook_nodes(mien_hook *hook, void *const **nodes) {
    hook->scouting = false;
    *nodes = hook->nodes;
    return hook->n_nodes;
}

void *mien_hook_source(const mien_hook *hook, const void *tensor, int32_t i) {
    if (!hook->layout.image_size || i < 0 || i > 1) return NULL;
    return mien_pointer_at(tensor, hook->layout.sources + (size_t)i * sizeof(void *));
}

static mien_status sort_weights(mien_hook *hook) {
    const size_t n = (size_t)MIEN_SITES * (size_t)hook->n_layer;
    if (!hook->weights && !(hook->weights = malloc(n * sizeof *hook->weights))) return MIEN_ERR_MEMORY;
    hook->n_weights = hook->by_weight = 0;
    for (size_t i = 0; i < n; i++) {
        slot *here = &hook->slots[i];
        if (!here->weight) continue;
        hook->weights[hook->n_weights++] = (weighed){here->weight, here};
        hook->by_weight |= 1u << here->site;
    }
    qsort(hook->weights, hook->n_weights, sizeof *hook->weights, compare_weights);
    return MIEN_OK;
}

mien_status mien_hook_locate(mien_hook *hook, mien_site site, int32_t layer, int32_t width, const char *stem,
                             const void *weight, int32_t tail) {
    if ((int)site < 0 || (int)site >= MIEN_SITES) return MIEN_ERR_SITE;
    if (layer < 0 || layer >= hook->n_layer) return MIEN_ERR_LAYER;
    if (width <= 0 || tail < 0 || strlen(stem) > STEM_MAX) return MIEN_ERR_SHAPE;
    slot *here = slot_at(hook, site, layer);
    here->width = width;
    here->weight = weight;
    here->tail = tail;
    memset(here->stem, 0, sizeof here->stem);
    memcpy(here->stem, stem, strlen(stem));
    return weight || hook->weights ? sort_weights(hook) : MIEN_OK;
}

/* ---- what acts ---------------------------------------------------------------------------------- */

static mien_status check_program(mien_hook *hook, const mien_program *program) {
    if (!mien_program_fits(program, hook->n_layer)) return MIEN_ERR_SHAPE;
    for (int site = 0; site < MIEN_SITES; site++)
        for (int32_t layer = 0; mien_program_has(program, (mien_site)site) && layer < hook->n_layer; layer++) {
            const int32_t width = mien_program_width(program, (mien_site)site, layer);
            if (width && width != slot_at(hook, (mien_site)site, layer)->width) return MIEN_ERR_SHAPE;
        }
    return MIEN_OK;
}

/* In `hook->next`, which is locked. */
static void note_next(mien_hook *hook) {
    uint32_t sites = 0;
    hook->alike = true;
    for (int32_t i = 0; i < hook->batching.n_sequences; i++) {
        const mien_sequence *sequence = &hook->next[i];
        hook->alike = hook->alike && sequence->prompt == hook->next[0].prompt &&
                      sequence->response == hook->next[0].response;
        if (i && sequence->prompt == sequence[-1].prompt && sequence->response == sequence[-1].response) continue;
        sites |= sites_of(sequence->prompt) | sites_of(sequence->response);
    }
    atomic_store_explicit(&hook->next_sites, sites, memory_order_relaxed);
}

mien_status mien_hook_swap(mien_hook *hook, int32_t sequence, mien_program *prompt, mien_program *response) {
    const int32_t n = hook->batching.n_sequences;
    if (sequence < -1 || sequence >= n) return MIEN_ERR_ROWS;
    mien_status status = check_program(hook, prompt);
    if (status == MIEN_OK && response != prompt) status = check_program(hook, response);
    if (status != MIEN_OK) return status;
    const int32_t first = sequence < 0 ? 0 : sequence, last = sequence < 0 ? n : sequence + 1;
    mien_sequence *made = NULL; /* what there was goes out of it once the lock is free */
    if (!(made = calloc((size_t)(last - first), sizeof *made))) return MIEN_ERR_MEMORY;
    for (int32_t i = 0; i < last - first; i++) {
        made[i].prompt = mien_program_retain(prompt);
        made[i].response = mien_program_retain(response);
        if (mien_program_remembers(response) && mien_memory_new(&made[i].memory, response) != MIEN_OK)
            status = MIEN_ERR_MEMORY;
    }
    if (status == MIEN_OK) {
        lock(hook);
        for (int32_t i = first; i < last; i++) {
            const mien_sequence old = hook->next[i];
            hook->next[i] = made[i - first];
            made[i - first] = old;
        }
        note_next(hook);
        unlock(hook);
    }
    for (int32_t i = 0; i < last - first; i++) release_sequence(&made[i]);
    free(made);
    return status;
}

void mien_hook_tell_reply(mien_hook *hook, int32_t sequence, int32_t position) {
    if (sequence < 0 || sequence >= hook->batching.n_sequences) return;
    mien_sequence *now = &hook->now[sequence];
    now->told = position >= 0;
    if (position >= 0) now->reply_from = position;
}

void mien_hook_shift(mien_hook *hook, int32_t sequence, int32_t by) {
    if (sequence < 0 || sequence >= hook->batching.n_sequences) return;
    mien_sequence *now = &hook->now[sequence];
    if (now->reply_from != INT32_MAX) now->reply_from += by;
    now->next += by;
}

int32_t mien_hook_reply(const mien_hook *hook, int32_t sequence) {
    return sequence >= 0 && sequence < hook->batching.n_sequences ? hook->now[sequence].reply_from : INT32_MAX;
}

int32_t mien_hook_next(const mien_hook *hook, int32_t sequence) {
    return sequence >= 0 && sequence < hook->batching.n_sequences ? hook->now[sequence].next : 0;
}

void mien_hook_place(mien_hook *hook, int32_t sequence, int32_t reply_from, int32_t next) {
    if (sequence < 0 || sequence >= hook->batching.n_sequences) return;
    hook->now[sequence].reply_from = reply_from;
    hook->now[sequence].next = next;
}

mien_status mien_hook_begin_anew(mien_hook *hook, int32_t sequence) {
    if (sequence < 0 || sequence >= hook->batching.n_sequences) return MIEN_OK;
    lock(hook);
    mien_program *response = mien_program_retain(hook->next[sequence].response);
    unlock(hook);
    mien_memory *memory = NULL;
    mien_status status = MIEN_OK;
    if (mien_program_remembers(response)) status = mien_memory_new(&memory, response);
    if (status == MIEN_OK) {
        lock(hook);
        if (hook->next[sequence].response == response) { /* else it has begun anew already */
            mien_memory *old = hook->next[sequence].memory;
            hook->next[sequence].memory = memory;
            memory = old;
        }
        unlock(hook);
    }
    mien_memory_release(memory);
    mien_program_release(response);
    return status;
}

/* ---- a decode ----------------------------------------------------------------------------------- */

static mien_batch batch_at(const mien_batch_layout *fields, uintptr_t address) {
    mien_batch batch;
    const char *at = (const char *)address;
    memcpy(&batch.n_tokens, at + fields->n_tokens, sizeof batch.n_tokens);
    memcpy(&batch.ids, at + fields->token, sizeof batch.ids);
    memcpy(&batch.positions, at + fields->pos, sizeof batch.positions);
    memcpy(&batch.n_sequences, at + fields->n_seq_id, sizeof batch.n_sequences);
    memcpy(&batch.sequences, at + fields->seq_id, sizeof batch.sequences);
    memcpy(&batch.outputs, at + fields->logits, sizeof batch.outputs);
    return batch;
}

/* What acts on each sequence goes from `next` to `now`, and is retained there. */
static void take_next(mien_hook *hook) {
    lock(hook);
    for (int32_t i = 0; i < hook->batching.n_sequences; i++) {
        hook->now[i].prompt = mien_program_retain(hook->next[i].prompt);
        hook->now[i].response = mien_program_retain(hook->next[i].response);
        hook->now[i].memory = mien_memory_retain(hook->next[i].memory);
    }
    unlock(hook);
}

/* Pin what acts on the batch's tokens. Returns whether that differs from token to token. */
static bool pin_all(mien_hook *hook) {
    bool differs = false;
    mien_program *const *acting = hook->evaluation.tokens.program;
    for (int32_t t = 0; t < hook->evaluation.n_tokens; t++) {
        differs = differs || acting[t] != acting[0] || mien_program_counts(acting[t]);
        if (!t || acting[t] != acting[0]) pin(hook, acting[t]);
    }
    return differs;
}

mien_status mien_hook_begin(mien_hook *hook, uintptr_t address) {
    const mien_batch batch = batch_at(&hook->fields, address);
    const int32_t n = hook->batching.n_sequences;
    forget_graphs(hook);
    leave_scope(hook);
    take_next(hook);
    const mien_order orders[MIEN_ORDERS] = {(mien_order)hook->batching.orders[0],
                                            (mien_order)hook->batching.orders[1]};
    mien_status status = mien_batch_follow(&batch, hook->now, n, ++hook->serial);
    if (status == MIEN_OK)
        status = mien_evaluation_begin(&hook->evaluation, &batch, hook->now, n, hook->batching.n_ubatch, orders);
    if (status != MIEN_OK) {
        hook->evaluation.n_tokens = 0;
        leave_scope(hook);
        return status;
    }
    const bool differs = pin_all(hook);
    hook->by_row = differs || hook->capture.buffer || hook->watch.probe;
    hook->in_scope = true;
    return MIEN_OK;
}

mien_status mien_hook_end(mien_hook *hook) {
    mien_status status = hook->error;
    for (int32_t i = 0; i < MIEN_SITES * hook->n_layer && status == MIEN_OK; i++) {
        slot *here = &hook->slots[i];
        if (!(hook->sites & 1u << here->site) || !acts_at(hook, here)) continue;
        if (!here->met)
            status = MIEN_ERR_NOT_MET;
        else if (atomic_load_explicit(&here->done, memory_order_relaxed) != here->expected)
            status = MIEN_ERR_NOT_APPLIED;
    }
    leave_scope(hook);
    return status;
}

int64_t mien_hook_strays(const mien_hook *hook) { return hook->strays; }

/* ---- what is read ------------------------------------------------------------------------------- */

void mien_hook_capture(mien_hook *hook, float *buffer, const int32_t *layers, int32_t n_layers,
                       int32_t first, int32_t count) {
    for (int32_t i = 0; i < hook->n_layer; i++) slot_at(hook, MIEN_SITE_RESIDUAL, i)->capture_at = -1;
    for (int32_t i = 0; buffer && i < n_layers; i++)
        if (layers[i] >= 0 && layers[i] < hook->n_layer)
            slot_at(hook, MIEN_SITE_RESIDUAL, layers[i])->capture_at = i;
    hook->capture.buffer = buffer;
    hook->capture.first = first;
    hook->capture.count = count;
}

mien_status mien_hook_watch(mien_hook *hook, mien_probe *probe) {
    if (probe && (mien_probe_layers(probe) != hook->n_layer || mien_probe_width(probe) != hook->n_embd))
        return MIEN_ERR_SHAPE;
    mien_probe *old = hook->watch.probe;
    hook->watch.probe = mien_probe_retain(probe);
    hook->watch.before = hook->watch.after = NULL;
    mien_probe_release(old);
    return MIEN_OK;
}

void mien_hook_watch_into(mien_hook *hook, float *before, float *after) {
    hook->watch.before = before;
    hook->watch.after = after;
}

void mien_hook_count(mien_hook *hook, int64_t *counts, int32_t n_expert, int32_t used, const char *stem) {
    hook->count.counts = strlen(stem) <= STEM_MAX ? counts : NULL;
    hook->count.n_expert = n_expert;
    hook->count.used = used;
    if (hook->count.counts) memcpy(hook->count.stem, stem, strlen(stem) + 1);
}

mien_applied mien_hook_applied(const mien_hook *hook, mien_site site, int32_t layer) {
    if ((int)site < 0 || (int)site >= MIEN_SITES || layer < 0 || layer >= hook->n_layer)
        return (mien_applied){0, 0.0, MIEN_PATH_AUTO, false};
    const slot *here = &hook->slots[(size_t)site * (size_t)hook->n_layer + (size_t)layer];
    return (mien_applied){atomic_load_explicit(&here->changed, memory_order_relaxed),
                          atomic_load_explicit(&here->moved, memory_order_relaxed), here->path, here->met};
}

void mien_hook_tokens(const mien_hook *hook, int32_t *sequences, int32_t *replies) {
    for (int32_t t = 0; t < hook->evaluation.n_tokens; t++) {
        sequences[t] = hook->evaluation.tokens.sequence[t];
        replies[t] = hook->evaluation.tokens.what[t].reply;
    }
}
