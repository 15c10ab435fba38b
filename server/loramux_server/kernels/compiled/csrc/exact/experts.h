// The experts of a layer: gated MLPs of which each row goes through a few, weighted by its router.
//
// Semantics: y[t] = sum_j weights[t, j] * expert[index[t, j]](x[t]) in fp32, over the row's experts in the order that
// its router gives them, with
//
//   expert(x) = down(a) where a = activation(alpha * g) * u / alpha,
//   g = gate(x) up to `limit`, u = up(x) within `limit` + above
//
// Rows are grouped by expert, each group is a product like any other (product.h), and adapters are added to each
// (lora.h): so the bits of a row are those that its experts' layers give it one by one, in any company.

#pragma once

#include "elementwise.h"
#include "exact.h"
#include "lora.h"
#include "product.h"

namespace {

constexpr int64_t kExpertOperations = 4 << 20;  // of a piece of a product: some 20 microseconds
constexpr int64_t kExpertNumbers = 12 << 20;    // between products, of the rows that go through experts together
constexpr int64_t kExpertRows = 16;             // of a piece between two products

struct ExpertScratch {
    Buffer<int64_t> first, place, row;
    Buffer<int32_t> entry_first, offset, rank;
    Buffer<float> entry_scale, scales, picked_scales, numbers, picked;
    Buffer<int16_t> q, picked_q;
    Buffer<Share> parts;  // of pieces: rows or tiles of one expert
    Buffer<int32_t> active, part_of;
};

// Rows that go through their experts together.
struct ExpertsRun {
    const ExactExperts& experts;
    float* y;
    const float* x;        // [rows, outer]
    const int64_t* index;  // [rows, chosen]
    const float* weights;  // [rows, chosen]
    const LoraEntries* lora;
    int64_t first_row, rows;  // of `lora` and in all
    int32_t threads;
    ExpertScratch& scratch;
    const Levels& levels;
    // A place is one of a row's experts; places of an expert lie together, in the order of rows.
    const int64_t places = rows * experts.chosen;
    int64_t* first = nullptr;  // [count + 1]: the places of each expert
    int64_t* place = nullptr;  // [rows, chosen]
    int64_t* row = nullptr;    // [places]
    int32_t* active = nullptr;
    int64_t num_active = 0;
    LoraEntries entries{};  // of places

    const ExactLinear& layer(int64_t expert, int which) const { return experts.layers[3 * expert + which]; }

    void group() {
        const int64_t count = experts.count;
        first = scratch.first.fit(count + 2);
        place = scratch.place.fit(places);
        row = scratch.row.fit(places);
        active = scratch.active.fit(count);
        std::memset(first, 0, (count + 2) * sizeof *first);
        for (int64_t i = 0; i < places; ++i) ++first[index[i] + 2];
        for (int64_t e = 0; e < count; ++e) {
            if (first[e + 2] > 0) active[num_active++] = static_cast<int32_t>(e);
            first[e + 2] += first[e + 1];
        }
        for (int64_t i = 0; i < places; ++i) {  // first[e + 1] is where the next of e goes, and at last where they end
            place[i] = first[index[i] + 1]++;
            row[place[i]] = i / experts.chosen;
        }
    }

    // The adapters of places, if any of them has a part for one of their experts.
    void pick_entries() {
        if (!lora) return;
        const int32_t* from = lora->first + first_row;
        int64_t total = 0;
        for (int64_t p = 0; p < places; ++p) total += from[row[p] + 1] - from[row[p]];
        if (total == 0) return;
        int32_t* starts = scratch.entry_first.fit(places + 1);
        int32_t *offset = scratch.offset.fit(total), *rank = scratch.rank.fit(total);
        float* scale = scratch.entry_scale.fit(total);
        int32_t found = 0;
        for (int64_t p = 0; p < places; ++p) {
            starts[p] = found;
            for (int32_t e = from[row[p]]; e < from[row[p] + 1]; ++e, ++found) {
                offset[found] = lora->offset[e];
                rank[found] = lora->rank[e];
                scale[found] = lora->scale[e];
            }
        }
        starts[places] = found;
        entries = {starts, offset, rank, scale, places};
        for (int64_t n = 0; n < num_active; ++n)
            for (int which = 0; which < 3; ++which)
                if (work_of(active[n], which) > 0) return;
        entries.first = nullptr;
    }

    LoraBatch batch_of(int64_t expert, int which) const {
        LoraEntries own = entries;
        own.first += first[expert];
        own.count = first[expert + 1] - first[expert];
        return {layer(expert, which).arena, own};
    }

    int64_t work_of(int64_t expert, int which) const {
        if (!entries.first || !layer(expert, which).arena.a) return 0;
        const LoraBatch batch = batch_of(expert, which);
        return batch.work(0, batch.count);
    }

    // body(expert, share of its `things`) in pieces of at most `together` things.
    template <class Count, class Body>
    void in_parts(const Count& parts_of, const Body& body) const {
        int64_t number = 0;
        for (int64_t n = 0; n < num_active; ++n) number += parts_of(active[n]).end;
        Share* parts = scratch.parts.fit(number);
        int32_t* of = scratch.part_of.fit(number);
        int64_t at = 0;
        for (int64_t n = 0; n < num_active; ++n) {
            const Share all = parts_of(active[n]);  // things, and pieces of them
            for (int64_t part = 0; part < all.end; ++part) {
                parts[at] = share_of(all.begin, part, all.end);
                of[at++] = active[n];
            }
        }
        const int64_t pieces = number < 1 << 16 ? number : 1 << 16;
        in_pieces(pieces, threads, [&](int64_t piece) {
            const Share share = share_of(number, piece, pieces);
            for (int64_t part = share.begin; part < share.end; ++part) body(of[part], parts[part]);
        });
    }

    // body(expert, its places [begin, end)), a few at a time.
    template <class Body>
    void in_places(const Body& body) const {
        in_parts(
            [&](int64_t expert) {
                const int64_t count = first[expert + 1] - first[expert];
                return Share{count, (count + kExpertRows - 1) / kExpertRows};
            },
            [&](int64_t expert, Share share) {
                body(expert, Share{first[expert] + share.begin, first[expert] + share.end});
            });
    }

    // to [places, outputs] = products of the rounded numbers of places with `number` layers of their expert, from
    // `which` on; the numbers of the second lie behind those of the first.
    void multiply_places(float* to, const int16_t* q, const float* scales, int64_t in, int64_t out, int which,
                         int number) const {
        constexpr int64_t kWide = kProductTiles * kLanes;
        const int64_t tiles = out / kWide;
        in_parts(
            [&](int64_t expert) {
                const int64_t count = first[expert + 1] - first[expert];
                int64_t pieces = count * in * out / kExpertOperations;
                const int64_t least = (4 * threads + num_active * number - 1) / (num_active * number);
                pieces = number * (pieces < least ? least : pieces);
                return Share{tiles * number, pieces < tiles * number ? pieces : tiles * number};
            },
            [&](int64_t expert, Share share) {
                const int64_t begin = first[expert], count = first[expert + 1] - begin;
                const Rows own{q + begin * in, scales + begin * (in / kBlock), count};
                SharePrefetch none(nullptr, 0, 0, 1, 0);
                for (int64_t tile = share.begin; tile < share.end; ++tile) {
                    const int64_t later = tile / tiles;
                    const ExactLinear& its = layer(expert, which + static_cast<int>(later));
                    const Nf4Weights w{its.codes, its.scales, levels, in, out};
                    float* y = to + later * places * out + begin * out;
                    for_row_groups<kProductRows>(count, [&](auto size, int64_t from, int64_t) {
                        multiply_tiles<size.value, kProductTiles>(y, own, from, w, tile % tiles * kWide, none);
                    });
                }
            });
    }

    // What a layer's bias and adapters add to places; x [places, inputs] is read for adapters alone.
    void finish(float* to, const float* from, int64_t expert, int which, Share share) const {
        const ExactLinear& its = layer(expert, which);
        const int64_t in = its.inputs, out = its.outputs;
        for (int64_t p = share.begin; its.bias && p < share.end; ++p) add_bias(to + p * out, its.bias, out);
        if (work_of(expert, which) == 0) return;
        static thread_local LoraScratch lora_scratch;
        const int64_t begin = first[expert];
        add_lora_rows(batch_of(expert, which), to + begin * out, out, from + begin * in, share.begin - begin,
                      share.end - begin, lora_scratch);
    }

    void activate(float* gate, float* up) const {
        const int64_t dim = experts.inner;
        const auto alpha = static_cast<float>(experts.alpha), limit = static_cast<float>(experts.limit);
        const auto above = static_cast<float>(experts.above);
        for (int64_t i = 0; limit > 0.f && i < dim; i += kLanes)
            store(gate + i, pick_greater(load(gate + i), splat(limit), splat(limit), load(gate + i)));
        if (limit > 0.f) clip_row(up, dim, limit);
        for (int64_t i = 0; above != 0.f && i < dim; i += kLanes) store(up + i, load(up + i) + splat(above));
        for (int64_t i = 0; alpha != 1.f && i < dim; i += kLanes) store(gate + i, load(gate + i) * splat(alpha));
        gate_row(gate, gate, up, dim, experts.gelu != 0);
        for (int64_t i = 0; alpha != 1.f && i < dim; i += kLanes) store(gate + i, load(gate + i) / splat(alpha));
    }

    void run() {
        const int64_t outer = experts.outer, inner = experts.inner, blocks = outer / kBlock;
        const int64_t wide = outer > inner ? outer : inner;
        group();
        pick_entries();
        int16_t *q = scratch.q.fit(rows * outer), *picked = scratch.picked_q.fit(places * wide);
        float* scales = scratch.scales.fit(rows * blocks);
        float* picked_scales = scratch.picked_scales.fit(places * (wide / kBlock));
        float* gate = scratch.numbers.fit(places * (2 * inner + outer));
        float *up = gate + places * inner, *part = up + places * inner;
        float* own_x = entries.first ? scratch.picked.fit(places * outer) : nullptr;
        for_rows(rows, outer, threads, [&](int64_t t) {
            quantize_row(q + t * outer, scales + t * blocks, x + t * outer, outer, kRowTop, kLevelTop);
        });
        for_rows(places, outer, threads, [&](int64_t p) {
            std::memcpy(picked + p * outer, q + row[p] * outer, outer * sizeof *q);
            std::memcpy(picked_scales + p * blocks, scales + row[p] * blocks, blocks * sizeof *scales);
            if (own_x) std::memcpy(own_x + p * outer, x + row[p] * outer, outer * sizeof *x);
        });
        multiply_places(gate, picked, picked_scales, outer, inner, 0, 2);
        in_places([&](int64_t expert, Share share) {
            finish(gate, own_x, expert, 0, share);
            finish(up, own_x, expert, 1, share);
            for (int64_t p = share.begin; p < share.end; ++p) {
                activate(gate + p * inner, up + p * inner);
                quantize_row(picked + p * inner, picked_scales + p * (inner / kBlock), gate + p * inner, inner, kRowTop,
                             kLevelTop);
            }
        });
        multiply_places(part, picked, picked_scales, inner, outer, 2, 1);
        if (entries.first || layer(active[0], 2).bias)
            in_places([&](int64_t expert, Share share) { finish(part, gate, expert, 2, share); });
        for_rows(rows, outer * experts.chosen, threads, [&](int64_t t) {
            const int64_t* own = place + t * experts.chosen;
            const float* factor = weights + t * experts.chosen;
            for (int64_t i = 0; i < outer; i += kLanes) {
                Floats sum = load(part + own[0] * outer + i) * splat(factor[0]);
                for (int64_t j = 1; j < experts.chosen; ++j)
                    sum = sum + load(part + own[j] * outer + i) * splat(factor[j]);
                store(y + t * outer + i, sum);
            }
        });
    }
};

// y [rows, outer]; y may be x.
inline void run_experts(float* y, const float* x, const ExactExperts& experts, const int64_t* index,
                        const float* weights, const LoraEntries* lora, int64_t rows, const Levels& levels,
                        int32_t threads) {
    static thread_local ExpertScratch scratch;
    const int64_t chosen = experts.chosen, outer = experts.outer;
    const int64_t fit = kExpertNumbers / (chosen * (2 * experts.inner + outer)), most = fit < 1 ? 1 : fit;
    const int64_t turns = (rows + most - 1) / most;
    for (int64_t turn = 0; turn < turns; ++turn) {
        const Share share = share_of(rows, turn, turns);
        const int64_t from = share.begin;
        ExpertsRun run{experts, y + from * outer,      x + from * outer, index + from * chosen, weights + from * chosen,
                       lora,    from, share.end - from, threads,          scratch,               levels};
        run.run();
    }
}

// The experts of a row, those with the largest scores [count], of equal ones the first; and their weights.
inline void choose_experts(int64_t* index, float* weights, float* scores, const ExactRouter& router, int64_t count,
                           int64_t chosen) {
    if (router.bias)
        for (int64_t e = 0; e < count; ++e) scores[e] += router.bias[e];
    for (int64_t j = 0; j < chosen; ++j) {
        int64_t best = -1;
        for (int64_t e = 0; e < count; ++e) {
            if (best >= 0 && !(scores[e] > scores[best])) continue;
            bool taken = false;
            for (int64_t i = 0; i < j; ++i) taken = taken || index[i] == e;
            if (!taken) best = e;
        }
        index[j] = best;
        weights[j] = scores[best];
    }
    if (router.normalized) {
        softmax_row(weights, weights, chosen);
        return;
    }
    softmax_row(scores, scores, count);
    for (int64_t j = 0; j < chosen; ++j) weights[j] = scores[index[j]];
}

}  // namespace
