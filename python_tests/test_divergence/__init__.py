"""Tests of the losses; `backend` and `native` serve the OPERATORS."""

OPERATORS = ("divergence.uegr_loss",)
