/* The float side of the numerics in tier.h, in plain C: every tier compiles these loops for its own instruction set,
 * and all get the same bits, for each operation is a single IEEE rounding (the build turns contraction to FMA off). */
#ifndef OB_NUMERICS_H
#define OB_NUMERICS_H

#include "onebit_cpu.h"
#include "tier.h"

#include <math.h>
#include <string.h>

static inline float ob_float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t ob_bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* a where the condition holds, else b; without a branch, so that loops become vector code. */
static inline uint32_t ob_choose(int condition, uint32_t a, uint32_t b) {
    uint32_t mask = 0u - (uint32_t)(condition != 0);
    return (a & mask) | (b & ~mask);
}

/* Exact. A subnormal half is its mantissa times 2^-24, which is a normal float. */
static inline float ob_float_of_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    uint32_t normal = (rest << 13) + (112u << 23);
    uint32_t special = (rest << 13) | 0x7f800000;
    uint32_t subnormal = ob_bits_of((float)(int32_t)rest * 0x1p-24f);
    uint32_t bits = ob_choose(rest < 0x0400, subnormal, normal);
    return ob_float_of(sign | ob_choose(rest >= 0x7c00, special, bits));
}

/* Round to nearest even; a NaN stays one. Below 2^-14 a half is fixed point with step 2^-24: adding 0.5, whose float
 * step is 2^-24, rounds there. */
static inline uint16_t ob_half_of_float(float value) {
    uint32_t bits = ob_bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    uint32_t normal = (rest - (112u << 23) + 0x0fff + (rest >> 13 & 1)) >> 13;
    uint32_t subnormal = ob_bits_of(ob_float_of(rest < 0x38800000 ? rest : 0) + 0.5f) - 0x3f000000;
    uint32_t half = rest < 0x38800000 ? subnormal : normal;
    half = rest >= 0x477ff000 ? 0x7c00 : half;
    return (uint16_t)(sign | (rest > 0x7f800000 ? 0x7e00 : half));
}

static inline uint16_t ob_bfloat_of_float(float value) {
    uint32_t bits = ob_bits_of(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x0040) : rounded);
}

static inline void ob_load(const void *x, int dtype, int64_t first, int count, float *out) {
    if (dtype == OB_FLOAT32) {
        memcpy(out, (const float *)x + first, (size_t)count * sizeof(float));
    } else if (dtype == OB_BFLOAT16) {
        const uint16_t *source = (const uint16_t *)x + first;
        for (int i = 0; i < count; i++) out[i] = ob_float_of((uint32_t)source[i] << 16);
    } else {
        const uint16_t *source = (const uint16_t *)x + first;
        for (int i = 0; i < count; i++) out[i] = ob_float_of_half(source[i]);
    }
}

/* The step for the largest magnitude, given as the bits of a float. 8191 = 1.11111111111100...b * 2^12, so the exponent
 * of amax goes down by 12, or by 11 where the mantissa is above that of 8191: adding 0x7ff carries just then. */
static inline float ob_step_of(int32_t amax_bits) {
    if (amax_bits >= 0x7f800000) return NAN;
    int32_t exponent = ((amax_bits + 0x7ff) >> 23) - 12;
    return ob_float_of((uint32_t)(exponent < 1 ? 1 : exponent) << 23);
}

/* Quantize one segment: `count` values (a multiple of 32, padded with zeros) to xq; returns step, stores the sum. */
static inline float ob_quantize(const float *values, int count, int16_t *xq, int32_t *sum) {
    int32_t amax_bits = 0;
    for (int i = 0; i < count; i++) {
        int32_t magnitude = (int32_t)(ob_bits_of(values[i]) & 0x7fffffff);
        amax_bits = magnitude > amax_bits ? magnitude : amax_bits;
    }
    float step = ob_step_of(amax_bits);
    *sum = 0;
    if (step != step) {
        memset(xq, 0, (size_t)count * sizeof *xq);
        return step;
    }
    /* adding 1.5 * 2^23 leaves the rounded integer in the low bits */
    const float inverse = 1.0f / step, magic = 0x1.8p23f;
    int32_t total = 0;
    for (int i = 0; i < count; i++) {
        int32_t rounded = (int32_t)(ob_bits_of(values[i] * inverse + magic) - 0x4b400000u);
        xq[i] = (int16_t)rounded;
        total += rounded;
    }
    *sum = total;
    return step;
}

/* Fill everything of a job but the tables, which `build_tables` makes from 32 columns at a time. */
static inline __attribute__((always_inline)) void ob_prepare(const ob_prepare_job *job,
                                                             void (*build_tables)(const int16_t *, int, uint8_t *)) {
    float values[OB_MAX_SEGMENT];
    for (int s = job->first; s < job->last; s++) {
        const ob_segment *segment = job->segments + s;
        int count = segment->blocks * OB_BLOCK, columns = segment->columns;
        int64_t begin = (int64_t)segment->block * OB_BLOCK;
        memset(values + count - OB_BLOCK, 0, OB_BLOCK * sizeof(float));
        ob_load(job->x, job->dtype, segment->column, columns, values);
        if (job->scale_in) {
            const float *scale = job->scale_in + segment->column;
            for (int i = 0; i < columns; i++) values[i] *= scale[i];
        }
        int16_t *xq = job->out.xq + begin;
        job->out.step[s] = ob_quantize(values, count, xq, job->out.sum + s);
        if (job->out.tables) {
            build_tables(xq, segment->blocks, job->out.tables + (int64_t)segment->block * OB_BLOCK_BYTES);
        }
        if (job->out.hi) {
            int8_t *hi = job->out.hi + begin, *lo = job->out.lo + begin;
            for (int i = 0; i < count; i++) {
                hi[i] = (int8_t)(xq[i] >> 7);
                lo[i] = (int8_t)(xq[i] & 127);
            }
        }
    }
}

/* inner = a * D, or inner + a * D. */
static inline void ob_scale_dots(float *restrict inner, const float *a, const int32_t *dots, int is_first) {
    if (is_first) {
        for (int r = 0; r < OB_TILE; r++) inner[r] = a[r] * (float)dots[r];
    } else {
        for (int r = 0; r < OB_TILE; r++) inner[r] = inner[r] + a[r] * (float)dots[r];
    }
}

/* y += step * (inner + b * X); inner or b may be NULL, not both. */
static inline void ob_add_segment(float *restrict y, const float *inner, const float *b, float step, int32_t sum) {
    float x = (float)sum;
    if (b == NULL) {
        for (int r = 0; r < OB_TILE; r++) y[r] = y[r] + step * inner[r];
    } else if (inner == NULL) {
        for (int r = 0; r < OB_TILE; r++) y[r] = y[r] + step * (b[r] * x);
    } else {
        for (int r = 0; r < OB_TILE; r++) y[r] = y[r] + step * (inner[r] + b[r] * x);
    }
}

/* The same with inner = a * D, without a way through memory: most weights have one coefficient row. */
static inline void ob_add_product(float *restrict y, const float *a, const float *b, const int32_t *dots, float step,
                                  int32_t sum) {
    float x = (float)sum;
    if (b == NULL) {
        for (int r = 0; r < OB_TILE; r++) y[r] = y[r] + step * (a[r] * (float)dots[r]);
    } else {
        for (int r = 0; r < OB_TILE; r++) y[r] = y[r] + step * (a[r] * (float)dots[r] + b[r] * x);
    }
}

/* y += step * (scale * (S - zero * X)). */
static inline void ob_add_bytes(float *restrict y, const float *scale, const int32_t *zero, const int32_t *dots,
                                float step, int32_t sum) {
    for (int r = 0; r < OB_TILE; r++) y[r] = y[r] + step * (scale[r] * (float)(dots[r] - zero[r] * sum));
}

static inline void ob_finish(const ob_finish_job *job) {
    float y[OB_TILE];
    memcpy(y, job->y, sizeof y);
    if (job->bias) {
        for (int r = 0; r < OB_TILE; r++) y[r] = y[r] + job->bias[r];
    }
    if (job->dtype == OB_FLOAT32) {
        memcpy(job->out, y, (size_t)job->rows * sizeof(float));
        return;
    }
    uint16_t halves[OB_TILE];
    if (job->dtype == OB_BFLOAT16) {
        for (int r = 0; r < OB_TILE; r++) halves[r] = ob_bfloat_of_float(y[r]);
    } else {
        for (int r = 0; r < OB_TILE; r++) halves[r] = ob_half_of_float(y[r]);
    }
    memcpy(job->out, halves, (size_t)job->rows * sizeof(uint16_t));
}

#endif
