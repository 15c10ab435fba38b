// What stands between the products of a model in training, backward: norm, activation, and the loss with its gradient. All
// in fp32; a row is computed alone and in a fixed order. Widths are multiples of 16.

#pragma once

#include "elementwise.h"

namespace {

// dx of y = w * x * s, s = 1 / sqrt(mean(x^2) + eps):  dx = s * (w * dy - x * s^2 * mean(w * dy * x))
inline void norm_gradient_row(float* dx, const float* dy, const float* x, const float* w, int64_t dim, float eps) {
    Floats squares = splat(0.f), along = splat(0.f);
    for (int64_t i = 0; i < dim; i += kLanes) {
        const Floats a = load(x + i);
        squares = fma(a, a, squares);
        along = fma(load(dy + i) * load(w + i), a, along);
    }
    const float count = static_cast<float>(dim), scale = 1.f / __builtin_sqrtf(total(squares) / count + eps);
    const Floats s = splat(scale), back = splat(0.f - total(along) / count * scale * scale);
    for (int64_t i = 0; i < dim; i += kLanes)
        store(dx + i, s * fma(load(x + i), back, load(dy + i) * load(w + i)));
}

inline Floats activation_of(Floats x, bool gelu) { return gelu ? gelu_of(x) : silu_of(x); }

inline Floats activation_slope(Floats x, bool gelu) {
    const Floats one = splat(1.f);
    if (!gelu) {  // s + x * s * (1 - s), s = 1 / (1 + exp(-x))
        const Floats s = one / (one + exp_of(splat(0.f) - x));
        return s * fma(x, one - s, one);
    }
    const Floats square = x * x, t = tanh_of(splat(0.79788456080286536f) * fma(splat(0.044715f) * square, x, x));
    const Floats inner = splat(0.79788456080286536f) * fma(splat(3.f * 0.044715f), square, one);
    return splat(0.5f) * fma(x * inner, one - t * t, one + t);
}

struct LossRow {
    double loss;  // -ln softmax(z)[label], z = softcap(factor * logits)
    bool correct;  // no logit is larger, nor is an earlier one as large
};

// logits [padded] become d loss / d logits, zeros beyond the vocabulary; with `gradient` false they become z.
inline LossRow loss_row(float* logits, int64_t label, int64_t vocabulary, int64_t padded, float factor, float softcap,
                        bool gradient) {
    const Floats by = splat(factor), cap = splat(softcap);
    const float nothing = -__builtin_inff();
    Floats most = splat(nothing);
    for (int64_t i = 0; i < padded; i += kLanes) {
        Floats z = load(logits + i) * by;
        if (softcap > 0.f) z = cap * tanh_of(z / cap);
        store(logits + i, z);
        if (i + kLanes <= vocabulary) most = greater(z, most);
    }
    float top = largest(most);
    for (int64_t i = vocabulary / kLanes * kLanes; i < vocabulary; ++i) top = logits[i] > top ? logits[i] : top;
    for (int64_t i = vocabulary; i < padded; ++i) logits[i] = nothing;
    Floats sums = splat(0.f);
    for (int64_t i = 0; i < padded; i += kLanes) sums = sums + exp_of(load(logits + i) - splat(top));
    const float sum = total(sums), said = logits[label];
    bool correct = said == top;
    for (int64_t i = 0; correct && i < label; ++i) correct = logits[i] != top;
    // a NaN among the logits, which a maximum may pass over, is in the sum
    const double loss = sum > 0.f ? log_of(sum) + static_cast<double>(top) - static_cast<double>(said)
                                  : static_cast<double>(sum) * 0. + static_cast<double>(top - top);
    if (!gradient) return {loss, correct};
    const Floats share = splat(1.f / sum), one = splat(1.f);
    const float slope = softcap > 0.f ? factor * (1.f - said / softcap * (said / softcap)) : factor;
    const float at_label = logits[label];
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Floats z = load(logits + i);
        Floats p = exp_of(z - splat(top)) * share * by;
        if (softcap > 0.f) p = p * (one - z / cap * (z / cap));
        store(logits + i, p);
    }
    float own[kLanes];
    store(own, exp_of(splat(at_label - top)) * share);
    logits[label] = (own[0] - 1.f) * slope;
    for (int64_t i = vocabulary; i < padded; ++i) logits[i] = 0.f;
    return {loss, correct};
}

}  // namespace
