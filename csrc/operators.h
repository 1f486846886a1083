// The operators that every compiled library has; each file exports its own with EXPORT_BOXED
// (core/tensor.h).
#pragma once

#define OPERATORS(apply)                                                                           \
    apply(selective_adamw_) apply(selective_sgd_) apply(select_gradients_)                         \
        apply(selective_statistics_) apply(selection_probability_) apply(selection_mask_)          \
            apply(uegr_loss) apply(uegr_loss_) apply(scale_gradients) apply(scale_gradients_)      \
                apply(fgm_perturbation_) apply(pgd_step_) apply(perturb_weights_)                  \
                    apply(adaptive_dropout) apply(adaptive_dropout_backward) apply(dropout_rates_)

#define DECLARE(name) void boxed_##name(StableIValue* stack, uint64_t arguments, uint64_t results);
#define IMPLEMENT(name) m.impl(#name, uegr::boxed_##name);
