/* Which tier runs: the fastest that the machine supports and that proves itself, or the one asked for by name. */
#include "onebit_cpu.h"
#include "self_test.h"
#include "tier.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

/* Slowest first. */
static const ob_tier *const TIERS[] = {
    &ob_portable,
#if defined(__x86_64__)
    &ob_avx2,
    &ob_avx512,
    &ob_avx512vbmi,
    &ob_amx,
#endif
#if defined(__aarch64__)
    &ob_neon,
    &ob_neondot,
#endif
};

enum { NUM_TIERS = sizeof TIERS / sizeof TIERS[0], NAMES = 256 };

static _Atomic(const ob_tier *) current;
static pthread_once_t first_choice = PTHREAD_ONCE_INIT;
static char refused[NAMES];

static void append(char *names, const char *name) {
    if (names[0]) strncat(names, ",", NAMES - strlen(names) - 1);
    strncat(names, name, NAMES - strlen(names) - 1);
}

/* Portable C is what the others are held against; it is always there. */
static int choose_fastest(void) {
    refused[0] = 0;
    for (int i = NUM_TIERS - 1; i >= 0; i--) {
        if (!TIERS[i]->supported()) continue;
        if (i > 0 && !ob_self_test(TIERS[i])) {
            append(refused, TIERS[i]->name);
            continue;
        }
        atomic_store(&current, TIERS[i]);
        return OB_OK;
    }
    return OB_ERROR_SELF_TEST;
}

static void choose_once(void) {
    if (atomic_load(&current) == NULL) choose_fastest();
}

const ob_tier *ob_current_tier(void) {
    const ob_tier *tier = atomic_load_explicit(&current, memory_order_acquire);
    if (tier) return tier;
    pthread_once(&first_choice, choose_once);
    return atomic_load(&current);
}

int ob_select_isa(const char *name) {
    if (name == NULL || name[0] == 0 || strcmp(name, "auto") == 0) return choose_fastest();
    for (int i = 0; i < NUM_TIERS; i++) {
        if (strcmp(name, TIERS[i]->name) != 0) continue;
        if (!TIERS[i]->supported()) return OB_ERROR_ISA_UNSUPPORTED;
        if (i > 0 && !ob_self_test(TIERS[i])) return OB_ERROR_SELF_TEST;
        atomic_store(&current, TIERS[i]);
        return OB_OK;
    }
    return OB_ERROR_ISA_UNKNOWN;
}

const char *ob_isa_name(void) {
    return ob_current_tier()->name;
}

const char *ob_isa_refused(void) {
    ob_current_tier();
    return refused;
}

static char available[NAMES];
static pthread_once_t list_once = PTHREAD_ONCE_INIT;

static void list_available(void) {
    for (int i = 0; i < NUM_TIERS; i++) {
        if (TIERS[i]->supported()) append(available, TIERS[i]->name);
    }
}

const char *ob_isa_available(void) {
    pthread_once(&list_once, list_available);
    return available;
}

int ob_version(void) {
    return OB_VERSION;
}

const char *ob_error_text(int status) {
    switch (status) {
    case OB_OK: return "no error";
    case OB_ERROR_ARGUMENT: return "a size, data type, alignment or stride that makes no sense";
    case OB_ERROR_BLOB: return "not a packed weight of this version, or cut short";
    case OB_ERROR_LAYOUT: return "the weight was packed for another instruction set; pack it again";
    case OB_ERROR_MEMORY: return "out of memory for scratch space";
    case OB_ERROR_ISA_UNKNOWN: return "no such instruction set in this library";
    case OB_ERROR_ISA_UNSUPPORTED: return "this machine does not have the instruction set";
    case OB_ERROR_SELF_TEST: return "the instruction set computed a wrong result in its self-test";
    default: return "unknown status";
    }
}
