// The library's C ABI: what Python calls, and what kernels call of one another. Each is described where it is defined.
//
// abi.cpp describes these structures and functions in words, and abi.py compares them with its own when it loads the
// library. Whoever changes what one of them means, and not its form, raises kAbiVersion in both places.

#pragma once

#include <cstdint>

#include "cpu.h"
#include "prefetch.h"

namespace {

constexpr int32_t kAbiVersion = 1;
constexpr int64_t kCacheTile = 16;  // tokens in a block of the KV cache (kv_cache.py)
constexpr int64_t kRankGroup = 8;   // every slot's rank is a multiple of this (lora/slots.py)

}  // namespace

struct LoraArena {            // one layer's adapters
    const uint16_t* a;        // [arena, inputs] bf16; null: none
    const uint16_t* bt;       // [arena, outputs] bf16
    const uint8_t* targeted;  // [arena / 8]
    int64_t inputs, outputs;
};

struct LoraEntries {        // of one step's rows
    const int32_t* first;   // [count + 1]: a row's entries are [first[t], first[t + 1])
    const int32_t* offset;  // [entries]: an entry's first arena row
    const int32_t* rank;    // [entries]: its arena rows
    const float* scale;     // [entries]: the factor of its delta
    int64_t count;
};

struct SlotWeights {  // of one layer: A [rank, inputs], B^T [rank, outputs]; rank 0 and null: none
    const uint16_t *a, *bt;
    int64_t rank;
};

struct FilePair {  // as it lies in a file: A [rank, inputs], B [outputs, rank]; kinds as in adapter_copy.cpp
    int64_t a_offset, a_kind, b_offset, b_kind, rank, inputs, outputs;
};

struct DecoderLinear {
    const uint8_t* codes;
    const float* scales;
    const uint16_t* levels;
    const uint16_t* bias;  // or null
    LoraArena arena;
    int64_t inputs, outputs;
};

struct DecoderNorm {
    const uint16_t* weight;  // null: none
    double eps;
};

struct DecoderLayer {
    DecoderNorm before_attention, q_norm, k_norm, before_mlp;
    DecoderLinear q, k, v, o, gate, up, down;
    double scaling, softcap;
    int64_t window;
};

struct DecoderModel {
    const DecoderLayer* layers;
    const uint16_t *embedding, *head;
    LoraArena head_arena;
    DecoderNorm norm;
    int64_t num_layers, hidden, heads, kv_heads, head_dim, vocabulary;
};

struct DecoderStep {
    const int64_t* tokens;      // [rows]
    const int32_t* position;    // [rows]
    const int32_t* sequence;    // [rows]
    const int32_t* tables;      // [sequences, table_width]
    const int64_t* sampled;     // [samples]: their rows
    const uint16_t *cos, *sin;  // [positions, head_dim]
    uint16_t* const* k_cache;   // by layer
    uint16_t* const* v_cache;
    const LoraEntries* lora;       // adapters of the rows, or null
    const LoraEntries* head_lora;  // of the sampled rows, or null
    uint16_t* scratch;          // loramux_decoder_scratch(rows) numbers
    uint16_t* logits;           // [samples, vocabulary]
    int64_t rows, samples, table_width, threads;
};

extern "C" {

void loramux_nf4_linear(uint16_t* y, const uint16_t* x, const uint8_t* codes, const float* scales,
                        const uint16_t* levels, int64_t rows, int64_t in, int64_t out, const Reads* reads,
                        int64_t num_reads, int32_t threads);
void loramux_add_lora(uint16_t* y, const uint16_t* x, const LoraArena* arena, const LoraEntries* rows, int32_t isa,
                      int32_t threads);
int64_t loramux_lora_spans(const LoraArena* arena, const LoraEntries* rows, Span* spans, int64_t room);
void loramux_attention(uint16_t* out, const uint16_t* q, int64_t q_row, int64_t q_head, const uint16_t* k,
                       int64_t k_row, int64_t k_head, const uint16_t* v, int64_t v_row, int64_t v_head,
                       uint16_t* k_cache, uint16_t* v_cache, const int32_t* tables, int64_t table_width,
                       const int32_t* sequence, const int32_t* position, int64_t rows, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, float scale, float softcap, int64_t window, int32_t isa, int32_t threads);
void loramux_head(uint16_t* y, const uint16_t* x, const uint16_t* w, int64_t rows, int64_t in, int64_t out,
                  int32_t threads);
void loramux_rms_norm(uint16_t* y, const uint16_t* x, const uint16_t* w, int64_t rows, int64_t dim, float eps,
                      int32_t threads);
void loramux_silu_mul(uint16_t* y, const uint16_t* gate, const uint16_t* up, int64_t rows, int64_t dim,
                      int32_t threads);
void loramux_add(uint16_t* y, const uint16_t* x, int64_t count, int32_t threads);
void loramux_rotate(uint16_t* x, const uint16_t* cos, const uint16_t* sin, const int32_t* position, int64_t rows,
                    int64_t heads, int64_t dim, int32_t threads);
void loramux_argmax(int64_t* index, uint8_t* finite, const uint16_t* x, int64_t rows, int64_t count, int32_t threads);
int64_t loramux_decoder_scratch(const DecoderModel* model, int64_t rows);
void loramux_decoder_step(const DecoderModel* model, const DecoderStep* step);
void loramux_convert_pairs(uint16_t* to, uint8_t* finite, const char* file, const FilePair* pairs, const float* scale,
                           int64_t count);
void loramux_copy_slot(const LoraArena* const* arenas, const SlotWeights* weights, int64_t count, int64_t offset,
                       int64_t rank);

}  // extern "C"
