"""Dropout whose rates follow the gradients of the units (docs/spec.md, 1)."""

from .api import AdaptiveDropout, replace_dropout

__all__ = ["AdaptiveDropout", "replace_dropout"]
