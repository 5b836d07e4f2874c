/* AVX2: tables by vpshufb, in the rows layout; bytes by widening to 16 bits and vpmaddwd.
 *
 * Sums of bytes stay in 16 bits as in avx512.c: one adds pairs of bytes as they are, the `odd` one their upper bytes;
 * high bytes carry 128 too much.
 */
#if defined(__x86_64__)
#include "onebit_cpu.h"
#include "tier.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt")
#endif
#include "drivers.h"
#include "bmi2.h"

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("popcnt");
}

/* Two groups of 4 columns at a time, each in a lane: a shuffle spreads one column to those of the sums 0 to 7 whose
 * number has its bit; sums 8 to 15 are the same plus the last column. */
static void build_tables(const int16_t *xq, int blocks, uint8_t *tables) {
    const __m256i low_byte = _mm256_set1_epi16(255), flip = _mm256_set1_epi8((char)128);
    const __m256i column0 = _mm256_set1_epi64x(0x0100808001008080), column1 = _mm256_set1_epi64x(0x0302030280808080);
    const __m256i column2 =
        _mm256_broadcastsi128_si256(_mm_set_epi64x(0x0504050405040504, (long long)0x8080808080808080));
    const __m256i column3 = _mm256_set1_epi64x(0x0706070607060706);
    for (int quarter = 0; quarter < 4 * blocks; quarter++) {
        __m128i columns = _mm_loadu_si128((const __m128i *)(xq + 8 * quarter));
        __m256i v = _mm256_permute4x64_epi64(_mm256_castsi128_si256(columns), 0x50);
        __m256i below = _mm256_add_epi16(_mm256_shuffle_epi8(v, column0), _mm256_shuffle_epi8(v, column1));
        below = _mm256_add_epi16(below, _mm256_shuffle_epi8(v, column2));
        __m256i above = _mm256_add_epi16(below, _mm256_shuffle_epi8(v, column3));
        __m256i low = _mm256_packus_epi16(_mm256_and_si256(below, low_byte), _mm256_and_si256(above, low_byte));
        __m256i high = _mm256_packs_epi16(_mm256_srai_epi16(below, 8), _mm256_srai_epi16(above, 8));
        uint8_t *to = tables + quarter / 4 * OB_BLOCK_BYTES + quarter % 4 * 32;
        _mm256_storeu_si256((__m256i *)to, low);
        _mm256_storeu_si256((__m256i *)(to + 128), _mm256_xor_si256(high, flip));
    }
}

OB_INLINE __m256i table_at(const uint8_t *table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
}

/* 8 rows from 16-bit sums in row order. */
OB_INLINE void store_eight(__m128i low, __m128i high, __m256i excess, int shift, int adds, int32_t *dots) {
    __m256i dot = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_cvtepu16_epi32(high), excess), 8);
    dot = _mm256_slli_epi32(_mm256_add_epi32(dot, _mm256_cvtepu16_epi32(low)), shift);
    if (adds) dot = _mm256_add_epi32(dot, _mm256_loadu_si256((const __m256i *)dots));
    _mm256_storeu_si256((__m256i *)dots, dot);
}

/* 32 rows: unpacking pairs even and odd rows up, rows 0..7 and 16..23 from the lower halves, 8..15 and 24..31 above. */
OB_INLINE void store_dots(__m256i low, __m256i low_odd, __m256i high, __m256i high_odd, int blocks, int shift,
                          int adds, int32_t *dots) {
    const __m256i excess = _mm256_set1_epi32(128 * 8 * blocks);
    __m256i low_even = _mm256_sub_epi16(low, _mm256_slli_epi16(low_odd, 8));
    __m256i high_even = _mm256_sub_epi16(high, _mm256_slli_epi16(high_odd, 8));
    __m256i l = _mm256_unpacklo_epi16(low_even, low_odd), h = _mm256_unpacklo_epi16(high_even, high_odd);
    store_eight(_mm256_castsi256_si128(l), _mm256_castsi256_si128(h), excess, shift, adds, dots);
    store_eight(_mm256_extracti128_si256(l, 1), _mm256_extracti128_si256(h, 1), excess, shift, adds, dots + 16);
    l = _mm256_unpackhi_epi16(low_even, low_odd), h = _mm256_unpackhi_epi16(high_even, high_odd);
    store_eight(_mm256_castsi256_si128(l), _mm256_castsi256_si128(h), excess, shift, adds, dots + 8);
    store_eight(_mm256_extracti128_si256(l, 1), _mm256_extracti128_si256(h, 1), excess, shift, adds, dots + 24);
}

/* One token, 32 rows. */
OB_INLINE void half_dots(const uint8_t *bits, int blocks, const uint8_t *tables, int shift, int adds, int32_t *dots) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i low = _mm256_setzero_si256(), low_odd = low, high = low, high_odd = low;
    for (int b = 0; b < blocks; b++, tables += OB_BLOCK_BYTES) {
#pragma GCC unroll 4
        for (int step = 0; step < 4; step++, bits += OB_TILE) {
            __m256i v = _mm256_loadu_si256((const __m256i *)bits);
            __m256i first = _mm256_and_si256(v, nibble), second = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
            __m256i a = _mm256_shuffle_epi8(table_at(tables + 32 * step), first);
            __m256i e = _mm256_shuffle_epi8(table_at(tables + 32 * step + 16), second);
            low = _mm256_add_epi16(low, _mm256_add_epi16(a, e));
            low_odd = _mm256_add_epi16(low_odd, _mm256_add_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(e, 8)));
            a = _mm256_shuffle_epi8(table_at(tables + 128 + 32 * step), first);
            e = _mm256_shuffle_epi8(table_at(tables + 128 + 32 * step + 16), second);
            high = _mm256_add_epi16(high, _mm256_add_epi16(a, e));
            high_odd = _mm256_add_epi16(high_odd, _mm256_add_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(e, 8)));
        }
    }
    store_dots(low, low_odd, high, high_odd, blocks, shift, adds, dots);
}

static void lut_dots(const uint8_t *bits, int blocks, const uint8_t *tables, int64_t stride, int tokens, int shift,
                     int adds, int32_t *dots) {
    for (int t = 0; t < tokens; t++, tables += stride, dots += OB_TILE) {
        half_dots(bits, blocks, tables, shift, adds, dots);
        half_dots(bits + 32, blocks, tables, shift, adds, dots + 32);
    }
}

/* 8 rows x 8 columns of each plane at a time: a row's byte four times over, tested against the bits of 4 columns. */
static void expand(const uint8_t *bits, int blocks, int digits, uint8_t *panel) {
    const __m256i copies = _mm256_set_epi32(0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202,
                                            0x01010101, 0);
    const __m256i left = _mm256_set1_epi32(0x08040201), right = _mm256_set1_epi32((int)0x80402010);
    int64_t plane = (int64_t)blocks * OB_BLOCK_BYTES;
    for (int eight = 0; eight < 8; eight++) {
        uint8_t *out = panel + eight / 2 * (int64_t)blocks * 512 + eight % 2 * 32;
        for (int step = 0; step < 4 * blocks; step++, out += 128) {
            __m256i codes0 = _mm256_setzero_si256(), codes1 = codes0;
            for (int q = 0; q < digits; q++) {
                const uint8_t *rows = bits + q * plane + (int64_t)step * OB_TILE + 8 * eight;
                const __m256i value = _mm256_set1_epi8((char)(1 << q));
                int64_t bytes;
                memcpy(&bytes, rows, sizeof bytes);
                __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), copies);
                __m256i has0 = _mm256_cmpeq_epi8(_mm256_and_si256(v, left), left);
                __m256i has1 = _mm256_cmpeq_epi8(_mm256_and_si256(v, right), right);
                codes0 = _mm256_or_si256(codes0, _mm256_and_si256(has0, value));
                codes1 = _mm256_or_si256(codes1, _mm256_and_si256(has1, value));
            }
            _mm256_storeu_si256((__m256i *)out, codes0);
            _mm256_storeu_si256((__m256i *)(out + 64), codes1);
        }
    }
}

/* One token, 16 rows. A vector holds 4 rows x 4 columns; its 8 sums are 4 rows x 2 halves of the columns. */
OB_INLINE void tile_dots(const uint8_t *codes, int groups, const int16_t *xq, int32_t *dots) {
    __m256i sums[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sums[i] = _mm256_setzero_si256();
    for (int c = 0; c < groups; c++, codes += 64, xq += 4) {
        int64_t four;
        memcpy(&four, xq, sizeof four);
        __m256i x = _mm256_set1_epi64x(four);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(codes + 16 * i)));
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(wide, x));
        }
    }
    for (int i = 0; i < 4; i += 2) { /* hadd: rows 0 1 4 5 | 2 3 6 7 */
        __m256i rows = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[i], sums[i + 1]), 0xD8);
        _mm256_storeu_si256((__m256i *)(dots + 4 * i), rows);
    }
}

static void panel_dots(const uint8_t *panel, int blocks, const ob_activations *x, int64_t block, int tokens,
                       int32_t *dots) {
    for (int t = 0; t < tokens; t++) {
        const int16_t *xq = x->xq + t * x->column_stride + block * OB_BLOCK;
        for (int tile = 0; tile < 4; tile++) {
            tile_dots(panel + (int64_t)tile * blocks * 512, blocks * 8, xq, dots + t * OB_TILE + 16 * tile);
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
    ob_drive_bytes(job, ob_expand_sparse_pdep, panel_dots);
}

/* Where the lines of both crossed on an Emerald Rapids core. */
static int prefers_panel(const ob_packed_term *term, int64_t tokens) {
    return tokens >= 8 && term->first_digits >= 3;
}

const ob_tier ob_avx2 = {
    .name = "avx2",
    .layout = OB_LAYOUT_ROWS,
    .supported = supported,
    .prepare = prepare,
    .lut_term = lut_term,
    .panel_term = panel_term,
    .byte_part = byte_part,
    .finish = ob_finish,
    .prefers_panel = prefers_panel,
    .splits_bytes = 0,
    .giga_weights = 80,
};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
