// Elementary functions and 16-bit conversions as plain arithmetic, so that loops over them
// vectorise.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "platform.h"

namespace uegr {

template <class To, class From> HOST_DEVICE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// The type of one element (loops_cpu.h has vectors of them), the unsigned integer of its width, its
// largest finite value, the bits of infinity.
template <class T> struct Float;
template <> struct Float<float> {
    using Element = float;
    using Bits = uint32_t;
    static constexpr float largest = 3.402823466e38f;
    static constexpr Bits infinity = 0x7f800000u;
};
template <> struct Float<double> {
    using Element = double;
    using Bits = uint64_t;
    static constexpr double largest = 1.7976931348623157e308;
    static constexpr Bits infinity = 0x7ff0000000000000u;
};

template <class T> HOST_DEVICE T absolute(T x) {
    using Bits = typename Float<T>::Bits;
    return bit_cast<T>(bit_cast<Bits>(x) & (~Bits{} >> 1));
}

template <class T> HOST_DEVICE T minus_absolute(T x) {
    using Bits = typename Float<T>::Bits;
    return bit_cast<T>(bit_cast<Bits>(x) | ~(~Bits{} >> 1));
}

// A device's instructions take a sign as they go, where they see that it is one.
HOST_DEVICE float absolute(float x) { return std::fabs(x); }
HOST_DEVICE float minus_absolute(float x) { return -std::fabs(x); }

// The second where the first is NaN: minps and maxps in one instruction.
template <class T> HOST_DEVICE T minimum(T a, T b) { return a < b ? a : b; }
template <class T> HOST_DEVICE T maximum(T a, T b) { return a > b ? a : b; }

// 2^x for |x| < 126: x = k + r, |r| <= 1/2, minimax of degree 5 in r, under 2.5 ulp. Adding 1.5 *
// 2^23 rounds to an integer.
HOST_DEVICE float power_of_two(float x) {
    if (float power = 0; try_exp2(x, power)) return power;
    float shifted = x + 12582912.0f;
    float r = x - (shifted - 12582912.0f);
    float p = 0.0013264724f;
    p = p * r + 0.009671513f;
    p = p * r + 0.055507336f;
    p = p * r + 0.24022242f;
    p = p * r + 0.693147f;
    p = p * r + 1.0f;
    return bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23));
}

// 2^x for |x| < 1022, Taylor of degree 13, under 2 ulp. Adding 1.5 * 2^52 rounds to an integer.
HOST_DEVICE double power_of_two(double x) {
    double shifted = x + 6755399441055744.0;
    double r = x - (shifted - 6755399441055744.0);
    double p = 1.3691488853904124e-12;
    p = p * r + 2.5678435993488196e-11;
    p = p * r + 4.44553827187081e-10;
    p = p * r + 7.054911620801121e-09;
    p = p * r + 1.0178086009239696e-07;
    p = p * r + 1.3215486790144305e-06;
    p = p * r + 1.5252733804059838e-05;
    p = p * r + 0.00015403530393381606;
    p = p * r + 0.0013333558146428441;
    p = p * r + 0.009618129107628477;
    p = p * r + 0.055504108664821576;
    p = p * r + 0.2402265069591007;
    p = p * r + 0.6931471805599453;
    p = p * r + 1.0;
    return bit_cast<double>(bit_cast<uint64_t>(p) + (bit_cast<uint64_t>(shifted) << 52));
}

// e^x = scale * (1 + small) for x <= 88 (double: 708): x = k ln 2 + r, |r| <= ln(2)/2, scale = 2^k,
// small = e^r - 1, Cody and Waite's two-part ln 2. Far below 0 scale is exactly 0; a NaN stays one;
// small is as exact as x where k = 0. The polynomials are minimax and Taylor.
template <class T> HOST_DEVICE void split_exponential(T x, T& scale, T& small) {
    using Bits = typename Float<T>::Bits;
    if constexpr (sizeof(typename Float<T>::Element) == 4) {
        T held = maximum(T{} - 88.2f, x);
        T shifted = held * 1.44269504f + 12582912.0f;
        T k = shifted - 12582912.0f;
        T r = (held - k * 0.693359375f) + k * 2.12194440e-4f;
        // by pairs of terms: fewer of them wait for each other
        T square = r * r;
        T q = (square * 0.0013882522f + (r * 0.00836652f + 0.0416672f)) * square +
              (r * 0.16666543f + 0.49999997f);
        small = r + square * q;
        scale = bit_cast<T>((bit_cast<Bits>(shifted) << 23) + 0x3f800000u);
    } else {
        T held = maximum(T{} - 709.0, x);
        T shifted = held * 1.4426950408889634 + 6755399441055744.0;
        T k = shifted - 6755399441055744.0;
        T r = (held - k * 0.693145751953125) - k * 1.42860682030941723212e-6;
        T q = r * (1 / 87178291200.0) + 1 / 6227020800.0;
        q = q * r + 1 / 479001600.0;
        q = q * r + 1 / 39916800.0;
        q = q * r + 1 / 3628800.0;
        q = q * r + 1 / 362880.0;
        q = q * r + 1 / 40320.0;
        q = q * r + 1 / 5040.0;
        q = q * r + 1 / 720.0;
        q = q * r + 1 / 120.0;
        q = q * r + 1 / 24.0;
        q = q * r + 1 / 6.0;
        q = q * r + 0.5;
        small = r + r * r * q;
        scale = bit_cast<T>((bit_cast<Bits>(shifted) << 52) + 0x3ff0000000000000u);
    }
}

// e^x for x <= 88 (double: 708), under 2 ulp where the result is normal, else 0.
template <class T> HOST_DEVICE T exponential(T x) {
    if constexpr (sizeof(T) == sizeof(float))
        if (float e = 0; try_exp(x, e)) return e;
    T scale, small;
    split_exponential(x, scale, small);
    return scale * small + scale;
}

// (1 - e^x)/2 for x <= 0, under 2 ulp, and exactly 0 for 0.
template <class T> HOST_DEVICE T half_complement(T x) {
    using E = typename Float<T>::Element;
    T scale, small;
    split_exponential(x, scale, small);
    T half = scale * E(0.5);
    return (E(0.5) - half) - half * small;
}

// -log(1 - u) for 0 <= u <= 1/2, under 2 ulp, and exactly 0 for 0: no other argument occurs, so no
// exponent is taken apart.
template <class T> HOST_DEVICE T minus_log_of_complement(T u) {
    // minimax
    if constexpr (sizeof(typename Float<T>::Element) == 4) {
        T q = u * 1.414553f - 1.6395996f;
        q = q * u + 1.2087215f;
        q = q * u - 0.18095523f;
        q = q * u + 0.26369157f;
        q = q * u + 0.24368253f;
        q = q * u + 0.3336321f;
        q = q * u + 0.49999523f;
        return u + u * u * q;
    } else {
        // 2 artanh(s), s = u/(2 - u) <= 1/3
        T s = u / (2.0 - u), square = s * s, q = T{} + 1 / 35.0;
        UNROLL
        for (int n = 33; n > 1; n -= 2) q = q * square + 1.0 / n;
        return 2.0 * (s + s * square * q);
    }
}

HOST_DEVICE float widen_bfloat16(uint16_t h) {
    return bit_cast<float>(static_cast<uint32_t>(h) << 16);
}

// The two of a word, and back: a device has an instruction for each of these lines.
HOST_DEVICE float first_bfloat16(uint32_t pair) { return bit_cast<float>(pair << 16); }
HOST_DEVICE float second_bfloat16(uint32_t pair) { return bit_cast<float>(pair & 0xffff0000u); }
HOST_DEVICE uint32_t pair_of(uint16_t first, uint16_t second) {
    return first | static_cast<uint32_t>(second) << 16;
}

// Cuts a float to bfloat16 after adding what rounds it, at most 0xffff, which infinity's upper half
// never feels; a NaN stays one.
HOST_DEVICE uint16_t cut_bfloat16(float x, uint32_t rounding) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    return static_cast<uint16_t>((x != x ? bits | 0x400000u : bits + rounding) >> 16);
}
HOST_DEVICE uint16_t round_bfloat16(float x) {
    if (uint16_t h = 0; try_round_bfloat16(x, h)) return h;
    return cut_bfloat16(x, 0x7fffu + (bit_cast<uint32_t>(x) >> 16 & 1u));
}

// The multiplication by 2^112 moves the exponent's bias and makes subnormals normal.
HOST_DEVICE float widen_float16(uint16_t h) {
    if (float x = 0; try_widen_float16(h, x)) return x;
    uint32_t magnitude = h & 0x7fffu;
    float x = bit_cast<float>(magnitude << 13) * 5.192296858534828e33f;
    uint32_t bits = magnitude >= 0x7c00u ? magnitude << 13 | 0x7f800000u : bit_cast<uint32_t>(x);
    return bit_cast<float>(bits | static_cast<uint32_t>(h & 0x8000u) << 16);
}

// To nearest, ties to even: by an integer carry where the result is normal, by a float addition
// where it is subnormal.
HOST_DEVICE uint16_t round_float16(float x) {
    if (uint16_t h = 0; try_round_float16(x, h)) return h;
    uint32_t sign = bit_cast<uint32_t>(x) >> 16 & 0x8000u,
             bits = bit_cast<uint32_t>(x) & 0x7fffffffu;
    uint32_t normal = (bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13;
    uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000u;
    uint32_t h = bits < 0x38800000u    ? subnormal
                 : bits < 0x477ff000u  ? normal
                 : bits <= 0x7f800000u ? 0x7c00u
                                       : 0x7e00u;
    return static_cast<uint16_t>(h | sign);
}

} // namespace uegr
