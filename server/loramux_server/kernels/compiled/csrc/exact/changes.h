// Rows of logits as tokens are chosen from them: penalties and biases applied, what is forbidden made impossible.
//
// A row is read alone and copied. Every operation is one of IEEE 754 on fp32, so all instruction sets give the same bits.
// What may be chosen stays finite, however large a bias; what may not is minus infinity, and so is what the model itself
// gives minus infinity.

#pragma once

#include <cfloat>

#include "sample.h"

namespace {

constexpr int64_t kWord = 32;  // tokens of a word of bits

inline void copy_allowed(float* y, const float* x, const uint32_t* allowed, int64_t count) {
    for (int64_t begin = 0; begin < count; begin += kWord, ++allowed, y += kWord, x += kWord) {
        const uint32_t bits = *allowed;
        const int64_t end = count - begin < kWord ? count - begin : kWord;
        if (end == kWord && bits == 0u)
            for (int64_t k = 0; k < kWord; ++k) y[k] = kNothing;
        else if (end == kWord && bits == 0xffffffffu)
            std::memcpy(y, x, kWord * sizeof(float));
        else
            for (int64_t k = 0; k < end; ++k) y[k] = (bits >> k & 1u) != 0 ? x[k] : kNothing;
    }
}

inline float edited(float logit, const LogitEdit& edit, float repetition) {
    float value = logit + edit.add;
    if (edit.repeated != 0) value = value > 0.f ? value / repetition : value * repetition;
    value = value - edit.less;
    value = value > -FLT_MAX ? value : -FLT_MAX;  // what is no number is the least one
    return value < FLT_MAX ? value : FLT_MAX;
}

inline void change_row(float* y, const float* x, int64_t count, const LogitChange& how) {
    if (how.allowed)
        copy_allowed(y, x, how.allowed, count);
    else
        std::memcpy(y, x, static_cast<size_t>(count) * sizeof(float));
    const float repetition = static_cast<float>(how.repetition);
    for (int64_t i = 0; i < how.num_edits; ++i) {
        const LogitEdit& edit = how.edits[i];
        if (y[edit.token] != kNothing) y[edit.token] = edited(x[edit.token], edit, repetition);
    }
    for (int64_t i = 0; i < how.num_forbidden; ++i) y[how.forbidden[i]] = kNothing;
}

void exact_change(float* y, int64_t y_row, const float* x, const LogitChange* changes, int64_t num_changes, int64_t count,
                  int64_t stride, int32_t threads) {
    in_pieces(num_changes, threads,
              [&](int64_t t) { change_row(y + t * y_row, x + changes[t].row * stride, count, changes[t]); });
}

}  // namespace
