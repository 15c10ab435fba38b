// The LoRA deltas of one row, or of a few rows that use the same adapters: portable, and with AVX512-BF16.
//
// Both give, for each row alone, the sums of lora.cpp in the order given there; how many rows go together changes no bit.

#pragma once

#include <cstdint>
#include <vector>

#include "prefetch.h"
#include "vec.h"

namespace {

// One entry of a row: the first one begins the sum in `delta` [out], the last one adds it to y. Portable twin of the
// vector path; the compiler vectorizes the inner loops for the machine at hand.
LORAMUX_CLONES_V3 void row_portable(
    uint16_t* y, const uint16_t* x, const uint16_t* a, const uint16_t* bt, int64_t in, int64_t out, int64_t rank,
    float scale, bool is_first, bool is_last, float* delta) {
    if (is_first) std::memset(delta, 0, sizeof(float) * out);
    for (int64_t r = 0; r < rank; ++r) {
        constexpr int kLanes = 16;
        float lanes[kLanes] = {};
        int64_t i = 0;
        for (; i + kLanes <= in; i += kLanes)
            for (int l = 0; l < kLanes; ++l) lanes[l] += widen(x[i + l]) * widen(a[r * in + i + l]);
        float h = 0.f;
        for (int l = 0; l < kLanes; ++l) h += lanes[l];
        for (; i < in; ++i) h += widen(x[i]) * widen(a[r * in + i]);
        h *= scale;
        const uint16_t* row = bt + r * out;
        for (int64_t o = 0; o < out; ++o) delta[o] += h * widen(row[o]);
    }
    if (!is_last) return;
    for (int64_t o = 0; o < out; ++o) y[o] = narrow(widen(y[o]) + delta[o]);
}

struct Entry {  // one adapter of a row
    const uint16_t* a;
    const uint16_t* bt;
    int64_t rank;
    float scale;
};

#if defined(__x86_64__)

// h [rank, R] = scale * x [R, in] @ a [rank, in].T
template <int R>
LORAMUX_AVX512BF16 void shrink(float* h, const uint16_t* x, const Entry& entry, int64_t in, RunPrefetch prefetch) {
    constexpr int G = R > 2 ? 4 : 8;
    for (int64_t r0 = 0; r0 < entry.rank; r0 += G) {
        __m512 sum[R][G];
        for (auto& row : sum)
            for (auto& s : row) s = _mm512_setzero_ps();
        for (int64_t i = 0; i < in; i += 32) {
            const __mmask32 mask = mask32(in - i);
            __m512bh xv[R];
            for (int t = 0; t < R; ++t) xv[t] = (__m512bh)load32(x + t * in + i, mask);
            for (int g = 0; g < G; ++g) {
                const auto av = (__m512bh)load32(entry.a + (r0 + g) * in + i, mask);
                for (int t = 0; t < R; ++t) sum[t][g] = _mm512_dpbf16_ps(sum[t][g], xv[t], av);
            }
            prefetch.step();
        }
        for (int g = 0; g < G; ++g)
            for (int t = 0; t < R; ++t) h[(r0 + g) * R + t] = _mm512_reduce_add_ps(sum[t][g]) * entry.scale;
    }
}

// y [R, out] += h [all ranks, R].T @ the entries' bt, one below the other
template <int R>
LORAMUX_AVX512BF16 void expand(uint16_t* y, const float* h, const std::vector<Entry>& entries, int64_t out,
                               RunPrefetch prefetch) {
    constexpr int U = R > 2 ? 2 : 4;  // vectors of 32 columns at a time
    for (int64_t o = 0; o < out; o += 32 * U) {
        __m512 evens[R][U], odds[R][U];
        __mmask32 mask[U];
        for (int u = 0; u < U; ++u) {
            mask[u] = mask32(out - o - 32 * u);
            for (int t = 0; t < R; ++t) evens[t][u] = odds[t][u] = _mm512_setzero_ps();
        }
        const float* factor = h;
        for (const Entry& entry : entries) {
            for (int64_t r = 0; r < entry.rank; ++r, factor += R) {
                for (int u = 0; u < U; ++u) {
                    const __m512i b = load32(entry.bt + r * out + o + 32 * u, mask[u]);
                    for (int t = 0; t < R; ++t) {
                        const __m512 by = _mm512_set1_ps(factor[t]);
                        evens[t][u] = _mm512_fmadd_ps(by, even(b), evens[t][u]);
                        odds[t][u] = _mm512_fmadd_ps(by, odd(b), odds[t][u]);
                    }
                }
                prefetch.step();
            }
        }
        for (int t = 0; t < R; ++t)
            for (int u = 0; u < U; ++u) {
                uint16_t* to = y + t * out + o + 32 * u;
                const __m512i before = load32(to, mask[u]);
                const __m512i sum = round_pairs(_mm512_add_ps(even(before), evens[t][u]),
                                                _mm512_add_ps(odd(before), odds[t][u]));
                _mm512_mask_storeu_epi16(to, mask[u], sum);
            }
    }
}

// R rows that use the same adapters; `next`, if any, is the first adapter that is used after them.
template <int R>
LORAMUX_AVX512BF16 void rows_avx512bf16(uint16_t* y, const uint16_t* x, const std::vector<Entry>& entries, int64_t in,
                                         int64_t out, bool cached, const Entry* next, std::vector<float>& h) {
    int64_t ranks = 0;
    for (const Entry& entry : entries) ranks += entry.rank;
    h.resize(ranks * R);
    float* part = h.data();
    for (const Entry& entry : entries) {
        const int64_t steps = (entry.rank / (R > 2 ? 4 : 8)) * ((in + 31) / 32);
        shrink<R>(part, x, entry, in, RunPrefetch(entry.bt, cached ? 0 : entry.rank * out, steps));
        part += entry.rank * R;
    }
    const int64_t steps = ranks * ((out + 127) / 128);
    const RunPrefetch prefetch(next ? next->a : nullptr, next ? next->rank * in : 0, steps);
    expand<R>(y, h.data(), entries, out, prefetch);
}

#endif

}  // namespace
