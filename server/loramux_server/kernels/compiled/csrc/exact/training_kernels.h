// What training adds to the kernels, for the instruction set of the file that includes this (compiled.h).

#pragma once

#include "backward.h"
#include "decoder.h"
#include "matmul.h"
#include "table.h"
#include "training_attention.h"

namespace {

void exact_product_transposed(float* dx, const float* dy, const uint8_t* codes, const float* scales, int64_t rows, int64_t in,
                              int64_t out, int32_t threads) {
    multiply_transposed(dx, dy, Nf4Weights{codes, scales, Levels(kNf4Levels), in, out}, rows, kNf4Steep, threads);
}

void exact_dense_transposed(float* dx, const float* dy, const uint8_t* numbers, const float* scales, int64_t rows, int64_t in,
                            int64_t out, int32_t threads) {
    multiply_transposed(dx, dy, DenseWeights{numbers, scales, in, out}, rows, kDenseSteep, threads);
}

void exact_matmul(float* c, int64_t c_row, const FloatMatrix* a, const FloatMatrix* b, int64_t rows, int64_t columns,
                  int64_t depth, bool add, int32_t threads) {
    matmul(c, c_row, {a->numbers, a->row, a->column}, {b->numbers, b->row, b->column}, rows, columns, depth, add, threads);
}

void exact_norm_gradient(float* dx, const float* dy, const float* x, const float* w, int64_t rows, int64_t dim, float eps,
                         int32_t threads) {
    for_rows(rows, dim, threads, [&](int64_t t) { norm_gradient_row(dx + t * dim, dy + t * dim, x + t * dim, w, dim, eps); });
}

void exact_activation(float* y, const float* x, const float* dy, int64_t count, bool gelu, int32_t threads) {
    const auto at = [&](const float* numbers, const float* slopes) {
        const Floats a = load(numbers);
        return slopes ? load(slopes) * activation_slope(a, gelu) : activation_of(a, gelu);
    };
    for_rows(count / kLanes, kLanes, threads, [&](int64_t i) {
        store(y + i * kLanes, at(x + i * kLanes, dy ? dy + i * kLanes : nullptr));
    });
    const int64_t whole = count / kLanes * kLanes, rest = count - whole;
    if (rest == 0) return;
    float numbers[kLanes] = {}, slopes[kLanes] = {};
    std::memcpy(numbers, x + whole, rest * sizeof *x);
    if (dy) std::memcpy(slopes, dy + whole, rest * sizeof *dy);
    store(numbers, at(numbers, dy ? slopes : nullptr));
    std::memcpy(y + whole, numbers, rest * sizeof *y);
}

void exact_gate_gradient(float* d_gate, float* d_up, const float* dy, const float* gate, const float* up, int64_t count,
                         bool gelu, int32_t threads) {
    for_rows(count / kLanes, kLanes, threads, [&](int64_t i) {
        const int64_t at = i * kLanes;
        const Floats g = load(gate + at), slope = load(dy + at);
        store(d_up + at, activation_of(g, gelu) * slope);
        store(d_gate + at, slope * load(up + at) * activation_slope(g, gelu));
    });
}

void exact_loss(float* logits, double* loss, uint8_t* correct, const int64_t* labels, int64_t rows, int64_t vocabulary,
                int64_t padded, float factor, float softcap, bool gradient, int32_t threads) {
    for_rows(rows, padded, threads, [&](int64_t t) {
        const LossRow row = loss_row(logits + t * padded, labels[t], vocabulary, padded, factor, softcap, gradient);
        loss[t] = row.loss;
        correct[t] = row.correct;
    });
}

void exact_attend(float* out, float* stats, const float* q, const float* k, const float* v, const TrainingRows* rows,
                  const TrainingHeads* heads, int32_t threads) {
    TrainingAttention{*rows, *heads, q, k, v}.forward(out, stats, threads);
}

void exact_attend_gradient(float* d_q, float* d_k, float* d_v, float* given, const float* d_out, const float* out,
                           float* stats, const float* q, const float* k, const float* v, const TrainingRows* rows,
                           const TrainingHeads* heads, int32_t threads) {
    TrainingAttention{*rows, *heads, q, k, v}.backward(d_q, d_k, d_v, given, d_out, out, stats, threads);
}

constexpr TrainingKernels kTraining{exact_product_transposed, exact_dense_transposed, exact_matmul,
                                    exact_norm_gradient,      exact_activation,       exact_gate_gradient,
                                    exact_loss,               exact_attend,           exact_attend_gradient};

}  // namespace
