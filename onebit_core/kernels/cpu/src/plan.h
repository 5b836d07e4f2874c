/* Where everything goes in a blob: the first half of packing, and all of ob_pack_size. */
#ifndef OB_PLAN_H
#define OB_PLAN_H

#include "blob.h"
#include "onebit_cpu.h"

enum { OB_MAX_TERMS = 64 };

typedef struct {
    const ob_operands *operands;
    const ob_term *terms;
    ob_blob blob; /* the header as it will be written */
    ob_set sets[OB_MAX_TERMS + 1];
    ob_packed_term packed[OB_MAX_TERMS];
} ob_plan;

/* Check the operands and lay the blob out. */
int ob_make_plan(ob_plan *plan, const int64_t *operands, int64_t length, ob_bit_layout layout);

/* Divide `columns` in `groups` groups into segments; `out` may be NULL. Returns their number. */
int32_t ob_fill_segments(int64_t columns, int64_t groups, ob_segment *out, int32_t *num_blocks);

/* An address of the operands. */
static inline const void *ob_address(int64_t pointer) {
    return (const void *)(intptr_t)pointer;
}

#endif
