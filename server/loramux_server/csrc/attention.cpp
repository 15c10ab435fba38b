// Causal attention over a paged KV cache on the CPU. Plain C ABI, loaded by engine/attention.py through ctypes.
//
// Semantics, for query row t of sequence s at position p, head h, kv head g = h / (heads / kv_heads):
//   keys j with max(0, p - window + 1) <= j <= p  (window <= 0: all)
//   s_j = softcap(scale * q[t, h] . k_j),  softcap(z) = cap * tanh(z / cap) where cap > 0
//   out[t, h] = sum_j exp(s_j - max s) * v_j / sum_j exp(s_j - max s)    weights rounded to bf16, sums in fp32
// Cache tiles hold 16 tokens of one kv head, laid out for the pairwise bf16 dot product:
//   k tile [head_dim / 2, 16, 2]   v tile [8, head_dim, 2]
// Every (row, kv head) is computed alone and in a fixed order, so its bits do not depend on the batch around it.

#include <cmath>
#include <cstdint>
#include <vector>

#include "bf16.h"
#include "kernels.h"

namespace {

constexpr int64_t kTile = 16;   // tokens per cache tile = block size
constexpr int64_t kHeads = 4;   // query heads of one kv head handled together

struct Task {
    const uint16_t* q;      // [heads, head_dim] of this row and kv head
    int64_t q_stride;       // between heads
    uint16_t* out;          // the same for the result
    int64_t out_stride;
    const uint16_t* k;      // cache of the layer, at this kv head
    const uint16_t* v;
    int64_t block_stride;   // between blocks, in elements
    const int32_t* blocks;  // block table of the sequence
    int64_t first, last;    // keys [first, last]
    int64_t head_dim;
    float scale, softcap;
};

// Scratch of one thread, grown to the longest span it has met.
struct Scratch {
    std::vector<float> scores;
    std::vector<uint16_t> weights;
};

// Portable twin of the vector path below, one query head at a time; the compiler vectorizes the inner loops.
#if defined(__x86_64__)
__attribute__((target_clones("arch=x86-64-v3", "default")))
#endif
void attend_portable(const Task& task, int64_t head, std::vector<float>& scores) {
    const uint16_t* q = task.q + head * task.q_stride;
    const int64_t tile0 = task.first / kTile, tile1 = task.last / kTile;
    scores.resize((tile1 - tile0 + 1) * kTile + task.head_dim);
    float* total_v = scores.data() + (tile1 - tile0 + 1) * kTile;
    float best = -INFINITY;
    for (int64_t tile = tile0; tile <= tile1; ++tile) {
        const uint16_t* k = task.k + task.blocks[tile] * task.block_stride;
        float dot[kTile] = {};
        for (int64_t d = 0; d < task.head_dim; d += 2) {
            const float q0 = widen(q[d]), q1 = widen(q[d + 1]);
            for (int64_t j = 0; j < kTile; ++j)
                dot[j] += q0 * widen(k[d * kTile + 2 * j]) + q1 * widen(k[d * kTile + 2 * j + 1]);
        }
        for (int64_t j = 0; j < kTile; ++j) {
            const int64_t key = tile * kTile + j;
            float s = -INFINITY;
            if (key >= task.first && key <= task.last) {
                s = dot[j] * task.scale;
                if (task.softcap > 0.f) s = task.softcap * std::tanh(s / task.softcap);
            }
            scores[(tile - tile0) * kTile + j] = s;
            if (s > best) best = s;
        }
    }
    for (int64_t d = 0; d < task.head_dim; ++d) total_v[d] = 0.f;
    float total = 0.f;
    for (int64_t key = task.first; key <= task.last; ++key) {
        const float exact = std::exp(scores[key - tile0 * kTile] - best);
        const float w = widen(narrow(exact));
        total += exact;
        const uint16_t* v = task.v + task.blocks[key / kTile] * task.block_stride +
                            (key % kTile / 2) * task.head_dim * 2 + key % 2;
        for (int64_t d = 0; d < task.head_dim; ++d) total_v[d] += w * widen(v[2 * d]);
    }
    for (int64_t d = 0; d < task.head_dim; ++d) task.out[head * task.out_stride + d] = narrow(total_v[d] / total);
}

#if defined(__x86_64__)

// exp(x) for x <= 0, relative error below 2e-7: 2^n * p(f) with |f| <= ln(2) / 2 and a Taylor polynomial of degree 6.
LORAMUX_BF16 inline __m512 exp_nonpositive(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.f), x);  // in this order NaN stays NaN
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
    __m512 p = _mm512_set1_ps(1.f / 720);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f / 120));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f / 24));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f / 6));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(p, n);
}

// Scores of `heads` query heads against every key tile: fills scores [heads, span] and best [heads].
template <int heads>
LORAMUX_BF16 void score(const Task& task, float* scores, int64_t span, float* best) {
    const int64_t pairs = task.head_dim / 2;
    const int64_t tile0 = task.first / kTile, tile1 = task.last / kTile;
    __m512 top[heads];
    for (auto& t : top) t = _mm512_set1_ps(-INFINITY);
    for (int64_t tile = tile0; tile <= tile1; ++tile) {
        const uint16_t* k = task.k + task.blocks[tile] * task.block_stride;
        __m512 even[heads], odd[heads];  // two chains each hide the latency of the dot product
        for (int h = 0; h < heads; ++h) even[h] = odd[h] = _mm512_setzero_ps();
        for (int64_t d = 0; d < pairs; d += 2) {
            const auto k0 = (__m512bh)_mm512_loadu_si512(k + d * kTile * 2);
            const auto k1 = (__m512bh)_mm512_loadu_si512(k + (d + 1) * kTile * 2);
            for (int h = 0; h < heads; ++h) {
                int32_t q0, q1;
                std::memcpy(&q0, task.q + h * task.q_stride + 2 * d, 4);
                std::memcpy(&q1, task.q + h * task.q_stride + 2 * d + 2, 4);
                even[h] = _mm512_dpbf16_ps(even[h], k0, (__m512bh)_mm512_set1_epi32(q0));
                odd[h] = _mm512_dpbf16_ps(odd[h], k1, (__m512bh)_mm512_set1_epi32(q1));
            }
        }
        const int64_t base = tile * kTile;
        __mmask16 seen = 0xffff;
        if (base < task.first) seen &= static_cast<__mmask16>(0xffffu << (task.first - base));
        if (base + kTile - 1 > task.last) seen &= static_cast<__mmask16>(0xffffu >> (base + kTile - 1 - task.last));
        for (int64_t h = 0; h < heads; ++h) {
            __m512 s = _mm512_mul_ps(_mm512_add_ps(even[h], odd[h]), _mm512_set1_ps(task.scale));
            if (task.softcap > 0.f) {
                float lane[kTile];
                _mm512_storeu_ps(lane, s);
                for (float& z : lane) z = task.softcap * std::tanh(z / task.softcap);
                s = _mm512_loadu_ps(lane);
            }
            s = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), s);
            top[h] = _mm512_max_ps(s, top[h]);  // in this order NaN is passed over
            _mm512_storeu_ps(scores + h * span + (tile - tile0) * kTile, s);
        }
    }
    for (int64_t h = 0; h < heads; ++h) best[h] = _mm512_reduce_max_ps(top[h]);
}

// scores [heads, span] -> bf16 weights exp(s - best) [heads, span]; total [heads] gets their sum before rounding.
LORAMUX_BF16 void weigh(int64_t heads, const float* scores, uint16_t* weights, int64_t span, const float* best,
                        float* total) {
    for (int64_t h = 0; h < heads; ++h) {
        const __m512 top = _mm512_set1_ps(best[h]);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < span; j += kTile) {
            const __m512 s = _mm512_loadu_ps(scores + h * span + j);
            const __mmask16 seen = _mm512_cmp_ps_mask(s, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
            const __m512 w = _mm512_maskz_mov_ps(seen, exp_nonpositive(_mm512_sub_ps(s, top)));
            sum = _mm512_add_ps(sum, w);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + h * span + j), (__m256i)_mm512_cvtneps_pbh(w));
        }
        total[h] = _mm512_reduce_add_ps(sum);
    }
}

// Output dimensions [d0, d0 + 16 * wide) of `heads` query heads: the weighted sum of the values, kept in registers.
// Keys after `last` in its tile may hold another sequence's leftovers (even NaN): they are never multiplied.
template <int heads, int wide>
LORAMUX_BF16 void mix(const Task& task, int64_t d0, const uint16_t* weights, int64_t span, const float* total) {
    const int64_t tile0 = task.first / kTile, tile1 = task.last / kTile;
    __m512 acc[heads][wide];
    for (auto& row : acc)
        for (auto& a : row) a = _mm512_setzero_ps();
    for (int64_t tile = tile0; tile <= tile1; ++tile) {
        const uint16_t* v = task.v + task.blocks[tile] * task.block_stride + 2 * d0;
        const int64_t last = tile == tile1 ? task.last % kTile : kTile - 1;
        for (int64_t pair = 0; pair <= last / 2; ++pair) {
            const __mmask32 keep = 2 * pair == last ? 0x55555555u : 0xffffffffu;
            const uint16_t* row = v + pair * task.head_dim * 2;
            __m512bh value[wide];
            for (int c = 0; c < wide; ++c) value[c] = (__m512bh)_mm512_maskz_loadu_epi16(keep, row + 32 * c);
            for (int h = 0; h < heads; ++h) {
                int32_t w;
                std::memcpy(&w, weights + h * span + (tile - tile0) * kTile + 2 * pair, 4);
                const auto wv = (__m512bh)_mm512_set1_epi32(w);
                for (int c = 0; c < wide; ++c) acc[h][c] = _mm512_dpbf16_ps(acc[h][c], value[c], wv);
            }
        }
    }
    for (int h = 0; h < heads; ++h) {
        const __m512 norm = _mm512_set1_ps(1.f / total[h]);
        for (int c = 0; c < wide; ++c)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(task.out + h * task.out_stride + d0 + 16 * c),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(acc[h][c], norm)));
    }
}

template <int heads>
LORAMUX_BF16 void attend_group(const Task& task, Scratch& scratch) {
    const int64_t span = (task.last / kTile - task.first / kTile + 1) * kTile;
    if (static_cast<int64_t>(scratch.scores.size()) < heads * span) {
        scratch.scores.resize(heads * span);
        scratch.weights.resize(heads * span);
    }
    float best[heads], total[heads];
    score<heads>(task, scratch.scores.data(), span, best);
    weigh(heads, scratch.scores.data(), scratch.weights.data(), span, best, total);
    int64_t d0 = 0;
    for (; d0 + 64 <= task.head_dim; d0 += 64) mix<heads, 4>(task, d0, scratch.weights.data(), span, total);
    for (; d0 < task.head_dim; d0 += 16) mix<heads, 1>(task, d0, scratch.weights.data(), span, total);
}

#endif

}  // namespace

extern "C" {

// 1 if this machine runs the AVX512-BF16 path, 0 for the portable one.
int loramux_attention_has_avx512bf16() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return 0;
#endif
}

// Writes the new keys and values of every row into the cache, then attends.
//   q [rows, heads, head_dim], k and v [rows, kv_heads, head_dim], out [rows, heads, head_dim]: bf16; *_row and *_head
//   are the strides of the first two axes in elements, the last axis is dense
//   k_cache [blocks, kv_heads, head_dim / 2, 16, 2], v_cache [blocks, kv_heads, 8, head_dim, 2]: bf16
//   tables [sequences, table_width] int32; sequence, position [rows] int32
// Requires head_dim % 16 == 0 (portable: % 2).
void loramux_attend(uint16_t* out, const uint16_t* q, int64_t q_row, int64_t q_head, const uint16_t* k, int64_t k_row,
                    int64_t k_head, const uint16_t* v, int64_t v_row, int64_t v_head, uint16_t* k_cache,
                    uint16_t* v_cache, const int32_t* tables, int64_t table_width, const int32_t* sequence,
                    const int32_t* position, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim,
                    float scale, float softcap, int64_t window, int32_t portable, int32_t threads) {
    const int64_t tile_size = kTile * head_dim, block_stride = kv_heads * tile_size, group = heads / kv_heads;
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows; ++t) {
            const int64_t at = position[t] % kTile;
            const int64_t block = tables[sequence[t] * table_width + position[t] / kTile];
            for (int64_t g = 0; g < kv_heads; ++g) {
                const uint16_t* key = k + t * k_row + g * k_head;
                const uint16_t* value = v + t * v_row + g * v_head;
                uint16_t* k_tile = k_cache + block * block_stride + g * tile_size;
                uint16_t* v_tile = v_cache + block * block_stride + g * tile_size + (at / 2) * head_dim * 2 + at % 2;
                for (int64_t d = 0; d < head_dim; d += 2) std::memcpy(k_tile + d * kTile + 2 * at, key + d, 4);
                for (int64_t d = 0; d < head_dim; ++d) v_tile[2 * d] = value[d];
            }
        }
        Scratch scratch;
#pragma omp for schedule(dynamic, 4)
        for (int64_t unit = 0; unit < rows * kv_heads; ++unit) {
            const int64_t t = unit / kv_heads, g = unit % kv_heads;
            const int64_t first = window > 0 && position[t] >= window ? position[t] - window + 1 : 0;
            for (int64_t h = 0; h < group; h += kHeads) {
                const int64_t head = g * group + h;
                const Task task{q + t * q_row + head * q_head, q_head,
                                out + (t * heads + head) * head_dim, head_dim,
                                k_cache + g * tile_size, v_cache + g * tile_size, block_stride,
                                tables + sequence[t] * table_width, first, position[t], head_dim, scale, softcap};
                const int64_t together = group - h < kHeads ? group - h : kHeads;
#if defined(__x86_64__)
                if (!portable) {
                    switch (together) {
                        case 1: attend_group<1>(task, scratch); break;
                        case 2: attend_group<2>(task, scratch); break;
                        case 3: attend_group<3>(task, scratch); break;
                        default: attend_group<kHeads>(task, scratch);
                    }
                    continue;
                }
#endif
                for (int64_t i = 0; i < together; ++i) attend_portable(task, i, scratch.scores);
            }
        }
    }
}

}  // extern "C"
