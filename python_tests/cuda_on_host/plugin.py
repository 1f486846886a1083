"""`-p plugin`: the CPU's tests run on the library in the folder CUDA_ON_HOST."""

import os
import pathlib

from uegr_kernels.core import native

native.LIBRARIES = pathlib.Path(os.environ["CUDA_ON_HOST"])
