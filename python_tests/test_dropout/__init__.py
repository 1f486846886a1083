"""Tests of adaptive dropout; `backend` and `native` serve the OPERATORS."""

OPERATORS = ("dropout.adaptive_dropout",)
