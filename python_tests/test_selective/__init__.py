"""Tests of the selective step; `backend` and `native` serve the OPERATORS."""

from uegr_kernels.core.operator import Operator
from uegr_kernels.selective import op

NAMES = tuple(one.name for one in vars(op).values() if isinstance(one, Operator))
OPERATORS = tuple(f"selective.{name}" for name in NAMES)
