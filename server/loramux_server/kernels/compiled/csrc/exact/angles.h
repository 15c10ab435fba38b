// Cosines and sines of rotary positions, in double precision with sums and products alone: the C library's own differ from
// machine to machine. Reduction and polynomials are fdlibm's (https://www.netlib.org/fdlibm/: e_rem_pio2.c, k_sin.c,
// k_cos.c), without the branches that only its last bits need.

#pragma once

#include <cstdint>

namespace {

struct Angle {
    double cos, sin;
};

// |x| < 2^20 * pi / 2: then the number of quarter turns has at most 20 bits, and its product with the first 33 bits of
// pi / 2, and with the next 33, is exact.
inline Angle angle_of(double x) {
    constexpr double kQuarters = 6.36619772367581382433e-01;  // 2 / pi
    constexpr double kFirst = 1.57079632673412561417e+00, kNext = 6.07710050630396597660e-11,
                     kRest = 2.02226624879595063154e-21;
    constexpr double kToWhole = 6755399441055744.0;  // 1.5 * 2^52: what is added to it loses its fraction
    const double turns = (x * kQuarters + kToWhole) - kToWhole;
    const double part = x - turns * kFirst, next = turns * kNext, r = part - next;
    const double y = r - (turns * kRest - ((part - r) - next)), z = y * y;
    const double sin = y + z * y * (-1.66666666666666324348e-01 +
                       z * (8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 +
                       z * (2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 +
                       z * 1.58969099521155010221e-10)))));
    const double cos = 1.0 - (0.5 * z - z * z * (4.16666666666666019037e-02 +
                       z * (-1.38888888888741095749e-03 + z * (2.48015872894767294178e-05 +
                       z * (-2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 +
                       z * -1.13596475577881948265e-11))))));
    switch (static_cast<int64_t>(turns) & 3) {
        case 0: return {cos, sin};
        case 1: return {-sin, cos};
        case 2: return {-cos, -sin};
        default: return {sin, -cos};
    }
}

// cos and sin [count, pairs] of positions from `first` on, times `factor`.
inline void angles(float* cos, float* sin, const float* inv_freq, int64_t first, int64_t count, int64_t pairs,
                   double factor) {
    for (int64_t p = 0; p < count; ++p)
        for (int64_t i = 0; i < pairs; ++i) {
            const Angle angle = angle_of(static_cast<double>(first + p) * static_cast<double>(inv_freq[i]));
            cos[p * pairs + i] = static_cast<float>(angle.cos * factor);
            sin[p * pairs + i] = static_cast<float>(angle.sin * factor);
        }
}

}  // namespace
