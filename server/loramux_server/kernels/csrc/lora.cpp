// LoRA deltas of a heterogeneous batch.
//
// Semantics, for each row t of x, over its entries e in [first[t], first[t + 1]) whose layer the adapter targets, that is
// with targeted[offset[e] / kRankGroup] != 0:
//   h[e, r] = scale[e] * sum_i x[t, i] * a[offset[e] + r, i]               bf16 products, fp32 sums
//   y[t, :] = bf16(y[t, :] + sum_e sum_r h[e, r] * bt[offset[e] + r, :])   fp32 sums, one rounding
// Every row is computed alone, its entries in the order given, so its bits do not depend on the batch around it.

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "lora_batch.h"
#include "lora_rows.h"
#include "threads.h"

namespace {

struct Scratch {
    std::vector<Entry> entries, next;
    std::vector<float> sums;
};

struct Batch : LoraBatch {
    void entries_of(int64_t t, std::vector<Entry>& entries) const {
        entries.clear();
        for (int32_t e = first[t]; e < first[t + 1]; ++e)
            if (counts(e)) {
                const int64_t at = offset[e];
                entries.push_back({a + at * inputs, bt + at * outputs, rank[e], scale[e]});
            }
    }

    void run_portable(uint16_t* y, const uint16_t* x, int64_t start, int64_t stop, Scratch& scratch) const {
        scratch.sums.resize(outputs);
        for (int64_t t = start; t < stop; ++t) {
            entries_of(t, scratch.entries);
            const Entry* begin = scratch.entries.data();
            const Entry* end = begin + scratch.entries.size();
            for (const Entry* e = begin; e < end; ++e)
                row_portable(y + t * outputs, x + t * inputs, e->a, e->bt, inputs, outputs, e->rank, e->scale,
                             e == begin, e + 1 == end, scratch.sums.data());
        }
    }

#if defined(__x86_64__)
    void run_vector(uint16_t* y, const uint16_t* x, int64_t start, int64_t stop, Scratch& scratch) const {
        bool cached = false;  // the rows before used the same adapters
        for (int64_t t = start; t < stop;) {
            entries_of(t, scratch.entries);
            int64_t same = t + 1;
            while (same < stop && same < t + 4 && same_adapters(t, same)) ++same;
            const int64_t count = same - t >= 4 ? 4 : same - t >= 2 ? 2 : 1;
            const bool goes_on = t + count < stop && same_adapters(t, t + count);
            const Entry* next = nullptr;
            if (t + count < stop && !goes_on) {
                entries_of(t + count, scratch.next);
                next = scratch.next.empty() ? nullptr : scratch.next.data();
            }
            if (!scratch.entries.empty()) {
                const auto run = count == 4   ? rows_avx512bf16<4>
                                 : count == 2 ? rows_avx512bf16<2>
                                              : rows_avx512bf16<1>;
                run(y + t * outputs, x + t * inputs, scratch.entries, inputs, outputs, cached, next, scratch.sums);
            }
            cached = goes_on;
            t += count;
        }
    }
#endif
};

}  // namespace

extern "C" {

// y [rows, out] bf16, changed in place; x [rows, in] bf16.
void loramux_add_lora(uint16_t* y, const uint16_t* x, const LoraArena* arena, const LoraEntries* step, int32_t isa,
                      int32_t threads) {
    const Batch batch{{*arena, *step}};
    const int64_t rows = batch.count;
    const int64_t work = batch.work(0, rows);
    if (work == 0) return;
    const int64_t pieces = pieces_of(rows, work * (batch.inputs + batch.outputs), threads);
    in_pieces(pieces, threads, [&](int64_t piece) {
        const auto [start, stop] = batch.rows_of(piece, pieces, work);
        static thread_local Scratch scratch;
#if defined(__x86_64__)
        if (isa == kAvx512Bf16) return batch.run_vector(y, x, start, stop, scratch);
#endif
        batch.run_portable(y, x, start, stop, scratch);
    });
}

// Where the weights lie that loramux_add_lora reads for such a step: their number, `room` at most.
int64_t loramux_lora_spans(const LoraArena* arena, const LoraEntries* step, Span* spans, int64_t room) {
    return LoraBatch{*arena, *step}.spans(spans, room);
}

}  // extern "C"
