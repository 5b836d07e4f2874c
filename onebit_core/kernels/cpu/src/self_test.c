#include "self_test.h"

#include "onebit_cpu.h"

#include <stdlib.h>
#include <string.h>

enum { ROWS = 70, COLUMNS = 480, WORDS = COLUMNS / 32, GROUPS = 3, TOKENS = 19, PLANES = 4 };

typedef struct {
    uint32_t words[PLANES * ROWS * WORDS];
    float coefficients[PLANES * ROWS * GROUPS];
    float offsets[ROWS * GROUPS];
    float scale_in[COLUMNS];
    uint32_t bitmap[ROWS * WORDS];
    uint8_t sparse_codes[ROWS * COLUMNS];
    int8_t bytes[ROWS * COLUMNS];
    uint8_t zero[ROWS];
    float scale[ROWS], bias[ROWS];
    float x[TOKENS * COLUMNS];
    float expected[TOKENS * ROWS], found[TOKENS * ROWS];
    int64_t num_sparse;
} material;

static uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void fill_floats(float *values, int count, float scale, uint64_t *state) {
    for (int i = 0; i < count; i++) values[i] = scale * (float)((int)(next_random(state) >> 40) - (1 << 23));
}

static void fill_bytes(void *values, size_t count, uint64_t *state) {
    uint8_t *out = values;
    for (size_t i = 0; i < count; i++) out[i] = (uint8_t)(next_random(state) >> 32);
}

static void fill(material *m) {
    uint64_t state = 88172645463325252ULL;
    fill_bytes(m->words, sizeof m->words, &state);
    fill_bytes(m->bitmap, sizeof m->bitmap, &state);
    fill_bytes(m->sparse_codes, sizeof m->sparse_codes, &state);
    fill_bytes(m->bytes, sizeof m->bytes, &state);
    fill_bytes(m->zero, sizeof m->zero, &state);
    fill_floats(m->coefficients, PLANES * ROWS * GROUPS, 0x1p-23f, &state);
    fill_floats(m->offsets, ROWS * GROUPS, 0x1p-23f, &state);
    fill_floats(m->scale_in, COLUMNS, 0x1p-23f, &state);
    fill_floats(m->scale, ROWS, 0x1p-23f, &state);
    fill_floats(m->bias, ROWS, 0x1p-20f, &state);
    fill_floats(m->x, TOKENS * COLUMNS, 0x1p-20f, &state);
    for (int i = 0; i < COLUMNS; i++) m->x[COLUMNS + i] = i < 288 ? 8191.0f : -8191.0f; /* a table's largest sums */
    memset(m->words, 0xff, WORDS * sizeof(uint32_t));
    for (int i = 0; i < ROWS * WORDS; i++) m->num_sparse += __builtin_popcount(m->bitmap[i]);
}

static int64_t address(const void *pointer) {
    return (int64_t)(intptr_t)pointer;
}

static int multiply(const ob_tier *tier, const int64_t *operands, int64_t length, const material *m, float *y) {
    int64_t bytes = 0;
    if (ob_pack_with(tier->layout, operands, length, NULL, 0, 1, &bytes) != OB_OK) return 0;
    void *blob = aligned_alloc(64, (size_t)bytes);
    if (blob == NULL) return 0;
    int status = ob_pack_with(tier->layout, operands, length, blob, bytes, 1, &bytes);
    if (status == OB_OK) status = ob_matmul_with(tier, blob, m->x, OB_FLOAT32, TOKENS, COLUMNS, y, 1);
    /* one token more, alone: another kernel than in a batch */
    if (status == OB_OK) status = ob_matmul_with(tier, blob, m->x + COLUMNS, OB_FLOAT32, 1, COLUMNS, y + ROWS, 1);
    free(blob);
    return status == OB_OK;
}

static int agrees(const ob_tier *tier, const int64_t *operands, int64_t length, material *m) {
    return multiply(&ob_portable, operands, length, m, m->expected) && multiply(tier, operands, length, m, m->found) &&
           memcmp(m->expected, m->found, sizeof m->found) == 0;
}

int ob_self_test(const ob_tier *tier) {
    material *m = calloc(1, sizeof *m);
    if (m == NULL) return 0;
    fill(m);
    struct {
        ob_operands operands;
        ob_term terms[2];
    } mixed = {.operands = {.rows = ROWS, .columns = COLUMNS, .num_terms = 2, .bias_p = address(m->bias),
                            .sparse_bitmap_p = address(m->bitmap), .sparse_codes_p = address(m->sparse_codes),
                            .sparse_scale_p = address(m->scale), .sparse_zero_p = address(m->zero),
                            .num_sparse = m->num_sparse}};
    mixed.terms[0] = (ob_term){.words_p = address(m->words), .coefficient_p = address(m->coefficients), .num_planes = 2,
                               .scale_in_p = address(m->scale_in), .num_groups = 1};
    mixed.terms[1] = (ob_term){.words_p = address(m->words), .coefficient_p = address(m->coefficients),
                               .offset_p = address(m->offsets), .num_planes = PLANES, .num_groups = GROUPS,
                               .binary_code = 1};
    ob_operands dense = {.rows = ROWS, .columns = COLUMNS, .bytes_codes_p = address(m->bytes),
                         .bytes_scale_p = address(m->scale)};
    int good = agrees(tier, (const int64_t *)&mixed, sizeof mixed / sizeof(int64_t), m);
    mixed.operands.sparse_bitmap_p = 0; /* and without the planes that masks add */
    good = good && agrees(tier, (const int64_t *)&mixed, sizeof mixed / sizeof(int64_t), m) &&
               agrees(tier, (const int64_t *)&dense, sizeof dense / sizeof(int64_t), m);
    free(m);
    return good;
}
