// Hides what differs between a host and a device compiler; the only file that asks which one is at
// work.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define CALLED_ON_BOTH __host__ __device__
#define LOOPS "loops_cuda.cuh"
#define UNROLL _Pragma("unroll")
#define NOT_INLINE __noinline__
#define ON_GPU true
#else
#define HOST_DEVICE inline __attribute__((always_inline)) // for elements
#define CALLED_ON_BOTH                                     // for what is worked out once
#ifndef LOOPS // a test compiles the CUDA sources for a host
#define LOOPS "loops_cpu.h"
#endif
#define UNROLL _Pragma("GCC unroll 16")
#define NOT_INLINE __attribute__((noinline))
#define ON_GPU false
#endif

#ifdef __CUDA_ARCH__
#define ASSEMBLY 1 // a device's
#endif
#ifndef HAS_CLUSTERS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define HAS_CLUSTERS 1
#else
#define HAS_CLUSTERS 0
#endif
#endif

// The instructions of a device that approximate, and flush what is subnormal; a test brings a host
// stand-ins for them, in the file INSTRUCTIONS, so that what is made of them runs there too.
#ifdef __CUDA_ARCH__
#define HAS_INSTRUCTIONS 1
namespace uegr::instruction {
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float square_root(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// NaN where either is.
__device__ __forceinline__ float smaller(float x, float y) {
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
    return x;
}
__device__ __forceinline__ float larger(float x, float y) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
    return x;
}
} // namespace uegr::instruction
#elif defined(INSTRUCTIONS)
#define HAS_INSTRUCTIONS 1
#include INSTRUCTIONS
#endif

namespace uegr {

constexpr bool on_gpu = ON_GPU;

// Operations for which a device has one instruction, where it would take more for the host's
// expression.

HOST_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    uint64_t product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return product;
#else
    return static_cast<uint64_t>(a) * b;
#endif
}

// min and max with a `bound` that is no NaN, which is what a NaN becomes.
template <class T> HOST_DEVICE T at_most(T x, T bound) {
#ifdef __CUDA_ARCH__
    return fmin(x, bound);
#else
    return x < bound ? x : bound;
#endif
}
template <class T> HOST_DEVICE T at_least(T x, T bound) {
#ifdef __CUDA_ARCH__
    return fmax(x, bound);
#else
    return x > bound ? x : bound;
#endif
}

// 2^x for |x| < 126 within 2 ulp where there is an instruction for it; false where there is none.
HOST_DEVICE bool try_exp2([[maybe_unused]] float x, [[maybe_unused]] float& power) {
#ifdef HAS_INSTRUCTIONS
    power = instruction::power_of_two(x);
    return true;
#else
    return false;
#endif
}

// e^x for x <= 88 within 3 ulp by the same instruction, 0 below -87: 2^(x log2 e) times e to what
// the product's rounding lost.
HOST_DEVICE bool try_exp([[maybe_unused]] float x, [[maybe_unused]] float& e) {
#ifdef HAS_INSTRUCTIONS
    const float held = x < -88.2f ? -88.2f : x, exponent = held * 1.44269504f;
    try_exp2(exponent, e);
    e = fmaf(e, 0.693147182f * fmaf(held, 1.44269504f, -exponent), e);
    return true;
#else
    return false;
#endif
}

// 2^x within 2^-22 of itself, 0 far below, infinity far above, 1 for 0.
HOST_DEVICE float near_power_of_two(float x) {
#ifdef HAS_INSTRUCTIONS
    return instruction::power_of_two(x);
#else
    return std::exp2(x);
#endif
}

// To nearest even, as math.h rounds; false where there is no instruction.
HOST_DEVICE bool try_round_bfloat16([[maybe_unused]] float x, [[maybe_unused]] uint16_t& h) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return true;
#else
    return false;
#endif
}
HOST_DEVICE bool try_round_float16([[maybe_unused]] float x, [[maybe_unused]] uint16_t& h) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return true;
#else
    return false;
#endif
}
HOST_DEVICE bool try_widen_float16([[maybe_unused]] uint16_t h, [[maybe_unused]] float& x) {
#ifdef __CUDA_ARCH__
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return true;
#else
    return false;
#endif
}

// a/b to the last bit or one off, for b in [2^-126, 2^126] and a finite a; 0 for a larger b,
// infinity included. The operator branches on a device.
HOST_DEVICE float quotient(float a, float b) {
#ifdef HAS_INSTRUCTIONS
    // times the 0 that infinity's reciprocal is, it would be NaN
    b = instruction::smaller(b, 3.402823466e38f);
    float inverse = instruction::reciprocal(b);
    inverse = fmaf(fmaf(-b, inverse, 1.0f), inverse, inverse);
    const float near = a * inverse;
    return fmaf(fmaf(-b, near, a), inverse, near);
#else
    return a / b;
#endif
}
HOST_DEVICE double quotient(double a, double b) { return a / b; }

// A square root within 2 ulp, of no less than the smallest normal float; std::sqrt, which is exact,
// branches on a device.
HOST_DEVICE float near_root(float x) {
#ifdef HAS_INSTRUCTIONS
    return instruction::square_root(instruction::larger(x, 0x1p-126f));
#else
    return std::sqrt(x);
#endif
}
HOST_DEVICE double near_root(double x) { return std::sqrt(x); }

} // namespace uegr
