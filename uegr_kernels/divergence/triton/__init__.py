"""The loss operators' Triton kernels: math.py has the formulas, kernels.py the kernels,
launch.py what runs them.
"""

from .launch import scale_gradients, scale_gradients_, uegr_loss, uegr_loss_

__all__ = ["scale_gradients", "scale_gradients_", "uegr_loss", "uegr_loss_"]
