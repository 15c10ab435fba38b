// Vectors on AVX-512 (x86-64-v4); with AVX512-VNNI the pair product is one instruction.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Floats { __m512 v; };
struct Ints { __m512i v; };
struct Pairs { __m512i v; };  // 16 pairs of int16

constexpr int kProductRows = 8, kProductTiles = 2;  // of one product, so that sums and weights stay in registers
constexpr int kQueries = 12;                        // of one attention
constexpr int kShrinkSums = 16, kExpandSums = 8;    // of LoRA

inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline Floats splat(float x) { return {_mm512_set1_ps(x)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats absolute(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats pick_greater(Floats a, Floats b, Floats x, Floats y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}
// A bit for each lane.
inline uint32_t mask_greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Floats greater(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Ints nearest(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints no_ints() { return {_mm512_setzero_si512()}; }
inline Floats power_of_two(Ints n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}

inline Floats widen(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

inline void store_int16(int16_t* p, Ints a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}

inline Pairs load_pairs(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_pairs(int16_t* p, Pairs a) { _mm512_storeu_si512(p, a.v); }
inline Pairs splat_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return {_mm512_set1_epi32(pair)};
}
inline Ints dot(Ints sum, Pairs a, Pairs b) {
#if defined(__AVX512VNNI__)
    return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)};
#else
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}

class Levels {
  public:
    explicit Levels(const int16_t* levels) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels));
        table_ = _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
    }
    // Of an index only five bits count, and both halves of the table are the same.
    void decode(const uint8_t* codes, Pairs& first, Pairs& second) const {
        const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
        first = {_mm512_permutexvar_epi16(pairs, table_)};
        second = {_mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), table_)};
    }

  private:
    __m512i table_;
};

// Two times 16 pairs of numbers of 12 bits, 16 * high + low: high bytes [64], low halves of a byte [32] as codes lie.
inline void join_pairs(const int8_t* high, const uint8_t* low, Pairs& first, Pairs& second) {
    const auto* from = reinterpret_cast<const __m256i*>(high);
    const __m512i one = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256(from)), 4);
    const __m512i two = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256(from + 1)), 4);
    const __m512i lows = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
    first = {_mm512_ternarylogic_epi32(one, lows, _mm512_set1_epi16(15), 0xf8)};  // one | (lows & 15)
    second = {_mm512_or_si512(two, _mm512_srli_epi16(lows, 4))};
}

// 16 pairs from bytes [32], in the order of the outputs.
inline Pairs widen_pairs(const int8_t* p) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

// (a * by + 2^14) / 2^15, rounded down, of each number.
inline Pairs scaled(Pairs a, Pairs by) { return {_mm512_mulhrs_epi16(a.v, by.v)}; }
inline Pairs twice(Pairs a) { return {_mm512_add_epi16(a.v, a.v)}; }
// Of two neighbouring pairs the first numbers and then the second ones.
inline void store_by_outputs(uint64_t* p, Pairs a) {
    _mm512_storeu_si512(p, _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(a.v, 0xd8), 0xd8));
}

// Decoded pairs, and sums of them, in the order of the outputs.
inline Pairs ordered(Pairs a) { return a; }
inline Floats to_ordered_floats(Ints a) { return to_floats(a); }

inline float total(Floats a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
