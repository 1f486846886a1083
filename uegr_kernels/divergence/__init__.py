"""Losses of the forward stage: Jensen-Shannon divergence between passes, and L_train (Eq. 3-6)."""

from .api import (
    TASKS,
    LossOptions,
    LossParts,
    PairwiseJSLoss,
    UEGRLoss,
    linear_pairwise_js,
    linear_uegr_loss,
    pairwise_js,
    uegr_loss,
)

__all__ = [
    "TASKS",
    "LossOptions",
    "LossParts",
    "PairwiseJSLoss",
    "UEGRLoss",
    "linear_pairwise_js",
    "linear_uegr_loss",
    "pairwise_js",
    "uegr_loss",
]
