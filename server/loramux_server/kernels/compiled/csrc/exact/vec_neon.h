// Vectors on aarch64 (NEON): four registers each.

#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

struct Floats { float32x4_t v[4]; };
struct Ints { int32x4_t v[4]; };
// 16 pairs of int16, the first of each pair apart from the second: products of a lane with one number need no other
// instruction then, and are added to int32 by the same.
struct Pairs { int16x8_t first[2], second[2]; };
struct OnePair { int16x4_t v; };  // in its first two lanes; for all 16

constexpr int kProductRows = 4, kProductTiles = 1;
constexpr int kQueries = 2;
constexpr int kShrinkSums = 4, kExpandSums = 4;

template <class To, class Make>
inline To four(const Make& make) {
    return {{make(0), make(1), make(2), make(3)}};
}

inline Floats load(const float* p) {
    return four<Floats>([=](int k) { return vld1q_f32(p + 4 * k); });
}
inline void store(float* p, Floats a) {
    for (int k = 0; k < 4; ++k) vst1q_f32(p + 4 * k, a.v[k]);
}
inline Floats splat(float x) {
    return four<Floats>([=](int) { return vdupq_n_f32(x); });
}
inline Floats operator+(Floats a, Floats b) {
    return four<Floats>([=](int k) { return vaddq_f32(a.v[k], b.v[k]); });
}
inline Floats operator-(Floats a, Floats b) {
    return four<Floats>([=](int k) { return vsubq_f32(a.v[k], b.v[k]); });
}
inline Floats operator*(Floats a, Floats b) {
    return four<Floats>([=](int k) { return vmulq_f32(a.v[k], b.v[k]); });
}
inline Floats operator/(Floats a, Floats b) {
    return four<Floats>([=](int k) { return vdivq_f32(a.v[k], b.v[k]); });
}
inline Floats fma(Floats a, Floats b, Floats c) {
    return four<Floats>([=](int k) { return vfmaq_f32(c.v[k], a.v[k], b.v[k]); });
}
inline Floats absolute(Floats a) {
    return four<Floats>([=](int k) { return vabsq_f32(a.v[k]); });
}
inline Floats pick_greater(Floats a, Floats b, Floats x, Floats y) {
    return four<Floats>([=](int k) { return vbslq_f32(vcgtq_f32(a.v[k], b.v[k]), x.v[k], y.v[k]); });
}
// A bit for each lane.
inline uint32_t mask_greater(Floats a, Floats b) {
    const uint32_t ones[4] = {1, 2, 4, 8};
    uint32_t mask = 0;
    for (int k = 0; k < 4; ++k) mask |= vaddvq_u32(vandq_u32(vcgtq_f32(a.v[k], b.v[k]), vld1q_u32(ones))) << 4 * k;
    return mask;
}
inline Floats greater(Floats a, Floats b) { return pick_greater(a, b, a, b); }
inline Ints nearest(Floats a) {
    return four<Ints>([=](int k) { return vcvtnq_s32_f32(a.v[k]); });
}
inline Floats to_floats(Ints a) {
    return four<Floats>([=](int k) { return vcvtq_f32_s32(a.v[k]); });
}
inline Ints operator+(Ints a, Ints b) {
    return four<Ints>([=](int k) { return vaddq_s32(a.v[k], b.v[k]); });
}
inline Ints no_ints() {
    return four<Ints>([](int) { return vdupq_n_s32(0); });
}
inline Floats power_of_two(Ints n) {
    return four<Floats>(
        [=](int k) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.v[k], vdupq_n_s32(127)), 23)); });
}

inline Floats widen(const uint16_t* p) {
    return four<Floats>([=](int k) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * k), 16)); });
}

inline void store_int16(int16_t* p, Ints a) {
    vst1q_s16(p, vmovn_high_s32(vmovn_s32(a.v[0]), a.v[1]));
    vst1q_s16(p + 8, vmovn_high_s32(vmovn_s32(a.v[2]), a.v[3]));
}

inline Pairs load_pairs(const int16_t* p) {
    const int16x8x2_t low = vld2q_s16(p), high = vld2q_s16(p + 16);
    return {{low.val[0], high.val[0]}, {low.val[1], high.val[1]}};
}
inline void store_pairs(int16_t* p, Pairs a) {
    for (int k = 0; k < 2; ++k) vst2q_s16(p + 16 * k, {{a.first[k], a.second[k]}});
}
inline OnePair splat_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return {vreinterpret_s16_s32(vset_lane_s32(pair, vdup_n_s32(0), 0))};
}
inline int32x4_t dot_low(int32x4_t sum, int16x8_t first, int16x8_t second, OnePair b) {
    return vmlal_lane_s16(vmlal_lane_s16(sum, vget_low_s16(first), b.v, 0), vget_low_s16(second), b.v, 1);
}
inline int32x4_t dot_high(int32x4_t sum, int16x8_t first, int16x8_t second, OnePair b) {
    return vmlal_high_lane_s16(vmlal_high_lane_s16(sum, first, b.v, 0), second, b.v, 1);
}
inline Ints dot(Ints sum, Pairs a, OnePair b) {
    return {{dot_low(sum.v[0], a.first[0], a.second[0], b), dot_high(sum.v[1], a.first[0], a.second[0], b),
             dot_low(sum.v[2], a.first[1], a.second[1], b), dot_high(sum.v[3], a.first[1], a.second[1], b)}};
}

class Levels {
  public:
    explicit Levels(const int16_t* levels) {
        const uint8x16x2_t bytes = vld2q_u8(reinterpret_cast<const uint8_t*>(levels));
        low_ = bytes.val[0];
        high_ = bytes.val[1];
    }
    void decode(const uint8_t* codes, Pairs& first, Pairs& second) const {
        const uint8x16x2_t both = vld2q_u8(codes);  // of inputs 0 and 2, of inputs 1 and 3
        const uint8x16_t mask = vdupq_n_u8(15);
        look_up(first.first, vandq_u8(both.val[0], mask));
        look_up(first.second, vandq_u8(both.val[1], mask));
        look_up(second.first, vshrq_n_u8(both.val[0], 4));
        look_up(second.second, vshrq_n_u8(both.val[1], 4));
    }

  private:
    void look_up(int16x8_t* to, uint8x16_t index) const {
        const uint8x16_t low = vqtbl1q_u8(low_, index), high = vqtbl1q_u8(high_, index);
        to[0] = vreinterpretq_s16_u8(vzip1q_u8(low, high));
        to[1] = vreinterpretq_s16_u8(vzip2q_u8(low, high));
    }
    uint8x16_t low_, high_;
};

// Two times 16 pairs of numbers of 12 bits, 16 * high + low: high bytes [64], low halves of a byte [32] as codes lie.
inline void join(int16x8_t* to, int8x16_t high, uint8x16_t low) {
    to[0] = vaddq_s16(vshll_n_s8(vget_low_s8(high), 4), vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(low))));
    to[1] = vaddq_s16(vshll_high_n_s8(high, 4), vreinterpretq_s16_u16(vmovl_high_u8(low)));
}
inline void join_pairs(const int8_t* high, const uint8_t* low, Pairs& first, Pairs& second) {
    const int8x16x2_t one = vld2q_s8(high), two = vld2q_s8(high + 32);
    const uint8x16x2_t lows = vld2q_u8(low);  // of inputs 0 and 2, of inputs 1 and 3
    const uint8x16_t mask = vdupq_n_u8(15);
    join(first.first, one.val[0], vandq_u8(lows.val[0], mask));
    join(first.second, one.val[1], vandq_u8(lows.val[1], mask));
    join(second.first, two.val[0], vshrq_n_u8(lows.val[0], 4));
    join(second.second, two.val[1], vshrq_n_u8(lows.val[1], 4));
}

// 16 pairs from bytes [32], in the order of the outputs.
inline Pairs widen_pairs(const int8_t* p) {
    const int8x16x2_t both = vld2q_s8(p);
    return {{vmovl_s8(vget_low_s8(both.val[0])), vmovl_high_s8(both.val[0])},
            {vmovl_s8(vget_low_s8(both.val[1])), vmovl_high_s8(both.val[1])}};
}

// (a * by + 2^14) / 2^15, rounded down, of each number.
inline Pairs scaled(Pairs a, Pairs by) {
    return {{vqrdmulhq_s16(a.first[0], by.first[0]), vqrdmulhq_s16(a.first[1], by.first[1])},
            {vqrdmulhq_s16(a.second[0], by.second[0]), vqrdmulhq_s16(a.second[1], by.second[1])}};
}
inline Pairs twice(Pairs a) {
    return {{vaddq_s16(a.first[0], a.first[0]), vaddq_s16(a.first[1], a.first[1])},
            {vaddq_s16(a.second[0], a.second[0]), vaddq_s16(a.second[1], a.second[1])}};
}
// Of two neighbouring pairs the first numbers and then the second ones.
inline void store_by_outputs(uint64_t* p, Pairs a) {
    for (int k = 0; k < 2; ++k) {
        const int32x4_t first = vreinterpretq_s32_s16(a.first[k]), second = vreinterpretq_s32_s16(a.second[k]);
        vst1q_s32(reinterpret_cast<int32_t*>(p + 4 * k), vzip1q_s32(first, second));
        vst1q_s32(reinterpret_cast<int32_t*>(p + 4 * k + 2), vzip2q_s32(first, second));
    }
}

// Decoded pairs, and sums of them, in the order of the outputs.
inline Pairs ordered(Pairs a) { return a; }
inline Floats to_ordered_floats(Ints a) { return to_floats(a); }

inline float total(Floats a) {
    const float32x4_t sum = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(sum), vget_high_f32(sum));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

}  // namespace
