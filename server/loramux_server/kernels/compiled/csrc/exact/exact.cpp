#include "exact.h"

#include "table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

const ExactKernels* loramux_kernels_of(int32_t isa) {
    switch (isa) {
        case kVectorAvx2: return kExactAvx2;
        case kVectorAvxVnni: return kExactAvxVnni;
        case kVectorAvx512: return kExactAvx512;
        case kVectorAvx512Vnni: return kExactAvx512Vnni;
        case kVectorNeon: return kExactNeon;
        default: return kExactPortable;
    }
}

namespace {

#if defined(__x86_64__)
// Not among the names that older compilers know. Leaf 7, subleaf 1, EAX bit 4.
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
}
#endif

const ExactKernels* kernels_of(int32_t isa) { return loramux_kernels_of(isa); }

bool runs_here(int32_t isa) {
    if (isa == kVectorPortable) return true;
#if defined(__x86_64__)
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    switch (isa) {
        case kVectorAvx2: return v3;
        case kVectorAvxVnni: return v3 && has_avx_vnni();
        case kVectorAvx512: return v4;
        case kVectorAvx512Vnni: return v4 && __builtin_cpu_supports("avx512vnni");
        default: return false;
    }
#elif defined(__aarch64__)
    return isa == kVectorNeon;
#else
    return false;
#endif
}

}  // namespace

extern "C" {

int32_t loramux_exact_isas() {
    int32_t found = 0;
    for (int32_t isa = kVectorPortable; isa <= kVectorNeon; ++isa)
        if (kernels_of(isa) && runs_here(isa)) found |= 1 << isa;
    return found;
}

void loramux_exact_product(float* y, const float* x, const uint8_t* codes, const float* scales, int64_t rows,
                           int64_t in, int64_t out, int32_t isa, int32_t threads) {
    kernels_of(isa)->product(y, x, codes, scales, rows, in, out, threads);
}

void loramux_exact_search(int64_t* index, uint8_t* finite, const float* x, int64_t rows, int64_t count, int64_t stride,
                          int32_t isa, int32_t threads) {
    kernels_of(isa)->search(index, finite, x, rows, count, stride, threads);
}

void loramux_exact_log_sums(double* sums, const float* x, const int64_t* rows, int64_t num_rows, int64_t count,
                            int64_t stride, int32_t isa, int32_t threads) {
    kernels_of(isa)->log_sums(sums, x, rows, num_rows, count, stride, threads);
}

void loramux_exact_first_tokens(int64_t* tokens, int64_t wanted, const float* x, const int64_t* rows, int64_t num_rows,
                                int64_t count, int64_t stride, int32_t isa, int32_t threads) {
    kernels_of(isa)->first_tokens(tokens, wanted, x, rows, num_rows, count, stride, threads);
}

void loramux_exact_draw(int64_t* tokens, const float* x, const TokenDraw* draws, int64_t num_draws, int64_t count,
                        int64_t stride, int32_t isa, int32_t threads) {
    kernels_of(isa)->draw(tokens, x, draws, num_draws, count, stride, threads);
}

void loramux_exact_change(float* y, int64_t y_row, const float* x, const LogitChange* changes, int64_t num_changes,
                          int64_t count, int64_t stride, int32_t isa, int32_t threads) {
    kernels_of(isa)->change(y, y_row, x, changes, num_changes, count, stride, threads);
}

void loramux_exact_dense(float* y, const float* x, const uint8_t* numbers, const float* scales, int64_t rows, int64_t in,
                         int64_t out, int32_t isa, int32_t threads) {
    kernels_of(isa)->dense(y, x, numbers, scales, rows, in, out, threads);
}

void loramux_exact_pack_head(uint8_t* numbers, float* scales, const uint16_t* w, int64_t vocabulary, int64_t padded,
                             int64_t in, int32_t isa, int32_t threads) {
    kernels_of(isa)->pack_head(numbers, scales, w, vocabulary, padded, in, threads);
}

void loramux_exact_rms_norm(float* y, const float* x, const float* w, int64_t rows, int64_t dim, float eps, int32_t isa,
                            int32_t threads) {
    kernels_of(isa)->norm(y, x, w, rows, dim, eps, threads);
}

void loramux_exact_gate(float* y, const float* gate, const float* up, int64_t rows, int64_t dim, int64_t row,
                        int32_t gelu, int32_t isa, int32_t threads) {
    kernels_of(isa)->gate(y, gate, up, rows, dim, row, gelu != 0, threads);
}

void loramux_exact_softmax(float* y, const float* x, int64_t rows, int64_t count, int32_t isa, int32_t threads) {
    kernels_of(isa)->softmax(y, x, rows, count, threads);
}

void loramux_exact_attention(float* out, const float* q, int64_t q_row, const float* k, int64_t k_row, const float* v,
                             int64_t v_row, int16_t* k_cache, int16_t* v_cache, float* kv_scales, const int32_t* tables,
                             int64_t table_width, const int32_t* sequence, const int32_t* position, int64_t rows,
                             int64_t heads, int64_t kv_heads, int64_t head_dim, float scaling, float softcap,
                             int64_t window, const float* sinks, int32_t isa, int32_t threads) {
    kernels_of(isa)->attention(
        {q,         k,      v,        q_row,    k_row,       v_row, out,   k_cache,  v_cache,  kv_scales, tables,
         sequence,  position, table_width, rows, heads, kv_heads, head_dim, window, scaling, softcap, sinks},
        threads);
}

void loramux_exact_add_lora(float* y, int64_t y_row, const float* x, const LoraArena* arena, const LoraEntries* rows,
                            int32_t isa, int32_t threads) {
    kernels_of(isa)->add_lora(y, y_row, x, arena, rows, threads);
}

void loramux_exact_experts(float* y, const float* x, const ExactExperts* experts, const int64_t* index,
                           const float* weights, const LoraEntries* lora, int64_t rows, int32_t isa, int32_t threads) {
    kernels_of(isa)->experts(y, x, experts, index, weights, lora, rows, threads);
}

void loramux_exact_token_logits(float* y, int64_t y_row, float* wide, int64_t wide_row, const float* x,
                                const TokenLogits* own, int64_t vocabulary, int64_t dim, int32_t isa, int32_t threads) {
    kernels_of(isa)->token_logits(y, y_row, wide, wide_row, x, own, vocabulary, dim, threads);
}

int64_t loramux_exact_scratch(const ExactModel* model, int64_t rows) { return kExactPortable->scratch(model, rows); }

void loramux_exact_step(const ExactModel* model, const ExactStep* step, int32_t isa) {
    kernels_of(isa)->step(model, step);
}

void loramux_exact_angles(float* cos, float* sin, const float* inv_freq, int64_t first, int64_t count, int64_t pairs,
                          double factor) {
    kExactPortable->angles(cos, sin, inv_freq, first, count, pairs, factor);
}

}  // extern "C"
