// The first token of rows of logits, the first largest, by a screen that reads the head's high bytes alone.
//
// A number of the head is 16 * high + low, with low from 0 to 15, so of a row and a token
//
//   logit = sum_b scale_w[b] * scale_x[b] * sum_i x[i] * (16 * high[i] + 7.5), give or take
//   reach = sum_b scale_w[b] * scale_x[b] * sum_i |x[i]| * 7.5
//
// (scales are not negative), and a token whose logit is less, even so, than what another has for certain is not the first.
// The few tiles with tokens that are left are computed in full, by the product of all rows: the token is the one that a
// search of all logits finds, bit for bit.
//
// Rounding: both the estimate and the logit itself are sums of terms of at most 2056 * scale_w * scale_x * sum_i |x[i]|,
// each rounded at most blocks + 4 times by 2^-24 of that; `kMargin` of it makes each reach longer by more than all of them,
// by the sum and difference of estimate and reach, and by what a division may make equal. `kUnderflow` is more than what is
// lost where scales are so small that products of them are no normal numbers.

#pragma once

#include "product.h"
#include "sample.h"

namespace {

constexpr int kScreenedRows = 4;  // so few are screened: more keep the cores busy, and memory has time
constexpr float kMiddle = 7.5f;   // of a low half
constexpr float kMargin = 280.f / 16777216.f, kUnderflow = 1e-30f;

// What the screen needs of a row's blocks: [rows, in / 64] each.
struct ScreenedRows {
    Buffer<float> buffer;
    float *centre, *scale, *reach;  // the sum of x * 7.5 / 16; 16 * scale_x; what scale_w is multiplied with for the reach

    ScreenedRows(const Rows& x, int64_t in) {
        const int64_t blocks = in / kBlock, count = x.count * blocks;
        centre = buffer.fit(3 * count);
        scale = centre + count;
        reach = scale + count;
        const float longer = 1.f + static_cast<float>(2 * blocks + 24) * kMargin;
        for (int64_t b = 0; b < count; ++b) {
            int32_t sum = 0, size = 0;
            for (const int16_t* q = x.q + b * kBlock; q < x.q + (b + 1) * kBlock; ++q) {
                sum += *q;
                size += *q < 0 ? -*q : *q;
            }
            centre[b] = static_cast<float>(sum) * (kMiddle / 16.f);
            scale[b] = 16.f * x.scales[b];
            reach[b] = kMiddle * static_cast<float>(size) * x.scales[b] * longer;
        }
    }
};

struct Bounds {
    Floats low, high;  // of the logits of a tile
};

template <int R>
void screen_tile(Bounds* bounds, const Rows& x, const ScreenedRows& screened, const DenseWeights& w, int64_t o) {
    const int64_t blocks = w.in / kBlock;
    const int8_t* high = w.tiles(o).high;
    const float* scales = w.scales + o;
    Floats sum[R], reach[R];
    for (int t = 0; t < R; ++t) {
        sum[t] = splat(0.f);
        reach[t] = splat(kUnderflow);
    }
    for (int64_t b = 0; b < blocks; ++b, scales += w.out) {
        Ints part[R];
        for (int t = 0; t < R; ++t) part[t] = no_ints();
        for (int64_t j = b * kBlock; j < (b + 1) * kBlock; j += 2, high += 2 * kLanes) {
            const Pairs pairs = widen_pairs(high);
            for (int t = 0; t < R; ++t) part[t] = dot(part[t], pairs, splat_pair(x.q + t * w.in + j));
        }
        const Floats scale = load(scales);
        for (int t = 0; t < R; ++t) {
            const int64_t at = t * blocks + b;
            const Floats term = to_floats(part[t]) + splat(screened.centre[at]);
            sum[t] = fma(term, scale * splat(screened.scale[at]), sum[t]);
            reach[t] = fma(scale, splat(screened.reach[at]), reach[t]);
        }
    }
    for (int t = 0; t < R; ++t) bounds[t] = {sum[t] - reach[t], sum[t] + reach[t]};
}

// tokens [rows]: of each row the first largest of its `vocabulary` logits x @ w.T / divisor; -1 where that takes the logits
// themselves, which may not be finite. At most kScreenedRows rows; divisor > 0. logits [rows, out] is room to work in.
inline void find_first_tokens(int64_t* tokens, float* logits, const Rows& x, const DenseWeights& w, int64_t vocabulary,
                              float divisor, int32_t threads) {
    const int64_t rows = x.count, tiles = (vocabulary + kLanes - 1) / kLanes;
    const int64_t pieces = pieces_of(tiles, rows * w.in * w.out, threads);
    struct Part {
        float floor[kScreenedRows];
        uint64_t first[kScreenedRows];
        bool sick[kScreenedRows];
    };
    Buffer<float> top_buffer;
    Buffer<Part> part_buffer;
    float* tops = top_buffer.fit(rows * tiles);  // the most that a logit of a tile can be
    Part* parts = part_buffer.fit(pieces);
    const ScreenedRows screened(x, w.in);
    const auto valid = [&](Floats a, int64_t o) {  // what pads the vocabulary is no token
        if (vocabulary - o >= kLanes) return a;
        float lanes[kLanes];
        store(lanes, a);
        return load_part(lanes, vocabulary - o);
    };
    in_pieces(pieces, threads, [&](int64_t piece) {
        const Share share = share_of(tiles, piece, pieces);
        with_count<kScreenedRows>(rows, [&](auto size) {
            constexpr int R = size.value;
            Floats floor[R], sick[R];
            for (int t = 0; t < R; ++t) {
                floor[t] = splat(kNothing);
                sick[t] = splat(0.f);
            }
            for (int64_t tile = share.begin; tile < share.end; ++tile) {
                Bounds bounds[R];
                screen_tile<R>(bounds, x, screened, w, tile * kLanes);
                for (int t = 0; t < R; ++t) {
                    sick[t] = fma(bounds[t].high, splat(0.f), sick[t]);
                    floor[t] = greater(valid(bounds[t].low, tile * kLanes), floor[t]);
                    tops[t * tiles + tile] = largest(valid(bounds[t].high, tile * kLanes));
                }
            }
            for (int t = 0; t < R; ++t) {
                parts[piece].floor[t] = largest(floor[t]);
                parts[piece].sick[t] = total(sick[t]) != 0.f;  // a NaN is
            }
        });
    });
    float floor[kScreenedRows];
    for (int64_t t = 0; t < rows; ++t) {
        tokens[t] = 0;
        floor[t] = kNothing;
        for (int64_t piece = 0; piece < pieces; ++piece) {
            if (parts[piece].sick[t]) tokens[t] = -1;
            if (parts[piece].floor[t] > floor[t]) floor[t] = parts[piece].floor[t];
        }
    }
    in_pieces(pieces, threads, [&](int64_t piece) {
        const Share share = share_of(tiles, piece, pieces);
        SharePrefetch nothing(nullptr, 0, 0, 1, 0);
        for (int64_t t = 0; t < rows; ++t) {
            uint64_t first = 0;
            for (int64_t tile = share.begin; tokens[t] >= 0 && tile < share.end; ++tile) {
                if (tops[t * tiles + tile] < floor[t]) continue;
                const int64_t o = tile * kLanes, end = o + kLanes < vocabulary ? o + kLanes : vocabulary;
                multiply_tiles<1, 1>(logits, x, t, w, o, nothing);
                for (int64_t token = o; token < end; ++token) {
                    const uint64_t key = key_of(logits[t * w.out + token] / divisor, token);
                    if (key > first) first = key;
                }
            }
            parts[piece].first[t] = first;
        }
    });
    // A divisor below 1 may make an infinity of a largest logit that is none.
    const uint64_t below = key_of(kNothing, 0), above = key_of(-kNothing, 0xffffffff);
    for (int64_t t = 0; t < rows; ++t) {
        uint64_t first = 0;
        for (int64_t piece = 0; piece < pieces; ++piece)
            if (parts[piece].first[t] > first) first = parts[piece].first[t];
        if (tokens[t] >= 0) tokens[t] = below < first && first < above ? token_of(first) : -1;
    }
}

}  // namespace
