// The product over outputs, as the gradient of x @ w.T for a frozen w: dx = dy @ w, by exact integers.
//
// Semantics: dx[t, i] = sum_o dy[t, o] * w[o, i] with w[o, i] = level * scale_w[b, o], b the block of 64 inputs of i. That
// scale differs by output, over which is summed, so it goes into the levels, which are rounded once more for it:
//
//   most[b, c] = max over o in block c of 64 outputs of scale_w[b, o],   ratio[b, o] = round(scale_w[b, o] / most[b, c] * r)
//   p[o, i] = round(level[o, i] * ratio[b, o] / 2^15),                   r = 2^15 - 1
//   q[t, o] = round(dy[t, o] / scale[t, c])
//   dx[t, i] = sum_c float(sum_{o in block c} q[t, o] * p[o, i]) * (scale[t, c] * most[b, c] * 2^15 / r)
//
// A block's sum is exact in int32: |p| stays below 8192, and scale[t, c] is the least with |q| <= r and sum |q| <= 262000.
// (A bound for the largest number alone would have to take all for as large, and round three times as coarsely.) Blocks of
// outputs come in their order, one fma in fp32 each. A row is computed alone; one of zeros is not computed.

#pragma once

#include "panels.h"

namespace {

constexpr float kMostLevel = 32767.f, kMostSum = 262000.f;
constexpr float kRatioOne = 32768.f / 32767.f;

// Four times what the forward product reads, so that rounding for the ratio costs little: below 8192.
inline Pairs steep(Pairs pairs) { return twice(twice(ordered(pairs))); }
constexpr float kNf4Steep = 4.f * kLevelTop, kDenseSteep = 4.f;  // what stands for a weight of one scale

// p of the outputs [o, o + 64) by the inputs [64 * b, 64 * (b + 1)), summed over the outputs; returns most[b, c].
template <class Weights>
float lay_out_transposed(int16_t* panel, const Weights& w, int64_t o, int64_t b) {
    constexpr int64_t kPairs = kLanes / 2;
    const int64_t count = w.out - o < kBlock ? w.out - o : kBlock;
    const float* scales = w.scales + b * w.out + o;
    Floats top = splat(0.f);
    for (int64_t i = 0; i < count; i += kLanes) top = greater(absolute(load(scales + i)), top);
    const float most = largest(top);
    const Floats by = splat(most > 0.f ? kMostLevel / most : 0.f);
    if (count < kBlock) std::memset(panel, 0, kPanel * sizeof *panel);
    for (int64_t tile = 0; tile < count; tile += kLanes) {
        const auto tiles = w.tiles(o + tile);
        alignas(64) int16_t ratios[kLanes], both[2 * kLanes];
        store_int16(ratios, nearest(lesser(load(scales + tile) * by, splat(kMostLevel))));
        for (int64_t k = 0; k < kLanes; ++k) both[2 * k] = both[2 * k + 1] = ratios[k];
        const Pairs ratio = load_pairs(both);
        for (int64_t i = 0; i < kBlock; i += kLanes) {
            uint64_t words[kPairs][kPairs];  // [pair of inputs, pair of outputs]: two inputs by two outputs
            for (int64_t pair = 0; pair < kPairs; pair += 2) {
                Pairs first, second;
                w.pairs(tiles, 0, b * kBlock + i + 2 * pair, first, second);
                store_by_outputs(words[pair], scaled(steep(first), ratio));
                store_by_outputs(words[pair + 1], scaled(steep(second), ratio));
            }
            int16_t* to = panel + (i * kBlock + tile * kLanes);
            for (int64_t outputs = 0; outputs < kPairs; ++outputs)
                for (int64_t pair = 0; pair < kPairs; ++pair)
                    std::memcpy(to + outputs * 2 * kLanes + pair * 4, &words[pair][outputs], sizeof(uint64_t));
        }
    }
    return most;
}

// q [count], zeros up to 64; returns the scale: NaN where x holds a NaN or an infinity.
inline float quantize_sum(int16_t* q, const float* x, int64_t count) {
    Floats most = splat(0.f), sums = splat(0.f);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats a = absolute(load(x + i));
        most = greater(a, most);
        sums = sums + a;
    }
    const float largest_number = largest(most), sum = total(sums), broken = sum * 0.f;
    std::memset(q + count, 0, (kBlock - count) * sizeof *q);
    if (!(largest_number >= kSmallest && broken == 0.f)) {
        std::memset(q, 0, count * sizeof *q);
        return broken;
    }
    const float by_largest = largest_number / kMostLevel, by_sum = sum / kMostSum;
    const float scale = by_largest > by_sum ? by_largest : by_sum;
    const Floats factor = splat(1.f / scale);
    for (int64_t i = 0; i < count; i += kLanes) store_int16(q + i, nearest(load(x + i) * factor));
    return scale;
}

inline bool all_zeros(const float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes)
        for (int64_t k = i; k < i + kLanes; ++k)
            if (x[k] != 0.f) return false;
    return true;
}

// dx [rows, in] = dy [rows, out] @ w; `in` is a multiple of 64, `out` of 32. `one` is what a weight of one scale stands as.
template <class Weights>
void multiply_transposed(float* dx, const float* dy, const Weights& w, int64_t rows, float one, int32_t threads) {
    static thread_local Buffer<int16_t> panel_buffer;
    Buffer<int16_t> number_buffer;
    Buffer<float> scale_buffer, most_buffer;
    Buffer<int64_t> live_buffer;
    const int64_t in = w.in, out = w.out, depth = in / kBlock, blocks = blocks_of(out), ready = blocks_at_once(in, out);
    int64_t* live = live_buffer.fit(rows);
    int64_t count = 0;
    for (int64_t t = 0; t < rows; ++t)
        if (all_zeros(dy + t * out, out))
            std::memset(dx + t * in, 0, in * sizeof *dx);
        else
            live[count++] = t;
    int16_t* panels = panel_buffer.fit(ready * depth * kPanel);
    int16_t* q = number_buffer.fit(count * ready * kBlock);  // [blocks that lie ready, live rows, 64]
    float *scales = scale_buffer.fit(count * ready), *most = most_buffer.fit(ready * depth);
    const int64_t chunks = (count + kPanelRows - 1) / kPanelRows;
    for (int64_t start = 0; count > 0 && start < blocks; start += ready) {
        const int64_t here = blocks - start < ready ? blocks - start : ready;
        for_rows(count, here * kBlock, threads, [&](int64_t t) {
            for (int64_t c = 0; c < here; ++c) {
                const int64_t o = (start + c) * kBlock, left = out - o;
                const float scale = quantize_sum(q + (c * count + t) * kBlock, dy + live[t] * out + o,
                                                 left < kBlock ? left : kBlock);
                scales[c * count + t] = scale * (kRatioOne / one);
            }
        });
        in_pieces(here, threads, [&](int64_t c) {
            for (int64_t b = 0; b < depth; ++b)
                most[b * here + c] = lay_out_transposed(panels + (b * here + c) * kPanel, w, (start + c) * kBlock, b);
        });
        in_pieces(depth * chunks, threads, [&](int64_t piece) {
            const int64_t b = piece / chunks;
            const Share share = share_of(count, piece % chunks, chunks);
            for (int64_t c = 0; c < here; ++c) {
                float block_scale[kBlock];
                for (float& number : block_scale) number = most[b * here + c];
                for_row_groups<kPanelGroup>(share.end - share.begin, [&](auto size, int64_t first, int64_t) {
                    constexpr int R = size.value;
                    const int64_t row = share.begin + first;
                    float* to = dx + live[row] * in + b * kBlock;
                    const bool together = live[row + R - 1] - live[row] == R - 1;  // no row of zeros between them
                    alignas(64) float apart[R * kBlock];
                    for (int t = 0; t < R; ++t) {
                        float* own = dx + live[row + t] * in + b * kBlock;
                        if (start + c == 0) std::memset(own, 0, kBlock * sizeof *own);
                        if (!together) std::memcpy(apart + t * kBlock, own, kBlock * sizeof *own);
                    }
                    add_panel<R, kPanelTiles>(together ? to : apart, together ? in : kBlock,
                                              q + (c * count + row) * kBlock, panels + (b * here + c) * kPanel,
                                              kPanelVectors, scales + c * count + row, block_scale);
                    if (together) return;
                    for (int t = 0; t < R; ++t)
                        std::memcpy(dx + live[row + t] * in + b * kBlock, apart + t * kBlock, kBlock * sizeof *apart);
                });
            }
        });
    }
}

}  // namespace
