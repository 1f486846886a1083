// Adaptive dropout's arguments, checked once for the CPU and for a GPU, and the operators
// themselves: check, nothing to do, go. What goes is declared here, for each device to define.
#pragma once

#include <tuple>

#include "../core/tensor.h"
#include "dropout.h"

namespace uegr {

// A tensor with a number for each unit.
inline View unit_view(const Tensor& t, const char* name, bool written) {
    const View v = view(t, name, written);
    STD_TORCH_CHECK(v.storage == Storage::float32 || v.storage == Storage::float64, name,
                    " must be float32 or float64");
    return v;
}

// Holds what is dropped, or its gradient.
struct DropoutArguments {
    const Tensor& tensor;
    View in, rates;
    int64_t size, units;
    const int64_t* key;

    DropoutArguments(const Tensor& tensor, const char* name, const Tensor& rates, const Tensor& key)
        : tensor(tensor), in(float_view(tensor, name, false)),
          rates(unit_view(rates, "rates", false)), size(tensor.numel()) {
        leave_doubles(this->rates);
        STD_TORCH_CHECK(in.dim > 0 && this->rates.dim == 1 &&
                            this->rates.sizes[0] == in.sizes[in.dim - 1],
                        "rates must have one number for each index of ", name, "'s last axis");
        units = this->rates.sizes[0];
        STD_TORCH_CHECK((on_gpu ? key.is_cuda() : key.is_cpu()) && key.numel() == 1 &&
                            key.scalar_type() == ScalarType::Long,
                        "key must be an int64 on the ", on_gpu ? "GPU" : "CPU");
        this->key = static_cast<const int64_t*>(key.const_data_ptr());
    }
};

// Holds what the rates are made of; `fold`: what backwards left in `pending` goes into the norm
// first.
struct RatesArguments {
    View norm, pending;
    int64_t units;
    double p, max_p, momentum;
    bool fold;

    RatesArguments(const Tensor& gradient_norm, const Tensor& squares, double p, double max_p,
                   double momentum, bool fold)
        : norm(unit_view(gradient_norm, "gradient_norm", true)),
          pending(unit_view(squares, "pending", true)), p(p), max_p(max_p), momentum(momentum),
          fold(fold) {
        STD_TORCH_CHECK(
            norm.dim == 1 && pending.dim == 1 && norm.sizes[0] == pending.sizes[0] &&
                norm.storage == pending.storage,
            "gradient_norm and pending must have one axis of the same size, and the same dtype");
        units = norm.sizes[0];
        leave_doubles(norm);
    }
};

// --- Defined by dropout_cpu.cpp and dropout_cuda.cu ---

// Writes the fresh `out`, and where they are asked for the sums of squares of the units.
static void drop(const DropoutArguments& arguments, const Tensor& out, const Tensor* squares);
// Writes the fresh `rates`, which are some.
static void set_rates(const RatesArguments& arguments, const Tensor& rates);

// --- The operators ---

static Tensor adaptive_dropout(Tensor h, Tensor rates, Tensor key, Tensor) {
    const DropoutArguments arguments(h, "h", rates, key);

    Tensor out = torch::stable::new_empty(h, h.sizes());
    if (arguments.size == 0) return out;

    drop(arguments, out, nullptr);
    return out;
}

static std::tuple<Tensor, Tensor> adaptive_dropout_backward(Tensor grad, Tensor rates, Tensor key) {
    const DropoutArguments arguments(grad, "grad", rates, key);

    // Without elements there are sums still: 0.
    Tensor gradient = torch::stable::new_empty(grad, grad.sizes()),
           squares = torch::stable::new_empty(rates, rates.sizes());
    drop(arguments, gradient, &squares);
    return {gradient, squares};
}

static Tensor dropout_rates_(Tensor gradient_norm, Tensor pending, double p, double max_p,
                             double momentum, bool fold) {
    const RatesArguments arguments(gradient_norm, pending, p, max_p, momentum, fold);

    Tensor rates = torch::stable::new_empty(gradient_norm, gradient_norm.sizes());
    if (arguments.units == 0) return rates;

    set_rates(arguments, rates);
    return rates;
}

EXPORT_BOXED(adaptive_dropout)
EXPORT_BOXED(adaptive_dropout_backward)
EXPORT_BOXED(dropout_rates_)

} // namespace uegr
