// Vectors as plain loops, for any processor: what the others are compared with. Where plain loops are slow on x86, `dot`
// and `fma` have another way to the same numbers.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace {

struct Floats { float v[16]; };
struct Ints { int32_t v[16]; };
struct Pairs { int16_t v[32]; };  // 16 pairs of int16

constexpr int kProductRows = 8, kProductTiles = 1;
constexpr int kQueries = 4;
constexpr int kShrinkSums = 4, kExpandSums = 4;

template <class To, class Make>
inline To each(const Make& make) {
    To to;
    for (int k = 0; k < 16; ++k) to.v[k] = make(k);
    return to;
}

inline Floats load(const float* p) {
    return each<Floats>([=](int k) { return p[k]; });
}
inline void store(float* p, Floats a) { std::memcpy(p, a.v, sizeof a.v); }
inline Floats splat(float x) {
    return each<Floats>([=](int) { return x; });
}
inline Floats operator+(Floats a, Floats b) {
    return each<Floats>([&](int k) { return a.v[k] + b.v[k]; });
}
inline Floats operator-(Floats a, Floats b) {
    return each<Floats>([&](int k) { return a.v[k] - b.v[k]; });
}
inline Floats operator*(Floats a, Floats b) {
    return each<Floats>([&](int k) { return a.v[k] * b.v[k]; });
}
inline Floats operator/(Floats a, Floats b) {
    return each<Floats>([&](int k) { return a.v[k] / b.v[k]; });
}
// Rounded once. Without an instruction for it the C library takes 90 ns, so it is a sum in double, where the product of
// two floats is exact. Rounding that sum to a float rounds a second time only where it lies midway between two floats, or
// below the normal ones: these few the library computes.
inline Floats fma(Floats a, Floats b, Floats c) {
#ifndef __FP_FAST_FMAF
    double sums[16];
    for (int k = 0; k < 16; ++k) sums[k] = static_cast<double>(a.v[k]) * b.v[k] + c.v[k];
    bool again = false;
    for (int k = 0; k < 16; ++k) {
        uint64_t bits;
        std::memcpy(&bits, &sums[k], sizeof bits);
        const uint64_t size = bits & 0x7fffffffffffffffu;
        again |= (bits & 0x1fffffffu) == 0x10000000u;
        again |= size - 1 < 0x380fffffffffffffu;  // more than zero, and below 2^-126
    }
    if (!again) return each<Floats>([&](int k) { return static_cast<float>(sums[k]); });
#endif
    return each<Floats>([&](int k) { return __builtin_fmaf(a.v[k], b.v[k], c.v[k]); });
}
inline Floats absolute(Floats a) {
    return each<Floats>([&](int k) { return __builtin_fabsf(a.v[k]); });
}
inline Floats pick_greater(Floats a, Floats b, Floats x, Floats y) {
    return each<Floats>([&](int k) { return a.v[k] > b.v[k] ? x.v[k] : y.v[k]; });
}
// A bit for each lane.
inline uint32_t mask_greater(Floats a, Floats b) {
    uint32_t mask = 0;
    for (int k = 0; k < 16; ++k) mask |= static_cast<uint32_t>(a.v[k] > b.v[k]) << k;
    return mask;
}
inline Floats greater(Floats a, Floats b) { return pick_greater(a, b, a, b); }
inline Ints nearest(Floats a) {  // to even; |a| < 2^22
    return each<Ints>([&](int k) {
        const float shifted = a.v[k] + 12582912.f;  // 1.5 * 2^23
        return static_cast<int32_t>(shifted - 12582912.f);
    });
}
inline Floats to_floats(Ints a) {
    return each<Floats>([&](int k) { return static_cast<float>(a.v[k]); });
}
inline Ints operator+(Ints a, Ints b) {
    return each<Ints>([&](int k) { return a.v[k] + b.v[k]; });
}
inline Ints no_ints() { return Ints{}; }
inline Floats power_of_two(Ints n) {
    return each<Floats>([&](int k) {
        const int32_t bits = static_cast<int32_t>(static_cast<uint32_t>(n.v[k] + 127) << 23);
        float power;
        std::memcpy(&power, &bits, sizeof power);
        return power;
    });
}

inline Floats widen(const uint16_t* p) {
    return each<Floats>([=](int k) {
        const uint32_t bits = static_cast<uint32_t>(p[k]) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    });
}

inline void store_int16(int16_t* p, Ints a) {
    for (int k = 0; k < 16; ++k) p[k] = static_cast<int16_t>(a.v[k]);
}

inline Pairs load_pairs(const int16_t* p) {
    Pairs pairs;
    std::memcpy(pairs.v, p, sizeof pairs.v);
    return pairs;
}
inline void store_pairs(int16_t* p, Pairs a) { std::memcpy(p, a.v, sizeof a.v); }
inline Pairs splat_pair(const int16_t* p) {
    uint32_t pair, lanes[16];
    std::memcpy(&pair, p, sizeof pair);
    for (int k = 0; k < 16; ++k) lanes[k] = pair;
    Pairs pairs;
    std::memcpy(pairs.v, lanes, sizeof pairs.v);
    return pairs;
}
inline Ints dot(Ints sum, Pairs a, Pairs b) {
#ifdef __SSE2__  // every x86-64; a product of 32 rows takes 2.6 times as long by the plain loop
    for (int k = 0; k < 16; k += 4) {
        const auto at = [k](const auto& vector) {
            const int per_lane = sizeof vector.v[0] == 2 ? 2 : 1;
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(&vector.v[k * per_lane]));
        };
        const __m128i added = _mm_add_epi32(at(sum), _mm_madd_epi16(at(a), at(b)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(&sum.v[k]), added);
    }
    return sum;
#else
    return each<Ints>(
        [&](int k) { return sum.v[k] + a.v[2 * k] * b.v[2 * k] + a.v[2 * k + 1] * b.v[2 * k + 1]; });
#endif
}

class Levels {
  public:
    explicit Levels(const int16_t* levels) { std::memcpy(table_, levels, sizeof table_); }
    void decode(const uint8_t* codes, Pairs& first, Pairs& second) const {
        for (int k = 0; k < 32; ++k) {
            first.v[k] = table_[codes[k] & 15];
            second.v[k] = table_[codes[k] >> 4];
        }
    }

  private:
    int16_t table_[16];
};

// Two times 16 pairs of numbers of 12 bits, 16 * high + low: high bytes [64], low halves of a byte [32] as codes lie.
inline void join_pairs(const int8_t* high, const uint8_t* low, Pairs& first, Pairs& second) {
    for (int k = 0; k < 32; ++k) {
        first.v[k] = static_cast<int16_t>(16 * high[k] + (low[k] & 15));
        second.v[k] = static_cast<int16_t>(16 * high[32 + k] + (low[k] >> 4));
    }
}

// 16 pairs from bytes [32], in the order of the outputs.
inline Pairs widen_pairs(const int8_t* p) {
    Pairs pairs;
    for (int k = 0; k < 32; ++k) pairs.v[k] = p[k];
    return pairs;
}


// (a * by + 2^14) / 2^15, rounded down, of each number.
inline Pairs scaled(Pairs a, Pairs by) {
    Pairs to;
    for (int k = 0; k < 32; ++k) to.v[k] = static_cast<int16_t>((a.v[k] * by.v[k] + (1 << 14)) >> 15);
    return to;
}
inline Pairs twice(Pairs a) {
    for (int k = 0; k < 32; ++k) a.v[k] = static_cast<int16_t>(2 * a.v[k]);
    return a;
}
// Of two neighbouring pairs the first numbers and then the second ones.
inline void store_by_outputs(uint64_t* p, Pairs a) {
    for (int k = 0; k < 32; k += 4) {
        const int16_t turned[4] = {a.v[k], a.v[k + 2], a.v[k + 1], a.v[k + 3]};
        std::memcpy(p + k / 4, turned, sizeof turned);
    }
}

// Decoded pairs, and sums of them, in the order of the outputs.
inline Pairs ordered(Pairs a) { return a; }
inline Floats to_ordered_floats(Ints a) { return to_floats(a); }

inline float total(Floats a) {
    for (int width = 8; width > 0; width /= 2)
        for (int k = 0; k < width; ++k) a.v[k] += a.v[k + width];
    return a.v[0];
}

}  // namespace
