#include "cpu.h"

extern "C" int32_t loramux_best_isa() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return kAvx512Bf16;
#endif
    return kPortable;
}
