// Causal attention over a paged KV cache.
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

#include "attention_rows.h"
#include "kernels.h"
#include "threads.h"

namespace {

constexpr int64_t kHeads = 4;  // query heads of one kv head handled together

// Rows that go together where they follow one another in a sequence: as many as there are registers for.
int64_t rows_together(int64_t heads) { return heads < kHeads ? 4 : 2; }

struct Unit {  // rows [row, row + count)
    int64_t row, count;
};

std::vector<Unit> units_of(const int32_t* sequence, const int32_t* position, int64_t rows, int64_t together) {
    std::vector<Unit> units;
    for (int64_t t = 0; t < rows;) {
        int64_t count = 1;
        while (count < together && t + count < rows && sequence[t + count] == sequence[t] &&
               position[t + count] == position[t] + count)
            ++count;
        if (count < together) count = 1;
        units.push_back({t, count});
        t += count;
    }
    return units;
}

// Portable twin of the vector path below, one query head at a time; the compiler vectorizes the inner loops.
LORAMUX_CLONES_V3 void attend_portable(const Queries& at, int64_t head, std::vector<float>& scores) {
    const int64_t first = at.first(0), last = at.last(0);
    const uint16_t* q = at.q + head * at.q_head;
    const int64_t tile0 = first / kTile, tile1 = last / kTile;
    scores.resize((tile1 - tile0 + 1) * kTile + at.head_dim);
    float* total_v = scores.data() + (tile1 - tile0 + 1) * kTile;
    float best = -INFINITY;
    for (int64_t tile = tile0; tile <= tile1; ++tile) {
        const uint16_t* k = at.k + at.blocks[tile] * at.block_stride;
        float dot[kTile] = {};
        for (int64_t d = 0; d < at.head_dim; d += 2) {
            const float q0 = widen(q[d]), q1 = widen(q[d + 1]);
            for (int64_t j = 0; j < kTile; ++j)
                dot[j] += q0 * widen(k[d * kTile + 2 * j]) + q1 * widen(k[d * kTile + 2 * j + 1]);
        }
        for (int64_t j = 0; j < kTile; ++j) {
            const int64_t key = tile * kTile + j;
            float s = -INFINITY;
            if (key >= first && key <= last) {
                s = dot[j] * at.scale;
                if (at.softcap > 0.f) s = at.softcap * std::tanh(s / at.softcap);
            }
            scores[(tile - tile0) * kTile + j] = s;
            if (s > best) best = s;
        }
    }
    for (int64_t d = 0; d < at.head_dim; ++d) total_v[d] = 0.f;
    float total = 0.f;
    for (int64_t key = first; key <= last; ++key) {
        const float exact = std::exp(scores[key - tile0 * kTile] - best);
        const float w = widen(narrow(exact));
        total += exact;
        const uint16_t* v = at.v + at.blocks[key / kTile] * at.block_stride +
                            (key % kTile / 2) * at.head_dim * 2 + key % 2;
        for (int64_t d = 0; d < at.head_dim; ++d) total_v[d] += w * widen(v[2 * d]);
    }
    for (int64_t d = 0; d < at.head_dim; ++d) at.out[head * at.out_head + d] = narrow(total_v[d] / total);
}

#if defined(__x86_64__)

template <int H>
void attend_rows(const Queries& at, int64_t count, Scratch& scratch) {
    switch (count) {
        case 1: Vectors<1, H>{at, scratch}.attend(); break;
        case 2: Vectors<2, H>{at, scratch}.attend(); break;
        default: Vectors<H < kHeads ? 4 : 2, H>{at, scratch}.attend();
    }
}

#endif

}  // namespace

extern "C" {

// Writes the new keys and values of every row into the cache, then attends.
//   q [rows, heads, head_dim], k and v [rows, kv_heads, head_dim], out [rows, heads, head_dim]: bf16; *_row and *_head
//   are the strides of the first two axes in elements, the last axis is dense
//   k_cache [blocks, kv_heads, head_dim / 2, 16, 2], v_cache [blocks, kv_heads, 8, head_dim, 2]: bf16
//   tables [sequences, table_width] int32; sequence, position [rows] int32
// Requires head_dim % 16 == 0 (portable: % 2).
void loramux_attention(uint16_t* out, const uint16_t* q, int64_t q_row, int64_t q_head, const uint16_t* k,
                       int64_t k_row, int64_t k_head, const uint16_t* v, int64_t v_row, int64_t v_head,
                       uint16_t* k_cache, uint16_t* v_cache, const int32_t* tables, int64_t table_width,
                       const int32_t* sequence, const int32_t* position, int64_t rows, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, float scale, float softcap, int64_t window, int32_t isa, int32_t threads) {
    const int64_t tile_size = kTile * head_dim, block_stride = kv_heads * tile_size, group = heads / kv_heads;
    const auto units = units_of(sequence, position, rows, isa == kPortable ? 1 : rows_together(group));
    const int64_t row_pieces = pieces_of(rows, rows * kv_heads * tile_size, threads);
    in_pieces(row_pieces, threads, [&](int64_t piece) {
        const Share share = share_of(rows, piece, row_pieces);
        for (int64_t t = share.begin; t < share.end; ++t) {
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
    });
    const int64_t count = static_cast<int64_t>(units.size()) * kv_heads, pieces = count < 1 << 10 ? count : 1 << 10;
    in_pieces(pieces, threads, [&](int64_t piece) {
        static thread_local Scratch scratch;
        const Share share = share_of(count, piece, pieces);
        for (int64_t i = share.begin; i < share.end; ++i) {
            const Unit unit = units[i / kv_heads];
            const int64_t t = unit.row, g = i % kv_heads;
            for (int64_t h = 0; h < group; h += kHeads) {
                const int64_t head = g * group + h;
                const Queries at{q + t * q_row + head * q_head, q_row, q_head,
                                 out + (t * heads + head) * head_dim, heads * head_dim, head_dim,
                                 k_cache + g * tile_size, v_cache + g * tile_size, block_stride,
                                 tables + sequence[t] * table_width, position[t], window, head_dim, scale, softcap};
                const int64_t together = group - h < kHeads ? group - h : kHeads;
#if defined(__x86_64__)
                if (isa == kAvx512Bf16) {
                    switch (together) {
                        case 1: attend_rows<1>(at, unit.count, scratch); break;
                        case 2: attend_rows<2>(at, unit.count, scratch); break;
                        case 3: attend_rows<3>(at, unit.count, scratch); break;
                        default: attend_rows<kHeads>(at, unit.count, scratch);
                    }
                    continue;
                }
#endif
                for (int64_t j = 0; j < together; ++j) attend_portable(at, j, scratch.scores);
            }
        }
    });
}

}  // extern "C"
