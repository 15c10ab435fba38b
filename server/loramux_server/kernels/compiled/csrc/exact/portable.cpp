// The kernels for any processor; what the others are compared with.

#define LORAMUX_PORTABLE
#include "compiled.h"

const ExactKernels* const kExactPortable = &kTable;
