/* AVX-512 with VBMI, VBMI2 and VNNI (Ice Lake, Zen 4 and later).
 *
 * One vpermb looks 64 nibbles up in four tables of 16 entries: a byte of the index is (table << 4 | nibble), and in
 * the quad layout the four bytes of a 32-bit lane are the four column groups of one row. dpbusd against ones then adds
 * those four entries to the row's sum: rows stay in lanes, nothing is ever added across.
 */
#if defined(__x86_64__)
#include "onebit_cpu.h"
#include "tier.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,bmi2,popcnt"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,bmi2,popcnt")
#pragma GCC target("prefer-vector-width=512")
#pragma GCC optimize("no-tree-pre") /* it keeps a copy of every sum on the stack, half the speed */
#endif
#include "drivers.h"
#include "avx512.h"

enum { AHEAD = 2048 }; /* bytes between what is read and what is fetched */

static int supported(void) {
    return ob_avx512.supported() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}

/* The low and high bytes of 16 rows' sums. Named structs, not arrays: the compiler must keep them in registers. */
typedef struct {
    __m512i low, high;
} quad_sums;

typedef struct {
    __m512i first, second;
} quad_index;

/* (nibble of v) | (which of the four tables), for both nibbles of 16 rows x 32 columns. */
OB_INLINE quad_index index_of(const uint8_t *bits) {
    const __m512i nibble = _mm512_set1_epi8(15), table = _mm512_set1_epi32(0x30201000);
    __m512i v = _mm512_loadu_si512(bits);
    return (quad_index){_mm512_ternarylogic_epi32(v, nibble, table, 0xEA),
                        _mm512_ternarylogic_epi32(_mm512_srli_epi16(v, 4), nibble, table, 0xEA)};
}

OB_INLINE void look_up(quad_sums *sums, quad_index index, const uint8_t *tables) {
    const __m512i one = _mm512_set1_epi8(1);
    __m512i a = _mm512_permutexvar_epi8(index.first, _mm512_loadu_si512(tables));
    __m512i b = _mm512_permutexvar_epi8(index.second, _mm512_loadu_si512(tables + 64));
    __m512i c = _mm512_permutexvar_epi8(index.first, _mm512_loadu_si512(tables + 128));
    __m512i d = _mm512_permutexvar_epi8(index.second, _mm512_loadu_si512(tables + 192));
    sums->low = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums->low, a, one), b, one);
    sums->high = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums->high, one, c), one, d);
}

OB_INLINE void store_sums(quad_sums sums, int shift, int adds, int32_t *dots) {
    __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(sums.high, 8), sums.low);
    dot = _mm512_slli_epi32(dot, (unsigned)shift);
    if (adds) dot = _mm512_add_epi32(dot, _mm512_loadu_si512(dots));
    _mm512_storeu_si512(dots, dot);
}

OB_INLINE quad_sums no_sums(void) {
    return (quad_sums){_mm512_setzero_si512(), _mm512_setzero_si512()};
}

static void one_token(const uint8_t *bits, int blocks, const uint8_t *tables, int shift, int adds, int32_t *dots) {
    quad_sums a = no_sums(), b = a, c = a, d = a;
    for (int i = 0; i < blocks; i++, bits += OB_BLOCK_BYTES, tables += OB_BLOCK_BYTES) {
        look_up(&a, index_of(bits), tables);
        look_up(&b, index_of(bits + 64), tables);
        look_up(&c, index_of(bits + 128), tables);
        look_up(&d, index_of(bits + 192), tables);
    }
    store_sums(a, shift, adds, dots);
    store_sums(b, shift, adds, dots + 16);
    store_sums(c, shift, adds, dots + 32);
    store_sums(d, shift, adds, dots + 48);
}

/* 32 rows of two tokens. */
OB_INLINE void two_tokens(const uint8_t *bits, int blocks, const uint8_t *tables, int64_t stride, int shift, int adds,
                          int32_t *dots) {
    quad_sums a0 = no_sums(), a1 = a0, b0 = a0, b1 = a0;
    for (int i = 0; i < blocks; i++, bits += OB_BLOCK_BYTES, tables += OB_BLOCK_BYTES) {
        quad_index index = index_of(bits);
        look_up(&a0, index, tables);
        look_up(&b0, index, tables + stride);
        index = index_of(bits + 64);
        look_up(&a1, index, tables);
        look_up(&b1, index, tables + stride);
    }
    store_sums(a0, shift, adds, dots);
    store_sums(a1, shift, adds, dots + 16);
    store_sums(b0, shift, adds, dots + 64);
    store_sums(b1, shift, adds, dots + 80);
}

/* 32 rows of four tokens: an index made once serves four lookups. */
OB_INLINE void four_tokens(const uint8_t *bits, int blocks, const uint8_t *tables, int64_t stride, int shift, int adds,
                           int32_t *dots) {
    quad_sums a0 = no_sums(), a1 = a0, b0 = a0, b1 = a0, c0 = a0, c1 = a0, d0 = a0, d1 = a0;
    for (int i = 0; i < blocks; i++, bits += OB_BLOCK_BYTES, tables += OB_BLOCK_BYTES) {
        quad_index index = index_of(bits);
        look_up(&a0, index, tables);
        look_up(&b0, index, tables + stride);
        look_up(&c0, index, tables + 2 * stride);
        look_up(&d0, index, tables + 3 * stride);
        index = index_of(bits + 64);
        look_up(&a1, index, tables);
        look_up(&b1, index, tables + stride);
        look_up(&c1, index, tables + 2 * stride);
        look_up(&d1, index, tables + 3 * stride);
    }
    store_sums(a0, shift, adds, dots);
    store_sums(a1, shift, adds, dots + 16);
    store_sums(b0, shift, adds, dots + 64);
    store_sums(b1, shift, adds, dots + 80);
    store_sums(c0, shift, adds, dots + 128);
    store_sums(c1, shift, adds, dots + 144);
    store_sums(d0, shift, adds, dots + 192);
    store_sums(d1, shift, adds, dots + 208);
}

static void lut_dots(const uint8_t *bits, int blocks, const uint8_t *tables, int64_t stride, int tokens, int shift,
                     int adds, int32_t *dots) {
    for (int half = 0; half < 2 && tokens > 1; half++) {
        const uint8_t *rows = bits + 128 * half;
        if (tokens == 4) {
            four_tokens(rows, blocks, tables, stride, shift, adds, dots + 32 * half);
        } else {
            two_tokens(rows, blocks, tables, stride, shift, adds, dots + 32 * half);
        }
    }
    if (tokens % 2) {
        one_token(bits, blocks, tables + (tokens - 1) * stride, shift, adds, dots + (tokens - 1) * OB_TILE);
    }
}

/* Byte 4 r + i of a panel vector is bit (8 j + 4 h + i) of row r's 32 bits in the quad layout, for column group
 * 4 h + j: one vpmultishiftqb brings that bit of each plane to bit q of the byte, one ternlog adds it to the code. */
void ob_quad_expand(const uint8_t *bits, int blocks, int digits, uint8_t *panel) {
    const __m512i steps = _mm512_set1_epi64(0x2322212003020100); /* two rows of 32 bits in a 64-bit lane */
    int64_t plane = (int64_t)blocks * OB_BLOCK_BYTES;
    for (int tile = 0; tile < 4; tile++) {
        for (int b = 0; b < blocks; b++, panel += 512) {
            const uint8_t *from = bits + b * OB_BLOCK_BYTES + 64 * tile;
            __m512i codes[8];
#pragma GCC unroll 8
            for (int c = 0; c < 8; c++) codes[c] = _mm512_setzero_si512();
            for (int q = 0; q < digits; q++) {
                __m512i v = _mm512_loadu_si512(from + q * plane), bit = _mm512_set1_epi8((char)(1 << q));
                __m512i offsets = _mm512_sub_epi8(steps, _mm512_set1_epi8((char)q));
#pragma GCC unroll 8
                for (int c = 0; c < 8; c++) {
                    __m512i at = _mm512_add_epi8(offsets, _mm512_set1_epi8((char)(8 * (c % 4) + 4 * (c / 4))));
                    codes[c] = _mm512_ternarylogic_epi32(codes[c], _mm512_multishift_epi64_epi8(at, v), bit, 0xF8);
                }
            }
#pragma GCC unroll 8
            for (int c = 0; c < 8; c++) _mm512_storeu_si512(panel + 64 * c, codes[c]);
        }
    }
}

void ob_quad_expand_sparse(const uint64_t *masks, int blocks, const int32_t *zero, const uint8_t **codes,
                           uint8_t *panel) {
    const __m512i base = _mm512_mullo_epi32(_mm512_loadu_si512(zero), _mm512_set1_epi32(0x01010101));
    const uint8_t *next = *codes;
    for (int c = 0; c < blocks * 8; c++) {
        _mm512_storeu_si512(panel + 64 * c, _mm512_mask_expandloadu_epi8(base, masks[c], next));
        next += __builtin_popcountll(masks[c]);
    }
    *codes = next;
}

static void build_tables(const int16_t *xq, int blocks, uint8_t *tables) {
    ob_avx512_tables(xq, blocks, tables, 0);
}

static void prepare(const ob_prepare_job *job) {
    ob_prepare(job, build_tables);
}

/* ob_add_product for 16 rows, from the registers. */
OB_INLINE __m512 add_product(__m512 y, quad_sums sums, const float *a, const float *b, float step, __m512 x) {
    __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sums.high, 8), sums.low));
    __m512 inner = _mm512_mul_ps(_mm512_loadu_ps(a), dot);
    if (b) inner = _mm512_add_ps(inner, _mm512_mul_ps(_mm512_loadu_ps(b), x));
    return _mm512_add_ps(y, _mm512_mul_ps(_mm512_set1_ps(step), inner));
}

OB_INLINE quad_sums doubled(quad_sums sums) {
    return (quad_sums){_mm512_add_epi32(sums.low, sums.low), _mm512_add_epi32(sums.high, sums.high)};
}

/* The processor's own prefetching stops at every page: this saves 5 to 15 % where weights leave the L2 cache. */
OB_INLINE void prefetch_block(const uint8_t *bits) {
    for (int line = 0; line < OB_BLOCK_BYTES; line += 64) _mm_prefetch((const char *)bits + line, _MM_HINT_T0);
}

/* One token and one coefficient row, the step of writing text: no sum goes through memory. The digits of a code come
 * highest first, each doubling what is there. */
static void one_token_one_row(const ob_product_job *job) {
    __m512 y0 = _mm512_loadu_ps(job->y), y1 = _mm512_loadu_ps(job->y + 16);
    __m512 y2 = _mm512_loadu_ps(job->y + 32), y3 = _mm512_loadu_ps(job->y + 48);
    for (int s = 0; s < job->num_segments; s++) {
        const ob_segment *segment = job->segments + s;
        const uint8_t *planes = ob_segment_bits(job, segment);
        quad_sums d0 = no_sums(), d1 = d0, d2 = d0, d3 = d0;
        for (int q = job->term->num_planes - 1; q >= 0; q--) {
            const uint8_t *bits = planes + (int64_t)q * segment->blocks * OB_BLOCK_BYTES;
            const uint8_t *tables = job->x.tables + (int64_t)segment->block * OB_BLOCK_BYTES;
            d0 = doubled(d0), d1 = doubled(d1), d2 = doubled(d2), d3 = doubled(d3);
            for (int i = 0; i < segment->blocks; i++, bits += OB_BLOCK_BYTES, tables += OB_BLOCK_BYTES) {
                prefetch_block(bits + AHEAD);
                look_up(&d0, index_of(bits), tables);
                look_up(&d1, index_of(bits + 64), tables);
                look_up(&d2, index_of(bits + 128), tables);
                look_up(&d3, index_of(bits + 192), tables);
            }
        }
        const float *a = ob_coefficients(job, segment), *b = job->term->has_offset ? a + OB_TILE : NULL;
        float step = job->x.step[s];
        __m512 x = _mm512_set1_ps((float)job->x.sum[s]);
        y0 = add_product(y0, d0, a, b, step, x);
        y1 = add_product(y1, d1, a + 16, b ? b + 16 : NULL, step, x);
        y2 = add_product(y2, d2, a + 32, b ? b + 32 : NULL, step, x);
        y3 = add_product(y3, d3, a + 48, b ? b + 48 : NULL, step, x);
    }
    _mm512_storeu_ps(job->y, y0);
    _mm512_storeu_ps(job->y + 16, y1);
    _mm512_storeu_ps(job->y + 32, y2);
    _mm512_storeu_ps(job->y + 48, y3);
}

static void lut_term(const ob_product_job *job) {
    if (job->tokens == 1 && job->term->num_coefficients == 1) {
        one_token_one_row(job);
    } else {
        ob_drive_lut(job, lut_dots);
    }
}

static void panel_term(const ob_product_job *job) {
    ob_drive_panel(job, ob_quad_expand, ob_vnni_dots);
}

/* The next 16 rows x 4 columns of a sparse part. */
OB_INLINE __m512i next_codes(uint64_t mask, __m512i zero, const uint8_t **codes) {
    __m512i found = _mm512_mask_expandloadu_epi8(zero, mask, *codes);
    *codes += _mm_popcnt_u64(mask);
    return found;
}

/* One token: the codes are used where they are made, four row tiles side by side. */
static void sparse_one_token(const ob_product_job *job) {
    const uint8_t *codes[4];
    __m512i zero[4];
    for (int tile = 0; tile < 4; tile++) {
        codes[tile] = job->codes + job->starts[tile];
        zero[tile] = _mm512_mullo_epi32(_mm512_loadu_si512(job->zero + 16 * tile), _mm512_set1_epi32(0x01010101));
    }
    for (int s = 0; s < job->num_segments; s++) {
        const ob_segment *segment = job->segments + s;
        const int groups = segment->blocks * 8;
        const int8_t *hi = job->x.hi + (int64_t)segment->block * OB_BLOCK;
        const int8_t *lo = job->x.lo + (int64_t)segment->block * OB_BLOCK;
        const uint64_t *masks = job->masks + (int64_t)segment->block * 32;
        ob_vnni_sums sums = ob_vnni_zero();
        for (int c = 0; c < groups; c++) {
            ob_vnni_codes found;
            found.tile0 = next_codes(masks[c], zero[0], &codes[0]);
            found.tile1 = next_codes(masks[groups + c], zero[1], &codes[1]);
            found.tile2 = next_codes(masks[2 * groups + c], zero[2], &codes[2]);
            found.tile3 = next_codes(masks[3 * groups + c], zero[3], &codes[3]);
            ob_vnni_add(&sums, found, hi + 4 * c, lo + 4 * c);
        }
        ob_vnni_store(&sums, job->dots);
        ob_add_bytes(job->y, job->scale, job->zero, job->dots, job->x.step[s], job->x.sum[s]);
    }
}

static void byte_part(const ob_product_job *job) {
    if (job->masks && job->tokens == 1) {
        sparse_one_token(job);
    } else {
        ob_drive_bytes(job, ob_quad_expand_sparse, ob_vnni_dots);
    }
}

/* A lookup pass costs 4 cycles a token and plane for 512 weights; bytes cost 8 a token, and 8 to expand a plane. These
 * are where the lines of both crossed on an Emerald Rapids core. */
static int prefers_panel(const ob_packed_term *term, int64_t tokens) {
    return tokens >= (term->first_digits >= 3 ? 6 : 16) && term->first_digits >= 2;
}

const ob_tier ob_avx512vbmi = {
    .name = "avx512vbmi",
    .layout = OB_LAYOUT_QUAD,
    .supported = supported,
    .prepare = prepare,
    .lut_term = lut_term,
    .panel_term = panel_term,
    .byte_part = byte_part,
    .finish = ob_finish,
    .prefers_panel = prefers_panel,
    .splits_bytes = 1,
    .giga_weights = 240,
};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
