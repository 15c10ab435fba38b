// From logits to tokens: the first largest, log probabilities, the likeliest tokens and draws.
//
// A row of logits is fp32 and read alone. Probabilities are exp_of(x - largest), summed in 16 lanes over 256 numbers, by
// one tree, and from there on in double in the order of the tokens. All else is comparison and double arithmetic in one
// order. So seeds, draws and log probabilities have the same bits on every processor; libm is not asked.
//
// Tokens stand in one order: the larger logit first, of equal ones the lower token. A token and its logit are one key of 64
// bits, in which that order is "greater".

#pragma once

#include "exact.h"
#include "../buffer.h"
#include "../threads.h"
#include "vec.h"

namespace {

constexpr int64_t kSpan = 256;         // numbers that are summed in fp32
constexpr float kLeast = -87.f;        // what is less likely than exp(-87) beside the largest has no weight
constexpr float kNothing = -__builtin_huge_valf();

// The numbers x [left], and behind them nothing.
inline Floats load_part(const float* x, int64_t left) {
    if (left >= kLanes) return load(x);
    float lanes[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] = k < left ? x[k] : kNothing;
    return load(lanes);
}

struct Found {
    int64_t index;  // of the first largest; 0 where there is none
    float largest;
    bool finite;  // the largest is, and no number is NaN
};

inline Found search_row(const float* x, int64_t count) {
    Found found{0, kNothing, true};
    Floats sick = splat(0.f);
    for (int64_t begin = 0; begin < count; begin += kSpan) {
        const int64_t end = begin + kSpan < count ? begin + kSpan : count;
        Floats top = splat(kNothing);
        for (int64_t i = begin; i < end; i += kLanes) {
            const Floats a = load_part(x + i, end - i);
            top = greater(a, top);  // in this order NaN is left out
            if (end - i >= kLanes) sick = fma(a, splat(0.f), sick);
        }
        for (int64_t i = end - end % kLanes; i < end; ++i) found.finite = found.finite && x[i] == x[i];
        const float its = largest(top);
        if (its <= found.largest) continue;
        found.largest = its;
        found.index = begin;
        while (x[found.index] != its) ++found.index;
    }
    if (total(sick) != 0.f)  // infinities, which may be negative, or NaN
        for (int64_t i = 0; i < count; ++i) found.finite = found.finite && x[i] == x[i];
    found.finite = found.finite && found.largest - found.largest == 0.f;
    return found;
}

// What numbers weigh beside the largest, which weighs 1.
inline Floats weight_of(Floats x, Floats most, Floats factor) {
    const Floats a = (x - most) * factor;
    return pick_greater(a, splat(kLeast), exp_of(a), splat(0.f));
}

// log(sum(exp(x))) of a row that is finite.
inline double log_sum_of(const float* x, int64_t count) {
    const float most = search_row(x, count).largest;
    double sum = 0.0;
    for (int64_t begin = 0; begin < count; begin += kSpan) {
        const int64_t end = begin + kSpan < count ? begin + kSpan : count;
        Floats part = splat(0.f);
        for (int64_t i = begin; i < end; i += kLanes)
            part = part + weight_of(load_part(x + i, end - i), splat(most), splat(1.f));
        sum += static_cast<double>(total(part));
    }
    return static_cast<double>(most) + log_of(sum);
}

// --- the order of tokens

inline uint64_t key_of(float logit, int64_t token) {
    const float value = logit + 0.f;  // both zeros are one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits ^= (bits >> 31) != 0 ? 0xffffffffu : 0x80000000u;
    return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}
inline int64_t token_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// A heap with its least key at 0.
inline void sift_down(uint64_t* heap, int64_t count, int64_t at) {
    const uint64_t key = heap[at];
    for (int64_t child = 2 * at + 1; child < count; child = 2 * at + 1) {
        if (child + 1 < count && heap[child + 1] < heap[child]) ++child;
        if (heap[child] >= key) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = key;
}
inline void make_heap(uint64_t* heap, int64_t count) {
    for (int64_t at = count / 2 - 1; at >= 0; --at) sift_down(heap, count, at);
}
inline uint64_t pop_least(uint64_t* heap, int64_t count) {
    const uint64_t least = heap[0];
    heap[0] = heap[count - 1];
    sift_down(heap, count - 1, 0);
    return least;
}

// The first `wanted` tokens in that order, as keys [wanted]; wanted <= count.
inline void first_of_row(uint64_t* keys, int64_t wanted, const float* x, int64_t count) {
    for (int64_t i = 0; i < wanted; ++i) keys[i] = key_of(x[i], i);
    make_heap(keys, wanted);
    for (int64_t i = wanted; wanted > 0 && i < count; i += kLanes) {
        uint32_t more = mask_greater(load_part(x + i, count - i), splat(x[token_of(keys[0])]));
        for (; more != 0; more &= more - 1) {
            const int64_t token = i + __builtin_ctz(more);
            const uint64_t key = key_of(x[token], token);
            if (key < keys[0]) continue;
            keys[0] = key;
            sift_down(keys, wanted, 0);
        }
    }
    for (int64_t left = wanted; left > 1; --left) {
        const uint64_t least = pop_least(keys, left);
        keys[left - 1] = least;
    }
}

// --- draws

struct DrawScratch {
    Buffer<uint64_t> heap, keys;
    Buffer<float> weights, chosen;
    Buffer<double> spans;
};

// Draws one token of a finite row.
struct DrawRow {
    const float* x;
    int64_t count;
    const TokenDraw& how;
    DrawScratch& scratch;
    const Found found = search_row(x, count);
    const Floats most = splat(found.largest), factor = splat(inverse(how.temperature));
    const float min_p = static_cast<float>(how.min_p);

    // Even so that nothing times it is no number.
    static float inverse(double temperature) {
        return temperature > 1e-30 ? static_cast<float>(1.0 / temperature) : 1e30f;
    }

    int64_t draw() {
        if (how.top_k > 0 && how.top_k < count) return among_first(how.top_k);
        if (how.top_p < 1.0) return in_nucleus();
        return in_all();
    }

    // Among the first k, less what top-p and min-p leave out.
    int64_t among_first(int64_t k) {
        uint64_t* keys = scratch.keys.fit(k);
        first_of_row(keys, k, x, count);
        float* weights = scratch.chosen.fit(k + kLanes);
        for (int64_t i = 0; i < k; ++i) weights[i] = x[token_of(keys[i])];
        for (int64_t i = 0; i < k; i += kLanes) store(weights + i, weight_of(load_part(weights + i, k - i), most, factor));
        if (how.top_p < 1.0) {
            double sum = 0.0, reached = 0.0;
            for (int64_t i = 0; i < k; ++i) sum += static_cast<double>(weights[i]);
            for (int64_t i = 0; i < k; ++i) {
                reached += static_cast<double>(weights[i]);
                if (reached >= how.top_p * sum) k = i + 1;
            }
        }
        return among(keys, weights, k);
    }

    // Among the fewest first tokens whose probability reaches top-p, less what min-p leaves out. What weighs less than
    // (1 - p) / count of the whole cannot be one of them, since all such tokens together do not make up 1 - p.
    int64_t in_nucleus() {
        const double sum = weigh(0.f);
        const float* all = scratch.weights.fit(count);
        const Floats bound = splat(static_cast<float>((1.0 - how.top_p) * sum / static_cast<double>(count) * 0.9999));
        uint64_t* heap = scratch.heap.fit(count);
        int64_t left = 0;
        for (int64_t i = 0; i < count; i += kLanes)
            for (uint32_t more = mask_greater(load_part(all + i, count - i), bound); more != 0; more &= more - 1) {
                const int64_t token = i + __builtin_ctz(more);
                heap[left++] = ~key_of(x[token], token);
            }
        make_heap(heap, left);
        uint64_t* keys = scratch.keys.fit(left);
        float* weights = scratch.chosen.fit(left);
        int64_t k = 0;
        for (double reached = 0.0; left > 0 && (k == 0 || reached < how.top_p * sum); --left) {
            keys[k] = ~pop_least(heap, left);
            weights[k] = all[token_of(keys[k])];
            reached += static_cast<double>(weights[k++]);
        }
        return among(keys, weights, k);
    }

    // Among all, in the order of their numbers; what min-p leaves out weighs nothing.
    int64_t in_all() {
        const double threshold = how.uniform * weigh(min_p);
        const float* weights = scratch.weights.fit(count);
        const double* spans = scratch.spans.fit((count + kSpan - 1) / kSpan);
        double reached = 0.0;
        int64_t begin = 0;
        while (begin + kSpan < count && reached + spans[begin / kSpan] <= threshold) {
            reached += spans[begin / kSpan];
            begin += kSpan;
        }
        const int64_t end = begin + kSpan < count ? begin + kSpan : count;
        int64_t last = -1;  // a span's tree may have rounded up what its numbers give one by one
        for (int64_t i = begin; i < end; ++i) {
            if (weights[i] == 0.f) continue;
            last = i;
            reached += static_cast<double>(weights[i]);
            if (reached > threshold) return i;
        }
        for (int64_t i = begin; last < 0 && i > 0; --i)
            if (weights[i - 1] != 0.f) last = i - 1;
        return last < 0 ? found.index : last;
    }

    // The weights of all tokens, those below `least` as none, and the sums of their spans; returns the sum of those.
    double weigh(float least) {
        float* weights = scratch.weights.fit(count + kLanes);
        double* spans = scratch.spans.fit((count + kSpan - 1) / kSpan);
        double sum = 0.0;
        for (int64_t begin = 0; begin < count; begin += kSpan) {
            const int64_t end = begin + kSpan < count ? begin + kSpan : count;
            Floats part = splat(0.f);
            for (int64_t i = begin; i < end; i += kLanes) {
                Floats weight = weight_of(load_part(x + i, end - i), most, factor);
                weight = pick_greater(splat(least), weight, splat(0.f), weight);
                store(weights + i, weight);
                part = part + weight;
            }
            spans[begin / kSpan] = static_cast<double>(total(part));
            sum += spans[begin / kSpan];
        }
        return sum;
    }

    // Among keys [k] in their order, less what min-p leaves out.
    int64_t among(const uint64_t* keys, const float* weights, int64_t k) const {
        double sum = 0.0;
        int64_t kept = 0;
        for (; kept < k && !(weights[kept] < min_p) && weights[kept] > 0.f; ++kept)
            sum += static_cast<double>(weights[kept]);
        double reached = 0.0;
        for (int64_t i = 0; i < kept; ++i) {
            reached += static_cast<double>(weights[i]);
            if (reached > how.uniform * sum) return token_of(keys[i]);
        }
        return kept > 0 ? token_of(keys[kept - 1]) : found.index;
    }
};

// --- rows of a batch

void exact_search(int64_t* index, uint8_t* finite, const float* x, int64_t rows, int64_t count, int64_t stride,
                  int32_t threads) {
    in_pieces(rows, threads, [&](int64_t t) {
        const Found found = search_row(x + t * stride, count);
        index[t] = found.index;
        finite[t] = found.finite;
    });
}

void exact_log_sums(double* sums, const float* x, const int64_t* rows, int64_t num_rows, int64_t count, int64_t stride,
                    int32_t threads) {
    in_pieces(num_rows, threads, [&](int64_t t) { sums[t] = log_sum_of(x + rows[t] * stride, count); });
}

void exact_first_tokens(int64_t* tokens, int64_t wanted, const float* x, const int64_t* rows, int64_t num_rows,
                        int64_t count, int64_t stride, int32_t threads) {
    in_pieces(num_rows, threads, [&](int64_t t) {
        static thread_local Buffer<uint64_t> buffer;
        uint64_t* keys = buffer.fit(wanted);
        first_of_row(keys, wanted, x + rows[t] * stride, count);
        for (int64_t i = 0; i < wanted; ++i) tokens[t * wanted + i] = token_of(keys[i]);
    });
}

void exact_draw(int64_t* tokens, const float* x, const TokenDraw* draws, int64_t num_draws, int64_t count,
                int64_t stride, int32_t threads) {
    in_pieces(num_draws, threads, [&](int64_t t) {
        static thread_local DrawScratch scratch;
        tokens[t] = DrawRow{x + draws[t].row * stride, count, draws[t], scratch}.draw();
    });
}

}  // namespace
