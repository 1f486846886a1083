from .functional import select_gradients_, selection_mask, selection_probability
from .optimizers import SelectiveAdamW, SelectiveSGD

__all__ = [
    "SelectiveAdamW",
    "SelectiveSGD",
    "select_gradients_",
    "selection_mask",
    "selection_probability",
]
