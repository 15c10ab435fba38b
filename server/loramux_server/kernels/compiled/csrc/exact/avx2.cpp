// The kernels for x86-64-v3.

#if defined(__AVX2__) && defined(__FMA__)
#include "compiled.h"

const ExactKernels* const kExactAvx2 = &kTable;
#else
#include "table.h"

const ExactKernels* const kExactAvx2 = nullptr;
#endif
