/* Packing: canonical words -> blob, a supertile of 64 rows at a time, in parallel. */
#include "onebit_cpu.h"
#include "plan.h"
#include "tier.h"

#include <stdlib.h>
#include <string.h>

/* Bits [column, column + count) of a row, count <= 32, lowest first. */
static uint32_t row_bits(const uint32_t *words, int64_t column, int count) {
    int64_t word = column / 32;
    int shift = (int)(column % 32);
    uint64_t bits = words[word] >> shift;
    if (shift + count > 32) bits |= (uint64_t)words[word + 1] << (32 - shift);
    return (uint32_t)(bits & ((1ULL << count) - 1));
}

/* abcd -> 0a0b0c0d, by nibbles. */
static uint32_t spread_nibbles(uint32_t low16) {
    uint32_t bytes = (low16 | low16 << 8) & 0x00ff00ff;
    return (bytes | bytes << 4) & 0x0f0f0f0f;
}

/* Put 32 bits of row r into a block; see the drawing in blob.h. */
static void put_row(uint8_t *block, int layout, int r, uint32_t bits) {
    if (layout == OB_LAYOUT_QUAD) {
        uint32_t quad = spread_nibbles(bits & 0xffff) | spread_nibbles(bits >> 16) << 4;
        memcpy(block + 4 * r, &quad, sizeof quad);
        return;
    }
    for (int s = 0; s < 4; s++) block[64 * s + r] = (uint8_t)(bits >> 8 * s);
}

static int rows_of(const ob_plan *plan, int64_t supertile) {
    int64_t left = plan->operands->rows - supertile * OB_TILE;
    return (int)(left < OB_TILE ? left : OB_TILE);
}

static void pack_bits(const ob_plan *plan, const ob_packed_term *packed, const ob_term *term,
                      const ob_segment *segments, int64_t supertile, uint8_t *out) {
    int64_t words = ob_ceil_div(plan->operands->columns, 32), rows = plan->operands->rows;
    const uint32_t *planes = ob_address(term->words_p), *bitmap = ob_address(plan->operands->sparse_bitmap_p);
    int num_rows = rows_of(plan, supertile);
    for (int s = 0; s < plan->sets[packed->set].num_segments; s++) {
        const ob_segment *segment = segments + s;
        for (int q = 0; q < packed->num_planes; q++) {
            int is_mask = q >= term->num_planes;
            const uint32_t *plane = is_mask ? bitmap : planes + q * rows * words;
            for (int b = 0; b < segment->blocks; b++, out += OB_BLOCK_BYTES) {
                int begin = b * OB_BLOCK, left = segment->columns - begin, count = left < OB_BLOCK ? left : OB_BLOCK;
                for (int r = 0; r < num_rows; r++) {
                    int64_t at = (supertile * OB_TILE + r) * words;
                    uint32_t bits = row_bits(plane + at, segment->column + begin, count);
                    if (bitmap && !is_mask) bits &= ~row_bits(bitmap + at, segment->column + begin, count);
                    put_row(out, plan->blob.layout, r, bits);
                }
            }
        }
    }
}

static void pack_coefficients(const ob_plan *plan, const ob_packed_term *packed, const ob_term *term, int64_t supertile,
                              float *out) {
    const float *a = ob_address(term->coefficient_p), *offset = ob_address(term->offset_p);
    int64_t groups = term->num_groups, rows = plan->operands->rows;
    int own = packed->num_coefficients - (packed->num_planes - (int)term->num_planes);
    int num_rows = rows_of(plan, supertile);
    for (int64_t g = 0; g < groups; g++) {
        for (int k = 0; k < packed->num_coefficients + packed->has_offset; k++, out += OB_TILE) {
            for (int r = 0; r < num_rows; r++) {
                int64_t row = supertile * OB_TILE + r;
                if (k < own) {
                    out[r] = a[(k * rows + row) * groups + g];
                } else {
                    float b = offset[row * groups + g];
                    out[r] = k < packed->num_coefficients ? -b : b;
                }
            }
        }
    }
}

static void pack_dense(const ob_plan *plan, const ob_segment *segments, int64_t supertile, uint8_t *out) {
    const int8_t *codes = ob_address(plan->operands->bytes_codes_p);
    int64_t columns = plan->operands->columns;
    int num_rows = rows_of(plan, supertile);
    for (int s = 0; s < plan->sets[plan->blob.dense.set].num_segments; s++) {
        const ob_segment *segment = segments + s;
        uint8_t *panel = out + (int64_t)segment->block * OB_PANEL_BYTES;
        for (int r = 0; r < num_rows; r++) {
            const int8_t *row = codes + (supertile * OB_TILE + r) * columns + segment->column;
            uint8_t *to = panel + r / 16 * (int64_t)segment->blocks * 512 + r % 16 * 4;
            for (int i = 0; i < segment->columns; i++) to[i / 4 * 64 + i % 4] = (uint8_t)(row[i] + 128);
        }
    }
}

/* The masks of a supertile, and its codes in the order in which the masks are walked. next[r] = first code of row r. */
static void pack_sparse(const ob_plan *plan, const ob_segment *segments, int64_t supertile, int64_t *next,
                        uint64_t *masks, int64_t *starts, uint8_t *codes) {
    const uint32_t *bitmap = ob_address(plan->operands->sparse_bitmap_p);
    const uint8_t *from = ob_address(plan->operands->sparse_codes_p);
    int64_t words = ob_ceil_div(plan->operands->columns, 32);
    int num_rows = rows_of(plan, supertile);
    for (int tile = 0; tile < 4; tile++) {
        int tile_rows = num_rows - 16 * tile < 16 ? num_rows - 16 * tile : 16;
        starts[tile] = tile_rows > 0 ? next[16 * tile] : 0;
        int64_t at = starts[tile];
        for (int s = 0; s < plan->sets[plan->blob.sparse.set].num_segments; s++) {
            const ob_segment *segment = segments + s;
            uint64_t *out = masks + (int64_t)segment->block * 32 + (int64_t)tile * segment->blocks * 8;
            for (int c = 0; c < segment->columns; c += 4) {
                int count = segment->columns - c < 4 ? segment->columns - c : 4;
                for (int r = 0; r < tile_rows; r++) {
                    const uint32_t *row = bitmap + (supertile * OB_TILE + 16 * tile + r) * words;
                    uint64_t bits = row_bits(row, segment->column + c, count);
                    out[c / 4] |= bits << 4 * r;
                    for (; bits; bits &= bits - 1) codes[at++] = from[next[16 * tile + r]++];
                }
            }
        }
    }
}

/* first[o] = codes before row o; returns how many there are in all. */
static int64_t count_sparse(const ob_plan *plan, int64_t *first) {
    const uint32_t *bitmap = ob_address(plan->operands->sparse_bitmap_p);
    int64_t columns = plan->operands->columns, words = ob_ceil_div(columns, 32), total = 0;
    for (int64_t row = 0; row < plan->operands->rows; row++) {
        first[row] = total;
        for (int64_t c = 0; c < columns; c += 32) {
            int count = columns - c < 32 ? (int)(columns - c) : 32;
            total += __builtin_popcount(row_bits(bitmap + row * words, c, count));
        }
    }
    return total;
}

static void pack_supertile(const ob_plan *plan, int64_t tile, uint8_t *base, int64_t *first_codes) {
    const ob_blob *blob = &plan->blob;
    for (int t = 0; t < blob->num_terms; t++) {
        const ob_packed_term *packed = plan->packed + t;
        const ob_set *set = plan->sets + packed->set;
        int64_t rows = packed->num_coefficients + packed->has_offset;
        pack_bits(plan, packed, plan->terms + t, (const ob_segment *)(base + set->segments), tile,
                  base + packed->bits + tile * set->num_blocks * packed->num_planes * OB_BLOCK_BYTES);
        pack_coefficients(plan, packed, plan->terms + t, tile,
                          (float *)(base + packed->coefficients) + tile * packed->num_groups * rows * OB_TILE);
    }
    if (blob->dense.scale) {
        const ob_set *set = plan->sets + blob->dense.set;
        pack_dense(plan, (const ob_segment *)(base + set->segments), tile,
                   base + blob->dense.codes + tile * set->num_blocks * OB_PANEL_BYTES);
    }
    if (blob->sparse.scale) {
        const ob_set *set = plan->sets + blob->sparse.set;
        pack_sparse(plan, (const ob_segment *)(base + set->segments), tile, first_codes + tile * OB_TILE,
                    (uint64_t *)(base + blob->sparse.masks) + tile * set->num_blocks * 32,
                    (int64_t *)(base + blob->sparse.starts) + tile * 4, base + blob->sparse.codes);
    }
}

/* Header, sets, terms and everything that has one value per row or column. */
static void pack_small_parts(const ob_plan *plan, uint8_t *base) {
    const ob_operands *o = plan->operands;
    const ob_blob *blob = &plan->blob;
    size_t row_bytes = (size_t)o->rows * sizeof(float);
    memcpy(base, blob, sizeof *blob);
    memcpy(base + blob->sets, plan->sets, sizeof plan->sets);
    memcpy(base + blob->terms, plan->packed, (size_t)blob->num_terms * sizeof(ob_packed_term));
    for (int t = 0; t < blob->num_terms; t++) {
        const ob_set *set = plan->sets + plan->packed[t].set;
        int32_t blocks;
        ob_fill_segments(o->columns, plan->terms[t].num_groups, (ob_segment *)(base + set->segments), &blocks);
        const void *scale_in = ob_address(plan->terms[t].scale_in_p);
        if (scale_in) memcpy(base + set->scale_in, scale_in, (size_t)o->columns * sizeof(float));
    }
    const ob_byte_part *part = blob->dense.scale ? &blob->dense : &blob->sparse;
    if (part->scale) {
        int32_t blocks;
        ob_fill_segments(o->columns, 1, (ob_segment *)(base + plan->sets[part->set].segments), &blocks);
        memcpy(base + part->scale, ob_address(blob->dense.scale ? o->bytes_scale_p : o->sparse_scale_p), row_bytes);
        const uint8_t *zero = ob_address(o->sparse_zero_p);
        int32_t *zeros = (int32_t *)(base + part->zero);
        for (int64_t row = 0; row < o->rows; row++) zeros[row] = blob->dense.scale ? 128 : zero[row];
    }
    if (blob->bias) memcpy(base + blob->bias, ob_address(o->bias_p), row_bytes);
}

int ob_pack_with(ob_bit_layout layout, const int64_t *operands, int64_t length, void *blob, int64_t blob_bytes,
                 int threads, int64_t *size) {
    ob_plan plan;
    int status = ob_make_plan(&plan, operands, length, layout);
    if (status != OB_OK) return status;
    *size = plan.blob.blob_bytes;
    if (blob == NULL) return OB_OK;
    if (blob_bytes != *size || (uintptr_t)blob % 64 || threads < 1) return OB_ERROR_ARGUMENT;
    int64_t *first_codes = NULL;
    if (plan.blob.sparse.scale) {
        first_codes = malloc(((size_t)plan.operands->rows + 1) * sizeof *first_codes);
        if (first_codes == NULL) return OB_ERROR_MEMORY;
        if (count_sparse(&plan, first_codes) != plan.operands->num_sparse) {
            free(first_codes);
            return OB_ERROR_ARGUMENT;
        }
    }
    memset(blob, 0, (size_t)blob_bytes);
    pack_small_parts(&plan, blob);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < plan.blob.num_supertiles; tile++) pack_supertile(&plan, tile, blob, first_codes);
    free(first_codes);
    return OB_OK;
}

int64_t ob_pack_size(const int64_t *operands, int64_t length) {
    int64_t size = 0;
    int status = ob_pack_with(ob_current_tier()->layout, operands, length, NULL, 0, 1, &size);
    return status == OB_OK ? size : -status;
}

int ob_pack(const int64_t *operands, int64_t length, void *blob, int64_t blob_bytes, int threads) {
    int64_t size;
    if (blob == NULL) return OB_ERROR_ARGUMENT;
    return ob_pack_with(ob_current_tier()->layout, operands, length, blob, blob_bytes, threads, &size);
}
