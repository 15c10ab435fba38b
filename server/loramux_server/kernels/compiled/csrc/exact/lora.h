// LoRA deltas of a heterogeneous batch.
//
// Semantics, for each row t of x, over its entries e in [first[t], first[t + 1]) whose layer the adapter targets, that is
// with targeted[offset[e] / kRankGroup] != 0:
//   h[e, r] = scale[e] * sum_i x[t, i] * a[offset[e] + r, i]
//   y[t, :] += sum_e scale[e] * (gain[e, :] * y[t, :] + shift[e, :]) + sum_e sum_r h[e, r] * bt[offset[e] + r, :]
// in fp32, weights bf16, y on the right what the layer itself gives. The first sum is over entries that have gain and shift
// (kHasAffine), the second over those that have A and B (kHasDelta); a row without the first has no operation for it. Every row is computed alone, its entries in the order given; how many rows go together changes no
// bit.

#pragma once

#include "../lora_batch.h"
#include "../prefetch.h"
#include "../threads.h"
#include "exact.h"
#include "vec.h"

namespace {

struct Entry {  // one adapter of a row
    const uint16_t *a, *bt;
    const float* affine;  // gain, then shift; null: none
    int64_t rank;         // 0: no A and B
    float scale;
};

struct LoraScratch {
    Buffer<Entry> entries, next;
    Buffer<float> factors;
};

inline int64_t entries_of(const LoraBatch& batch, int64_t t, Buffer<Entry>& into) {
    Entry* entries = into.fit(batch.first[t + 1] - batch.first[t]);
    int64_t found = 0;
    for (int32_t e = batch.first[t]; e < batch.first[t + 1]; ++e)
        if (batch.counts(e)) {
            const int64_t at = batch.offset[e];
            const float* affine = nullptr;
            if (batch.has(e) & kHasAffine) affine = batch.affine + at / kRankGroup * 2 * batch.outputs;
            entries[found++] = {batch.a + at * batch.inputs, batch.bt + at * batch.outputs, affine, batch.ranks_of(e),
                                batch.scale[e]};
        }
    return found;
}

// `count` numbers and zeros behind them, fewer than fill a vector.
inline Floats load_some(const float* p, int64_t count) {
    float lanes[kLanes] = {};
    std::memcpy(lanes, p, count * sizeof *p);
    return load(lanes);
}

inline Floats widen_some(const uint16_t* p, int64_t count) {
    uint16_t lanes[kLanes] = {};
    std::memcpy(lanes, p, count * sizeof *p);
    return widen(lanes);
}

// h [rank, R] = scale * x [R, in] @ a [rank, in].T; a rank is a multiple of 8.
template <int R>
void shrink(float* h, const float* x, const Entry& entry, int64_t in, RunPrefetch prefetch) {
    constexpr int G = kShrinkSums / R > 8 ? 8 : kShrinkSums / R > 0 ? kShrinkSums / R : 1;
    for (int64_t r = 0; r < entry.rank; r += G) {
        Floats sum[R][G];
        for (auto& row : sum)
            for (auto& s : row) s = splat(0.f);
        int64_t i = 0;
        for (; i + kLanes <= in; i += kLanes) {
            Floats rows[R];
            for (int t = 0; t < R; ++t) rows[t] = load(x + t * in + i);
            for (int g = 0; g < G; ++g) {
                const Floats weights = widen(entry.a + (r + g) * in + i);
                for (int t = 0; t < R; ++t) sum[t][g] = fma(rows[t], weights, sum[t][g]);
            }
            prefetch.step();
        }
        if (i < in)
            for (int g = 0; g < G; ++g) {
                const Floats weights = widen_some(entry.a + (r + g) * in + i, in - i);
                for (int t = 0; t < R; ++t) sum[t][g] = fma(load_some(x + t * in + i, in - i), weights, sum[t][g]);
            }
        for (int g = 0; g < G; ++g)
            for (int t = 0; t < R; ++t) h[(r + g) * R + t] = total(sum[t][g]) * entry.scale;
    }
}

// y [R, out] += h [all ranks, R].T @ the entries' bt, one below the other, and with Affine what gain and shift give: U
// vectors of columns from o on.
template <int R, int U, bool Affine>
__attribute__((always_inline)) inline void expand_columns(float* y, int64_t y_row, const float* h, const Entry* entries, int64_t count, int64_t out, int64_t o,
                    RunPrefetch& prefetch) {
    Floats sum[R][U];
    for (auto& row : sum)
        for (auto& s : row) s = splat(0.f);
    for (const Entry* entry = entries; Affine && entry < entries + count; ++entry)
        if (entry->affine)
            for (int u = 0; u < U; ++u) {
                const float* gain = entry->affine + o + u * kLanes;
                for (int t = 0; t < R; ++t) {
                    const Floats own = load(y + t * y_row + o + u * kLanes);
                    const Floats changed = fma(load(gain), own, load(gain + out));
                    sum[t][u] = fma(splat(entry->scale), changed, sum[t][u]);
                }
            }
    for (const Entry* entry = entries; entry < entries + count; ++entry)
        for (int64_t r = 0; r < entry->rank; ++r, h += R) {
            for (int u = 0; u < U; ++u) {
                const Floats weights = widen(entry->bt + r * out + o + u * kLanes);
                for (int t = 0; t < R; ++t) sum[t][u] = fma(splat(h[t]), weights, sum[t][u]);
            }
            prefetch.step();
        }
    for (int t = 0; t < R; ++t)
        for (int u = 0; u < U; ++u) {
            float* to = y + t * y_row + o + u * kLanes;
            store(to, load(to) + sum[t][u]);
        }
}

// The columns that are left: the same sums, one column at a time.
template <int R>
void expand_rest(float* y, int64_t y_row, const float* h, const Entry* entries, int64_t count, int64_t out, int64_t o) {
    for (int t = 0; t < R; ++t) {
        const float* factor = h + t;
        float sum = 0.f;
        for (const Entry* entry = entries; entry < entries + count; ++entry)
            if (const float* gain = entry->affine) {
                const float changed = __builtin_fmaf(gain[o], y[t * y_row + o], gain[out + o]);
                sum = __builtin_fmaf(entry->scale, changed, sum);
            }
        for (const Entry* entry = entries; entry < entries + count; ++entry)
            for (int64_t r = 0; r < entry->rank; ++r, factor += R)
                sum = __builtin_fmaf(*factor, widen(entry->bt[r * out + o]), sum);
        y[t * y_row + o] += sum;
    }
}

// y [R, out] += all columns.
template <int R, bool Affine>
void expand(float* y, int64_t y_row, const float* h, const Entry* entries, int64_t count, int64_t out,
            RunPrefetch prefetch) {
    constexpr int U = kExpandSums / R > 0 ? kExpandSums / R : 1;
    int64_t o = 0;
    for (; o + U * kLanes <= out; o += U * kLanes)
        expand_columns<R, U, Affine>(y, y_row, h, entries, count, out, o, prefetch);
    for (; o + kLanes <= out; o += kLanes)
        expand_columns<R, 1, Affine>(y, y_row, h, entries, count, out, o, prefetch);
    for (; o < out; ++o) expand_rest<R>(y, y_row, h, entries, count, out, o);
}

// R rows that use the same adapters; `next`, if any, is the first adapter that is used after them.
template <int R>
void add_rows(float* y, int64_t y_row, const float* x, const Entry* entries, int64_t count, int64_t in, int64_t out, bool cached,
              const Entry* next, Buffer<float>& factors) {
    constexpr int U = kExpandSums / R > 0 ? kExpandSums / R : 1;
    int64_t ranks = 0;
    bool affine = false;
    for (int64_t e = 0; e < count; ++e) {
        ranks += entries[e].rank;
        affine = affine || entries[e].affine;
    }
    float* h = factors.fit(ranks * R);
    float* part = h;
    for (const Entry* entry = entries; entry < entries + count; ++entry) {
        if (entry->rank == 0) continue;
        constexpr int G = kShrinkSums / R > 8 ? 8 : kShrinkSums / R > 0 ? kShrinkSums / R : 1;
        const int64_t steps = entry->rank / G * (in / kLanes + 1);
        shrink<R>(part, x, *entry, in, RunPrefetch(entry->bt, cached ? 0 : entry->rank * out, steps));
        part += entry->rank * R;
    }
    RunPrefetch prefetch(next ? next->a : nullptr, next ? next->rank * in : 0, ranks * (out / kLanes / U + 1) + 1);
    if (affine)
        expand<R, true>(y, y_row, h, entries, count, out, prefetch);
    else
        expand<R, false>(y, y_row, h, entries, count, out, prefetch);
}

// Rows [start, stop).
inline void add_lora_rows(const LoraBatch& batch, float* y, int64_t y_row, const float* x, int64_t start, int64_t stop,
                          LoraScratch& scratch) {
    const int64_t in = batch.inputs, out = batch.outputs;
    bool cached = false;  // the rows before used the same adapters
    for (int64_t t = start; t < stop;) {
        const int64_t number = entries_of(batch, t, scratch.entries);
        const Entry* entries = scratch.entries.fit(number);
        int64_t same = t + 1;
        while (same < stop && same < t + 4 && batch.same_adapters(t, same)) ++same;
        const int64_t count = same - t >= 4 ? 4 : same - t >= 2 ? 2 : 1;
        const bool goes_on = t + count < stop && batch.same_adapters(t, t + count);
        const Entry* next = nullptr;
        if (t + count < stop && !goes_on && entries_of(batch, t + count, scratch.next) > 0) next = scratch.next.fit(1);
        if (number > 0) {
            const auto run = count == 4 ? add_rows<4> : count == 2 ? add_rows<2> : add_rows<1>;
            run(y + t * y_row, y_row, x + t * in, entries, number, in, out, cached, next, scratch.factors);
        }
        cached = goes_on;
        t += count;
    }
}

// y [rows, out], whose rows are y_row apart, += the deltas of x [rows, in].
inline void add_lora(float* y, int64_t y_row, const float* x, const LoraArena& arena, const LoraEntries& step, int32_t threads) {
    const LoraBatch batch{arena, step};
    const int64_t rows = step.count, work = batch.work(0, rows);
    if (work == 0) return;
    const int64_t pieces = pieces_of(rows, work * (arena.inputs + arena.outputs), threads);
    in_pieces(pieces, threads, [&](int64_t piece) {
        const auto [start, stop] = batch.rows_of(piece, pieces, work);
        static thread_local LoraScratch scratch;
        add_lora_rows(batch, y, y_row, x, start, stop, scratch);
    });
}

}  // namespace
