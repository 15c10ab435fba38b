// Which adapters each row of a step uses on one layer: what every way of computing their deltas asks.

#pragma once

#include <cstdint>

#include "kernels.h"
#include "threads.h"

namespace {

struct LoraBatch : LoraArena, LoraEntries {
    uint8_t has(int32_t e) const { return targeted[offset[e] / kRankGroup]; }
    bool counts(int32_t e) const { return has(e) != 0; }
    int32_t ranks_of(int32_t e) const { return has(e) & kHasDelta ? rank[e] : 0; }

    // What rows [start, stop) take, in proportion: their ranks, and for gain and shift as for one more.
    int64_t work(int64_t start, int64_t stop) const {
        int64_t ranks = 0;
        for (int32_t e = first[start]; e < first[stop]; ++e) ranks += ranks_of(e) + (has(e) & kHasAffine ? 1 : 0);
        return ranks;
    }

    // The rows of one piece: its share of all ranks, `work` of them, in whole rows.
    Share rows_of(int64_t piece, int64_t pieces, int64_t work_of_all) const {
        int64_t start = 0, stop = 0, done = 0;
        for (int64_t t = 0; t < count; ++t) {
            done += work(t, t + 1);
            if (done * pieces <= work_of_all * piece) start = t + 1;
            if (done * pieces <= work_of_all * (piece + 1)) stop = t + 1;
        }
        return {start, stop};
    }

    bool same_adapters(int64_t t, int64_t u) const {
        const int32_t number = first[t + 1] - first[t];
        if (first[u + 1] - first[u] != number) return false;
        for (int32_t e = first[t], f = first[u]; e < first[t + 1]; ++e, ++f)
            if (offset[e] != offset[f] || rank[e] != rank[f] || scale[e] != scale[f]) return false;
        return true;
    }

    // Where the weights lie that the deltas read: their number, `room` at most.
    int64_t spans(Span* into, int64_t room) const {
        int64_t found = 0;
        for (int32_t e = 0, last = -1; e < first[count] && found + 2 <= room; ++e) {
            const int64_t at = offset[e], ranks = ranks_of(e);
            if (at == last || ranks == 0) continue;  // rows of one adapter lie together
            last = offset[e];
            into[found++] = {reinterpret_cast<const char*>(a + at * inputs), ranks * inputs * 2};
            into[found++] = {reinterpret_cast<const char*>(bt + at * outputs), ranks * outputs * 2};
        }
        return found;
    }
};

}  // namespace
