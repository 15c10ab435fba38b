// Logits of tokens whose row of the output head an adapter changes.
//
// Semantics, for each use u of such rows and each of their tokens t: y[at[u], t] += scales[u] * (x[at[u]] . rows[t]) in
// fp32, rows bf16. A token beyond the vocabulary has no logit of its own: its place lies in `wide`, holds minus infinity,
// and is replaced by the first product. A product has one order of sums, whoever shares the call.

#pragma once

#include "../threads.h"
#include "exact.h"
#include "vec.h"

namespace {

constexpr float kNever = -__builtin_inff();
constexpr float kLeastLogit = -3.4028234663852886e38f;  // of the finite numbers

struct TokenPlaces {  // where logits lie
    float* y;
    float* wide;
    int64_t y_row, wide_row, vocabulary;

    void add(int64_t row, int32_t token, float product) const {
        if (token < vocabulary) {
            y[row * y_row + token] += product;
            return;
        }
        float& to = wide[row * wide_row + token - vocabulary];
        to = to == kNever ? product : to + product;
    }
};

template <int U>
void add_token(const TokenPlaces& to, const float* x, int64_t dim, const TokenLogits& its, int64_t token, int64_t first) {
    Floats sum[U];
    for (auto& s : sum) s = splat(0.f);
    const uint16_t* row = its.rows + token * dim;
    for (int64_t i = 0; i < dim; i += kLanes) {
        const Floats weights = widen(row + i);
        for (int u = 0; u < U; ++u) sum[u] = fma(load(x + its.at[first + u] * dim + i), weights, sum[u]);
    }
    for (int u = 0; u < U; ++u)
        to.add(its.at[first + u], its.tokens[token], its.scales[first + u] * total(sum[u]));
}

// x [rows, dim], a multiple of 16.
inline void add_token_logits(const TokenPlaces& to, const float* x, int64_t dim, const TokenLogits& its, int32_t threads) {
    constexpr int64_t kTogether = 4;
    const int64_t pieces = pieces_of(its.count, 2 * its.count * dim * its.uses, threads);
    in_pieces(pieces, threads, [&](int64_t piece) {
        const Share share = share_of(its.count, piece, pieces);
        for (int64_t token = share.begin; token < share.end; ++token) {
            int64_t use = 0;
            for (; use + kTogether <= its.uses; use += kTogether) add_token<kTogether>(to, x, dim, its, token, use);
            for (; use < its.uses; ++use) add_token<1>(to, x, dim, its, token, use);
        }
    });
}

}  // namespace
