/* The blob: a packed weight as one run of bytes. Offsets count bytes from its beginning; 0 stands for "not there".
 *
 *   header | sets | segments of every set | terms | scale_in, bits, coefficients, bytes, bias ... each 64-byte aligned
 *
 * Rows go in supertiles of 64, columns in segments, and segments in blocks of 32 columns (the last padded with zero
 * bits). A bit plane is  [supertile][segment][plane][block] of 256 bytes, one block being 64 rows x 32 columns:
 *
 *   rows layout   byte 64 s + r          low nibble: columns 8s .. 8s+3, high nibble: 8s+4 .. 8s+7, of row r
 *   quad layout   byte 64 t + 4 r + j    low nibble: columns 4j .. 4j+3, high nibble: 16+4j .. +3, of row 16 t + r
 *
 * Bytes (a dense 8-bit matrix, or codes expanded on the fly) form a panel, per supertile and segment
 * [row tile of 16][columns / 4][16 rows][4 columns]: the operand order of dpbusd and of AMX.
 */
#ifndef OB_BLOB_H
#define OB_BLOB_H

#include <stddef.h>
#include <stdint.h>

enum {
    OB_VERSION = 3,
    OB_TILE = 64,             /* rows of a supertile */
    OB_BLOCK = 32,            /* columns of a block */
    OB_BLOCK_BYTES = 256,     /* one plane of 64 x 32 bits; also the tables of 32 columns */
    OB_PANEL_BYTES = 2048,    /* one block as bytes */
    OB_WHOLE_SEGMENT = 256,   /* columns of a segment where the row has one group */
    OB_MAX_SEGMENT = 1024,    /* 1024 * 8191 * 255 is the most that an int32 sum holds */
    OB_MAX_PLANES = 8,
};

#define OB_MAGIC 0x3155504354424e4fULL /* "ONBTCPU1" */

typedef enum { OB_LAYOUT_ROWS = 0, OB_LAYOUT_QUAD = 1 } ob_bit_layout;

/* A run of columns with one activation step. */
typedef struct {
    int32_t column;  /* first column of x */
    int32_t columns; /* how many, 1 to 1024 */
    int32_t block;   /* first block */
    int32_t blocks;  /* ceil(columns / 32) */
    int32_t group;   /* index of the coefficients */
} ob_segment;

/* One way to quantize x: a scale_in and a division into segments. Terms share a set where these agree. */
typedef struct {
    int64_t scale_in; /* float32 [columns] */
    int64_t segments; /* ob_segment [num_segments] */
    int32_t num_segments;
    int32_t num_blocks;
} ob_set;

/* A sum of planes. Coefficient row 0 multiplies the number whose binary digits are the first `first_digits` planes,
 * every further row one plane: a binary code has first_digits = Q, independent planes have 1. */
typedef struct {
    int64_t bits;         /* [supertile][segment][plane][block][256] */
    int64_t coefficients; /* float32 [supertile][group][num_coefficients + has_offset][64], the offset last */
    int32_t set;
    int32_t num_groups;
    int32_t num_planes;
    int32_t num_coefficients;
    int32_t first_digits;
    int32_t has_offset;
} ob_packed_term;

/* scale_o * (code_oi - zero_o), dense or at the places of a bitmap. */
typedef struct {
    int64_t codes;  /* dense: uint8 panels. sparse: uint8 in the order of the panel */
    int64_t masks;  /* sparse: uint64 [supertile][segment][tile][columns / 4], bit = byte of the panel vector */
    int64_t starts; /* sparse: int64 [supertile][tile], first code of a row tile */
    int64_t scale;  /* float32 [supertile][64]; 0: the blob has no such part */
    int64_t zero;   /* int32 [supertile][64] */
    int32_t set;
    int32_t unused;
} ob_byte_part;

typedef struct {
    uint64_t magic;
    int32_t version;
    int32_t layout; /* ob_bit_layout */
    int64_t blob_bytes;
    int64_t rows;
    int64_t columns;
    int64_t num_supertiles;
    int64_t bias; /* float32 [supertile][64] */
    int64_t sets;
    int64_t terms;
    int32_t num_sets;
    int32_t num_terms;
    ob_byte_part dense;
    ob_byte_part sparse;
} ob_blob;

static inline const void *ob_at(const ob_blob *blob, int64_t offset) {
    return offset ? (const uint8_t *)blob + offset : NULL;
}

static inline int64_t ob_ceil_div(int64_t value, int64_t step) {
    return (value + step - 1) / step;
}

#endif
