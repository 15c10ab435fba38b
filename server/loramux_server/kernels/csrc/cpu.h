// The instruction sets that kernels are written for, and which of them this processor has: nobody else asks it.

#pragma once

#include <cstdint>

// Higher is faster. Kernels that have several paths are told which one to take; abi.py knows the same numbers.
enum Isa : int32_t { kPortable = 0, kAvx512Bf16 = 1 };

extern "C" {

// The highest that this processor runs.
int32_t loramux_best_isa();

}  // extern "C"
