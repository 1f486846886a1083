"""Dropout whose rates follow the gradients of the units (SPEC 1, adaptive dropout)."""

from .api import AdaptiveDropout, replace_dropout

__all__ = ["AdaptiveDropout", "replace_dropout"]
