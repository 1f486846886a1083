// The only header that includes torch (its stable ABI): tensors as views, with checks that name
// what is wrong.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "platform.h"

#include LOOPS // of the compiler at work

// The namespace of the operators in torch: the package's name, or that of a build for the Kernel
// Hub.
#ifndef UEGR_NAMESPACE
#define UEGR_NAMESPACE uegr_kernels
#endif
#define QUALIFIED(name) C10_STRINGIZE(UEGR_NAMESPACE) "::" #name

namespace uegr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// Makes an operator's function callable from library.cpp's table.
#ifndef USE_CUDA // torch's own word for it
#define EXPORT_BOXED(name)                                                                         \
    void boxed_##name(StableIValue* stack, uint64_t arguments, uint64_t results) {                 \
        TORCH_BOX (&name)(stack, arguments, results);                                              \
    }
#else
// Thrown ahead of any writing where the CUDA kernels leave a call to the operator's overload
// `fallback`: Triton's, or the reference.
struct LeftToOthers {};
// in probe.cuh
cudaError_t probe_device(int device);

template <class T> StableIValue boxed(const T& x) { return torch::stable::detail::from(x); }
// whose elements are bits
inline StableIValue boxed(const std::vector<bool>& x) {
    std::unique_ptr<bool[]> copy(new bool[x.size()]);
    std::copy(x.begin(), x.end(), copy.get());
    return torch::stable::detail::from(
        torch::headeronly::HeaderOnlyArrayRef<bool>(copy.get(), x.size()));
}
template <class... T> void box(StableIValue* stack, const std::tuple<T...>& values) {
    std::apply([&](const T&... x) { ((*stack++ = boxed(x)), ...); }, values);
}

// Calls an operator's overload `fallback`; what it returns, tensors alone or one list, lies on the
// stack.
template <class... A>
void call_fallback(const char* name, StableIValue* stack, const std::tuple<A...>& given) {
    box(stack, given);
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "fallback", stack, TORCH_ABI_VERSION));
}

template <auto function> struct Boxed;
template <class R, class... A, R (*function)(A...)> struct Boxed<function> {
    static void call(const char* name, StableIValue* stack) {
        const auto given = torch::stable::detail::unbox_to_tuple<std::decay_t<A>...>(stack);
        try {
            if constexpr (std::is_void_v<R>) std::apply(function, given);
            else if constexpr (std::is_same_v<R, Tensor> || std::is_same_v<R, Tensors>)
                *stack = boxed(std::apply(function, given));
            else box(stack, std::apply(function, given));
        } catch (const LeftToOthers&) { call_fallback(name, stack, given); }
    }
};
#ifdef ASSEMBLY // a device's compile has no use for them, and would spend longer on thirty
                // arguments than on the kernels
#define EXPORT_BOXED_AS(name, function)                                                            \
    void boxed_##name(StableIValue*, uint64_t, uint64_t) { (void)&function; }
#else
#define EXPORT_BOXED_AS(name, function)                                                            \
    void boxed_##name(StableIValue* stack, uint64_t, uint64_t) {                                   \
        Boxed<&function>::call(QUALIFIED(name), stack);                                            \
    }
#endif
#define EXPORT_BOXED(name) EXPORT_BOXED_AS(name, name)
#endif

inline std::optional<Storage> storage(const Tensor& t) {
    switch (t.scalar_type()) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    case ScalarType::Double: return Storage::float64;
    case ScalarType::Bool: return Storage::boolean;
    default: return std::nullopt;
    }
}

// Raises where a tensor's storage does not reach to its element `last`.
inline void check_memory(const Tensor& t, int64_t last, Storage type, const char* name) {
    int64_t bytes = 0;
    const bool known = aoti_torch_get_storage_size(t.get(), &bytes) == AOTI_TORCH_SUCCESS;
    STD_TORCH_CHECK(
        known && (last + 1) * bytes_of(type) <= bytes, name,
        " has no memory: its storage was freed, in whole or in part; restore it before the step");
}

// The memory of a tensor on the device that the loops run on; what is written must not overlap
// itself.
inline View view(const Tensor& t, const char* name, bool written) {
    STD_TORCH_CHECK(on_gpu ? t.is_cuda() : t.is_cpu(), name, " is not on the ",
                    on_gpu ? "GPU" : "CPU", "; move it, or use backend='auto'");
#ifdef USE_CUDA
    if (probe_device(t.get_device_index()) != cudaSuccess) throw LeftToOthers();
#endif
    const auto type = storage(t);
    STD_TORCH_CHECK(type.has_value(), name,
                    " has an unsupported dtype; use float32, bfloat16, float16 or float64");
    View v;
    v.data = static_cast<char*>(t.data_ptr());
    v.storage = *type;
    v.dim = static_cast<int>(t.dim());
    v.sizes = t.sizes().data();
    v.strides = t.strides().data();
    int64_t dense = 1, last = t.storage_offset();
    for (int d = v.dim - 1; d >= 0; --d) {
        if (v.sizes[d] != 1 && v.strides[d] != dense) v.contiguous = false;
        STD_TORCH_CHECK(!(written && v.sizes[d] > 1 && v.strides[d] == 0), name,
                        " is expanded: its elements share memory and cannot be written; call "
                        ".clone() on it first");
        last += (v.sizes[d] - 1) * v.strides[d];
        dense *= v.sizes[d];
    }
    if (dense != 0) check_memory(t, last, v.storage, name);
    return v;
}

// Numbers of 64 bits are not for a GPU's kernels.
inline void leave_doubles([[maybe_unused]] const View& v) {
#ifdef USE_CUDA
    if (v.storage == Storage::float64) throw LeftToOthers();
#endif
}

// Returns the `view` of a tensor that is computed with; leaves one of float64 on a GPU to others.
inline View operand_view(const Tensor& t, const char* name, bool written) {
    const View v = view(t, name, written);
    leave_doubles(v);
    return v;
}
inline View float_view(const Tensor& t, const char* name, bool written) {
    const View v = operand_view(t, name, written);
    STD_TORCH_CHECK(v.storage != Storage::boolean, name,
                    " is bool; use float32, bfloat16, float16 or float64");
    return v;
}

// Raises where a list's tensor lies on another GPU than its first one.
inline void check_same_device(const Tensors& list, size_t i, const char* name) {
    STD_TORCH_CHECK(!on_gpu || list[i].get_device_index() == list[0].get_device_index(), name, "[",
                    i, "] is on another device than ", name, "[0]");
}

inline void check_same_shape(const View& a, const View& b, const char* name, size_t i) {
    bool same = a.dim == b.dim;
    for (int d = 0; same && d < a.dim; ++d) same = a.sizes[d] == b.sizes[d];
    STD_TORCH_CHECK(same, name, "[", i,
                    "] has another shape than its parameter; they must be equal");
}

// Every element's index must be a number of 63 bits.
inline void check_layout(const Layout& at, int64_t size, size_t i) {
    int64_t last = 0;
    const bool fits =
        at.offset >= 0 && at.stride >= 0 &&
        !__builtin_mul_overflow(std::max<int64_t>(size - 1, 0) / at.run, at.stride, &last) &&
        !__builtin_add_overflow(last, at.offset, &last) &&
        !__builtin_add_overflow(last, std::min(size, at.run), &last);
    STD_TORCH_CHECK(fits && at.stream >= 0 && at.stream < int64_t(1) << 32, "layout of tensor ", i,
                    " is stream ", at.stream, ", offset ", at.offset, ", run ", at.run, ", stride ",
                    at.stride, "; give a stream below 2^32, and indices in [0, 2^63)");
}

// A list of an operator's that has a tensor by parameter, or a single one that holds them one after
// another: what spares thousands of small parameters the cost of a tensor each.
struct List {
    const Tensors& tensors;
    const char* name;
    // of the next parameter, in a single tensor
    int64_t offset = 0;

    List(const Tensors& tensors, const char* name, size_t count, int64_t elements)
        : tensors(tensors), name(name) {
        single = count != 1 && tensors.size() == 1;
        STD_TORCH_CHECK(single || tensors.size() == count, name, " has ", tensors.size(),
                        " tensors for ", count,
                        " parameters; give one for each, or a single one with their elements one "
                        "after another");
        if (!single) return;
        whole = view(tensors[0], name, true);
        STD_TORCH_CHECK(whole.contiguous && tensors[0].numel() == elements, name, " has ",
                        tensors[0].numel(),
                        " elements in a single tensor; it must be contiguous and have ", elements);
    }
    // Parameter i's tensor of n elements; a single one's has no shape of its own.
    View next(size_t i, int64_t n, const View* shape) {
        View v = whole;
        if (!single) {
            v = view(tensors[i], name, true);
            if (shape) check_same_shape(v, *shape, name, i);
            else
                STD_TORCH_CHECK(tensors[i].numel() == 1, name, "[", i, "] has ", tensors[i].numel(),
                                " elements; it must have one");
        } else {
            v.data += offset * bytes_of(v.storage);
            offset += n;
        }
        return v;
    }

private:
    bool single;
    View whole;
};

// The value of a CPU tensor with one element.
inline double scalar(const Tensor& t, const char* name) {
    const auto type = storage(t);
    STD_TORCH_CHECK(t.is_cpu() && t.numel() == 1 && type, name,
                    " must be a CPU tensor with one floating-point element");
    check_memory(t, t.storage_offset(), *type, name);
    return value_at<double>(static_cast<const char*>(t.const_data_ptr()), *type);
}

// A number on whichever device its tensor lies.
inline Number number(double value, const OptionalTensor& tensor, const char* name) {
    if (!tensor) return {value};
#ifdef USE_CUDA
    if (!tensor->is_cpu() || !on_gpu) {
        const View v = view(*tensor, name, false);
        STD_TORCH_CHECK(tensor->numel() == 1, name, " has ", tensor->numel(),
                        " elements; it must have one");
        return {value, v.data, v.storage};
    }
#endif
    return {scalar(*tensor, name)};
}

#ifdef USE_CUDA
// Memory that a GPU copies from while the host goes on.
inline Tensor pinned_bytes(int64_t size) {
    return torch::stable::empty({size}, ScalarType::Byte, std::nullopt,
                                torch::stable::Device(torch::headeronly::DeviceType::CPU), on_gpu);
}

// Copies a call's table to the device. What a graph captures reads host memory at every replay: it
// has some of its own, for good.
inline void upload(const std::vector<char>& bytes, Tensor& to, cudaStream_t stream) {
    if (is_captured(stream)) {
        cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
        check_cuda(cudaThreadExchangeStreamCaptureMode(&mode),
                   "cudaThreadExchangeStreamCaptureMode");
        void* own = nullptr;
        const cudaError_t error = cudaMallocHost(&own, bytes.size());
        cudaThreadExchangeStreamCaptureMode(&mode);
        check_cuda(error, "cudaMallocHost");
        std::copy(bytes.begin(), bytes.end(), static_cast<char*>(own));
        check_cuda(
            cudaMemcpyAsync(to.data_ptr(), own, bytes.size(), cudaMemcpyHostToDevice, stream),
            "cudaMemcpyAsync");
        return;
    }
    Tensor host = pinned_bytes(static_cast<int64_t>(bytes.size()));
    std::copy(bytes.begin(), bytes.end(), static_cast<char*>(host.mutable_data_ptr()));
    // torch keeps the pinned memory until the copy is done
    torch::stable::copy_(to, host, true);
}

// Holds a call's table on the device: what it works on, and the axes of those tensors.
template <class Entry> struct DeviceTable {
    Tensor memory;
    const Entry* entries;
    const int64_t* axes;
};

// Copies a call's table to the device of `like`.
template <class Entry>
DeviceTable<Entry> upload_table(const std::vector<Entry>& entries, const std::vector<int64_t>& axes,
                                const Tensor& like, cudaStream_t stream) {
    const size_t entry_bytes = entries.size() * sizeof(Entry),
                 axes_bytes = axes.size() * sizeof(int64_t);
    std::vector<char> bytes(entry_bytes + axes_bytes);
    memcpy(bytes.data(), entries.data(), entry_bytes),
        memcpy(bytes.data() + entry_bytes, axes.data(), axes_bytes);
    Tensor memory =
        torch::stable::new_empty(like, {static_cast<int64_t>(bytes.size())}, ScalarType::Byte);
    upload(bytes, memory, stream);
    const char* at = static_cast<const char*>(memory.data_ptr());
    return {memory, reinterpret_cast<const Entry*>(at),
            reinterpret_cast<const int64_t*>(at + entry_bytes)};
}

// Makes a tensor's GPU the current one for as long as it lives, and knows its current stream.
class DeviceGuard {
    torch::stable::accelerator::DeviceGuard guard;

public:
    cudaStream_t stream = nullptr;
    explicit DeviceGuard(const Tensor& t) : guard(t.get_device_index()) {
        void* current = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
        stream = static_cast<cudaStream_t>(current);
    }
};
#endif

} // namespace uegr
