// All kernels, for the instruction set of the file that includes this. Nothing here may be shared between such files, or
// the linker could take one instruction set's code for another's: everything is in anonymous namespaces, and no class
// template of the standard library is used.

#pragma once

#include "angles.h"
#include "changes.h"
#include "decoder.h"
#include "experts.h"
#include "sample.h"
#include "table.h"
#include "token_rows.h"
#include "training_kernels.h"

namespace {

// Rows of x [rows, in], rounded as a product reads them.
struct RoundedRows {
    Buffer<int16_t> numbers;
    Buffer<float> scales;
    Rows rows;

    RoundedRows(const float* x, int64_t count, int64_t in, float top, float weight_top, int32_t threads) {
        int16_t* q = numbers.fit(count * in);
        float* s = scales.fit(count * (in / kBlock));
        for_rows(count, in, threads, [&](int64_t t) {
            quantize_row(q + t * in, s + t * (in / kBlock), x + t * in, in, top, weight_top);
        });
        rows = {q, s, count};
    }
};

void exact_product(float* y, const float* x, const uint8_t* codes, const float* scales, int64_t rows, int64_t in,
                   int64_t out, int32_t threads) {
    const Nf4Weights weights{codes, scales, Levels(kNf4Levels), in, out};
    if (rows >= kManyRows) return multiply_many(y, x, weights, rows, kRowTop, kLevelTop, threads);
    const RoundedRows rounded(x, rows, in, kRowTop, kLevelTop, threads);
    multiply(y, rounded.rows, weights, nullptr, 0, threads);
}

void exact_dense(float* y, const float* x, const uint8_t* numbers, const float* scales, int64_t rows, int64_t in,
                 int64_t out, int32_t threads) {
    const RoundedRows rounded(x, rows, in, kRowTop, 1.f, threads);
    multiply(y, rounded.rows, DenseWeights{numbers, scales, in, out}, nullptr, 0, threads);
}

void exact_pack_head(uint8_t* numbers, float* scales, const uint16_t* w, int64_t vocabulary, int64_t padded, int64_t in,
                     int32_t threads) {
    in_pieces(padded / kLanes, threads, [&](int64_t tile) {
        for (int64_t o = tile * kLanes; o < (tile + 1) * kLanes; ++o)
            for (int64_t b = 0; b < in / kBlock; ++b) {
                float block[kBlock];
                int16_t rounded[kBlock];
                for (int64_t i = 0; i < kBlock; ++i)
                    block[i] = o < vocabulary ? widen(w[o * in + b * kBlock + i]) : 0.f;
                scales[b * padded + o] = quantize_block(rounded, block, kBlock, kLevelTop, 1.f);
                const int64_t at = tile * kLanes * in + b * kBlock * kLanes;
                uint8_t *high = numbers + at + o % kLanes * 2, *low = numbers + padded * in + at / 2 + o % kLanes * 2;
                for (int64_t i = 0; i < kBlock; ++i)
                    high[i / 2 * (2 * kLanes) + i % 2] = static_cast<uint8_t>(rounded[i] >> 4);
                for (int64_t i = 0; i < kBlock; i += 4)
                    for (int64_t one = 0; one < 2; ++one)
                        low[i / 4 * (2 * kLanes) + one] =
                            static_cast<uint8_t>((rounded[i + one] & 15) | (rounded[i + 2 + one] & 15) << 4);
            }
    });
}

void exact_norm(float* y, const float* x, const float* w, int64_t rows, int64_t dim, float eps, int32_t threads) {
    for_rows(rows, dim, threads, [&](int64_t t) { norm_row(y + t * dim, x + t * dim, w, dim, eps); });
}

void exact_gate(float* y, const float* gate, const float* up, int64_t rows, int64_t dim, int64_t row, bool gelu,
                int32_t threads) {
    for_rows(rows, dim, threads, [&](int64_t t) { gate_row(y + t * dim, gate + t * row, up + t * row, dim, gelu); });
}

void exact_softmax(float* y, const float* x, int64_t rows, int64_t count, int32_t threads) {
    for_rows(rows, count, threads, [&](int64_t t) { softmax_row(y + t * count, x + t * count, count); });
}

void exact_attention(const AttentionCall& call, int32_t threads) { attend(call, threads); }

void exact_add_lora(float* y, int64_t y_row, const float* x, const LoraArena* arena, const LoraEntries* rows,
                    int32_t threads) {
    add_lora(y, y_row, x, *arena, *rows, threads);
}

void exact_experts(float* y, const float* x, const ExactExperts* experts, const int64_t* index, const float* weights,
                   const LoraEntries* lora, int64_t rows, int32_t threads) {
    run_experts(y, x, *experts, index, weights, lora, rows, Levels(kNf4Levels), threads);
}

void exact_token_logits(float* y, int64_t y_row, float* wide, int64_t wide_row, const float* x, const TokenLogits* own,
                        int64_t vocabulary, int64_t dim, int32_t threads) {
    add_token_logits({y, wide, y_row, wide_row, vocabulary}, x, dim, *own, threads);
}

int64_t exact_scratch(const ExactModel* model, int64_t rows) { return Places(Widths(*model), rows, nullptr).bytes; }

void exact_step(const ExactModel* model, const ExactStep* step) { DecoderRun{*model, *step}.run(); }

constexpr ExactKernels kTable{exact_product,   exact_search,   exact_log_sums,  exact_first_tokens, exact_draw,
                              exact_change,    exact_dense,    exact_pack_head, exact_norm,         exact_gate,
                              exact_softmax,   exact_attention, exact_add_lora, exact_experts, exact_token_logits,
                              exact_scratch,   exact_step,
                              angles,
                              kTraining};

}  // namespace
