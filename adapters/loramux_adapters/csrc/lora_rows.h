// The LoRA deltas of one row, or of a few rows that use the same adapters: portable, and with AVX512-BF16.
//
// Both give, for each row alone, the sums of lora.cpp in the order given there; how many rows go together changes no bit.

#pragma once

#include <cstdint>
#include <vector>

#include "bf16.h"

namespace {

// One entry of a row: the first one begins the sum in `delta` [out], the last one adds it to y. Portable twin of the
// vector path; the compiler vectorizes the inner loops for the machine at hand.
#if defined(__x86_64__)
__attribute__((target_clones("arch=x86-64-v3", "default")))
#endif
void row_portable(
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

// Asks for memory that the next loop reads, a few lines at a time while this one computes.
struct Ahead {
    const uint16_t* at;
    const uint16_t* end;
    int64_t lines;  // at each step

    Ahead(const uint16_t* begin, int64_t count, int64_t steps)
        : at(begin), end(begin + count), lines((count / kLine + steps) / steps) {}

    void step() {
        for (int64_t n = 0; n < lines && at < end; ++n, at += kLine)
            _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    }

    static constexpr int64_t kLine = 64 / sizeof(uint16_t);
};

LORAMUX_BF16 inline __mmask32 mask_of(int64_t left) {
    return left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1u;
}

LORAMUX_BF16 inline __m512i load32(const uint16_t* p, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, p); }

// The even and the odd ones of 32 bf16 numbers, as fp32.
LORAMUX_BF16 inline __m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
LORAMUX_BF16 inline __m512 odd(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

LORAMUX_BF16 inline __m512i round_pairs(__m512 evens, __m512 odds) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(evens));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odds));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// h [rank, R] = scale * x [R, in] @ a [rank, in].T
template <int R>
LORAMUX_BF16 void shrink(float* h, const uint16_t* x, const Entry& entry, int64_t in, Ahead ahead) {
    constexpr int G = R > 2 ? 4 : 8;
    for (int64_t r0 = 0; r0 < entry.rank; r0 += G) {
        __m512 sum[R][G];
        for (auto& row : sum)
            for (auto& s : row) s = _mm512_setzero_ps();
        for (int64_t i = 0; i < in; i += 32) {
            const __mmask32 mask = mask_of(in - i);
            __m512bh xv[R];
            for (int t = 0; t < R; ++t) xv[t] = (__m512bh)load32(x + t * in + i, mask);
            for (int g = 0; g < G; ++g) {
                const auto av = (__m512bh)load32(entry.a + (r0 + g) * in + i, mask);
                for (int t = 0; t < R; ++t) sum[t][g] = _mm512_dpbf16_ps(sum[t][g], xv[t], av);
            }
            ahead.step();
        }
        for (int g = 0; g < G; ++g)
            for (int t = 0; t < R; ++t) h[(r0 + g) * R + t] = _mm512_reduce_add_ps(sum[t][g]) * entry.scale;
    }
}

// y [R, out] += h [all ranks, R].T @ the entries' bt, one below the other
template <int R>
LORAMUX_BF16 void expand(uint16_t* y, const float* h, const std::vector<Entry>& entries, int64_t out, Ahead ahead) {
    constexpr int U = R > 2 ? 2 : 4;  // vectors of 32 columns at a time
    for (int64_t o = 0; o < out; o += 32 * U) {
        __m512 evens[R][U], odds[R][U];
        __mmask32 mask[U];
        for (int u = 0; u < U; ++u) {
            mask[u] = mask_of(out - o - 32 * u);
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
                ahead.step();
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
LORAMUX_BF16 void rows_avx512bf16(uint16_t* y, const uint16_t* x, const std::vector<Entry>& entries, int64_t in,
                                  int64_t out, bool cached, const Entry* next, std::vector<float>& h) {
    int64_t ranks = 0;
    for (const Entry& entry : entries) ranks += entry.rank;
    h.resize(ranks * R);
    float* part = h.data();
    for (const Entry& entry : entries) {
        const int64_t steps = (entry.rank / (R > 2 ? 4 : 8)) * ((in + 31) / 32);
        shrink<R>(part, x, entry, in, Ahead(entry.bt, cached ? 0 : entry.rank * out, steps));
        part += entry.rank * R;
    }
    const int64_t steps = ranks * ((out + 127) / 128);
    const Ahead ahead = next ? Ahead(next->a, next->rank * in, steps) : Ahead(entries[0].a, 0, steps);
    expand<R>(y, h.data(), entries, out, ahead);
}

#endif

}  // namespace
