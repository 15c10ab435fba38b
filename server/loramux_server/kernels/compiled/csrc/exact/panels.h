// Products of many rows by exact integers: a weight's levels are laid out once, as the multiplications read them, and serve
// all rows. A panel is 64 numbers that are summed over by 64 that are not: [4 vectors, 32 pairs, 16, 2] int16.

#pragma once

#include "elementwise.h"
#include "product.h"

namespace {

constexpr int64_t kPanel = kBlock * kBlock;
constexpr int64_t kPanelVectors = kBlock / kLanes;
constexpr int64_t kPanelNumbers = 1 << 20;  // of all panels that lie ready at once: 2 MiB, which a cache holds
constexpr int64_t kPanelRows = 48;          // that a panel meets while it lies in the first cache, with their sums

// Rows and vectors whose sums stay in registers; and from how many rows on laying panels out pays: with AVX-512, where one
// instruction looks 32 levels up, `multiply` is faster for fewer.
#if defined(__AVX512BW__) && !defined(LORAMUX_PORTABLE)
constexpr int kPanelGroup = 6, kPanelTiles = 4;
constexpr int64_t kManyRows = 512;
#else
constexpr int kPanelGroup = 6, kPanelTiles = 1;
constexpr int64_t kManyRows = 96;
#endif

// y [R, 16 * vectors] += float(q [R, 64] @ panel) * (row_scales [R] * scales [16 * vectors]); rows of y are y_row
// apart. The sums of a block take all registers, so y is read and written once for each. Not inlined: elsewhere compilers
// keep sums in memory.
template <int R, int T>
__attribute__((noinline)) void add_panel(float* y, int64_t y_row, const int16_t* q, const int16_t* panel, int64_t vectors,
                                         const float* row_scales, const float* scales) {
    for (int64_t first = 0; first < vectors; first += T) {
        const int16_t* levels_at = panel + first * kBlock * kLanes;
        Ints part[R][T];
        for (int t = 0; t < R; ++t)
            for (int k = 0; k < T; ++k) part[t][k] = no_ints();
        for (int64_t i = 0; i < kBlock; i += 2) {
            Pairs levels[T];
            for (int k = 0; k < T; ++k) levels[k] = load_pairs(levels_at + (k * kBlock + i) * kLanes);
            for (int t = 0; t < R; ++t) {
                const auto a = splat_pair(q + t * kBlock + i);
                for (int k = 0; k < T; ++k) {
                    part[t][k] = dot(part[t][k], levels[k], a);
                    hold(part[t][k]);
                }
            }
        }
        float* to = y + first * kLanes;  // one loop for the sums alone: else compilers keep them in memory
        Floats wide[T];
        for (int k = 0; k < T; ++k) wide[k] = load(scales + (first + k) * kLanes);
        for (int t = 0; t < R; ++t)
            for (int k = 0; k < T; ++k)
                store(to + t * y_row + k * kLanes,
                      fma(to_floats(part[t][k]), wide[k] * splat(row_scales[t]), load(to + t * y_row + k * kLanes)));
    }
}

inline int64_t blocks_of(int64_t count) { return (count + kBlock - 1) / kBlock; }

// Blocks of outputs whose panels lie ready at once.
inline int64_t blocks_at_once(int64_t in, int64_t out) {
    const int64_t fit = kPanelNumbers / (in * kBlock), blocks = blocks_of(out);
    return fit < 1 ? 1 : fit < blocks ? fit : blocks;
}

// Levels of the outputs [o, o + 64) by the inputs [64 * b, 64 * (b + 1)), summed over the inputs.
template <class Weights>
void lay_out_panel(int16_t* panel, const Weights& w, int64_t o, int64_t b) {
    for (int64_t tile = 0; tile < kBlock && o + tile < w.out; tile += kLanes) {
        const auto tiles = w.tiles(o + tile);
        int16_t* to = panel + tile * kBlock;
        for (int64_t i = 0; i < kBlock; i += 4) {
            Pairs first, second;
            w.pairs(tiles, 0, b * kBlock + i, first, second);
            store_pairs(to + i * kLanes, ordered(first));
            store_pairs(to + (i + 2) * kLanes, ordered(second));
        }
    }
}

// y [rows, out] = x @ w.T as `multiply` has it, to the bit: faster for many rows. `top` and `weight_top` as in
// quantize_block.
template <class Weights>
void multiply_many(float* y, const float* x, const Weights& w, int64_t rows, float top, float weight_top, int32_t threads) {
    static thread_local Buffer<int16_t> panel_buffer;
    Buffer<int16_t> number_buffer;
    Buffer<float> scale_buffer;
    const int64_t in = w.in, out = w.out, depth = in / kBlock, blocks = blocks_of(out), ready = blocks_at_once(in, out);
    const int64_t chunks = (rows + kPanelRows - 1) / kPanelRows;
    int16_t *panels = panel_buffer.fit(ready * depth * kPanel), *q = number_buffer.fit(rows * in);  // q [depth, rows, 64]
    float* x_scales = scale_buffer.fit(rows * depth);                                               // [depth, rows]
    for_rows(rows, in, threads, [&](int64_t t) {
        for (int64_t b = 0; b < depth; ++b)
            x_scales[b * rows + t] =
                quantize_block(q + (b * rows + t) * kBlock, x + t * in + b * kBlock, kBlock, top, weight_top);
    });
    for (int64_t start = 0; start < blocks; start += ready) {
        const int64_t count = blocks - start < ready ? blocks - start : ready;
        in_pieces(count, threads, [&](int64_t c) {
            for (int64_t b = 0; b < depth; ++b) lay_out_panel(panels + (c * depth + b) * kPanel, w, (start + c) * kBlock, b);
        });
        in_pieces(count * chunks, threads, [&](int64_t piece) {
            const int64_t c = piece / chunks, o = (start + c) * kBlock;
            const Share share = share_of(rows, piece % chunks, chunks);
            const auto add = [&](auto tiles, int64_t vectors, int64_t b) {
                for_row_groups<kPanelGroup>(share.end - share.begin, [&](auto size, int64_t first, int64_t) {
                    constexpr int R = size.value;
                    const int64_t row = share.begin + first;
                    float* to = y + row * out + o;
                    for (int t = 0; b == 0 && t < R; ++t) std::memset(to + t * out, 0, vectors * kLanes * sizeof *to);
                    add_panel<R, tiles.value>(to, out, q + (b * rows + row) * kBlock, panels + (c * depth + b) * kPanel,
                                              vectors, x_scales + b * rows + row, w.scales + b * out + o);
                });
            };
            constexpr int kHalf = kPanelTiles < 2 ? kPanelTiles : 2;  // `out` is a multiple of 32
            for (int64_t b = 0; b < depth; ++b)
                if (out - o >= kBlock)
                    add(std::integral_constant<int, kPanelTiles>{}, kPanelVectors, b);
                else
                    add(std::integral_constant<int, kHalf>{}, (out - o) / kLanes, b);
        });
    }
}

}  // namespace
