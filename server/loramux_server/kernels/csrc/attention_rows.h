// Attention of a few query rows and heads over the keys and values that they share, with AVX512-BF16.
//
// Vectors (one row, one head each) go through the same sums in the same order however many go together: what a row does
// not see has weight zero, and adding nothing changes no bit.

#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "vec.h"

namespace {

constexpr int64_t kTile = kCacheTile;

// Rows of one sequence that follow one another, with the heads of one kv head.
struct Queries {
    const uint16_t* q;
    int64_t q_row, q_head;  // strides
    uint16_t* out;
    int64_t out_row, out_head;
    const uint16_t* k;  // cache of the layer, at this kv head
    const uint16_t* v;
    int64_t block_stride;   // between blocks, in elements
    const int32_t* blocks;  // block table of the sequence
    int64_t position;       // of the first row
    int64_t window;         // <= 0: none
    int64_t head_dim;
    float scale, softcap;

    // Keys that row `r` sees.
    int64_t first(int64_t r) const { return window > 0 && position + r >= window ? position + r - window + 1 : 0; }
    int64_t last(int64_t r) const { return position + r; }
};

// What a thread works in, grown to the longest span it has met.
struct Scratch {
    std::vector<int32_t> q, weights;  // pairs of bf16 [pairs, vectors]
    std::vector<float> scores;        // [vectors, span]

    void fit(size_t vectors, size_t pairs, size_t span) {
        if (q.size() < pairs * vectors) q.resize(pairs * vectors);
        if (scores.size() < span * vectors) scores.resize(span * vectors);
        if (weights.size() < span / 2 * vectors) weights.resize(span / 2 * vectors);
    }
};

#if defined(__x86_64__)

// What is read next, while this is computed: one row alone waits for memory.
template <bool wanted>
LORAMUX_AVX512BF16 inline void prefetch(const uint16_t* at) {
    if (wanted) _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}

// R rows of H heads.
template <int R, int H>
struct Vectors {
    static constexpr int kCount = R * H;
    static constexpr int kWide = kCount <= 6 ? 4 : 2;  // vectors of 16 output dimensions at a time

    const Queries& at;
    Scratch& scratch;
    const int64_t tile0 = at.first(0) / kTile, tile1 = at.last(R - 1) / kTile;
    const int64_t span = (tile1 - tile0 + 1) * kTile;

    void attend() {
        const int64_t pairs = at.head_dim / 2;
        scratch.fit(kCount, pairs, span);
        for (int64_t d = 0; d < pairs; ++d)
#pragma GCC unroll 16
            for (int i = 0; i < kCount; ++i)
                std::memcpy(&scratch.q[d * kCount + i], at.q + i / H * at.q_row + i % H * at.q_head + 2 * d, 4);
        float best[kCount], total[kCount];
        score(best);
        softmax(best, total);
        int64_t d0 = 0;
        for (; d0 + 16 * kWide <= at.head_dim; d0 += 16 * kWide) sum_values<kWide>(d0, total);
        for (; d0 < at.head_dim; d0 += 16) sum_values<1>(d0, total);
    }

    // Scores against every key tile: fills scratch.scores and best.
    LORAMUX_AVX512BF16 void score(float* best) {
        const int64_t pairs = at.head_dim / 2;
        float* scores = scratch.scores.data();
        const __m512 scale = _mm512_set1_ps(at.scale);
        __m512 top[kCount];
        for (auto& t : top) t = _mm512_set1_ps(-INFINITY);
        for (int64_t tile = tile0; tile <= tile1; ++tile) {
            const uint16_t* k = at.k + at.blocks[tile] * at.block_stride;
            const uint16_t* next = at.k + at.blocks[tile < tile1 ? tile + 1 : tile] * at.block_stride;
            const int32_t* q = scratch.q.data();
            __m512 even[kCount], odd[kCount];  // two chains each hide the latency of the dot product
#pragma GCC unroll 16
            for (int i = 0; i < kCount; ++i) even[i] = odd[i] = _mm512_setzero_ps();
            for (int64_t d = 0; d < pairs; d += 2, q += 2 * kCount) {
                const auto k0 = (__m512bh)_mm512_loadu_si512(k + d * kTile * 2);
                const auto k1 = (__m512bh)_mm512_loadu_si512(k + (d + 1) * kTile * 2);
                prefetch<R == 1>(next + d * kTile * 2);
                prefetch<R == 1>(next + (d + 1) * kTile * 2);
#pragma GCC unroll 16
                for (int i = 0; i < kCount; ++i)
                    even[i] = _mm512_dpbf16_ps(even[i], k0, (__m512bh)_mm512_set1_epi32(q[i]));
#pragma GCC unroll 16
                for (int i = 0; i < kCount; ++i)
                    odd[i] = _mm512_dpbf16_ps(odd[i], k1, (__m512bh)_mm512_set1_epi32(q[kCount + i]));
            }
#pragma GCC unroll 16
            for (int i = 0; i < kCount; ++i) even[i] = _mm512_mul_ps(_mm512_add_ps(even[i], odd[i]), scale);
#pragma GCC unroll 16
            for (int i = 0; i < kCount; ++i) _mm512_storeu_ps(scores + i * span + (tile - tile0) * kTile, even[i]);
            if (at.softcap > 0.f || tile * kTile < at.first(R - 1) || tile * kTile + kTile - 1 > at.last(0)) {
                for (int i = 0; i < kCount; ++i) mask(scores + i * span + (tile - tile0) * kTile, tile * kTile, i / H);
            }
            for (int i = 0; i < kCount; ++i)  // in this order NaN is passed over
                top[i] = _mm512_max_ps(_mm512_loadu_ps(scores + i * span + (tile - tile0) * kTile), top[i]);
        }
        for (int i = 0; i < kCount; ++i) best[i] = _mm512_reduce_max_ps(top[i]);
    }

    // Caps a tile of scores, and masks the keys that row `r` does not see; `base` is the tile's first key.
    LORAMUX_AVX512BF16 void mask(float* scores, int64_t base, int64_t r) const {
        if (at.softcap > 0.f)
            for (int64_t j = 0; j < kTile; ++j) scores[j] = at.softcap * std::tanh(scores[j] / at.softcap);
        const int64_t before = at.first(r) - base, after = base + kTile - 1 - at.last(r);
        uint32_t seen = 0xffffu;
        if (before > 0) seen = before < kTile ? seen << before : 0;
        if (after > 0) seen &= after < kTile ? 0xffffu >> after : 0;
        _mm512_mask_storeu_ps(scores, static_cast<__mmask16>(~seen), _mm512_set1_ps(-INFINITY));
    }

    // Scores to bf16 weights exp(s - best), in pairs of keys; total gets their sums before rounding.
    LORAMUX_AVX512BF16 void softmax(const float* best, float* total) {
        for (int i = 0; i < kCount; ++i) {
            const float* scores = scratch.scores.data() + i * span;
            int32_t* weights = scratch.weights.data() + i;
            const __m512 top = _mm512_set1_ps(best[i]);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t j = 0; j < span; j += kTile) {
                const __m512 s = _mm512_loadu_ps(scores + j);
                const __mmask16 finite = _mm512_cmp_ps_mask(s, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
                const __m512 w = _mm512_maskz_mov_ps(finite, exp_nonpositive(_mm512_sub_ps(s, top)));
                sum = _mm512_add_ps(sum, w);
                int32_t pairs[kTile / 2];
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs), (__m256i)_mm512_cvtneps_pbh(w));
                for (int64_t p = 0; p < kTile / 2; ++p) weights[(j / 2 + p) * kCount] = pairs[p];
            }
            total[i] = _mm512_reduce_add_ps(sum);
        }
    }

    // Output dimensions [d0, d0 + 16 * wide): the weighted sums of the values, kept in registers.
    // Keys after the last row's may hold another sequence's leftovers (even NaN): they are never multiplied.
    template <int wide>
    LORAMUX_AVX512BF16 void sum_values(int64_t d0, const float* total) {
        __m512 acc[kCount][wide];
#pragma GCC unroll 16
        for (auto& row : acc)
            for (auto& a : row) a = _mm512_setzero_ps();
        const int32_t* w = scratch.weights.data();
        for (int64_t tile = tile0; tile <= tile1; ++tile) {
            const uint16_t* v = at.v + at.blocks[tile] * at.block_stride + 2 * d0;
            const uint16_t* next = at.v + at.blocks[tile < tile1 ? tile + 1 : tile] * at.block_stride + 2 * d0;
            const int64_t end = tile == tile1 ? at.last(R - 1) % kTile : kTile - 1;
            for (int64_t pair = 0; pair <= end / 2; ++pair, w += kCount) {
                const __mmask32 keep = 2 * pair == end ? 0x55555555u : 0xffffffffu;
                const int64_t row = pair * at.head_dim * 2;
                __m512bh value[wide];
                for (int c = 0; c < wide; ++c) {
                    value[c] = (__m512bh)_mm512_maskz_loadu_epi16(keep, v + row + 32 * c);
                    prefetch<R == 1>(next + row + 32 * c);
                }
#pragma GCC unroll 16
                for (int i = 0; i < kCount; ++i) {
                    const auto by = (__m512bh)_mm512_set1_epi32(w[i]);
                    for (int c = 0; c < wide; ++c) acc[i][c] = _mm512_dpbf16_ps(acc[i][c], value[c], by);
                }
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
            const __m512 norm = _mm512_set1_ps(1.f / total[i]);
            uint16_t* out = at.out + i / H * at.out_row + i % H * at.out_head + d0;
            for (int c = 0; c < wide; ++c)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * c),
                                    (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(acc[i][c], norm)));
        }
    }
};

#endif

}  // namespace
