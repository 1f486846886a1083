// The approximate instructions of platform.h on a host: what is subnormal is flushed, and a result
// may be one off in its last place, as theirs is; here every second one is.
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
inline float power_of_two(float x) { return flushed(one_off(std::exp2(flushed(x)))); }
inline float smaller(float x, float y) { return x != x || y != y ? NAN : x < y ? x : y; }
inline float larger(float x, float y) { return x != x || y != y ? NAN : x > y ? x : y; }

} // namespace uegr::instruction
