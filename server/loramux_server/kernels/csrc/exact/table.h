// What one instruction set has: the same functions, compiled once for each (portable.cpp, avx2.cpp, ...).

#pragma once

#include "exact.h"

struct ExactKernels {
    void (*product)(float* y, const float* x, const uint8_t* codes, const float* scales, int64_t rows, int64_t in,
                    int64_t out, int32_t threads);
    void (*pack_head)(int16_t* numbers, float* scales, const uint16_t* w, int64_t vocabulary, int64_t padded,
                      int64_t in, int32_t threads);
    int64_t (*scratch)(const ExactModel* model, int64_t rows);
    void (*step)(const ExactModel* model, const ExactStep* step);
};

// Null where this library was not compiled for it.
#define LORAMUX_HIDDEN __attribute__((visibility("hidden")))
extern LORAMUX_HIDDEN const ExactKernels* const kExactPortable;
extern LORAMUX_HIDDEN const ExactKernels* const kExactAvx2;
extern LORAMUX_HIDDEN const ExactKernels* const kExactAvxVnni;
extern LORAMUX_HIDDEN const ExactKernels* const kExactAvx512;
extern LORAMUX_HIDDEN const ExactKernels* const kExactAvx512Vnni;
extern LORAMUX_HIDDEN const ExactKernels* const kExactNeon;
