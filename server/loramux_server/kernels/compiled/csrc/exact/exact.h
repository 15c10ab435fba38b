// The C ABI of the kernels of exact integers: one numerics for every processor (vec.h says how that comes).

#pragma once

#include <cstdint>

#include "../kernels.h"

// Higher is faster on the processors that have it; which a processor has, exact.cpp finds out.
enum VectorIsa : int32_t { kVectorPortable, kVectorAvx2, kVectorAvxVnni, kVectorAvx512, kVectorAvx512Vnni, kVectorNeon };

struct ExactLinear {       // codes null: there is none
    const uint8_t* codes;  // [outputs / 16, inputs / 4, 32], product.h says what lies where
    const float* scales;   // [inputs / 64, outputs]
    const uint16_t* bias;  // [outputs] bf16, or null
    LoraArena arena;
    int64_t inputs, outputs;  // multiples of 64, of 32
};

// How one token is drawn from a row of logits.
struct TokenDraw {
    double temperature;  // above 0
    double top_p;        // 1: all
    double min_p;        // 0: all
    double uniform;      // the random number, in [0, 1)
    int64_t row, top_k;  // top_k <= 0: all
};

struct ExactNorm {
    const float* weight;  // null: none
    double eps;
};

// One layer: what is null or zero is not there.
//   x += residual * after_attention(o(attend(turn(q_norm(q(n))), turn(k_norm(k(n))), v(n)))), n = before_attention(x)
//   x += residual * after_mlp(down(activation(gate(m)) * up(m))), m = before_mlp(x)
struct ExactLayer {
    ExactNorm before_attention, q_norm, k_norm, after_attention, before_mlp, after_mlp;
    ExactLinear q, k, v;  // k and v null: q gives all three, one behind the other
    ExactLinear o;
    ExactLinear gate, up;  // up null: gate gives both
    ExactLinear down;
    int64_t whole_norms;  // q_norm and k_norm are of all heads together, not of each
    int64_t rotary;       // which table of angles; -1: none
    int64_t window;       // <= 0: none
    int64_t gelu;         // the activation is GELU by tanh, else SiLU
    double scaling, softcap;
};

struct ExactModel {
    const ExactLayer* layers;
    const uint16_t* embedding;  // [vocabulary, hidden] bf16; null: rows of the head, number times scale
    const uint8_t* head;        // as pack_head makes it
    const float* head_scales;   // [hidden / 64, padded_vocabulary]
    LoraArena head_arena;
    ExactNorm norm;
    int64_t num_layers, hidden, heads, kv_heads, head_dim, rotary_pairs, vocabulary, padded_vocabulary;
    double embedding_factor, residual_factor, logit_divisor, logit_softcap;  // softcap 0: none
};

struct ExactStep {
    const int64_t* tokens;    // [rows]
    const int32_t* position;  // [rows]
    const int32_t* sequence;  // [rows]
    const int32_t* tables;    // [sequences, table_width]
    const int64_t* sampled;   // [samples]: their rows
    const float* const* cos;  // by table of angles: [positions, rotary_pairs]
    const float* const* sin;
    int16_t* const* k_cache;  // by layer, as in attention.h
    int16_t* const* v_cache;
    float* const* kv_scales;
    const LoraEntries* lora;       // adapters of the rows, or null
    const LoraEntries* head_lora;  // of the sampled rows, or null
    char* scratch;                 // loramux_exact_scratch(rows) bytes
    float* logits;                 // [samples, padded_vocabulary]
    // [samples] or null: only the first largest logit of each sampled row is asked for. It is given here, or -1, and then
    // the row's logits are.
    int64_t* first_tokens;
    int64_t rows, samples, table_width, threads;
};

extern "C" {

// A bit for each VectorIsa that this library has code for and this processor runs.
int32_t loramux_exact_isas();

// y [rows, out] = x [rows, in] @ w.T, w in NF4.
void loramux_exact_product(float* y, const float* x, const uint8_t* codes, const float* scales, int64_t rows,
                           int64_t in, int64_t out, int32_t isa, int32_t threads);

// Of rows of logits x [rows, count], `stride` apart:
// the first largest of each, and whether it is finite and no number of the row is NaN; else the index means nothing.
void loramux_exact_search(int64_t* index, uint8_t* finite, const float* x, int64_t rows, int64_t count, int64_t stride,
                          int32_t isa, int32_t threads);

// log(sum(exp(x))) of the finite rows that are named.
void loramux_exact_log_sums(double* sums, const float* x, const int64_t* rows, int64_t num_rows, int64_t count,
                            int64_t stride, int32_t isa, int32_t threads);

// tokens [num_rows, wanted]: the largest of the finite rows that are named, of equal ones the lower; wanted <= count.
void loramux_exact_first_tokens(int64_t* tokens, int64_t wanted, const float* x, const int64_t* rows, int64_t num_rows,
                                int64_t count, int64_t stride, int32_t isa, int32_t threads);

// A token for each draw, from finite rows.
void loramux_exact_draw(int64_t* tokens, const float* x, const TokenDraw* draws, int64_t num_draws, int64_t count,
                        int64_t stride, int32_t isa, int32_t threads);

// y [rows, out] = x @ w.T, w as pack_head made it; `out` is the padded vocabulary.
void loramux_exact_dense(float* y, const float* x, const uint8_t* numbers, const float* scales, int64_t rows, int64_t in,
                         int64_t out, int32_t isa, int32_t threads);

// A dense weight w [vocabulary, in] bf16 as ExactModel's head: whole numbers of 12 bits with a scale for each block of 64;
// what is beyond the vocabulary becomes zeros. A number is 16 * high + low; `numbers` [3 / 2 * padded * in] are all high
// bytes [padded / 16, in / 2, 16, 2] int8, then all low halves [padded / 16, in / 4, 16, 2], of inputs 0 and 1 of four in the
// lower halves of bytes and of 2 and 3 in the upper ones; scales [in / 64, padded].
void loramux_exact_pack_head(uint8_t* numbers, float* scales, const uint16_t* w, int64_t vocabulary, int64_t padded,
                             int64_t in, int32_t isa, int32_t threads);

// y = w * x / sqrt(mean(x^2) + eps) of each row; `dim` is a multiple of 16, and y may be x.
void loramux_exact_rms_norm(float* y, const float* x, const float* w, int64_t rows, int64_t dim, float eps, int32_t isa,
                            int32_t threads);

// y [rows, dim] = activation(gate) * up, GELU by tanh or SiLU; rows of gate and up are `row` apart. `dim` is a multiple
// of 16.
void loramux_exact_gate(float* y, const float* gate, const float* up, int64_t rows, int64_t dim, int64_t row,
                        int32_t gelu, int32_t isa, int32_t threads);

// out [rows, heads, head_dim]: attention of each row (attention.h), whose keys and values are put into the cache. Rows of
// q, k and v are q_row, k_row and v_row apart, their heads lie close together; `head_dim` is a multiple of 16 up to 512.
void loramux_exact_attention(float* out, const float* q, int64_t q_row, const float* k, int64_t k_row, const float* v,
                             int64_t v_row, int16_t* k_cache, int16_t* v_cache, float* kv_scales, const int32_t* tables,
                             int64_t table_width, const int32_t* sequence, const int32_t* position, int64_t rows,
                             int64_t heads, int64_t kv_heads, int64_t head_dim, float scaling, float softcap,
                             int64_t window, int32_t isa, int32_t threads);

// y [rows, outputs], whose rows are y_row apart, += the deltas of x [rows, inputs] (lora.h).
void loramux_exact_add_lora(float* y, int64_t y_row, const float* x, const LoraArena* arena, const LoraEntries* rows,
                            int32_t isa, int32_t threads);

// Bytes that a step of so many rows needs to work in.
int64_t loramux_exact_scratch(const ExactModel* model, int64_t rows);

// `rows` of the step are at least one.
void loramux_exact_step(const ExactModel* model, const ExactStep* step, int32_t isa);

// cos and sin [count, pairs] = factor * those of the positions from `first` on times inv_freq [pairs]; every product of
// both is below 2^20.
void loramux_exact_angles(float* cos, float* sin, const float* inv_freq, int64_t first, int64_t count, int64_t pairs,
                          double factor);

}  // extern "C"
