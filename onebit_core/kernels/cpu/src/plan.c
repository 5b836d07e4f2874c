#include "plan.h"

#include <string.h>

/* One group: segments of 256. Several: a segment is a group, one above 1024 columns is cut in equal parts. */
int32_t ob_fill_segments(int64_t columns, int64_t groups, ob_segment *out, int32_t *num_blocks) {
    int64_t group_columns = columns / groups, part = OB_WHOLE_SEGMENT;
    if (groups > 1) part = ob_ceil_div(group_columns, ob_ceil_div(group_columns, OB_MAX_SEGMENT));
    int32_t count = 0, block = 0;
    for (int64_t group = 0; group < groups; group++) {
        for (int64_t begin = 0; begin < group_columns; begin += part, count++) {
            int64_t size = group_columns - begin < part ? group_columns - begin : part;
            int32_t blocks = (int32_t)ob_ceil_div(size, OB_BLOCK);
            if (out) {
                out[count] = (ob_segment){(int32_t)(group * group_columns + begin), (int32_t)size, block, blocks,
                                          (int32_t)group};
            }
            block += blocks;
        }
    }
    *num_blocks = block;
    return count;
}

static int64_t reserve(ob_blob *blob, int64_t bytes) {
    int64_t offset = blob->blob_bytes;
    blob->blob_bytes += ob_ceil_div(bytes, 64) * 64;
    return offset;
}

/* The set of this scale_in and grouping: one that is there, or a new one. `owners[s]` is the scale_in of set s. */
static int32_t find_set(ob_plan *plan, int64_t scale_in_p, int64_t groups, int64_t *owners, int64_t *set_groups) {
    int64_t columns = plan->operands->columns;
    size_t bytes = (size_t)columns * sizeof(float);
    for (int32_t s = 0; s < plan->blob.num_sets; s++) {
        if (set_groups[s] != groups || !owners[s] != !scale_in_p) continue;
        if (!scale_in_p || memcmp(ob_address(owners[s]), ob_address(scale_in_p), bytes) == 0) return s;
    }
    int32_t index = plan->blob.num_sets++;
    ob_set *set = plan->sets + index;
    owners[index] = scale_in_p;
    set_groups[index] = groups;
    set->num_segments = ob_fill_segments(columns, groups, NULL, &set->num_blocks);
    set->segments = reserve(&plan->blob, set->num_segments * (int64_t)sizeof(ob_segment));
    set->scale_in = scale_in_p ? reserve(&plan->blob, (int64_t)bytes) : 0;
    return index;
}

static int check_operands(const int64_t *operands, int64_t length) {
    int64_t fixed = sizeof(ob_operands) / sizeof(int64_t), per_term = sizeof(ob_term) / sizeof(int64_t);
    if (operands == NULL || length < fixed) return OB_ERROR_ARGUMENT;
    const ob_operands *o = (const ob_operands *)operands;
    if (o->num_terms < 0 || o->num_terms > OB_MAX_TERMS) return OB_ERROR_ARGUMENT;
    if (length != fixed + o->num_terms * per_term) return OB_ERROR_ARGUMENT;
    if (o->rows < 0 || o->columns < 1 || o->rows > INT32_MAX || o->columns > INT32_MAX / 64) return OB_ERROR_ARGUMENT;
    if (o->bytes_codes_p && (o->num_terms || o->sparse_bitmap_p || !o->bytes_scale_p)) return OB_ERROR_ARGUMENT;
    int has_sparse = o->sparse_bitmap_p != 0;
    if (has_sparse && (!o->sparse_scale_p || !o->sparse_zero_p || o->num_sparse < 0)) return OB_ERROR_ARGUMENT;
    if (has_sparse && o->num_sparse && !o->sparse_codes_p) return OB_ERROR_ARGUMENT;
    const ob_term *terms = (const ob_term *)(o + 1);
    for (int64_t t = 0; t < o->num_terms; t++) {
        const ob_term *term = terms + t;
        if (term->num_planes < 0 || term->num_planes > OB_MAX_PLANES) return OB_ERROR_ARGUMENT;
        if (term->num_planes && (!term->words_p || !term->coefficient_p)) return OB_ERROR_ARGUMENT;
        if (term->num_groups < 1 || o->columns % term->num_groups) return OB_ERROR_ARGUMENT;
    }
    return OB_OK;
}

/* Where a sparse part replaces the sum, a term with offsets gets the mask as one more plane, to take b off again. */
static void plan_term(ob_plan *plan, int64_t index, int32_t set) {
    const ob_term *term = plan->terms + index;
    ob_packed_term *packed = plan->packed + index;
    int32_t planes = (int32_t)term->num_planes;
    int32_t mask_planes = plan->operands->sparse_bitmap_p && term->offset_p;
    packed->set = set;
    packed->num_groups = (int32_t)term->num_groups;
    packed->num_planes = planes + mask_planes;
    packed->num_coefficients = (term->binary_code ? planes > 0 : planes) + mask_planes;
    packed->first_digits = term->binary_code && planes ? planes : 1;
    packed->has_offset = term->offset_p != 0;
    int64_t supertiles = plan->blob.num_supertiles, blocks = plan->sets[set].num_blocks;
    int64_t rows = packed->num_coefficients + packed->has_offset;
    packed->bits = reserve(&plan->blob, supertiles * blocks * packed->num_planes * OB_BLOCK_BYTES);
    int64_t row_bytes = OB_TILE * (int64_t)sizeof(float);
    packed->coefficients = reserve(&plan->blob, supertiles * packed->num_groups * rows * row_bytes);
}

static void plan_byte_part(ob_plan *plan, ob_byte_part *part, int32_t set, int is_sparse) {
    int64_t supertiles = plan->blob.num_supertiles, blocks = plan->sets[set].num_blocks;
    part->set = set;
    part->scale = reserve(&plan->blob, supertiles * OB_TILE * (int64_t)sizeof(float));
    part->zero = reserve(&plan->blob, supertiles * OB_TILE * (int64_t)sizeof(int32_t));
    if (is_sparse) {
        part->masks = reserve(&plan->blob, supertiles * blocks * 32 * (int64_t)sizeof(uint64_t));
        part->starts = reserve(&plan->blob, supertiles * 4 * (int64_t)sizeof(int64_t));
        part->codes = reserve(&plan->blob, plan->operands->num_sparse + 64);
    } else {
        part->codes = reserve(&plan->blob, supertiles * blocks * OB_PANEL_BYTES);
    }
}

int ob_make_plan(ob_plan *plan, const int64_t *operands, int64_t length, ob_bit_layout layout) {
    int status = check_operands(operands, length);
    if (status != OB_OK) return status;
    memset(plan, 0, sizeof *plan);
    const ob_operands *o = plan->operands = (const ob_operands *)operands;
    plan->terms = (const ob_term *)(o + 1);
    ob_blob *blob = &plan->blob;
    *blob = (ob_blob){.magic = OB_MAGIC, .version = OB_VERSION, .layout = layout, .rows = o->rows,
                      .columns = o->columns, .num_supertiles = ob_ceil_div(o->rows, OB_TILE),
                      .num_terms = (int32_t)o->num_terms};
    reserve(blob, sizeof *blob);
    blob->sets = reserve(blob, sizeof plan->sets);
    blob->terms = reserve(blob, o->num_terms * (int64_t)sizeof(ob_packed_term));
    int64_t owners[OB_MAX_TERMS + 1], set_groups[OB_MAX_TERMS + 1];
    for (int64_t t = 0; t < o->num_terms; t++) {
        const ob_term *term = plan->terms + t;
        plan_term(plan, t, find_set(plan, term->scale_in_p, term->num_groups, owners, set_groups));
    }
    if (o->bytes_codes_p || o->sparse_bitmap_p) {
        int32_t raw = find_set(plan, 0, 1, owners, set_groups);
        if (o->bytes_codes_p) plan_byte_part(plan, &blob->dense, raw, 0);
        if (o->sparse_bitmap_p) plan_byte_part(plan, &blob->sparse, raw, 1);
    }
    blob->bias = o->bias_p ? reserve(blob, blob->num_supertiles * OB_TILE * (int64_t)sizeof(float)) : 0;
    reserve(blob, 64); /* kernels may read one vector past the last part */
    return OB_OK;
}
