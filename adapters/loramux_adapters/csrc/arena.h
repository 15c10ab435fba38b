// Where one layer's adapters lie. For the kernels of this package; `_NativeArena` in ops.py.

#pragma once

#include <cstdint>

namespace {

constexpr int64_t kRankGroup = 8;  // every slot's rank is a multiple of this (slots.py)

}  // namespace

struct Arena {              // for all adapters
    const uint16_t* a;        // [arena, in] bf16
    const uint16_t* bt;       // [arena, out] bf16
    const uint8_t* targeted;  // [arena / 8]
    int64_t in, out;
};
