// A batch of losses as its kernels see it, and 8 columns of a row from memory and back.
#pragma once

#include "../core/loops_cuda.cuh"
#include "divergence.h"

namespace uegr {
namespace {

// that a thread takes at a time
constexpr int columns = 8;
constexpr int warp_threads = 128, block_threads = 512, long_threads = 512, sweep_threads = 1024,
              finish_threads = 1024;
// Of rows that a warp takes: those that are not together in memory, and those that are too short to
// be shared.
constexpr int64_t warp_classes = 1024, short_classes = 64;
constexpr int most_cluster = 16, portable_cluster = 8;
constexpr int most_passes = 32;
// for the sums of a group that spans blocks
constexpr size_t room_bytes = 64 * sizeof(double);
constexpr float lowest = -HUGE_VALF;
// below all
constexpr int lowest_column = -(1 << 30) - (1 << 30);

// The N rows of one pass.
struct Rows {
    // null: nothing is wanted here
    char* data = nullptr;
    Storage storage = Storage::float32;
    // strides, in elements
    int64_t row = 0, column = 1;

    DEVICE char* at(int64_t n, int64_t i) const {
        return data + (n * row + i * column) * bytes_of(storage);
    }
    DEVICE float get(int64_t n, int64_t i) const { return value_at<float>(at(n, i), storage); }
    DEVICE void put(int64_t n, int64_t i, float x) const { put_value(at(n, i), storage, x); }
};

struct LossBatch {
    LossOptions options{};
    int64_t samples = 0, classes = 0;
    // first: pass of the pairs
    int passes = 0, first = 0;
    Rows logits[most_passes], gradients[most_passes], soft;
    const int64_t* indices = nullptr;
    int64_t index_stride = 0;
    // rows that count
    const int64_t* count = nullptr;
    // clean, adversarial, divergence of each row
    double* values = nullptr;
    // bytes of shared memory a thread group keeps for a role
    int64_t kept = 0;
    // chunks of a long row that a thread has
    int turns = 0;

    HOST_DEVICE bool labelled() const { return indices || soft.data; }
    DEVICE int64_t index(int64_t n) const { return indices[n * index_stride]; }
    DEVICE bool ignored(int64_t n) const { return indices && index(n) == options.ignore_index; }
    DEVICE double label_weight(int pass) const {
        return !labelled() ? 0 : pass == 0 ? 1 : 1 / static_cast<double>(passes - 1);
    }
    DEVICE double unit() const {
        return options.reduction == Reduction::mean ? 1 / static_cast<double>(*count) : 1;
    }
    DEVICE float target(int64_t n, int64_t i) const {
        const float share = static_cast<float>(1 - options.label_smoothing),
                    floor =
                        static_cast<float>(options.label_smoothing / static_cast<double>(classes));
        return soft.get(n, i) * share + floor;
    }
    DEVICE double smoothed() const {
        return indices ? options.label_smoothing / static_cast<double>(classes) : 0;
    }
};

template <class T> DEVICE T larger(T a, T b) { return a > b ? a : b; }
template <class T> DEVICE T smaller(T a, T b) { return a < b ? a : b; }
template <class T> DEVICE T added(T a, T b) { return a + b; }

// --- 8 columns from memory and back ---

struct FullColumns {
    static constexpr bool full = true;
    static DEVICE void load(const Rows& from, int64_t n, int64_t i, int64_t, float (&x)[columns]) {
        const char* at = from.data + (n * from.row + i) * bytes_of(from.storage);
        if (from.storage == Storage::float32) {
            const float* wide = reinterpret_cast<const float*>(at);
            const Pack<float> low = load_last(wide), high = load_last(wide + 4);
            UNROLL
            for (int j = 0; j < 4; ++j) x[j] = low.x[j], x[4 + j] = high.x[j];
            return;
        }
        const Pack<uint16_t> pack = load_last(reinterpret_cast<const uint16_t*>(at));
        UNROLL
        for (int j = 0; j < columns; ++j)
            x[j] = from.storage == Storage::bfloat16 ? widen_bfloat16(pack.x[j])
                                                     : widen_float16(pack.x[j]);
    }
    static DEVICE void store(const Rows& to, int64_t n, int64_t i, int64_t,
                             const float (&x)[columns]) {
        char* at = to.data + (n * to.row + i) * bytes_of(to.storage);
        if (to.storage == Storage::float32) {
            Pack<float> low, high;
            UNROLL
            for (int j = 0; j < 4; ++j) low.x[j] = x[j], high.x[j] = x[4 + j];
            float* wide = reinterpret_cast<float*>(at);
            store_last(wide, low), store_last(wide + 4, high);
            return;
        }
        Pack<uint16_t> pack;
        UNROLL
        for (int j = 0; j < columns; ++j)
            pack.x[j] =
                to.storage == Storage::bfloat16 ? round_bfloat16(x[j]) : round_float16(x[j]);
        store_last(reinterpret_cast<uint16_t*>(at), pack);
    }
};
struct RaggedColumns {
    static constexpr bool full = false;
    template <class T, class F>
    static DEVICE void each(const Rows& rows, int64_t n, int64_t i, int64_t classes, F f) {
        T* at = reinterpret_cast<T*>(rows.data) + n * rows.row + i * rows.column;
        UNROLL
        for (int j = 0; j < columns; ++j)
            if (i + j < classes) f(at[j * rows.column], j);
    }
    static DEVICE void load(const Rows& from, int64_t n, int64_t i, int64_t classes,
                            float (&x)[columns]) {
        UNROLL
        for (int j = 0; j < columns; ++j) x[j] = lowest;
        if (from.storage == Storage::float32)
            return each<const float>(from, n, i, classes, [&](float v, int j) { x[j] = v; });
        const bool brain = from.storage == Storage::bfloat16;
        each<const uint16_t>(from, n, i, classes, [&](uint16_t v, int j) {
            x[j] = brain ? widen_bfloat16(v) : widen_float16(v);
        });
    }
    static DEVICE void store(const Rows& to, int64_t n, int64_t i, int64_t classes,
                             const float (&x)[columns]) {
        if (to.storage == Storage::float32)
            return each<float>(to, n, i, classes, [&](float& v, int j) { v = x[j]; });
        const bool brain = to.storage == Storage::bfloat16;
        each<uint16_t>(to, n, i, classes, [&](uint16_t& v, int j) {
            v = brain ? round_bfloat16(x[j]) : round_float16(x[j]);
        });
    }
};

} // namespace
} // namespace uegr
