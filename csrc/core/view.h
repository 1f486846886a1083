// Describes a tensor's memory as kernels see it, on any device.
#pragma once

#include <cstdint>

#include "math.h"

namespace uegr {

// Says where local element l of a shard lies in the unsharded tensor: offset + (l / run) * stride +
// l % run.
struct Layout {
    int64_t stream, offset, run, stride;
};
HOST_DEVICE int64_t element_index(const Layout& at, int64_t l) {
    return l < at.run ? at.offset + l : at.offset + l / at.run * at.stride + l % at.run;
}

enum class Storage : uint8_t { float32, bfloat16, float16, float64, boolean };

HOST_DEVICE int64_t bytes_of(Storage storage) {
    return storage == Storage::float64   ? 8
           : storage == Storage::float32 ? 4
           : storage == Storage::boolean ? 1
                                         : 2;
}

// A tensor's memory; elements are counted in row-major order, whatever its strides.
struct View {
    char* data = nullptr;
    Storage storage = Storage::float32;
    bool contiguous = true;
    int dim = 0;
    const int64_t* sizes = nullptr;
    const int64_t* strides = nullptr;
};

// One element in memory.
template <class T> HOST_DEVICE T value_at(const char* from, Storage storage) {
    switch (storage) {
    case Storage::float32: return static_cast<T>(*reinterpret_cast<const float*>(from));
    case Storage::bfloat16:
        return static_cast<T>(widen_bfloat16(*reinterpret_cast<const uint16_t*>(from)));
    case Storage::float16:
        return static_cast<T>(widen_float16(*reinterpret_cast<const uint16_t*>(from)));
    case Storage::float64: return static_cast<T>(*reinterpret_cast<const double*>(from));
    default: return static_cast<T>(*reinterpret_cast<const uint8_t*>(from) != 0);
    }
}
template <class T> HOST_DEVICE void put_value(char* to, Storage storage, T x) {
    switch (storage) {
    case Storage::float32: *reinterpret_cast<float*>(to) = static_cast<float>(x); break;
    case Storage::bfloat16:
        *reinterpret_cast<uint16_t*>(to) = round_bfloat16(static_cast<float>(x));
        break;
    case Storage::float16:
        *reinterpret_cast<uint16_t*>(to) = round_float16(static_cast<float>(x));
        break;
    case Storage::float64: *reinterpret_cast<double*>(to) = static_cast<double>(x); break;
    default: *reinterpret_cast<uint8_t*>(to) = x != 0; break;
    }
}

// A number that an operator takes as such, or in a tensor: one on a GPU only the kernels read, as
// the host would have to wait for it.
struct Number {
    double value = 0;
    const char* at = nullptr;
    Storage storage = Storage::float32;

    HOST_DEVICE double get() const { return at ? value_at<double>(at, storage) : value; }
};

} // namespace uegr
