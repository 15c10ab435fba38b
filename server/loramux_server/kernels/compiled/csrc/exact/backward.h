// The product over outputs, as the gradient of x @ w.T for a frozen w: dx = dy @ w, by exact integers.
//
// Semantics: dx[t, i] = sum_o dy[t, o] * w[o, i] with w[o, i] = level * scale_w[b, o], b the block of 64 inputs of i. That
// scale differs by output, over which is summed, so it goes into dy before it is rounded, once for each block of inputs:
//
//   q[t, o] = round(dy[t, o] * factor[t, c] * scale_w[b, o] / most_w[b, c])
//   dx[t, i] = sum_c float(sum_{o in block c of 64 outputs} q[t, o] * level[o, i]) * (scale[t, c] * most_w[b, c])
//
// A block's sum is exact in int32; blocks of outputs come in their order, one fma in fp32 each. A row is computed alone.

#pragma once

#include "elementwise.h"
#include "product.h"

namespace {

constexpr int64_t kPanelOutputs = 128;      // whose levels lie ready at once: with the rows they fit the first cache
constexpr int64_t kTransposedRows = 256;    // of a piece: enough that laying out the levels costs little

// Rows and vectors of inputs whose sums stay in registers.
#if defined(__AVX512BW__) && !defined(LORAMUX_PORTABLE)
constexpr int kTransposedGroup = 6, kTransposedTiles = 4;
#else
constexpr int kTransposedGroup = 6, kTransposedTiles = 1;
#endif

// The 16 pairs of a tile of outputs, in the order of the outputs.
inline void store_pairs(int16_t* to, const Nf4Weights&, Pairs pairs) { store_ordered(to, pairs); }
inline void store_pairs(int16_t* to, const DenseWeights&, Pairs pairs) { store_pairs(to, pairs); }

// Levels of the outputs [o, o + count) by the 64 inputs from j on -> panel [4 vectors of inputs, 64, 16, 2].
template <class Weights>
void lay_out_panel(int16_t* panel, const Weights& w, int64_t o, int64_t count, int64_t j) {
    constexpr int64_t kPairs = kLanes / 2;
    for (int64_t tile = 0; tile < count; tile += kLanes) {
        const auto tiles = w.tiles(o + tile);
        for (int64_t i = 0; i < kBlock; i += kLanes) {
            uint64_t words[kPairs][kPairs], turned[kPairs][kPairs];  // [pair of inputs, pair of outputs]: two by two levels
            for (int64_t pair = 0; pair < kPairs; pair += 2) {
                Pairs first, second;
                w.pairs(tiles, 0, j + i + 2 * pair, first, second);
                int16_t by_output[2][2 * kLanes];  // [16 outputs, 2 inputs]
                store_pairs(by_output[0], w, first);
                store_pairs(by_output[1], w, second);
                std::memcpy(words[pair], by_output, sizeof by_output);
            }
            for (int64_t pair = 0; pair < kPairs; ++pair)
                for (int64_t outputs = 0; outputs < kPairs; ++outputs) {
                    const uint64_t word = words[pair][outputs];
                    turned[outputs][pair] = (word & 0xffff00000000ffffu) | (word & 0x00000000ffff0000u) << 16 |
                                            (word & 0x0000ffff00000000u) >> 16;
                }
            std::memcpy(panel + i * kPanelOutputs + tile * kLanes, turned, sizeof turned);
        }
    }
}

// dx [R, 64] += the products with `count` outputs. Sums of a block take all registers, so dx is read and written once for
// each block.
template <int R>
void add_outputs(float* dx, int64_t dx_row, const int16_t* q, const float* scales, const int16_t* panel, int64_t count) {
    constexpr int T = kTransposedTiles;
    for (int64_t start = 0, block = 0; start < count; start += kBlock, ++block) {
        for (int64_t first = 0; first < kBlock / kLanes; first += T) {
            const int16_t* levels_at = panel + first * kPanelOutputs * kLanes;
            Ints part[R][T];
            for (int t = 0; t < R; ++t)
                for (int k = 0; k < T; ++k) part[t][k] = no_ints();
            for (int64_t o = start; o < start + kBlock; o += 2) {
                Pairs levels[T];
                for (int k = 0; k < T; ++k) levels[k] = load_pairs(levels_at + k * kPanelOutputs * kLanes + o * kLanes);
                for (int t = 0; t < R; ++t) {
                    const auto a = splat_pair(q + t * kPanelOutputs + o);
                    for (int k = 0; k < T; ++k) {
                        part[t][k] = dot(part[t][k], levels[k], a);
                        hold(part[t][k]);
                    }
                }
            }
            float* to = dx + first * kLanes;  // one loop for the sums alone: else compilers keep them in memory
            for (int t = 0; t < R; ++t)
                for (int k = 0; k < T; ++k)
                    store(to + t * dx_row + k * kLanes,
                          fma(to_floats(part[t][k]), splat(scales[t * (kPanelOutputs / kBlock) + block]),
                              load(to + t * dx_row + k * kLanes)));
        }
    }
}

// dx [rows, in] = dy [rows, out] @ w; `in` is a multiple of 64, `out` of 32. `top` and `weight_top` as in quantize_block.
template <class Weights>
void multiply_transposed(float* dx, const float* dy, const Weights& w, int64_t rows, float top, float weight_top,
                         int32_t threads) {
    const int64_t in = w.in, out = w.out, blocks = (out + kBlock - 1) / kBlock;
    Buffer<BlockFactor> factor_buffer;
    BlockFactor* factors = factor_buffer.fit(rows * blocks);
    for_rows(rows, out, threads, [&](int64_t t) {
        for (int64_t c = 0; c < blocks; ++c) {
            const int64_t left = out - c * kBlock;
            factors[t * blocks + c] = block_factor(dy + t * out + c * kBlock, left < kBlock ? left : kBlock, top, weight_top);
        }
    });
    const int64_t chunks = (rows + kTransposedRows - 1) / kTransposedRows;
    in_pieces(in / kBlock * chunks, threads, [&](int64_t piece) {
        const int64_t b = piece / chunks;
        const Share share = share_of(rows, piece % chunks, chunks);
        alignas(64) int16_t panel[kPanelOutputs * kBlock];
        alignas(64) int16_t q[kTransposedGroup * kPanelOutputs];
        alignas(64) float ratio[kPanelOutputs];
        for (int64_t o = 0; o < out; o += kPanelOutputs) {
            const int64_t count = out - o < kPanelOutputs ? out - o : kPanelOutputs;
            if (count % kBlock != 0) std::memset(panel, 0, sizeof panel);
            lay_out_panel(panel, w, o, count, b * kBlock);
            float most[kPanelOutputs / kBlock];
            for (int64_t start = 0; start < count; start += kBlock) {
                const int64_t stop = start + kBlock < count ? start + kBlock : count;
                const float* scales = w.scales + b * out + o;
                Floats top_scale = splat(0.f);
                for (int64_t i = start; i < stop; i += kLanes) top_scale = greater(absolute(load(scales + i)), top_scale);
                const float largest_scale = largest(top_scale);
                most[start / kBlock] = largest_scale;
                const Floats down = splat(largest_scale > 0.f ? largest_scale : 1.f);
                for (int64_t i = start; i < stop; i += kLanes) store(ratio + i, load(scales + i) / down);
            }
            for_row_groups<kTransposedGroup>(share.end - share.begin, [&](auto size, int64_t first, int64_t) {
                constexpr int R = size.value;
                float scales[R * (kPanelOutputs / kBlock)];
                for (int t = 0; t < R; ++t) {
                    const int64_t row = share.begin + first + t;
                    for (int64_t start = 0; start < count; start += kBlock) {
                        const int64_t stop = start + kBlock < count ? start + kBlock : count, c = start / kBlock;
                        const BlockFactor by = factors[row * blocks + o / kBlock + c];
                        scales[t * (kPanelOutputs / kBlock) + c] = by.scale * most[c];
                        int16_t* to = q + t * kPanelOutputs;
                        std::memset(to + stop, 0, (start + kBlock - stop) * sizeof *to);
                        if (by.factor == 0.f) {
                            std::memset(to + start, 0, (stop - start) * sizeof *to);
                            continue;
                        }
                        const float* from = dy + row * out + o;
                        for (int64_t i = start; i < stop; i += kLanes)
                            store_int16(to + i, nearest(load(from + i) * splat(by.factor) * load(ratio + i)));
                    }
                }
                float* to = dx + (share.begin + first) * in + b * kBlock;
                if (o == 0)
                    for (int t = 0; t < R; ++t) std::memset(to + t * in, 0, kBlock * sizeof *to);
                add_outputs<R>(to, in, q, scales, panel, count);
            });
        }
    });
}

}  // namespace
