from .api import (
    SelectiveAdamW,
    SelectiveSGD,
    select_gradients_,
    selection_mask,
    selection_probability,
)

__all__ = [
    "SelectiveAdamW",
    "SelectiveSGD",
    "select_gradients_",
    "selection_mask",
    "selection_probability",
]
