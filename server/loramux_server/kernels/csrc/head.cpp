// The output head: a dense bf16 product with many columns and few rows.
//
//   y[t, o] = bf16(sum_i x[t, i] * w[o, i])        bf16 products, fp32 sums
//
// A piece transposes the weights of 32 columns, so that one pair of x serves 16 columns, and uses them for all
// rows. Every (row, column) is summed alone, pair of inputs by pair, so its bits do not depend on the rows around it.

#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "row_groups.h"
#include "threads.h"
#include "vec.h"

namespace {

constexpr int64_t kColumns = 16;  // of a vector
constexpr int kVectors = 2;       // whose columns are computed together
constexpr int kRows = 8;          // that share a load of weights, at most
constexpr int64_t kRun = 16;      // pairs of inputs between two prefetches

#if defined(__x86_64__)

inline int32_t pair_of(const uint16_t* from, int64_t left) {  // a last number without another goes with zero
    int32_t pair = 0;
    std::memcpy(&pair, from, left > 1 ? 4 : 2);
    return pair;
}

// packed [in / 2, 16 columns] of pairs = the weights of `count` columns, w [count, in]; the columns beyond repeat the
// last. `prefetch`: also the weights of the next tile.
LORAMUX_AVX512BF16 void transpose(int32_t* packed, const uint16_t* w, int64_t in, int64_t count, bool prefetch) {
    const uint16_t* column[kColumns];
    for (int64_t o = 0; o < kColumns; ++o) column[o] = w + (o < count ? o : count - 1) * in;
    int64_t i = 0;
    for (; i + 8 <= in; i += 8, packed += 4 * kColumns) {
        if (prefetch && i % 32 == 0)
            for (int64_t o = 0; o < kColumns; ++o)
                _mm_prefetch(reinterpret_cast<const char*>(column[o] + kVectors * kColumns * in + i), _MM_HINT_T1);
        __m512i four[4];  // pairs of columns c, c + 4, c + 8, c + 12
        for (int c = 0; c < 4; ++c) {
            const auto at = [&](int o) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(column[o] + i)); };
            four[c] = _mm512_castsi128_si512(at(c));
            four[c] = _mm512_mask_broadcast_i32x4(four[c], 0x00f0, at(c + 4));
            four[c] = _mm512_mask_broadcast_i32x4(four[c], 0x0f00, at(c + 8));
            four[c] = _mm512_mask_broadcast_i32x4(four[c], 0xf000, at(c + 12));
        }
        const __m512i low01 = _mm512_unpacklo_epi32(four[0], four[1]), high01 = _mm512_unpackhi_epi32(four[0], four[1]);
        const __m512i low23 = _mm512_unpacklo_epi32(four[2], four[3]), high23 = _mm512_unpackhi_epi32(four[2], four[3]);
        _mm512_storeu_si512(packed, _mm512_unpacklo_epi64(low01, low23));
        _mm512_storeu_si512(packed + kColumns, _mm512_unpackhi_epi64(low01, low23));
        _mm512_storeu_si512(packed + 2 * kColumns, _mm512_unpacklo_epi64(high01, high23));
        _mm512_storeu_si512(packed + 3 * kColumns, _mm512_unpackhi_epi64(high01, high23));
    }
    for (; i < in; i += 2)
        for (int64_t o = 0; o < kColumns; ++o) *packed++ = pair_of(column[o] + i, in - i);
}

// sum += one pair of inputs, or one number, of R rows of x by two vectors of weights.
template <int R>
LORAMUX_AVX512BF16 inline void accumulate(__m512 (&sum)[R][kVectors], const uint16_t* x, int64_t numbers,
                                          const int32_t* packed, int64_t in) {
    __m512bh w[kVectors];
    for (int k = 0; k < kVectors; ++k)
        w[k] = (__m512bh)_mm512_loadu_si512(packed + k * ((in + 1) / 2) * kColumns);
    for (int t = 0; t < R; ++t) {
        const auto a = (__m512bh)_mm512_set1_epi32(pair_of(x + t * in, numbers));
        for (int k = 0; k < kVectors; ++k) sum[t][k] = _mm512_dpbf16_ps(sum[t][k], a, w[k]);
    }
}

// R rows by two vectors of columns, of which `count` are stored; for every kRun pairs `lines` cache lines from `ahead`
// on are prefetched.
template <int R>
LORAMUX_AVX512BF16 void multiply(uint16_t* y, const uint16_t* x, const int32_t* packed, int64_t in, int64_t out,
                                 int64_t count, const char* ahead, int64_t lines) {
    const int64_t pairs = (in + 1) / 2;
    __m512 sum[R][kVectors];
    for (auto& row : sum)
        for (auto& s : row) s = _mm512_setzero_ps();
    int64_t p = 0;
    for (; p + kRun <= in / 2; p += kRun) {
        for (int64_t line = 0; line < lines; ++line, ahead += kCacheLine) _mm_prefetch(ahead, _MM_HINT_T1);
        for (int64_t i = 0; i < kRun; ++i) accumulate<R>(sum, x + 2 * (p + i), 2, packed + (p + i) * kColumns, in);
    }
    for (; p < in / 2; ++p) accumulate<R>(sum, x + 2 * p, 2, packed + p * kColumns, in);
    if (p < pairs) accumulate<R>(sum, x + 2 * p, 1, packed + p * kColumns, in);
    for (int k = 0; k < kVectors; ++k) {
        const int64_t left = count - k * kColumns;
        const auto stored = static_cast<__mmask16>(left >= kColumns ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
        for (int t = 0; t < R; ++t)
            _mm256_mask_storeu_epi16(y + t * out + k * kColumns, stored, (__m256i)_mm512_cvtneps_pbh(sum[t][k]));
    }
}

#endif

}  // namespace

extern "C" {

// y [rows, out], x [rows, in], w [out, in], all bf16. Only where loramux_best_isa() is kAvx512Bf16.
void loramux_head(uint16_t* y, const uint16_t* x, const uint16_t* w, int64_t rows, int64_t in, int64_t out,
                  int32_t threads) {
#if defined(__x86_64__)
    if (rows == 0) return;
    constexpr int64_t kWide = kVectors * kColumns;
    const int64_t tiles = (out + kWide - 1) / kWide, pieces = pieces_of(tiles, rows * in * out, threads);
    in_pieces(pieces, threads, [&](int64_t piece) {
        static thread_local std::vector<int32_t> packed;
        const int64_t half = (in + 1) / 2 * kColumns;
        packed.resize(kVectors * half);
        const Share share = share_of(tiles, piece, pieces);
        const int64_t groups = (rows + kRows - 1) / kRows, lines = (kWide + groups - 1) / groups;
        for (int64_t o = share.begin * kWide; o < share.end * kWide && o < out; o += kWide) {
            // The next tile is prefetched while this one computes or, if that takes hardly any time, is transposed.
            const uint16_t *here = w + o * in, *next = here + kWide * in;
            const int64_t count = out - o < kWide ? out - o : kWide, second = count > kColumns ? kColumns : 0;
            const bool more = o + 2 * kWide <= out, few = rows < 4;
            transpose(packed.data(), here, in, count, more && few);
            transpose(packed.data() + half, here + second * in, in, count - second, more && few);
            for_row_groups<kRows>(rows, [&](auto size, int64_t first, int64_t left) {
                const int64_t before = (groups - left) * lines;
                const bool prefetches = more && !few && before < kWide;
                multiply<size.value>(y + first * out + o, x + first * in, packed.data(), in, out, count,
                                  reinterpret_cast<const char*>(next + before * in), prefetches ? lines : 0);
            });
        }
    });
#endif
}

}  // extern "C"
