// What one instruction set has: the same functions, compiled once for each (portable.cpp, avx2.cpp, ...).

#pragma once

#include "exact.h"
#include "training.h"

struct TrainingKernels {
    void (*product_transposed)(float* dx, const float* dy, const uint8_t* codes, const float* scales, int64_t rows,
                               int64_t in, int64_t out, int32_t threads);
    void (*dense_transposed)(float* dx, const float* dy, const uint8_t* numbers, const float* scales, int64_t rows,
                             int64_t in, int64_t out, int32_t threads);
    void (*matmul)(float* c, int64_t c_row, const FloatMatrix* a, const FloatMatrix* b, int64_t rows, int64_t columns,
                   int64_t depth, bool add, int32_t threads);
    void (*norm_gradient)(float* dx, const float* dy, const float* x, const float* w, int64_t rows, int64_t dim, float eps,
                          int32_t threads);
    void (*activation)(float* y, const float* x, const float* dy, int64_t count, bool gelu, int32_t threads);
    void (*gate_gradient)(float* d_gate, float* d_up, const float* dy, const float* gate, const float* up, int64_t count,
                          bool gelu, int32_t threads);
    void (*loss)(float* logits, double* loss, uint8_t* correct, const int64_t* labels, int64_t rows, int64_t vocabulary,
                 int64_t padded, float factor, float softcap, bool gradient, int32_t threads);
    void (*attend)(float* out, float* stats, const float* q, const float* k, const float* v, const TrainingRows* rows,
                   const TrainingHeads* heads, int32_t threads);
    void (*attend_gradient)(float* d_q, float* d_k, float* d_v, float* given, const float* d_out, const float* out,
                            float* stats, const float* q, const float* k, const float* v, const TrainingRows* rows,
                            const TrainingHeads* heads, int32_t threads);
};

// Queries, keys and values of one layer; attention.h says what is done with them.
struct AttentionCall {
    const float *q, *k, *v;           // [rows, heads, head_dim], [rows, kv_heads, head_dim]: at these strides
    int64_t q_row, k_row, v_row;      // the last two axes are dense
    float* out;                       // [rows, heads, head_dim]
    int16_t *k_cache, *v_cache;       // [blocks, kv_heads, tile]
    float* scales;                    // [blocks, kv_heads, 2, 16]
    const int32_t *tables, *sequence, *position;
    int64_t table_width, rows, heads, kv_heads, head_dim, window;
    float scaling, softcap;
    const float* sinks;  // [heads], or null
};

struct ExactKernels {
    void (*product)(float* y, const float* x, const uint8_t* codes, const float* scales, int64_t rows, int64_t in,
                    int64_t out, int32_t threads);
    void (*search)(int64_t* index, uint8_t* finite, const float* x, int64_t rows, int64_t count, int64_t stride,
                   int32_t threads);
    void (*log_sums)(double* sums, const float* x, const int64_t* rows, int64_t num_rows, int64_t count, int64_t stride,
                     int32_t threads);
    void (*first_tokens)(int64_t* tokens, int64_t wanted, const float* x, const int64_t* rows, int64_t num_rows,
                         int64_t count, int64_t stride, int32_t threads);
    void (*draw)(int64_t* tokens, const float* x, const TokenDraw* draws, int64_t num_draws, int64_t count,
                 int64_t stride, int32_t threads);
    void (*change)(float* y, int64_t y_row, const float* x, const LogitChange* changes, int64_t num_changes,
                   int64_t count, int64_t stride, int32_t threads);
    void (*dense)(float* y, const float* x, const uint8_t* numbers, const float* scales, int64_t rows, int64_t in,
                  int64_t out, int32_t threads);
    void (*pack_head)(uint8_t* numbers, float* scales, const uint16_t* w, int64_t vocabulary, int64_t padded,
                      int64_t in, int32_t threads);
    void (*norm)(float* y, const float* x, const float* w, int64_t rows, int64_t dim, float eps, int32_t threads);
    void (*gate)(float* y, const float* gate, const float* up, int64_t rows, int64_t dim, int64_t row, bool gelu,
                 int32_t threads);
    void (*softmax)(float* y, const float* x, int64_t rows, int64_t count, int32_t threads);
    void (*attention)(const AttentionCall& call, int32_t threads);
    void (*add_lora)(float* y, int64_t y_row, const float* x, const LoraArena* arena, const LoraEntries* rows,
                     int32_t threads);
    void (*experts)(float* y, const float* x, const ExactExperts* experts, const int64_t* index, const float* weights,
                    const LoraEntries* lora, int64_t rows, int32_t threads);
    void (*token_logits)(float* y, int64_t y_row, float* wide, int64_t wide_row, const float* x, const TokenLogits* own,
                         int64_t vocabulary, int64_t dim, int32_t threads);
    int64_t (*scratch)(const ExactModel* model, int64_t rows);
    void (*step)(const ExactModel* model, const ExactStep* step);
    void (*angles)(float* cos, float* sin, const float* inv_freq, int64_t first, int64_t count, int64_t pairs,
                   double factor);
    TrainingKernels training;
};

// Null where this library was not compiled for it.
#define LORAMUX_HIDDEN __attribute__((visibility("hidden")))
extern LORAMUX_HIDDEN const ExactKernels* const kExactPortable;
extern LORAMUX_HIDDEN const ExactKernels* const kExactAvx2;
extern LORAMUX_HIDDEN const ExactKernels* const kExactAvxVnni;
extern LORAMUX_HIDDEN const ExactKernels* const kExactAvx512;
extern LORAMUX_HIDDEN const ExactKernels* const kExactAvx512Vnni;
extern LORAMUX_HIDDEN const ExactKernels* const kExactNeon;

// Of a VectorIsa; exact.cpp.
LORAMUX_HIDDEN const ExactKernels* loramux_kernels_of(int32_t isa);
