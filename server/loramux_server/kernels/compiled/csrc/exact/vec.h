// Vectors of 16 numbers, on whatever this file is compiled for. Every operation is one of IEEE 754 (sum, product, quotient,
// fma, square root, comparison, rounding to even) or exact in integers, and every sum has one order: so all instruction sets
// give the same bits.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(LORAMUX_PORTABLE)
#include "vec_portable.h"
#elif defined(__AVX512BW__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#elif defined(__aarch64__)
#include "vec_neon.h"
#else
#include "vec_portable.h"
#endif

namespace {

constexpr int64_t kLanes = 16;

// Keeps the sum of a loop in its registers: GCC otherwise copies it to memory each time around, for after the loop.
template <class Sum>
inline void hold(Sum& sum) {
#if defined(LORAMUX_PORTABLE)
    (void)sum;
#elif defined(__AVX512BW__)
    __asm__("" : "+v"(sum.v));
#elif defined(__AVX2__)
    __asm__("" : "+x"(sum.v[0]), "+x"(sum.v[1]));
#else
    (void)sum;
#endif
}

inline float largest(Floats a) {
    float lanes[kLanes];
    store(lanes, a);
    float top = lanes[0];
    for (int k = 1; k < kLanes; ++k) top = lanes[k] > top ? lanes[k] : top;
    return top;
}

inline Floats lesser(Floats a, Floats b) { return pick_greater(b, a, a, b); }

// exp(x), relative error below 3e-7 over [-87, 88]; less is taken for -87, more for 88; NaN stays NaN.
// 2^n * p(r), |r| <= ln(2) / 2, p by Cephes' coefficients (https://www.netlib.org/cephes/, expf).
inline Floats exp_of(Floats x) {
    x = greater(splat(-87.f), lesser(splat(88.f), x));  // in this order NaN stays NaN
    const Ints n = nearest(x * splat(1.44269504088896341f));
    const Floats whole = to_floats(n);
    Floats r = fma(whole, splat(-0.693359375f), x);
    r = fma(whole, splat(2.12194440e-4f), r);
    Floats p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p * r, r, r) + splat(1.f);
    return p * power_of_two(n);
}

// The natural logarithm of a normal number above 0: x = 2^n * m, ln(m) = 2 * artanh((m - 1) / (m + 1)) as a series.
inline double log_of(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    int64_t n = static_cast<int64_t>(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
    double m;
    std::memcpy(&m, &bits, sizeof m);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        ++n;
    }
    const double s = (m - 1.0) / (m + 1.0), square = s * s;
    double series = 0.0;
    for (int k = 23; k >= 1; k -= 2) series = series * square + 1.0 / k;
    return static_cast<double>(n) * 0.6931471805599453 + 2.0 * s * series;
}

// tanh(x) = 1 - 2 / (exp(2x) + 1), absolute error below 2e-7.
inline Floats tanh_of(Floats x) {
    x = greater(splat(-20.f), lesser(splat(20.f), x));
    return splat(1.f) - splat(2.f) / (exp_of(x + x) + splat(1.f));
}

inline Floats silu_of(Floats x) { return x / (splat(1.f) + exp_of(splat(0.f) - x)); }

// GELU by tanh, as Gemma and GPT-2 have it.
inline Floats gelu_of(Floats x) {
    const Floats inner = splat(0.79788456080286536f) * fma(splat(0.044715f) * x * x, x, x);
    return splat(0.5f) * x * (splat(1.f) + tanh_of(inner));
}

inline float widen(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

}  // namespace
