// What differs between a host and a device compiler; the only file that asks which one is at work.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define CALLED_ON_BOTH __host__ __device__
#define LOOPS "loops_cuda.cuh"
#define UNROLL _Pragma("unroll")
#define ON_GPU true
#else
#define HOST_DEVICE inline __attribute__((always_inline)) // for elements
#define CALLED_ON_BOTH                                     // for what is worked out once
#ifndef LOOPS // a test compiles the CUDA sources for a host
#define LOOPS "loops_cpu.h"
#endif
#define UNROLL _Pragma("GCC unroll 16")
#define ON_GPU false
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define HAS_CLUSTERS 1
#else
#define HAS_CLUSTERS 0
#endif

namespace uegr {

constexpr bool on_gpu = ON_GPU;

// What a device has one instruction for, where it would take the host's expression for more.

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

// A square root within 2 ulp; std::sqrt, which is exact, branches on a device.
HOST_DEVICE float near_root(float x) {
#ifdef __CUDA_ARCH__
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
#else
    return std::sqrt(x);
#endif
}
HOST_DEVICE double near_root(double x) { return std::sqrt(x); }

} // namespace uegr
