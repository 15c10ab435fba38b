// What stands between a decoder's products, each in one pass over a row: norm, activation, rotation, sums. All in fp32; a
// row is computed alone and in a fixed order. Widths are multiples of 16.

#pragma once

#include "exact.h"
#include "../threads.h"
#include "vec.h"

namespace {

// body(row) for rows of so many numbers, several to a piece.
template <class Body>
void for_rows(int64_t rows, int64_t width, int32_t threads, const Body& body) {
    constexpr int64_t kParallel = 1 << 13;  // numbers that a piece has at least: less is not worth another thread
    const int64_t together = width < kParallel ? kParallel / width : 1, pieces = (rows + together - 1) / together;
    in_pieces(pieces, threads, [&](int64_t piece) {
        const Share share = share_of(rows, piece, pieces);
        for (int64_t row = share.begin; row < share.end; ++row) body(row);
    });
}

// y = w * x / sqrt(mean(x^2) + eps)
inline void norm_row(float* y, const float* x, const float* w, int64_t dim, float eps) {
    Floats squares = splat(0.f);
    for (int64_t i = 0; i < dim; i += kLanes) {
        const Floats a = load(x + i);
        squares = fma(a, a, squares);
    }
    const Floats scale = splat(1.f / __builtin_sqrtf(total(squares) / static_cast<float>(dim) + eps));
    for (int64_t i = 0; i < dim; i += kLanes) store(y + i, load(x + i) * scale * load(w + i));
}

// y = activation(gate) * up; y may be gate
inline void gate_row(float* y, const float* gate, const float* up, int64_t dim, bool gelu) {
    for (int64_t i = 0; i < dim; i += kLanes) {
        const Floats g = load(gate + i);
        store(y + i, (gelu ? gelu_of(g) : silu_of(g)) * load(up + i));
    }
}

// y = exp(x) / sum(exp(x)); `count` is any number, and y may be x.
inline void softmax_row(float* y, const float* x, int64_t count) {
    const Floats lowest = splat(-3.4028235e38f);
    const auto part = [&](const float* from, int64_t i) {
        if (i + kLanes <= count) return load(from + i);
        float lanes[kLanes];
        store(lanes, lowest);
        for (int64_t k = 0; i + k < count; ++k) lanes[k] = from[i + k];
        return load(lanes);
    };
    Floats top = lowest, sum = splat(0.f);
    for (int64_t i = 0; i < count; i += kLanes) top = greater(part(x, i), top);
    const Floats best = splat(largest(top));
    const auto weight = [&](Floats s) { return pick_greater(s, lowest, exp_of(s - best), splat(0.f)); };
    for (int64_t i = 0; i < count; i += kLanes) sum = sum + weight(part(x, i));
    const Floats norm = splat(1.f / total(sum));
    for (int64_t i = 0; i < count; i += kLanes) {
        float lanes[kLanes];
        store(lanes, weight(part(x, i)) * norm);
        for (int64_t k = 0; k < kLanes && i + k < count; ++k) y[i + k] = lanes[k];
    }
}

// x = x, and at most `most` to either side of zero; NaN stays NaN.
inline void clip_row(float* x, int64_t dim, float most) {
    const Floats top = splat(most), least = splat(-most);
    for (int64_t i = 0; i < dim; i += kLanes) {
        const Floats below = pick_greater(load(x + i), top, top, load(x + i));
        store(x + i, pick_greater(least, below, least, below));
    }
}

// y += factor * x
inline void add_row(float* y, const float* x, int64_t dim, float factor) {
    for (int64_t i = 0; i < dim; i += kLanes) store(y + i, load(y + i) + load(x + i) * splat(factor));
}

// y += b, b of bf16
inline void add_bias(float* y, const uint16_t* b, int64_t dim) {
    for (int64_t i = 0; i < dim; i += kLanes) store(y + i, load(y + i) + widen(b + i));
}

// Rotary position embedding (https://arxiv.org/abs/2104.09864) of one head, each product rounded before the sum, as modules
// of PyTorch have it: `pairs` pairs of the dimensions i and
// i + pairs; cos and sin [pairs].
inline void rotate_head(float* x, const float* cos, const float* sin, int64_t pairs) {
    int64_t i = 0;
    for (; i + kLanes <= pairs; i += kLanes) {
        const Floats a = load(x + i), b = load(x + pairs + i), c = load(cos + i), s = load(sin + i);
        store(x + i, a * c - b * s);
        store(x + pairs + i, b * c + a * s);
    }
    for (; i < pairs; ++i) {  // what fills no vector, in the same way
        const float a = x[i], b = x[pairs + i];
        x[i] = a * cos[i] - b * sin[i];
        x[pairs + i] = b * cos[i] + a * sin[i];
    }
}

}  // namespace
