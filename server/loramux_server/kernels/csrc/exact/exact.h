// The C ABI of the kernels of exact integers: one numerics for every processor (vec.h says how that comes).

#pragma once

#include <cstdint>

#include "../kernels.h"

// Higher is faster on the processors that have it; which a processor has, exact.cpp finds out.
enum VectorIsa : int32_t { kVectorPortable, kVectorAvx2, kVectorAvxVnni, kVectorAvx512, kVectorAvx512Vnni, kVectorNeon };

struct ExactLinear {       // codes null: there is none
    const uint8_t* codes;  // [outputs / 16, inputs / 4, 32], as in nf4.cpp
    const float* scales;   // [inputs / 64, outputs]
    const uint16_t* bias;  // [outputs] bf16, or null
    LoraArena arena;
    int64_t inputs, outputs;  // multiples of 64, of 32
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
    const uint16_t* embedding;  // [vocabulary, hidden] bf16
    const int16_t* head;        // [padded_vocabulary / 16, hidden / 2, 16, 2]
    const float* head_scales;   // [hidden / 64, padded_vocabulary]
    LoraArena head_arena;
    ExactNorm norm;
    int64_t num_layers, hidden, heads, kv_heads, head_dim, rotary_pairs, vocabulary, padded_vocabulary;
    double embedding_factor, residual_factor, logit_factor, logit_softcap;  // softcap 0: none
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
    int64_t rows, samples, table_width, threads;
};

extern "C" {

// A bit for each VectorIsa that this library has code for and this processor runs.
int32_t loramux_exact_isas();

// y [rows, out] = x [rows, in] @ w.T, w in NF4.
void loramux_exact_product(float* y, const float* x, const uint8_t* codes, const float* scales, int64_t rows,
                           int64_t in, int64_t out, int32_t isa, int32_t threads);

// A dense weight w [vocabulary, in] bf16 as ExactModel's head; what is beyond the vocabulary becomes zeros.
void loramux_exact_pack_head(int16_t* numbers, float* scales, const uint16_t* w, int64_t vocabulary, int64_t padded,
                             int64_t in, int32_t isa, int32_t threads);

// Bytes that a step of so many rows needs to work in.
int64_t loramux_exact_scratch(const ExactModel* model, int64_t rows);

// `rows` of the step are at least one.
void loramux_exact_step(const ExactModel* model, const ExactStep* step, int32_t isa);

}  // extern "C"
