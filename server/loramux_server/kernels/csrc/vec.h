// Numbers and vectors of bf16: the upper halves of fp32. What is written for an instruction set is marked here; its
// helpers stand here once, for all kernels.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define LORAMUX_AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
// Portable loops, compiled for several processors; the loader takes the best one.
#define LORAMUX_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define LORAMUX_CLONES_V3 __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define LORAMUX_CLONES
#define LORAMUX_CLONES_V3
#endif

namespace {

inline float widen(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

inline uint16_t narrow(float value) {  // round to nearest even; NaN stays NaN
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((word >> 16) | 0x40u);
    return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

#if defined(__x86_64__)

// The lanes that `left` numbers of 32 fill.
LORAMUX_AVX512BF16 inline __mmask32 mask32(int64_t left) {
    return left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1u;
}

LORAMUX_AVX512BF16 inline __m512i load32(const uint16_t* p, __mmask32 mask) {
    return _mm512_maskz_loadu_epi16(mask, p);
}

// The even and the odd ones of 32 bf16 numbers, as fp32.
LORAMUX_AVX512BF16 inline __m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
LORAMUX_AVX512BF16 inline __m512 odd(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// The reverse: rounded to bf16 and interleaved.
LORAMUX_AVX512BF16 inline __m512i round_pairs(__m512 evens, __m512 odds) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(evens));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odds));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Two numbers in every lane, for the pairwise dot product.
LORAMUX_AVX512BF16 inline __m512bh broadcast_pair(const uint16_t* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

// exp(x) for x <= 0, relative error below 2e-7: 2^n * p(f) with |f| <= ln(2) / 2 and a Taylor polynomial of degree 6.
LORAMUX_AVX512BF16 inline __m512 exp_nonpositive(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.f), x);  // in this order NaN stays NaN
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
    __m512 p = _mm512_set1_ps(1.f / 720);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f / 120));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f / 24));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f / 6));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(p, n);
}

#endif

}  // namespace
