// Philox4x32-10 (Salmon et al., SC'11), the package's one generator, and word -> uniform.
// Known answer: counter 0, key 0 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
#pragma once

#include <cstdint>

#include "platform.h"

namespace uegr {

// xor-ed into the key's low word for the words that round 16-bit moments
constexpr uint32_t rounding_key = 0x9E3779B9u;

// The product of the low halves of 64-bit lanes. For vectors of lanes loops_cpu.h has the
// instruction that ignores the upper halves by itself, so nothing below ever masks them: a lane's
// low half holds the word, its upper half is noise.
template <class Lane> HOST_DEVICE Lane multiply_low(Lane a, Lane b) {
    return (a & 0xffffffffu) * b;
}
template <> HOST_DEVICE uint64_t multiply_low(uint64_t a, uint64_t b) {
    return wide_product(static_cast<uint32_t>(a), static_cast<uint32_t>(b));
}

struct RoundKeys {
    uint64_t k0[10], k1[10];

    HOST_DEVICE explicit RoundKeys(uint64_t key) {
        uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
        UNROLL
        for (int round = 0; round < 10; ++round) {
            k0[round] = low, k1[round] = high;
            low += 0x9E3779B9u;
            high += 0xBB67AE85u;
        }
    }
};

// Four words, each a lane or a vector of lanes. Words that are the same for a whole vector stay
// single lanes for as long as they are.
template <class A, class B, class C, class D> struct Counter {
    A c0;
    B c1;
    C c2;
    D c3;
};

template <class A, class B, class C, class D>
HOST_DEVICE auto philox_round(const Counter<A, B, C, D>& c, uint64_t k0, uint64_t k1) {
    A p0 = multiply_low(c.c0, A{} + 0xD2511F53u);
    C p1 = multiply_low(c.c2, C{} + 0xCD9E8D57u);
    auto c0 = (p1 >> 32) ^ (c.c1 ^ k0);
    auto c2 = (p0 >> 32) ^ (c.c3 ^ k1);
    return Counter<decltype(c0), C, decltype(c2), A>{c0, p1, c2, p0};
}

// The four words of a counter: what a device draws at a time.
struct FourWords {
    uint32_t at[4];
};
HOST_DEVICE FourWords philox(uint64_t q, uint32_t step, uint32_t stream, const RoundKeys& keys) {
    Counter<uint64_t, uint64_t, uint64_t, uint64_t> c{q, q >> 32, step, stream};
    UNROLL
    for (int round = 0; round < 10; ++round) c = philox_round(c, keys.k0[round], keys.k1[round]);
    return {{static_cast<uint32_t>(c.c0), static_cast<uint32_t>(c.c1), static_cast<uint32_t>(c.c2),
             static_cast<uint32_t>(c.c3)}};
}

// u * 2^24 with u = (word >> 8) * 2^-24 in [0, 1): exact in a float, and signed integers convert in
// one instruction.
constexpr float uniform_unit = 16777216.0f;
template <class T> HOST_DEVICE T uniform_times_unit(uint32_t word) {
    return static_cast<T>(static_cast<int32_t>(word >> 8));
}

// u < p  <=>  word >> 8 < ceil(p * 2^24), as integers; p below 0 counts as 0, above 1 or NaN as 1.
HOST_DEVICE int32_t uniform_limit(double p) {
    if (!(p < 1)) return 1 << 24;
    const double units = p > 0 ? p * 16777216.0 : 0.0;
    const int32_t whole = static_cast<int32_t>(units);
    return whole + (whole < units ? 1 : 0);
}
HOST_DEVICE bool uniform_below(uint32_t word, int32_t limit) {
    return static_cast<int32_t>(word >> 8) < limit;
}

} // namespace uegr
