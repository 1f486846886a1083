// The selective step's loops over a block on the CPU: its extremes, b/p of its elements, the
// optimizer's update rule. Nothing of torch is here: bench/cpu_arithmetic.cpp times them alone.
#pragma once

#include "../core/loops_cpu.h"
#include "selective.h"

namespace uegr {

// Least and largest |x| over finite elements, as bits: those of non-negative floats order as the
// floats do.
template <class T> struct Extremes {
    using Bits = typename Float<T>::Bits;
    Bits least = ~Bits(0), most = 0;
    bool all_finite = true;

    void add(const T* x, int64_t n) {
        Extremes found = of<false>(x, n);
        if (found.most >= Float<T>::infinity) found = of<true>(x, n), found.all_finite = false;
        add(found);
    }
    void add(const Extremes& other) {
        least = minimum(least, other.least), most = maximum(most, other.most);
        all_finite &= other.all_finite;
    }
    Range range(bool given) const { return range_of<T>(least, most, given); }

private:
    // four vectors of each, in registers
    static constexpr int lanes = 256 / sizeof(T);

    // `some`: leaves out what is not finite.
    template <bool some> static Extremes of(const T* x, int64_t n) {
        Bits low[lanes], high[lanes];
        for (int k = 0; k < lanes; ++k) low[k] = ~Bits(0), high[k] = 0;
        int64_t i = 0;
        for (; i + lanes <= n; i += lanes) {
            for (int k = 0; k < lanes; ++k) widen<some>(x + i + k, low[k], high[k]);
        }
        for (int k = 0; i + k < n; ++k) widen<some>(x + i + k, low[k], high[k]);
        Extremes found;
        for (int k = 0; k < lanes; ++k) {
            found.least = low[k] < found.least ? low[k] : found.least;
            found.most = high[k] > found.most ? high[k] : found.most;
        }
        return found;
    }
    // Read as an integer at once, and masked: GCC 12 vectorises neither a cast from the float nor a
    // conditional maximum.
    template <bool some> static void widen(const T* x, Bits& least, Bits& most) {
        Bits bits;
        memcpy(&bits, x, sizeof(bits));
        bits &= ~Bits(0) >> 1;
        const Bits counted = some ? bits & (Bits(0) - Bits(bits < Float<T>::infinity)) : bits;
        least = bits < least ? bits : least;
        most = counted > most ? counted : most;
    }
};

// b/p of n elements; `inverse(i)` is element i's 1/p. `finite`: every g is.
template <bool rescale, bool finite = false, class T, class Inverse>
void factor_block(int n, const T* __restrict g, const uint32_t* __restrict words,
                  T* __restrict factor, Inverse inverse) {
    slices(n, [=](int i) {
        factor[i] = finite ? drawn_factor<rescale>(inverse(i), words[i])
                           : drawn_factor<rescale>(g[i], inverse(i), words[i]);
    });
}

template <class T, bool update, bool amsgrad>
void update_block(const AdamW<T>& given, int n, T* __restrict theta, const T* __restrict g,
                  const T* __restrict factor, T* __restrict m, T* __restrict v,
                  T* __restrict v_max) {
    // a copy no store can touch
    const AdamW<T> update_rule = given;
    slices(n, [=](int i) {
        // all loads ahead of the first store, which might have changed them
        T x = theta[i], first = m[i], second = v[i], largest = amsgrad ? v_max[i] : T(0);
        update_rule.template step<update, amsgrad>(x, g[i], factor[i], first, second, largest);
        theta[i] = x, m[i] = first, v[i] = second;
        if (amsgrad) v_max[i] = largest;
    });
}

template <class T, bool update, bool has_momentum>
void update_block(const SGD<T>& given, int n, T* __restrict theta, const T* __restrict g,
                  const T* __restrict factor, T* __restrict buffer, T*, T*) {
    const SGD<T> update_rule = given;
    slices(n, [=](int i) {
        T x = theta[i], moment = has_momentum ? buffer[i] : T(0);
        update_rule.template step<update, has_momentum>(x, g[i], factor[i], moment);
        theta[i] = x;
        if (has_momentum) buffer[i] = moment;
    });
}

} // namespace uegr
