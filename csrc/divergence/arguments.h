// The losses' arguments, checked once for the CPU and for a GPU, and the operators themselves:
// check, nothing to do, go. What goes is declared here, for each device to define.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "../core/tensor.h"
#include "divergence.h"

namespace uegr {

#define LOSS_ARGUMENTS                                                                             \
    double js_weight, double label_smoothing, int64_t ignore_index, int64_t reduction,             \
        bool regression, std::vector<bool> needs
#define LOSS_OPTIONS                                                                               \
    LossOptions {                                                                                  \
        js_weight, label_smoothing, ignore_index, static_cast<Reduction>(reduction), regression    \
    }

// The passes that a tensor of logits holds.
inline int64_t passes_of(const View& logits) { return logits.dim == 3 ? logits.sizes[0] : 1; }

// Logits [N, C] or [k, N, C] by tensor, and labels: with some, the first pass is the clean one and
// the pairs are the others', of which there may be none.
struct LossArguments {
    LossOptions options;
    const Tensor& like;
    std::vector<View> logits;
    // first: pass of the pairs
    int64_t samples = 0, classes = 0, passes = 0, first = 0;
    // classes, or
    const int64_t* indices = nullptr;
    int64_t index_stride = 0;
    // probabilities, or numbers to come close to; without data: none
    View soft;

    LossArguments(const Tensors& tensors, const OptionalTensor& labels, const LossOptions& options,
                  const std::vector<bool>& needs)
        : options(options), like(first_of(tensors, needs)), first(labels ? 1 : 0) {
        for (const Tensor& x : tensors) {
            STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3,
                            "logits must be tensors [N, C] or [k, N, C]");
            const View v = float_view(x, "logits", false);
            STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(),
                            "logits must be of one floating dtype");
            const int64_t N = v.sizes[v.dim - 2], C = v.sizes[v.dim - 1];
            if (logits.empty()) samples = N, classes = C;
            STD_TORCH_CHECK(N == samples && C == classes, "logits must have the same N and C");
            passes += passes_of(v);
            logits.push_back(v);
        }
        STD_TORCH_CHECK(classes >= 1 && classes < int64_t(1) << 31, "logits have ", classes,
                        " classes; give 1 to 2^31 - 1");
        STD_TORCH_CHECK(passes > 0, "logits hold no pass");
        if (labels) set_labels(*labels);
    }

private:
    static const Tensor& first_of(const Tensors& tensors, const std::vector<bool>& needs) {
        STD_TORCH_CHECK(!tensors.empty() && tensors.size() == needs.size(),
                        "logits and needs must be lists of one length, not empty");
        return tensors[0];
    }
    void set_labels(const Tensor& labels) {
        STD_TORCH_CHECK(
            on_gpu ? labels.get_device_index() == like.get_device_index() : labels.is_cpu(),
            "labels are ", on_gpu ? "on another device" : "not on the CPU", "; move them");
        if (labels.scalar_type() == ScalarType::Long) {
            STD_TORCH_CHECK(!options.regression && labels.dim() == 1 && labels.size(0) == samples,
                            "class indices must be [N]");
            indices = static_cast<const int64_t*>(labels.const_data_ptr());
            index_stride = labels.stride(0);
            return;
        }
        soft = view(labels, "labels", false);
        STD_TORCH_CHECK(soft.dim == 2 && soft.sizes[0] == samples && soft.sizes[1] == classes &&
                            soft.storage != Storage::boolean,
                        "labels that are no class indices must be floats [N, C]");
    }
};

// A tensor to be multiplied by the gradient of the loss, or its rows [.., N, C] by theirs.
struct ScalingArguments {
    const Tensor& like;
    View source, target, factor;
    int64_t size, classes, samples, factors;

    ScalingArguments(const Tensor& from, const Tensor& into, const Tensor& grad_loss)
        : like(from), source(float_view(from, "gradients", false)),
          target(float_view(into, "gradients", true)), factor(view(grad_loss, "grad_loss", false)),
          size(from.numel()), classes(source.dim ? source.sizes[source.dim - 1] : 1),
          samples(source.dim > 1 ? source.sizes[source.dim - 2] : 1), factors(grad_loss.numel()) {
        STD_TORCH_CHECK(factors == 1 || (factor.dim == 1 && factor.sizes[0] == samples),
                        "grad_loss must be () or [N]");
        STD_TORCH_CHECK(source.dim <= 3, "gradients must have at most 3 axes");
    }
    bool in_place() const { return source.data == target.data; }
};

// --- Defined by divergence_cpu.cpp and divergence_cuda.cu ---

// The loss and its parts; writes the gradients by those logits that need one, in their order.
// `fresh`: they are memory of their own.
static std::pair<Tensor, Tensor> evaluate(const LossArguments& arguments,
                                          const std::vector<bool>& needs, const Tensors& gradients,
                                          bool fresh);
// Multiplies where there is something.
static void scale(const ScalingArguments& arguments);

// --- The operators ---

static std::tuple<Tensor, Tensor, Tensors> uegr_loss(const Tensors& logits, OptionalTensor labels,
                                                     LOSS_ARGUMENTS) {
    const LossArguments arguments(logits, labels, LOSS_OPTIONS, needs);

    Tensors gradients;
    for (size_t i = 0; i < logits.size(); ++i)
        if (needs[i]) gradients.push_back(torch::stable::new_empty(logits[i], logits[i].sizes()));
    const auto [loss, parts] = evaluate(arguments, needs, gradients, true);
    return {loss, parts, gradients};
}

static std::tuple<Tensor, Tensor> uegr_loss_(const Tensors& logits, OptionalTensor labels,
                                             LOSS_ARGUMENTS) {
    const LossArguments arguments(logits, labels, LOSS_OPTIONS, needs);

    Tensors gradients;
    for (size_t i = 0; i < logits.size(); ++i)
        if (needs[i]) gradients.push_back(logits[i]);
    return evaluate(arguments, needs, gradients, false);
}

static Tensors scale_gradients(const Tensors& gradients, Tensor grad_loss, Tensor) {
    Tensors scaled;
    for (const Tensor& g : gradients) {
        scaled.push_back(torch::stable::empty_like(g));
        scale({g, scaled.back(), grad_loss});
    }
    return scaled;
}

static void scale_gradients_(const Tensors& gradients, Tensor grad_loss) {
    // before anything is written
    std::vector<ScalingArguments> all;
    for (const Tensor& g : gradients) all.emplace_back(g, g, grad_loss);

    for (const ScalingArguments& arguments : all) scale(arguments);
}

} // namespace uegr
