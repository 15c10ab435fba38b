// All kernels, for the instruction set of the file that includes this. Nothing here may be shared between such files, or
// the linker could take one instruction set's code for another's: everything is in anonymous namespaces, and no class
// template of the standard library is used.

#pragma once

#include "decoder.h"
#include "table.h"

namespace {

void exact_product(float* y, const float* x, const uint8_t* codes, const float* scales, int64_t rows, int64_t in,
                   int64_t out, int32_t threads) {
    Buffer<int16_t> numbers;
    Buffer<float> row_scales;
    int16_t* q = numbers.fit(rows * in);
    float* s = row_scales.fit(rows * (in / kBlock));
    for (int64_t t = 0; t < rows; ++t)
        quantize_row(q + t * in, s + t * (in / kBlock), x + t * in, in, kRowTop, kLevelTop);
    multiply(y, Rows{q, s, rows}, Nf4Weights{codes, scales, Levels(kNf4Levels), in, out}, nullptr, 0, threads);
}

void exact_pack_head(int16_t* numbers, float* scales, const uint16_t* w, int64_t vocabulary, int64_t padded, int64_t in,
                     int32_t threads) {
    in_pieces(padded / kLanes, threads, [&](int64_t tile) {
        for (int64_t o = tile * kLanes; o < (tile + 1) * kLanes; ++o)
            for (int64_t b = 0; b < in / kBlock; ++b) {
                float block[kBlock];
                int16_t rounded[kBlock];
                for (int64_t i = 0; i < kBlock; ++i)
                    block[i] = o < vocabulary ? widen(w[o * in + b * kBlock + i]) : 0.f;
                scales[b * padded + o] = quantize_block(rounded, block, kBlock, kHeadTop, 1.f);
                int16_t* to = numbers + tile * kLanes * in + b * kBlock * kLanes + (o % kLanes) * 2;
                for (int64_t i = 0; i < kBlock; i += 2) std::memcpy(to + i * kLanes, rounded + i, 4);
            }
    });
}

int64_t exact_scratch(const ExactModel* model, int64_t rows) { return Places(Widths(*model), rows, nullptr).bytes; }

void exact_step(const ExactModel* model, const ExactStep* step) { DecoderRun{*model, *step}.run(); }

constexpr ExactKernels kTable{exact_product, exact_pack_head, exact_scratch, exact_step};

}  // namespace
