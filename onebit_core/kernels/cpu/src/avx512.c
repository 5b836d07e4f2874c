/* AVX-512 with BW and VNNI but without VBMI (Cascade Lake): tables by vpshufb, in the rows layout.
 *
 * One vpshufb looks 64 rows up in one table of 16 bytes. Sums of bytes are kept in 16 bits without unpacking: one sum
 * adds the pairs of bytes as they are, the `odd` one their upper bytes, and even = sum - 256 odd modulo 2^16. A segment
 * has at most 256 groups, so no sum of one byte leaves 16 bits. High bytes carry 128 too much, to be unsigned like the
 * low ones.
 */
#if defined(__x86_64__)
#include "onebit_cpu.h"
#include "tier.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,bmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,bmi2,popcnt,prefer-vector-width=512")
#pragma GCC optimize("no-tree-pre") /* it keeps a copy of every sum on the stack, half the speed */
#endif
#include "drivers.h"
#include "avx512.h"
#include "bmi2.h"

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

OB_INLINE __m512i table_at(const uint8_t *table) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
}

/* 32 rows from 16-bit sums in row order. */
OB_INLINE void store_half(__m512i low, __m512i high, __m512i excess, int shift, int adds, int32_t *dots) {
    const __m256i lows[2] = {_mm512_castsi512_si256(low), _mm512_extracti64x4_epi64(low, 1)};
    const __m256i highs[2] = {_mm512_castsi512_si256(high), _mm512_extracti64x4_epi64(high, 1)};
    for (int i = 0; i < 2; i++, dots += 16) {
        __m512i dot = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_cvtepu16_epi32(highs[i]), excess), 8);
        dot = _mm512_slli_epi32(_mm512_add_epi32(dot, _mm512_cvtepu16_epi32(lows[i])), (unsigned)shift);
        if (adds) dot = _mm512_add_epi32(dot, _mm512_loadu_si512(dots));
        _mm512_storeu_si512(dots, dot);
    }
}

/* 64 sums in row order, from the 16-bit sums of low and high bytes: rows 2n are `even`, rows 2n + 1 `odd`. */
OB_INLINE void store_dots(__m512i low, __m512i low_odd, __m512i high, __m512i high_odd, int blocks, int shift,
                          int adds, int32_t *dots) {
    const __m512i low_even = _mm512_sub_epi16(low, _mm512_slli_epi16(low_odd, 8));
    const __m512i high_even = _mm512_sub_epi16(high, _mm512_slli_epi16(high_odd, 8));
    const __m512i excess = _mm512_set1_epi32(128 * 8 * blocks);
    __m512i zip = _mm512_set_epi32(0x2f000f, 0x2e000e, 0x2d000d, 0x2c000c, 0x2b000b, 0x2a000a, 0x290009, 0x280008,
                                   0x270007, 0x260006, 0x250005, 0x240004, 0x230003, 0x220002, 0x210001, 0x200000);
    for (int half = 0; half < 2; half++) {
        store_half(_mm512_permutex2var_epi16(low_even, zip, low_odd),
                   _mm512_permutex2var_epi16(high_even, zip, high_odd), excess, shift, adds, dots + 32 * half);
        zip = _mm512_add_epi16(zip, _mm512_set1_epi16(16));
    }
}

static void lut_dots(const uint8_t *bits, int blocks, const uint8_t *tables, int64_t stride, int tokens, int shift,
                     int adds, int32_t *dots) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int t = 0; t < tokens; t++) {
        __m512i low = _mm512_setzero_si512(), low_odd = low, high = low, high_odd = low;
        for (int step = 0; step < 4 * blocks; step++) {
            const uint8_t *table = tables + t * stride + (step / 4) * OB_BLOCK_BYTES + (step % 4) * 32;
            __m512i v = _mm512_loadu_si512(bits + (int64_t)step * OB_TILE);
            __m512i first = _mm512_and_si512(v, nibble);
            __m512i second = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
            __m512i a = _mm512_shuffle_epi8(table_at(table), first);
            __m512i b = _mm512_shuffle_epi8(table_at(table + 16), second);
            __m512i c = _mm512_shuffle_epi8(table_at(table + 128), first);
            __m512i d = _mm512_shuffle_epi8(table_at(table + 144), second);
            low = _mm512_add_epi16(low, _mm512_add_epi16(a, b));
            low_odd = _mm512_add_epi16(low_odd, _mm512_add_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
            high = _mm512_add_epi16(high, _mm512_add_epi16(c, d));
            high_odd = _mm512_add_epi16(high_odd, _mm512_add_epi16(_mm512_srli_epi16(c, 8), _mm512_srli_epi16(d, 8)));
        }
        store_dots(low, low_odd, high, high_odd, blocks, shift, adds, dots + t * OB_TILE);
    }
}

/* 16 rows x 8 columns at a time: a row's byte four times over, tested against the four bits of a panel vector. */
static void expand(const uint8_t *bits, int blocks, int digits, uint8_t *panel) {
    int64_t plane = (int64_t)blocks * OB_BLOCK_BYTES;
    const __m512i copies = _mm512_set1_epi32(0x01010101);
    const __m512i columns[2] = {_mm512_set1_epi32(0x08040201), _mm512_set1_epi32((int)0x80402010)};
    for (int tile = 0; tile < 4; tile++) {
        for (int step = 0; step < 4 * blocks; step++, panel += 128) {
            __m512i codes[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            for (int q = 0; q < digits; q++) {
                const uint8_t *rows = bits + q * plane + (int64_t)step * OB_TILE + 16 * tile;
                __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)rows));
                v = _mm512_mullo_epi32(v, copies);
                __m512i value = _mm512_set1_epi8((char)(1 << q));
                for (int h = 0; h < 2; h++) {
                    codes[h] = _mm512_or_si512(
                        codes[h], _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(v, columns[h]), value));
                }
            }
            _mm512_storeu_si512(panel, codes[0]);
            _mm512_storeu_si512(panel + 64, codes[1]);
        }
    }
}

static void build_tables(const int16_t *xq, int blocks, uint8_t *tables) {
    ob_avx512_tables(xq, blocks, tables, 128);
}

static void prepare(const ob_prepare_job *job) {
    ob_prepare(job, build_tables);
}

static void lut_term(const ob_product_job *job) {
    ob_drive_lut(job, lut_dots);
}

static void panel_term(const ob_product_job *job) {
    ob_drive_panel(job, expand, ob_vnni_dots);
}

static void byte_part(const ob_product_job *job) {
    ob_drive_bytes(job, ob_expand_sparse_pdep, ob_vnni_dots);
}

/* Where the lines of both crossed on an Emerald Rapids core. */
static int prefers_panel(const ob_packed_term *term, int64_t tokens) {
    return tokens >= (term->first_digits >= 2 ? 4 : 12);
}

const ob_tier ob_avx512 = {
    .name = "avx512",
    .layout = OB_LAYOUT_ROWS,
    .supported = supported,
    .prepare = prepare,
    .lut_term = lut_term,
    .panel_term = panel_term,
    .byte_part = byte_part,
    .finish = ob_finish,
    .prefers_panel = prefers_panel,
    .splits_bytes = 1,
    .giga_weights = 130,
};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
