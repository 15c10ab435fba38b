// The kernels for x86-64-v3 with AVX-VNNI (laptops since 2021).

#if defined(__AVXVNNI__)
#include "compiled.h"

const ExactKernels* const kExactAvxVnni = &kTable;
#else
#include "table.h"

const ExactKernels* const kExactAvxVnni = nullptr;
#endif
