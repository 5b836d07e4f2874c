/* The tile instructions of AMX: the compiler's, or, where OB_EMULATE_AMX is defined, the same in plain C, so that the
 * code around them is tested on machines without AMX. Tile numbers are literals, as the compiler's macros demand.
 *
 *   C[m][n] += sum_k sum_i  A[m][4 k + i] * B[k][4 n + i]        A signed, B unsigned bytes, C int32      (tdpbsud)
 */
#ifndef OB_AMX_TILES_H
#define OB_AMX_TILES_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* The operand of ldtilecfg, palette 1. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} ob_tile_config;

#if defined(OB_EMULATE_AMX)
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbsud emulated_dpbsud

static _Thread_local ob_tile_config tile_config;
static _Thread_local uint8_t tile_bytes[8][16][64];

static inline void emulated_loadconfig(const void *config) {
    memcpy(&tile_config, config, sizeof tile_config);
}

static inline void emulated_release(void) {
    memset(&tile_config, 0, sizeof tile_config);
}

static inline void emulated_zero(int tile) {
    memset(tile_bytes[tile], 0, sizeof tile_bytes[tile]);
}

static inline void emulated_loadd(int tile, const void *base, int64_t stride) {
    emulated_zero(tile);
    for (int r = 0; r < tile_config.rows[tile]; r++) {
        memcpy(tile_bytes[tile][r], (const uint8_t *)base + r * stride, tile_config.row_bytes[tile]);
    }
}

static inline void emulated_stored(int tile, void *base, int64_t stride) {
    for (int r = 0; r < tile_config.rows[tile]; r++) {
        memcpy((uint8_t *)base + r * stride, tile_bytes[tile][r], tile_config.row_bytes[tile]);
    }
}

static inline void emulated_dpbsud(int c, int a, int b) {
    for (int m = 0; m < tile_config.rows[c]; m++) {
        int32_t sums[16];
        memcpy(sums, tile_bytes[c][m], sizeof sums);
        for (int k = 0; k < tile_config.row_bytes[a] / 4; k++) {
            for (int i = 0; i < tile_config.row_bytes[c]; i++) {
                sums[i / 4] += (int8_t)tile_bytes[a][m][4 * k + i % 4] * tile_bytes[b][k][i];
            }
        }
        memcpy(tile_bytes[c][m], sums, sizeof sums);
    }
}
#endif

#endif
