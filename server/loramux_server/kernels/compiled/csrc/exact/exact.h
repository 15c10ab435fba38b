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

// What becomes of one token's logit x, in this order: x + add; where it is repeated, a positive one divided by the row's
// `repetition` and another multiplied by it; less `less`. What is no finite number then is the nearest one.
struct LogitEdit {
    int32_t token, repeated;
    float add, less;
};

// How a row of logits is changed before a token is chosen from it.
struct LogitChange {
    const LogitEdit* edits;    // [num_edits], of each token at most one
    const int32_t* forbidden;  // [num_forbidden] tokens
    const uint32_t* allowed;   // [ceil(count / 32)]: bit i of word w is token 32 w + i, 1 where it may be chosen; null: all
    int64_t num_edits, num_forbidden, row;
    double repetition;  // above 0
};

struct ExactNorm {
    const float* weight;  // null: none
    double eps;
};

// The experts of a layer; experts.h says what they compute.
struct ExactExperts {
    const ExactLinear* layers;  // [count, 3]: gate, up and down of each; null: there are none
    int64_t count, outer, inner, chosen;  // experts; numbers of a row outside and inside of one; experts of a row
    int64_t gelu;
    double alpha, limit, above;  // 1, 0 and 0 where the model has none
};

// Who chooses them, by scores w @ x + bias: the largest, of equal ones the first. Their weights are the softmax of all
// scores, or of the chosen ones.
struct ExactRouter {
    const uint8_t* weight;  // of `padded` outputs, as pack_head makes it
    const float* scales;
    const float* bias;  // [count], or null
    int64_t padded, normalized;
};

// One layer: what is null or zero is not there.
//   x += residual * after_attention(o(attend(turn(q_norm(q(n))), turn(k_norm(k(n))), v(n)))), n = before_attention(x)
//   x += residual * after_mlp(down(activation(gate(m)) * up(m))), m = before_mlp(x)
// A layer with experts has these in the place of gate, up and down.
struct ExactLayer {
    ExactNorm before_attention, q_norm, k_norm, after_attention, before_mlp, after_mlp;
    ExactLinear q, k, v;  // k and v null: q gives all three, one behind the other
    ExactLinear o;
    ExactLinear gate, up;  // up null: gate gives both
    ExactLinear down;
    ExactExperts experts;
    ExactRouter router;
    const float* sinks;  // [heads], of the attention; null: none
    int64_t whole_norms;  // q_norm and k_norm are of all heads together, not of each
    int64_t rotary;       // which table of angles; -1: none
    int64_t window;       // <= 0: none
    int64_t gelu;         // the activation is GELU by tanh, else SiLU
    double scaling, softcap;
    double clip;  // queries, keys and values are cut off at it before they turn; 0: not
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

// Rows of the output head that one adapter has for some tokens, less the base's own; token_rows.h says what is done.
struct TokenLogits {
    const int32_t* tokens;  // [count], each once; those beyond the vocabulary are new
    const uint16_t* rows;   // [count, hidden] bf16
    const int32_t* at;      // [uses]: rows of logits that they count for, each once
    const float* scales;    // [uses]: the adapter's factor there
    int64_t count, uses;
};

struct ExactStep {
    const int64_t* tokens;    // [rows]; -1: one that the base does not know
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
    float* logits;                 // [samples - states_only, padded_vocabulary]
    // [samples - states_only] or null: only the first largest logit of each sampled row is asked for. It is given here, or -1, and then
    // the row's logits are.
    int64_t* first_tokens;
    // [states_only, hidden]: of so many last sampled rows, what the output head reads; they have no logits
    float* states;
    // What is added to the embeddings of some rows, [some, hidden]; which of it to each row [rows], -1: none. Null: none at
    // all.
    const float* own_embeddings;
    const int32_t* own_embedding_of;
    const TokenLogits* token_logits;  // [num_token_logits], in this order
    // [samples - states_only, num_wide]: logits of tokens beyond the vocabulary, minus infinity where there is none
    float* wide;
    int64_t num_token_logits, num_wide;  // num_wide is a multiple of 16
    int64_t rows, samples, states_only, table_width, threads;
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

// y [num_changes, count], rows y_row apart: a copy of a row for each change, with its edits, and minus infinity at each
// token that is forbidden or not allowed.
void loramux_exact_change(float* y, int64_t y_row, const float* x, const LogitChange* changes, int64_t num_changes,
                          int64_t count, int64_t stride, int32_t isa, int32_t threads);

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

// y = exp(x) / sum(exp(x)) of each row [count] of finite numbers; y may be x.
void loramux_exact_softmax(float* y, const float* x, int64_t rows, int64_t count, int32_t isa, int32_t threads);

// out [rows, heads, head_dim]: attention of each row (attention.h), whose keys and values are put into the cache. Rows of
// q, k and v are q_row, k_row and v_row apart, their heads lie close together; `head_dim` is a multiple of 16 up to 512. `sinks`
// [heads]: a further score of each head without a value; null: none.
void loramux_exact_attention(float* out, const float* q, int64_t q_row, const float* k, int64_t k_row, const float* v,
                             int64_t v_row, int16_t* k_cache, int16_t* v_cache, float* kv_scales, const int32_t* tables,
                             int64_t table_width, const int32_t* sequence, const int32_t* position, int64_t rows,
                             int64_t heads, int64_t kv_heads, int64_t head_dim, float scaling, float softcap,
                             int64_t window, const float* sinks, int32_t isa, int32_t threads);

// y [rows, outer] of x [rows, outer]: what the experts index [rows, chosen] of each row, each once, give it, times weights
// [rows, chosen] (experts.h); y may be x. `lora`: adapters of the rows, or null.
void loramux_exact_experts(float* y, const float* x, const ExactExperts* experts, const int64_t* index,
                           const float* weights, const LoraEntries* lora, int64_t rows, int32_t isa, int32_t threads);

// y [rows, outputs], whose rows are y_row apart, += the deltas of x [rows, inputs] (lora.h).
void loramux_exact_add_lora(float* y, int64_t y_row, const float* x, const LoraArena* arena, const LoraEntries* rows,
                            int32_t isa, int32_t threads);

// y [rows, vocabulary], whose rows are y_row apart, and wide [rows, wide_row] += products of x [rows, dim] with own rows of
// the output head (token_rows.h); `dim` is a multiple of 16.
void loramux_exact_token_logits(float* y, int64_t y_row, float* wide, int64_t wide_row, const float* x,
                                const TokenLogits* own, int64_t vocabulary, int64_t dim, int32_t isa, int32_t threads);

// Bytes that a step of so many rows needs to work in.
int64_t loramux_exact_scratch(const ExactModel* model, int64_t rows);

// `rows` of the step are at least one.
void loramux_exact_step(const ExactModel* model, const ExactStep* step, int32_t isa);

// cos and sin [count, pairs] = factor * those of the positions from `first` on times inv_freq [pairs]; every product of
// both is below 2^20.
void loramux_exact_angles(float* cos, float* sin, const float* inv_freq, int64_t first, int64_t count, int64_t pairs,
                          double factor);

}  // extern "C"
