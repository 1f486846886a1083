// The losses of the forward stage, row by row: cross entropy and Jensen-Shannon divergence (Eq.
// 3-6) with their gradients.
//
// A row of logits x is held as e = exp(x - max) and the sum of e: p = e/sum, log p = (x - max) -
// log(sum). T is float, double, or a vector of them.
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/math.h"

namespace uegr {

// The number Python's name travels as (uegr_kernels/divergence/op.py).
enum class Reduction : int64_t { mean, sum, none };

struct LossOptions {
    double js_weight, label_smoothing;
    int64_t ignore_index;
    Reduction reduction;
    bool regression;
};

// `far_below` a row's maximum p is 0 while differences stay finite. From `far_out` on a row is
// moved by its maximum first, as that distance would be lost in it.
constexpr double far_below = 1e3, far_out = 1e6;

constexpr double ln2 = 0.6931471805599453;

// Adds log(p_k/M) and log(p_l/M), M = (p_k + p_l)/2, for d = log p_k - log p_l and u = (1 - r)/2, r
// = exp(-|d|). The more probable side has a = ln 2 - log(1 + r) = -log(1 - u), the other a - |d|:
// no cancellation, and exactly 0 for d = 0.
template <class T> HOST_DEVICE void add_log_ratios(T d, T u, T& of_k, T& of_l) {
    const T a = minus_log_of_complement(u);
    of_k = of_k + (a + minimum(d, T{}));
    of_l = of_l + (a - maximum(d, T{}));
}

// For H = log2(p_k/p_l) by an approximate instruction, g = 2 log2 cosh(H ln(2)/2) within 3e-6: the
// log ratios are H - g and -H - g in halves of a power of two. Where |H ln 2| < 1 it is a series in
// H*H that needs no power, exactly 0 for 0; elsewhere |H| - 2 + 2 log2(1 + r), r = 2^-|H|, whose
// logarithm is small beside 2 or no longer near it. Minimax.
HOST_DEVICE float near_curvature(float H) {
    const float square = H * H, r = near_power_of_two(-absolute(H));
    float cosh = square * -3.46526314e-06f + 0.000110379404f;
    cosh = cosh * square - 0.00346870729f;
    cosh = cosh * square + 0.173286776f;
    cosh = cosh * square;
    float log = r * 0.255697435f - 0.611733086f;
    log = log * r + 0.943036868f;
    log = log * r - 1.44122668f;
    log = log * r + 2.88535159f;
    const float apart = absolute(H) + (r * log - 2.0f);
    return absolute(H) < 1.44269504f ? cosh : apart;
}
// what its units are in nats
constexpr double curvature_unit = ln2 / 2;

// A row's sums, in double.
struct RowSums {
    // of x, of e
    double max = 0, sum = 0;
    // sum over the other passes of the log ratio at the most probable class, or 0
    double pivot = 0;
    // of e * (the other passes' log ratios - pivot)
    double kl = 0;
    // of t * (x - max) over the labels' t > 0
    double label = 0;
    double log_sum = 0, inverse = 0;

    HOST_DEVICE void settle() { log_sum = std::log(sum), inverse = 1 / sum; }

    // -sum t log p, the t adding up to `mass`.
    HOST_DEVICE double cross_entropy(double mass) const { return mass * log_sum - label; }
    // Returns whether one class holds much of p: then its log ratio is nearly the divergence, and
    // only their difference is exact enough.
    HOST_DEVICE bool dominated() const { return sum < 4; }
    // Sum over l of KL(P || M_l), less the pivot.
    HOST_DEVICE double from_pivot() const { return kl * inverse; }
    HOST_DEVICE double divergence() const { return pivot + from_pivot(); }
};

// log p_k - log p_l = (x_k - from_k) - (x_l - from_l) - gap. Logits are counted from their rows'
// maxima where those lie apart, as the difference of two rows would lose more to rounding; not
// where they are close: there it is exact.
struct PairDistance {
    double from_k = 0, from_l = 0, gap;

    HOST_DEVICE PairDistance(const RowSums& k, const RowSums& l) {
        const double apart = k.max - l.max;
        gap = k.log_sum - l.log_sum;
        if (apart > 1 || apart < -1) from_k = k.max, from_l = l.max;
        else gap += apart;
    }
};

// e of a row's logits by the approximate instruction: 2^(x log2 e - base), one rounding for both. A
// rounded base is another `max`, which the row's sums count from; rows far out are `moved` first.
struct NearRow {
    static constexpr float log2_e = 1.44269504f;
    float moved = 0, base = 0;

    NearRow() = default;
    HOST_DEVICE explicit NearRow(float most)
        : moved(absolute(most) <= static_cast<float>(far_out) ? 0.0f : most),
          base((most - moved) * log2_e) {}
    // a NaN is not
    HOST_DEVICE bool is_plain() const { return moved == 0; }
    HOST_DEVICE double max() const {
        return static_cast<double>(base) / static_cast<double>(log2_e);
    }
    template <bool plain> HOST_DEVICE float e(float x) const {
        return near_power_of_two(fmaf(plain ? x : x - moved, log2_e, -base));
    }
};

// Two rows' log ratios from their logits as they are, found anew each time they are needed.
struct PairOfRows {
    float far_k, far_l, from_k, from_l, gap, pivot_k = 0, pivot_l = 0;

    HOST_DEVICE PairOfRows(const RowSums& k, const RowSums& l, double moved_k, double moved_l) {
        const PairDistance between(k, l);
        far_k = static_cast<float>(k.max + moved_k - far_below),
        far_l = static_cast<float>(l.max + moved_l - far_below);
        from_k = static_cast<float>(between.from_k + moved_k),
        from_l = static_cast<float>(between.from_l + moved_l);
        gap = static_cast<float>(between.gap * static_cast<double>(NearRow::log2_e));
    }
    // Most pairs' logits are compared as they are, and no class holds much of p.
    HOST_DEVICE bool is_plain() const {
        return from_k == 0 && from_l == 0 && pivot_k == 0 && pivot_l == 0;
    }
    // The log ratios less the pivots, in units of near_curvature. Plain ones are NaN where both
    // logits are -inf.
    template <bool plain>
    HOST_DEVICE void find_ratios(float x_k, float x_l, float& of_k, float& of_l) const {
        if (!plain) x_k = at_least(x_k, far_k) - from_k, x_l = at_least(x_l, far_l) - from_l;
        const float H = (x_k - x_l) * NearRow::log2_e - gap, g = near_curvature(H);
        of_k = H - g, of_l = -g - H;
        if (!plain) of_k -= pivot_k, of_l -= pivot_l;
    }
};

// JS summed over pairs from the sums of the divergences to the pairs' means; a pair's is in [0, ln
// 2], NaN stays.
HOST_DEVICE double pairs_divergence(double divergences, int64_t m) {
    const double most = static_cast<double>(m) * static_cast<double>(m - 1) / 2 * ln2;
    return minimum(most, maximum(0.0, divergences / 2));
}

// The gradient by a logit, e * of_e + w * of_w - t * of_t - floor, w = e * (sum of its log ratios -
// pivot): label_weight times that of the cross entropy, p * mass - t, plus js_weight times that of
// the divergence, p (log ratios - KL)/2. With a class index t is 0 but for one element, and
// smoothing adds `floor` to all.
template <class T> struct GradientFactors {
    T of_e, of_w, of_t, floor;

    GradientFactors() = default;
    HOST_DEVICE GradientFactors(const RowSums& row, double label_weight, double mass,
                                double smoothed, double js_weight)
        : of_e(static_cast<T>(row.inverse *
                              (label_weight * mass - js_weight / 2 * row.from_pivot()))),
          of_w(static_cast<T>(row.inverse * js_weight / 2)), of_t(static_cast<T>(label_weight)),
          floor(static_cast<T>(label_weight * smoothed)) {}

    template <class V> HOST_DEVICE V gradient(V e) const { return e * of_e - floor; }
    template <class V> HOST_DEVICE V gradient(V e, V w) const {
        return e * of_e + (w * of_w - floor);
    }
    // Of an e with its log ratios themselves.
    template <class V> HOST_DEVICE V gradient_of(V e, V ratio) const {
        return e * (ratio * of_w + of_e) - floor;
    }
    template <class V> HOST_DEVICE V labelled(V gradient, V t) const { return gradient - t * of_t; }
};

// t * (x - max) of a class; one with t = 0 adds nothing, not even where x = -inf.
template <class V> HOST_DEVICE V label_term(V t, V y) {
    return t == typename Float<V>::Element(0) ? V{} : t * y;
}

// Regression: (x - y)^2 in the place of both, and its derivative by x.
template <class V> HOST_DEVICE V squared(V x, V y) { return (x - y) * (x - y); }
template <class V> HOST_DEVICE V squared_slope(V x, V y) { return (x - y) + (x - y); }

} // namespace uegr
