#ifndef OB_SELF_TEST_H
#define OB_SELF_TEST_H

#include "tier.h"

/* Whether a tier gives the bits of portable C for small weights of every kind; 0 also where memory is short. */
int ob_self_test(const ob_tier *tier);

#endif
