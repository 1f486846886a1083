// As much of the CUDA runtime as the kernels use, on a host: the threads of a block (of a cluster,
// all its blocks) take turns on one processor thread, each running until it has to wait for the
// others; blocks follow each other. For tests of what the kernels compute.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__
#define DYNAMIC_SHARED on_host::dynamic_shared(on_host::machine.rank())

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};

inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), blockDim, gridDim;

namespace on_host {

struct Meeting {
    int members = 0, arrived = 0;
    unsigned round = 0;
};
struct Copy {
    void* to;
    const void* from;
};
// A barrier that counts bytes; what is sent is delivered when somebody waits for all of it.
struct Barrier {
    struct Sent {
        void* to;
        uint64_t value;
    };
    unsigned phase = 0, expected = 0;
    bool announced = false;
    std::vector<Sent> sent;
};
struct Fiber {
    std::vector<Copy> copies;
    ucontext_t start;
    jmp_buf here;
    bool begun = false, done = true;
    std::unique_ptr<char[]> stack;
};
struct Slot {
    alignas(16) unsigned char value[16];
};

struct Machine {
    static constexpr size_t stack_size = 1 << 16;
    std::vector<Fiber> fibers;
    std::vector<Slot> slots; // what a warp's threads hand each other
    std::vector<std::vector<char>> dynamic; // shared memory by block of a cluster
    std::vector<Meeting> warps, blocks;
    Meeting cluster;
    std::map<const void*, Barrier> barriers;
    jmp_buf home;
    ucontext_t outside;
    std::function<void()> body;
    int current = 0, threads = 0, cluster_size = 1;
    unsigned first_block = 0;

    int rank() const { return current / threads; }
    int warp() const { return rank() * ((threads + 31) / 32) + current % threads / 32; }

    static void enter();
    void resume(int i) {
        current = i;
        threadIdx.x = static_cast<unsigned>(i % threads),
        blockIdx.x = first_block + static_cast<unsigned>(i / threads);
        Fiber& fiber = fibers[i];
        if (_setjmp(home)) return;
        if (fiber.begun) _longjmp(fiber.here, 1);
        fiber.begun = true;
        swapcontext(&outside, &fiber.start);
    }
    void pause() {
        if (!_setjmp(fibers[current].here)) _longjmp(home, 1);
    }
    void meet(Meeting& meeting) {
        if (++meeting.arrived >= meeting.members) {
            meeting.arrived = 0, ++meeting.round;
            return;
        }
        for (const unsigned round = meeting.round; meeting.round == round;) pause();
    }
    static void leave(Meeting& meeting) {
        if (--meeting.members > 0 && meeting.arrived >= meeting.members)
            meeting.arrived = 0, ++meeting.round;
    }

    void run(unsigned grid, unsigned threads_, size_t shared, int cluster_,
             std::function<void()> kernel) {
        threads = static_cast<int>(threads_), cluster_size = cluster_, body = std::move(kernel);
        gridDim = dim3(grid), blockDim = dim3(threads_);
        const int all = threads * cluster_size, warps_each = (threads + 31) / 32;
        if (static_cast<int>(fibers.size()) < all) fibers.resize(all);
        slots.resize(all), dynamic.resize(cluster_size);
        for (first_block = 0; first_block < grid; first_block += cluster_size) {
            warps.assign(cluster_size * warps_each, {}), blocks.assign(cluster_size, {}),
                cluster = {all, 0, 0}, barriers.clear();
            for (auto& memory : dynamic)
                memory.assign(shared + 64,
                              static_cast<char>(0xff)); // NaN, as nobody has written it
            for (int i = 0; i < all; ++i) {
                Fiber& fiber = fibers[i];
                if (!fiber.stack) fiber.stack.reset(new char[stack_size]);
                getcontext(&fiber.start);
                fiber.start.uc_stack.ss_sp = fiber.stack.get(),
                fiber.start.uc_stack.ss_size = stack_size, fiber.start.uc_link = nullptr;
                makecontext(&fiber.start, &Machine::enter, 0);
                fiber.begun = fiber.done = false, fiber.copies.clear();
                current = i;
                ++warps[warp()].members, ++blocks[rank()].members;
            }
            for (bool busy = true; busy;) {
                busy = false;
                for (int i = 0; i < all; ++i)
                    if (!fibers[i].done) busy = true, resume(i);
            }
        }
    }
};
inline Machine machine;
inline int64_t launches = 0;
inline void Machine::enter() {
    machine.body();
    const int me = machine.current;
    machine.fibers[me].done = true;
    leave(machine.warps[machine.warp()]), leave(machine.blocks[machine.rank()]),
        leave(machine.cluster);
    _longjmp(machine.home, 1);
}

// Every thread of a warp hands in a value and sees them all.
template <class T, class F> T exchange(T x, F f) {
    static_assert(sizeof(T) <= sizeof(Slot));
    Meeting& warp = machine.warps[machine.warp()];
    memcpy(machine.slots[machine.current].value, &x, sizeof(T));
    machine.meet(warp);
    const int first = machine.current - machine.current % machine.threads % 32;
    const int count = std::min(32, machine.threads - first % machine.threads);
    auto at = [&](int lane) {
        T other;
        memcpy(&other, machine.slots[first + lane].value, sizeof(T));
        return other;
    };
    const T found = f(at, machine.current % machine.threads % 32, count);
    machine.meet(warp);
    return found;
}
inline char* dynamic_shared(int rank) {
    char* memory = machine.dynamic[rank].data();
    return memory + (-reinterpret_cast<uintptr_t>(memory) & 63);
}

inline char* of_block(void* shared, int rank) {
    return dynamic_shared(rank) + (static_cast<char*>(shared) - dynamic_shared(machine.rank()));
}

// Copies at the wait; until then the place of what is copied or sent is NaN, as its old contents
// may be gone.
inline void copy_async(void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) abort();
    memset(to, 0xff, 16);
    machine.fibers[machine.current].copies.push_back({to, from});
}
inline void await_copies() {
    std::vector<Copy>& copies = machine.fibers[machine.current].copies;
    for (const Copy& copy : copies) memcpy(copy.to, copy.from, 16);
    copies.clear();
}
inline void make_barrier(uint64_t* barrier) { machine.barriers[barrier] = {}; }
inline void announce(uint64_t* barrier, unsigned bytes) {
    Barrier& b = machine.barriers.at(barrier);
    if (b.announced) abort(); // the phase before is not over
    b.announced = true, b.expected = bytes;
}
inline void send(uint64_t* to, uint64_t value, uint64_t* barrier, int rank) {
    char* there = of_block(to, rank);
    memset(there, 0xff, 8);
    machine.barriers.at(of_block(barrier, rank)).sent.push_back({there, value});
}
inline void await_phase(uint64_t* barrier, unsigned parity) {
    Barrier& b = machine.barriers.at(barrier);
    while (b.phase % 2 == parity) {
        if (!b.announced || 8 * b.sent.size() < b.expected) {
            machine.pause();
            continue;
        }
        if (8 * b.sent.size() > b.expected) abort();
        for (const Barrier::Sent& one : b.sent) memcpy(one.to, &one.value, 8);
        b.sent.clear(), b.announced = false, ++b.phase;
    }
}

} // namespace on_host

inline void __syncthreads() {
    on_host::machine.meet(on_host::machine.blocks[on_host::machine.rank()]);
}
inline void __syncwarp(unsigned = ~0u) {
    on_host::machine.meet(on_host::machine.warps[on_host::machine.warp()]);
}
inline void __threadfence() {}
inline void __nanosleep(unsigned) {}
template <class T> T __shfl_xor_sync(unsigned, T x, int apart) {
    return on_host::exchange(x, [=](auto at, int lane, int count) {
        return (lane ^ apart) < count ? at(lane ^ apart) : at(lane);
    });
}
template <class T> T __reduce_min_sync(unsigned, T x) {
    return on_host::exchange(x, [](auto at, int, int count) {
        T found = at(0);
        for (int i = 1; i < count; ++i) found = std::min(found, at(i));
        return found;
    });
}
template <class T> T __reduce_max_sync(unsigned, T x) {
    return on_host::exchange(x, [](auto at, int, int count) {
        T found = at(0);
        for (int i = 1; i < count; ++i) found = std::max(found, at(i));
        return found;
    });
}
inline unsigned __clusterRelativeBlockRank() { return on_host::machine.rank(); }
inline unsigned __clusterSizeInBlocks() { return on_host::machine.cluster_size; }
inline void __cluster_barrier_arrive() {}
inline void __cluster_barrier_wait() { on_host::machine.meet(on_host::machine.cluster); }
// Only dynamic shared memory is a block's own here.
template <class T> void* __cluster_map_shared_rank(T* shared, unsigned rank) {
    char *own = on_host::dynamic_shared(on_host::machine.rank()),
         *other = on_host::dynamic_shared(static_cast<int>(rank));
    return other + (reinterpret_cast<char*>(shared) - own);
}

template <class T> T __ldcs(const T* from) { return *from; }
template <class T> T __ldg(const T* from) { return *from; }
template <class T> T __ldcg(const T* from) { return *from; }
template <class T> void __stcs(T* to, T x) { *to = x; }
template <class T> T atomicAdd(T* at, T x) { return std::exchange(*at, *at + x); }
template <class T> T atomicSub(T* at, T x) { return std::exchange(*at, *at - x); }
template <class T> T atomicMin(T* at, T x) { return std::exchange(*at, std::min(*at, x)); }
template <class T> T atomicMax(T* at, T x) { return std::exchange(*at, std::max(*at, x)); }
template <class T> T atomicExch(T* at, T x) { return std::exchange(*at, x); }

// --- The runtime's calls ---

using cudaStream_t = void*;
using cudaEvent_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorNoKernelImageForDevice = 209 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrL2CacheSize,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrClusterLaunch
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributeNonPortableClusterSizeAllowed
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        dim3 clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
// Returns whether a device refuses something, which the environment says: "code", "large clusters",
// "clusters".
inline bool is_refused(const char* what) {
    const char* refused = getenv("CUDA_ON_HOST_REFUSES");
    return refused && !strcmp(refused, what);
}
struct cudaFuncAttributes {};
template <class Kernel> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return is_refused("code") ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 12040, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaSuccess ? "cudaSuccess" : "cudaErrorNoKernelImageForDevice";
}
// The smaller the cache, the more groups; the smaller the shared memory, the shorter the rows that
// need clusters: 4,096 columns of two passes and a block's sums fit.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrL2CacheSize                    ? 3 << 19
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 65 << 10
                                                                    : 2;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline unsigned devices_in_use = 0; // a bit each: to make a device current takes memory there
inline cudaError_t cudaSetDevice(int device) { return devices_in_use |= 1u << device, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "wrong"; }
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Kernel, int, size_t) {
    return *count = 2, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t*) {
    return *count = is_refused("clusters") ? 0 : 1, cudaSuccess;
}
template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute attribute, int) {
    const bool large = attribute == cudaFuncAttributeNonPortableClusterSizeAllowed;
    return large && is_refused("large clusters") ? cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
    return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** at, size_t size) {
    return *at = malloc(size), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                                   cudaStream_t) {
    return memcpy(to, from, size), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
    return memset(to, value, size), cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    ++on_host::launches;
    const int cluster = config->numAttrs ? static_cast<int>(config->attrs->val.clusterDim.x) : 1;
    on_host::machine.run(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, cluster,
                         [=] { kernel(arguments...); });
    return cudaSuccess;
}
