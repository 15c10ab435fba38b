// A product with an NF4 weight; nf4_linear.py lays it out.
//
//   y[t, o] = bf16(sum_b scale[b, o] * sum_{i in block b} x[t, i] * level[code[o, i]])   bf16 products, fp32 sums
//
// Blocks are 64 inputs. Codes lie in tiles of 16 outputs by 4 inputs, 32 bytes: byte 2 o + p holds in its low half the code
// of input p, in its high half that of input p + 2, so that two look-ups give two operands of the pairwise dot product.
// Every (row, output) is summed alone and in a fixed order, so its bits do not depend on the rows around it.

#include <cstdint>

#include "kernels.h"
#include "row_groups.h"
#include "threads.h"
#include "vec.h"

namespace {

constexpr int64_t kOutputs = 16, kBlock = 64, kTile = 32;
constexpr int kTiles = 2, kRows = 8;  // that share a pair of x; that share a look-up, at most

#if defined(__x86_64__)

// R rows by two tiles of outputs, so that a pair of x serves both.
template <int R>
LORAMUX_AVX512BF16 void multiply_tiles(uint16_t* y, const uint16_t* x, const uint8_t* codes, const float* scales,
                                       __m512i levels, int64_t in, int64_t out, SharePrefetch& prefetch) {
    __m512 sum[R][kTiles];
    for (auto& row : sum)
        for (auto& s : row) s = _mm512_setzero_ps();
    for (int64_t i = 0; i < in; i += kBlock, scales += out) {
        __m512 part[R][kTiles];
        for (auto& row : part)
            for (auto& s : row) s = _mm512_setzero_ps();
        for (int64_t j = i; j < i + kBlock; j += 4, codes += kTile) {
            __m512bh first[kTiles], second[kTiles];
            for (int k = 0; k < kTiles; ++k) {
                const auto* from = reinterpret_cast<const __m256i*>(codes + k * in / 4 * kTile);
                const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(from));
                // Of an index only five bits count, and both halves of `levels` are the same.
                first[k] = (__m512bh)_mm512_permutexvar_epi16(pairs, levels);
                second[k] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), levels);
            }
            for (int t = 0; t < R; ++t) {
                const __m512bh a = broadcast_pair(x + t * in + j), b = broadcast_pair(x + t * in + j + 2);
                for (int k = 0; k < kTiles; ++k) part[t][k] = _mm512_dpbf16_ps(part[t][k], first[k], a);
                for (int k = 0; k < kTiles; ++k) part[t][k] = _mm512_dpbf16_ps(part[t][k], second[k], b);
            }
        }
        if (R >= 3) prefetch.step();
        for (int k = 0; k < kTiles; ++k) {
            const __m512 scale = _mm512_loadu_ps(scales + k * kOutputs);
            for (int t = 0; t < R; ++t) sum[t][k] = _mm512_fmadd_ps(part[t][k], scale, sum[t][k]);
        }
    }
    for (int t = 0; t < R; ++t)
        for (int k = 0; k < kTiles; ++k)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + t * out + k * kOutputs),
                                (__m256i)_mm512_cvtneps_pbh(sum[t][k]));
}

LORAMUX_AVX512BF16 void multiply_outputs(uint16_t* y, const uint16_t* x, const uint8_t* codes, const float* scales,
                                         const uint16_t* levels, int64_t rows, int64_t in, int64_t out, int64_t start,
                                         int64_t stop, SharePrefetch& prefetch) {
    const __m512i table = _mm512_loadu_si512(levels);
    for (int64_t o = start; o < stop; o += kTiles * kOutputs)
        for_row_groups<kRows>(rows, [&](auto size, int64_t first, int64_t) {
            multiply_tiles<size.value>(y + first * out + o, x + first * in, codes + o * in / 2, scales + o, table, in,
                                       out, prefetch);
        });
}

#endif

}  // namespace

extern "C" {

// y [rows, out], x [rows, in] bf16; codes [out / 16, in / 4, 32]; scales [in / 64, out] fp32; levels [32] bf16: the 16
// values of a code, twice; reads [num_reads]: memory to prefetch meanwhile. `out` is a multiple of 32, `in` of 64. Only
// where loramux_best_isa() is kAvx512Bf16.
void loramux_nf4_linear(uint16_t* y, const uint16_t* x, const uint8_t* codes, const float* scales,
                        const uint16_t* levels, int64_t rows, int64_t in, int64_t out, const Reads* reads,
                        int64_t num_reads, int32_t threads) {
#if defined(__x86_64__)
    constexpr int64_t kWide = kTiles * kOutputs;
    const int64_t count = out / kWide, pieces = pieces_of(count, rows * in * out, threads);
    in_pieces(pieces, threads, [&](int64_t piece) {
        const Share share = share_of(count, piece, pieces);
        const int64_t steps = rows < 4 ? 0 : (rows + kRows - 1) / kRows * (share.end - share.begin) * (in / kBlock);
        SharePrefetch prefetch(reads, num_reads, piece, pieces, steps);
        multiply_outputs(y, x, codes, scales, levels, rows, in, out, share.begin * kWide, share.end * kWide, prefetch);
    });
#endif
}

}  // extern "C"
