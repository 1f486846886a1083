// Perturbations, element by element: Eq. 2, PGD's step and ball, DropAttack's mask. Norms and sums
// are double, so that none of float32 elements overflows or vanishes.
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/math.h"
#include "../core/philox.h"

namespace uegr {

// The numbers Python's names travel as (uegr_kernels/perturbation/op.py).
enum class Norm : int64_t { l2, linf };
enum class Per : int64_t { sample, token, all };

HOST_DEVICE double square(double x) { return x * x; }

// Returns what a group's g (or sign(g)) is multiplied by, from its sum of squares: eps/||g||, or
// eps; 0 where the norm is 0 or not finite.
HOST_DEVICE double direction_factor(double squares, double epsilon, Norm norm) {
    const double length = std::sqrt(squares);
    if (!(length > 0 && length <= Float<double>::largest)) return 0;
    return norm == Norm::l2 ? epsilon / length : epsilon;
}

// Returns what a group is multiplied by to lie in the ball: radius/||delta||, or 1.
HOST_DEVICE double ball_factor(double squares, double radius) {
    const double length = std::sqrt(squares);
    return length > radius ? radius / length : 1;
}

template <class T> HOST_DEVICE T sign(T x) { return static_cast<T>(x > 0) - static_cast<T>(x < 0); }

// Returns whether a step may be taken in float: its factor is far from a float's limits.
HOST_DEVICE bool fits_float(double factor) {
    return factor == 0 || (factor > 0x1p-100 && factor < 0x1p100);
}

// eps * g/||g||, or eps * sign(g). A factor of 0 stops whatever g is.
template <Norm norm, class T> HOST_DEVICE T step_along(T g, T factor) {
    const T step = (norm == Norm::l2 ? g : sign(g)) * factor;
    return factor > 0 ? step : T(0);
}

// b * step, with b = u < keep_probability by its limit.
template <class T> HOST_DEVICE T kept(T step, uint32_t word, int32_t limit) {
    return uniform_below(word, limit) ? step : T(0);
}

// The nearest point of the ball: by the group's factor, or every element by the radius; NaN stays.
template <Norm norm, class T> HOST_DEVICE T projected(T x, T factor, T radius) {
    return norm == Norm::l2 ? x * factor : x > radius ? radius : x < -radius ? -radius : x;
}

} // namespace uegr
