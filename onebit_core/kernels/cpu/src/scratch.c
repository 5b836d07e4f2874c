#include "scratch.h"

#include <pthread.h>
#include <stdlib.h>

typedef struct {
    void *memory;
    int64_t bytes;
} holder;

static pthread_key_t key;
static pthread_once_t key_once = PTHREAD_ONCE_INIT;
static int key_is_made;
static _Thread_local holder *mine;

static void release(void *value) {
    holder *dead = value;
    free(dead->memory);
    free(dead);
}

static void make_key(void) {
    key_is_made = pthread_key_create(&key, release) == 0;
}

/* The library may be unloaded while threads live on; their destructor must not be called then. */
static __attribute__((destructor)) void drop_key(void) {
    if (!key_is_made) return;
    pthread_key_delete(key);
    if (mine) release(mine);
    mine = NULL;
}

void *ob_scratch(int64_t bytes) {
    if (mine == NULL) {
        pthread_once(&key_once, make_key);
        holder *fresh = key_is_made ? calloc(1, sizeof *fresh) : NULL;
        if (fresh == NULL) return NULL;
        if (pthread_setspecific(key, fresh) != 0) {
            free(fresh);
            return NULL;
        }
        mine = fresh;
    }
    if (mine->bytes < bytes) {
        free(mine->memory);
        mine->bytes = 0;
        int64_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        mine->memory = aligned_alloc(4096, (size_t)rounded);
        if (mine->memory == NULL) return NULL;
        mine->bytes = rounded;
    }
    return mine->memory;
}
