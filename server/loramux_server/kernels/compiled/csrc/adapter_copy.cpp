// From a file to host memory, and from there to an arena: an adapter's many tensors in one call each, so that Python's
// interpreter lock is given up once and not for every tensor.

#include <cstdint>
#include <cstring>
#include <vector>

#include "bf16.h"
#include "kernels.h"

namespace {

enum Kind : int64_t { kFloat32, kFloat16, kBFloat16 };  // of numbers in a file

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, exponent = (half >> 10) & 0x1fu;
    uint32_t word, fraction = half & 0x3ffu;
    if (exponent == 0x1fu) {
        word = sign | 0x7f800000u | fraction << 13;
    } else if (exponent) {
        word = sign | (exponent + 112) << 23 | fraction << 13;
    } else {  // subnormal: fraction * 2^-24, exact in fp32
        const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
        std::memcpy(&word, &value, sizeof word);
        word |= sign;
    }
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

template <int kind>
inline float at(const char* numbers, int64_t i) {
    if (kind == kFloat32) {
        float value;
        std::memcpy(&value, numbers + 4 * i, sizeof value);
        return value;
    }
    uint16_t bits;
    std::memcpy(&bits, numbers + 2 * i, sizeof bits);
    return kind == kFloat16 ? half_to_float(bits) : widen(bits);
}

constexpr uint16_t kExponent = 0x7f80u;  // of a number that is not finite

// to = bf16(from * scale); the largest exponent among them.
template <int kind>
LORAMUX_CLONES uint16_t convert(uint16_t* __restrict to, const char* __restrict from, int64_t count, float scale) {
    uint16_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        to[i] = narrow(at<kind>(from, i) * scale);
        const auto exponent = static_cast<uint16_t>(to[i] & kExponent);
        largest = exponent > largest ? exponent : largest;
    }
    return largest;
}

uint16_t convert(int64_t kind, uint16_t* to, const char* from, int64_t count, float scale) {
    switch (kind) {
        case kFloat32: return convert<kFloat32>(to, from, count, scale);
        case kFloat16: return convert<kFloat16>(to, from, count, scale);
        default: return convert<kBFloat16>(to, from, count, scale);
    }
}

// to [rank, out] = bf16(from [out, rank] * scale)^T, by way of a tile that stays in the cache.
uint16_t transpose(int64_t kind, uint16_t* to, const char* from, int64_t rank, int64_t out, float scale) {
    constexpr int64_t kTogether = 32;
    thread_local std::vector<uint16_t> tile;
    tile.resize(kTogether * rank);
    const int64_t size = kind == kFloat32 ? 4 : 2;
    uint16_t largest = 0;
    for (int64_t first = 0; first < out; first += kTogether) {
        const int64_t count = out - first < kTogether ? out - first : kTogether;
        const uint16_t exponent = convert(kind, tile.data(), from + first * rank * size, count * rank, scale);
        largest = exponent > largest ? exponent : largest;
        for (int64_t r = 0; r < rank; ++r)
            for (int64_t o = 0; o < count; ++o) to[r * out + first + o] = tile[o * rank + r];
    }
    return largest;
}

}  // namespace

extern "C" {

// Converts pairs among a file's bytes into `to`, pair after pair: A as bf16 [rank, inputs], then bf16(B * scale)^T
// [rank, outputs].
// finite [count]: whether all numbers of a pair are, as written.
void loramux_convert_pairs(uint16_t* to, uint8_t* finite, const char* file, const FilePair* pairs, const float* scale,
                           int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const FilePair& pair = pairs[i];
        const char *a = file + pair.a_offset, *b = file + pair.b_offset;
        const int64_t size = pair.rank * pair.inputs;
        const uint16_t in_a = convert(pair.a_kind, to, a, size, 1.f);
        to += size;
        const uint16_t in_b = transpose(pair.b_kind, to, b, pair.rank, pair.outputs, scale[i]);
        to += pair.rank * pair.outputs;
        finite[i] = in_a < kExponent && in_b < kExponent;
    }
}

// Copies weights into arena rows [offset, offset + rank) of each of `count` layers; what they do not fill becomes zero.
// Gain and shift are copied where there are some, and an arena must have room for them then.
void loramux_copy_slot(const LoraArena* const* arenas, const SlotWeights* weights, int64_t count, int64_t offset,
                       int64_t rank) {
    for (int64_t i = 0; i < count; ++i) {
        const LoraArena& arena = *arenas[i];
        const SlotWeights& from = weights[i];
        auto* a = const_cast<uint16_t*>(arena.a) + offset * arena.inputs;
        auto* bt = const_cast<uint16_t*>(arena.bt) + offset * arena.outputs;
        const size_t a_row = arena.inputs * sizeof(uint16_t), bt_row = arena.outputs * sizeof(uint16_t);
        if (from.rank) {
            std::memcpy(a, from.a, from.rank * a_row);
            std::memcpy(bt, from.bt, from.rank * bt_row);
        }
        if (from.affine)
            std::memcpy(const_cast<float*>(arena.affine) + offset / kRankGroup * 2 * arena.outputs, from.affine,
                        2 * arena.outputs * sizeof(float));
        std::memset(a + from.rank * arena.inputs, 0, (rank - from.rank) * a_row);
        std::memset(bt + from.rank * arena.outputs, 0, (rank - from.rank) * bt_row);
        std::memset(const_cast<uint8_t*>(arena.targeted) + offset / kRankGroup,
                    (from.rank ? kHasDelta : 0) + (from.affine ? kHasAffine : 0), rank / kRankGroup);
    }
}

}  // extern "C"
