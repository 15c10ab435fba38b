// 16-bit weights to NF4, as bitsandbytes does it, laid out as exact/product.h reads them.
//
// No sum has a product in it that a compiler could make an fma of, and every sum has one order: the numbers are the same
// on every processor.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace {

constexpr int64_t kBlock = 64, kOutputs = 16, kTileBytes = 32;  // exact/product.h
constexpr int kBounds = 15;                                    // between the 16 levels
constexpr int64_t kScaleBlock = 256;                           // scales that share a scale of their own
constexpr float kStepsFromMiddle = 32767.5f;                   // of the table of rounded scales, from 0 to 1
constexpr float kSmallest = 1e-38f;  // a block of zeros is divided by this

inline float widen(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

inline float within_one(float x) { return x < -1.f ? -1.f : x > 1.f ? 1.f : x; }

// codes [64] of a block: how many bounds are below each number, divided by the largest; returns the largest.
float quantize_block(uint8_t* codes, const uint16_t* w, const float* bounds) {
    float x[kBlock], largest = 0.f;
    for (int64_t i = 0; i < kBlock; ++i) {
        x[i] = widen(w[i]);
        largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
    }
    const float factor = 1.f / (largest > kSmallest ? largest : kSmallest);
    int32_t below[kBlock] = {};
    for (int64_t i = 0; i < kBlock; ++i) x[i] = within_one(x[i] * factor);
    for (int k = 0; k < kBounds; ++k)
        for (int64_t i = 0; i < kBlock; ++i) below[i] += x[i] > bounds[k];
    for (int64_t i = 0; i < kBlock; ++i) codes[i] = static_cast<uint8_t>(below[i]);
    return largest;
}

}  // namespace

void loramux_nf4_quantize(uint8_t* codes, float* largest, const uint16_t* w, const float* bounds, int64_t out,
                          int64_t in, int32_t threads) {
    in_pieces(out / kOutputs, threads, [&](int64_t tile) {
        uint8_t* to = codes + tile * in / 4 * kTileBytes;
        for (int64_t k = 0; k < kOutputs; ++k) {
            const int64_t o = tile * kOutputs + k;
            for (int64_t b = 0; b < in / kBlock; ++b) {
                uint8_t block[kBlock];
                largest[o * (in / kBlock) + b] = quantize_block(block, w + o * in + b * kBlock, bounds);
                uint8_t* quad = to + b * kBlock / 4 * kTileBytes + 2 * k;
                for (int64_t i = 0; i < kBlock; i += 4, quad += kTileBytes)
                    for (int64_t p = 0; p < 2; ++p) quad[p] = static_cast<uint8_t>(block[i + p] | block[i + p + 2] << 4);
            }
        }
    });
}

void loramux_nf4_scales(float* scales, float* offset, const float* largest, const float* rounded, int64_t count,
                        int32_t threads) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += largest[i];
    const float mean = static_cast<float>(sum / static_cast<double>(count));
    *offset = mean;
    in_pieces((count + kScaleBlock - 1) / kScaleBlock, threads, [&](int64_t piece) {
        const int64_t begin = piece * kScaleBlock, end = begin + kScaleBlock < count ? begin + kScaleBlock : count;
        float top = 0.f;
        for (int64_t i = begin; i < end; ++i) {
            scales[i] = largest[i] - mean;
            top = std::fabs(scales[i]) > top ? std::fabs(scales[i]) : top;
        }
        const float factor = top > 0.f ? 1.f / top : 0.f;
        for (int64_t i = begin; i < end; ++i)
            scales[i] = rounded[std::lround((within_one(scales[i] * factor) + 1.f) * kStepsFromMiddle)] * top;
    });
}

void loramux_nf4_squares(double* squares, const uint8_t* codes, const float* scales, int64_t out, int64_t in,
                         int32_t threads) {
    constexpr int32_t levels[16] = {-2047, -1425, -1075, -808, -582, -378, -186, 0,
                                    163,   329,   504,   692,  902,  1152, 1480, 2047};  // exact/decoder.h
    constexpr double kTop = 2047.;
    in_pieces(out / kOutputs, threads, [&](int64_t tile) {
        const uint8_t* from = codes + tile * in / 4 * kTileBytes;
        double sums[kOutputs] = {};
        for (int64_t b = 0; b < in / kBlock; ++b) {
            int32_t whole[kOutputs] = {};  // 64 squares of at most 2047 are below 2^29
            for (int64_t quad = 0; quad < kBlock / 4; ++quad, from += kTileBytes)
                for (int64_t i = 0; i < kTileBytes; ++i) {
                    const int32_t low = levels[from[i] & 15], high = levels[from[i] >> 4];
                    whole[i / 2] += low * low + high * high;
                }
            for (int64_t k = 0; k < kOutputs; ++k) {
                const float scale = scales[b * out + tile * kOutputs + k], square = scale * scale;
                sums[k] += static_cast<double>(square) * whole[k];  // the product is exact: an fma gives the same
            }
        }
        for (int64_t k = 0; k < kOutputs; ++k) squares[tile * kOutputs + k] = sums[k] / (kTop * kTop);
    });
}
