// Causal attention over a paged KV cache, by exact integers.
//
// Semantics, for query row t of sequence s at position p, head h, kv head g = h / (heads / kv_heads):
//   keys j with max(0, p - window + 1) <= j <= p  (window 0: all; below 0: those of the chunk of -window keys that has p)
//   s_j = softcap(scaling * q[t, h] . k_j),  softcap(z) = cap * tanh(z / cap) where cap > 0
//   out[t, h] = sum_j w_j * v_j / sum_j w_j,  w_j = exp(s_j - max s)
// A head with a sink has one more score, without a key and a value: it counts in the maximum and in the sum of weights.
//
// Keys and values lie in the cache as int16 with one scale for each token and kv head, which is sixteen times finer than
// bf16. A query is rounded likewise, and so are the weights (each times the scale of its value) of a tile of 16 tokens. All
// products are then sums of pairs in int32, which are exact; a tile's sum goes into the result with one fma in fp32.
// Cache tiles hold 16 tokens of one kv head, laid out for the pairwise product:
//   k tile [head_dim / 2, 16, 2]   v tile [8, head_dim, 2]   scales [2, 16]: of the keys, of the values
// Every (row, head) is computed alone, tile by tile, so its bits do not depend on the batch around it.

#pragma once

#include "exact.h"
#include "../threads.h"
#include "product.h"
#include "table.h"

namespace {

constexpr int64_t kTile = kCacheTile;
constexpr int64_t kChunk = 64;  // dimensions whose products fit one int32 sum

// 64 products of a query and a key, and 16 of a weight and a value, stay below 2^31.
constexpr float kQueryTop = 8191.f, kKeyTop = 4095.f, kWeightTop = 8191.f, kValueTop = 16383.f;

constexpr float kUnseen = -__builtin_huge_valf();

// Rows of one sequence that follow one another, with heads of one kv head.
struct Queries {
    const float* q;
    int64_t q_row, q_head;  // strides
    float* out;
    int64_t out_row, out_head;
    const int16_t *k, *v;      // cache of the layer, at this kv head
    const float* scales;       // of the layer, at this kv head
    int64_t tile_stride;       // between blocks: of keys and values
    int64_t scale_stride;      // of scales
    const int32_t* blocks;     // block table of the sequence
    int64_t position;          // of the first row
    int64_t window, head_dim;
    float scaling, softcap;
    const float* sinks;  // of these heads, or null

    // Keys that row `r` sees. A later row's first key is never before an earlier one's.
    int64_t first(int64_t r) const {
        if (window < 0) return (position + r) / -window * -window;
        return window > 0 && position + r >= window ? position + r - window + 1 : 0;
    }
    int64_t last(int64_t r) const { return position + r; }
};

struct AttentionScratch {
    Buffer<int16_t> queries, weights;
    Buffer<float> scores, weight_scales;
};

inline float weight_of(float score) {
    float lanes[kLanes];
    store(lanes, exp_of(splat(score)));
    return lanes[0];
}

inline void write_cache(int16_t* k_tile, int16_t* v_tile, float* scales, const float* key, const float* value,
                        int64_t at, int64_t head_dim) {
    int16_t numbers[kChunk * 8];
    scales[at] = quantize_block(numbers, key, head_dim, kKeyTop, 1.f);
    for (int64_t d = 0; d < head_dim; d += 2) std::memcpy(k_tile + d * kTile + 2 * at, numbers + d, 4);
    scales[kTile + at] = quantize_block(numbers, value, head_dim, kValueTop, 1.f);
    int16_t* row = v_tile + at / 2 * head_dim * 2 + at % 2;
    for (int64_t d = 0; d < head_dim; ++d) row[2 * d] = numbers[d];
}

// N vectors: R rows of N / R heads each.
template <int N>
struct Attention {
    static constexpr int kWide = N <= kQueries / 4 ? 4 : N <= kQueries / 2 ? 2 : 1;  // of 16 output dimensions

    const Queries& at;
    AttentionScratch& scratch;
    const int64_t heads;  // of a row
    const int64_t rows = N / heads;
    const int64_t tile0 = at.first(0) / kTile, tile1 = at.last(rows - 1) / kTile, tiles = tile1 - tile0 + 1;

    void attend() {
        const int64_t dim = at.head_dim, span = tiles * kTile;
        int16_t* queries = scratch.queries.fit(N * dim);
        float* scores = scratch.scores.fit(N * span);
        int16_t* weights = scratch.weights.fit(N * span);
        float* weight_scales = scratch.weight_scales.fit(N * tiles);
        float best[N], sum[N], factor[N];
        for (int i = 0; i < N; ++i) {
            const float* q = at.q + i / heads * at.q_row + i % heads * at.q_head;
            factor[i] = quantize_block(queries + i * dim, q, dim, kQueryTop, 1.f) * at.scaling;
        }
        score(scores, best, queries, factor);
        for (int i = 0; i < N; ++i) {
            const float sink = at.sinks ? at.sinks[i % heads] : kUnseen;
            if (sink > best[i]) best[i] = sink;
            sum[i] = weigh(weights + i * span, weight_scales + i * tiles, scores + i * span, best[i]);
            if (at.sinks) sum[i] += weight_of(sink - best[i]);
        }
        int64_t d = 0;
        for (; d + kLanes * kWide <= dim; d += kLanes * kWide) sum_values<kWide>(d, weights, weight_scales, sum);
        for (; d < dim; d += kLanes) sum_values<1>(d, weights, weight_scales, sum);
    }

    void score(float* scores, float* best, const int16_t* queries, const float* factor) const {
        const int64_t dim = at.head_dim, span = tiles * kTile;
        Floats top[N];
        for (auto& t : top) t = splat(kUnseen);
        for (int64_t tile = tile0; tile <= tile1; ++tile) {
            const int16_t* k = at.k + at.blocks[tile] * at.tile_stride;
            const int16_t* next = at.k + at.blocks[tile < tile1 ? tile + 1 : tile] * at.tile_stride;
            const Floats scale = load(at.scales + at.blocks[tile] * at.scale_stride);
            Floats s[N];
            for (int64_t chunk = 0; chunk < dim; chunk += kChunk) {
                const int64_t end = chunk + kChunk < dim ? chunk + kChunk : dim;
                Ints even[N], odd[N];  // two chains each hide the latency of the product
                for (int i = 0; i < N; ++i) even[i] = odd[i] = no_ints();
                for (int64_t d = chunk; d < end; d += 4) {
                    const Pairs k0 = load_pairs(k + d * kTile), k1 = load_pairs(k + (d + 2) * kTile);
                    __builtin_prefetch(next + d * kTile);
                    __builtin_prefetch(next + (d + 2) * kTile);
                    for (int i = 0; i < N; ++i) even[i] = dot(even[i], k0, splat_pair(queries + i * dim + d));
                    for (int i = 0; i < N; ++i) odd[i] = dot(odd[i], k1, splat_pair(queries + i * dim + d + 2));
                }
                for (int i = 0; i < N; ++i) {
                    const Floats part = to_floats(even[i] + odd[i]);
                    s[i] = chunk == 0 ? part : s[i] + part;
                }
            }
            for (int i = 0; i < N; ++i) {
                s[i] = s[i] * (scale * splat(factor[i]));
                if (at.softcap > 0.f) s[i] = splat(at.softcap) * tanh_of(s[i] / splat(at.softcap));
                const int64_t row = i / heads, base = tile * kTile;
                if (base < at.first(row) || base + kTile - 1 > at.last(row)) s[i] = seen(s[i], row, base);
                store(scores + i * span + (tile - tile0) * kTile, s[i]);
                top[i] = greater(s[i], top[i]);  // in this order NaN is passed over
            }
        }
        for (int i = 0; i < N; ++i) best[i] = largest(top[i]);
    }

    // Scores of a tile without the keys that a row does not see; `base` is the tile's first key.
    Floats seen(Floats scores, int64_t row, int64_t base) const {
        float lanes[kTile];
        store(lanes, scores);
        for (int64_t j = 0; j < kTile; ++j)
            if (base + j < at.first(row) || base + j > at.last(row)) lanes[j] = kUnseen;
        return load(lanes);
    }

    // Scores to weights exp(s - best), as int16 for each tile; returns their sum.
    float weigh(int16_t* weights, float* weight_scales, const float* scores, float best) const {
        Floats sum = splat(0.f);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const Floats s = load(scores + tile * kTile);
            const Floats values = load(at.scales + at.blocks[tile0 + tile] * at.scale_stride + kTile);
            const Floats weight = exp_of(s - splat(best));
            // What is not seen has weight zero and not exp(-87), and what lies in its place in the cache counts for
            // nothing. A NaN is not greater than anything, but its negation is not either: both ways round.
            const Floats lowest = splat(-3.4028235e38f), zero = splat(0.f);
            const Floats w = pick_greater(lowest, s, zero, weight);
            const Floats scaled = pick_greater(lowest, s, zero, weight * values);
            sum = sum + w;
            float lanes[kTile];
            store(lanes, scaled);
            weight_scales[tile] = quantize_block(weights + tile * kTile, lanes, kTile, kWeightTop, 1.f);
        }
        return total(sum);
    }

    // Output dimensions [d, d + 16 * W).
    template <int W>
    void sum_values(int64_t d, const int16_t* weights, const float* weight_scales, const float* sum) const {
        const int64_t span = tiles * kTile;
        Floats acc[N][W];
        for (auto& row : acc)
            for (auto& a : row) a = splat(0.f);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int16_t* v = at.v + at.blocks[tile0 + tile] * at.tile_stride + 2 * d;
            const int16_t* next = at.v + at.blocks[tile + 1 < tiles ? tile0 + tile + 1 : tile1] * at.tile_stride + 2 * d;
            Ints part[N][W];
            for (auto& row : part)
                for (auto& p : row) p = no_ints();
            for (int64_t pair = 0; pair < kTile / 2; ++pair) {
                const int64_t row = pair * at.head_dim * 2;
                Pairs value[W];
                for (int c = 0; c < W; ++c) {
                    value[c] = load_pairs(v + row + 2 * kLanes * c);
                    __builtin_prefetch(next + row + 2 * kLanes * c);
                }
                for (int i = 0; i < N; ++i) {
                    const auto by = splat_pair(weights + i * span + tile * kTile + 2 * pair);
                    for (int c = 0; c < W; ++c) part[i][c] = dot(part[i][c], value[c], by);
                }
            }
            for (int i = 0; i < N; ++i)
                for (int c = 0; c < W; ++c)
                    acc[i][c] = fma(to_floats(part[i][c]), splat(weight_scales[i * tiles + tile]), acc[i][c]);
        }
        for (int i = 0; i < N; ++i) {
            const Floats norm = splat(1.f / sum[i]);
            float* out = at.out + i / heads * at.out_row + i % heads * at.out_head + d;
            for (int c = 0; c < W; ++c) store(out + c * kLanes, acc[i][c] * norm);
        }
    }
};

struct Unit {  // rows [row, row + count)
    int64_t row, count;
};

inline void attend(const AttentionCall& c, int32_t threads) {
    const int64_t dim = c.head_dim, tile_size = kTile * dim, group = c.heads / c.kv_heads;
    const int64_t tile_stride = c.kv_heads * tile_size, scale_stride = c.kv_heads * 2 * kTile;
    const int64_t row_pieces = pieces_of(c.rows, c.rows * c.kv_heads * tile_size, threads);
    in_pieces(row_pieces, threads, [&](int64_t piece) {
        const Share share = share_of(c.rows, piece, row_pieces);
        for (int64_t t = share.begin; t < share.end; ++t) {
            const int64_t block = c.tables[c.sequence[t] * c.table_width + c.position[t] / kTile];
            for (int64_t g = 0; g < c.kv_heads; ++g)
                write_cache(c.k_cache + block * tile_stride + g * tile_size,
                            c.v_cache + block * tile_stride + g * tile_size,
                            c.scales + block * scale_stride + g * 2 * kTile, c.k + t * c.k_row + g * dim,
                            c.v + t * c.v_row + g * dim, c.position[t] % kTile, dim);
        }
    });
    // Rows that follow one another in a sequence go together, as many as there are registers for.
    const int64_t heads_together = group < kQueries ? group : kQueries, most = kQueries / heads_together;
    static thread_local Buffer<Unit> units_buffer;
    Unit* units = units_buffer.fit(c.rows);
    int64_t num_units = 0;
    for (int64_t t = 0; t < c.rows;) {
        int64_t count = 1;
        while (count < most && t + count < c.rows && c.sequence[t + count] == c.sequence[t] &&
               c.position[t + count] == c.position[t] + count)
            ++count;
        units[num_units++] = {t, count};
        t += count;
    }
    const int64_t count = num_units * c.kv_heads, pieces = count < 1 << 10 ? count : 1 << 10;
    in_pieces(pieces, threads, [&](int64_t piece) {
        static thread_local AttentionScratch scratch;
        const Share share = share_of(count, piece, pieces);
        for (int64_t i = share.begin; i < share.end; ++i) {
            const Unit unit = units[i / c.kv_heads];
            const int64_t t = unit.row, g = i % c.kv_heads;
            for (int64_t h = 0; h < group; h += heads_together) {
                const int64_t heads = group - h < heads_together ? group - h : heads_together;
                const int64_t head = g * group + h;
                const Queries at{c.q + t * c.q_row + head * dim, c.q_row, dim,
                                 c.out + (t * c.heads + head) * dim, c.heads * dim, dim,
                                 c.k_cache + g * tile_size, c.v_cache + g * tile_size, c.scales + g * 2 * kTile,
                                 tile_stride, scale_stride, c.tables + c.sequence[t] * c.table_width, c.position[t],
                                 c.window, dim, c.scaling, c.softcap,
                                 c.sinks ? c.sinks + head : nullptr};
                with_count<kQueries>(heads * unit.count, [&](auto size) {
                    Attention<size.value>{at, scratch, heads}.attend();
                });
            }
        }
    });
}

}  // namespace
