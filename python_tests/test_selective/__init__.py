"""Tests of the selective step; `backend` and `native` serve the OPERATORS."""

from uegr_kernels.selective import op

OPERATORS = tuple(f"selective.{name}" for name in op.SCHEMAS)
