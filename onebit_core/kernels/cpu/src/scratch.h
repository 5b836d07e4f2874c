/* One growing piece of memory per calling thread, freed when the thread ends. */
#ifndef OB_SCRATCH_H
#define OB_SCRATCH_H

#include <stdint.h>

/* At least `bytes` bytes, 64-byte aligned, undefined content, valid until the next call; NULL if memory is short. */
void *ob_scratch(int64_t bytes);

#endif
