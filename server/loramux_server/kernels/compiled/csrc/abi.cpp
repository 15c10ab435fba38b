// The library describes itself, from its own types: abi.py compares this with what it declares.

#include <cstddef>
#include <string>
#include <type_traits>

#include "exact/exact.h"
#include "exact/training.h"
#include "kernels.h"
#include "threads.h"

namespace {

template <class T>
constexpr char kind_of() {  // v nothing, p a pointer, l a 64-bit and i a 32-bit number, f a float, d a double
    if constexpr (std::is_void_v<T>) return 'v';
    else if constexpr (std::is_pointer_v<T>) return 'p';
    else if constexpr (std::is_same_v<T, int64_t>) return 'l';
    else if constexpr (std::is_same_v<T, int32_t>) return 'i';
    else if constexpr (std::is_same_v<T, float>) return 'f';
    else {
        static_assert(std::is_same_v<T, double>, "Python has no name for this type");
        return 'd';
    }
}

template <class Result, class... Arguments>
std::string signature_of(Result (*)(Arguments...)) {
    return {kind_of<Result>(), kind_of<Arguments>()...};
}

// "function loramux_add viii": what it returns and takes.
#define FUNCTION(name) "function " #name " " + signature_of(&name) + "\n"
// "struct Span 16 at:0:8 bytes:8:8": its size; each field's name, offset and size.
#define STRUCT(name) "struct " #name " " + std::to_string(sizeof(name))
#define FIELD(owner, name) \
    " " #name ":" + std::to_string(offsetof(owner, name)) + ":" + std::to_string(sizeof(owner::name))

std::string describe_exact_structs() {
    std::string text;
    using L = ExactLinear;
    text += STRUCT(ExactLinear) + FIELD(L, codes) + FIELD(L, scales) + FIELD(L, bias) + FIELD(L, arena) +
            FIELD(L, inputs) + FIELD(L, outputs);
    using T = TokenDraw;
    text += "\n" STRUCT(TokenDraw) + FIELD(T, temperature) + FIELD(T, top_p) + FIELD(T, min_p) + FIELD(T, uniform) +
            FIELD(T, row) + FIELD(T, top_k);
    using E = LogitEdit;
    text += "\n" STRUCT(LogitEdit) + FIELD(E, token) + FIELD(E, repeated) + FIELD(E, add) + FIELD(E, less);
    using C = LogitChange;
    text += "\n" STRUCT(LogitChange) + FIELD(C, edits) + FIELD(C, forbidden) + FIELD(C, allowed) + FIELD(C, num_edits) +
            FIELD(C, num_forbidden) + FIELD(C, row) + FIELD(C, repetition);
    using N = ExactNorm;
    text += "\n" STRUCT(ExactNorm) + FIELD(N, weight) + FIELD(N, eps);
    using X = ExactExperts;
    text += "\n" STRUCT(ExactExperts) + FIELD(X, layers) + FIELD(X, count) + FIELD(X, outer) + FIELD(X, inner) +
            FIELD(X, chosen) + FIELD(X, gelu) + FIELD(X, alpha) + FIELD(X, limit) + FIELD(X, above);
    using R = ExactRouter;
    text += "\n" STRUCT(ExactRouter) + FIELD(R, weight) + FIELD(R, scales) + FIELD(R, bias) + FIELD(R, padded) +
            FIELD(R, normalized);
    using Y = ExactLayer;
    text += "\n" STRUCT(ExactLayer) + FIELD(Y, before_attention) + FIELD(Y, q_norm) + FIELD(Y, k_norm) +
            FIELD(Y, after_attention) + FIELD(Y, before_mlp) + FIELD(Y, after_mlp) + FIELD(Y, q) + FIELD(Y, k) +
            FIELD(Y, v) + FIELD(Y, o) + FIELD(Y, gate) + FIELD(Y, up) + FIELD(Y, down) + FIELD(Y, experts) +
            FIELD(Y, router) + FIELD(Y, sinks) + FIELD(Y, whole_norms) + FIELD(Y, rotary) + FIELD(Y, window) +
            FIELD(Y, gelu) + FIELD(Y, scaling) + FIELD(Y, softcap) + FIELD(Y, clip);
    using M = ExactModel;
    text += "\n" STRUCT(ExactModel) + FIELD(M, layers) + FIELD(M, embedding) + FIELD(M, head) +
            FIELD(M, head_scales) + FIELD(M, head_arena) + FIELD(M, norm) + FIELD(M, num_layers) + FIELD(M, hidden) +
            FIELD(M, heads) + FIELD(M, kv_heads) + FIELD(M, head_dim) + FIELD(M, rotary_pairs) +
            FIELD(M, vocabulary) + FIELD(M, padded_vocabulary) + FIELD(M, embedding_factor) +
            FIELD(M, residual_factor) + FIELD(M, logit_divisor) + FIELD(M, logit_softcap);
    using O = TokenLogits;
    text += "\n" STRUCT(TokenLogits) + FIELD(O, tokens) + FIELD(O, rows) + FIELD(O, at) + FIELD(O, scales) +
            FIELD(O, count) + FIELD(O, uses);
    using S = ExactStep;
    text += "\n" STRUCT(ExactStep) + FIELD(S, tokens) + FIELD(S, position) + FIELD(S, sequence) + FIELD(S, tables) +
            FIELD(S, sampled) + FIELD(S, cos) + FIELD(S, sin) + FIELD(S, k_cache) + FIELD(S, v_cache) +
            FIELD(S, kv_scales) + FIELD(S, lora) + FIELD(S, head_lora) + FIELD(S, scratch) + FIELD(S, logits) +
            FIELD(S, first_tokens) + FIELD(S, states) + FIELD(S, own_embeddings) + FIELD(S, own_embedding_of) +
            FIELD(S, token_logits) + FIELD(S, wide) + FIELD(S, num_token_logits) + FIELD(S, num_wide) + FIELD(S, rows) + FIELD(S, samples) +
            FIELD(S, states_only) + FIELD(S, table_width) + FIELD(S, threads);
    return text;
}

std::string describe_training_structs() {
    std::string text;
    using R = TrainingRows;
    text += STRUCT(TrainingRows) + FIELD(R, start) + FIELD(R, length) + FIELD(R, first) + FIELD(R, count) +
            FIELD(R, shared);
    using H = TrainingHeads;
    text += "\n" STRUCT(TrainingHeads) + FIELD(H, heads) + FIELD(H, kv_heads) + FIELD(H, dim) + FIELD(H, window) +
            FIELD(H, scaling) + FIELD(H, softcap);
    using M = FloatMatrix;
    text += "\n" STRUCT(FloatMatrix) + FIELD(M, numbers) + FIELD(M, row) + FIELD(M, column);
    return text;
}

std::string describe_structs() {
    std::string text;
    using A = LoraArena;
    text += STRUCT(LoraArena) + FIELD(A, a) + FIELD(A, bt) + FIELD(A, targeted) + FIELD(A, affine) +
            FIELD(A, inputs) + FIELD(A, outputs);
    using R = LoraEntries;
    text += "\n" STRUCT(LoraEntries) + FIELD(R, first) + FIELD(R, offset) + FIELD(R, rank) + FIELD(R, scale) +
            FIELD(R, count);
    using W = SlotWeights;
    text += "\n" STRUCT(SlotWeights) + FIELD(W, a) + FIELD(W, bt) + FIELD(W, affine) + FIELD(W, rank);
    using P = FilePair;
    text += "\n" STRUCT(FilePair) + FIELD(P, a_offset) + FIELD(P, a_kind) + FIELD(P, b_offset) + FIELD(P, b_kind) +
            FIELD(P, rank) + FIELD(P, inputs) + FIELD(P, outputs);
    return text + "\n" + describe_exact_structs() + "\n" + describe_training_structs() + "\n";
}

std::string describe() {
    return "version " + std::to_string(kAbiVersion) + "\n" + describe_structs() +  //
           FUNCTION(loramux_exact_search) + FUNCTION(loramux_exact_log_sums) + FUNCTION(loramux_exact_first_tokens) +
           FUNCTION(loramux_exact_draw) + FUNCTION(loramux_exact_change) + FUNCTION(loramux_run_pieces) + FUNCTION(loramux_convert_pairs) +
           FUNCTION(loramux_copy_slot) + FUNCTION(loramux_nf4_quantize) + FUNCTION(loramux_nf4_scales) +
           FUNCTION(loramux_nf4_squares) +
           FUNCTION(loramux_exact_isas) + FUNCTION(loramux_exact_product) +
           FUNCTION(loramux_exact_dense) + FUNCTION(loramux_exact_pack_head) + FUNCTION(loramux_exact_rms_norm) +
           FUNCTION(loramux_exact_gate) + FUNCTION(loramux_exact_softmax) + FUNCTION(loramux_exact_attention) + FUNCTION(loramux_exact_add_lora) +
           FUNCTION(loramux_exact_experts) + FUNCTION(loramux_exact_token_logits) +
           FUNCTION(loramux_exact_scratch) + FUNCTION(loramux_exact_step) + FUNCTION(loramux_exact_angles) +
           FUNCTION(loramux_exact_product_transposed) + FUNCTION(loramux_exact_dense_transposed) +
           FUNCTION(loramux_exact_matmul) + FUNCTION(loramux_exact_norm_gradient) +
           FUNCTION(loramux_exact_activation) + FUNCTION(loramux_exact_gate_gradient) + FUNCTION(loramux_exact_loss) + FUNCTION(loramux_exact_attend) +
           FUNCTION(loramux_exact_attend_gradient);
}

}  // namespace

extern "C" const char* loramux_abi() {
    static const std::string text = describe();
    return text.c_str();
}
