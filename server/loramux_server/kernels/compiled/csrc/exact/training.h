// The C ABI of what training adds to the kernels of exact integers: gradients, and products of small fp32 matrices.

#pragma once

#include <cstdint>

struct TrainingRows {        // of a packed batch
    const int64_t* start;    // [count]: the row's first own token
    const int64_t* length;   // [count]: its own tokens
    const int64_t* first;    // [count]: the shared tokens that it has in front: all of them, or 0
    int64_t count, shared;
};

struct TrainingHeads {
    int64_t heads, kv_heads, dim, window;  // dim is a multiple of 16; window <= 0: none
    double scaling, softcap;               // softcap 0: none
};

struct FloatMatrix {  // element [i, j] at numbers[i * row + j * column]
    const float* numbers;
    int64_t row, column;
};

extern "C" {

// dx [rows, in] = dy [rows, out] @ w, w in NF4 (backward.h).
void loramux_exact_product_transposed(float* dx, const float* dy, const uint8_t* codes, const float* scales, int64_t rows,
                                      int64_t in, int64_t out, int32_t isa, int32_t threads);

// The same with an output head as loramux_exact_pack_head made it; `out` is the padded vocabulary.
void loramux_exact_dense_transposed(float* dx, const float* dy, const uint8_t* numbers, const float* scales, int64_t rows,
                                    int64_t in, int64_t out, int32_t isa, int32_t threads);

// c [rows, columns], whose rows are c_row apart, = or += a [rows, depth] @ b [depth, columns] (matmul.h).
void loramux_exact_matmul(float* c, int64_t c_row, const FloatMatrix* a, const FloatMatrix* b, int64_t rows,
                          int64_t columns, int64_t depth, int32_t add, int32_t isa, int32_t threads);

// dx [rows, dim] of loramux_exact_rms_norm.
void loramux_exact_norm_gradient(float* dx, const float* dy, const float* x, const float* w, int64_t rows, int64_t dim,
                                 float eps, int32_t isa, int32_t threads);

// y [count] = SiLU or GELU of x; with dy not null y = dy * its slope at x.
void loramux_exact_activation(float* y, const float* x, const float* dy, int64_t count, int32_t gelu, int32_t isa,
                              int32_t threads);

// d_gate, d_up [count] of y = activation(gate) * up; `count` is a multiple of 16.
void loramux_exact_gate_gradient(float* d_gate, float* d_up, const float* dy, const float* gate, const float* up,
                                 int64_t count, int32_t gelu, int32_t isa, int32_t threads);

// Of each row of logits [rows, padded], which become gradients: see gradients.h.
void loramux_exact_loss(float* logits, double* loss, uint8_t* correct, const int64_t* labels, int64_t rows,
                        int64_t vocabulary, int64_t padded, float factor, float softcap, int32_t gradient, int32_t isa,
                        int32_t threads);

// training_attention.h
void loramux_exact_attend(float* out, float* stats, const float* q, const float* k, const float* v,
                          const TrainingRows* rows, const TrainingHeads* heads, int32_t isa, int32_t threads);
void loramux_exact_attend_gradient(float* d_q, float* d_k, float* d_v, float* given, const float* d_out, const float* out,
                                   float* stats, const float* q, const float* k, const float* v, const TrainingRows* rows,
                                   const TrainingHeads* heads, int32_t isa, int32_t threads);

}  // extern "C"
