// Vectors as plain loops, for any processor: what the others are compared with.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Floats { float v[16]; };
struct Ints { int32_t v[16]; };
struct Pairs { int16_t v[32]; };  // 16 pairs of int16

constexpr int kProductRows = 4, kProductTiles = 1;
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
inline Floats fma(Floats a, Floats b, Floats c) {
    return each<Floats>([&](int k) { return __builtin_fmaf(a.v[k], b.v[k], c.v[k]); });
}
inline Floats absolute(Floats a) {
    return each<Floats>([&](int k) { return __builtin_fabsf(a.v[k]); });
}
inline Floats pick_greater(Floats a, Floats b, Floats x, Floats y) {
    return each<Floats>([&](int k) { return a.v[k] > b.v[k] ? x.v[k] : y.v[k]; });
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
inline Pairs splat_pair(const int16_t* p) {
    Pairs pairs;
    for (int k = 0; k < 32; ++k) pairs.v[k] = p[k % 2];
    return pairs;
}
inline Ints dot(Ints sum, Pairs a, Pairs b) {
    return each<Ints>(
        [&](int k) { return sum.v[k] + a.v[2 * k] * b.v[2 * k] + a.v[2 * k + 1] * b.v[2 * k + 1]; });
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

// Sums of decoded pairs, in the order of the outputs.
inline Floats to_ordered_floats(Ints a) { return to_floats(a); }

inline float total(Floats a) {
    for (int width = 8; width > 0; width /= 2)
        for (int k = 0; k < width; ++k) a.v[k] += a.v[k + width];
    return a.v[0];
}

}  // namespace
