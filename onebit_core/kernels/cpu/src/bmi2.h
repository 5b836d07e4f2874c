/* Sparse codes by pdep, for x86 tiers without vpexpandb; included under a target pragma with bmi2, after drivers.h. */
#ifndef OB_BMI2_H
#define OB_BMI2_H

#include "drivers.h"

/* Eight bytes at a time: pdep turns 8 mask bits into 8 byte masks, and puts the next codes there. */
static inline void ob_expand_sparse_pdep(const uint64_t *masks, int blocks, const int32_t *zero, const uint8_t **codes,
                                         uint8_t *panel) {
    uint64_t base[8];
    for (int i = 0; i < 8; i++) {
        base[i] = ((uint64_t)zero[2 * i] | (uint64_t)zero[2 * i + 1] << 32) * 0x01010101;
    }
    const uint8_t *next = *codes;
    for (int c = 0; c < blocks * 8; c++) {
        uint64_t mask = masks[c];
        for (int i = 0; i < 8; i++) {
            uint64_t places = _pdep_u64(mask >> 8 * i, 0x0101010101010101) * 255, eight;
            memcpy(&eight, next + _mm_popcnt_u64(mask & ((1ULL << 8 * i) - 1)), sizeof eight);
            eight = _pdep_u64(eight, places) | (base[i] & ~places);
            memcpy(panel + 64 * c + 8 * i, &eight, sizeof eight);
        }
        next += _mm_popcnt_u64(mask);
    }
    *codes = next;
}

#endif
