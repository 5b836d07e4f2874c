/* The C reference: what every other tier must reproduce. Any machine runs it; none should have to. */
#include "drivers.h"

static int always(void) {
    return 1;
}

/* 16 sums for each 4 columns: entry n adds the columns whose bit is set in n. */
static void build_tables(const int16_t *xq, int blocks, uint8_t *tables) {
    for (int b = 0; b < blocks; b++, xq += OB_BLOCK, tables += OB_BLOCK_BYTES) {
        for (int group = 0; group < 8; group++) {
            for (int n = 0; n < 16; n++) {
                int value = 0;
                for (int i = 0; i < 4; i++) value += (n >> i & 1) * xq[4 * group + i];
                tables[16 * group + n] = (uint8_t)(value & 255);
                tables[128 + 16 * group + n] = (uint8_t)((value >> 8) + 128);
            }
        }
    }
}

static void lut_dots(const uint8_t *bits, int blocks, const uint8_t *tables, int64_t stride, int tokens, int shift,
                     int adds, int32_t *dots) {
    for (int t = 0; t < tokens; t++) {
        int32_t low[OB_TILE] = {0}, high[OB_TILE] = {0};
        for (int step = 0; step < 4 * blocks; step++) {
            const uint8_t *table = tables + t * stride + (step / 4) * OB_BLOCK_BYTES + (step % 4) * 32;
            const uint8_t *nibbles = bits + (int64_t)step * OB_TILE;
            for (int r = 0; r < OB_TILE; r++) {
                int even = nibbles[r] & 15, odd = 16 + (nibbles[r] >> 4);
                low[r] += table[even] + table[odd];
                high[r] += table[128 + even] + table[128 + odd];
            }
        }
        const int32_t excess = 128 * 8 * blocks; /* of the high bytes */
        for (int r = 0; r < OB_TILE; r++) {
            int32_t dot = (low[r] + (high[r] - excess) * 256) * (1 << shift);
            dots[t * OB_TILE + r] = adds ? dots[t * OB_TILE + r] + dot : dot;
        }
    }
}

static void panel_dots(const uint8_t *panel, int blocks, const ob_activations *x, int64_t block, int tokens,
                       int32_t *dots) {
    for (int t = 0; t < tokens; t++) {
        const int16_t *xq = x->xq + t * x->column_stride + block * OB_BLOCK;
        for (int tile = 0; tile < 4; tile++) {
            int32_t sums[16] = {0};
            const uint8_t *codes = panel + (int64_t)tile * blocks * 512;
            for (int c = 0; c < blocks * 8; c++) {
                for (int i = 0; i < 64; i++) sums[i / 4] += codes[c * 64 + i] * xq[c * 4 + i % 4];
            }
            memcpy(dots + t * OB_TILE + tile * 16, sums, sizeof sums);
        }
    }
}

static void prepare(const ob_prepare_job *job) {
    ob_prepare(job, build_tables);
}

static void lut_term(const ob_product_job *job) {
    ob_drive_lut(job, lut_dots);
}

static void panel_term(const ob_product_job *job) {
    ob_drive_panel(job, ob_expand_rows_plain, panel_dots);
}

static void byte_part(const ob_product_job *job) {
    ob_drive_bytes(job, ob_expand_sparse_plain, panel_dots);
}

static int never(const ob_packed_term *term, int64_t tokens) {
    (void)term;
    (void)tokens;
    return 0;
}

const ob_tier ob_portable = {
    .name = "portable",
    .layout = OB_LAYOUT_ROWS,
    .supported = always,
    .prepare = prepare,
    .lut_term = lut_term,
    .panel_term = panel_term,
    .byte_part = byte_part,
    .finish = ob_finish,
    .prefers_panel = never,
    .splits_bytes = 0,
    .giga_weights = 7,
};
