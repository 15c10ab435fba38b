// A whole step of a decoder, from token ids to logits, as ExactModel describes it.
//
// The residual stream and everything between kernels is fp32. In the last layer only sampled rows go on behind the
// attention: nobody looks at the others.

#pragma once

#include "exact.h"
#include "../threads.h"
#include "attention.h"
#include "elementwise.h"
#include "experts.h"
#include "lora.h"
#include "panels.h"
#include "screen.h"
#include "token_rows.h"

namespace {

constexpr int64_t kSpans = 512;  // of each kind that are prefetched during one product
constexpr int64_t kAlignment = 64;

constexpr int16_t kNf4Levels[16] = {-2047, -1425, -1075, -808, -582, -378, -186, 0,
                                    163,   329,   504,   692,  902,  1152, 1480, 2047};

struct Widths {  // numbers of a row
    int64_t hidden, q, kv, qkv, inner, in;
    int64_t gated = 0;  // of what a fused gate and up give; where they are two, it takes the gate's place
    int64_t scores = 0, chosen = 0;  // of a router
    explicit Widths(const ExactModel& model) {
        hidden = model.hidden;
        q = model.heads * model.head_dim;
        kv = model.kv_heads * model.head_dim;
        qkv = q + 2 * kv;
        inner = 0;
        for (int64_t i = 0; i < model.num_layers; ++i) {
            const int64_t its = model.layers[i].down.inputs;
            if (its > inner) inner = its;
            if (!model.layers[i].up.codes && its > gated) gated = its;
            if (model.layers[i].router.padded > scores) scores = model.layers[i].router.padded;
            if (model.layers[i].experts.chosen > chosen) chosen = model.layers[i].experts.chosen;
        }
        in = hidden > q ? hidden : q;
        if (inner > in) in = inner;
    }
};

struct Places {  // in the scratch of a step
    float *x, *n, *part, *wide, *attended, *gated, *row_scales, *scores, *weights;
    int16_t* rounded;
    int64_t* chosen;
    int64_t bytes = 0;

    Places(const Widths& width, int64_t rows, char* from) {
        const int64_t wide_numbers = width.qkv > 2 * width.inner ? width.qkv : 2 * width.inner;
        x = take<float>(from, rows * width.hidden);
        n = take<float>(from, rows * width.hidden);
        part = take<float>(from, rows * width.hidden);
        wide = take<float>(from, rows * wide_numbers);
        attended = take<float>(from, rows * width.q);
        gated = take<float>(from, rows * width.gated);
        rounded = take<int16_t>(from, rows * width.in);
        row_scales = take<float>(from, rows * (width.in / kBlock));
        scores = take<float>(from, rows * width.scores);
        weights = take<float>(from, rows * width.chosen);
        chosen = take<int64_t>(from, rows * width.chosen);
    }

  private:
    template <class Number>
    Number* take(char* from, int64_t count) {
        auto* at = reinterpret_cast<Number*>(from + bytes);
        bytes += (count * static_cast<int64_t>(sizeof(Number)) + kAlignment - 1) / kAlignment * kAlignment;
        return at;
    }
};

struct DecoderRun {
    const ExactModel& model;
    const ExactStep& step;
    const Widths width{model};
    const Places at{width, step.rows, step.scratch};
    const int32_t threads = static_cast<int32_t>(step.threads);
    const Levels levels{kNf4Levels};

    // The codes that each thread begins a product with.
    int64_t code_spans(Span* spans, const ExactLinear& layer) const {
        constexpr int64_t kMost = 1 << 20;
        const char* from = reinterpret_cast<const char*>(layer.codes);
        const int64_t bytes = layer.inputs * layer.outputs / 2, parts = threads < kSpans ? threads : kSpans;
        for (int64_t part = 0; part < parts; ++part) {
            const Share share = share_of(bytes, part, parts);
            const int64_t count = share.end - share.begin;
            spans[part] = {from + share.begin, count < kMost / parts ? count : kMost / parts};
        }
        return parts;
    }

    // Keys and values of a layer, of every third sequence of the step: the places of their blocks.
    int64_t cache_spans(Span* spans, int64_t layer, int64_t part) const {
        const int64_t numbers = model.kv_heads * kTile * model.head_dim;
        int64_t count = 0;
        for (int64_t t = 0; t < step.rows; ++t) {
            const int32_t sequence = step.sequence[t];
            if (sequence % 3 != part || (t + 1 < step.rows && step.sequence[t + 1] == sequence)) continue;
            for (int64_t block = 0; block <= step.position[t] / kTile && count + 2 <= kSpans; ++block) {
                const int64_t from = step.tables[sequence * step.table_width + block] * numbers;
                spans[count++] = {reinterpret_cast<const char*>(step.k_cache[layer] + from), numbers * 2};
                spans[count++] = {reinterpret_cast<const char*>(step.v_cache[layer] + from), numbers * 2};
            }
        }
        return count;
    }

    // n = norm(x), or x itself where there is none; and what products read of it.
    const float* normed(const ExactNorm& norm, int64_t rows) const {
        const int64_t dim = width.hidden;
        const float* from = norm.weight ? at.n : at.x;
        for_rows(rows, dim, threads, [&](int64_t t) {
            if (norm.weight)
                norm_row(at.n + t * dim, at.x + t * dim, norm.weight, dim, static_cast<float>(norm.eps));
            round_row(t, from, dim);
        });
        return from;
    }

    void round_row(int64_t t, const float* x, int64_t dim) const {
        quantize_row(at.rounded + t * dim, at.row_scales + t * (dim / kBlock), x + t * dim, dim, kRowTop, kLevelTop);
    }

    // y = the rounded rows times the layer, + bias, + adapters' deltas of x, which the rows were rounded from. While the
    // product keeps the cores busy, memory brings what is read next: the weights of the adapters, those of the product
    // that follows, and a part of the keys and values of layer `cached`.
    void linear(float* y, const float* x, const ExactLinear& layer, int64_t rows, const LoraEntries* lora,
                const ExactLinear* next, int64_t cached = -1, int64_t part = 0) const {
        Span spans[3][kSpans];
        Reads reads[3];
        int64_t count = 0;
        if (lora && layer.arena.a) reads[count++] = {spans[0], LoraBatch{layer.arena, *lora}.spans(spans[0], kSpans)};
        if (next && next->codes) reads[count++] = {spans[1], code_spans(spans[1], *next)};
        if (cached >= 0 && cached < model.num_layers) reads[count++] = {spans[2], cache_spans(spans[2], cached, part)};
        const Nf4Weights weights{layer.codes, layer.scales, levels, layer.inputs, layer.outputs};
        if (rows >= kManyRows)
            multiply_many(y, x, weights, rows, kRowTop, kLevelTop, threads);
        else
            multiply(y, Rows{at.rounded, at.row_scales, rows}, weights, reads, count, threads);
        if (layer.bias)
            for_rows(rows, layer.outputs, threads,
                     [&](int64_t t) { add_bias(y + t * layer.outputs, layer.bias, layer.outputs); });
        if (lora && layer.arena.a) add_lora(y, layer.outputs, x, layer.arena, *lora, threads);
    }

    // x += factor * norm(part)
    void add(const ExactNorm& norm, int64_t rows) const {
        const int64_t dim = width.hidden;
        const auto factor = static_cast<float>(model.residual_factor);
        for_rows(rows, dim, threads, [&](int64_t t) {
            float* part = at.part + t * dim;
            if (norm.weight) norm_row(part, part, norm.weight, dim, static_cast<float>(norm.eps));
            add_row(at.x + t * dim, part, dim, factor);
        });
    }

    void gather(float* rows, int64_t dim) const {
        for (int64_t s = 0; s < step.samples; ++s)
            std::memmove(rows + s * dim, rows + step.sampled[s] * dim, dim * sizeof(float));  // rows ascend
    }

    void attention(int64_t index) const {
        const ExactLayer& layer = model.layers[index];
        const int64_t rows = step.rows, dim = model.head_dim;
        const bool fused = !layer.k.codes;
        const float* n = normed(layer.before_attention, rows);
        float* q = at.wide;
        float* k = fused ? q + width.q : q + rows * width.q;
        float* v = fused ? k + width.kv : k + rows * width.kv;
        linear(q, n, layer.q, rows, step.lora, fused ? &layer.o : &layer.k);
        if (!fused) {
            linear(k, n, layer.k, rows, step.lora, &layer.v);
            linear(v, n, layer.v, rows, step.lora, &layer.o);
        }
        const int64_t q_row = fused ? width.qkv : width.q, kv_row = fused ? width.qkv : width.kv;
        turn(q, q_row, model.heads, layer.q_norm, layer);
        turn(k, kv_row, model.kv_heads, layer.k_norm, layer);
        if (layer.clip > 0.)
            for_rows(rows, width.kv, threads,
                     [&](int64_t t) { clip_row(v + t * kv_row, width.kv, static_cast<float>(layer.clip)); });
        attend({q, k, v, q_row, kv_row, kv_row, at.attended, step.k_cache[index], step.v_cache[index],
                step.kv_scales[index], step.tables, step.sequence, step.position, step.table_width, rows, model.heads,
                model.kv_heads, dim, layer.window, static_cast<float>(layer.scaling),
                static_cast<float>(layer.softcap), layer.sinks},
               threads);
    }

    // Norm, clip and rotation of the heads of queries or keys, in place.
    void turn(float* x, int64_t stride, int64_t heads, const ExactNorm& norm, const ExactLayer& layer) const {
        if (!norm.weight && layer.rotary < 0 && !(layer.clip > 0.)) return;
        const int64_t dim = model.head_dim, pairs = model.rotary_pairs;
        const auto eps = static_cast<float>(norm.eps);
        for_rows(step.rows, heads * dim, threads, [&](int64_t t) {
            float* row = x + t * stride;
            if (norm.weight && layer.whole_norms) norm_row(row, row, norm.weight, heads * dim, eps);
            for (int64_t h = 0; h < heads; ++h) {
                float* head = row + h * dim;
                if (norm.weight && !layer.whole_norms) norm_row(head, head, norm.weight, dim, eps);
                if (layer.clip > 0.) clip_row(head, dim, static_cast<float>(layer.clip));
                if (layer.rotary < 0) continue;
                const int64_t angle = step.position[t] * pairs;
                rotate_head(head, step.cos[layer.rotary] + angle, step.sin[layer.rotary] + angle, pairs);
            }
        });
    }

    void mlp(int64_t index, int64_t rows, const LoraEntries* lora) const {
        const ExactLayer& layer = model.layers[index];
        const int64_t inner = layer.down.inputs;
        const bool fused = !layer.up.codes;
        const float* n = normed(layer.before_mlp, rows);
        float* gate = at.wide;
        linear(gate, n, layer.gate, rows, lora, fused ? &layer.down : &layer.up, index + 1, 0);
        float* up = fused ? gate + inner : gate + rows * inner;
        if (!fused) linear(up, n, layer.up, rows, lora, &layer.down, index + 1, 1);
        const int64_t stride = fused ? 2 * inner : inner;
        const bool gelu = layer.gelu != 0;
        float* gated = fused ? at.gated : gate;
        for_rows(rows, inner, threads, [&](int64_t t) {
            gate_row(gated + t * inner, gate + t * stride, up + t * stride, inner, gelu);
            round_row(t, gated, inner);
        });
        const ExactLinear* next = index + 1 < model.num_layers ? &model.layers[index + 1].q : nullptr;
        linear(at.part, gated, layer.down, rows, lora, next, index + 1, 2);
        add(layer.after_mlp, rows);
    }

    void mixture(int64_t index, int64_t rows, const LoraEntries* lora) const {
        const ExactLayer& layer = model.layers[index];
        const ExactRouter& router = layer.router;
        const int64_t dim = width.hidden, chosen = layer.experts.chosen;
        const float* n = layer.before_mlp.weight ? at.n : at.x;
        for_rows(rows, dim, threads, [&](int64_t t) {
            if (layer.before_mlp.weight)
                norm_row(at.n + t * dim, at.x + t * dim, layer.before_mlp.weight, dim,
                         static_cast<float>(layer.before_mlp.eps));
            quantize_row(at.rounded + t * dim, at.row_scales + t * (dim / kBlock), n + t * dim, dim, kRowTop, 1.f);
        });
        const DenseWeights weights{router.weight, router.scales, dim, router.padded};
        multiply(at.scores, Rows{at.rounded, at.row_scales, rows}, weights, nullptr, 0, threads);
        for_rows(rows, layer.experts.count * chosen, threads, [&](int64_t t) {
            choose_experts(at.chosen + t * chosen, at.weights + t * chosen, at.scores + t * router.padded, router,
                           layer.experts.count, chosen);
        });
        run_experts(at.part, n, layer.experts, at.chosen, at.weights, lora, rows, levels, threads);
        add(layer.after_mlp, rows);
    }

    void logits(int64_t samples) const {
        const int64_t dim = width.hidden, padded = model.padded_vocabulary, rows = samples - step.states_only;
        for_rows(samples, dim, threads, [&](int64_t t) {
            float* n = t < rows ? at.n + t * dim : step.states + (t - rows) * dim;
            norm_row(n, at.x + t * dim, model.norm.weight, dim, static_cast<float>(model.norm.eps));
            if (t >= rows) return;
            quantize_row(at.rounded + t * dim, at.row_scales + t * (dim / kBlock), at.n + t * dim, dim, kRowTop, 1.f);
        });
        if (rows == 0) return;
        const DenseWeights weights{model.head, model.head_scales, dim, padded};
        const Rows x{at.rounded, at.row_scales, rows};
        if (step.first_tokens && screened(weights, x)) return;
        multiply(step.logits, x, weights, nullptr, 0, threads);
        if (step.head_lora && model.head_arena.a) {
            LoraEntries lora = *step.head_lora;
            lora.count = rows;
            add_lora(step.logits, padded, at.n, model.head_arena, lora, threads);
        }
        const TokenPlaces places{step.logits, step.wide, padded, step.num_wide, model.vocabulary};
        for (int64_t i = 0; i < step.num_token_logits; ++i)
            add_token_logits(places, at.n, dim, step.token_logits[i], threads);
        const auto divisor = static_cast<float>(model.logit_divisor), cap = static_cast<float>(model.logit_softcap);
        if (divisor == 1.f && cap == 0.f) return;
        for_rows(rows, padded, threads, [&](int64_t t) {
            for (float* at = step.logits + t * padded; at < step.logits + (t + 1) * padded; at += kLanes) {
                Floats a = load(at) / splat(divisor);
                if (cap > 0.f) a = tanh_of(a / splat(cap)) * splat(cap);
                store(at, a);
            }
            for (float* at = step.wide + t * step.num_wide; at < step.wide + (t + 1) * step.num_wide; at += kLanes) {
                const Floats before = load(at);
                Floats a = before / splat(divisor);
                if (cap > 0.f) a = tanh_of(a / splat(cap)) * splat(cap);
                store(at, pick_greater(before, splat(kLeastLogit), a, before));  // what is minus infinity stays so
            }
        });
    }

    // Whether the first token of every row was found without its logits.
    bool screened(const DenseWeights& weights, const Rows& x) const {
        const bool can = can_screen(x.count);
        if (can)
            find_first_tokens(step.first_tokens, step.logits, x, weights, model.vocabulary,
                              static_cast<float>(model.logit_divisor), threads);
        bool all = can;
        for (int64_t t = 0; t < x.count; ++t) {
            if (!can) step.first_tokens[t] = -1;
            all = all && step.first_tokens[t] >= 0;
        }
        return all;
    }

    // Rows have to be few, and nothing may be added to their logits. A soft cap makes logits equal that are not.
    bool can_screen(int64_t rows) const {
        if (rows > kScreenedRows || step.num_token_logits > 0 || model.logit_softcap > 0. || !(static_cast<float>(model.logit_divisor) > 0.f))
            return false;
        if (!step.head_lora || !model.head_arena.a) return true;
        const LoraBatch batch{model.head_arena, *step.head_lora};
        for (int32_t e = 0; e < batch.first[rows]; ++e)
            if (batch.counts(e)) return false;
        return true;
    }

    // x = the embedding of a token, where there is none the head's row of it, and what an adapter adds, times the factor.
    void embed(float* x, int64_t t) const {
        const int64_t dim = width.hidden, token = step.tokens[t];
        if (step.own_embedding_of && step.own_embedding_of[t] >= 0) {
            const float* own = step.own_embeddings + step.own_embedding_of[t] * dim;
            const Floats factor = splat(static_cast<float>(model.embedding_factor));
            base_embedding(x, token, 1.f);
            for (int64_t i = 0; i < dim; i += kLanes) store(x + i, (load(x + i) + load(own + i)) * factor);
            return;
        }
        base_embedding(x, token, static_cast<float>(model.embedding_factor));
    }

    void base_embedding(float* x, int64_t token, float factor) const {
        const int64_t dim = width.hidden;
        if (token < 0) {
            for (int64_t i = 0; i < dim; ++i) x[i] = 0.f;
            return;
        }
        if (model.embedding) {
            for (int64_t i = 0; i < dim; i += kLanes)
                store(x + i, widen(model.embedding + token * dim + i) * splat(factor));
            return;
        }
        const DenseWeights head{model.head, model.head_scales, dim, model.padded_vocabulary};
        for (int64_t i = 0; i < dim; ++i) {
            const float scale = head.scales[i / kBlock * head.out + token];
            x[i] = static_cast<float>(head.number(token, i)) * scale * factor;
        }
    }

    void run() const {
        const int64_t dim = width.hidden;
        for_rows(step.rows, dim, threads, [&](int64_t t) { embed(at.x + t * dim, t); });
        int64_t rows = step.rows;
        const LoraEntries* lora = step.lora;
        for (int64_t index = 0; index < model.num_layers; ++index) {
            const ExactLayer& layer = model.layers[index];
            attention(index);
            if (index + 1 == model.num_layers) {
                gather(at.x, dim);
                gather(at.attended, width.q);
                rows = step.samples;
                lora = step.head_lora;
                if (rows == 0) return;
            }
            for_rows(rows, width.q, threads, [&](int64_t t) { round_row(t, at.attended, width.q); });
            linear(at.part, at.attended, layer.o, rows, lora, &layer.gate);
            add(layer.after_attention, rows);
            if (layer.experts.layers)
                mixture(index, rows, lora);
            else
                mlp(index, rows, lora);
        }
        logits(rows);
    }
};

}  // namespace
