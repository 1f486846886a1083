// Adaptive dropout, element by element and unit by unit (a unit: an index of the last axis).
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/math.h"
#include "../core/philox.h"

namespace uegr {

// Gives what kept elements of a unit are multiplied by: 1/(1 - r), the difference taken in the
// rate's own type.
template <class T, class Rate> HOST_DEVICE T keep_scale(Rate r) {
    return 1 / static_cast<T>(1 - r);
}

// h/(1 - r) where kept, 0 where u < r by its limit, whatever h is.
template <class T> HOST_DEVICE T dropped(T h, uint32_t word, int32_t limit, T scale) {
    return uniform_below(word, limit) ? T(0) : h * scale;
}

template <class T> HOST_DEVICE double with_square(double sum, T g) {
    return sum + static_cast<double>(g) * static_cast<double>(g);
}

// n after new squares of norms: momentum * n + (1 - momentum) * root; the first one sets n.
template <class T> HOST_DEVICE T moved_norm(T n, T squares, double momentum, bool first) {
    const T root = std::sqrt(squares);
    return first ? root : static_cast<T>(momentum) * n + static_cast<T>(1 - momentum) * root;
}

// r = clamp(p * n / mean(n), 0, max_p); NaN stays.
template <class T> HOST_DEVICE T dropout_rate(T n, T mean, double p, double max_p) {
    const T r = static_cast<T>(p) * n / mean, most = static_cast<T>(max_p);
    return r < 0 ? T(0) : r > most ? most : r;
}

} // namespace uegr
