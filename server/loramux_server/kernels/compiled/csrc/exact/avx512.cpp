// The kernels for x86-64-v4.

#if defined(__AVX512BW__)
#include "compiled.h"

const ExactKernels* const kExactAvx512 = &kTable;
#else
#include "table.h"

const ExactKernels* const kExactAvx512 = nullptr;
#endif
