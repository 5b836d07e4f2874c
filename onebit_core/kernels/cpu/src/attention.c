/* See attention.h.
 *
 *     s_k = sum_d q_d K_dk          in the order of d, sixteen keys a vector
 *     p_k = exp(s_k - max s)        for the keys that the query may look at
 *     y_d = (sum_k p_k V_kd) / sum_k p_k     in the order of k, sixteen dimensions a vector
 *
 * Every sum has one order, whatever is attended together: a token's result is the same alone, in a batch, and in a chunk
 * of its prompt. Keys lie with their sixteen tokens side by side, so no sum runs across lanes.
 */
#include "attention.h"
#include "lanes.h"

enum { PAGES = 4, WIDTH = 4 }; /* pages of scores, and vectors of a value, in registers at a time */

int64_t ob_score_room(int64_t num_keys) {
    return (num_keys + PAGES * OB_PAGE_TOKENS - 1) / (PAGES * OB_PAGE_TOKENS) * (PAGES * OB_PAGE_TOKENS);
}

/* Scores of OB_QUERIES queries with `count` pages. */
OB_LANES_INLINE void score_pages(const ob_attention_job *job, int64_t first, int count, int64_t room) {
    ob_v16 sums[OB_QUERIES][PAGES];
    const float *page[PAGES];
    for (int p = 0; p < count; p++) page[p] = job->keys + job->pages[first + p] * job->page_stride;
    for (int q = 0; q < OB_QUERIES; q++) {
        for (int p = 0; p < count; p++) ob_fill(&sums[q][p], 0);
    }
    for (int64_t d = 0; d < job->head_dim; d++) {
        ob_v16 keys[PAGES];
        for (int p = 0; p < count; p++) ob_read(&keys[p], page[p] + d * OB_PAGE_TOKENS);
        for (int q = 0; q < OB_QUERIES; q++) {
            float query = job->queries[q][d];
            for (int p = 0; p < count; p++) sums[q][p] = sums[q][p] + query * keys[p];
        }
    }
    for (int q = 0; q < OB_QUERIES; q++) {
        float *scores = job->scores + q * room + first * OB_PAGE_TOKENS;
        for (int p = 0; p < count; p++) ob_write(scores + p * OB_PAGE_TOKENS, &sums[q][p]);
    }
}

/* Turn a query's scores from `begin` to `end`, multiples of sixteen, into exponentials, 0 outside of the keys
 * [first, last); returns one over their sum. */
OB_LANES_INLINE float exponentials(float *scores, int64_t first, int64_t last, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < first; k++) scores[k] = scores[first];
    for (int64_t k = last; k < end; k++) scores[k] = scores[first];
    float largest = ob_largest(scores + begin, end - begin);
    ob_v16 sum, value;
    for (int64_t k = begin; k < end; k += OB_LANES) {
        ob_read(&value, scores + k);
        value = value - largest;
        ob_exp(&value);
        ob_write(scores + k, &value);
    }
    for (int64_t k = begin; k < first; k++) scores[k] = 0;
    for (int64_t k = last; k < end; k++) scores[k] = 0;
    ob_fill(&sum, 0);
    for (int64_t k = begin; k < end; k += OB_LANES) {
        ob_read(&value, scores + k);
        sum = sum + value;
    }
    return 1 / ob_total(&sum);
}

/* Columns [begin, begin + 16 * width) of the weighted values of all queries, over the keys [least, most). */
OB_LANES_INLINE void weigh_values(const ob_attention_job *job, int64_t begin, int width, int64_t least, int64_t most,
                                  int64_t room, const float *shares) {
    ob_v16 sums[OB_QUERIES][WIDTH], value[WIDTH];
    for (int q = 0; q < OB_QUERIES; q++) {
        for (int w = 0; w < width; w++) ob_fill(&sums[q][w], 0);
    }
    for (int64_t first = least; first < most; first += OB_PAGE_TOKENS) {
        const float *page = job->values + job->pages[first / OB_PAGE_TOKENS] * job->page_stride + begin;
        int64_t last = first + OB_PAGE_TOKENS < most ? first + OB_PAGE_TOKENS : most;
        for (int64_t k = first; k < last; k++, page += job->head_dim) {
            for (int w = 0; w < width; w++) ob_read(&value[w], page + w * OB_LANES);
            for (int q = 0; q < OB_QUERIES; q++) {
                float weight = job->scores[q * room + k];
                for (int w = 0; w < width; w++) sums[q][w] = sums[q][w] + weight * value[w];
            }
        }
    }
    for (int q = 0; q < OB_QUERIES; q++) {
        for (int w = 0; w < width; w++) {
            ob_v16 share = sums[q][w] * shares[q];
            ob_write(job->out[q] + begin + w * OB_LANES, &share);
        }
    }
}

OB_CLONES static void attend_queries(const ob_attention_job *job) {
    int64_t least = job->first_key[0], most = job->num_keys[0];
    for (int q = 1; q < OB_QUERIES; q++) {
        least = job->first_key[q] < least ? job->first_key[q] : least;
        most = job->num_keys[q] > most ? job->num_keys[q] : most;
    }
    int64_t page = least / OB_PAGE_TOKENS, pages = (most + OB_PAGE_TOKENS - 1) / OB_PAGE_TOKENS;
    int64_t room = ob_score_room(most), begin = page * OB_PAGE_TOKENS;
    for (; page + PAGES <= pages; page += PAGES) score_pages(job, page, PAGES, room);
    for (; page < pages; page++) score_pages(job, page, 1, room);
    float shares[OB_QUERIES];
    for (int q = 0; q < OB_QUERIES; q++) {
        shares[q] = exponentials(job->scores + q * room, job->first_key[q], job->num_keys[q], begin,
                                 pages * OB_PAGE_TOKENS);
    }
    int64_t column = 0;
    for (; column + WIDTH * OB_LANES <= job->head_dim; column += WIDTH * OB_LANES) {
        weigh_values(job, column, WIDTH, begin, most, room, shares);
    }
    for (; column < job->head_dim; column += OB_LANES) weigh_values(job, column, 1, begin, most, room, shares);
}

void ob_attend(const ob_attention_job *job) {
    attend_queries(job); /* the clones of a function that others call would be exported */
}
