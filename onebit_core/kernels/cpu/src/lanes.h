/* Sixteen floats at a time, in the compiler's own vector types: it splits them where the machine has smaller registers.
 *
 * For the parts of a decoder that are not products with packed weights. Contraction of a * b + c into one rounding is
 * allowed here, so results differ in the last bit between instruction sets, as with any other library; on one machine
 * a token's numbers do not depend on what else is computed with it.
 */
#ifndef OB_LANES_H
#define OB_LANES_H

#include <stdint.h>

#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors cross no border that another compiler sees */
#endif

/* The function is compiled for several instruction sets, and the fastest that the machine has is called. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define OB_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define OB_CLONES
#endif
#define OB_LANES_INLINE static inline __attribute__((always_inline))

enum { OB_LANES = 16 };

typedef float ob_v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ob_i16 __attribute__((vector_size(64), aligned(4), may_alias));

OB_LANES_INLINE void ob_fill(ob_v16 *out, float value) {
    *out = (ob_v16){0} + value;
}

OB_LANES_INLINE void ob_read(ob_v16 *out, const float *from) {
    *out = *(const ob_v16 *)from;
}

OB_LANES_INLINE void ob_write(float *to, const ob_v16 *value) {
    *(ob_v16 *)to = *value;
}

/* One after the other: the order is the same on every machine. */
OB_LANES_INLINE float ob_total(const ob_v16 *value) {
    float sum = 0;
    for (int i = 0; i < OB_LANES; i++) sum += (*value)[i];
    return sum;
}

/* The largest of some floats, a multiple of sixteen; of NaN any. */
OB_LANES_INLINE float ob_largest(const float *values, int64_t count) {
    ob_v16 most, next;
    ob_read(&most, values);
    for (int64_t i = OB_LANES; i < count; i += OB_LANES) {
        ob_read(&next, values + i);
        ob_i16 more = next > most;
        most = (ob_v16)(((ob_i16)most & ~more) | ((ob_i16)next & more));
    }
    float largest = most[0];
    for (int i = 1; i < OB_LANES; i++) largest = most[i] > largest ? most[i] : largest;
    return largest;
}

/* x = e^x to two units in the last place; below -87 about 1e-38, above 88 about 1e38, NaN stays NaN.
 * e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2, and a Taylor polynomial of degree 7 for e^r. */
OB_LANES_INLINE void ob_exp(ob_v16 *x) {
    const float MAGIC = 12582912.0f; /* 1.5 * 2^23: adding it rounds, and leaves n in the low bits */
    ob_v16 low, high, v = *x;
    ob_fill(&low, -87.0f);
    ob_fill(&high, 88.0f);
    ob_i16 under = v < low, over = v > high;
    v = (ob_v16)(((ob_i16)v & ~under) | ((ob_i16)low & under));
    v = (ob_v16)(((ob_i16)v & ~over) | ((ob_i16)high & over));
    ob_v16 shifted = v * 1.44269504089f + MAGIC, n = shifted - MAGIC;
    ob_v16 r = v - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    ob_v16 p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    *x = (ob_v16)((ob_i16)p + ((ob_i16)shifted << 23));
}

#endif
