// The approximate instructions of platform.h on a host: what is subnormal is flushed, and a result
// is off by as much as NVIDIA's documents allow: a root and a reciprocal by one in the last place,
// a power of two by 2^-22 of itself, up or down. Here every second one is; 2^0 is 1.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace uegr::instruction {

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float one_off(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(x));
    return std::isfinite(x) && bits & 1 ? std::nextafter(x, HUGE_VALF) : x;
}
inline float reciprocal(float x) { return flushed(one_off(1 / flushed(x))); }
inline float square_root(float x) { return flushed(one_off(std::sqrt(flushed(x)))); }
inline float power_of_two(float x) {
    const float exact = std::exp2(flushed(x));
    uint32_t bits;
    memcpy(&bits, &exact, sizeof(bits));
    const float off = !(bits & 1) || flushed(x) == 0 ? 0.0f : bits & 2 ? 0x1p-22f : -0x1p-22f;
    return flushed(exact + exact * off);
}
inline float smaller(float x, float y) { return x != x || y != y ? NAN : x < y ? x : y; }
inline float larger(float x, float y) { return x != x || y != y ? NAN : x > y ? x : y; }

} // namespace uegr::instruction
