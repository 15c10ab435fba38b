// A product with an NF4 weight on the CPU. Plain C ABI, loaded by base/nf4_linear.py.
//
//   y[t, o] = bf16(sum_b scale[b, o] * sum_{i in block b} x[t, i] * level[code[o, i]])   bf16 products, fp32 sums
//
// Blocks are 64 inputs. Codes lie in tiles of 16 outputs by 4 inputs, 32 bytes: byte 2 o + p holds in its low half the code
// of input p, in its high half that of input p + 2, so that two look-ups give two operands of the pairwise dot product.
// Every (row, output) is summed alone and in a fixed order, so its bits do not depend on the rows around it.

#include <cstdint>
#include <vector>

#include "bf16.h"
#include "kernels.h"
#include "row_groups.h"
#include "threads.h"

namespace {

constexpr int64_t kOutputs = 16, kBlock = 64, kTile = 32;
constexpr int kTiles = 2, kRows = 8;  // that share a pair of x; that share a look-up, at most

// Asks for memory that is read after this product, a few lines now and then: with many rows than memory keeps a core busy.
// The pieces of every loop go to the threads in the same order (threads.h), so a piece asks for its own share of each
// later loop's memory: the core that asks is the one that reads.
class Ahead {
  public:
    // What one piece of the loop asks for, over so many steps.
    Ahead(const Reads* reads, int64_t count, int64_t piece, int64_t pieces, int64_t steps) {
        static thread_local std::vector<Span> spans;
        spans.clear();
        if (steps <= 0) return;
        int64_t lines = 0;
        for (const Reads* from = reads; from < reads + count; ++from) {
            int64_t bytes = 0, passed = 0;
            for (int64_t i = 0; i < from->count; ++i) bytes += from->spans[i].bytes;
            const Share share = share_of(bytes, piece, pieces);
            for (int64_t i = 0; i < from->count; passed += from->spans[i++].bytes) {
                const Span& span = from->spans[i];
                const int64_t begin = passed < share.begin ? share.begin - passed : 0;
                const int64_t end = span.bytes < share.end - passed ? span.bytes : share.end - passed;
                if (begin >= end) continue;
                spans.push_back({span.at + begin, end - begin});
                lines += (end - begin) / kLine + 1;
            }
        }
        lines_ = lines / steps + 1 < kMost ? lines / steps + 1 : kMost;
        next_ = spans.data();
        end_ = next_ + spans.size();
        take();
    }

    void step() {
        for (int64_t n = 0; n < lines_; ++n) {
            if (at_ >= stop_) {
                take();
                if (at_ >= stop_) return;
            }
            __builtin_prefetch(at_, 0, 2);
            at_ += kLine;
        }
    }

  private:
    void take() {
        if (next_ == end_) return;
        at_ = next_->at;
        stop_ = at_ + next_->bytes;
        ++next_;
    }

    static constexpr int64_t kLine = 64, kMost = 32;
    const Span *next_ = nullptr, *end_ = nullptr;
    int64_t lines_ = 0;
    const char *at_ = nullptr, *stop_ = nullptr;
};

#if defined(__x86_64__)

LORAMUX_BF16 inline __m512bh pair_at(const uint16_t* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

// R rows by two tiles of outputs, so that a pair of x serves both.
template <int R>
LORAMUX_BF16 void tiles(uint16_t* y, const uint16_t* x, const uint8_t* codes, const float* scales, __m512i levels,
                        int64_t in, int64_t out, Ahead& ahead) {
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
                const __m512bh a = pair_at(x + t * in + j), b = pair_at(x + t * in + j + 2);
                for (int k = 0; k < kTiles; ++k) part[t][k] = _mm512_dpbf16_ps(part[t][k], first[k], a);
                for (int k = 0; k < kTiles; ++k) part[t][k] = _mm512_dpbf16_ps(part[t][k], second[k], b);
            }
        }
        if (R >= 3) ahead.step();
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

LORAMUX_BF16 void outputs(uint16_t* y, const uint16_t* x, const uint8_t* codes, const float* scales,
                          const uint16_t* levels, int64_t rows, int64_t in, int64_t out, int64_t start, int64_t stop,
                          Ahead& ahead) {
    const __m512i table = _mm512_loadu_si512(levels);
    for (int64_t o = start; o < stop; o += kTiles * kOutputs)
        for_row_groups<kRows>(rows, [&](auto size, int64_t first, int64_t) {
            tiles<size.value>(y + first * out + o, x + first * in, codes + o * in / 2, scales + o, table, in, out, ahead);
        });
}

#endif

}  // namespace

extern "C" {

// y [rows, out], x [rows, in] bf16; codes [out / 16, in / 4, 32]; scales [in / 64, out] fp32; levels [32] bf16: the 16
// values of a code, twice; ahead [reads]: memory to ask for meanwhile. `out` is a multiple of 32, `in` of 64. Only where
// loramux_attention_has_avx512bf16() is 1.
void loramux_nf4_linear(uint16_t* y, const uint16_t* x, const uint8_t* codes, const float* scales,
                        const uint16_t* levels, int64_t rows, int64_t in, int64_t out, const Reads* ahead,
                        int64_t reads, int32_t threads) {
#if defined(__x86_64__)
    constexpr int64_t kWide = kTiles * kOutputs;
    const int64_t count = out / kWide, pieces = pieces_of(count, rows * in * out, threads);
    in_pieces(pieces, threads, [&](int64_t piece) {
        const Share share = share_of(count, piece, pieces);
        const int64_t steps = rows < 4 ? 0 : (rows + kRows - 1) / kRows * (share.end - share.begin) * (in / kBlock);
        Ahead part(ahead, reads, piece, pieces, steps);
        outputs(y, x, codes, scales, levels, rows, in, out, share.begin * kWide, share.end * kWide, part);
    });
#endif
}

}  // extern "C"
