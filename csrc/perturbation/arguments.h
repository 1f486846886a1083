// The perturbing operators' arguments, checked once for the CPU and for a GPU, and the operators
// themselves: check, nothing to do, go. What goes is declared here, for each device to define.
#pragma once

#include <algorithm>
#include <vector>

#include "../core/tensor.h"
#include "perturbation.h"

namespace uegr {

// One tensor of a call: out = x + step along g, x without data being 0.
struct PerturbedTensor {
    View g, x, out;
    // elements; of a group with one norm
    int64_t size = 0, length = 0;
    uint32_t stream = 0;

    int64_t groups() const { return size / length; }
};

inline int64_t count_elements(const View& v, int first_axis, int last_axis) {
    int64_t n = 1;
    for (int d = first_axis; d < last_axis; ++d) n *= v.sizes[d];
    return n;
}

inline void check_equal_shapes(const View& a, const View& b, const char* a_name,
                               const char* b_name) {
    STD_TORCH_CHECK(a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes), a_name,
                    " and ", b_name, " must have the same shape");
}

struct PerturbationArguments {
    Norm norm = Norm::l2;
    double epsilon, radius = HUGE_VAL;
    bool projects = false;
    // one norm over all tensors
    bool together = false;
    // some tensors share memory: one is written after the other
    bool in_order = false;
    // of tokens of `token` elements each; without data: none
    View mask;
    int64_t token = 1;
    bool random = false;
    int64_t seed = 0;
    // in the place of `seed`
    const int64_t* seed_on_gpu = nullptr;
    uint32_t step = 0;
    int32_t limit = 1 << 24;
    // none of them empty
    std::vector<PerturbedTensor> tensors;

    // One tensor in groups by `per`, and its mask of the first axes.
    PerturbationArguments(const Tensor& grad, const Tensor* delta, const Tensor& out,
                          const OptionalTensor& tokens, double epsilon, int64_t norm, int64_t per)
        : norm(static_cast<Norm>(norm)), epsilon(epsilon) {
        PerturbedTensor t;
        t.g = float_view(grad, "grad", false);
        if (delta) {
            t.x = float_view(*delta, "delta", false);
            check_equal_shapes(t.g, t.x, "grad", "delta");
        }
        t.out = float_view(out, "out", true);
        check_equal_shapes(t.g, t.out, "grad", "out");
        STD_TORCH_CHECK(norm == 0 || norm == 1, "norm is ", norm, "; use 0 (l2) or 1 (linf)");
        STD_TORCH_CHECK(per >= 0 && per <= 2, "per is ", per,
                        "; use 0 (sample), 1 (token) or 2 (all)");
        const Per groups = static_cast<Per>(per);
        const int first_axis = groups == Per::all      ? 0
                               : groups == Per::sample ? 1
                                                       : std::max(t.g.dim - 1, 0);
        t.size = count_elements(t.g, 0, t.g.dim);
        t.length = count_elements(t.g, first_axis, t.g.dim);
        if (tokens) {
            mask = view(*tokens, "mask", false);
            STD_TORCH_CHECK(mask.dim <= t.g.dim &&
                                std::equal(mask.sizes, mask.sizes + mask.dim, t.g.sizes),
                            "mask must have the gradient's first axes");
            token = std::max<int64_t>(count_elements(t.g, mask.dim, t.g.dim), 1);
        }
        add(t);
    }

    // Weights, each a group of its own or all together one.
    PerturbationArguments(const Tensors& params, const Tensors& grads,
                          const std::vector<int64_t>& streams, double epsilon, bool together)
        : epsilon(epsilon), together(together) {
        STD_TORCH_CHECK(grads.size() == params.size() && streams.size() == params.size(),
                        "params, grads and streams must be of one length");
        std::vector<const char*> places;
        for (size_t i = 0; i < params.size(); ++i) {
            PerturbedTensor t;
            t.g = float_view(grads[i], "grads", false);
            t.x = t.out = float_view(params[i], "params", true);
            check_equal_shapes(t.g, t.x, "grads", "params");
            t.size = t.length = params[i].numel(), t.stream = static_cast<uint32_t>(streams[i]);
            if (t.size > 0) places.push_back(t.x.data);
            add(t);
        }
        std::sort(places.begin(), places.end());
        in_order = std::adjacent_find(places.begin(), places.end()) != places.end();
    }

    // Keeps each element's step with a probability, where there is a seed.
    void keep(const OptionalTensor& given, double keep_probability, int64_t steps) {
        if (!given) return;
        STD_TORCH_CHECK((on_gpu || given->is_cpu()) && given->numel() == 1 &&
                            given->scalar_type() == ScalarType::Long,
                        "seed must be an int64", on_gpu ? "" : " on the CPU");
        STD_TORCH_CHECK(keep_probability >= 0 && keep_probability <= 1, "keep_probability is ",
                        keep_probability, "; give a number in [0, 1]");
        const int64_t* at = static_cast<const int64_t*>(given->const_data_ptr());
        if (given->is_cpu()) seed = *at;
        else seed_on_gpu = at;
        random = true, step = static_cast<uint32_t>(steps), limit = uniform_limit(keep_probability);
    }

private:
    void add(const PerturbedTensor& t) {
        if (t.size > 0) tensors.push_back(t);
    }
};

// Defined by perturbation_cpu.cpp and perturbation_cuda.cu, for calls that are not empty. `like`:
// some tensor of the call.
static void perturb(const PerturbationArguments& arguments, const Tensor& like);

// --- The operators ---

static void fgm_perturbation_(Tensor grad, OptionalTensor mask, OptionalTensor seed, Tensor out,
                              double epsilon, int64_t norm, int64_t per, double keep_probability,
                              int64_t step) {
    PerturbationArguments arguments(grad, nullptr, out, mask, epsilon, norm, per);
    arguments.keep(seed, keep_probability, step);

    if (arguments.tensors.empty()) return;

    perturb(arguments, grad);
}

static void pgd_step_(Tensor delta, Tensor grad, OptionalTensor mask, Tensor out, double step_size,
                      double radius, int64_t norm, int64_t per) {
    PerturbationArguments arguments(grad, &delta, out, mask, step_size, norm, per);
    arguments.projects = true, arguments.radius = radius;

    if (arguments.tensors.empty()) return;

    perturb(arguments, grad);
}

static void perturb_weights_(const Tensors& params, const Tensors& grads, OptionalTensor seed,
                             const std::vector<int64_t>& streams, double epsilon, bool together,
                             double keep_probability, int64_t step) {
    PerturbationArguments arguments(params, grads, streams, epsilon, together);
    arguments.keep(seed, keep_probability, step);

    if (arguments.tensors.empty()) return;

    perturb(arguments, params[0]);
}

EXPORT_BOXED(fgm_perturbation_)
EXPORT_BOXED(pgd_step_)
EXPORT_BOXED(perturb_weights_)

} // namespace uegr
