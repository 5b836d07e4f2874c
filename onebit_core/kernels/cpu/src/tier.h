/* A tier: the kernels of one instruction set. A new one is a file that fills an ob_tier and a row in select.c.
 *
 * The numbers are the same on every tier, bit for bit. Per token and segment (contract of all kernels):
 *
 *     amax = max |x_i * g_i|                       float32 product
 *     step = smallest 2^e >= 2^-126 with amax / step <= 8191; NaN where amax is not finite
 *     xq_i = round_half_even(x_i * g_i / step)     int16, |xq| <= 8191; all 0 where step is NaN
 *     X    = sum xq_i                              int32
 *     D_k  = sum over the digits q of row k  2^q * sum_i bit_qoi xq_i          int32
 *     S    = sum_i code_oi xq_i                    int32, code_oi = zero_o where a sparse part has no code
 *
 * and in float32, one rounding per operation, left to right, over terms, then segments:
 *
 *     y_o = 0
 *     y_o = y_o + step * (((a_0 * D_0) + a_1 * D_1 + ...) + b * X)             a term (b * X only where it has offsets)
 *     y_o = y_o + step * (scale_o * (S - zero_o * X))                          dense bytes, or the sparse part, last
 *     y_o = y_o + bias_o                                                       then rounded to the type of y
 */
#ifndef OB_TIER_H
#define OB_TIER_H

#include "blob.h"

/* x after quantization: arrays of one set, `stride` apart per token. */
typedef struct {
    int16_t *xq;     /* [token][block][32] */
    uint8_t *tables; /* [token][block][lo: 8 groups x 16 | hi: 8 x 16]: sums of 4 columns by nibble, split in bytes;
                        hi is an int8, or, where the tier likes it, a uint8 that is 128 too large */
    int8_t *hi;      /* [token][block][32]: xq >> 7, in [-64, 63] */
    int8_t *lo;      /* [token][block][32]: xq & 127 */
    float *step;     /* [token][segment] */
    int32_t *sum;    /* [token][segment] */
    int64_t column_stride, table_stride, segment_stride;
} ob_activations;

/* Quantize segments [first, last) of one token. tables, hi and lo may be NULL in x: not wanted. */
typedef struct {
    const void *x; /* the token's row */
    int dtype;
    const float *scale_in;
    const ob_segment *segments;
    int first, last;
    ob_activations out; /* of this token */
} ob_prepare_job;

/* One term, or one byte part, of one supertile for `tokens` tokens; adds to y. */
typedef struct {
    const ob_segment *segments;
    int num_segments;
    int tokens;
    ob_activations x; /* of the first token */
    float *y;         /* [token][64] */
    const ob_packed_term *term;
    const uint8_t *bits;       /* of this supertile */
    const float *coefficients; /* of this supertile */
    const uint8_t *codes;      /* byte part: panels; sparse: the codes of all supertiles */
    const uint64_t *masks;     /* sparse: of this supertile */
    const int64_t *starts;     /* sparse: of this supertile, [4] */
    const float *scale;        /* byte part */
    const int32_t *zero;       /* byte part */
    uint8_t *panel;            /* scratch, OB_PANEL_BYTES * 32 */
    int32_t *dots;             /* scratch, [token][64] */
    float *inner;              /* scratch, [token][64] */
} ob_product_job;

typedef struct {
    const float *y;    /* [64] */
    const float *bias; /* [64] or NULL */
    void *out;         /* `rows` elements */
    int rows;
    int dtype;
} ob_finish_job;

typedef struct {
    const char *name;
    ob_bit_layout layout;
    int (*supported)(void);
    void (*prepare)(const ob_prepare_job *job);
    void (*lut_term)(const ob_product_job *job);   /* by tables, one plane at a time */
    void (*panel_term)(const ob_product_job *job); /* by bytes: codes expanded once for all tokens */
    void (*byte_part)(const ob_product_job *job);  /* dense bytes, or a sparse part where job->masks is set */
    void (*finish)(const ob_finish_job *job);
    int (*prefers_panel)(const ob_packed_term *term, int64_t tokens); /* panel_term wins over lut_term */
    double giga_weights; /* about how many plane weights, in 1e9, one thread multiplies in a second */
    int splits_bytes;    /* panel_term and byte_part read x.hi and x.lo, not only x.xq */
} ob_tier;

extern const ob_tier ob_portable;
#if defined(__x86_64__)
extern const ob_tier ob_avx2;
extern const ob_tier ob_avx512;
extern const ob_tier ob_avx512vbmi;
extern const ob_tier ob_amx;
#endif
#if defined(__aarch64__)
extern const ob_tier ob_neon;
extern const ob_tier ob_neondot;
#endif

/* The chosen tier, chosen now if none was; never NULL (select.c). */
const ob_tier *ob_current_tier(void);

/* ob_matmul with a given tier (matmul.c); the self-test runs it. */
int ob_matmul_with(const ob_tier *tier, const ob_blob *blob, const void *x, int dtype, int64_t tokens, int64_t x_stride,
                   void *y, int threads);

/* ob_pack for a given layout (pack.c); blob_bytes < 0 asks for nothing but the size. */
int ob_pack_with(ob_bit_layout layout, const int64_t *operands, int64_t length, void *blob, int64_t blob_bytes,
                 int threads, int64_t *size);

#endif
