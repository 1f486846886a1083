// Gives the CUDA sources what they share: launches, 128-bit accesses, sums over warps, blocks and
// clusters, waiting for another block.
#pragma once

#include <cstdint>
#include <cstring>
#include <cuda_runtime.h>
#include <stdexcept>
#include <string>
#include <vector>

#include "philox.h"
#include "view.h"

namespace uegr {

#define DEVICE __device__ __forceinline__

// --- The host's side ---

inline void check_cuda(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    // else the next call would be blamed
    cudaGetLastError();
    throw std::runtime_error(std::string("CUDA: ") + what +
                             " failed: " + cudaGetErrorString(error));
}

struct Shape {
    int64_t blocks;
    int threads;
    // dynamic, bytes
    size_t shared = 0;
    // blocks
    int cluster = 1;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, cudaStream_t stream,
            const Arguments&... arguments) {
    if (shape.blocks == 0) return;
    if (shape.blocks > INT32_MAX)
        throw std::runtime_error(
            "CUDA: a launch of " + std::to_string(shape.blocks) +
            " blocks; a grid has 2,147,483,647; give fewer elements at a time");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks)),
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared, config.stream = stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster,
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute, config.numAttrs = shape.cluster > 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "a launch");
}

inline int attribute_of_device(cudaDeviceAttr attribute) {
    int device, value;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
}

// As many blocks as run at once, for kernels whose blocks take work until there is none; no more
// than `wanted`.
template <class Kernel>
int64_t resident_blocks(Kernel kernel, int threads, int64_t wanted, size_t shared = 0) {
    int each = 1;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return minimum<int64_t>(wanted, static_cast<int64_t>(each > 0 ? each : 1) *
                                        attribute_of_device(cudaDevAttrMultiProcessorCount));
}

// Returns how many clusters of a launch run at once; 0 where the device refuses them.
template <class Kernel> int active_clusters(Kernel kernel, const Shape& shape) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks)),
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster,
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute, config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) return clusters;
    // else the next call would be blamed
    cudaGetLastError();
    return 0;
}

inline bool is_captured(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
}

// --- The device's side ---

// Holds what one access of 128 bits brings. Nobody has written it in the launch when it is read: by
// a path that sees no writes.
template <class T> struct alignas(16) Pack {
    static constexpr int count = 16 / sizeof(T);
    T x[count];
};
template <class T> DEVICE Pack<T> load_pack(const T* from) {
    return bit_cast<Pack<T>>(__ldg(reinterpret_cast<const float4*>(from)));
}
// Reads, and writes, a pack that nobody reads again before it has left the cache.
template <class T> DEVICE Pack<T> load_last(const T* from) {
    return bit_cast<Pack<T>>(__ldcs(reinterpret_cast<const float4*>(from)));
}
template <class T> DEVICE void store_last(T* to, const Pack<T>& pack) {
    __stcs(reinterpret_cast<float4*>(to), bit_cast<float4>(pack));
}

// A pack's elements of a dtype as floats, and back.
template <Storage storage> DEVICE void widen(const Pack<uint32_t>& pack, float* x) {
    UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t word = pack.x[i];
        if constexpr (storage == Storage::float32) x[i] = bit_cast<float>(word);
        else if constexpr (storage == Storage::bfloat16)
            x[2 * i] = first_bfloat16(word), x[2 * i + 1] = second_bfloat16(word);
        else
            x[2 * i] = widen_float16(static_cast<uint16_t>(word)),
                  x[2 * i + 1] = widen_float16(static_cast<uint16_t>(word >> 16));
    }
}
template <Storage storage> DEVICE Pack<uint32_t> narrowed(const float* x) {
    Pack<uint32_t> pack;
    UNROLL
    for (int i = 0; i < 4; ++i) {
        if constexpr (storage == Storage::float32) pack.x[i] = bit_cast<uint32_t>(x[i]);
        else if constexpr (storage == Storage::bfloat16)
            pack.x[i] = pair_of(round_bfloat16(x[2 * i]), round_bfloat16(x[2 * i + 1]));
        else pack.x[i] = pair_of(round_float16(x[2 * i]), round_float16(x[2 * i + 1]));
    }
    return pack;
}

constexpr int warp_size = 32;
constexpr unsigned whole_warp = 0xffffffffu;

template <class T, class Join> DEVICE T over_warp(T x, Join join) {
    UNROLL
    for (int apart = warp_size / 2; apart > 0; apart /= 2)
        x = join(x, __shfl_xor_sync(whole_warp, x, apart));
    return x;
}
template <class T> DEVICE T warp_sum(T x) {
    return over_warp(x, [](T a, T b) { return a + b; });
}

// Over a block of up to 32 warps, the same for all its threads and in the same order every time.
// `room`: 32 values in shared memory.
template <class T, class Join> DEVICE T over_block(T x, T* room, T neutral, Join join) {
    x = over_warp(x, join);
    // the room may still be read
    __syncthreads();
    if (threadIdx.x % warp_size == 0) room[threadIdx.x / warp_size] = x;
    __syncthreads();
    const unsigned warps = (blockDim.x + warp_size - 1) / warp_size, lane = threadIdx.x % warp_size;
    return over_warp(lane < warps ? room[lane] : neutral, join);
}
template <class T> DEVICE T block_sum(T x, T* room) {
    return over_block(x, room, T(0), [](T a, T b) { return a + b; });
}

DEVICE float4 read_anew(const void* shared) {
#ifdef ASSEMBLY
    float4 v;
    asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))));
    return v;
#else
    return *static_cast<const float4*>(shared);
#endif
}

// Shared memory for what has a constructor.
template <size_t size> struct alignas(16) Room {
    char bytes[size];
};

// The shared memory that a launch asked for.
DEVICE char* dynamic_shared() {
#ifdef DYNAMIC_SHARED
    return DYNAMIC_SHARED;
#else
    extern __shared__ float4 dynamic_shared_memory[];
    return reinterpret_cast<char*>(dynamic_shared_memory);
#endif
}

// The threads that share a row: what they add up is the same for all of them, and in the same order
// every time. `warps`: of a block.
struct WarpGroup {
    static constexpr int group_threads = warp_size;
    static constexpr bool spans_block = false;

    static DEVICE int index() { return threadIdx.x % warp_size; }
    static DEVICE int size() { return warp_size; }
    static DEVICE int64_t first() {
        return static_cast<int64_t>(blockIdx.x) * (blockDim.x / warp_size) +
               threadIdx.x / warp_size;
    }
    static DEVICE int64_t count() {
        return static_cast<int64_t>(gridDim.x) * (blockDim.x / warp_size);
    }
    static DEVICE void leave() {}

    DEVICE explicit WarpGroup(double*) {}
    template <int n, class T, class Join> DEVICE void join(T (&x)[n], T, Join f) {
        UNROLL
        for (int i = 0; i < n; ++i) x[i] = over_warp(x[i], f);
    }
};
struct BlockGroup {
    static constexpr bool spans_block = true;
    // 2 * 16 + 32 values in shared memory
    double* room;

    static DEVICE int index() { return threadIdx.x; }
    static DEVICE int size() { return blockDim.x; }
    static DEVICE int64_t first() { return blockIdx.x; }
    static DEVICE int64_t count() { return gridDim.x; }
    static DEVICE void leave() {}

    DEVICE explicit BlockGroup(double* room) : room(room) {}
    template <int n, class T, class Join> DEVICE void join(T (&x)[n], T neutral, Join f) {
        UNROLL
        for (int i = 0; i < n; ++i)
            x[i] = over_block(x[i], reinterpret_cast<T*>(room + 32), neutral, f);
    }
};
struct ClusterGroup {
    static constexpr bool spans_block = true;
    double* room;
    // a value is read by others until the next one is there
    int turn = 0;

#if HAS_CLUSTERS
    static DEVICE int rank() { return __clusterRelativeBlockRank(); }
    static DEVICE int blocks() { return __clusterSizeInBlocks(); }
    static DEVICE void sync() { __cluster_barrier_arrive(), __cluster_barrier_wait(); }
    template <class T> static DEVICE const T* of_block(T* shared, int rank) {
        return static_cast<const T*>(__cluster_map_shared_rank(shared, rank));
    }
#else // never launched
    static DEVICE int rank() { return 0; }
    static DEVICE int blocks() { return 1; }
    static DEVICE void sync() { __syncthreads(); }
    template <class T> static DEVICE const T* of_block(T* shared, int) { return shared; }
#endif
    static DEVICE int index() { return rank() * blockDim.x + threadIdx.x; }
    static DEVICE int size() { return blocks() * blockDim.x; }
    static DEVICE int64_t first() { return blockIdx.x / blocks(); }
    static DEVICE int64_t count() { return gridDim.x / blocks(); }
    // nobody goes while its memory may be read
    static DEVICE void leave() { sync(); }

    DEVICE explicit ClusterGroup(double* room) : room(room) {}
    template <int n, class T, class Join> DEVICE void join(T (&x)[n], T neutral, Join f) {
        static_assert(n <= 16);
        BlockGroup(room).join(x, neutral, f);
        T* own = reinterpret_cast<T*>(room + 16 * turn);
        turn = 1 - turn;
        if (threadIdx.x == 0)
            for (int i = 0; i < n; ++i) own[i] = x[i];
        sync();
        UNROLL
        for (int i = 0; i < n; ++i) x[i] = neutral;
        for (int other = 0; other < blocks(); ++other) {
            const T* values = of_block(own, other);
            UNROLL
            for (int i = 0; i < n; ++i) x[i] = f(x[i], values[i]);
        }
    }
};

// A value that the compiler keeps, as it does not know how to find it anew: it would do so in every
// round of a loop.
template <class T> DEVICE T settled(T x) {
#ifdef ASSEMBLY
    if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(x));
    else asm volatile("" : "+r"(x));
#endif
    return x;
}

// --- Copies that a thread does not wait for ---

DEVICE unsigned shared_address(const void* shared) {
#ifdef ASSEMBLY
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
#else
    return static_cast<void>(shared), 0;
#endif
}

// 16 bytes into shared memory, for the thread that asks alone: it may read them after
// `await_copies`, and nobody else ever does. What it has read there before, it has: loads and
// copies of one thread reach shared memory in their order.
DEVICE void copy_async([[maybe_unused]] void* shared, [[maybe_unused]] const void* global) {
#ifdef ASSEMBLY
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global))
                 : "memory");
#elif defined(DYNAMIC_SHARED)
    on_host::copy_async(shared, global);
#endif
}
DEVICE void await_copies() {
#ifdef ASSEMBLY
    asm volatile("cp.async.wait_all;" ::: "memory");
#elif defined(DYNAMIC_SHARED)
    on_host::await_copies();
#endif
}

// A barrier in shared memory that counts the bytes other blocks of a cluster send: its phase ends
// when as many have come as were announced. They may come ahead of the announcement.
DEVICE void make_barrier([[maybe_unused]] uint64_t* barrier) {
#if defined(ASSEMBLY) && HAS_CLUSTERS
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier))
                 : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#elif defined(DYNAMIC_SHARED)
    on_host::make_barrier(barrier);
#endif
}
DEVICE void announce([[maybe_unused]] uint64_t* barrier, [[maybe_unused]] unsigned bytes) {
#if defined(ASSEMBLY) && HAS_CLUSTERS
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
#elif defined(DYNAMIC_SHARED)
    on_host::announce(barrier, bytes);
#endif
}
// Writes 8 bytes at the place of `to` in the memory of another block, and tells its barrier.
DEVICE void send([[maybe_unused]] uint64_t* to, [[maybe_unused]] uint64_t value,
                 [[maybe_unused]] uint64_t* barrier, [[maybe_unused]] int rank) {
#if defined(ASSEMBLY) && HAS_CLUSTERS
    asm volatile("{\n"
                 ".reg .b32 there, bell;\n"
                 "mapa.shared::cluster.u32 there, %0, %3;\n"
                 "mapa.shared::cluster.u32 bell, %2, %3;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [there], %1, [bell];\n"
                 "}" ::"r"(shared_address(to)),
                 "l"(value), "r"(shared_address(barrier)), "r"(rank)
                 : "memory");
#elif defined(DYNAMIC_SHARED)
    on_host::send(to, value, barrier, rank);
#endif
}
DEVICE void await_phase([[maybe_unused]] uint64_t* barrier, [[maybe_unused]] unsigned parity) {
#if defined(ASSEMBLY) && HAS_CLUSTERS
    for (unsigned over = 0; !over;)
        asm volatile("{\n"
                     ".reg .pred done;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                     "selp.b32 %0, 1, 0, done;\n"
                     "}"
                     : "=r"(over)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
#elif defined(DYNAMIC_SHARED)
    on_host::await_phase(barrier, parity);
#endif
}

// Joins of what all threads of a block, or of a cluster's blocks, have found: few a sample, each
// with a room of its own, and called by all threads in the same order: which joins there are
// depends on what all have found together. A room is written again after another join, which nobody
// passes before all have read it; so one barrier a join is enough, and there must be two joins or
// more.
constexpr int most_joined = 9, most_joins = 4;

struct BlockJoins {
    struct Room {
        uint64_t of_warp[most_joins][most_joined][warp_size];
    };
    Room& room;

    static_assert(sizeof(Room) % 16 == 0);
    DEVICE explicit BlockJoins(char* shared) : room(*reinterpret_cast<Room*>(shared)) {}
    static DEVICE int index() { return threadIdx.x; }
    static DEVICE int size() { return blockDim.x; }
    static DEVICE int64_t first() { return blockIdx.x; }
    static DEVICE int64_t count() { return gridDim.x; }
    static DEVICE void leave() {}

    template <int stage, int n, class T, class Join>
    DEVICE void join(T (&x)[n], T neutral, Join f) {
        static_assert(stage < most_joins && n <= most_joined && sizeof(T) == 8);
        const unsigned lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
        UNROLL
        for (int i = 0; i < n; ++i) {
            x[i] = over_warp(x[i], f);
            if (lane == 0) room.of_warp[stage][i][warp] = bit_cast<uint64_t>(x[i]);
        }
        __syncthreads();
        UNROLL
        for (int i = 0; i < n; ++i)
            x[i] = over_warp(
                lane < blockDim.x / warp_size ? bit_cast<T>(room.of_warp[stage][i][lane]) : neutral,
                f);
    }
};

// A block's result is sent to all blocks of its cluster, whose threads wait at a barrier in their
// own memory and read there, a lane for each block. Why nothing is overwritten or lost: what is
// sent for a join of the next sample is sent after a later join of this one, for which every block
// has sent after all its threads had read the former (the join within a block stands ahead of the
// sending). Why nobody hangs: a block announces a phase when it has left the one before, waits for
// nothing else, and every block sends for every join, as all have the same samples. Nobody leaves
// the kernel while something is on its way to it, since the last join has waited for it all, and
// `leave` keeps the memory until all are there.
struct ClusterJoins {
    struct Room {
        BlockJoins::Room block;
        uint64_t of_block[most_joins][most_joined][16];
        uint64_t barriers[4];
    };
    static_assert(sizeof(Room) % 16 == 0);
    Room& room;
    // a bit for each barrier: which phase is next
    unsigned parities = 0;

    static DEVICE int index() { return ClusterGroup::index(); }
    static DEVICE int size() { return ClusterGroup::size(); }
    static DEVICE int64_t first() { return ClusterGroup::first(); }
    static DEVICE int64_t count() { return ClusterGroup::count(); }
    static DEVICE void leave() { ClusterGroup::sync(); }

    DEVICE explicit ClusterJoins(char* shared) : room(*reinterpret_cast<Room*>(shared)) {
        if (threadIdx.x == 0)
            for (int i = 0; i < most_joins; ++i) make_barrier(&room.barriers[i]);
        // nobody sends before the barriers are there
        ClusterGroup::sync();
    }
    template <int stage, int n, class T, class Join>
    DEVICE void join(T (&x)[n], T neutral, Join f) {
        BlockJoins(reinterpret_cast<char*>(&room.block)).template join<stage>(x, neutral, f);
        const int blocks = ClusterGroup::blocks(), lane = threadIdx.x % warp_size;
        uint64_t* barrier = &room.barriers[stage];
        if (threadIdx.x == 0) announce(barrier, static_cast<unsigned>(8 * n * blocks));
        if (static_cast<int>(threadIdx.x) < blocks) {
            UNROLL
            for (int i = 0; i < n; ++i)
                send(&room.of_block[stage][i][ClusterGroup::rank()], bit_cast<uint64_t>(x[i]),
                     barrier, lane);
        }
        await_phase(barrier, parities >> stage & 1);
        parities ^= 1u << stage;
        UNROLL
        for (int i = 0; i < n; ++i)
            x[i] =
                over_warp(lane < blocks ? bit_cast<T>(room.of_block[stage][i][lane]) : neutral, f);
    }
};

// Reads from shared memory anew each time what the compiler would keep in registers from one round
// of a loop to the next.
template <class T> DEVICE T reread(const T& shared) {
    static_assert(sizeof(T) % 16 == 0 && alignof(T) == 16);
    Room<sizeof(T)> read;
    UNROLL
    for (unsigned i = 0; i < sizeof(T); i += 16) {
        const float4 part = read_anew(reinterpret_cast<const char*>(&shared) + i);
        memcpy(read.bytes + i, &part, 16);
    }
    return bit_cast<T>(read);
}

// Publishes what a block has written, for those that wait for the mark; called by one thread after
// the block has met.
DEVICE void publish(uint32_t* mark) {
    __threadfence();
    atomicExch(mark, 1u);
}
DEVICE void await(const uint32_t* mark) {
    while (*const_cast<const volatile uint32_t*>(mark) == 0) {}
    __threadfence();
}
// Returns whether this is the last of those that count down to 0; what the others wrote before is
// seen then.
DEVICE bool is_last(uint32_t* left, uint32_t by) {
    __threadfence();
    const bool last = atomicSub(left, by) == by;
    __threadfence();
    return last;
}

// A view that kernels read, its axes in a table beside them: 16 bytes.
struct alignas(16) Slot {
    char* data = nullptr;
    // where its number of axes, sizes and strides stand in the table; -1: contiguous
    int32_t axes = -1;
    Storage storage = Storage::float32;
};

// Makes slots of views.
struct AxesTable {
    std::vector<int64_t> axes{0};

    Slot slot(const View& v) {
        Slot slot;
        slot.data = v.data, slot.storage = v.storage;
        if (v.contiguous || !v.data) return slot;
        slot.axes = static_cast<int32_t>(axes.size());
        axes.push_back(v.dim);
        axes.insert(axes.end(), v.sizes, v.sizes + v.dim);
        axes.insert(axes.end(), v.strides, v.strides + v.dim);
        return slot;
    }
};

// Returns where element l lies by its axes: their number, sizes and strides. Seldom asked for,
// long, and so once in each source.
static __device__ NOT_INLINE int64_t strided_offset(const int64_t* axes, int64_t l) {
    const int64_t dim = axes[0];
    int64_t offset = 0;
    for (int64_t d = dim; d > 0; --d) {
        offset += l % axes[d] * axes[dim + d];
        l /= axes[d];
    }
    return offset;
}
DEVICE char* place_of(const Slot& slot, const int64_t* axes, int64_t l) {
    return slot.data +
           (slot.axes < 0 ? l : strided_offset(axes + slot.axes, l)) * bytes_of(slot.storage);
}

} // namespace uegr
