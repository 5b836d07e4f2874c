/* Attention of some consecutive tokens of one sequence over its pages, for one key head. */
#ifndef OB_ATTENTION_H
#define OB_ATTENTION_H

#include <stdint.h>

enum {
    OB_PAGE_TOKENS = 16, /* tokens of a page: one for each lane */
    OB_QUERIES = 4,      /* queries that are attended together */
};

/* A page of a layer holds, for each key head, keys as [D][16] and, in a page of the same size, values as [16][D]. */
typedef struct {
    const float *keys;     /* of this layer and key head: page p begins at keys + p * page_stride */
    const float *values;
    int64_t page_stride;   /* floats from page to page */
    const int64_t *pages;  /* of the sequence, in order */
    int64_t head_dim;      /* D, a multiple of 16 */
    const float *queries[OB_QUERIES]; /* D floats each, scaled */
    int64_t first_key[OB_QUERIES];    /* each looks at the keys from here ... */
    int64_t num_keys[OB_QUERIES];     /* ... to before here, at least one */
    float *out[OB_QUERIES];           /* D floats each */
    float *scores; /* room for OB_QUERIES * ob_score_room(most keys) */
} ob_attention_job;

/* Floats of one query's scores over so many keys. */
int64_t ob_score_room(int64_t num_keys);

/* out = softmax(queries keys^T) values. Fewer queries are named twice. */
void ob_attend(const ob_attention_job *job);

#endif
