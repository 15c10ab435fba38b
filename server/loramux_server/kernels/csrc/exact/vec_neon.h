// Vectors on aarch64 (NEON): four registers each.

#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

struct Floats { float32x4_t v[4]; };
struct Ints { int32x4_t v[4]; };
struct Pairs { int16x8_t v[4]; };  // 16 pairs of int16

constexpr int kProductRows = 4, kProductTiles = 1;
constexpr int kQueries = 4;
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
    for (int k = 0; k < 4; ++k) vst1_s16(p + 4 * k, vmovn_s32(a.v[k]));
}

inline Pairs load_pairs(const int16_t* p) {
    return four<Pairs>([=](int k) { return vld1q_s16(p + 8 * k); });
}
inline Pairs splat_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    const int16x8_t all = vreinterpretq_s16_s32(vdupq_n_s32(pair));
    return {{all, all, all, all}};
}
inline Ints dot(Ints sum, Pairs a, Pairs b) {
    return four<Ints>([=](int k) {
        const int32x4_t low = vmull_s16(vget_low_s16(a.v[k]), vget_low_s16(b.v[k]));
        return vaddq_s32(sum.v[k], vpaddq_s32(low, vmull_high_s16(a.v[k], b.v[k])));
    });
}

class Levels {
  public:
    explicit Levels(const int16_t* levels) {
        const uint8x16x2_t bytes = vld2q_u8(reinterpret_cast<const uint8_t*>(levels));
        low_ = bytes.val[0];
        high_ = bytes.val[1];
    }
    void decode(const uint8_t* codes, Pairs& first, Pairs& second) const {
        for (int half = 0; half < 2; ++half) {
            const uint8x16_t both = vld1q_u8(codes + 16 * half);
            look_up(&first.v[2 * half], vandq_u8(both, vdupq_n_u8(15)));
            look_up(&second.v[2 * half], vshrq_n_u8(both, 4));
        }
    }

  private:
    void look_up(int16x8_t* to, uint8x16_t index) const {
        const uint8x16_t low = vqtbl1q_u8(low_, index), high = vqtbl1q_u8(high_, index);
        to[0] = vreinterpretq_s16_u8(vzip1q_u8(low, high));
        to[1] = vreinterpretq_s16_u8(vzip2q_u8(low, high));
    }
    uint8x16_t low_, high_;
};

// Sums of decoded pairs, in the order of the outputs.
inline Floats to_ordered_floats(Ints a) { return to_floats(a); }

inline float total(Floats a) {
    const float32x4_t sum = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(sum), vget_high_f32(sum));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

}  // namespace
