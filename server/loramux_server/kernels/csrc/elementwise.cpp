// Operations between a decoder's matrix products, each in one pass: norm, gated activation, sum, rotation.
//
// Rows are computed alone and in a fixed order, so their bits depend neither on the batch nor on the number of threads.

#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "threads.h"
#include "vec.h"

namespace {

constexpr int64_t kParallel = 1 << 13;  // numbers that a piece has at least: less is not worth another thread
constexpr int kLanes = 32;

LORAMUX_CLONES void norm_row(uint16_t* y, const uint16_t* x, const uint16_t* w, int64_t dim, float eps) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[l] += widen(x[i + l]) * widen(x[i + l]);
    float sum = 0.f;
    for (int l = 0; l < kLanes; ++l) sum += lanes[l];
    for (; i < dim; ++i) sum += widen(x[i]) * widen(x[i]);
    const float scale = 1.f / std::sqrt(sum / static_cast<float>(dim) + eps);
    for (i = 0; i < dim; ++i) y[i] = narrow(widen(narrow(widen(x[i]) * scale)) * widen(w[i]));
}

// exp(x) to the last bits of fp32, by powers of two and a polynomial (Cephes, https://www.netlib.org/cephes/).
inline float fast_exp(float x) {
    const bool overflows = x > 88.f;
    x = x < -87.f ? -87.f : overflows ? 88.f : x;
    const float shifter = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float n = (x * 1.44269504088896341f + shifter) - shifter;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return overflows ? HUGE_VALF : p * power;
}

LORAMUX_CLONES void silu_mul_run(uint16_t* y, const uint16_t* gate, const uint16_t* up, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float g = widen(gate[i]);
        y[i] = narrow(widen(narrow(g / (1.f + fast_exp(-g)))) * widen(up[i]));
    }
}

LORAMUX_CLONES void add_run(uint16_t* y, const uint16_t* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] = narrow(widen(y[i]) + widen(x[i]));
}

// One head: the two halves of its dimensions are the coordinates that are rotated.
LORAMUX_CLONES void rotate_head(uint16_t* __restrict low, uint16_t* __restrict high, const uint16_t* cos,
                                const uint16_t* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = widen(low[i]), b = widen(high[i]);
        low[i] = narrow(widen(narrow(a * widen(cos[i]))) + widen(narrow(-b * widen(sin[i]))));
        high[i] = narrow(widen(narrow(b * widen(cos[i + half]))) + widen(narrow(a * widen(sin[i + half]))));
    }
}

// body(row) for rows of so many numbers, several to a piece.
template <class Body>
void for_rows(int64_t rows, int64_t width, int32_t threads, const Body& body) {
    const int64_t together = width < kParallel ? kParallel / width : 1, pieces = (rows + together - 1) / together;
    in_pieces(pieces, threads, [&](int64_t piece) {
        const Share share = share_of(rows, piece, pieces);
        for (int64_t row = share.begin; row < share.end; ++row) body(row);
    });
}

}  // namespace

extern "C" {

// y[t, i] = bf16(w[i] * bf16(x[t, i] / sqrt(mean_i(x[t]^2) + eps))), all bf16 [rows, dim]; sums in fp32.
void loramux_rms_norm(uint16_t* y, const uint16_t* x, const uint16_t* w, int64_t rows, int64_t dim, float eps,
                      int32_t threads) {
    for_rows(rows, dim, threads, [=](int64_t t) { norm_row(y + t * dim, x + t * dim, w, dim, eps); });
}

// y[i] = bf16(bf16(silu(gate[i])) * up[i]), all bf16 [rows, dim].
void loramux_silu_mul(uint16_t* y, const uint16_t* gate, const uint16_t* up, int64_t rows, int64_t dim,
                      int32_t threads) {
    for_rows(rows, dim, threads, [=](int64_t t) { silu_mul_run(y + t * dim, gate + t * dim, up + t * dim, dim); });
}

// y[i] = bf16(y[i] + x[i]).
void loramux_add(uint16_t* y, const uint16_t* x, int64_t count, int32_t threads) {
    constexpr int64_t kRun = 1 << 10;
    for_rows((count + kRun - 1) / kRun, kRun, threads, [=](int64_t run) {
        const int64_t i = run * kRun;
        add_run(y + i, x + i, count - i < kRun ? count - i : kRun);
    });
}

// Rotary position embedding (https://arxiv.org/abs/2104.09864), in place: x [rows, heads, dim], cos and sin
// [positions, dim], all bf16: x = bf16(bf16(x * cos) + bf16(r * sin)), where r is x with its second half, negated, before
// its first.
void loramux_rotate(uint16_t* x, const uint16_t* cos, const uint16_t* sin, const int32_t* position, int64_t rows,
                    int64_t heads, int64_t dim, int32_t threads) {
    for_rows(rows, heads * dim, threads, [=](int64_t t) {
        for (uint16_t* head = x + t * heads * dim; head < x + (t + 1) * heads * dim; head += dim)
            rotate_head(head, head + dim / 2, cos + position[t] * dim, sin + position[t] * dim, dim / 2);
    });
}

}  // extern "C"
