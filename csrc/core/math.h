// Elementary functions and 16-bit conversions as plain arithmetic, so that loops over them vectorise.
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

// The unsigned integer of a float's width, its largest finite value, the bits of infinity.
template <class T> struct Float;
template <> struct Float<float> {
    using Bits = uint32_t;
    static constexpr float largest = 3.402823466e38f;
    static constexpr Bits infinity = 0x7f800000u;
};
template <> struct Float<double> {
    using Bits = uint64_t;
    static constexpr double largest = 1.7976931348623157e308;
    static constexpr Bits infinity = 0x7ff0000000000000u;
};

HOST_DEVICE float absolute(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) & 0x7fffffffu); }
HOST_DEVICE double absolute(double x) { return bit_cast<double>(bit_cast<uint64_t>(x) & 0x7fffffffffffffffu); }

// The second where the first is NaN: minps and maxps in one instruction.
template <class T> HOST_DEVICE T minimum(T a, T b) { return a < b ? a : b; }
template <class T> HOST_DEVICE T maximum(T a, T b) { return a > b ? a : b; }

// 2^x for |x| < 126: x = k + r, |r| <= 1/2, minimax of degree 5 in r, under 2.5 ulp. Adding 1.5 * 2^23 rounds to an integer.
HOST_DEVICE float power_of_two(float x) {
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

HOST_DEVICE float widen_bfloat16(uint16_t h) { return bit_cast<float>(static_cast<uint32_t>(h) << 16); }

// Cuts a float to bfloat16 after adding what rounds it; a NaN stays one, infinity itself.
HOST_DEVICE uint16_t cut_bfloat16(float x, uint32_t rounding) {
    uint32_t bits = bit_cast<uint32_t>(x);
    bool finite = (bits & 0x7fffffffu) < 0x7f800000u;
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<uint16_t>(((finite ? bits + rounding : bits) >> 16) | (nan ? 0x40u : 0u));
}
HOST_DEVICE uint16_t round_bfloat16(float x) { return cut_bfloat16(x, 0x7fffu + (bit_cast<uint32_t>(x) >> 16 & 1u)); }

// The multiplication by 2^112 moves the exponent's bias and makes subnormals normal.
HOST_DEVICE float widen_float16(uint16_t h) {
    uint32_t magnitude = h & 0x7fffu;
    float x = bit_cast<float>(magnitude << 13) * 5.192296858534828e33f;
    uint32_t bits = magnitude >= 0x7c00u ? magnitude << 13 | 0x7f800000u : bit_cast<uint32_t>(x);
    return bit_cast<float>(bits | static_cast<uint32_t>(h & 0x8000u) << 16);
}

// To nearest, ties to even: by an integer carry where the result is normal, by a float addition where it is subnormal.
HOST_DEVICE uint16_t round_float16(float x) {
    uint32_t sign = bit_cast<uint32_t>(x) >> 16 & 0x8000u, bits = bit_cast<uint32_t>(x) & 0x7fffffffu;
    uint32_t normal = (bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13;
    uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000u;
    uint32_t h = bits < 0x38800000u ? subnormal : bits < 0x477ff000u ? normal : bits <= 0x7f800000u ? 0x7c00u : 0x7e00u;
    return static_cast<uint16_t>(h | sign);
}

} // namespace uegr
