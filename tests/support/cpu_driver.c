/* Runs the C kernels without Python: every instruction set of this machine, odd shapes, random bits, compared with a
 * naive loop. For builds that Python cannot load: with sanitizers, or for another processor under an emulator.
 *   cc -fopenmp -I onebit_core/kernels/cpu/src tests/support/cpu_driver.c onebit_core/kernels/cpu/src/[a-z]*.c -lm
 *
 * Checked for every kind:
 *   exact    small integers for x and powers of two for coefficients give the naive result bit for bit
 *   near     random floats stay within the error of 14-bit activations
 *   equal    every instruction set, number of threads and batch size gives the bits that portable C gives
 * Buffers have exactly the size that the library is told, so that a sanitizer sees every step beyond.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "onebit_cpu.h"
enum { MAX_TERMS = 2, MAX_TOKENS = 33 };

typedef struct {
    int planes, groups, binary_code, with_offset, with_scale_in;
} term_shape;
typedef struct {
    const char *name;
    int rows, columns, num_terms, sparse_percent, bytes, bias;
    term_shape terms[MAX_TERMS];
} weight_shape;

typedef struct {
    uint32_t *words;
    float *coefficient, *offset, *scale_in;
} term_data;

typedef struct {
    term_data terms[MAX_TERMS];
    uint32_t *bitmap;
    uint8_t *codes, *zero, *dense_codes; /* dense_codes: the sparse codes at their places */
    float *sparse_scale, *bytes_scale, *bias;
    int8_t *bytes;
    int64_t num_sparse;
} weight_data;

static const weight_shape SHAPES[] = {
    {"one plane", 65, 300, 1, 0, 0, 1, {{1, 1, 0, 1, 1}}},
    {"one column", 3, 1, 1, 0, 0, 0, {{1, 1, 0, 1, 0}}},
    {"one row", 1, 31, 1, 0, 0, 1, {{1, 1, 0, 0, 1}}},
    {"whole tiles", 128, 512, 1, 0, 0, 0, {{1, 1, 0, 1, 1}}},
    {"odd groups", 17, 245, 1, 0, 0, 0, {{3, 7, 0, 1, 0}}},
    {"groups of 128", 63, 384, 1, 0, 0, 1, {{2, 3, 0, 1, 0}}},
    {"cut groups", 5, 2304, 1, 0, 0, 0, {{2, 2, 0, 1, 1}}},
    {"codes of 4 bits", 33, 256, 1, 0, 0, 0, {{4, 4, 1, 1, 0}}},
    {"codes of 8 bits", 16, 321, 1, 0, 0, 0, {{8, 1, 1, 1, 0}}},
    {"codes of 3 bits, odd groups", 19, 99, 1, 0, 0, 1, {{3, 3, 1, 1, 1}}},
    {"two terms", 66, 260, 2, 0, 0, 0, {{1, 1, 0, 1, 1}, {2, 4, 0, 1, 1}}},
    {"shifts only", 9, 70, 2, 0, 0, 0, {{1, 1, 0, 0, 1}, {0, 7, 0, 1, 0}}},
    {"sparse", 67, 325, 1, 12, 0, 1, {{1, 1, 0, 1, 1}}},
    {"sparse codes", 18, 192, 1, 30, 0, 0, {{2, 3, 1, 1, 0}}},
    {"everything sparse", 7, 65, 1, 100, 0, 0, {{1, 1, 0, 1, 0}}},
    {"bytes", 35, 333, 0, 0, 1, 1, {{0}}},
    {"whole tiles of bytes", 64, 256, 0, 0, 1, 0, {{0}}},
    {"enough work for threads", 321, 1027, 1, 5, 0, 1, {{1, 1, 0, 1, 1}}},
};

static const int TOKENS[] = {0, 1, 2, 3, 4, 5, 8, 9, 16, 17, MAX_TOKENS};

static uint64_t random_state = 88172645463325252u;

static uint32_t random_bits(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 16);
}

static void fail(const char *shape, const char *isa, const char *what) {
    fprintf(stderr, "FAILED: %s on %s: %s\n", shape, isa, what);
    exit(1);
}

/* Floats in -2..2, or for exact arithmetic of few powers of two. */
static float *random_factors(int64_t count, int exact) {
    static const float few[] = {0.5f, 1.0f, -1.0f, 2.0f, -0.5f};
    float *values = malloc(count * sizeof *values + 1);
    for (int64_t i = 0; i < count; i++)
        values[i] = exact ? few[random_bits() % 5] : (float)(int32_t)random_bits() / 1073741824.0f;
    return values;
}

/* Bits of several rows; those after the last column are 0, as in the format. */
static uint32_t *random_words(int64_t rows, int columns, int percent) {
    int words = (columns + 31) / 32;
    uint32_t *bits = calloc(rows * words + 1, sizeof *bits);
    for (int64_t row = 0; row < rows; row++)
        for (int i = 0; i < columns; i++)
            if (random_bits() % 100 < (uint32_t)percent) bits[row * words + i / 32] |= 1u << (i % 32);
    return bits;
}

static void make_sparse(const weight_shape *shape, weight_data *data, int exact) {
    int words = (shape->columns + 31) / 32;
    int64_t count = (int64_t)shape->rows * shape->columns, found = 0;
    data->bitmap = random_words(shape->rows, shape->columns, shape->sparse_percent);
    data->dense_codes = calloc(count, 1);
    data->codes = malloc(count);
    data->zero = malloc(shape->rows);
    data->sparse_scale = random_factors(shape->rows, exact);
    for (int o = 0; o < shape->rows; o++) {
        data->zero[o] = (uint8_t)random_bits();
        for (int i = 0; i < shape->columns; i++)
            if (data->bitmap[o * words + i / 32] >> (i % 32) & 1)
                data->codes[found++] = data->dense_codes[(int64_t)o * shape->columns + i] = (uint8_t)random_bits();
    }
    data->num_sparse = found;
    data->codes = realloc(data->codes, found + 1);
}

static weight_data make_weight(const weight_shape *shape, int exact) {
    weight_data data = {0};
    for (int t = 0; t < shape->num_terms; t++) {
        const term_shape *term = &shape->terms[t];
        term_data *made = &data.terms[t];
        int64_t codes = term->binary_code ? 1 : term->planes, per_plane = (int64_t)shape->rows * term->groups;
        made->words = random_words((int64_t)term->planes * shape->rows, shape->columns, 50);
        made->coefficient = random_factors(codes * per_plane, exact);
        if (term->with_offset) made->offset = random_factors(per_plane, exact);
        if (term->with_scale_in) made->scale_in = random_factors(shape->columns, exact);
    }
    if (shape->sparse_percent) make_sparse(shape, &data, exact);
    if (shape->bytes) {
        data.bytes = malloc((int64_t)shape->rows * shape->columns);
        for (int64_t i = 0; i < (int64_t)shape->rows * shape->columns; i++) data.bytes[i] = (int8_t)random_bits();
        data.bytes_scale = random_factors(shape->rows, exact);
    }
    if (shape->bias) data.bias = random_factors(shape->rows, exact);
    return data;
}

static void free_weight(weight_data *data) {
    for (int t = 0; t < MAX_TERMS; t++) {
        const term_data *term = &data->terms[t];
        void *parts[] = {term->words, term->coefficient, term->offset, term->scale_in};
        for (int i = 0; i < 4; i++) free(parts[i]);
    }
    void *rest[] = {data->bitmap,       data->codes,       data->zero, data->dense_codes,
                    data->sparse_scale, data->bytes_scale, data->bias, data->bytes};
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++) free(rest[i]);
}

/* One weight of one term without its input scale, and the sum of the absolute values of what it is made of. */
static double term_weight(const weight_shape *shape, const term_shape *term, const term_data *data, int o, int i,
                          double *magnitude) {
    int words = (shape->columns + 31) / 32, group = i / (shape->columns / term->groups);
    int64_t entry = (int64_t)o * term->groups + group, per_plane = (int64_t)shape->rows * term->groups;
    double offset = data->offset ? data->offset[entry] : 0.0, sum = offset;
    *magnitude = fabs(offset);
    for (int q = 0; q < term->planes; q++) {
        double factor = data->coefficient[term->binary_code ? entry : q * per_plane + entry];
        if (term->binary_code) factor = ldexp(factor, q);
        int bit = data->words[((int64_t)q * shape->rows + o) * words + i / 32] >> (i % 32) & 1;
        sum += bit * factor;
        *magnitude += fabs(factor);
    }
    return sum;
}

/* The naive loop: y_o in double for one token, and how far 14-bit activations may lie from it. The planes multiply x g,
 * the sparse and 8-bit parts x itself; each of them is rounded by at most its largest magnitude / 8190. */
static double naive(const weight_shape *shape, const weight_data *data, const float *x, int o, double *tolerance) {
    double sum = data->bias ? data->bias[o] : 0.0, largest[MAX_TERMS] = {0}, largest_x = 0.0, error = fabs(sum) * 1e-6;
    for (int i = 0; i < shape->columns; i++) {
        largest_x = fmax(largest_x, fabs(x[i]));
        for (int t = 0; t < shape->num_terms; t++) {
            double scale = data->terms[t].scale_in ? data->terms[t].scale_in[i] : 1.0;
            largest[t] = fmax(largest[t], fabs(x[i] * scale));
        }
    }
    for (int i = 0; i < shape->columns; i++) {
        int64_t place = (int64_t)o * shape->columns + i;
        int salient = data->bitmap && data->bitmap[o * ((shape->columns + 31) / 32) + i / 32] >> (i % 32) & 1;
        for (int t = 0; t < shape->num_terms; t++) {
            double magnitude, scale = data->terms[t].scale_in ? data->terms[t].scale_in[i] : 1.0;
            double weight = term_weight(shape, &shape->terms[t], &data->terms[t], o, i, &magnitude);
            sum += salient ? 0.0 : weight * scale * x[i];
            error += magnitude * largest[t] * (1.0 / 8190 + 1e-5);
        }
        if (data->bitmap) {
            int code = salient ? data->dense_codes[place] : data->zero[o];
            sum += (double)data->sparse_scale[o] * (code - data->zero[o]) * x[i];
            error += fabs(data->sparse_scale[o]) * 510 * largest_x * (1e-6 + salient / 8190.0);
        }
        if (data->bytes) {
            sum += (double)data->bytes_scale[o] * data->bytes[place] * x[i];
            error += fabs(data->bytes_scale[o]) * 128 * largest_x * (1.0 / 8190 + 1e-6);
        }
    }
    *tolerance = error;
    return sum;
}

static int64_t fill_operands(const weight_shape *shape, const weight_data *data, int64_t *fields) {
    ob_operands head = {.rows = shape->rows, .columns = shape->columns, .num_terms = shape->num_terms};
    head.bias_p = (intptr_t)data->bias;
    head.sparse_bitmap_p = (intptr_t)data->bitmap;
    head.sparse_codes_p = (intptr_t)data->codes;
    head.sparse_scale_p = (intptr_t)data->sparse_scale;
    head.sparse_zero_p = (intptr_t)data->zero;
    head.num_sparse = data->num_sparse;
    head.bytes_codes_p = (intptr_t)data->bytes;
    head.bytes_scale_p = (intptr_t)data->bytes_scale;
    memcpy(fields, &head, sizeof head);
    int64_t length = sizeof head / sizeof *fields;
    for (int t = 0; t < shape->num_terms; t++) {
        const term_shape *term = &shape->terms[t];
        const term_data *made = &data->terms[t];
        ob_term one = {(intptr_t)made->words,    (intptr_t)made->coefficient, (intptr_t)made->offset,
                       (intptr_t)made->scale_in, term->planes,                term->groups,
                       term->binary_code};
        memcpy(fields + length, &one, sizeof one);
        length += sizeof one / sizeof *fields;
    }
    return length;
}

typedef struct { void *bytes; int64_t size; } packed;

static packed pack(const weight_shape *shape, const weight_data *data, const char *isa, int threads) {
    int64_t fields[64], length = fill_operands(shape, data, fields);
    packed blob = {NULL, ob_pack_size(fields, length)};
    if (blob.size <= 0) fail(shape->name, isa, ob_error_text((int)-blob.size));
    if (posix_memalign(&blob.bytes, 64, blob.size)) fail(shape->name, isa, "no memory");
    memset(blob.bytes, 0xA5, blob.size);
    int status = ob_pack(fields, length, blob.bytes, blob.size, threads);
    if (status) fail(shape->name, isa, ob_error_text(status));
    return blob;
}

/* x as the library takes it: rows `stride` apart, the last one not a byte longer than its columns. */
static void *to_dtype(const float *x, int columns, int tokens, int stride, int dtype) {
    size_t size = dtype == OB_FLOAT32 ? 4 : 2;
    char *out = malloc(tokens ? ((int64_t)(tokens - 1) * stride + columns) * size : 1);
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < columns; i++) {
            void *at = out + ((int64_t)t * stride + i) * size;
            float value = x[(int64_t)t * columns + i];
            _Float16 half = (_Float16)value;
            uint32_t bits;
            memcpy(&bits, &value, 4);
            uint16_t top = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
            memcpy(at, dtype == OB_FLOAT32 ? (void *)&value : dtype == OB_FLOAT16 ? (void *)&half : (void *)&top, size);
        }
    return out;
}

static void from_dtype(const void *values, int64_t count, int dtype, float *out) {
    for (int64_t i = 0; i < count; i++) {
        union { uint16_t bits; _Float16 half; } two;
        memcpy(&two, (const char *)values + 2 * i, 2);
        uint32_t wide = (uint32_t)two.bits << 16;
        memcpy(out + i, dtype == OB_FLOAT32 ? (const char *)values + 4 * i : (const char *)&wide, 4);
        if (dtype == OB_FLOAT16) out[i] = (float)two.half;
    }
}

static void *multiply(const weight_shape *shape, packed blob, const float *x, int tokens, int dtype, int threads,
                      const char *isa) {
    int stride = shape->columns + (tokens % 3);
    void *input = to_dtype(x, shape->columns, tokens, stride, dtype);
    void *y = malloc((int64_t)tokens * shape->rows * (dtype == OB_FLOAT32 ? 4 : 2) + (tokens == 0));
    int64_t n = shape->rows, k = shape->columns;
    int status = ob_matmul(blob.bytes, blob.size, n, k, input, dtype, tokens, stride, y, threads);
    if (status) fail(shape->name, isa, ob_error_text(status));
    free(input);
    return y;
}

/* What the naive loop gives, in the data type of y. */
static float in_dtype(double value, int dtype) {
    float y = (float)value, rounded;
    void *stored = to_dtype(&y, 1, 1, 1, dtype);
    from_dtype(stored, 1, dtype, &rounded);
    free(stored);
    return rounded;
}

/* y of portable C against the naive loop on the same rounded x. */
static void check_naive(const weight_shape *shape, const weight_data *data, const float *x, const void *y, int dtype,
                        int exact) {
    static const double rounding[] = {1e-7, 0x1p-8, 0x1p-11};
    for (int t = 0; t < MAX_TOKENS; t += t < 4 ? 1 : 7)
        for (int o = 0; o < shape->rows; o++) {
            double tolerance, truth = naive(shape, data, x + (int64_t)t * shape->columns, o, &tolerance);
            float found, expected = in_dtype(truth, dtype);
            size_t size = dtype == OB_FLOAT32 ? 4 : 2;
            from_dtype((const char *)y + ((int64_t)t * shape->rows + o) * size, 1, dtype, &found);
            int near = fabs(found - truth) <= tolerance + fabs(truth) * rounding[dtype] || fabs(truth) > 6e4;
            if (exact ? found == expected : near) continue;
            fprintf(stderr, "token %d row %d dtype %d: %.9g, expected %.9g within %g\n", t, o, dtype, found, truth,
                    exact ? 0.0 : tolerance);
            fail(shape->name, "portable", exact ? "not exact" : "not near");
        }
}

/* A NaN or an infinity spoils its own token entirely and no other. */
static void check_nan(const weight_shape *shape, packed blob, float *x, const float *clean, const char *isa) {
    float *place = x + shape->columns + shape->columns / 2, before = *place; /* of token 1 */
    *place = random_bits() % 2 ? NAN : -INFINITY;
    float *y = multiply(shape, blob, x, 3, OB_FLOAT32, 1, isa);
    for (int o = 0; o < 3 * shape->rows; o++)
        if (o / shape->rows == 1 ? !isnan(y[o]) : memcmp(y + o, clean + o, 4) != 0) fail(shape->name, isa, "NaN");
    *place = before;
    free(y);
}

/* x in every data type, and what portable C makes of it. */
typedef struct {
    float *x[3];
    void *y[3];
} truth;

static truth make_truth(const weight_shape *shape, const weight_data *data, int exact) {
    int64_t count = (int64_t)MAX_TOKENS * shape->columns;
    truth made;
    ob_select_isa("portable");
    packed blob = pack(shape, data, "portable", 1);
    for (int dtype = OB_FLOAT32; dtype <= OB_FLOAT16; dtype++) {
        float *x = made.x[dtype] = random_factors(count, 0);
        for (int64_t i = 0; i < count; i++)
            x[i] = exact ? (int)(random_bits() % 17) - 8 : ldexpf(x[i], random_bits() % 8);
        memset(x, 0, shape->columns * sizeof *x); /* token 0: nothing; token 2: the largest integers there are */
        for (int i = 0; i < shape->columns; i++) x[2 * shape->columns + i] = exact ? 8.0f : 0x1.fffffep3f;
        void *rounded = to_dtype(x, shape->columns, MAX_TOKENS, shape->columns, dtype);
        from_dtype(rounded, count, dtype, x);
        free(rounded);
        made.y[dtype] = multiply(shape, blob, x, MAX_TOKENS, dtype, 1, "portable");
        check_naive(shape, data, x, made.y[dtype], dtype, exact);
    }
    free(blob.bytes);
    return made;
}

static void check_isa(const weight_shape *shape, const weight_data *data, const truth *truth, const char *isa) {
    packed blob = pack(shape, data, isa, 2);
    for (int dtype = OB_FLOAT32; dtype <= OB_FLOAT16; dtype++)
        for (size_t i = 0; i < sizeof TOKENS / sizeof *TOKENS; i++) {
            void *y = multiply(shape, blob, truth->x[dtype], TOKENS[i], dtype, 1 + i % 3, isa);
            size_t size = TOKENS[i] * shape->rows * (dtype == OB_FLOAT32 ? 4 : 2);
            if (memcmp(y, truth->y[dtype], size)) fail(shape->name, isa, "differs from portable C");
            free(y);
        }
    check_nan(shape, blob, truth->x[OB_FLOAT32], truth->y[OB_FLOAT32], isa);
    free(blob.bytes);
}

/* What makes no sense is refused with a status, and nothing is read or written beyond what was handed in. */
static void check_refusals(const weight_shape *shape) {
    weight_data data = make_weight(shape, 0);
    packed blob = pack(shape, &data, "auto", 1);
    float x[300] = {0}, y[65];
    int64_t rows = shape->rows, columns = shape->columns, fields[64], length = fill_operands(shape, &data, fields);
    for (int64_t size = 0; size < blob.size; size += 1 + size / 8) {
        void *cut = NULL;
        if (posix_memalign(&cut, 64, size + 1)) fail(shape->name, "auto", "no memory");
        memcpy(cut, blob.bytes, size);
        int status = ob_matmul(cut, size, rows, columns, x, OB_FLOAT32, 1, 300, y, 1);
        if (status == OB_OK) fail(shape->name, "auto", "took a cut blob");
        free(cut);
    }
    for (int i = 0; i < 3; i++) { /* a row too few, a column too few, a data type that does not exist */
        int64_t n = rows - (i == 0), k = columns - (i == 1), dtype = i == 2 ? 7 : OB_FLOAT32;
        int status = ob_matmul(blob.bytes, blob.size, n, k, x, (int)dtype, 1, 300, y, 1);
        if (status == OB_OK) fail(shape->name, "auto", "took what is not its own");
    }
    if (ob_pack(fields, length, blob.bytes, blob.size - 1, 1) == OB_OK) fail(shape->name, "auto", "packed beyond");
    if (ob_pack_size(fields, length - 1) > 0 || ob_pack_size(fields, 3) > 0) fail(shape->name, "auto", "read beyond");
    if (ob_select_isa("nonsense") != OB_ERROR_ISA_UNKNOWN) fail("nonsense", "auto", "selected");
    free(blob.bytes);
    free_weight(&data);
}

int main(void) {
    enum { CASES = 2 * sizeof SHAPES / sizeof *SHAPES };
    static weight_data data[CASES];
    static truth truths[CASES];
    char available[256] = "";
    strncat(available, ob_isa_available(), sizeof available - 1);
    if (*ob_isa_refused()) fail("self-test", ob_isa_refused(), "refused");
    for (int i = 0; i < CASES; i++) {
        data[i] = make_weight(&SHAPES[i / 2], i % 2); /* odd ones: exact arithmetic */
        truths[i] = make_truth(&SHAPES[i / 2], &data[i], i % 2);
    }
    for (char *isa = strtok(available, ","); isa; isa = strtok(NULL, ",")) {
        if (ob_select_isa(isa)) fail("self-test", isa, "failed");
        for (int i = 0; i < CASES; i++) check_isa(&SHAPES[i / 2], &data[i], &truths[i], isa);
        puts(isa);
    }
    check_refusals(&SHAPES[0]);
    for (int i = 0; i < CASES; i++) {
        for (int dtype = OB_FLOAT32; dtype <= OB_FLOAT16; dtype++) free(truths[i].x[dtype]), free(truths[i].y[dtype]);
        free_weight(&data[i]);
    }
    return 0;
}
