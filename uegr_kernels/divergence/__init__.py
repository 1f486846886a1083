"""Losses of the forward stage: Jensen-Shannon divergence between passes, and L_train (Eq. 3-6)."""

from .api import (
    TASKS,
    LossParts,
    PairwiseJSLoss,
    UEGRLoss,
    check_loss_options,
    linear_pairwise_js,
    linear_uegr_loss,
    pairwise_js,
    uegr_loss,
)

__all__ = [
    "TASKS",
    "LossParts",
    "PairwiseJSLoss",
    "UEGRLoss",
    "check_loss_options",
    "linear_pairwise_js",
    "linear_uegr_loss",
    "pairwise_js",
    "uegr_loss",
]
