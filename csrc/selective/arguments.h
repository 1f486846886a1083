// The selecting operators' arguments, checked once for the CPU and for a GPU, and the operators
// themselves: check, nothing to do, go. What goes is declared here, for each device to define.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../core/tensor.h"
#include "selective.h"

namespace uegr {

// One tensor of a call; those that an operator does not have are empty.
struct TensorArguments {
    // s: in the place of g*g; kept: minimum and maximum of s
    View g, s, theta, states[3], kept[2];
    View step;
    int states_count = 0;
    int64_t size = 0;
    Layout layout{};
};

// Minima and maxima of s, or counts by bin: a row for all tensors of a call, or one for each.
struct StatisticsRows {
    void* data = nullptr;
    int64_t count = 0;

    StatisticsRows() = default;
    StatisticsRows(const Tensor& rows, const char* name, const SelectionOptions& options,
                   size_t tensors)
        : data(rows.data_ptr()), count(rows.size(0)) {
        const bool rank = options.ranks();
        STD_TORCH_CHECK((on_gpu ? rows.is_cuda() : rows.is_cpu()) && rows.is_contiguous() &&
                            rows.dim() == 2 && rows.size(1) == (rank ? rank_bins : 2) &&
                            rows.scalar_type() == (rank ? ScalarType::Long : ScalarType::Double),
                        name, " must be contiguous on the ", on_gpu ? "GPU" : "CPU",
                        ": [rows, 2] float64, or for rank [rows, ", rank_bins, "] int64");
        STD_TORCH_CHECK(count == 1 || count == static_cast<int64_t>(tensors), name, " has ", count,
                        " rows; give one, or one for each of ", tensors, " tensors");
    }
    // The row of a call's i-th tensor.
    int64_t of(int64_t i) const { return count == 1 ? 0 : i; }
    double* range(int64_t row) const { return static_cast<double*>(data) + 2 * row; }
    int64_t* bins(int64_t row) const { return static_cast<int64_t*>(data) + row * rank_bins; }
};

// Holds what every selecting operator takes.
struct SelectionArguments {
    SelectionOptions options;
    uint64_t seed;
    const Tensors& grads;
    std::vector<TensorArguments> tensors;
    // statistics handed in, where there is a count
    StatisticsRows scope;

    SelectionArguments(const SelectionOptions& options, int64_t seed, const Tensors& grads,
                       const Tensors& saliencies, const std::vector<int64_t>& layout,
                       const OptionalTensor& scope_statistics)
        : options(options), seed(static_cast<uint64_t>(seed)), grads(grads), tensors(grads.size()) {
        STD_TORCH_CHECK(options.normalization >= Normalization::minmax &&
                            options.normalization <= Normalization::constant,
                        "normalization is ", static_cast<int64_t>(options.normalization),
                        "; use 0 (minmax), 1 (range), 2 (rank) or 3 (constant)");
        STD_TORCH_CHECK(layout.size() == 4 * grads.size(), "layout has ", layout.size(),
                        " numbers; give stream, offset, run, stride by tensor");
        STD_TORCH_CHECK(saliencies.empty() || saliencies.size() == grads.size(),
                        "saliencies: ", saliencies.size(), " for ", grads.size(), " tensors");
        if (scope_statistics && options.normalization != Normalization::constant)
            scope = {*scope_statistics, "scope_statistics", options, grads.size()};
        for (size_t i = 0; i < grads.size(); ++i) {
            TensorArguments& t = tensors[i];
            check_same_device(grads, i, "grads");
            t.g = float_view(grads[i], "grads", false);
            if (!saliencies.empty()) {
                t.s = view(saliencies[i], "saliencies", false);
                check_same_shape(t.s, t.g, "saliencies", i);
            }
            t.size = grads[i].numel();
            t.layout = {layout[4 * i], layout[4 * i + 1], std::max<int64_t>(layout[4 * i + 2], 1),
                        layout[4 * i + 3]};
            check_layout(t.layout, t.size, i);
        }
    }

    // The lists of kept statistics, empty ones meaning that nothing is kept.
    void keep(const Tensors& mins, const Tensors& maxs) {
        const int64_t n = static_cast<int64_t>(tensors.size());
        List low(mins, "saliency_mins", n, n), high(maxs, "saliency_maxs", n, n);
        for (size_t i = 0; i < tensors.size(); ++i)
            tensors[i].kept[0] = low.next(i, 1, nullptr),
            tensors[i].kept[1] = high.next(i, 1, nullptr);
    }
};

// Holds the arguments that the two optimizers share. `states`: the operator's lists, empty ones
// unused.
struct StepArguments : SelectionArguments {
    Number grad_scale, found_inf;
    // rounding: some state is bfloat16
    bool maximize, rounding = false;

    StepArguments(SelectionArguments&& selection, const Tensors& params,
                  const std::vector<const Tensors*>& states, const Tensors& steps,
                  const Tensors& mins, const Tensors& maxs, const OptionalTensor& grad_scale,
                  const OptionalTensor& found_inf, bool maximize)
        : SelectionArguments(std::move(selection)), grad_scale(number(1, grad_scale, "grad_scale")),
          found_inf(number(0, found_inf, "found_inf")), maximize(maximize) {
        const size_t n = params.size();
        STD_TORCH_CHECK(tensors.size() == n, "grads has ", tensors.size(), " tensors for ", n,
                        " parameters");
        STD_TORCH_CHECK(options.previous || (mins.empty() && maxs.empty()),
                        "saliency_mins and saliency_maxs belong to statistics='previous'");
        int64_t elements = 0;
        for (const TensorArguments& t : tensors) elements += t.size;
        std::vector<List> moments;
        for (const Tensors* list : states)
            if (!list->empty()) moments.emplace_back(*list, "states", n, elements);
        List counts(steps, "steps", n, static_cast<int64_t>(n));
        if (options.previous) keep(mins, maxs);
        for (size_t i = 0; i < n; ++i) {
            TensorArguments& t = tensors[i];
            check_same_device(params, i, "params");
            t.theta = float_view(params[i], "params", true);
            check_same_shape(t.g, t.theta, "grads", i);
            STD_TORCH_CHECK(t.theta.storage == tensors[0].theta.storage, "params[", i,
                            "] has another dtype than params[0]");
            for (List& list : moments) {
                View& state = t.states[t.states_count++] = list.next(i, t.size, &t.theta);
                STD_TORCH_CHECK(!on_gpu || state.storage == Storage::float32 ||
                                    state.storage == Storage::bfloat16,
                                "states must be float32 or bfloat16");
                rounding |= state.storage == Storage::bfloat16;
            }
            t.step = counts.next(i, 1, nullptr);
        }
    }
};

// Holds the arguments of statistics over a scope; they join the rows of `out`.
struct StatisticsArguments : SelectionArguments {
    // of the unsharded tensors, or none
    const std::vector<int64_t>& sizes;
    Number grad_scale;
    StatisticsRows out;

    StatisticsArguments(SelectionArguments&& selection, const Tensors& mins, const Tensors& maxs,
                        const std::vector<int64_t>& sizes, const OptionalTensor& grad_scale,
                        const Tensor& out)
        : SelectionArguments(std::move(selection)), sizes(sizes),
          grad_scale(number(1, grad_scale, "grad_scale")),
          out(out, "out", options, tensors.size()) {
        STD_TORCH_CHECK(sizes.empty() || sizes.size() == tensors.size(), "sizes: ", sizes.size(),
                        " for ", tensors.size(), " tensors");
        STD_TORCH_CHECK(
            std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size >= 0; }),
            "sizes must not be negative");
        STD_TORCH_CHECK(mins.empty() == maxs.empty() && (mins.empty() || !options.ranks()),
                        "saliency_mins and saliency_maxs belong together, not to rank");
        if (!mins.empty()) keep(mins, maxs);
    }
};

// Says what an operator without an update rule writes: g * factor, b/p itself, or p.
enum class Out { multiplied, factor, probability };

// One tensor that is looked at: `out` is written, the gradient stays.
struct InspectionArguments : SelectionArguments {
    InspectionArguments(SelectionArguments&& selection, const Tensor& out)
        : SelectionArguments(std::move(selection)) {
        View &to = tensors[0].theta, &g = tensors[0].g;
        // a mask may be bool
        to = operand_view(out, "out", true);
        STD_TORCH_CHECK(to.dim == g.dim && std::equal(g.sizes, g.sizes + g.dim, to.sizes),
                        "out has another shape than the gradient; they must be equal");
    }
};

// --- Defined by selective_cpu.cpp and selective_cuda.cu; no call is empty ---

static void take_step(const StepArguments& arguments, const AdamWOptions& options, bool amsgrad);
static void take_step(const StepArguments& arguments, const SGDOptions& options, bool has_momentum);
static void multiply(const SelectionArguments& arguments, int64_t step);
static void gather_statistics(const StatisticsArguments& arguments);
static void inspect(const InspectionArguments& arguments, int64_t step, Out out);

// --- The operators ---

static void selective_adamw_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                             const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs,
                             const Tensors& steps, const Tensors& saliency_mins,
                             const Tensors& saliency_maxs, OptionalTensor scope_statistics,
                             const std::vector<int64_t>& layout, OptionalTensor grad_scale,
                             OptionalTensor found_inf, double lr, OptionalTensor lr_tensor,
                             double weight_decay, bool maximize, int64_t seed, double beta1,
                             double beta2, OptionalTensor beta1_tensor, OptionalTensor beta2_tensor,
                             double eps, SELECTION_ARGUMENTS) {
    STD_TORCH_CHECK(params.empty() || !(exp_avgs.empty() || exp_avg_sqs.empty()), "exp_avgs has ",
                    exp_avgs.size(), " tensors, exp_avg_sqs ", exp_avg_sqs.size(),
                    "; give both moments of ", params.size(), " parameters");
    const AdamWOptions options{number(lr, lr_tensor, "lr"), number(beta1, beta1_tensor, "betas[0]"),
                               number(beta2, beta2_tensor, "betas[1]"), weight_decay, eps};
    const StepArguments arguments({SELECTION_OPTIONS, seed, grads, {}, layout, scope_statistics},
                                  params, {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}, steps,
                                  saliency_mins, saliency_maxs, grad_scale, found_inf, maximize);

    if (params.empty()) return;

    take_step(arguments, options, !max_exp_avg_sqs.empty());
}

static void selective_sgd_(const Tensors& params, const Tensors& grads,
                           const Tensors& momentum_buffers, const Tensors& steps,
                           const Tensors& saliency_mins, const Tensors& saliency_maxs,
                           OptionalTensor scope_statistics, const std::vector<int64_t>& layout,
                           OptionalTensor grad_scale, OptionalTensor found_inf, double lr,
                           OptionalTensor lr_tensor, double weight_decay, bool maximize,
                           int64_t seed, double momentum, double dampening, bool nesterov,
                           SELECTION_ARGUMENTS) {
    const SGDOptions options{number(lr, lr_tensor, "lr"), momentum, dampening, weight_decay,
                             nesterov};
    const StepArguments arguments({SELECTION_OPTIONS, seed, grads, {}, layout, scope_statistics},
                                  params, {&momentum_buffers}, steps, saliency_mins, saliency_maxs,
                                  grad_scale, found_inf, maximize);

    if (params.empty()) return;

    take_step(arguments, options, !momentum_buffers.empty());
}

static void select_gradients_(const Tensors& grads, const Tensors& saliencies,
                              OptionalTensor scope_statistics, const std::vector<int64_t>& layout,
                              int64_t step, int64_t seed, SELECTION_ARGUMENTS) {
    SelectionArguments arguments(SELECTION_OPTIONS, seed, grads, saliencies, layout,
                                 scope_statistics);
    for (size_t i = 0; i < grads.size(); ++i)
        arguments.tensors[i].theta = float_view(grads[i], "grads", true);

    // every factor is 1
    if (grads.empty() || !is_random(arguments.options)) return;

    multiply(arguments, step);
}

static void selective_statistics_(const Tensors& grads, const Tensors& saliencies,
                                  const Tensors& mins, const Tensors& maxs,
                                  const std::vector<int64_t>& layout,
                                  const std::vector<int64_t>& sizes, int64_t normalization,
                                  OptionalTensor grad_scale, Tensor out) {
    SelectionOptions options{};
    options.normalization = static_cast<Normalization>(normalization);
    const StatisticsArguments arguments({options, 0, grads, saliencies, layout, std::nullopt}, mins,
                                        maxs, sizes, grad_scale, out);

    if (grads.empty()) return;

    gather_statistics(arguments);
}

static void selection_mask_(Tensor grad, OptionalTensor saliency, Tensor out,
                            const std::vector<int64_t>& layout, int64_t step, int64_t seed,
                            SELECTION_ARGUMENTS) {
    const Tensors grads{grad}, saliencies = saliency ? Tensors{*saliency} : Tensors{};
    const InspectionArguments arguments(
        {SELECTION_OPTIONS, seed, grads, saliencies, layout, std::nullopt}, out);

    if (grad.numel() == 0) return;

    inspect(arguments, step, Out::factor);
}

static void selection_probability_(Tensor grad, OptionalTensor saliency, Tensor out,
                                   SELECTION_ARGUMENTS) {
    // the factors are then 1/p
    rescale = true;
    const int64_t n = grad.numel();
    const std::vector<int64_t> layout{0, 0, n, n};
    const Tensors grads{grad}, saliencies = saliency ? Tensors{*saliency} : Tensors{};
    const InspectionArguments arguments(
        {SELECTION_OPTIONS, 0, grads, saliencies, layout, std::nullopt}, out);

    if (n == 0) return;

    inspect(arguments, 0, Out::probability);
}

EXPORT_BOXED(selective_adamw_)
EXPORT_BOXED(selective_sgd_)
EXPORT_BOXED(select_gradients_)
EXPORT_BOXED(selective_statistics_)
EXPORT_BOXED(selection_mask_)
EXPORT_BOXED(selection_probability_)

} // namespace uegr
