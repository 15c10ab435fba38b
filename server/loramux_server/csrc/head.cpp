// The output head on the CPU: a dense bf16 product with many columns and few rows. Plain C ABI, loaded by base/compiled_ops.py.
//
//   y[t, o] = bf16(sum_i x[t, i] * w[o, i])        bf16 products, fp32 sums
// Every (row, column) is summed alone and in a fixed order, so its bits do not depend on the rows around it.

#include <cstdint>
#include <cstring>

#include "bf16.h"
#include "kernels.h"
#include "threads.h"

namespace {

constexpr int kColumns = 8;  // computed together, and read ahead
constexpr int kRows = 3;
constexpr int64_t kTile = 64;      // columns that are written at a time
constexpr int64_t kTileRows = 48;  // of so many rows

#if defined(__x86_64__)

// The sum over the lanes of each of eight vectors.
LORAMUX_BF16 inline __m256 lane_sums(const __m512* sum) {
    __m256 half[kColumns];
    for (int o = 0; o < kColumns; ++o)
        half[o] = _mm256_add_ps(_mm512_castps512_ps256(sum[o]), _mm512_extractf32x8_ps(sum[o], 1));
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(half[4], half[5]), _mm256_hadd_ps(half[6], half[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// R rows of x by `count` columns, up to kColumns; `ahead`: where the weights lie that are read next.
template <int R>
LORAMUX_BF16 void block(uint16_t* y, const uint16_t* x, const uint16_t* w, const uint16_t* ahead, int64_t in,
                        int64_t out, int64_t count) {
    __m512 sum[R][kColumns];
    for (auto& row : sum)
        for (auto& s : row) s = _mm512_setzero_ps();
    const uint16_t* column[kColumns];
    for (int o = 0; o < kColumns; ++o) column[o] = w + (o < count ? o : count - 1) * in;
    int64_t i = 0;
    for (; i + 32 <= in; i += 32) {
        __m512bh xv[R];
        for (int t = 0; t < R; ++t) xv[t] = (__m512bh)_mm512_loadu_si512(x + t * in + i);
        for (int o = 0; o < kColumns; ++o) {
            if (ahead) _mm_prefetch(reinterpret_cast<const char*>(ahead + o * in + i), _MM_HINT_T0);
            const auto wv = (__m512bh)_mm512_loadu_si512(column[o] + i);
            for (int t = 0; t < R; ++t) sum[t][o] = _mm512_dpbf16_ps(sum[t][o], xv[t], wv);
        }
    }
    if (i < in) {
        const __mmask32 mask = (1u << (in - i)) - 1u;
        for (int o = 0; o < kColumns; ++o) {
            const auto wv = (__m512bh)_mm512_maskz_loadu_epi16(mask, column[o] + i);
            for (int t = 0; t < R; ++t)
                sum[t][o] = _mm512_dpbf16_ps(sum[t][o], (__m512bh)_mm512_maskz_loadu_epi16(mask, x + t * in + i), wv);
        }
    }
    const auto stored = static_cast<__mmask8>((1u << count) - 1u);
    for (int t = 0; t < R; ++t)
        _mm_mask_storeu_epi16(y + t * out, stored, (__m128i)_mm256_cvtneps_pbh(lane_sums(sum[t])));
}

// Columns [start, stop) of some rows, by way of a tile: rows of y lie whole pages apart and would push each other out of
// the cache if a few of their columns were written at a time.
LORAMUX_BF16 void columns(uint16_t* y, const uint16_t* x, const uint16_t* w, int64_t rows, int64_t in, int64_t out,
                          int64_t start, int64_t stop) {
    uint16_t tile[kTileRows * kTile];
    for (int64_t first = start; first < stop; first += kTile) {
        const int64_t last = first + kTile < stop ? first + kTile : stop;
        for (int64_t o = first; o < last; o += kColumns) {
            const int64_t count = last - o < kColumns ? last - o : kColumns;
            const uint16_t* next = o + 2 * kColumns <= stop ? w + (o + kColumns) * in : nullptr;
            for (int64_t t = 0; t < rows;) {
                const uint16_t *ahead = t == 0 ? next : nullptr, *from = x + t * in, *weights = w + o * in;
                uint16_t* to = tile + t * kTile + (o - first);
                if (rows - t >= kRows) {
                    block<kRows>(to, from, weights, ahead, in, kTile, count);
                    t += kRows;
                } else if (rows - t == 2) {
                    block<2>(to, from, weights, ahead, in, kTile, count);
                    t += 2;
                } else {
                    block<1>(to, from, weights, ahead, in, kTile, count);
                    t += 1;
                }
            }
        }
        for (int64_t t = 0; t < rows; ++t)
            std::memcpy(y + t * out + first, tile + t * kTile, (last - first) * sizeof(uint16_t));
    }
}

#endif

}  // namespace

extern "C" {

// y [rows, out], x [rows, in], w [out, in], all bf16. Only where loramux_attention_has_avx512bf16() is 1.
void loramux_head(uint16_t* y, const uint16_t* x, const uint16_t* w, int64_t rows, int64_t in, int64_t out,
                  int32_t threads) {
#if defined(__x86_64__)
    const int64_t tiles = (out + kTile - 1) / kTile, pieces = pieces_of(tiles, rows * in * out, threads);
    in_pieces(pieces, threads, [&](int64_t piece) {
        const Share share = share_of(tiles, piece, pieces);
        const int64_t start = share.begin * kTile, stop = share.end * kTile < out ? share.end * kTile : out;
        for (int64_t t = 0; t < rows; t += kTileRows)
            columns(y + t * out, x + t * in, w, rows - t < kTileRows ? rows - t : kTileRows, in, out, start, stop);
    });
#endif
}

}  // extern "C"
