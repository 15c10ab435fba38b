// Products by exact integers: of rows with NF4 weights, and with a dense output head.
//
// A row is rounded to int16, with a scale for each block of 64 numbers, and so are the weights. Products of pairs are
// summed in int32, and a block's sum always fits: it is exact, whatever the order and the width of a vector. Then
//
//   y[t, o] = sum_b float(sum_{i in block b} x[t, i] * w[o, i]) * (scale_w[b, o] * scale_x[t, b])
//
// block by block, with one fma in fp32 each. So the bits of a row depend neither on the rows around it nor on the processor.

#pragma once

#include "exact.h"
#include "../row_groups.h"
#include "../threads.h"
#include "vec.h"

namespace {

constexpr int64_t kBlock = 64;       // numbers that share a scale
constexpr int64_t kTileBytes = 32;   // of NF4 codes: 16 outputs by 4 inputs
constexpr int kOneTileRows = 4;      // so few read the tiles of a dense weight one by one
constexpr float kSmallest = 1e-30f;  // a block whose largest number is below counts as zeros

// The largest whole number of a weight, and of a row's int16: 64 products of both stay below 2^31.
constexpr float kLevelTop = 2047.f, kRowTop = 16383.f;

struct BlockFactor {
    float factor, scale;  // what brings a block's largest number to the top, and back; factor 0: all count as zeros
};

// The scale is divided by `weight_top`. A NaN or an infinity in x gives a scale of NaN, and with it NaN for the row.
inline BlockFactor block_factor(const float* x, int64_t count, float top, float weight_top) {
    Floats most = splat(0.f), sick = splat(0.f);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats a = load(x + i);
        most = greater(absolute(a), most);
        sick = fma(a, splat(0.f), sick);
    }
    const float largest_number = largest(most), broken = total(sick) * 0.f;
    if (!(largest_number >= kSmallest && broken == 0.f)) return {0.f, broken};
    return {top / largest_number, largest_number / top / weight_top};
}

// q [count] = x / scale, rounded, with the largest at `top`; returns the scale.
inline float quantize_block(int16_t* q, const float* x, int64_t count, float top, float weight_top) {
    const BlockFactor block = block_factor(x, count, top, weight_top);
    if (block.factor != 0.f)
        for (int64_t i = 0; i < count; i += kLanes) store_int16(q + i, nearest(load(x + i) * splat(block.factor)));
    else
        std::memset(q, 0, count * sizeof *q);
    return block.scale;
}

inline void quantize_row(int16_t* q, float* scales, const float* x, int64_t in, float top, float weight_top) {
    for (int64_t b = 0; b < in / kBlock; ++b)
        scales[b] = quantize_block(q + b * kBlock, x + b * kBlock, kBlock, top, weight_top);
}

struct Nf4Weights {
    static constexpr bool kDense = false;
    const uint8_t* codes;  // [out / 16, in / 4, 32]
    const float* scales;   // [in / 64, out]
    Levels levels;
    int64_t in, out;

    struct Tiles {
        const uint8_t* at;
        int64_t stride;
    };
    Tiles tiles(int64_t o) const { return {codes + o * in / 2, in / 4 * kTileBytes}; }
    void pairs(const Tiles& tiles, int k, int64_t j, Pairs& first, Pairs& second) const {
        levels.decode(tiles.at + k * tiles.stride + j / 4 * kTileBytes, first, second);
    }
    static Floats ordered(Ints sum) { return to_ordered_floats(sum); }
};

// Numbers of 12 bits, 16 * high + low: a byte and half a byte each.
struct DenseWeights {
    static constexpr bool kDense = true;
    const uint8_t* numbers;  // all high bytes [out / 16, in / 2, 16, 2] int8, then all low halves [out / 16, in / 4, 32]
    const float* scales;     // [in / 64, out]
    int64_t in, out;

    struct Tiles {
        const int8_t* high;
        const uint8_t* low;
        int64_t stride;
    };
    Tiles tiles(int64_t o) const {
        return {reinterpret_cast<const int8_t*>(numbers) + o * in, numbers + (2 * out + o) * in / 2, in * kLanes};
    }
    void pairs(const Tiles& tiles, int k, int64_t j, Pairs& first, Pairs& second) const {
        const int64_t at = k * tiles.stride + j * kLanes;
        join_pairs(tiles.high + at, tiles.low + at / 2, first, second);
    }
    static Floats ordered(Ints sum) { return to_ordered_floats(sum); }

    // One number of an output, for those who read few.
    int32_t number(int64_t o, int64_t i) const {
        const int64_t lane = o % kLanes * 2 + i % 2, tile = o / kLanes * kLanes * in;
        const auto* high = reinterpret_cast<const int8_t*>(numbers) + tile + i / 2 * (2 * kLanes) + lane;
        const uint8_t both = numbers[(2 * out * in + tile) / 2 + i / 4 * (2 * kLanes) + lane];
        return 16 * *high + (i % 4 < 2 ? both & 15 : both >> 4);
    }
};

struct Rows {
    const int16_t* q;     // [rows, in]
    const float* scales;  // [rows, in / 64]
    int64_t count;
};

// R rows by T tiles of 16 outputs.
template <int R, int T, class Weights>
void multiply_tiles(float* y, const Rows& x, int64_t first, const Weights& w, int64_t o, SharePrefetch& prefetch) {
    const int64_t in = w.in, blocks = in / kBlock;
    const int16_t* q = x.q + first * in;
    const float* row_scales = x.scales + first * blocks;
    const auto tiles = w.tiles(o);
    const float* scales = w.scales + o;
    Floats sum[R][T];
    for (int t = 0; t < R; ++t)
        for (int k = 0; k < T; ++k) sum[t][k] = splat(0.f);
    for (int64_t b = 0; b < blocks; ++b, scales += w.out) {
        Ints part[R][T];
        for (int t = 0; t < R; ++t)
            for (int k = 0; k < T; ++k) part[t][k] = no_ints();
        for (int64_t j = b * kBlock; j < (b + 1) * kBlock; j += 4) {
            Pairs one[T], two[T];
            for (int k = 0; k < T; ++k) w.pairs(tiles, k, j, one[k], two[k]);
            const auto add = [&](int t, const Pairs* pairs, int64_t at) {
                const auto a = splat_pair(q + t * in + at);
                for (int k = 0; k < T; ++k) part[t][k] = dot(part[t][k], pairs[k], a);
            };
            for (int t = 0; t < R; ++t) {
                add(t, one, j);
                if (T > 1) add(t, two, j + 2);
            }
            if (T == 1)  // where registers are few: then fewer numbers are held at a time
                for (int t = 0; t < R; ++t) add(t, two, j + 2);
        }
        if (R >= 3) prefetch.step();
        for (int k = 0; k < T; ++k) {
            const Floats scale = load(scales + k * kLanes);
            for (int t = 0; t < R; ++t)
                sum[t][k] = fma(w.ordered(part[t][k]), scale * splat(row_scales[t * blocks + b]), sum[t][k]);
        }
    }
    for (int t = 0; t < R; ++t)
        for (int k = 0; k < T; ++k) store(y + (first + t) * w.out + o + k * kLanes, sum[t][k]);
}

// y [rows, out] = x @ w.T. Few rows wait for memory, which the tiles of a dense weight, one by one, are read from in one run;
// codes take too long to look up for that. `out` is a multiple of 16 * kProductTiles, `in` of 64.
template <class Weights>
void multiply(float* y, const Rows& x, const Weights& w, const Reads* reads, int64_t num_reads, int32_t threads) {
    constexpr int64_t kWide = kProductTiles * kLanes;
    const int64_t count = w.out / kWide, pieces = pieces_of(count, x.count * w.in * w.out, threads);
    in_pieces(pieces, threads, [&](int64_t piece) {
        const Share share = share_of(count, piece, pieces);
        const int64_t groups = (x.count + kProductRows - 1) / kProductRows;
        const int64_t steps = x.count < 3 ? 0 : groups * (share.end - share.begin) * (w.in / kBlock);
        SharePrefetch prefetch(reads, num_reads, piece, pieces, steps);
        if (Weights::kDense && x.count > 0 && x.count <= kOneTileRows) {
            for (int64_t tile = share.begin * kProductTiles; tile < share.end * kProductTiles; ++tile)
                with_count<kOneTileRows>(x.count, [&](auto size) {
                    multiply_tiles<size.value, 1>(y, x, 0, w, tile * kLanes, prefetch);
                });
            return;
        }
        for (int64_t tile = share.begin; tile < share.end; ++tile)
            for_row_groups<kProductRows>(x.count, [&](auto size, int64_t first, int64_t) {
                multiply_tiles<size.value, kProductTiles>(y, x, first, w, tile * kWide, prefetch);
            });
    });
}

}  // namespace
