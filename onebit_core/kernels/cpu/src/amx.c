/* AMX (Sapphire Rapids and later): many tokens by tiles of bytes; everything else is the tier below, avx512vbmi.
 *
 *   tile 0, 1   sums of hi, row tiles n and n + 1     [16 tokens][16 rows]
 *   tile 2, 3   sums of lo                            [16 tokens][16 rows]
 *   tile 4, 5   x (hi or lo) and codes, 64 columns    [16 tokens][64], [16][16 rows x 4 columns]
 *   tile 6, 7   the same for the 32 columns that an odd number of blocks leaves over
 */
#if defined(__x86_64__)
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* declares syscall */
#endif
#include "onebit_cpu.h"
#include "tier.h"

#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,bmi2,popcnt,amx-tile,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,bmi2,popcnt,amx-tile,amx-int8")
#pragma GCC target("prefer-vector-width=512")
#pragma GCC optimize("no-tree-pre") /* see avx512.c */
#endif
#include "amx_tiles.h"
#include "avx512.h"
#include "drivers.h"

enum { TOKENS = 16, ROWS = 16 };

/* Linux hands the tile registers out on request, once per process: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA). */
static int tiles_are_granted(void) {
#if defined(OB_EMULATE_AMX)
    return 1;
#elif defined(__linux__)
    unsigned a, b, c, d;
    const unsigned tile_and_int8 = 3u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tile_and_int8) != tile_and_int8) return 0;
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 0;
#endif
}

static int supported(void) {
    return ob_avx512vbmi.supported() && tiles_are_granted();
}

static void configure(void) {
    ob_tile_config config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.rows[tile] = tile == 7 ? 8 : 16;
        config.row_bytes[tile] = tile == 6 ? 32 : 64;
    }
    _tile_loadconfig(&config);
}

/* 16 tokens x 32 rows over all columns; `codes` are the panels of two row tiles, `panel_bytes` apart. */
static void tile_pair(const uint8_t *codes, int64_t panel_bytes, int blocks, const int8_t *hi, const int8_t *lo,
                      int64_t stride, int32_t sums[4][TOKENS][ROWS]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int pair = 0; pair < blocks / 2; pair++, codes += 1024, hi += 64, lo += 64) {
        _tile_loadd(4, hi, stride);
        _tile_loadd(5, codes, 64);
        _tile_dpbsud(0, 4, 5);
        _tile_loadd(5, codes + panel_bytes, 64);
        _tile_dpbsud(1, 4, 5);
        _tile_loadd(4, lo, stride);
        _tile_dpbsud(3, 4, 5);
        _tile_loadd(5, codes, 64);
        _tile_dpbsud(2, 4, 5);
    }
    if (blocks % 2) {
        _tile_loadd(6, hi, stride);
        _tile_loadd(7, codes, 64);
        _tile_dpbsud(0, 6, 7);
        _tile_loadd(7, codes + panel_bytes, 64);
        _tile_dpbsud(1, 6, 7);
        _tile_loadd(6, lo, stride);
        _tile_dpbsud(3, 6, 7);
        _tile_loadd(7, codes, 64);
        _tile_dpbsud(2, 6, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
}

/* Whole tiles of 16 tokens; what is left over goes the way of AVX-512. */
static void panel_dots(const uint8_t *panel, int blocks, const ob_activations *x, int64_t block, int tokens,
                       int32_t *dots) {
    int64_t stride = x->column_stride, panel_bytes = (int64_t)blocks * 512;
    int t = 0;
    for (; t + TOKENS <= tokens; t += TOKENS) {
        const int8_t *hi = x->hi + t * stride + block * OB_BLOCK, *lo = x->lo + t * stride + block * OB_BLOCK;
        for (int half = 0; half < 2; half++) {
            _Alignas(64) int32_t sums[4][TOKENS][ROWS];
            tile_pair(panel + 2 * half * panel_bytes, panel_bytes, blocks, hi, lo, stride, sums);
            for (int i = 0; i < TOKENS; i++) {
                int32_t *to = dots + (t + i) * OB_TILE + 32 * half;
                for (int r = 0; r < ROWS; r++) to[r] = sums[0][i][r] * 128 + sums[2][i][r];
                for (int r = 0; r < ROWS; r++) to[ROWS + r] = sums[1][i][r] * 128 + sums[3][i][r];
            }
        }
    }
    if (t == tokens) return;
    ob_activations rest = *x;
    rest.hi += t * stride;
    rest.lo += t * stride;
    ob_vnni_dots(panel, blocks, &rest, block, tokens - t, dots + t * OB_TILE);
}

static void prepare(const ob_prepare_job *job) {
    ob_avx512vbmi.prepare(job);
}

static void lut_term(const ob_product_job *job) {
    ob_avx512vbmi.lut_term(job);
}

static void panel_term(const ob_product_job *job) {
    configure();
    ob_drive_panel(job, ob_quad_expand, panel_dots);
    _tile_release();
}

static void byte_part(const ob_product_job *job) {
    if (job->tokens < TOKENS) {
        ob_avx512vbmi.byte_part(job);
        return;
    }
    configure();
    ob_drive_bytes(job, ob_quad_expand_sparse, panel_dots);
    _tile_release();
}

static int prefers_panel(const ob_packed_term *term, int64_t tokens) {
    return tokens >= TOKENS || ob_avx512vbmi.prefers_panel(term, tokens);
}

const ob_tier ob_amx = {
    .name = "amx",
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
