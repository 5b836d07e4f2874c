/* The walk through a supertile, shared by all tiers: a tier passes its inner products in, the compiler inlines them.
 *
 *   lut dots     D[token][64] (+)= (tables of each token) looked up with the bits of one plane, times 2^shift
 *   expand       bits of the digits of one coefficient row -> panel of codes
 *   panel dots   D[token][64] = panel times x of each token
 */
#ifndef OB_DRIVERS_H
#define OB_DRIVERS_H

#include "numerics.h"

#define OB_INLINE static inline __attribute__((always_inline))

enum { OB_LUT_TOKENS = 4 };

typedef void (*ob_lut_dots)(const uint8_t *bits, int blocks, const uint8_t *tables, int64_t stride, int tokens,
                            int shift, int adds, int32_t *dots);
typedef void (*ob_expand)(const uint8_t *bits, int blocks, int digits, uint8_t *panel);
typedef void (*ob_panel_dots)(const uint8_t *panel, int blocks, const ob_activations *x, int64_t block, int tokens,
                              int32_t *dots);
typedef void (*ob_expand_sparse)(const uint64_t *masks, int blocks, const int32_t *zero, const uint8_t **codes,
                                 uint8_t *panel);

/* The coefficients of a segment's group and, behind them, its offsets. */
OB_INLINE const float *ob_coefficients(const ob_product_job *job, const ob_segment *segment) {
    int rows = job->term->num_coefficients + job->term->has_offset;
    return job->coefficients + (int64_t)segment->group * rows * OB_TILE;
}

OB_INLINE const uint8_t *ob_segment_bits(const ob_product_job *job, const ob_segment *segment) {
    return job->bits + (int64_t)segment->block * job->term->num_planes * OB_BLOCK_BYTES;
}

/* inner (+)= a_k D_k; nothing for a single coefficient row, which ob_close_segment multiplies itself. */
OB_INLINE void ob_scale_all(const ob_product_job *job, const float *a, int k, int tokens) {
    for (int t = 0; t < tokens && job->term->num_coefficients > 1; t++) {
        ob_scale_dots(job->inner + t * OB_TILE, a + k * OB_TILE, job->dots + t * OB_TILE, k == 0);
    }
}

/* y += step * (inner + b X) for tokens [first, first + tokens); inner and dots begin at token `first`. */
OB_INLINE void ob_close_segment(const ob_product_job *job, int s, const float *a, int first, int tokens) {
    const ob_packed_term *term = job->term;
    const float *offset = term->has_offset ? a + term->num_coefficients * OB_TILE : NULL;
    for (int t = 0; t < tokens; t++) {
        int64_t at = (int64_t)(first + t) * job->x.segment_stride + s;
        float *y = job->y + (int64_t)(first + t) * OB_TILE, step = job->x.step[at];
        if (term->num_coefficients == 1) {
            ob_add_product(y, a, offset, job->dots + t * OB_TILE, step, job->x.sum[at]);
        } else {
            const float *inner = term->num_coefficients ? job->inner + t * OB_TILE : NULL;
            ob_add_segment(y, inner, offset, step, job->x.sum[at]);
        }
    }
}

OB_INLINE void ob_lut_segment(const ob_product_job *job, int s, int first, int tokens, ob_lut_dots dots_of) {
    const ob_packed_term *term = job->term;
    const ob_segment *segment = job->segments + s;
    const uint8_t *bits = ob_segment_bits(job, segment);
    const float *a = ob_coefficients(job, segment);
    const uint8_t *tables =
        job->x.tables + first * job->x.table_stride + (int64_t)segment->block * OB_BLOCK_BYTES;
    for (int k = 0; k < term->num_coefficients; k++) {
        int digits = k == 0 ? term->first_digits : 1;
        for (int q = 0; q < digits; q++) {
            dots_of(bits, segment->blocks, tables, job->x.table_stride, tokens, q, q > 0, job->dots);
            bits += (int64_t)segment->blocks * OB_BLOCK_BYTES;
        }
        ob_scale_all(job, a, k, tokens);
    }
    ob_close_segment(job, s, a, first, tokens);
}

OB_INLINE void ob_drive_lut(const ob_product_job *job, ob_lut_dots dots_of) {
    for (int first = 0; first < job->tokens; first += OB_LUT_TOKENS) {
        int tokens = job->tokens - first < OB_LUT_TOKENS ? job->tokens - first : OB_LUT_TOKENS;
        for (int s = 0; s < job->num_segments; s++) ob_lut_segment(job, s, first, tokens, dots_of);
    }
}

OB_INLINE void ob_drive_panel(const ob_product_job *job, ob_expand expand, ob_panel_dots dots_of) {
    const ob_packed_term *term = job->term;
    for (int s = 0; s < job->num_segments; s++) {
        const ob_segment *segment = job->segments + s;
        const uint8_t *bits = ob_segment_bits(job, segment);
        const float *a = ob_coefficients(job, segment);
        for (int k = 0; k < term->num_coefficients; k++) {
            int digits = k == 0 ? term->first_digits : 1;
            expand(bits, segment->blocks, digits, job->panel);
            bits += (int64_t)segment->blocks * digits * OB_BLOCK_BYTES;
            dots_of(job->panel, segment->blocks, &job->x, segment->block, job->tokens, job->dots);
            ob_scale_all(job, a, k, job->tokens);
        }
        ob_close_segment(job, s, a, 0, job->tokens);
    }
}

/* Dense bytes are a panel already; sparse ones become one, in their own order, 16 rows at a time. */
OB_INLINE void ob_drive_bytes(const ob_product_job *job, ob_expand_sparse expand, ob_panel_dots dots_of) {
    const uint8_t *codes[4] = {NULL, NULL, NULL, NULL};
    for (int tile = 0; job->masks && tile < 4; tile++) codes[tile] = job->codes + job->starts[tile];
    for (int s = 0; s < job->num_segments; s++) {
        const ob_segment *segment = job->segments + s;
        const uint8_t *panel = job->codes + (int64_t)segment->block * OB_PANEL_BYTES;
        if (job->masks) {
            const uint64_t *masks = job->masks + (int64_t)segment->block * 32;
            int groups = segment->blocks * 8;
            for (int tile = 0; tile < 4; tile++) {
                expand(masks + tile * groups, segment->blocks, job->zero + 16 * tile, &codes[tile],
                       job->panel + (int64_t)tile * groups * 64);
            }
            panel = job->panel;
        }
        dots_of(panel, segment->blocks, &job->x, segment->block, job->tokens, job->dots);
        for (int t = 0; t < job->tokens; t++) {
            int64_t at = t * job->x.segment_stride + s;
            ob_add_bytes(job->y + t * OB_TILE, job->scale, job->zero, job->dots + t * OB_TILE, job->x.step[at],
                         job->x.sum[at]);
        }
    }
}

/* Bits in the rows layout -> panel, in plain C. */
OB_INLINE void ob_expand_rows_plain(const uint8_t *bits, int blocks, int digits, uint8_t *panel) {
    int64_t tile_bytes = (int64_t)blocks * 512, plane = (int64_t)blocks * OB_BLOCK_BYTES;
    for (int step = 0; step < 4 * blocks; step++) {
        for (int r = 0; r < OB_TILE; r++) {
            uint8_t *out = panel + r / 16 * tile_bytes + step * 128 + r % 16 * 4;
            for (int i = 0; i < 8; i++) {
                int code = 0;
                for (int q = 0; q < digits; q++) code |= (bits[q * plane + step * OB_TILE + r] >> i & 1) << q;
                out[i / 4 * 64 + i % 4] = (uint8_t)code;
            }
        }
    }
}

/* The codes of 16 rows in panel order, `zero` of the row where the mask has no bit; in plain C. */
OB_INLINE void ob_expand_sparse_plain(const uint64_t *masks, int blocks, const int32_t *zero, const uint8_t **codes,
                                      uint8_t *panel) {
    uint8_t base[64];
    for (int i = 0; i < 64; i++) base[i] = (uint8_t)zero[i / 4];
    const uint8_t *next = *codes;
    for (int c = 0; c < blocks * 8; c++) {
        memcpy(panel + c * 64, base, 64);
        for (uint64_t mask = masks[c]; mask; mask &= mask - 1) panel[c * 64 + __builtin_ctzll(mask)] = *next++;
    }
    *codes = next;
}

#endif
