// A whole step of a decoder of Llama's shape, from token ids to logits.
//
//   x = embedding[token];  for each layer:  x += o(attend(rotate(q(n)), rotate(k(n)), v(n))), n = norm(x);
//   x += down(silu(gate(m)) * up(m)), m = norm(x);  logits = head(norm(x)) of the rows that are sampled
//
// Every projection is NF4 and may have a bias and adapters. Each operation is the kernel that the modules call, and
// rounds where theirs does, so the bits are those of transformers' code on these kernels; what is saved is the way from
// one to the next. In the last layer only sampled rows go on behind the attention: nobody looks at the others.

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace {

constexpr int64_t kRoom = 512;  // spans of each kind that are prefetched during one product

struct Run {
    const DecoderModel& model;
    const DecoderStep& step;
    const int32_t threads = static_cast<int32_t>(step.threads);

    // While the product keeps the cores busy, memory brings what is read next: the weights of the adapters, those of the
    // product that follows, and a part of the keys and values of layer `cached`.
    void linear(uint16_t* y, const uint16_t* x, const DecoderLinear& layer, int64_t rows, const LoraEntries* lora,
                const DecoderLinear* next, int64_t cached = -1, int64_t part = 0) const {
        Span spans[3][kRoom];
        Reads reads[3];
        int64_t count = 0;
        if (lora && layer.arena.a) reads[count++] = {spans[0], loramux_lora_spans(&layer.arena, lora, spans[0], kRoom)};
        if (next) reads[count++] = {spans[1], code_spans(spans[1], *next)};
        if (cached >= 0 && cached < model.num_layers) reads[count++] = {spans[2], cache_spans(spans[2], cached, part)};
        loramux_nf4_linear(y, x, layer.codes, layer.scales, layer.levels, rows, layer.inputs, layer.outputs, reads,
                           count, threads);
        if (layer.bias)
            for (int64_t t = 0; t < rows; ++t) loramux_add(y + t * layer.outputs, layer.bias, layer.outputs, 1);
        add_lora(y, x, layer.arena, lora);
    }

    // The codes that each thread begins a product with.
    int64_t code_spans(Span* spans, const DecoderLinear& layer) const {
        constexpr int64_t kMost = 1 << 20;
        const char* at = reinterpret_cast<const char*>(layer.codes);
        const int64_t bytes = layer.inputs * layer.outputs / 2, parts = threads < kRoom ? threads : kRoom;
        for (int64_t part = 0; part < parts; ++part) {
            const Share share = share_of(bytes, part, parts);
            const int64_t count = share.end - share.begin;
            spans[part] = {at + share.begin, count < kMost / parts ? count : kMost / parts};
        }
        return parts;
    }

    // Keys and values of a layer, of every third sequence of the step: the places of their blocks.
    int64_t cache_spans(Span* spans, int64_t layer, int64_t part) const {
        const int64_t size = model.kv_heads * kCacheTile * model.head_dim * 2;
        int64_t count = 0;
        for (int64_t t = 0; t < step.rows; ++t) {
            const int32_t sequence = step.sequence[t];
            if (sequence % 3 != part || (t + 1 < step.rows && step.sequence[t + 1] == sequence)) continue;
            for (int64_t block = 0; block <= step.position[t] / kCacheTile && count + 2 <= kRoom; ++block) {
                const int64_t at = step.tables[sequence * step.table_width + block] * size;
                spans[count++] = {reinterpret_cast<const char*>(step.k_cache[layer]) + at, size};
                spans[count++] = {reinterpret_cast<const char*>(step.v_cache[layer]) + at, size};
            }
        }
        return count;
    }

    void add_lora(uint16_t* y, const uint16_t* x, const LoraArena& arena, const LoraEntries* lora) const {
        if (lora && arena.a) loramux_add_lora(y, x, &arena, lora, kAvx512Bf16, threads);
    }

    void norm(uint16_t* y, const uint16_t* x, const DecoderNorm& norm, int64_t rows, int64_t dim) const {
        loramux_rms_norm(y, x, norm.weight, rows, dim, static_cast<float>(norm.eps), threads);
    }

    void gather(uint16_t* to, const uint16_t* from, int64_t dim) const {
        for (int64_t s = 0; s < step.samples; ++s)
            std::memmove(to + s * dim, from + step.sampled[s] * dim, dim * sizeof(uint16_t));  // rows ascend
    }

    void attention(uint16_t* out, uint16_t* q, uint16_t* k, uint16_t* v, const uint16_t* n, int64_t index) const {
        const DecoderLayer& layer = model.layers[index];
        const int64_t rows = step.rows, heads = model.heads, kv_heads = model.kv_heads, dim = model.head_dim;
        linear(q, n, layer.q, rows, step.lora, &layer.k);
        linear(k, n, layer.k, rows, step.lora, &layer.v);
        linear(v, n, layer.v, rows, step.lora, &layer.o);
        if (layer.q_norm.weight) norm(q, q, layer.q_norm, rows * heads, dim);
        if (layer.k_norm.weight) norm(k, k, layer.k_norm, rows * kv_heads, dim);
        loramux_rotate(q, step.cos, step.sin, step.position, rows, heads, dim, threads);
        loramux_rotate(k, step.cos, step.sin, step.position, rows, kv_heads, dim, threads);
        loramux_attention(out, q, heads * dim, dim, k, kv_heads * dim, dim, v, kv_heads * dim, dim, step.k_cache[index],
                          step.v_cache[index], step.tables, step.table_width, step.sequence, step.position, rows, heads,
                          kv_heads, dim, static_cast<float>(layer.scaling), static_cast<float>(layer.softcap),
                          layer.window, kAvx512Bf16, threads);
    }

    void run() const {
        const int64_t hidden = model.hidden, rows = step.rows;
        const int64_t q_width = model.heads * model.head_dim, kv_width = model.kv_heads * model.head_dim;
        uint16_t* x = step.scratch;
        uint16_t* n = x + rows * hidden;
        uint16_t* part = n + rows * hidden;  // what is added to x
        uint16_t* q = part + rows * hidden;  // the MLP needs its place again
        uint16_t *k = q + rows * q_width, *v = k + rows * kv_width, *attended = v + rows * kv_width;
        for (int64_t t = 0; t < rows; ++t)
            std::memcpy(x + t * hidden, model.embedding + step.tokens[t] * hidden, hidden * sizeof(uint16_t));
        int64_t going = rows;
        const LoraEntries* lora = step.lora;
        for (int64_t index = 0; index < model.num_layers; ++index) {
            const DecoderLayer& layer = model.layers[index];
            norm(n, x, layer.before_attention, rows, hidden);
            attention(attended, q, k, v, n, index);
            if (index + 1 == model.num_layers) {
                gather(x, x, hidden);
                gather(attended, attended, q_width);
                going = step.samples;
                lora = step.head_lora;
                if (going == 0) return;
            }
            linear(part, attended, layer.o, going, lora, &layer.gate);
            loramux_add(x, part, going * hidden, threads);
            norm(n, x, layer.before_mlp, going, hidden);
            uint16_t *gate = q, *up = gate + going * layer.gate.outputs;
            linear(gate, n, layer.gate, going, lora, &layer.up, index + 1, 0);
            linear(up, n, layer.up, going, lora, &layer.down, index + 1, 1);
            loramux_silu_mul(gate, gate, up, going, layer.gate.outputs, threads);
            const DecoderLinear* next = index + 1 < model.num_layers ? &model.layers[index + 1].q : nullptr;
            linear(part, gate, layer.down, going, lora, next, index + 1, 2);
            loramux_add(x, part, going * hidden, threads);
        }
        norm(n, x, model.norm, going, hidden);
        loramux_head(step.logits, n, model.head, going, hidden, model.vocabulary, threads);
        add_lora(step.logits, n, model.head_arena, step.head_lora);
    }
};

}  // namespace

extern "C" {

// Numbers of bf16 that a step of so many rows needs to work in.
int64_t loramux_decoder_scratch(const DecoderModel* model, int64_t rows) {
    const int64_t attention = 2 * (model->heads + model->kv_heads) * model->head_dim;
    int64_t widest = attention;
    for (int64_t i = 0; i < model->num_layers; ++i)
        if (2 * model->layers[i].gate.outputs > widest) widest = 2 * model->layers[i].gate.outputs;
    return rows * (3 * model->hidden + widest);
}

// Only where loramux_best_isa() is kAvx512Bf16. `rows` of the step are at least one.
void loramux_decoder_step(const DecoderModel* model, const DecoderStep* step) { Run{*model, *step}.run(); }

}  // extern "C"
