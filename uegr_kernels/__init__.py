from .selective import SelectiveAdamW, SelectiveSGD, select_gradients_, selection_mask, selection_probability

__version__ = "0.1.0"
