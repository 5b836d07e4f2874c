/* How many threads a product is worth, and a barrier for them. */
#ifndef ONEBIT_THREADS_H
#define ONEBIT_THREADS_H

#include <stdatomic.h>

/* Where the threads of one call wait for each other; zero it before use. */
typedef struct {
    atomic_int arrived;
    atomic_int round;
} ob_gate;

/* Return once all `workers` threads are here. They spin, because they arrive together; after a while they let others
 * run, so that a thread whose core was taken away is not starved by those that wait for it. */
void ob_gate_wait(ob_gate *gate, int workers);

/* How many threads, at most `threads`, work that takes one thread `seconds` is worth. Waking threads costs microseconds
 * where they spin between calls, and a hundred times that where they sleep or their cores are busy: it is measured when
 * first asked for, and again from time to time. */
int ob_threads_worth(double seconds, int threads);

#endif
