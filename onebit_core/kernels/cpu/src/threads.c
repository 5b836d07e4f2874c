/* See threads.h. */
#define _POSIX_C_SOURCE 200809L
#include "threads.h"

#include <sched.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    SPINS = 4000,                    /* some ten microseconds */
    TRIALS = 5,                      /* the median counts */
    MOST_THREADS = 256,              /* more are measured as so many */
    CALLS_PER_MEASUREMENT = 1 << 14, /* the machine may have become busy, or idle */
};

static void relax(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

void ob_gate_wait(ob_gate *gate, int workers) {
    if (workers == 1) return;
    int round = atomic_load_explicit(&gate->round, memory_order_acquire);
    if (atomic_fetch_add_explicit(&gate->arrived, 1, memory_order_acq_rel) == workers - 1) {
        atomic_store_explicit(&gate->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&gate->round, round + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&gate->round, memory_order_acquire) == round; spins++) {
        if (spins < SPINS) {
            relax();
        } else {
            sched_yield();
        }
    }
}

#ifdef _OPENMP
static const double PAUSE = 50e-6; /* between two products of a model that decodes */
static const double MARGIN = 1.25; /* how much several threads must promise to win */

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* What it takes to start `threads` threads on something and hear from all of them: the median of some trials, each
 * after a pause as a caller makes it. The first trial creates the threads and does not count. */
static double measure(int threads) {
    double cost[TRIALS];
    for (int trial = -1; trial < TRIALS; trial++) {
        double start = now();
        while (now() - start < PAUSE) relax();
        start = now();
        ob_gate gate = {0};
#pragma omp parallel num_threads(threads)
        ob_gate_wait(&gate, omp_get_num_threads());
        double took = now() - start;
        int place = trial;
        for (; place > 0 && cost[place - 1] > took; place--) cost[place] = cost[place - 1];
        if (trial >= 0) cost[place] = took;
    }
    return cost[TRIALS / 2];
}

/* Seconds that waking so many threads costs; 0: not measured yet. If two callers measure at once, both are right. */
static _Atomic double costs[MOST_THREADS + 1];
static atomic_uint calls;

static double cost_of(int threads) {
    int slot = threads < MOST_THREADS ? threads : MOST_THREADS;
    unsigned call = atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed);
    double cost = atomic_load_explicit(&costs[slot], memory_order_relaxed);
    if (cost == 0 || call % CALLS_PER_MEASUREMENT == CALLS_PER_MEASUREMENT - 1) {
        cost = measure(threads);
        atomic_store_explicit(&costs[slot], cost, memory_order_relaxed);
    }
    return cost;
}
#endif

int ob_threads_worth(double seconds, int threads) {
#ifdef _OPENMP
    static const double NEVER = 5e-6; /* no machine wakes a thread for less */
    double saved = seconds * (1 - 1 / (double)threads);
    if (threads == 1 || saved < NEVER || omp_in_parallel()) return 1;
    return saved > MARGIN * cost_of(threads) ? threads : 1;
#else
    (void)seconds;
    (void)threads;
    return 1;
#endif
}
