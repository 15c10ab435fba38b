#include "exact.h"

#include "table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#if defined(__x86_64__)
// Not among the names that older compilers know. Leaf 7, subleaf 1, EAX bit 4.
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
}
#endif

const ExactKernels* kernels_of(int32_t isa) {
    switch (isa) {
        case kVectorAvx2: return kExactAvx2;
        case kVectorAvxVnni: return kExactAvxVnni;
        case kVectorAvx512: return kExactAvx512;
        case kVectorAvx512Vnni: return kExactAvx512Vnni;
        case kVectorNeon: return kExactNeon;
        default: return kExactPortable;
    }
}

bool runs_here(int32_t isa) {
    if (isa == kVectorPortable) return true;
#if defined(__x86_64__)
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    switch (isa) {
        case kVectorAvx2: return v3;
        case kVectorAvxVnni: return v3 && has_avx_vnni();
        case kVectorAvx512: return v4;
        case kVectorAvx512Vnni: return v4 && __builtin_cpu_supports("avx512vnni");
        default: return false;
    }
#elif defined(__aarch64__)
    return isa == kVectorNeon;
#else
    return false;
#endif
}

}  // namespace

extern "C" {

int32_t loramux_exact_isas() {
    int32_t found = 0;
    for (int32_t isa = kVectorPortable; isa <= kVectorNeon; ++isa)
        if (kernels_of(isa) && runs_here(isa)) found |= 1 << isa;
    return found;
}

void loramux_exact_product(float* y, const float* x, const uint8_t* codes, const float* scales, int64_t rows,
                           int64_t in, int64_t out, int32_t isa, int32_t threads) {
    kernels_of(isa)->product(y, x, codes, scales, rows, in, out, threads);
}

void loramux_exact_pack_head(int16_t* numbers, float* scales, const uint16_t* w, int64_t vocabulary, int64_t padded,
                             int64_t in, int32_t isa, int32_t threads) {
    kernels_of(isa)->pack_head(numbers, scales, w, vocabulary, padded, in, threads);
}

int64_t loramux_exact_scratch(const ExactModel* model, int64_t rows) { return kExactPortable->scratch(model, rows); }

void loramux_exact_step(const ExactModel* model, const ExactStep* step, int32_t isa) {
    kernels_of(isa)->step(model, step);
}

}  // extern "C"
