#include "mien_llama.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "mien_batch.h"
#include "mien_ggml.h"
#include "mien_kernels.h"

enum { STEM_MAX = 31, STRAYS_MAX = 64, COPY_ALIGN = 64 / sizeof(float), RESIDUAL = 1u << MIEN_SITE_RESIDUAL };

/* What acts, for every sequence: made by swap, and owned by the mailbox until the decode's thread takes it. */
typedef struct {
    uint64_t id;
    int32_t count;                          /* 1 for all sequences, or one for each */
    bool alike;                             /* the same programs on every sequence */
    uint32_t sites;                         /* a bit for each site where any of them acts */
    mien_acting acting[];                   /* count; programs retained */
} setting;

/* An input of the graph that begins: n values, -1 if it was not read. */
typedef struct {
    int32_t *values, n, size;
} input;

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

    _Atomic(setting *) mailbox;             /* swapped in, and not yet taken; owned */
    setting *current;                       /* what acts; owned */
    bool settled;                           /* every sequence goes by it */
    mien_sequence *now;                     /* n_sequences */
    mien_program **pinned;                  /* the different programs that act on the running graph: of `current` */
    int32_t n_pinned;
    uint32_t sites;                         /* where they act */
    bool in_scope, by_row;                  /* by_row: which token a row is must be known */
    bool continued;
    uint64_t serial;                        /* of the scope, or of the graphs outside */
    mien_status error;                      /* the first of this scope */

    int64_t unsteered;                      /* graphs outside of a scope on which nothing could act */
    mien_stray strays[STRAYS_MAX];
    int32_t n_strays;                       /* -1: more than there is room for */

    mien_evaluation evaluation;
    uint64_t graph;                         /* its number */
    int32_t last_layer;                     /* asked for last in this graph */
    int64_t graph_tokens, tokens_before;    /* in this graph; in the earlier graphs of this scope */
    bool between;                           /* of the graph that begins no place was asked for yet */
    bool looks_up;                          /* its rows are embeddings of tokens that it looks up */
    const ggml_tensor *looked_up;           /* embeddings of tokens that nothing was seen to use yet */
    input ids, positions;                   /* of the graph that begins */

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
        int32_t n_tokens;                   /* for which they have room */
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
    float *copies;                          /* n_threads rows of copy_width: see mien_program_apply */
    size_t copy_width;
    int32_t n_threads, copy_threads;        /* that there may be; that there is room for */
    slot slots[];                           /* MIEN_SITES x n_layer */
};

size_t mien_hook_symbol_count(void) { return mien_ggml_symbol_count(); }

const char *mien_hook_symbol(size_t i) { return mien_ggml_symbol(i); }

static void fail(mien_hook *hook, mien_status status) {
    if (!hook->in_scope) hook->unsteered++; /* no end tells of it */
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
    if (program) hook->pinned[hook->n_pinned++] = program;
    hook->sites |= sites_of(program);
}

static void unpin(mien_hook *hook) {
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

/* ---- what is set -------------------------------------------------------------------------------- */

static void free_setting(setting *old) {
    for (int32_t i = 0; old && i < old->count; i++) {
        mien_program_release(old->acting[i].prompt);
        mien_program_release(old->acting[i].response);
    }
    free(old);
}

static setting *new_setting(const mien_acting *acting, int32_t count, uint64_t id) {
    setting *made = malloc(sizeof *made + (size_t)count * sizeof *acting);
    if (!made) return NULL;
    *made = (setting){.id = id, .count = count, .alike = true};
    for (int32_t i = 0; i < count; i++) {
        const mien_acting *one = &acting[i], *last = &acting[i ? i - 1 : 0];
        mien_program_retain(one->prompt);
        mien_program_retain(one->response);
        made->acting[i] = *one;
        made->alike = made->alike && one->prompt == acting->prompt && one->response == acting->response;
        if (!i || one->prompt != last->prompt || one->response != last->response)
            made->sites |= sites_of(one->prompt) | sites_of(one->response);
    }
    return made;
}

/* Have each sequence go by `current`. Gates of a new generation start without a state. */
static mien_status settle(mien_hook *hook) {
    mien_status status = MIEN_OK;
    for (int32_t i = 0; i < hook->batching.n_sequences; i++) {
        const mien_acting *acting = &hook->current->acting[hook->current->count == 1 ? 0 : i];
        mien_sequence *sequence = &hook->now[i];
        sequence->prompt = acting->prompt;
        sequence->response = acting->response;
        if (sequence->generation == acting->generation) continue;
        mien_memory_release(sequence->memory);
        sequence->memory = NULL;
        if (mien_program_remembers(acting->response) && mien_memory_new(&sequence->memory, acting->response) != MIEN_OK)
            status = MIEN_ERR_MEMORY;
        else
            sequence->generation = acting->generation;
    }
    hook->settled = status == MIEN_OK;
    return status;
}

/* What was swapped in becomes what acts. On an error some gates have no state, and the next call tries again. */
static mien_status take_setting(mien_hook *hook) {
    if (atomic_load_explicit(&hook->mailbox, memory_order_relaxed)) {
        setting *taken = atomic_exchange_explicit(&hook->mailbox, NULL, memory_order_acquire), *old = hook->current;
        hook->current = taken;
        const mien_status status = settle(hook);
        free_setting(old);
        return status;
    }
    return hook->current && !hook->settled ? settle(hook) : MIEN_OK;
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

/* Steer and read rows first to last of `data`, which holds the tensor's rows from row 0 on. thread: its number
 * among those that compute. */
static void steer_rows(slot *here, float *data, int64_t first, int64_t last, int thread) {
    mien_hook *hook = here->hook;
    const size_t width = (size_t)here->width;
    float *copy = thread < hook->copy_threads ? hook->copies + (size_t)thread * hook->copy_width : NULL;
    mien_shift shift = {0, 0};
    if (here->watched) read_rows(here, data, first, last, hook->watch.before);
    if (!here->rows) {
        shift = mien_program_apply(hook->n_pinned ? hook->pinned[0] : NULL, here->site, here->layer,
                                   data + (size_t)first * width, (size_t)(last - first), NULL, copy);
    } else {
        for (int64_t r = first, end; r < last; r = end) { /* neighbours on which the same acts */
            for (end = r + 1; end < last && here->rows->program[end] == here->rows->program[r];) end++;
            const mien_shift some =
                mien_program_apply(here->rows->program[r], here->site, here->layer, data + (size_t)r * width,
                                   (size_t)(end - r), &here->rows->what[r], copy);
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
    steer_rows(here, out, first, last, ith);
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

/* Give every thread room for a copy of a row, if anything that is pinned needs it. On error no thread has. */
static mien_status make_copies(mien_hook *hook) {
    size_t width = 0;
    for (int32_t i = 0; i < hook->n_pinned; i++) {
        const size_t of_program = mien_program_copy(hook->pinned[i]);
        if (of_program > width) width = of_program;
    }
    if (!width || (width <= hook->copy_width && hook->n_threads <= hook->copy_threads)) return MIEN_OK;
    free(hook->copies);
    hook->copies = NULL;
    hook->copy_threads = 0;
    hook->copy_width = (width + COPY_ALIGN - 1) / COPY_ALIGN * COPY_ALIGN; /* no two threads share a cache line */
    const size_t row = hook->copy_width * sizeof(float);
    if ((size_t)hook->n_threads > SIZE_MAX / row) return MIEN_ERR_MEMORY;
    hook->copies = malloc((size_t)hook->n_threads * row);
    if (!hook->copies) return MIEN_ERR_MEMORY;
    hook->copy_threads = hook->n_threads;
    return MIEN_OK;
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
    steer_rows(here, data, 0, rows, 0);
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

static void forget_inputs(mien_hook *hook) {
    hook->between = true;
    hook->looks_up = !hook->layout.image_size; /* then sources can't be read, and tokens are likelier */
    hook->looked_up = NULL;
    hook->ids.n = hook->positions.n = -1;
}

static void forget_graphs(mien_hook *hook) {
    hook->last_layer = -1;
    hook->graph_tokens = hook->tokens_before = 0;
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

static bool grow_input(input *in, int64_t n) {
    if (n <= in->size) return true;
    if (n > INT32_MAX) return false;
    int32_t *grown = realloc(in->values, (size_t)n * sizeof *grown);
    if (!grown) return false;
    in->values = grown;
    in->size = (int32_t)n;
    return true;
}

/* Read int32s from a leaf of the graph, which was set before anything is computed. */
static void read_input(mien_hook *hook, const ggml_tensor *leaf, input *in) {
    const mien_ggml *ggml = &hook->ggml;
    const int64_t n = ggml->ggml_nelements(leaf);
    if (n <= 0 || ggml->ggml_nbytes(leaf) != (size_t)n * sizeof(int32_t)) return;
    if (!grow_input(in, n)) {
        fail(hook, MIEN_ERR_MEMORY);
        return;
    }
    ggml->ggml_backend_tensor_get(leaf, in->values, 0, (size_t)n * sizeof(int32_t));
    in->n = (int32_t)n;
}

/* How ggml names nodes that were not given a name. */
static const char UNNAMED[] = "node_";

/* The tokens and positions of the graph that begins, from a node that looks embeddings up or rotates. */
static void read_inputs(mien_hook *hook, const ggml_tensor *t) {
    const ggml_tensor *leaf = mien_pointer_at(t, hook->layout.sources + sizeof(void *));
    if (!leaf) return;
    const char *name = hook->ggml.ggml_get_name(leaf);
    if (!strcmp(name, "inp_tokens")) { /* a graph's first node */
        forget_inputs(hook);
        /* A graph of embeddings looks tokens up as well, and does nothing with them. */
        hook->looks_up = strncmp(hook->ggml.ggml_get_name(t), UNNAMED, strlen(UNNAMED));
        hook->looked_up = hook->looks_up ? NULL : t;
        if (hook->in_scope) read_input(hook, leaf, &hook->ids);
    } else if (hook->between && hook->positions.n < 0 && !strcmp(name, "inp_pos")) {
        read_input(hook, leaf, &hook->positions);
    }
}

/* Whether the inputs of a graph must be known, to tell its tokens' order, or what they are. */
static bool needs_inputs(const mien_hook *hook) {
    return hook->in_scope ? hook->by_row && mien_evaluation_needs_inputs(&hook->evaluation)
                          : hook->batching.n_sequences == 1;
}

/* Of a graph with n tokens; NULL if they were not read. Models with positions of several dimensions have them one
 * dimension after another. */
static const int32_t *positions_of(const mien_hook *hook, int64_t n) {
    return n > 0 && hook->positions.n >= n && hook->positions.n % n == 0 ? hook->positions.values : NULL;
}

static bool pin_all(mien_hook *hook);

/* Nothing acts on the graph, though something is set. */
static void leave_unsteered(mien_hook *hook) {
    unpin(hook);
    hook->by_row = false;
    hook->unsteered++;
}

static void note_stray(mien_hook *hook, int32_t position, int32_t rows, int32_t given) {
    const uint64_t id = mien_hook_acted(hook);
    mien_stray *last = hook->n_strays > 0 ? &hook->strays[hook->n_strays - 1] : NULL;
    if (hook->n_strays < 0) return;
    if (last && last->id == id && last->position >= 0 && last->position + last->rows == position &&
        rows <= INT32_MAX - last->rows && (last->given == last->rows || !given)) {
        last->rows += rows;
        last->given += given;
    } else if (hook->n_strays == STRAYS_MAX) {
        hook->n_strays = -1;
    } else {
        hook->strays[hook->n_strays++] = (mien_stray){position, rows, given, id};
    }
}

/* The graph's tokens as a batch of the one sequence: embeddings, and a token after one that asked for no logits,
 * are given. */
static mien_status follow_stray(mien_hook *hook, int32_t rows, const int32_t *known, mien_batch *batch) {
    mien_sequence *only = &hook->now[0];
    if (!known) {
        if (!grow_input(&hook->positions, rows)) return MIEN_ERR_MEMORY;
        for (int32_t i = 0; i < rows; i++) hook->positions.values[i] = only->next + i;
    }
    *batch = (mien_batch){rows, NULL, hook->positions.values, NULL, NULL, NULL};
    bool continued;
    const mien_status status = mien_batch_follow(batch, hook->now, 1, ++hook->serial, &continued);
    if (status == MIEN_OK && !hook->looks_up && !only->told && only->reply_from < only->next)
        only->reply_from = only->next;
    return status;
}

/* Work out and note what the graph's rows are to the one sequence, and pin what acts on them, unless the same acts
 * on all tokens and is pinned. */
static mien_status follow_and_pin(mien_hook *hook, int32_t rows, const int32_t *known, bool same) {
    static const mien_order as_it_stands[MIEN_ORDERS] = {MIEN_ORDER_NONE, MIEN_ORDER_NONE};
    mien_batch batch;
    mien_status status = follow_stray(hook, rows, known, &batch);
    if (status != MIEN_OK) return status;
    int32_t given = 0;
    while (given < rows && batch.positions[given] < hook->now[0].reply_from) given++;
    note_stray(hook, known ? known[0] : -1, rows, given);
    if (same) return MIEN_OK;
    status = mien_evaluation_begin(&hook->evaluation, &batch, hook->now, 1, hook->batching.n_ubatch, as_it_stands);
    if (status != MIEN_OK) return status;
    hook->by_row = pin_all(hook);
    if (hook->by_row) mien_evaluation_graph(&hook->evaluation, 0, rows, NULL, NULL);
    return MIEN_OK;
}

/* A graph outside of begin..end. */
static void begin_stray(mien_hook *hook, int64_t n) {
    const int32_t *known = positions_of(hook, n);
    forget_graphs(hook);
    unpin(hook);
    mien_status status = take_setting(hook);
    hook->by_row = hook->continued = false;
    if (status != MIEN_OK) fail(hook, status);
    if (n <= 0 || n > INT32_MAX) return;
    if (hook->current && !hook->current->alike) {
        leave_unsteered(hook);
        return;
    }
    const mien_acting *acting = hook->current ? hook->current->acting : NULL;
    const bool same = !acting || (acting->prompt == acting->response && !mien_program_counts(acting->response));
    if (same && acting) pin(hook, acting->response);
    status = MIEN_OK;
    if (hook->batching.n_sequences == 1)
        status = follow_and_pin(hook, (int32_t)n, known, same);
    else if (!same)
        leave_unsteered(hook);
    if (status == MIEN_OK) status = make_copies(hook);
    if (status != MIEN_OK) fail(hook, status);
}

static void begin_graph(mien_hook *hook, int64_t rows) {
    hook->graph++;
    hook->tail.left = 0;
    if (!hook->in_scope) {
        begin_stray(hook, rows);
        return;
    }
    hook->tokens_before += hook->graph_tokens;
    hook->graph_tokens = hook->ids.n >= 0 ? hook->ids.n : rows;
    if (!hook->by_row) return;
    const int32_t *ids = hook->ids.n >= 0 ? hook->ids.values : NULL;
    if (!mien_evaluation_graph(&hook->evaluation, (int32_t)hook->tokens_before, (int32_t)hook->graph_tokens, ids,
                               positions_of(hook, hook->graph_tokens)))
        fail(hook, MIEN_ERR_ROWS);
}

/* Layers are asked for in ascending order, so one that does not ascend, or a place that is asked for again,
 * begins the next micro-batch. */
static void follow_graph(slot *here, int64_t rows) {
    mien_hook *hook = here->hook;
    if (hook->last_layer < 0 || here->layer < hook->last_layer || here->graph == hook->graph) {
        begin_graph(hook, rows);
        hook->between = false;
    }
    hook->last_layer = here->layer;
    here->graph = hook->graph;
    if (here->site == MIEN_SITE_RESIDUAL && here->layer == hook->n_layer - 1) { /* the last place of a graph */
        forget_inputs(hook);
        if (!hook->in_scope && hook->batching.n_sequences == 1) hook->now[0].silent = !rows;
    }
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

/* The place that is the node of that name, or NULL. */
static slot *named_slot(mien_hook *hook, const char *name, int32_t layer, size_t length, uint32_t sites) {
    for (int site = 0; layer >= 0 && layer < hook->n_layer && site < MIEN_SITES; site++) {
        if (!(sites & 1u << site)) continue;
        slot *here = slot_at(hook, (mien_site)site, layer);
        if (here->width && !here->weight && is_stem(here->stem, name, length)) return here;
    }
    /* Named by what it goes into: the next block, or what follows the last, which has no number. */
    const int32_t before = (layer < 0 ? hook->n_layer : layer) - 1;
    if (!(sites & RESIDUAL) || before < 0 || before >= hook->n_layer) return NULL;
    slot *here = slot_at(hook, MIEN_SITE_RESIDUAL, before);
    return here->stem[0] == '=' && !strcmp(here->stem + 1, name) ? here : NULL;
}

static bool ask_named(mien_hook *hook, ggml_tensor *t, uint32_t sites) {
    size_t length = 0;
    const char *name = hook->ggml.ggml_get_name(t);
    const int32_t layer = layer_of(name, &length);
    slot *here = named_slot(hook, name, layer, length, sites);
    if (here) return ask_slot(here, t);
    if (hook->count.counts && layer >= 0 && layer < hook->n_layer && is_stem(hook->count.stem, name, length))
        return wait_for(hook, t, NULL);
    return false;
}

static bool ask(mien_hook *hook, ggml_tensor *t) {
    const mien_layout *layout = &hook->layout;
    /* Its places may come before those of the residual stream. On an error the same comes up when the graph begins. */
    if (!hook->in_scope && hook->between) (void)take_setting(hook);
    const uint32_t sites =
        RESIDUAL | (hook->in_scope || !hook->between ? hook->sites : hook->current ? hook->current->sites : 0);
    if (layout->image_size) {
        const int32_t op = mien_int_at(t, layout->op);
        if (hook->looked_up && (mien_pointer_at(t, layout->sources) == hook->looked_up ||
                                mien_pointer_at(t, layout->sources + sizeof(void *)) == hook->looked_up)) {
            hook->looks_up = true;
            hook->looked_up = NULL;
        }
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
        if ((op == layout->op_gather || (op == layout->op_rotate && hook->between)) && needs_inputs(hook))
            read_inputs(hook, t);
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

static void leave_scope(mien_hook *hook) {
    unpin(hook);
    hook->in_scope = hook->by_row = false;
    hook->last_layer = -1;
    forget_inputs(hook);
}

static void free_sequences(mien_hook *hook) {
    leave_scope(hook);
    free_setting(atomic_exchange_explicit(&hook->mailbox, NULL, memory_order_acquire));
    free_setting(hook->current);
    hook->current = NULL;
    for (int32_t i = 0; hook->now && i < hook->batching.n_sequences; i++) mien_memory_release(hook->now[i].memory);
    free(hook->now);
    free(hook->pinned);
    hook->now = NULL;
    hook->pinned = NULL;
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
    hook->n_threads = 1;
    atomic_init(&hook->mailbox, NULL);
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
    free(hook->ids.values);
    free(hook->positions.values);
    free(hook->copies);
    free(hook->nodes);
    free(hook->scratch);
    free(hook);
}

mien_status mien_hook_set_batching(mien_hook *hook, const mien_batch_layout *layout, const mien_batching *batching) {
    const int32_t n = batching->n_sequences;
    if (n <= 0 || n > INT32_MAX / 2 || batching->n_ubatch <= 0) return MIEN_ERR_SHAPE;
    mien_sequence *now = calloc((size_t)n, sizeof *now);
    mien_program **pinned = calloc(2 * (size_t)n, sizeof(mien_program *));
    if (!now || !pinned) {
        free(now);
        free(pinned);
        return MIEN_ERR_MEMORY;
    }
    for (int32_t i = 0; i < n; i++) now[i].reply_from = INT32_MAX;
    free_sequences(hook);
    hook->now = now;
    hook->pinned = pinned;
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

mien_status mien_hook_swap(mien_hook *hook, const mien_acting *acting, int32_t count, uint64_t id) {
    if (count != 1 && count != hook->batching.n_sequences) return MIEN_ERR_ROWS;
    for (int32_t i = 0; i < count; i++) {
        const mien_acting *one = &acting[i];
        if (i && one->prompt == acting[i - 1].prompt && one->response == acting[i - 1].response) continue;
        mien_status status = check_program(hook, one->prompt);
        if (status == MIEN_OK && one->response != one->prompt) status = check_program(hook, one->response);
        if (status != MIEN_OK) return status;
    }
    setting *made = new_setting(acting, count, id);
    if (!made) return MIEN_ERR_MEMORY;
    free_setting(atomic_exchange_explicit(&hook->mailbox, made, memory_order_acq_rel)); /* nobody took that one */
    return MIEN_OK;
}

uint64_t mien_hook_acted(const mien_hook *hook) { return hook->current ? hook->current->id : 0; }

void mien_hook_tell_reply(mien_hook *hook, int32_t sequence, int32_t position) {
    if (sequence < 0 || sequence >= hook->batching.n_sequences) return;
    mien_sequence *now = &hook->now[sequence];
    now->told = position >= 0;
    now->replied = 0;
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

bool mien_hook_silent(const mien_hook *hook, int32_t sequence) {
    return sequence >= 0 && sequence < hook->batching.n_sequences && hook->now[sequence].silent;
}

void mien_hook_place(mien_hook *hook, int32_t sequence, int32_t reply_from, int32_t next, bool silent) {
    if (sequence < 0 || sequence >= hook->batching.n_sequences) return;
    hook->now[sequence].reply_from = reply_from;
    hook->now[sequence].next = next;
    hook->now[sequence].silent = silent;
}

void mien_hook_rewind(mien_hook *hook, int32_t sequence, int32_t position) {
    if (sequence < 0 || sequence >= hook->batching.n_sequences || hook->now[sequence].next <= position) return;
    hook->now[sequence].next = position;
    hook->now[sequence].silent = false;
}

mien_status mien_hook_begin_anew(mien_hook *hook, int32_t sequence) {
    if (sequence < 0 || sequence >= hook->batching.n_sequences) return MIEN_OK;
    mien_status status = take_setting(hook);
    mien_sequence *now = &hook->now[sequence];
    mien_memory *memory = NULL;
    if (status == MIEN_OK && mien_program_remembers(now->response)) status = mien_memory_new(&memory, now->response);
    if (status != MIEN_OK) return status;
    mien_memory_release(now->memory);
    now->memory = memory;
    return MIEN_OK;
}

void mien_hook_threads(mien_hook *hook, int32_t n) {
    if (n > hook->n_threads) hook->n_threads = n;
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
    hook->evaluation.n_tokens = 0;
    mien_status status = take_setting(hook);
    if (status != MIEN_OK) return status;
    if (hook->watch.probe && (hook->watch.before || hook->watch.after) && batch.n_tokens > hook->watch.n_tokens)
        return MIEN_ERR_SHAPE;
    status = mien_batch_follow(&batch, hook->now, n, ++hook->serial, &hook->continued);
    if (status == MIEN_OK)
        status = mien_evaluation_begin(&hook->evaluation, &batch, hook->now, n, hook->batching.n_ubatch,
                                       hook->batching.orders);
    if (status == MIEN_OK) {
        const bool differs = pin_all(hook);
        hook->by_row = differs || hook->capture.buffer || hook->watch.probe;
        status = make_copies(hook);
    }
    if (status != MIEN_OK) {
        hook->evaluation.n_tokens = 0;
        leave_scope(hook);
        return status;
    }
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

bool mien_hook_continued(const mien_hook *hook) { return hook->continued; }

int64_t mien_hook_unsteered(const mien_hook *hook) { return hook->unsteered; }

int32_t mien_hook_strays(mien_hook *hook, mien_stray *strays, int32_t room) {
    const int32_t n = hook->n_strays;
    for (int32_t i = 0; i < n && i < room; i++) strays[i] = hook->strays[i];
    hook->n_strays = 0;
    return n;
}

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

mien_status mien_hook_watch(mien_hook *hook, mien_probe *probe, float *before, float *after, int32_t n_tokens) {
    if (probe && (mien_probe_layers(probe) != hook->n_layer || mien_probe_width(probe) != hook->n_embd))
        return MIEN_ERR_SHAPE;
    mien_probe *old = hook->watch.probe;
    hook->watch.probe = mien_probe_retain(probe);
    hook->watch.before = probe ? before : NULL;
    hook->watch.after = probe ? after : NULL;
    hook->watch.n_tokens = n_tokens;
    mien_probe_release(old);
    return MIEN_OK;
}

mien_status mien_hook_count(mien_hook *hook, int64_t *counts, int32_t n_expert, int32_t used, const char *stem) {
    const bool fits = strlen(stem) <= STEM_MAX;
    hook->count.counts = fits ? counts : NULL;
    hook->count.n_expert = n_expert;
    hook->count.used = used;
    if (fits) memcpy(hook->count.stem, stem, strlen(stem) + 1);
    return fits ? MIEN_OK : MIEN_ERR_SHAPE;
}

mien_applied mien_hook_applied(const mien_hook *hook, mien_site site, int32_t layer) {
    if ((int)site < 0 || (int)site >= MIEN_SITES || layer < 0 || layer >= hook->n_layer)
        return (mien_applied){0, 0.0, MIEN_PATH_AUTO, false};
    const slot *here = &hook->slots[(size_t)site * (size_t)hook->n_layer + (size_t)layer];
    return (mien_applied){atomic_load_explicit(&here->changed, memory_order_relaxed),
                          atomic_load_explicit(&here->moved, memory_order_relaxed), here->path, here->met};
}

int32_t mien_hook_tokens(const mien_hook *hook, int32_t *sequences, int32_t *replies, int32_t room) {
    for (int32_t t = 0; t < hook->evaluation.n_tokens && t < room; t++) {
        sequences[t] = hook->evaluation.tokens.sequence[t];
        replies[t] = hook->evaluation.tokens.what[t].reply;
    }
    return hook->evaluation.n_tokens;
}
