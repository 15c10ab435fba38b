// LoRA deltas of a heterogeneous batch on the CPU. Plain C ABI, loaded by ops.py through ctypes.
//
// Semantics, for each row t of x, over its entries e in [first[t], first[t + 1]) with targeted[offset[e] / granule] != 0:
//   h[e, r] = scale[e] * sum_i x[t, i] * a[offset[e] + r, i]               bf16 products, fp32 sums
//   y[t, :] = bf16(y[t, :] + sum_e sum_r h[e, r] * bt[offset[e] + r, :])   fp32 sums, one rounding
// Every row is computed alone, its entries in the order given, so its bits do not depend on the batch around it.

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define LORAMUX_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif

namespace {

constexpr int64_t kRankGroup = 8;  // every slot's rank is a multiple of this (slots.py)

inline float widen(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

inline uint16_t narrow(float value) {  // round to nearest even; NaN stays NaN
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((word >> 16) | 0x40u);
    return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

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

#if defined(__x86_64__)

LORAMUX_BF16 inline __m512 widen16(const uint16_t* p, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

LORAMUX_BF16 void shrink_group(float* h, const uint16_t* x, const uint16_t* a, int64_t in) {
    __m512 sum[kRankGroup];
    for (auto& s : sum) s = _mm512_setzero_ps();
    for (int64_t i = 0; i < in; i += 32) {
        const __mmask32 mask = in - i >= 32 ? ~0u : (1u << (in - i)) - 1u;
        const auto xv = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + i);
        for (int64_t r = 0; r < kRankGroup; ++r)
            sum[r] = _mm512_dpbf16_ps(sum[r], xv, (__m512bh)_mm512_maskz_loadu_epi16(mask, a + r * in + i));
    }
    for (int64_t r = 0; r < kRankGroup; ++r) h[r] = _mm512_reduce_add_ps(sum[r]);
}

LORAMUX_BF16 void row_avx512bf16(uint16_t* y, const uint16_t* x, const uint16_t* a, const uint16_t* bt, int64_t in,
                                 int64_t out, int64_t rank, float scale, bool is_first, bool is_last, float* delta) {
    for (int64_t r0 = 0; r0 < rank; r0 += kRankGroup) {
        float h[kRankGroup];
        shrink_group(h, x, a + r0 * in, in);
        __m512 hv[kRankGroup];
        for (int64_t r = 0; r < kRankGroup; ++r) hv[r] = _mm512_set1_ps(h[r] * scale);
        const bool begins = is_first && r0 == 0;
        const bool ends = is_last && r0 + kRankGroup == rank;
        for (int64_t o = 0; o < out; o += 16) {
            const __mmask16 mask = out - o >= 16 ? 0xffff : (1u << (out - o)) - 1u;
            __m512 acc = begins ? _mm512_setzero_ps() : _mm512_loadu_ps(delta + o);
            for (int64_t r = 0; r < kRankGroup; ++r)
                acc = _mm512_fmadd_ps(hv[r], widen16(bt + (r0 + r) * out + o, mask), acc);
            if (!ends) {
                _mm512_storeu_ps(delta + o, acc);
            } else {
                const auto sum = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(widen16(y + o, mask), acc));
                _mm256_mask_storeu_epi16(y + o, mask, sum);
            }
        }
    }
}

#endif

}  // namespace

extern "C" {

// 1 if this machine runs the AVX512-BF16 path, 0 for the portable one.
int loramux_lora_has_avx512bf16() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return 0;
#endif
}

// y [rows, out] bf16, changed in place; x [rows, in] bf16; a [arena, in] bf16; bt [arena, out] bf16;
// first [rows + 1] int32: a row's entries are [first[t], first[t + 1]); offset, rank [entries] int32: the arena rows of
// an entry's adapter; scale [entries] fp32: the factor of its delta; targeted [arena / 8] uint8.
void loramux_add_lora(uint16_t* y, const uint16_t* x, const uint16_t* a, const uint16_t* bt, const int32_t* first,
                      const int32_t* offset, const int32_t* rank, const float* scale, const uint8_t* targeted,
                      int64_t rows, int64_t in, int64_t out, int32_t portable, int32_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
    {
        std::vector<float> delta(out + 16);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows; ++t) {
            const auto counts = [&](int32_t e) { return targeted[offset[e] / kRankGroup] != 0; };
            int32_t begin = first[t], end = first[t + 1];
            while (begin < end && !counts(begin)) ++begin;
            while (begin < end && !counts(end - 1)) --end;
            for (int32_t e = begin; e < end; ++e) {
                if (!counts(e)) continue;
                const uint16_t* a_e = a + static_cast<int64_t>(offset[e]) * in;
                const uint16_t* bt_e = bt + static_cast<int64_t>(offset[e]) * out;
                const bool is_first = e == begin, is_last = e + 1 == end;
#if defined(__x86_64__)
                if (!portable) {
                    row_avx512bf16(y + t * out, x + t * in, a_e, bt_e, in, out, rank[e], scale[e], is_first, is_last,
                                   delta.data());
                    continue;
                }
#endif
                row_portable(y + t * out, x + t * in, a_e, bt_e, in, out, rank[e], scale[e], is_first, is_last,
                             delta.data());
            }
        }
    }
}

}  // extern "C"
