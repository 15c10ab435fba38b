#include "training.h"

#include "table.h"

namespace {

const TrainingKernels& kernels_of(int32_t isa) { return loramux_kernels_of(isa)->training; }

}  // namespace

extern "C" {

void loramux_exact_product_transposed(float* dx, const float* dy, const uint8_t* codes, const float* scales, int64_t rows,
                                      int64_t in, int64_t out, int32_t isa, int32_t threads) {
    kernels_of(isa).product_transposed(dx, dy, codes, scales, rows, in, out, threads);
}

void loramux_exact_dense_transposed(float* dx, const float* dy, const uint8_t* numbers, const float* scales, int64_t rows,
                                    int64_t in, int64_t out, int32_t isa, int32_t threads) {
    kernels_of(isa).dense_transposed(dx, dy, numbers, scales, rows, in, out, threads);
}

void loramux_exact_matmul(float* c, int64_t c_row, const FloatMatrix* a, const FloatMatrix* b, int64_t rows,
                          int64_t columns, int64_t depth, int32_t add, int32_t isa, int32_t threads) {
    kernels_of(isa).matmul(c, c_row, a, b, rows, columns, depth, add != 0, threads);
}

void loramux_exact_norm_gradient(float* dx, const float* dy, const float* x, const float* w, int64_t rows, int64_t dim,
                                 float eps, int32_t isa, int32_t threads) {
    kernels_of(isa).norm_gradient(dx, dy, x, w, rows, dim, eps, threads);
}

void loramux_exact_activation(float* y, const float* x, const float* dy, int64_t count, int32_t gelu, int32_t isa,
                              int32_t threads) {
    kernels_of(isa).activation(y, x, dy, count, gelu != 0, threads);
}

void loramux_exact_gate_gradient(float* d_gate, float* d_up, const float* dy, const float* gate, const float* up,
                                 int64_t count, int32_t gelu, int32_t isa, int32_t threads) {
    kernels_of(isa).gate_gradient(d_gate, d_up, dy, gate, up, count, gelu != 0, threads);
}

void loramux_exact_loss(float* logits, double* loss, uint8_t* correct, const int64_t* labels, int64_t rows,
                        int64_t vocabulary, int64_t padded, float factor, float softcap, int32_t gradient, int32_t isa,
                        int32_t threads) {
    kernels_of(isa).loss(logits, loss, correct, labels, rows, vocabulary, padded, factor, softcap, gradient != 0, threads);
}

void loramux_exact_attend(float* out, float* stats, const float* q, const float* k, const float* v,
                          const TrainingRows* rows, const TrainingHeads* heads, int32_t isa, int32_t threads) {
    kernels_of(isa).attend(out, stats, q, k, v, rows, heads, threads);
}

void loramux_exact_attend_gradient(float* d_q, float* d_k, float* d_v, float* given, const float* d_out, const float* out,
                                   float* stats, const float* q, const float* k, const float* v, const TrainingRows* rows,
                                   const TrainingHeads* heads, int32_t isa, int32_t threads) {
    kernels_of(isa).attend_gradient(d_q, d_k, d_v, given, d_out, out, stats, q, k, v, rows, heads, threads);
}

}  // extern "C"
