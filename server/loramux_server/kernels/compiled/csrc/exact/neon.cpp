// The kernels for aarch64.

#if defined(__aarch64__)
#include "compiled.h"

const ExactKernels* const kExactNeon = &kTable;
#else
#include "table.h"

const ExactKernels* const kExactNeon = nullptr;
#endif
