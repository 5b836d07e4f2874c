/* What the AVX-512 tiers share; included under their target pragma, after drivers.h. */
#ifndef OB_AVX512_H
#define OB_AVX512_H

#include "drivers.h"

/* Tables of `blocks` x 32 columns, 4 groups of 4 columns at a time, group n in lane n: a shuffle spreads one column to
 * those of the sums 0 to 7 whose number has its bit; sums 8 to 15 are the same plus the last column. `flip` = 128 makes
 * unsigned high bytes, 0 signed ones. */
OB_INLINE void ob_avx512_tables(const int16_t *xq, int blocks, uint8_t *tables, int flip) {
    const __m512i twice = _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), low_byte = _mm512_set1_epi16(255);
    const __m512i column0 = _mm512_set1_epi64(0x0100808001008080), column1 = _mm512_set1_epi64(0x0302030280808080);
    const __m512i column2 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0504050405040504, (long long)0x8080808080808080));
    const __m512i column3 = _mm512_set1_epi64(0x0706070607060706), flips = _mm512_set1_epi8((char)flip);
    for (int half = 0; half < 2 * blocks; half++) {
        __m256i columns = _mm256_loadu_si256((const __m256i *)(xq + 16 * half));
        __m512i v = _mm512_permutexvar_epi64(twice, _mm512_castsi256_si512(columns));
        __m512i below = _mm512_add_epi16(_mm512_shuffle_epi8(v, column0), _mm512_shuffle_epi8(v, column1));
        below = _mm512_add_epi16(below, _mm512_shuffle_epi8(v, column2));
        __m512i above = _mm512_add_epi16(below, _mm512_shuffle_epi8(v, column3));
        __m512i low = _mm512_packus_epi16(_mm512_and_si512(below, low_byte), _mm512_and_si512(above, low_byte));
        __m512i high = _mm512_packs_epi16(_mm512_srai_epi16(below, 8), _mm512_srai_epi16(above, 8));
        uint8_t *to = tables + half / 2 * OB_BLOCK_BYTES + half % 2 * 64;
        _mm512_storeu_si512(to, low);
        _mm512_storeu_si512(to + 128, _mm512_xor_si512(high, flips));
    }
}

OB_INLINE __m512i ob_broadcast_columns(const int8_t *columns) {
    int32_t four;
    memcpy(&four, columns, sizeof four);
    return _mm512_set1_epi32(four);
}

/* Sums of one token and 64 rows. A named struct, not arrays: the compiler must keep it in registers. */
typedef struct {
    __m512i high0, high1, high2, high3, low0, low1, low2, low3;
} ob_vnni_sums;

typedef struct {
    __m512i tile0, tile1, tile2, tile3;
} ob_vnni_codes;

OB_INLINE ob_vnni_codes ob_vnni_load(const uint8_t *panel, int groups) {
    return (ob_vnni_codes){_mm512_loadu_si512(panel), _mm512_loadu_si512(panel + (int64_t)64 * groups),
                           _mm512_loadu_si512(panel + (int64_t)128 * groups),
                           _mm512_loadu_si512(panel + (int64_t)192 * groups)};
}

OB_INLINE void ob_vnni_add(ob_vnni_sums *sums, ob_vnni_codes codes, const int8_t *hi, const int8_t *lo) {
    __m512i h = ob_broadcast_columns(hi), l = ob_broadcast_columns(lo);
    sums->high0 = _mm512_dpbusd_epi32(sums->high0, codes.tile0, h);
    sums->high1 = _mm512_dpbusd_epi32(sums->high1, codes.tile1, h);
    sums->high2 = _mm512_dpbusd_epi32(sums->high2, codes.tile2, h);
    sums->high3 = _mm512_dpbusd_epi32(sums->high3, codes.tile3, h);
    sums->low0 = _mm512_dpbusd_epi32(sums->low0, codes.tile0, l);
    sums->low1 = _mm512_dpbusd_epi32(sums->low1, codes.tile1, l);
    sums->low2 = _mm512_dpbusd_epi32(sums->low2, codes.tile2, l);
    sums->low3 = _mm512_dpbusd_epi32(sums->low3, codes.tile3, l);
}

OB_INLINE void ob_vnni_store(const ob_vnni_sums *sums, int32_t *dots) {
    _mm512_storeu_si512(dots, _mm512_add_epi32(_mm512_slli_epi32(sums->high0, 7), sums->low0));
    _mm512_storeu_si512(dots + 16, _mm512_add_epi32(_mm512_slli_epi32(sums->high1, 7), sums->low1));
    _mm512_storeu_si512(dots + 32, _mm512_add_epi32(_mm512_slli_epi32(sums->high2, 7), sums->low2));
    _mm512_storeu_si512(dots + 48, _mm512_add_epi32(_mm512_slli_epi32(sums->high3, 7), sums->low3));
}

OB_INLINE ob_vnni_sums ob_vnni_zero(void) {
    __m512i zero = _mm512_setzero_si512();
    return (ob_vnni_sums){zero, zero, zero, zero, zero, zero, zero, zero};
}

static inline void ob_vnni_one(const uint8_t *panel, int groups, const int8_t *hi, const int8_t *lo, int32_t *dots) {
    ob_vnni_sums sums = ob_vnni_zero();
    for (int c = 0; c < groups; c++) ob_vnni_add(&sums, ob_vnni_load(panel + 64 * c, groups), hi + 4 * c, lo + 4 * c);
    ob_vnni_store(&sums, dots);
}

/* Three tokens: 24 sums, 4 codes and 2 broadcasts fill the 32 registers. */
static inline void ob_vnni_three(const uint8_t *panel, int groups, const int8_t *hi, const int8_t *lo, int64_t stride,
                                 int32_t *dots) {
    ob_vnni_sums first = ob_vnni_zero(), second = first, third = first;
    for (int c = 0; c < groups; c++, hi += 4, lo += 4) {
        ob_vnni_codes codes = ob_vnni_load(panel + 64 * c, groups);
        ob_vnni_add(&first, codes, hi, lo);
        ob_vnni_add(&second, codes, hi + stride, lo + stride);
        ob_vnni_add(&third, codes, hi + 2 * stride, lo + 2 * stride);
    }
    ob_vnni_store(&first, dots);
    ob_vnni_store(&second, dots + OB_TILE);
    ob_vnni_store(&third, dots + 2 * OB_TILE);
}

static inline void ob_vnni_dots(const uint8_t *panel, int blocks, const ob_activations *x, int64_t block, int tokens,
                                int32_t *dots) {
    const int8_t *hi = x->hi + block * OB_BLOCK, *lo = x->lo + block * OB_BLOCK;
    int64_t stride = x->column_stride;
    int groups = blocks * 8;
    for (; tokens >= 3; tokens -= 3, hi += 3 * stride, lo += 3 * stride, dots += 3 * OB_TILE) {
        ob_vnni_three(panel, groups, hi, lo, stride, dots);
    }
    for (; tokens > 0; tokens--, hi += stride, lo += stride, dots += OB_TILE) ob_vnni_one(panel, groups, hi, lo, dots);
}

/* Bits in the quad layout, or sparse codes, -> panel (avx512vbmi.c). */
void ob_quad_expand(const uint8_t *bits, int blocks, int digits, uint8_t *panel);
void ob_quad_expand_sparse(const uint64_t *masks, int blocks, const int32_t *zero, const uint8_t **codes,
                           uint8_t *panel);

#endif
