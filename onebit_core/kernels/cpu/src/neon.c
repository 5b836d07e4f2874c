/* AArch64 NEON: tables by vqtbl1q, 16 rows at a time, and widening multiplies for bytes. Every 64-bit ARM has it; the
 * tier neondot multiplies bytes with sdot (ARMv8.2 and later: Graviton 2, Ampere, Apple, Cortex-A76).
 *
 * One vqtbl1q looks 16 nibbles up in 16 bytes. A 16-bit table entry takes two lookups, low bytes and high bytes, whose
 * sums are kept apart in 16-bit lanes, one per row. They cannot overflow: a segment has at most 1024 columns = 256
 * entries, and 256 * 255 < 2^16, 256 * -128 = -2^15.
 */
#if defined(__aarch64__)

#include "drivers.h"

#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

static int always(void) {
    return 1;
}

/* Entry n adds the columns whose bit is set in n: masks select them for n = 0..7, the upper half adds the fourth. */
static void build_tables(const int16_t *xq, int blocks, uint8_t *tables) {
    static const uint16_t bit0[8] = {0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff};
    static const uint16_t bit1[8] = {0, 0, 0xffff, 0xffff, 0, 0, 0xffff, 0xffff};
    static const uint16_t bit2[8] = {0, 0, 0, 0, 0xffff, 0xffff, 0xffff, 0xffff};
    const int16x8_t mask0 = vreinterpretq_s16_u16(vld1q_u16(bit0));
    const int16x8_t mask1 = vreinterpretq_s16_u16(vld1q_u16(bit1));
    const int16x8_t mask2 = vreinterpretq_s16_u16(vld1q_u16(bit2));
    for (int b = 0; b < blocks; b++, xq += OB_BLOCK, tables += OB_BLOCK_BYTES) {
        for (int group = 0; group < 8; group++) {
            const int16_t *x = xq + 4 * group;
            int16x8_t below = vandq_s16(vdupq_n_s16(x[0]), mask0);
            below = vaddq_s16(below, vandq_s16(vdupq_n_s16(x[1]), mask1));
            below = vaddq_s16(below, vandq_s16(vdupq_n_s16(x[2]), mask2));
            uint8x16_t first = vreinterpretq_u8_s16(below);
            uint8x16_t second = vreinterpretq_u8_s16(vaddq_s16(below, vdupq_n_s16(x[3])));
            vst1q_u8(tables + 16 * group, vuzp1q_u8(first, second));
            vst1q_u8(tables + 128 + 16 * group, vuzp2q_u8(first, second));
        }
    }
}

/* Sums of looked up bytes of 16 rows. */
typedef struct {
    uint16x8_t low[2];
    int16x8_t high[2];
} sums16;

OB_INLINE void add_entry(sums16 *sums, const uint8_t *table, uint8x16_t index) {
    uint8x16_t low = vqtbl1q_u8(vld1q_u8(table), index);
    int8x16_t high = vreinterpretq_s8_u8(vqtbl1q_u8(vld1q_u8(table + 128), index));
    sums->low[0] = vaddw_u8(sums->low[0], vget_low_u8(low));
    sums->low[1] = vaddw_high_u8(sums->low[1], low);
    sums->high[0] = vaddw_s8(sums->high[0], vget_low_s8(high));
    sums->high[1] = vaddw_high_s8(sums->high[1], high);
}

/* dots (+)= (low + 256 high) << shift, 4 rows. */
OB_INLINE void store_dots(int32_t *dots, uint16x4_t low, int16x4_t high, int32x4_t shift, int adds) {
    int32x4_t dot = vaddq_s32(vreinterpretq_s32_u32(vmovl_u16(low)), vshll_n_s16(high, 8));
    dot = vshlq_s32(dot, shift);
    vst1q_s32(dots, adds ? vaddq_s32(vld1q_s32(dots), dot) : dot);
}

/* `tiles` times 16 rows for `tokens` tokens; tiles * tokens <= 4, so that all sums stay in registers. */
OB_INLINE void lut_tiles(const uint8_t *bits, int blocks, const uint8_t *tables, int64_t stride, int tiles, int tokens,
                         int shift, int adds, int32_t *dots) {
    sums16 sums[4];
    memset(sums, 0, sizeof sums);
    for (int step = 0; step < 4 * blocks; step++) {
        const uint8_t *table = tables + (int64_t)(step / 4) * OB_BLOCK_BYTES + step % 4 * 32;
#pragma GCC unroll 4
        for (int tile = 0; tile < tiles; tile++) {
            uint8x16_t nibbles = vld1q_u8(bits + (int64_t)step * OB_TILE + tile * 16);
            uint8x16_t even = vandq_u8(nibbles, vdupq_n_u8(15)), odd = vshrq_n_u8(nibbles, 4);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                add_entry(&sums[tile * tokens + t], table + t * stride, even);
                add_entry(&sums[tile * tokens + t], table + t * stride + 16, odd);
            }
        }
    }
    const int32x4_t left = vdupq_n_s32(shift);
    for (int tile = 0; tile < tiles; tile++) {
        for (int t = 0; t < tokens; t++) {
            const sums16 *sum = &sums[tile * tokens + t];
            int32_t *out = dots + t * OB_TILE + tile * 16;
            for (int half = 0; half < 2; half++, out += 8) {
                store_dots(out, vget_low_u16(sum->low[half]), vget_low_s16(sum->high[half]), left, adds);
                store_dots(out + 4, vget_high_u16(sum->low[half]), vget_high_s16(sum->high[half]), left, adds);
            }
        }
    }
}

static void lut_dots(const uint8_t *bits, int blocks, const uint8_t *tables, int64_t stride, int tokens, int shift,
                     int adds, int32_t *dots) {
    if (tokens == 1) {
        lut_tiles(bits, blocks, tables, stride, 4, 1, shift, adds, dots);
    } else if (tokens == 2) {
        lut_tiles(bits, blocks, tables, stride, 2, 2, shift, adds, dots);
        lut_tiles(bits + 32, blocks, tables, stride, 2, 2, shift, adds, dots + 32);
    } else {
        for (int row = 0; row < OB_TILE; row += 16) {
            if (tokens == 3) {
                lut_tiles(bits + row, blocks, tables, stride, 1, 3, shift, adds, dots + row);
            } else {
                lut_tiles(bits + row, blocks, tables, stride, 1, 4, shift, adds, dots + row);
            }
        }
    }
}

/* 4 rows of one nibble each, bit i of row r to byte 4 r + i. */
OB_INLINE uint8x16_t spread(uint8x16_t bytes, int first, uint8x16_t mask, uint8_t value) {
    static const uint8_t pattern[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    uint8x16_t rows = vqtbl1q_u8(bytes, vaddq_u8(vld1q_u8(pattern), vdupq_n_u8((uint8_t)first)));
    return vandq_u8(vtstq_u8(rows, mask), vdupq_n_u8(value));
}

static void expand(const uint8_t *bits, int blocks, int digits, uint8_t *panel) {
    static const uint8_t low_bits[16] = {1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8};
    const uint8x16_t low = vld1q_u8(low_bits), high = vshlq_n_u8(low, 4);
    int64_t tile_bytes = (int64_t)blocks * 512, plane = (int64_t)blocks * OB_BLOCK_BYTES;
    for (int step = 0; step < 4 * blocks; step++) {
        for (int tile = 0; tile < 4; tile++) {
            uint8x16_t codes[8];
            for (int i = 0; i < 8; i++) codes[i] = vdupq_n_u8(0);
            for (int q = 0; q < digits; q++) {
                uint8x16_t bytes = vld1q_u8(bits + q * plane + (int64_t)step * OB_TILE + tile * 16);
                for (int i = 0; i < 4; i++) {
                    codes[i] = vorrq_u8(codes[i], spread(bytes, 4 * i, low, (uint8_t)(1 << q)));
                    codes[4 + i] = vorrq_u8(codes[4 + i], spread(bytes, 4 * i, high, (uint8_t)(1 << q)));
                }
            }
            uint8_t *out = panel + tile * tile_bytes + (int64_t)step * 128;
            for (int i = 0; i < 8; i++) vst1q_u8(out + 16 * i, codes[i]);
        }
    }
}

/* 16 rows and one token: a register of 4 sums per row, each column of a group its own, added up at the end. */
OB_INLINE void panel_tile(const uint8_t *codes, int blocks, const int16_t *xq, int32_t *dots) {
    int32x4_t sums[16];
    for (int r = 0; r < 16; r++) sums[r] = vdupq_n_s32(0);
    for (int c = 0; c < blocks * 8; c++, codes += 64, xq += 4) {
        int16x4_t x = vld1_s16(xq);
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; quarter++) {
            uint8x16_t four_rows = vld1q_u8(codes + 16 * quarter);
            int16x8_t first = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(four_rows)));
            int16x8_t second = vreinterpretq_s16_u16(vmovl_high_u8(four_rows));
            int32x4_t *sum = sums + 4 * quarter;
            sum[0] = vmlal_s16(sum[0], vget_low_s16(first), x);
            sum[1] = vmlal_s16(sum[1], vget_high_s16(first), x);
            sum[2] = vmlal_s16(sum[2], vget_low_s16(second), x);
            sum[3] = vmlal_s16(sum[3], vget_high_s16(second), x);
        }
    }
    for (int r = 0; r < 16; r += 4) {
        int32x4_t first = vpaddq_s32(sums[r], sums[r + 1]), second = vpaddq_s32(sums[r + 2], sums[r + 3]);
        vst1q_s32(dots + r, vpaddq_s32(first, second));
    }
}

static void panel_dots(const uint8_t *panel, int blocks, const ob_activations *x, int64_t block, int tokens,
                       int32_t *dots) {
    for (int t = 0; t < tokens; t++) {
        const int16_t *xq = x->xq + t * x->column_stride + block * OB_BLOCK;
        for (int tile = 0; tile < 4; tile++) {
            panel_tile(panel + (int64_t)tile * blocks * 512, blocks, xq, dots + t * OB_TILE + tile * 16);
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
    ob_drive_panel(job, expand, panel_dots);
}

static void byte_part(const ob_product_job *job) {
    ob_drive_bytes(job, ob_expand_sparse_plain, panel_dots);
}

/* Counted, not measured: 16 rows x 8 columns take 14 instructions a plane by tables, 40 as bytes. */
static int prefers_panel(const ob_packed_term *term, int64_t tokens) {
    return term->first_digits >= 4 && tokens >= 4;
}

#define OB_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))

static int has_dotprod(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0; /* HWCAP_ASIMDDP */
#elif defined(__APPLE__)
    return 1;
#else
    return 0;
#endif
}

/* 4 columns of 16 rows: sums += (code - 128) * x, x being one lane of hi and lo. */
#define OB_DOT_LANE(lane)                                                                                              \
    for (int quarter = 0; quarter < 4; quarter++) {                                                                    \
        uint8x16_t four_rows = veorq_u8(vld1q_u8(codes + 64 * (lane) + 16 * quarter), vdupq_n_u8(128));                \
        int8x16_t code = vreinterpretq_s8_u8(four_rows);                                                               \
        high[quarter] = vdotq_laneq_s32(high[quarter], code, hi, lane);                                                \
        low[quarter] = vdotq_laneq_s32(low[quarter], code, lo, lane);                                                  \
    }

/* 16 rows and one token. sdot wants signed bytes, so 128 goes off each code and 128 * sum(x) is added back. */
OB_DOTPROD static void panel_tile_dot(const uint8_t *codes, int blocks, const int8_t *x_hi, const int8_t *x_lo,
                                      int32_t *dots) {
    int32x4_t high[4], low[4], sum_hi = vdupq_n_s32(0), sum_lo = vdupq_n_s32(0);
    for (int quarter = 0; quarter < 4; quarter++) high[quarter] = low[quarter] = vdupq_n_s32(0);
    for (int c = 0; c < blocks * 8; c += 4, codes += 256) {
        int8x16_t hi = vld1q_s8(x_hi + 4 * c), lo = vld1q_s8(x_lo + 4 * c);
        sum_hi = vdotq_s32(sum_hi, hi, vdupq_n_s8(1));
        sum_lo = vdotq_s32(sum_lo, lo, vdupq_n_s8(1));
        OB_DOT_LANE(0)
        OB_DOT_LANE(1)
        OB_DOT_LANE(2)
        OB_DOT_LANE(3)
    }
    int32x4_t back = vdupq_n_s32((vaddvq_s32(sum_hi) * 128 + vaddvq_s32(sum_lo)) * 128);
    for (int quarter = 0; quarter < 4; quarter++) {
        int32x4_t dot = vaddq_s32(low[quarter], vshlq_n_s32(high[quarter], 7));
        vst1q_s32(dots + 4 * quarter, vaddq_s32(dot, back));
    }
}

static void panel_dots_dot(const uint8_t *panel, int blocks, const ob_activations *x, int64_t block, int tokens,
                           int32_t *dots) {
    for (int tile = 0; tile < 4; tile++) {
        for (int t = 0; t < tokens; t++) {
            int64_t at = t * x->column_stride + block * OB_BLOCK;
            panel_tile_dot(panel + (int64_t)tile * blocks * 512, blocks, x->hi + at, x->lo + at,
                           dots + t * OB_TILE + tile * 16);
        }
    }
}

static void panel_term_dot(const ob_product_job *job) {
    ob_drive_panel(job, expand, panel_dots_dot);
}

static void byte_part_dot(const ob_product_job *job) {
    ob_drive_bytes(job, ob_expand_sparse_plain, panel_dots_dot);
}

/* Counted, too: 28 instructions as bytes. */
static int prefers_panel_dot(const ob_packed_term *term, int64_t tokens) {
    return term->first_digits >= 3 && tokens >= 4;
}

const ob_tier ob_neon = {
    .name = "neon",
    .layout = OB_LAYOUT_ROWS,
    .supported = always,
    .prepare = prepare,
    .lut_term = lut_term,
    .panel_term = panel_term,
    .byte_part = byte_part,
    .finish = ob_finish,
    .prefers_panel = prefers_panel,
    .splits_bytes = 0,
    .giga_weights = 40,
};

const ob_tier ob_neondot = {
    .name = "neondot",
    .layout = OB_LAYOUT_ROWS,
    .supported = has_dotprod,
    .prepare = prepare,
    .lut_term = lut_term,
    .panel_term = panel_term_dot,
    .byte_part = byte_part_dot,
    .finish = ob_finish,
    .prefers_panel = prefers_panel_dot,
    .splits_bytes = 1,
    .giga_weights = 40,
};

#endif
