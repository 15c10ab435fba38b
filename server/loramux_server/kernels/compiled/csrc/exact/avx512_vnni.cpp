// The kernels for x86-64-v4 with AVX512-VNNI.

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include "compiled.h"

const ExactKernels* const kExactAvx512Vnni = &kTable;
#else
#include "table.h"

const ExactKernels* const kExactAvx512Vnni = nullptr;
#endif
