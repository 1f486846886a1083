// The selective step, element by element: Eq. 7-9 and the AdamW and SGD lines of Algorithm 1
// (docs/spec.md).
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/math.h"
#include "../core/philox.h"
#include "../core/view.h"

namespace uegr {

// The numbers Python's names travel as (NORMALIZATIONS in uegr_kernels/selective/options.py).
enum class Normalization : int64_t { minmax, range, rank, constant };

// the upper 16 bits of a finite |g|
constexpr int rank_bins = 0x7F80;
// a rank over more elements than this takes every k-th
constexpr int64_t rank_sampled = 1 << 20;

// The selection options as the operators take them; scope and statistics are settled outside.
struct SelectionOptions {
    double threshold, sharpness;
    Normalization normalization;
    bool salient, previous, rescale;
    double min_probability, keep_probability;
    bool target_update;

    HOST_DEVICE bool linear() const {
        return normalization == Normalization::minmax || normalization == Normalization::range;
    }
    HOST_DEVICE bool ranks() const { return normalization == Normalization::rank; }
};

// Returns k, where a rank over so many elements takes every k-th.
HOST_DEVICE int64_t rank_stride(int64_t size) { return size > rank_sampled ? (size >> 20) | 1 : 1; }

// |g| converted to float32 toward zero, by its upper 16 bits: those of a positive float order as it
// does.
HOST_DEVICE int rank_bin(float magnitude) {
    return static_cast<int>(bit_cast<uint32_t>(magnitude) >> 16);
}
HOST_DEVICE int rank_bin(double magnitude) {
    float rounded = static_cast<float>(magnitude);
    uint32_t bits = bit_cast<uint32_t>(rounded) - (rounded > magnitude ? 1 : 0);
    return static_cast<int>(bits >> 16);
}

// s = g*g (Eq. 7); one that overflows counts as the largest float.
template <class T> HOST_DEVICE T square(T g) { return g * g; }
// |g| of a given saliency; of -0, 0
template <class T> HOST_DEVICE T root(T s) { return absolute(std::sqrt(s)); }
template <class T> HOST_DEVICE bool finite(T g) { return absolute(g) <= Float<T>::largest; }

// Minimum and maximum of s over a scope; infinity and its negative where nothing is finite.
struct Range {
    double low, high;
};
// From the bits of the least and the largest finite |g|, or of a given s: those of non-negative
// floats order as the floats do.
template <class T>
HOST_DEVICE Range range_of(typename Float<T>::Bits low, typename Float<T>::Bits high, bool given) {
    constexpr T largest = Float<T>::largest;
    if (low >= Float<T>::infinity) return {HUGE_VAL, -HUGE_VAL};
    const T least = bit_cast<T>(low), most = bit_cast<T>(high);
    return given ? Range{least, most}
                 : Range{minimum(square(least), largest), minimum(square(most), largest)};
}

constexpr double log2_e = 1.4426950408889634;

// Eq. 8 and 9 with everything that is the same for all elements of a scope worked out, in powers of
// two: z = d * 2*sharpness*log2(e) * (s~ - threshold) = (s - low) * up * scale + offset, held in
// [z_low, z_high]. z is monotone in s, so its values at the scope's ends bound it: an s that
// overflowed, or a NaN's, ends there too.
template <class T> struct Probability {
    T low, up, scale, offset, z_low, z_high, largest_inverse;

    Probability() = default;

    // `s_min` > `s_max` says that nothing is finite.
    CALLED_ON_BOTH Probability(const SelectionOptions& o, double s_min, double s_max) {
        constexpr double largest = static_cast<double>(Float<T>::largest);
        // A span below this has no reciprocal: s is scaled up by a power of two first.
        constexpr double tiny = sizeof(T) == 8 ? 0x1p-900 : 0x1p-100;
        const double steepness = (o.salient ? -2.0 : 2.0) * o.sharpness * log2_e;
        const T least = static_cast<T>(minimum(s_min, largest)),
                most = static_cast<T>(minimum(s_max, largest));
        const T span = most - least;
        low = o.normalization == Normalization::minmax ? least : T(0);
        up = span < tiny ? static_cast<T>(1 / tiny) : T(1);
        scale = span > 0 ? held(steepness / (static_cast<double>(span) * up)) : T(0);
        offset = held(-steepness * o.threshold);
        // s~ at the ends: [0, 1] but for "range", which starts at s_min/span and is held in [0, 1]
        // with last step's statistics alone.
        const bool reaches = o.normalization == Normalization::range && !o.previous && span > 0;
        const double first =
            steepness * ((reaches ? static_cast<double>(least) / span : 0) - o.threshold);
        const double last = steepness * ((reaches    ? static_cast<double>(most) / span
                                          : span > 0 ? 1
                                                     : 0) -
                                         o.threshold);
        z_low = static_cast<T>(maximum(-100.0, minimum(100.0, minimum(first, last))));
        z_high = static_cast<T>(maximum(-100.0, minimum(100.0, maximum(first, last))));
        largest_inverse = static_cast<T>(1 / maximum(o.min_probability, 0x1p-24));
        // as `exponent` rounds there, so that it is held nowhere between
        if (span > 0) {
            const T at_first = exponent(reaches ? least : low),
                    at_last = exponent(low == least || reaches ? most : span);
            z_low = maximum(T(-100), minimum(z_low, minimum(at_first, at_last)));
            z_high = minimum(T(100), maximum(z_high, maximum(at_first, at_last)));
        }
    }

    // Finite, since 0 * inf is NaN.
    static CALLED_ON_BOTH T held(double x) {
        return static_cast<T>(minimum(maximum(x, -static_cast<double>(Float<T>::largest)),
                                      static_cast<double>(Float<T>::largest)));
    }

    // z, not held.
    HOST_DEVICE T exponent(T s) const { return (s - low) * up * scale + offset; }

    // 1/p = min(1 + exp(z), largest): no division.
    HOST_DEVICE T inverse(T s) const {
        return at_most(T(1) + power_of_two(at_least(at_most(exponent(s), z_high), z_low)),
                       largest_inverse);
    }

    // Returns whether nothing is held or scaled up on the way to 1/p of any s in [s_min, s_max];
    // then `plain_inverse` is `inverse` to the bit.
    CALLED_ON_BOTH bool plain(T s_min, T s_max) const {
        const T first = exponent(s_min), last = exponent(s_max);
        return s_max < Float<T>::largest && up == 1 && minimum(first, last) >= z_low &&
               maximum(first, last) <= z_high &&
               T(1.001) * (T(1) + power_of_two(z_high)) < largest_inverse;
    }
    HOST_DEVICE T plain_inverse(T s) const {
        return T(1) + power_of_two((s - low) * scale + offset);
    }
};

// 1/p of a rank in [0, 1], and of normalization "constant".
template <class T>
HOST_DEVICE T inverse_of_rank(T rank, T steepness, T threshold, T largest_inverse) {
    T z = steepness * (rank - threshold);
    return minimum(T(1) + power_of_two(maximum(minimum(z, T(100)), T(-100))), largest_inverse);
}
HOST_DEVICE double inverse_of_constant(const SelectionOptions& o) {
    return minimum(1 / o.keep_probability, 1 / maximum(o.min_probability, 0x1p-24));
}

// Returns whether anything is drawn: elsewhere every element is selected and its factor is 1.
HOST_DEVICE bool is_random(const SelectionOptions& o) {
    return o.normalization != Normalization::constant || inverse_of_constant(o) != 1;
}

// 1/p of ranks, with what is the same for all of them worked out.
struct RankCurve {
    float steepness, threshold, largest_inverse;

    CALLED_ON_BOTH explicit RankCurve(const SelectionOptions& o)
        : steepness(static_cast<float>((o.salient ? -2.0 : 2.0) * o.sharpness * log2_e)),
          threshold(static_cast<float>(o.threshold)),
          largest_inverse(static_cast<float>(1 / maximum(o.min_probability, 0x1p-24))) {}
    HOST_DEVICE float inverse(float rank) const {
        return inverse_of_rank(rank, steepness, threshold, largest_inverse);
    }
};

// Returns what an element is multiplied by: 1/p (or 1, without rescale) where u < p, that is u *
// 1/p < 1, without a division; else 0. A g that is not finite has p = 1.
template <bool rescale, class T> HOST_DEVICE T drawn_factor(T inverse, uint32_t word) {
    return uniform_times_unit<T>(word) * inverse < uniform_unit ? (rescale ? inverse : T(1)) : T(0);
}
template <bool rescale, class T> HOST_DEVICE T drawn_factor(T g, T inverse, uint32_t word) {
    const T drawn = drawn_factor<rescale>(inverse, word);
    return finite(g) ? drawn : T(1);
}

// theta on its way to `stepped`: factor b/p of it, and not at all where b is 0, whatever `stepped`
// is; between equal infinities there is no way to go.
template <class T> HOST_DEVICE T moved(T theta, T stepped, T factor) {
    const bool stays = (factor == 0) | (stepped == theta);
    return stays ? theta : theta + factor * (stepped - theta);
}

// AdamW's update rule with one tensor's constants, computed once and read by every element.
template <class T> struct AdamW {
    T beta1, beta2, complement1, complement2, decay, step_size, inverse_root, eps;

    AdamW() = default;
    CALLED_ON_BOTH AdamW(double lr, double beta1_, double beta2_, double weight_decay, double eps_,
                         double step)
        : beta1(beta1_), beta2(beta2_), complement1(1 - beta1_), complement2(1 - beta2_),
          decay(1 - lr * weight_decay), step_size(lr / (1 - std::pow(beta1_, step))),
          inverse_root(1 / std::sqrt(1 - std::pow(beta2_, step))), eps(eps_) {}

    // factor: b/p. target "gradient": g~ = b*g/p feeds the moments; "update": g does, and b/p
    // multiplies the step. v and theta are rounded where torch.optim.AdamW rounds them: over many
    // steps it shows. Adding 0 rounds a product that the compiler would fuse with the next
    // addition.
    template <bool update, bool amsgrad>
    HOST_DEVICE void step(T& theta, T g, T factor, T& m, T& v, T& v_max) const {
        const T fed = update ? g : g * factor;
        m = m + complement1 * (fed - m);
        v = (v * beta2 + T(0)) + complement2 * fed * fed;
        if (amsgrad) v_max = maximum(v, v_max);
        const T denominator = near_root(amsgrad ? v_max : v) * inverse_root + eps;
        const T stepped = theta * decay + T(0) - quotient(step_size * m, denominator);
        theta = update ? moved(theta, stepped, factor) : stepped;
    }
};

// SGD's update rule, likewise.
template <class T> struct SGD {
    T lr, momentum, complement, weight_decay;
    bool nesterov;

    SGD() = default;
    CALLED_ON_BOTH SGD(double lr_, double momentum_, double dampening, double weight_decay_,
                       bool nesterov_)
        : lr(lr_), momentum(momentum_), complement(1 - dampening), weight_decay(weight_decay_),
          nesterov(nesterov_) {}

    // A buffer starts as -0.0, which no update leaves behind (+ 0): its first value is the gradient
    // itself, without dampening.
    template <bool update, bool has_momentum>
    HOST_DEVICE void step(T& theta, T g, T factor, T& buffer) const {
        T fed = update ? g : g * factor;
        using Bits = typename Float<T>::Bits;
        // 0 times an infinite theta would be NaN
        const Bits decaying = weight_decay == 0 ? Bits(0) : ~Bits(0);
        fed = fed + weight_decay * bit_cast<T>(bit_cast<Bits>(theta) & decaying);
        if (has_momentum) {
            const bool fresh = bit_cast<Bits>(buffer) == Bits(1) << (8 * sizeof(T) - 1);
            buffer = (fresh ? fed : buffer * momentum + complement * fed) + T(0);
            fed = nesterov ? fed + momentum * buffer : buffer;
        }
        if (update) fed = factor == 0 ? T(0) : fed;
        theta = theta - (update ? factor * lr : lr) * fed;
    }
};

// An optimizer's options, some of which may lie on a GPU, and the update rule of a tensor that has
// taken `step` steps.
struct AdamWOptions {
    Number lr, beta1, beta2;
    double weight_decay, eps;

    template <class T> HOST_DEVICE AdamW<T> at(double step) const {
        return {lr.get(), beta1.get(), beta2.get(), weight_decay, eps, step};
    }
};
struct SGDOptions {
    Number lr;
    double momentum, dampening, weight_decay;
    bool nesterov;

    template <class T> HOST_DEVICE SGD<T> at(double) const {
        return {lr.get(), momentum, dampening, weight_decay, nesterov};
    }
};

// The selection options as an operator's last arguments, in the order of OPTIONS in
// uegr_kernels/selective/op.py, and the struct they make, SelectionOptions above: by it they go on.
// The stable ABI hands a function each of a schema's arguments by itself, so no struct stands here.
#define SELECTION_ARGUMENTS                                                                        \
    double threshold, double sharpness, int64_t normalization, bool salient, bool previous,        \
        bool rescale, double min_probability, double keep_probability, bool target_update
#define SELECTION_OPTIONS                                                                          \
    SelectionOptions {                                                                             \
        threshold, sharpness, static_cast<Normalization>(normalization), salient, previous,        \
            rescale, min_probability, keep_probability, target_update                              \
    }

} // namespace uegr
