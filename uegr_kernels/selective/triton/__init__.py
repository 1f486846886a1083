"""The selecting operators' Triton kernels: math.py has the formulas, kernels.py the kernels,
launch.py their tables, plans and launches.
"""

from .launch import (
    select_gradients_,
    selection_mask_,
    selection_probability_,
    selective_adamw_,
    selective_sgd_,
    selective_statistics_,
)

__all__ = [
    "select_gradients_",
    "selection_mask_",
    "selection_probability_",
    "selective_adamw_",
    "selective_sgd_",
    "selective_statistics_",
]
