/* ob_matmul: quantize a chunk of tokens, then walk the supertiles; one parallel region per call.
 *
 *   region:  for each chunk of tokens:
 *                quantize         split over (token, set, segment)
 *                gate             all threads are here
 *                supertiles       static split; every thread owns its rows of y
 *                gate             the next chunk overwrites the quantized x
 */
#include "onebit_cpu.h"
#include "scratch.h"
#include "threads.h"
#include "tier.h"

#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum {
    MAX_SETS = 65,
    MAX_CHUNK = 64,               /* tokens quantized at a time */
    CHUNK_BYTES = 1 << 20,        /* what their tables may take: half of a common L2 cache */
};

typedef struct {
    const ob_tier *tier;
    const ob_blob *blob;
    const ob_set *sets;
    const ob_packed_term *terms;
    const uint8_t *x;
    uint8_t *y;
    int dtype;
    int64_t tokens, x_stride;
    int64_t chunk;
    ob_activations quantized[MAX_SETS];
    uint8_t *workers; /* scratch of every worker */
    ob_gate *gate;
} ob_call;

static const int64_t PANEL_SCRATCH = (int64_t)OB_PANEL_BYTES * (OB_MAX_SEGMENT / OB_BLOCK);

static int64_t element_bytes(int dtype) {
    return dtype == OB_FLOAT32 ? 4 : 2;
}

static int64_t worker_bytes(const ob_call *call) {
    return PANEL_SCRATCH + call->chunk * OB_TILE * 3 * (int64_t)sizeof(float);
}

/* Hand out memory from *next, or only count where memory is NULL. */
static void *take(uint8_t *memory, int64_t *next, int64_t bytes) {
    void *result = memory ? memory + *next : NULL;
    *next += ob_ceil_div(bytes, 64) * 64;
    return result;
}

/* Lay out the scratch of a call; returns its size. With memory NULL it only counts. `wants` has, per set, bit 0 for
 * tables and bit 1 for split bytes. A line of padding keeps the tokens' tables out of each other's cache sets. */
static int64_t lay_out(ob_call *call, const uint8_t *wants, int64_t chunk, int workers, uint8_t *memory) {
    int64_t next = 0;
    call->chunk = chunk;
    for (int s = 0; s < call->blob->num_sets; s++) {
        const ob_set *set = call->sets + s;
        ob_activations *x = call->quantized + s;
        x->column_stride = (int64_t)set->num_blocks * OB_BLOCK + 64;
        x->table_stride = (int64_t)set->num_blocks * OB_BLOCK_BYTES + 512;
        x->segment_stride = set->num_segments;
        x->xq = take(memory, &next, chunk * x->column_stride * (int64_t)sizeof(int16_t));
        x->tables = wants[s] & 1 ? take(memory, &next, chunk * x->table_stride) : NULL;
        x->hi = wants[s] & 2 ? take(memory, &next, chunk * x->column_stride) : NULL;
        x->lo = wants[s] & 2 ? take(memory, &next, chunk * x->column_stride) : NULL;
        x->step = take(memory, &next, chunk * x->segment_stride * (int64_t)sizeof(float));
        x->sum = take(memory, &next, chunk * x->segment_stride * (int64_t)sizeof(int32_t));
    }
    call->workers = take(memory, &next, worker_bytes(call) * workers);
    return next;
}

/* The `tokens` from `token` on of a set. */
static ob_activations at_token(const ob_activations *x, int64_t token) {
    ob_activations moved = *x;
    moved.xq += token * x->column_stride;
    if (x->tables) moved.tables += token * x->table_stride;
    if (x->hi) moved.hi += token * x->column_stride;
    if (x->lo) moved.lo += token * x->column_stride;
    moved.step += token * x->segment_stride;
    moved.sum += token * x->segment_stride;
    return moved;
}

/* Quantize this worker's share of (token, set, segment). */
static void quantize_share(const ob_call *call, int64_t first_token, int64_t tokens, int worker, int workers) {
    int64_t per_token = 0, position = 0;
    for (int s = 0; s < call->blob->num_sets; s++) per_token += call->sets[s].num_segments;
    int64_t begin = tokens * per_token * worker / workers, end = tokens * per_token * (worker + 1) / workers;
    for (int64_t t = begin / (per_token ? per_token : 1); t < tokens && per_token; t++) {
        position = t * per_token;
        if (position >= end) break;
        for (int s = 0; s < call->blob->num_sets; s++) {
            const ob_set *set = call->sets + s;
            int64_t first = begin - position, last = end - position;
            ob_prepare_job job = {
                .x = call->x + (first_token + t) * call->x_stride * element_bytes(call->dtype),
                .dtype = call->dtype,
                .scale_in = ob_at(call->blob, set->scale_in),
                .segments = ob_at(call->blob, set->segments),
                .first = first > 0 ? (int)first : 0,
                .last = last < set->num_segments ? (int)last : set->num_segments,
                .out = at_token(call->quantized + s, t),
            };
            if (job.first < job.last) call->tier->prepare(&job);
            position += set->num_segments;
        }
    }
}

static void multiply_term(const ob_call *call, int index, int64_t tile, ob_product_job *job) {
    const ob_packed_term *term = call->terms + index;
    const ob_set *set = call->sets + term->set;
    const uint8_t *base = (const uint8_t *)call->blob;
    int64_t rows = term->num_coefficients + term->has_offset;
    job->segments = ob_at(call->blob, set->segments);
    job->num_segments = set->num_segments;
    job->x = call->quantized[term->set];
    job->term = term;
    job->bits = base + term->bits + tile * set->num_blocks * term->num_planes * OB_BLOCK_BYTES;
    job->coefficients = (const float *)(base + term->coefficients) + tile * term->num_groups * rows * OB_TILE;
    if (rows == 0) return;
    if (call->tier->prefers_panel(term, call->tokens)) {
        call->tier->panel_term(job);
    } else {
        call->tier->lut_term(job);
    }
}

static void multiply_bytes(const ob_call *call, const ob_byte_part *part, int64_t tile, ob_product_job *job) {
    const ob_set *set = call->sets + part->set;
    const uint8_t *base = (const uint8_t *)call->blob;
    job->segments = ob_at(call->blob, set->segments);
    job->num_segments = set->num_segments;
    job->x = call->quantized[part->set];
    job->scale = (const float *)(base + part->scale) + tile * OB_TILE;
    job->zero = (const int32_t *)(base + part->zero) + tile * OB_TILE;
    job->codes = base + part->codes;
    if (part->masks) {
        job->masks = (const uint64_t *)(base + part->masks) + tile * set->num_blocks * 32;
        job->starts = (const int64_t *)(base + part->starts) + tile * 4;
    } else {
        job->codes += tile * set->num_blocks * OB_PANEL_BYTES;
    }
    call->tier->byte_part(job);
}

static void multiply_supertile(const ob_call *call, int64_t first_token, int64_t tokens, int64_t tile,
                               uint8_t *scratch) {
    const ob_blob *blob = call->blob;
    int64_t floats = call->chunk * OB_TILE;
    float *y = (float *)(scratch + PANEL_SCRATCH);
    ob_product_job job = {.tokens = (int)tokens, .y = y, .panel = scratch, .inner = y + floats,
                          .dots = (int32_t *)(y + 2 * floats)};
    memset(y, 0, (size_t)(tokens * OB_TILE) * sizeof *y);
    for (int t = 0; t < blob->num_terms; t++) multiply_term(call, t, tile, &job);
    if (blob->dense.scale) multiply_bytes(call, &blob->dense, tile, &job);
    if (blob->sparse.scale) multiply_bytes(call, &blob->sparse, tile, &job);
    const float *bias = ob_at(blob, blob->bias);
    int64_t rows = blob->rows - tile * OB_TILE;
    for (int64_t t = 0; t < tokens; t++) {
        int64_t at = (first_token + t) * blob->rows + tile * OB_TILE;
        ob_finish_job finish = {.y = y + t * OB_TILE, .bias = bias ? bias + tile * OB_TILE : NULL,
                                .out = call->y + at * element_bytes(call->dtype),
                                .rows = (int)(rows < OB_TILE ? rows : OB_TILE), .dtype = call->dtype};
        call->tier->finish(&finish);
    }
}

static void work(const ob_call *call, int worker, int workers) {
    int64_t supertiles = call->blob->num_supertiles;
    uint8_t *scratch = call->workers + worker * worker_bytes(call);
    for (int64_t first = 0; first < call->tokens; first += call->chunk) {
        int64_t tokens = call->tokens - first < call->chunk ? call->tokens - first : call->chunk;
        quantize_share(call, first, tokens, worker, workers);
        ob_gate_wait(call->gate, workers);
        int64_t end = supertiles * (worker + 1) / workers;
        for (int64_t tile = supertiles * worker / workers; tile < end; tile++) {
            multiply_supertile(call, first, tokens, tile, scratch);
        }
        ob_gate_wait(call->gate, workers);
    }
}

static void work_in_parallel(const ob_call *call, int threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        work(call, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    (void)threads;
    work(call, 0, 1);
}

/* How many threads the work is worth, and what each set must offer. */
static int plan_work(const ob_call *call, int threads, uint8_t *wants) {
    const ob_blob *blob = call->blob;
    int split = call->tier->splits_bytes ? 2 : 0;
    int64_t planes = 0;
    memset(wants, 0, MAX_SETS);
    for (int t = 0; t < blob->num_terms; t++) {
        const ob_packed_term *term = call->terms + t;
        wants[term->set] |= call->tier->prefers_panel(term, call->tokens) ? split : 1;
        planes += term->num_planes;
    }
    if (blob->dense.scale) wants[blob->dense.set] |= split;
    if (blob->sparse.scale) wants[blob->sparse.set] |= split;
    planes += blob->dense.scale || blob->sparse.scale ? 4 : 0;
    double weights = (double)blob->rows * (double)blob->columns * (double)planes * (double)call->tokens;
    if (blob->num_supertiles < threads) threads = (int)blob->num_supertiles;
    return ob_threads_worth(weights / (1e9 * call->tier->giga_weights), threads);
}

int ob_matmul_with(const ob_tier *tier, const ob_blob *blob, const void *x, int dtype, int64_t tokens, int64_t x_stride,
                   void *y, int threads) {
    if (tokens == 0 || blob->rows == 0) return OB_OK;
    ob_call call = {.tier = tier, .blob = blob, .sets = ob_at(blob, blob->sets), .terms = ob_at(blob, blob->terms),
                    .x = x, .y = y, .dtype = dtype, .tokens = tokens, .x_stride = x_stride};
    ob_gate gate = {0};
    call.gate = &gate;
    uint8_t wants[MAX_SETS];
    threads = plan_work(&call, threads, wants);
    int64_t one = lay_out(&call, wants, 1, 0, NULL), chunk = one ? CHUNK_BYTES / one : MAX_CHUNK;
    chunk = chunk < 4 ? 4 : chunk > MAX_CHUNK ? MAX_CHUNK : chunk / 4 * 4;
    chunk = tokens < chunk ? tokens : chunk;
    uint8_t *memory = ob_scratch(lay_out(&call, wants, chunk, threads, NULL));
    if (memory == NULL) return OB_ERROR_MEMORY;
    lay_out(&call, wants, chunk, threads, memory);
    work_in_parallel(&call, threads);
    return OB_OK;
}

int ob_matmul(const void *blob, int64_t blob_bytes, int64_t rows, int64_t columns, const void *x, int dtype,
              int64_t tokens, int64_t x_stride, void *y, int threads) {
    const ob_blob *header = blob;
    if (blob == NULL || (uintptr_t)blob % 64 || blob_bytes < (int64_t)sizeof *header) return OB_ERROR_BLOB;
    if (header->magic != OB_MAGIC || header->version != OB_VERSION) return OB_ERROR_BLOB;
    if (header->blob_bytes != blob_bytes) return OB_ERROR_BLOB;
    if (header->rows != rows || header->columns != columns) return OB_ERROR_ARGUMENT;
    if (dtype < OB_FLOAT32 || dtype > OB_FLOAT16 || tokens < 0 || threads < 1) return OB_ERROR_ARGUMENT;
    if (tokens && (x == NULL || y == NULL || (tokens > 1 && x_stride < header->columns))) return OB_ERROR_ARGUMENT;
    const ob_tier *tier = ob_current_tier();
    if ((int)tier->layout != header->layout) return OB_ERROR_LAYOUT;
    return ob_matmul_with(tier, header, x, dtype, tokens, x_stride, y, threads);
}
