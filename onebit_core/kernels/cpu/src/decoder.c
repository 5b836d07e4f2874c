/* ob_decode: the decoder blocks of a Llama-like model over one step, without a way back to Python between products.
 *
 *     for every block:   x = norm(h);  q, k, v = products of x;  heads of q and k normed and rotated;  k, v to their slots
 *                        h += o(attention);  x = norm(h);  h += down(silu(gate(x)) * up(x))
 *     out = norm(h) of the rows asked for
 *
 * norm is RMSNorm: x * w / sqrt(mean(x^2) + eps). Rotation takes the halves of a head as real and imaginary parts, with
 * cosines and sines from the model's own rotary embedding. Each row is computed by itself: its numbers depend on the
 * step's other rows no more than those of ob_matmul and ob_attend do, which is not at all.
 */
#include "attention.h"
#include "lanes.h"
#include "onebit_cpu.h"
#include "threads.h"

#include <math.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* Some columns of a matrix whose rows are `stride` apart. */
typedef struct {
    float *data;
    int64_t stride;
} columns_of;

typedef struct {
    const ob_decoder *model;
    const ob_decoder_step *step;
    const ob_decoder_layer *layer;
    int threads;
    float eps, scaling;
    float *hidden, *normed, *projected, *queries, *attended, *merged, *between;
    float *scores;      /* of every thread */
    int64_t most_keys;
    float *keys, *values; /* of this layer */
} state;

static const double ROW_FLOATS_A_SECOND = 1e9; /* norms, rotations and activations, roughly */
static const double KEY_FLOATS_A_SECOND = 8e9; /* attention */

/* For each row of the step, in parallel where that is worth it. */
typedef void (*row_work)(const state *s, int64_t row);

static void each_row(const state *s, int64_t rows, double floats, row_work work) {
    int threads = ob_threads_worth((double)rows * floats / ROW_FLOATS_A_SECOND, s->threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) work(s, row);
    (void)threads;
}

OB_LANES_INLINE void norm(const float *x, const float *weight, int64_t size, float eps, float *out) {
    ob_v16 sum, value, factor;
    int64_t i = 0;
    ob_fill(&sum, 0);
    for (; i + OB_LANES <= size; i += OB_LANES) {
        ob_read(&value, x + i);
        sum = sum + value * value;
    }
    float squares = ob_total(&sum);
    for (; i < size; i++) squares += x[i] * x[i];
    float scale = 1 / sqrtf(squares / (float)size + eps);
    for (i = 0; i + OB_LANES <= size; i += OB_LANES) {
        ob_read(&value, x + i);
        ob_read(&factor, weight + i);
        value = value * scale * factor;
        ob_write(out + i, &value);
    }
    for (; i < size; i++) out[i] = x[i] * scale * weight[i];
}

OB_CLONES static void norm_input(const state *s, int64_t row) {
    int64_t size = s->model->hidden;
    norm(s->hidden + row * size, (const float *)s->layer->input_norm_p, size, s->eps, s->normed + row * size);
}

OB_LANES_INLINE void add(float *to, const float *from, int64_t size) {
    for (int64_t i = 0; i < size; i++) to[i] += from[i];
}

OB_CLONES static void add_and_norm_post(const state *s, int64_t row) {
    int64_t size = s->model->hidden;
    add(s->hidden + row * size, s->projected + row * size, size);
    norm(s->hidden + row * size, (const float *)s->layer->post_norm_p, size, s->eps, s->normed + row * size);
}

OB_CLONES static void add_down(const state *s, int64_t row) {
    int64_t size = s->model->hidden;
    add(s->hidden + row * size, s->projected + row * size, size);
}

OB_CLONES static void norm_out(const state *s, int64_t place) {
    int64_t size = s->model->hidden, row = ((const int64_t *)s->step->out_rows_p)[place];
    float *out = (float *)s->step->out_p + place * size;
    norm(s->hidden + row * size, (const float *)s->model->final_norm_p, size, s->eps, out);
}

/* Where q (0), k (1) or v (2) of a row is. */
static columns_of projection(const state *s, int which) {
    int64_t width = s->model->head_dim, q = s->model->num_heads * width, kv = s->model->num_kv_heads * width;
    int64_t begin = which == 0 ? 0 : q + (which - 1) * kv;
    if (s->layer->k.links[0].blob_p == 0) return (columns_of){s->merged + begin, q + 2 * kv};
    return (columns_of){s->merged + begin * s->step->tokens, which == 0 ? q : kv};
}

/* Gate (0) or up (1). */
static columns_of inner_part(const state *s, int which) {
    int64_t size = s->model->inner;
    if (s->layer->up.links[0].blob_p == 0) return (columns_of){s->merged + which * size, 2 * size};
    return (columns_of){s->merged + which * size * s->step->tokens, size};
}

/* out_i = x_i cos_i + (i < D / 2 ? -x_{i + D/2} : x_{i - D/2}) sin_i */
OB_LANES_INLINE void rotate(const float *x, const float *cos, const float *sin, int64_t size, float *out) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float low = x[i], high = x[i + half];
        out[i] = low * cos[i] - high * sin[i];
        out[i + half] = high * cos[i + half] + low * sin[i + half];
    }
}

enum { MOST_HEAD = 512 };

OB_CLONES static void rotate_and_store(const state *s, int64_t row) {
    const ob_decoder *m = s->model;
    int64_t size = m->head_dim, slot = ((const int64_t *)s->step->slots_p)[row];
    const float *cos = (const float *)s->step->cos_p + row * size, *sin = (const float *)s->step->sin_p + row * size;
    float head[MOST_HEAD];
    columns_of q = projection(s, 0), k = projection(s, 1), v = projection(s, 2);
    for (int64_t h = 0; h < m->num_heads; h++) {
        const float *x = q.data + row * q.stride + h * size;
        float *out = s->queries + (row * m->num_heads + h) * size;
        if (s->layer->q_norm_p) norm(x, (const float *)s->layer->q_norm_p, size, s->eps, head);
        rotate(s->layer->q_norm_p ? head : x, cos, sin, size, out);
        for (int64_t i = 0; i < size; i++) out[i] *= s->scaling;
    }
    int64_t page = slot / OB_PAGE_TOKENS * m->num_kv_heads, place = slot % OB_PAGE_TOKENS;
    for (int64_t h = 0; h < m->num_kv_heads; h++) {
        const float *x = k.data + row * k.stride + h * size, *value = v.data + row * v.stride + h * size;
        float rotated[MOST_HEAD];
        if (s->layer->k_norm_p) norm(x, (const float *)s->layer->k_norm_p, size, s->eps, head);
        rotate(s->layer->k_norm_p ? head : x, cos, sin, size, rotated);
        float *keys = s->keys + (page + h) * size * OB_PAGE_TOKENS + place;
        for (int64_t i = 0; i < size; i++) keys[i * OB_PAGE_TOKENS] = rotated[i];
        float *values = s->values + (page + h) * size * OB_PAGE_TOKENS + place * size;
        for (int64_t i = 0; i < size; i++) values[i] = value[i];
    }
}

/* gate = silu(gate) * up = gate * up / (1 + e^-gate), in place. */
OB_CLONES static void activate(const state *s, int64_t row) {
    columns_of gate = inner_part(s, 0), up = inner_part(s, 1);
    float *g = gate.data + row * gate.stride;
    const float *u = up.data + row * up.stride;
    int64_t size = s->model->inner;
    for (int64_t i = 0; i < size; i += OB_LANES) {
        float tail[2][OB_LANES] = {{0}, {0}};
        int64_t count = size - i < OB_LANES ? size - i : OB_LANES;
        ob_v16 x, y, e;
        if (count == OB_LANES) {
            ob_read(&x, g + i);
            ob_read(&y, u + i);
        } else {
            for (int64_t j = 0; j < count; j++) tail[0][j] = g[i + j], tail[1][j] = u[i + j];
            ob_read(&x, tail[0]);
            ob_read(&y, tail[1]);
        }
        e = -x;
        ob_exp(&e);
        x = x * y / (e + 1.0f);
        if (count == OB_LANES) {
            ob_write(g + i, &x);
        } else {
            for (int64_t j = 0; j < count; j++) g[i + j] = x[j];
        }
    }
}

/* Multiply the rows of the step: x [tokens, stride] to y [tokens, rows of the last link]. */
static int multiply(const state *s, const ob_chain *chain, const float *x, int64_t stride, float *y) {
    for (int link = 0; link < 2 && chain->links[link].blob_p; link++) {
        const ob_link *one = chain->links + link;
        int is_last = link == 1 || chain->links[1].blob_p == 0;
        float *out = is_last ? y : s->between;
        int status = ob_matmul((const void *)one->blob_p, one->blob_bytes, one->rows, one->columns, x, OB_FLOAT32,
                               s->step->tokens, stride, out, s->threads);
        if (status != OB_OK) return status;
        x = out;
        stride = one->rows;
    }
    return OB_OK;
}

/* Attend some tokens of a run with one key head: four pairs of token and query head at a time. */
static void attend_unit(const state *s, const ob_run *run, int64_t first, int64_t count, int64_t head, float *scores) {
    const ob_decoder *m = s->model;
    int64_t shared = m->num_heads / m->num_kv_heads, size = m->head_dim, pairs = count * shared;
    int64_t page_floats = size * OB_PAGE_TOKENS;
    ob_attention_job job = {
        .keys = s->keys + head * page_floats,
        .values = s->values + head * page_floats,
        .page_stride = m->num_kv_heads * page_floats,
        .pages = (const int64_t *)s->step->pages_p + run->pages,
        .head_dim = size,
        .scores = scores,
    };
    for (int64_t pair = 0; pair < pairs; pair += OB_QUERIES) {
        for (int q = 0; q < OB_QUERIES; q++) {
            int64_t one = pair + q < pairs ? pair + q : pairs - 1, token = first + one / shared;
            int64_t at = ((run->first + token) * m->num_heads + head * shared + one % shared) * size;
            job.queries[q] = s->queries + at;
            job.out[q] = s->attended + at;
            int64_t keys = run->start + token + 1, window = s->layer->window;
            job.num_keys[q] = keys;
            job.first_key[q] = window && keys > window ? keys - window : 0;
        }
        ob_attend(&job);
    }
}

enum { UNIT_TOKENS = 16 }; /* of a run, attended by one thread at a time */

static void attend(const state *s) {
    const ob_run *runs = (const ob_run *)s->step->runs_p;
    int64_t heads = s->model->num_kv_heads, units = 0;
    double keys = 0;
    for (int64_t r = 0; r < s->step->num_runs; r++) {
        units += (runs[r].count + UNIT_TOKENS - 1) / UNIT_TOKENS * heads;
        keys += (double)runs[r].count * ((double)runs[r].start + (double)runs[r].count / 2 + 8);
    }
    double floats = keys * 2 * (double)(s->model->num_heads * s->model->head_dim);
    int threads = ob_threads_worth(floats / KEY_FLOATS_A_SECOND, s->threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; unit++) {
        int64_t r = 0, rest = unit / heads, parts;
        for (; rest >= (parts = (runs[r].count + UNIT_TOKENS - 1) / UNIT_TOKENS); r++) rest -= parts;
        int64_t first = rest * UNIT_TOKENS, count = runs[r].count - first;
        int worker = 0;
#ifdef _OPENMP
        worker = omp_get_thread_num();
#endif
        attend_unit(s, runs + r, first, count < UNIT_TOKENS ? count : UNIT_TOKENS, unit % heads,
                    s->scores + worker * OB_QUERIES * ob_score_room(s->most_keys));
    }
    (void)threads;
}

static int run_layer(state *s, int64_t index) {
    const ob_decoder *m = s->model;
    int64_t tokens = s->step->tokens, width = m->num_heads * m->head_dim, kv = m->num_kv_heads * m->head_dim;
    const ob_decoder_layer *layer = s->layer;
    s->keys = (float *)s->step->keys_p + index * s->step->layer_stride;
    s->values = (float *)s->step->values_p + index * s->step->layer_stride;
    each_row(s, tokens, (double)m->hidden, norm_input);
    int status = multiply(s, &layer->q, s->normed, m->hidden, s->merged);
    if (status == OB_OK) status = multiply(s, &layer->k, s->normed, m->hidden, s->merged + width * tokens);
    if (status == OB_OK) status = multiply(s, &layer->v, s->normed, m->hidden, s->merged + (width + kv) * tokens);
    if (status != OB_OK) return status;
    each_row(s, tokens, 2 * (double)(width + 2 * kv), rotate_and_store);
    attend(s);
    status = multiply(s, &layer->o, s->attended, width, s->projected);
    if (status != OB_OK) return status;
    each_row(s, tokens, 2 * (double)m->hidden, add_and_norm_post);
    status = multiply(s, &layer->gate, s->normed, m->hidden, s->merged);
    if (status == OB_OK) status = multiply(s, &layer->up, s->normed, m->hidden, s->merged + m->inner * tokens);
    if (status != OB_OK) return status;
    each_row(s, tokens, 2 * (double)m->inner, activate);
    columns_of gate = inner_part(s, 0);
    status = multiply(s, &layer->down, gate.data, gate.stride, s->projected);
    if (status != OB_OK) return status;
    each_row(s, tokens, (double)m->hidden, add_down);
    return OB_OK;
}

/* Hand out floats from *next, or only count where memory is NULL. */
static float *take(float *memory, int64_t *next, int64_t floats) {
    float *result = memory ? memory + *next : NULL;
    *next += (floats + OB_LANES - 1) / OB_LANES * OB_LANES;
    return result;
}

static int64_t most_rows(const ob_decoder *model, const ob_decoder_layer *layers) {
    int64_t most = 0;
    for (int64_t l = 0; l < model->num_layers; l++) {
        const ob_chain *chain = &layers[l].q;
        for (int c = 0; c < 7; c++) most = chain[c].links[0].rows > most ? chain[c].links[0].rows : most;
    }
    return most;
}

static int64_t lay_out(state *s, const ob_decoder_layer *layers, float *memory) {
    const ob_decoder *m = s->model;
    int64_t next = 0, tokens = s->step->tokens, width = m->num_heads * m->head_dim;
    int64_t heads = width + 2 * m->num_kv_heads * m->head_dim, inner = 2 * m->inner;
    s->normed = take(memory, &next, tokens * m->hidden);
    s->projected = take(memory, &next, tokens * m->hidden);
    s->queries = take(memory, &next, tokens * width);
    s->attended = take(memory, &next, tokens * width);
    s->merged = take(memory, &next, tokens * (heads > inner ? heads : inner));
    s->between = take(memory, &next, tokens * most_rows(m, layers));
    s->scores = take(memory, &next, s->threads * OB_QUERIES * ob_score_room(s->most_keys));
    return next;
}

static int run_step(const ob_decoder *model, const ob_decoder_layer *layers, const ob_decoder_step *step, int threads) {
    const ob_run *runs = (const ob_run *)step->runs_p;
    state s = {.model = model, .step = step, .threads = threads,
               .eps = (float)*(const double *)model->norm_eps_p, .scaling = (float)*(const double *)model->scaling_p,
               .hidden = (float *)step->hidden_p};
    for (int64_t r = 0; r < step->num_runs; r++) {
        int64_t keys = runs[r].start + runs[r].count;
        s.most_keys = keys > s.most_keys ? keys : s.most_keys;
    }
    float *memory = aligned_alloc(64, (size_t)lay_out(&s, layers, NULL) * sizeof *memory);
    if (memory == NULL) return OB_ERROR_MEMORY;
    lay_out(&s, layers, memory);
    int status = OB_OK;
    for (int64_t l = 0; l < model->num_layers && status == OB_OK; l++) {
        s.layer = layers + l;
        status = run_layer(&s, l);
    }
    if (status == OB_OK) each_row(&s, step->num_out, (double)model->hidden, norm_out);
    free(memory);
    return status;
}

int ob_decode(const int64_t *decoder, int64_t length, const int64_t *step, int threads) {
    const int64_t HEAD = sizeof(ob_decoder) / sizeof(int64_t), LAYER = sizeof(ob_decoder_layer) / sizeof(int64_t);
    if (decoder == NULL || step == NULL || threads < 1 || length < HEAD) return OB_ERROR_ARGUMENT;
    const ob_decoder *model = (const ob_decoder *)decoder;
    const ob_decoder_step *now = (const ob_decoder_step *)step;
    if (model->num_layers < 0 || length != HEAD + model->num_layers * LAYER) return OB_ERROR_ARGUMENT;
    if (model->hidden < 1 || model->inner < 1 || model->num_kv_heads < 1 || now->tokens < 0) return OB_ERROR_ARGUMENT;
    if (model->num_heads % model->num_kv_heads || model->num_heads < 1) return OB_ERROR_ARGUMENT;
    if (model->head_dim < OB_LANES || model->head_dim % OB_LANES || model->head_dim > MOST_HEAD) return OB_ERROR_ARGUMENT;
    return run_step(model, (const ob_decoder_layer *)(decoder + HEAD), now, threads);
}
