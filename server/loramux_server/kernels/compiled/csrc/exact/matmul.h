// Products of fp32 matrices for training: what LoRA's small matrices and attention need, forward and backward.
//
// Semantics: c[m, n] = (add ? c[m, n] : 0) + sum_k a[m, k] * b[k, n], one fma after the other in the order of k. Each number
// of c has a lane of its own, so no order depends on the instruction set, on the threads or on how the work is cut.

#pragma once

#include "../buffer.h"
#include "../row_groups.h"
#include "../threads.h"
#include "vec.h"

namespace {

#if defined(__AVX512BW__) && !defined(LORAMUX_PORTABLE)
constexpr int kMatmulRows = 8, kMatmulTiles = 2;
#else
constexpr int kMatmulRows = 6, kMatmulTiles = 1;
#endif
constexpr int64_t kMatmulWide = kMatmulTiles * kLanes;

struct Matrix {  // element [i, j] at at[i * row + j * column]
    const float* at;
    int64_t row, column;
    Matrix from(int64_t i, int64_t j) const { return {at + i * row + j * column, row, column}; }
};

// R rows by T vectors; b's columns are contiguous.
template <int R, int T>
inline void multiply_block(float* c, int64_t c_row, const Matrix& a, const float* b, int64_t b_row, int64_t depth, bool add) {
    Floats sum[R][T];
    for (int t = 0; t < R; ++t)
        for (int k = 0; k < T; ++k) sum[t][k] = add ? load(c + t * c_row + k * kLanes) : splat(0.f);
    const float* from[R];
    for (int t = 0; t < R; ++t) from[t] = a.at + t * a.row;
    for (int64_t d = 0; d < depth; ++d, b += b_row) {
        Floats wide[T];
        for (int k = 0; k < T; ++k) wide[k] = load(b + k * kLanes);
        for (int t = 0; t < R; ++t) {
            const Floats one = splat(from[t][d * a.column]);
            for (int k = 0; k < T; ++k) sum[t][k] = fma(one, wide[k], sum[t][k]);
        }
    }
    for (int t = 0; t < R; ++t)
        for (int k = 0; k < T; ++k) store(c + t * c_row + k * kLanes, sum[t][k]);
}

// All rows by 16 * T columns.
template <int T>
void multiply_columns(float* c, int64_t c_row, const Matrix& a, const float* b, int64_t b_row, int64_t rows, int64_t depth,
                      bool add) {
    for_row_groups<kMatmulRows>(rows, [&](auto size, int64_t first, int64_t) {
        multiply_block<size.value, T>(c + first * c_row, c_row, a.from(first, 0), b, b_row, depth, add);
    });
}

// On this thread; b's columns are contiguous, `columns` a multiple of 16, and c may be written up to there.
inline void multiply_wide(float* c, int64_t c_row, const Matrix& a, const float* b, int64_t b_row, int64_t rows,
                          int64_t columns, int64_t depth, bool add) {
    int64_t n = 0;
    for (; n + kMatmulWide <= columns; n += kMatmulWide)
        multiply_columns<kMatmulTiles>(c + n, c_row, a, b + n, b_row, rows, depth, add);
    for (; n < columns; n += kLanes) multiply_columns<1>(c + n, c_row, a, b + n, b_row, rows, depth, add);
}

// to [depth, 16 * vectors] = b's columns from n on, zeros beyond `columns`.
inline void pack_columns(float* to, const Matrix& b, int64_t n, int64_t width, int64_t columns, int64_t depth) {
    const int64_t real = columns - n < width ? columns - n : width;
    if (b.column == 1) {
        for (int64_t d = 0; d < depth; ++d) {
            std::memcpy(to + d * width, b.at + d * b.row + n, real * sizeof *to);
            std::memset(to + d * width + real, 0, (width - real) * sizeof *to);
        }
        return;
    }
    for (int64_t j = 0; j < width; ++j) {
        const float* from = b.at + (n + j) * b.column;
        for (int64_t d = 0; d < depth; ++d) to[d * width + j] = j < real ? from[d * b.row] : 0.f;
    }
}

// c [rows, columns] of any sizes, its columns contiguous.
inline void matmul(float* c, int64_t c_row, const Matrix& a, const Matrix& b, int64_t rows, int64_t columns, int64_t depth,
                   bool add, int32_t threads) {
    if (depth == 0) {
        if (!add)
            for (int64_t m = 0; m < rows; ++m) std::memset(c + m * c_row, 0, columns * sizeof *c);
        return;
    }
    // Columns that are not contiguous, or are no whole vectors, are laid out once, [panels, depth, wide].
    static thread_local Buffer<float> packed_buffer;
    const bool packs = b.column != 1 || columns % kLanes != 0;
    const int64_t panels = (columns + kMatmulWide - 1) / kMatmulWide;
    float* packed = packs ? packed_buffer.fit(panels * depth * kMatmulWide) : nullptr;
    const auto width_of = [&](int64_t n) {
        const int64_t left = columns - n;
        return left > kLanes * (kMatmulTiles - 1) ? kMatmulWide : (left + kLanes - 1) / kLanes * kLanes;
    };
    if (packs)
        in_pieces(panels, depth * columns < 1 << 14 ? 1 : threads, [&](int64_t panel) {
            const int64_t n = panel * kMatmulWide;
            pack_columns(packed + n * depth, b, n, width_of(n), columns, depth);
        });
    const int64_t pieces = pieces_of(rows * panels, rows * columns * depth, threads);
    const int64_t chunks = rows < 2 * kMatmulRows || panels >= pieces ? 1 : (pieces + panels - 1) / panels;
    in_pieces(panels * chunks, threads, [&](int64_t piece) {
        static thread_local Buffer<float> edge_buffer;
        const int64_t n = piece / chunks * kMatmulWide, width = width_of(n), left = columns - n;
        const Share share = share_of(rows, piece % chunks, chunks);
        const int64_t count = share.end - share.begin;
        if (count == 0) return;
        const Matrix own = a.from(share.begin, 0);
        const float* from = packs ? packed + n * depth : b.at + n;
        const int64_t from_row = packs ? width : b.row;
        float* to = c + share.begin * c_row + n;
        if (left >= width) return multiply_wide(to, c_row, own, from, from_row, count, width, depth, add);
        float* edge = edge_buffer.fit(count * width);
        std::memset(edge, 0, count * width * sizeof *edge);
        if (add)
            for (int64_t m = 0; m < count; ++m) std::memcpy(edge + m * width, to + m * c_row, left * sizeof *edge);
        multiply_wide(edge, width, own, from, from_row, count, width, depth, add);
        for (int64_t m = 0; m < count; ++m) std::memcpy(to + m * c_row, edge + m * width, left * sizeof *edge);
    });
}

}  // namespace
