// The library's C ABI: what Python calls, and what kernels call of one another. Each is described where it is defined.
//
// abi.cpp describes these structures and functions in words, and abi.py compares them with its own when it loads the
// library. Whoever changes what one of them means, and not its form, raises kAbiVersion in both places.

#pragma once

#include <cstdint>

#include "prefetch.h"

namespace {

constexpr int32_t kAbiVersion = 5;
constexpr int64_t kCacheTile = 16;  // tokens in a block of the KV cache (kv_cache.py)
constexpr int64_t kRankGroup = 8;   // every slot's rank is a multiple of this (lora/slots.py)
constexpr uint8_t kHasDelta = 1, kHasAffine = 2;  // (lora/ops.py)

}  // namespace

struct LoraArena {            // one layer's adapters
    const uint16_t* a;        // [arena, inputs] bf16; null: none
    const uint16_t* bt;       // [arena, outputs] bf16
    const uint8_t* targeted;  // [arena / 8]: what the slot's adapter has for the layer, kHasDelta + kHasAffine
    // [arena / 8, 2, outputs], or null: of a slot, at the first of its groups, gain and shift of the layer's own output.
    const float* affine;
    int64_t inputs, outputs;
};

struct LoraEntries {        // of one step's rows
    const int32_t* first;   // [count + 1]: a row's entries are [first[t], first[t + 1])
    const int32_t* offset;  // [entries]: an entry's first arena row
    const int32_t* rank;    // [entries]: its arena rows
    const float* scale;     // [entries]: the factor of its delta
    int64_t count;
};

struct SlotWeights {  // of one layer: A [rank, inputs], B^T [rank, outputs]; rank 0 and null: none
    const uint16_t *a, *bt;
    const float* affine;  // [2, outputs], or null
    int64_t rank;
};

struct FilePair {  // as it lies in a file: A [rank, inputs], B [outputs, rank]; kinds as in adapter_copy.cpp
    int64_t a_offset, a_kind, b_offset, b_kind, rank, inputs, outputs;
};

extern "C" {

void loramux_convert_pairs(uint16_t* to, uint8_t* finite, const char* file, const FilePair* pairs, const float* scale,
                           int64_t count);
// Weights w [out, in] in bf16: their NF4 codes [out / 16, in / 4, 32] (exact/product.h), and the largest number of each
// block of 64, largest [out, in / 64]. `bounds` are the 15 numbers halfway between NF4's levels.
void loramux_nf4_quantize(uint8_t* codes, float* largest, const uint16_t* w, const float* bounds, int64_t out,
                          int64_t in, int32_t threads);
// `largest` as double quantization gives it back, less `offset`, their mean. `rounded` [65536]: what a
// number from -1 to 1 becomes, in equal steps.
void loramux_nf4_scales(float* scales, float* offset, const float* largest, const float* rounded, int64_t count,
                        int32_t threads);
// squares [out]: the sum of squares of each row of a weight in NF4, its codes and scales as exact/product.h says. A block's
// squares are summed as whole numbers, the blocks in order: the same bits on every processor.
void loramux_nf4_squares(double* squares, const uint8_t* codes, const float* scales, int64_t out, int64_t in,
                         int32_t threads);
void loramux_copy_slot(const LoraArena* const* arenas, const SlotWeights* weights, int64_t count, int64_t offset,
                       int64_t rank);

}  // extern "C"
