// Numbers of bf16: the upper halves of fp32.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
// Portable loops, compiled for several processors; the loader takes the best one.
#define LORAMUX_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LORAMUX_CLONES
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

}  // namespace
