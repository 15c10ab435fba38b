// Vectors on AVX2 and FMA (x86-64-v3): two registers each; with AVX-VNNI the pair product is one instruction.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Floats { __m256 v[2]; };
struct Ints { __m256i v[2]; };
struct Pairs { __m256i v[2]; };  // 16 pairs of int16

constexpr int kProductRows = 4, kProductTiles = 1;
constexpr int kQueries = 4;
constexpr int kShrinkSums = 4, kExpandSums = 4;

inline Floats load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
inline void store(float* p, Floats a) {
    _mm256_storeu_ps(p, a.v[0]);
    _mm256_storeu_ps(p + 8, a.v[1]);
}
inline Floats splat(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
inline Floats operator+(Floats a, Floats b) { return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}}; }
inline Floats operator-(Floats a, Floats b) { return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}}; }
inline Floats operator*(Floats a, Floats b) { return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}}; }
inline Floats operator/(Floats a, Floats b) { return {{_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1])}}; }
inline Floats fma(Floats a, Floats b, Floats c) {
    return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}
inline Floats absolute(Floats a) {
    const __m256 rest = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {{_mm256_and_ps(a.v[0], rest), _mm256_and_ps(a.v[1], rest)}};
}
inline Floats pick_greater(Floats a, Floats b, Floats x, Floats y) {
    return {{_mm256_blendv_ps(y.v[0], x.v[0], _mm256_cmp_ps(a.v[0], b.v[0], _CMP_GT_OQ)),
             _mm256_blendv_ps(y.v[1], x.v[1], _mm256_cmp_ps(a.v[1], b.v[1], _CMP_GT_OQ))}};
}
// A bit for each lane.
inline uint32_t mask_greater(Floats a, Floats b) {
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.v[0], b.v[0], _CMP_GT_OQ));
    return static_cast<uint32_t>(low | _mm256_movemask_ps(_mm256_cmp_ps(a.v[1], b.v[1], _CMP_GT_OQ)) << 8);
}
inline Floats greater(Floats a, Floats b) { return {{_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}}; }
inline Ints nearest(Floats a) { return {{_mm256_cvtps_epi32(a.v[0]), _mm256_cvtps_epi32(a.v[1])}}; }
inline Floats to_floats(Ints a) { return {{_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}}; }
inline Ints operator+(Ints a, Ints b) { return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}}; }
inline Ints no_ints() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
inline __m256 power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline Floats power_of_two(Ints n) { return {{power_of_two(n.v[0]), power_of_two(n.v[1])}}; }

inline __m256 widen8(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Floats widen(const uint16_t* p) { return {{widen8(p), widen8(p + 8)}}; }

inline void store_int16(int16_t* p, Ints a) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.v[0], a.v[1]), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}

inline Pairs load_pairs(const int16_t* p) {
    const auto* from = reinterpret_cast<const __m256i*>(p);
    return {{_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)}};
}
inline void store_pairs(int16_t* p, Pairs a) {
    auto* to = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(to, a.v[0]);
    _mm256_storeu_si256(to + 1, a.v[1]);
}
// A pair for all 16, read where it is used.
struct OnePair { const int16_t* at; };
inline OnePair splat_pair(const int16_t* p) { return {p}; }

// By hand: GCC 12 makes the products of all rows first, has not registers enough for them, and keeps sums in memory.
inline Ints dot(Ints sum, Pairs a, OnePair b) {
    using Word = int32_t __attribute__((may_alias, aligned(2)));
    __m256i pair;
#if defined(__AVXVNNI__)
    asm("vpbroadcastd %[at], %[pair]\n\t"
        "%{vex%} vpdpwssd %[low], %[pair], %[sum_low]\n\t"
        "%{vex%} vpdpwssd %[high], %[pair], %[sum_high]"
        : [sum_low] "+x"(sum.v[0]), [sum_high] "+x"(sum.v[1]), [pair] "=&x"(pair)
        : [low] "xm"(a.v[0]), [high] "xm"(a.v[1]), [at] "m"(*reinterpret_cast<const Word*>(b.at)));
#else
    __m256i product;
    asm("vpbroadcastd %[at], %[pair]\n\t"
        "vpmaddwd %[low], %[pair], %[product]\n\t"
        "vpmaddwd %[high], %[pair], %[pair]\n\t"
        "vpaddd %[product], %[sum_low], %[sum_low]\n\t"
        "vpaddd %[pair], %[sum_high], %[sum_high]"
        : [sum_low] "+x"(sum.v[0]), [sum_high] "+x"(sum.v[1]), [pair] "=&x"(pair), [product] "=&x"(product)
        : [low] "xm"(a.v[0]), [high] "xm"(a.v[1]), [at] "m"(*reinterpret_cast<const Word*>(b.at)));
#endif
    return sum;
}

// The halves of a level are looked up apart and put together, which leaves outputs 4 to 7 and 8 to 11 changed over.
class Levels {
  public:
    explicit Levels(const int16_t* levels) {
        const auto* from = reinterpret_cast<const __m128i*>(levels);
        const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1), low = _mm_set1_epi16(255);
        const __m128i lows = _mm_packus_epi16(_mm_and_si128(a, low), _mm_and_si128(b, low));
        const __m128i highs = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
        low_ = _mm256_set_m128i(lows, lows);
        high_ = _mm256_set_m128i(highs, highs);
    }
    void decode(const uint8_t* codes, Pairs& first, Pairs& second) const {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), mask = _mm256_set1_epi8(15);
        first = look_up(_mm256_and_si256(both, mask));
        second = look_up(_mm256_and_si256(_mm256_srli_epi16(both, 4), mask));
    }

  private:
    Pairs look_up(__m256i index) const {
        const __m256i low = _mm256_shuffle_epi8(low_, index), high = _mm256_shuffle_epi8(high_, index);
        return {{_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)}};
    }
    __m256i low_, high_;
};

// Two times 16 pairs of numbers of 12 bits, 16 * high + low: high bytes [64], low halves of a byte [32] as codes lie. They
// are put together sixteen times as large, which leaves outputs changed over as in Levels.
inline Pairs join(__m256i high, __m256i low) {
    return {{_mm256_srai_epi16(_mm256_unpacklo_epi8(low, high), 4), _mm256_srai_epi16(_mm256_unpackhi_epi8(low, high), 4)}};
}
inline void join_pairs(const int8_t* high, const uint8_t* low, Pairs& first, Pairs& second) {
    const auto* from = reinterpret_cast<const __m256i*>(high);
    const __m256i lows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(0xf0));
    first = join(_mm256_loadu_si256(from), _mm256_and_si256(_mm256_slli_epi16(lows, 4), mask));
    second = join(_mm256_loadu_si256(from + 1), _mm256_and_si256(lows, mask));
}

// 16 pairs from bytes [32], in the order of the outputs.
inline Pairs widen_pairs(const int8_t* p) {
    const auto* from = reinterpret_cast<const __m128i*>(p);
    return {{_mm256_cvtepi8_epi16(_mm_loadu_si128(from)), _mm256_cvtepi8_epi16(_mm_loadu_si128(from + 1))}};
}

// (a * by + 2^14) / 2^15, rounded down, of each number.
inline Pairs scaled(Pairs a, Pairs by) {
    return {{_mm256_mulhrs_epi16(a.v[0], by.v[0]), _mm256_mulhrs_epi16(a.v[1], by.v[1])}};
}
inline Pairs twice(Pairs a) { return {{_mm256_add_epi16(a.v[0], a.v[0]), _mm256_add_epi16(a.v[1], a.v[1])}}; }
// Of two neighbouring pairs the first numbers and then the second ones.
inline void store_by_outputs(uint64_t* p, Pairs a) {
    auto* to = reinterpret_cast<__m256i*>(p);
    for (int k = 0; k < 2; ++k)
        _mm256_storeu_si256(to + k, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(a.v[k], 0xd8), 0xd8));
}

// Decoded pairs, and sums of them, in the order of the outputs.
inline Pairs ordered(Pairs a) {
    return {{_mm256_permute2x128_si256(a.v[0], a.v[1], 0x20), _mm256_permute2x128_si256(a.v[0], a.v[1], 0x31)}};
}
inline Floats to_ordered_floats(Ints a) {
    const Floats b = to_floats(a);
    return {{_mm256_permute2f128_ps(b.v[0], b.v[1], 0x20), _mm256_permute2f128_ps(b.v[0], b.v[1], 0x31)}};
}

inline float total(Floats a) {
    const __m256 eight = _mm256_add_ps(a.v[0], a.v[1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
