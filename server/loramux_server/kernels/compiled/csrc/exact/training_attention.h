// Causal attention of packed rows in fp32, forward and backward.
//
// Semantics, for token t of a row at position p of that row, head h, kv head g = h / (heads / kv_heads); the keys of a row
// are those of the tokens that all rows begin with, if it has them in front, and then its own:
//   z_j = softcap(scaling * q[t, h] . k[j, g]),  softcap(z) = cap * tanh(z / cap) where cap > 0
//   out[t, h] = sum_j w_j * v[j, g],  w = softmax(z) over max(0, p - window + 1) <= j <= p  (window <= 0: all)
//
// The weights are computed again in the backward pass. Every sum has one order: over keys, and for a key over heads and
// queries; what rows give to keys that they share is summed row after row.

#pragma once

#include "exact.h"
#include "gradients.h"
#include "matmul.h"

namespace {

constexpr int64_t kQueryBlock = 48;  // queries of a head that are computed together

struct RowKeys {  // of one row and kv head
    Buffer<float> k_buffer, v_buffer, kt_buffer, vt_buffer, dk_buffer, dv_buffer;
    float *k, *v;    // [keys, dim], zeros up to a multiple of 16
    float *kt, *vt;  // [dim, keys]
    float *dk, *dv;  // [keys, dim]
    int64_t wide;    // keys, up to a multiple of 16
};

struct TrainingAttention {
    const TrainingRows& rows;
    const TrainingHeads& heads;
    const float *q, *k, *v;

    int64_t keys_of(int64_t row) const { return rows.first[row] + rows.length[row]; }
    int64_t token_of(int64_t row, int64_t key) const {
        return key < rows.first[row] ? key : rows.start[row] + key - rows.first[row];
    }

    void gather(RowKeys& to, int64_t row, int64_t g, bool backward) const {
        const int64_t dim = heads.dim, keys = keys_of(row);
        to.wide = (keys + kLanes - 1) / kLanes * kLanes;
        const int64_t numbers = to.wide * dim;
        to.k = to.k_buffer.fit(numbers);
        to.v = to.v_buffer.fit(numbers);
        to.kt = to.kt_buffer.fit(numbers);
        std::memset(to.k + keys * dim, 0, (to.wide - keys) * dim * sizeof *to.k);
        std::memset(to.v + keys * dim, 0, (to.wide - keys) * dim * sizeof *to.v);
        for (int64_t key = 0; key < keys; ++key) {
            const int64_t at = (token_of(row, key) * heads.kv_heads + g) * dim;
            std::memcpy(to.k + key * dim, k + at, dim * sizeof *to.k);
            std::memcpy(to.v + key * dim, v + at, dim * sizeof *to.v);
        }
        pack_columns(to.kt, {to.k, 1, dim}, 0, to.wide, to.wide, dim);
        if (!backward) return;
        to.vt = to.vt_buffer.fit(numbers);
        pack_columns(to.vt, {to.v, 1, dim}, 0, to.wide, to.wide, dim);
        to.dk = to.dk_buffer.fit(numbers);
        to.dv = to.dv_buffer.fit(numbers);
        std::memset(to.dk, 0, numbers * sizeof *to.dk);
        std::memset(to.dv, 0, numbers * sizeof *to.dv);
    }

    struct Span {  // keys that queries [begin, end) of a row may see, as columns of 16
        int64_t low, high;
    };
    Span span(int64_t row, int64_t begin, int64_t end) const {
        const int64_t first = rows.first[row], high = (first + end + kLanes - 1) / kLanes * kLanes;
        const int64_t low = heads.window > 0 ? first + begin - heads.window + 1 : 0;
        return {low > 0 ? low / kLanes * kLanes : 0, high};
    }

    // scores [queries, wide], from span.low on, become weights that are not divided by their sum yet. `stats` [2] for each
    // query are the largest score and one over the sum: written, or with `known` read, and the weights are then divided.
    void weigh(float* scores, int64_t wide, int64_t row, int64_t begin, int64_t count, Span span, float* stats,
               int64_t stats_row, bool known) const {
        const Floats scaling = splat(static_cast<float>(heads.scaling)), cap = splat(static_cast<float>(heads.softcap));
        const int64_t width = span.high - span.low;
        for (int64_t t = 0; t < count; ++t) {
            float* s = scores + t * wide;
            const int64_t last = rows.first[row] + begin + t - span.low;  // of the keys seen
            const int64_t lowest = heads.window > 0 ? last - heads.window + 1 : 0, low = lowest > 0 ? lowest : 0;
            for (int64_t j = 0; j < width; j += kLanes) {
                Floats z = load(s + j) * scaling;
                if (heads.softcap > 0.) z = cap * tanh_of(z / cap);
                store(s + j, z);
            }
            for (int64_t j = 0; j < low; ++j) s[j] = -__builtin_inff();
            for (int64_t j = last + 1; j < width; ++j) s[j] = -__builtin_inff();
            float* at = stats + t * stats_row;
            if (!known) {
                Floats most = load(s);
                for (int64_t j = kLanes; j < width; j += kLanes) most = greater(load(s + j), most);
                at[0] = largest(most);
            }
            const Floats top = splat(at[0]), share = splat(known ? at[1] : 1.f);
            for (int64_t j = 0; j < width; j += kLanes) store(s + j, exp_of(load(s + j) - top) * share);
            for (int64_t j = 0; j < low; ++j) s[j] = 0.f;
            for (int64_t j = last + 1; j < width; ++j) s[j] = 0.f;
            if (known) continue;
            Floats sums = splat(0.f);
            for (int64_t j = 0; j < width; j += kLanes) sums = sums + load(s + j);
            at[1] = 1.f / total(sums);
        }
    }

    // out [tokens, heads, dim], stats [tokens, heads, 2]
    void forward(float* out, float* stats, int32_t threads) const {
        const int64_t dim = heads.dim, group = heads.heads / heads.kv_heads, q_row = heads.heads * dim;
        in_pieces(rows.count * heads.kv_heads, threads, [&](int64_t piece) {
            static thread_local RowKeys keys;
            static thread_local Buffer<float> score_buffer;
            const int64_t row = piece / heads.kv_heads, g = piece % heads.kv_heads, length = rows.length[row];
            gather(keys, row, g, false);
            float* scores = score_buffer.fit(kQueryBlock * keys.wide);
            for (int64_t begin = 0; begin < length; begin += kQueryBlock) {
                const int64_t count = length - begin < kQueryBlock ? length - begin : kQueryBlock;
                const Span seen = span(row, begin, begin + count);
                const int64_t width = seen.high - seen.low;
                for (int64_t h = g * group; h < (g + 1) * group; ++h) {
                    const int64_t at = (rows.start[row] + begin) * heads.heads + h;
                    multiply_wide(scores, keys.wide, {q + at * dim, q_row, 1}, keys.kt + seen.low, keys.wide, count, width,
                                  dim, false);
                    weigh(scores, keys.wide, row, begin, count, seen, stats + at * 2, heads.heads * 2, false);
                    float* to = out + at * dim;
                    multiply_wide(to, q_row, {scores, keys.wide, 1}, keys.v + seen.low * dim, dim, count, dim, width, false);
                    for (int64_t t = 0; t < count; ++t)
                        for (int64_t i = 0; i < dim; i += kLanes) {
                            float* numbers = to + t * q_row + i;
                            store(numbers, load(numbers) * splat(stats[(at + t * heads.heads) * 2 + 1]));
                        }
                }
            }
        });
    }

    // `slopes` [queries, wide]: what comes to the weights -> what comes to q . k.
    void through_softmax(float* slopes, const float* weights, int64_t wide, int64_t width, int64_t count, const float* out,
                         const float* d_out, int64_t head_row) const {
        const int64_t dim = heads.dim;
        const Floats scaling = splat(static_cast<float>(heads.scaling));
        for (int64_t t = 0; t < count; ++t) {
            Floats along = splat(0.f);
            for (int64_t i = 0; i < dim; i += kLanes)
                along = fma(load(out + t * head_row + i), load(d_out + t * head_row + i), along);
            const Floats mean = splat(total(along));
            float* to = slopes + t * wide;
            const float* w = weights + t * wide;
            for (int64_t j = 0; j < width; j += kLanes) store(to + j, load(w + j) * (load(to + j) - mean) * scaling);
        }
    }

    // 1 - (z / cap)^2 of the same scores, times the slopes.
    void through_softcap(float* slopes, const float* scores, int64_t wide, int64_t width, int64_t count) const {
        const Floats scaling = splat(static_cast<float>(heads.scaling)), cap = splat(static_cast<float>(heads.softcap));
        for (int64_t t = 0; t < count; ++t)
            for (int64_t j = 0; j < width; j += kLanes) {
                const Floats z = tanh_of(load(scores + t * wide + j) * scaling / cap);
                float* to = slopes + t * wide + j;
                store(to, load(to) * (splat(1.f) - z * z));
            }
    }

    // d_q as q; d_k and d_v as k; `given` [rows, kv_heads, shared, 2 * dim]: what each row gives to the shared keys.
    void backward(float* d_q, float* d_k, float* d_v, float* given, const float* d_out, const float* out, float* stats,
                  int32_t threads) const {
        const int64_t dim = heads.dim, kv = heads.kv_heads, group = heads.heads / kv, q_row = heads.heads * dim;
        const int64_t shared = rows.shared;
        in_pieces(rows.count * kv, threads, [&](int64_t piece) {
            static thread_local RowKeys keys;
            static thread_local Buffer<float> weight_buffer, slope_buffer, score_buffer;
            const int64_t row = piece / kv, g = piece % kv, length = rows.length[row], first = rows.first[row];
            gather(keys, row, g, true);
            const int64_t wide = keys.wide;
            float* weights = weight_buffer.fit(kQueryBlock * wide);
            float* slopes = slope_buffer.fit(kQueryBlock * wide);
            float* scores = heads.softcap > 0. ? score_buffer.fit(kQueryBlock * wide) : nullptr;
            for (int64_t h = g * group; h < (g + 1) * group; ++h)
                for (int64_t begin = 0; begin < length; begin += kQueryBlock) {
                    const int64_t count = length - begin < kQueryBlock ? length - begin : kQueryBlock;
                    const Span seen = span(row, begin, begin + count);
                    const int64_t width = seen.high - seen.low, at = (rows.start[row] + begin) * heads.heads + h;
                    const float *queries = q + at * dim, *d = d_out + at * dim;
                    multiply_wide(weights, wide, {queries, q_row, 1}, keys.kt + seen.low, wide, count, width, dim, false);
                    if (scores) std::memcpy(scores, weights, count * wide * sizeof *scores);
                    weigh(weights, wide, row, begin, count, seen, stats + at * 2, heads.heads * 2, true);
                    multiply_wide(slopes, wide, {d, q_row, 1}, keys.vt + seen.low, wide, count, width, dim, false);
                    through_softmax(slopes, weights, wide, width, count, out + at * dim, d, q_row);
                    if (scores) through_softcap(slopes, scores, wide, width, count);
                    multiply_wide(d_q + at * dim, q_row, {slopes, wide, 1}, keys.k + seen.low * dim, dim, count, dim, width,
                                  false);
                    multiply_wide(keys.dk + seen.low * dim, dim, {slopes, 1, wide}, queries, q_row, width, dim, count, true);
                    multiply_wide(keys.dv + seen.low * dim, dim, {weights, 1, wide}, d, q_row, width, dim, count, true);
                }
            for (int64_t key = 0; key < first; ++key) {
                float* to = given + ((row * kv + g) * shared + key) * 2 * dim;
                std::memcpy(to, keys.dk + key * dim, dim * sizeof *to);
                std::memcpy(to + dim, keys.dv + key * dim, dim * sizeof *to);
            }
            for (int64_t key = first; key < first + length; ++key) {
                const int64_t to = (token_of(row, key) * kv + g) * dim;
                std::memcpy(d_k + to, keys.dk + key * dim, dim * sizeof *d_k);
                std::memcpy(d_v + to, keys.dv + key * dim, dim * sizeof *d_v);
            }
        });
        for_rows(shared * kv, dim * rows.count, threads, [&](int64_t piece) {
            const int64_t key = piece / kv, g = piece % kv, to = piece * dim;
            for (int64_t row = 0; row < rows.count; ++row) {
                if (rows.first[row] == 0) continue;
                const float* from = given + ((row * kv + g) * shared + key) * 2 * dim;
                add_row(d_k + to, from, dim, 1.f);
                add_row(d_v + to, from + dim, dim, 1.f);
            }
        });
    }
};

}  // namespace
