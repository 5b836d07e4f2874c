/* The public C ABI of onebit's CPU kernels: plain functions, pointers and integers, loaded with ctypes.
 *
 * A weight is packed once (ob_pack_size, ob_pack) into one 64-byte aligned run of bytes, the blob, in the order that
 * the selected instruction set reads fastest, and multiplied from there (ob_matmul). A blob holds no pointers: it may
 * be copied and shared, but not stored on disk for another machine, for its order belongs to the instruction set.
 *
 * Functions that can fail return a status: OB_OK, or one of the codes below, worded by ob_error_text.
 * All functions may be called from several threads at a time, ob_select_isa excepted.
 */
#ifndef ONEBIT_CPU_H
#define ONEBIT_CPU_H

#include <stdint.h>

#if defined(_WIN32)
#define OB_API __declspec(dllexport)
#else
#define OB_API __attribute__((visibility("default")))
#endif

enum ob_status {
    OB_OK = 0,
    OB_ERROR_ARGUMENT = 1,        /* a size, a data type or an alignment that makes no sense */
    OB_ERROR_BLOB = 2,            /* not a blob of this version, or cut short */
    OB_ERROR_LAYOUT = 3,          /* a blob packed for another instruction set than the selected one */
    OB_ERROR_MEMORY = 4,          /* scratch memory could not be allocated */
    OB_ERROR_ISA_UNKNOWN = 5,     /* no instruction set of this name in this library */
    OB_ERROR_ISA_UNSUPPORTED = 6, /* this machine cannot run it */
    OB_ERROR_SELF_TEST = 7,       /* it disagreed with portable C on this machine and is not used */
};

enum ob_dtype { OB_FLOAT32 = 0, OB_BFLOAT16 = 1, OB_FLOAT16 = 2 };

/* What ob_pack reads, as int64 fields so that the caller can pass an array of 64-bit integers: ob_operands, followed at
 * once by num_terms times ob_term. Fields named *_p are addresses of contiguous tensors, 0 where the part is missing.
 * Shapes as in onebit_core/kernels/planes.py: O rows, I columns, W = ceil(I / 32), N = number of sparse weights. */
typedef struct {
    int64_t rows;            /* O */
    int64_t columns;         /* I */
    int64_t num_terms;       /* how many ob_term follow */
    int64_t bias_p;          /* float32 [O] */
    int64_t sparse_bitmap_p; /* int32 [O, W] */
    int64_t sparse_codes_p;  /* uint8 [N], row-major, columns ascending */
    int64_t sparse_scale_p;  /* float32 [O] */
    int64_t sparse_zero_p;   /* uint8 [O] */
    int64_t num_sparse;      /* N; checked against the bitmap */
    int64_t bytes_codes_p;   /* int8 [O, I]; comes without terms and without a sparse part */
    int64_t bytes_scale_p;   /* float32 [O] */
} ob_operands;

typedef struct {
    int64_t words_p;       /* int32 [Q, O, W] */
    int64_t coefficient_p; /* float32 [C, O, G], C = Q, or 1 for a binary code */
    int64_t offset_p;      /* float32 [O, G] */
    int64_t scale_in_p;    /* float32 [I] */
    int64_t num_planes;    /* Q, 0 to 8 */
    int64_t num_groups;    /* G, divides I */
    int64_t binary_code;   /* 1: plane q counts 2^q inside of one code */
} ob_term;

/* The version of this ABI and of the blob: 3. */
OB_API int ob_version(void);

/* What a status means, one English sentence; never NULL. */
OB_API const char *ob_error_text(int status);

/* The instruction sets that this machine can run, slowest first, separated by commas: "portable,avx2,avx512". */
OB_API const char *ob_isa_available(void);

/* Choose the instruction set by name; NULL, "" and "auto" choose the fastest one that passes its self-test, others are
 * an error where they are unknown, unsupported or wrong. Not while another thread packs or multiplies. The first call
 * of ob_pack_size, ob_pack, ob_matmul or ob_isa_name chooses "auto" where nothing was chosen. */
OB_API int ob_select_isa(const char *name);

/* The chosen instruction set. */
OB_API const char *ob_isa_name(void);

/* The instruction sets that "auto" passed over because their self-test failed, separated by commas; "" is normal. */
OB_API const char *ob_isa_refused(void);

/* How many bytes the blob of these operands takes with the chosen instruction set; minus a status where they make no
 * sense. `length` counts the int64 fields of `operands`. */
OB_API int64_t ob_pack_size(const int64_t *operands, int64_t length);

/* Write the blob. `blob` is 64-byte aligned and has `blob_bytes` = ob_pack_size bytes; `threads` >= 1. */
OB_API int ob_pack(const int64_t *operands, int64_t length, void *blob, int64_t blob_bytes, int threads);

/* y = x W^T + bias for `tokens` rows of x (0 is allowed). x and y have the data type `dtype` (ob_dtype) and `columns`
 * and `rows` elements a token, which must be the blob's; rows of x begin x_stride elements apart, y is contiguous. At
 * most `threads` threads work, and only where waking them costs less than it saves. */
OB_API int ob_matmul(const void *blob, int64_t blob_bytes, int64_t rows, int64_t columns, const void *x, int dtype,
                     int64_t tokens, int64_t x_stride, void *y, int threads);

/* All decoder blocks of a model of the Llama family over one step of a paged KV cache, float32. Like ob_operands these
 * are runs of int64; fields named *_p are addresses, 0 where the part is missing. */
typedef struct {
    int64_t blob_p, blob_bytes, rows, columns; /* as ob_matmul takes them; blob_p 0: nothing */
} ob_link;

typedef struct {
    ob_link links[2]; /* the second multiplies what the first gave */
} ob_chain;

typedef struct {
    int64_t input_norm_p, post_norm_p; /* float32 [D] */
    int64_t q_norm_p, k_norm_p;        /* float32 [head_dim]; of each head before its rotation */
    int64_t window;                    /* a token looks at so many keys at most, its own among them; 0: at all */
    ob_chain q, k, v, o, gate, up, down; /* where k is missing, q has the rows of k and v below its own; gate and up
                                            likewise */
} ob_decoder_layer;

typedef struct {
    int64_t num_layers, hidden, num_heads, num_kv_heads, head_dim, inner;
    int64_t final_norm_p; /* float32 [D] */
    int64_t norm_eps_p;   /* double */
    int64_t scaling_p;    /* double: of queries */
} ob_decoder;             /* num_layers times ob_decoder_layer follow at once */

/* Consecutive tokens of one sequence in a step. */
typedef struct {
    int64_t first, count; /* rows of the step */
    int64_t start;        /* position of the first in its sequence: it looks at start + 1 keys */
    int64_t pages;        /* where its page table begins in `pages` */
} ob_run;

typedef struct {
    int64_t tokens, num_runs, num_out;
    int64_t hidden_p;         /* float32 [tokens, D]: the embeddings; undefined afterwards */
    int64_t cos_p, sin_p;     /* float32 [tokens, head_dim] */
    int64_t keys_p, values_p; /* float32 [layers, pages, key heads, head_dim, 16] and [..., 16, head_dim] */
    int64_t layer_stride;     /* floats from layer to layer */
    int64_t slots_p;          /* int64 [tokens]: page * 16 + place in it */
    int64_t runs_p;           /* ob_run [num_runs] */
    int64_t pages_p;          /* int64 */
    int64_t out_rows_p;       /* int64 [num_out] */
    int64_t out_p;            /* float32 [num_out, D]: final norm of those rows */
} ob_decoder_step;

/* Run the blocks: write the tokens' keys and values, and the normalized last hidden states of some rows. `length` counts
 * the int64 fields of `decoder`. head_dim is a multiple of 16. */
OB_API int ob_decode(const int64_t *decoder, int64_t length, const int64_t *step, int threads);

#endif
