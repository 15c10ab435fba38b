// The greedy token of each row of logits, in one pass. Rows are searched alone.

#include <cstdint>

#include "kernels.h"
#include "threads.h"
#include "vec.h"

namespace {

// Numbers of bf16 in the order of their values: NaN is left out of it, both zeros are one.
inline int16_t ordered(uint16_t bits) {
    const auto word = static_cast<int16_t>(bits == 0x8000u ? 0u : bits);
    return static_cast<int16_t>(word ^ ((word >> 15) & 0x7fff));
}

LORAMUX_CLONES void argmax_of(int64_t* index, uint8_t* finite, const uint16_t* x, int64_t count) {
    int16_t top = INT16_MIN;
    uint16_t magnitude = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int16_t value = ordered(x[i]);
        const auto size = static_cast<uint16_t>(x[i] & 0x7fffu);
        top = value > top ? value : top;
        magnitude = size > magnitude ? size : magnitude;
    }
    constexpr uint16_t kInfinity = 0x7f80u;
    *finite = magnitude <= kInfinity && top > ordered(0xff80u) && top < kInfinity;  // no NaN, not all -inf, no +inf
    int64_t i = 0;
    while (i + 1 < count && ordered(x[i]) != top) ++i;
    *index = i;
}

}  // namespace

extern "C" {

// For each row of x [rows, count] bf16: the first index of its largest value, and whether that is finite and no value is
// NaN; with a NaN the index means nothing.
void loramux_argmax(int64_t* index, uint8_t* finite, const uint16_t* x, int64_t rows, int64_t count, int32_t threads) {
    in_pieces(rows, threads, [&](int64_t t) { argmax_of(index + t, finite + t, x + t * count, count); });
}

}  // extern "C"
