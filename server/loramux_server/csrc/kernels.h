// The kernels of this library, for those that call one another; each is described where it is defined.

#pragma once

#include <cstdint>

#include "span.h"

namespace {

constexpr int64_t kCacheTile = 16;  // tokens in a block of the KV cache (kv_cache.py)

}  // namespace

extern "C" {

void loramux_nf4_linear(uint16_t* y, const uint16_t* x, const uint8_t* codes, const float* scales,
                        const uint16_t* levels, int64_t rows, int64_t in, int64_t out, const Reads* ahead,
                        int64_t reads, int32_t threads);
void loramux_head(uint16_t* y, const uint16_t* x, const uint16_t* w, int64_t rows, int64_t in, int64_t out,
                  int32_t threads);
void loramux_rms_norm(uint16_t* y, const uint16_t* x, const uint16_t* w, int64_t rows, int64_t dim, float eps,
                      int32_t threads);
void loramux_silu_mul(uint16_t* y, const uint16_t* gate, const uint16_t* up, int64_t rows, int64_t dim,
                      int32_t threads);
void loramux_add(uint16_t* y, const uint16_t* x, int64_t count, int32_t threads);
void loramux_rotate(uint16_t* x, const uint16_t* cos, const uint16_t* sin, const int32_t* position, int64_t rows,
                    int64_t heads, int64_t dim, int32_t threads);
void loramux_largest(int64_t* index, uint8_t* finite, const uint16_t* x, int64_t rows, int64_t count, int32_t threads);
void loramux_attend(uint16_t* out, const uint16_t* q, int64_t q_row, int64_t q_head, const uint16_t* k, int64_t k_row,
                    int64_t k_head, const uint16_t* v, int64_t v_row, int64_t v_head, uint16_t* k_cache,
                    uint16_t* v_cache, const int32_t* tables, int64_t table_width, const int32_t* sequence,
                    const int32_t* position, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim,
                    float scale, float softcap, int64_t window, int32_t portable, int32_t threads);

}  // extern "C"
