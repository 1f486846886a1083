// Philox4x32-10 (Salmon et al., SC'11), the package's one generator, and word -> uniform.
// Known answer: counter 0, key 0 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
#pragma once

#include <cstdint>

#include "platform.h"

namespace uegr {

constexpr uint32_t rounding_key = 0x9E3779B9u; // xor-ed into the key's low word for the words that round 16-bit moments

// The product of the low halves of 64-bit lanes. For vectors of lanes loops_cpu.h has the instruction that ignores the upper halves by
// itself, so nothing below ever masks them.
template <class Lane> HOST_DEVICE Lane multiply_low(Lane a, Lane b) { return (a & 0xffffffffu) * b; }

// The ten round keys, as lanes.
template <class Lane> struct RoundKeys {
    Lane k0[10], k1[10];

    HOST_DEVICE explicit RoundKeys(uint64_t key) {
        uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
        for (int round = 0; round < 10; ++round) {
            k0[round] = Lane{} + static_cast<uint64_t>(low);
            k1[round] = Lane{} + static_cast<uint64_t>(high);
            low += 0x9E3779B9u;
            high += 0xBB67AE85u;
        }
    }
};

// One round; a lane's low half holds the word, its upper half is noise.
template <class Lane> HOST_DEVICE void philox_round(Lane (&c)[4], Lane k0, Lane k1) {
    Lane p0 = multiply_low(c[0], Lane{} + 0xD2511F53u), p1 = multiply_low(c[2], Lane{} + 0xCD9E8D57u);
    c[0] = (p1 >> 32) ^ c[1] ^ k0;
    c[1] = p1;
    c[2] = (p0 >> 32) ^ c[3] ^ k1;
    c[3] = p0;
}

// Ten rounds on `chains` independent counters, interleaved so that one chain's multiplications hide another's.
template <int chains, class Lane> HOST_DEVICE void philox4x32(Lane (&c)[chains][4], const RoundKeys<Lane>& keys) {
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
        for (int i = 0; i < chains; ++i) philox_round(c[i], keys.k0[round], keys.k1[round]);
    }
}

// u * 2^24 with u = (word >> 8) * 2^-24 in [0, 1): exact in a float, and signed integers convert in one instruction.
constexpr float uniform_unit = 16777216.0f;
template <class T> HOST_DEVICE T uniform_times_unit(uint32_t word) { return static_cast<T>(static_cast<int32_t>(word >> 8)); }

// u < p  <=>  word >> 8 < ceil(p * 2^24), as integers; p below 0 counts as 0, above 1 or NaN as 1.
HOST_DEVICE int32_t uniform_limit(double p) {
    if (!(p < 1)) return 1 << 24;
    const double units = p > 0 ? p * 16777216.0 : 0.0;
    const int32_t whole = static_cast<int32_t>(units);
    return whole + (whole < units ? 1 : 0);
}
HOST_DEVICE bool uniform_below(uint32_t word, int32_t limit) { return static_cast<int32_t>(word >> 8) < limit; }

} // namespace uegr
