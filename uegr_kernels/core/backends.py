"""The backends: their names, their order on a device, and the one function that decides and explains."""

import functools
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from . import native

BACKENDS = ("reference", "cpp", "cuda", "triton")
ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}  # best first; ROCm calls itself cuda
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def why_not(backend: str, operator: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """None where `backend` can serve `operator` ("folder.name") on `device`, else why not and what to do, in a sentence."""
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return _why_not(backend, operator, torch.device(device).type, dtype, interpreted)


@functools.cache
def _why_not(backend: str, operator: str, device: str, dtype: torch.dtype | None, interpreted: bool) -> str | None:
    folder, name = operator.split(".")
    if backend == "reference":
        return None
    if dtype is not None and dtype not in DTYPES:
        return f"its kernels take float32, bfloat16, float16 and float64, not {str(dtype).removeprefix('torch.')}; use backend='reference'"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed; run `pip install triton`"
        if importlib.util.find_spec(f"uegr_kernels.{folder}.triton") is None:
            return f"{operator} has no Triton kernel in this version; use backend='auto'"
        if device != ("cpu" if interpreted else "cuda"):
            where = "CPU tensors alone under TRITON_INTERPRET=1 (unset it)" if interpreted else "CUDA and ROCm tensors"
            return f"Triton kernels run on {where}, these are on {device}; move them, or use backend='auto'"
        return None
    needed = "cpu" if backend == "cpp" else "cuda"
    if device != needed:
        return f"its kernels run on {needed} tensors, these are on {device}; move them, or use backend='auto'"
    if backend == "cuda" and dtype == torch.float64:
        return "its kernels take float32, bfloat16 and float16, not float64; use backend='auto', 'triton' or 'reference'"
    reason = native.why_not() if backend == "cpp" else native.why_not_cuda()
    if reason is None and not native.has_kernel(name, needed.upper()):
        return f"{operator} has no {'C++' if backend == 'cpp' else 'CUDA'} kernel in this version; use backend='auto'"
    return reason


def choose(backend: str, operator: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The backend that serves the call: the best usable one for "auto", the named one or an error that says why not.

    Raises ValueError for a name that is no backend, RuntimeError for a backend that cannot serve the call.
    """
    if backend == "auto":
        order = ORDER.get(device.type, ("reference",))
        return next(name for name in order if why_not(name, operator, device, dtype) is None)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not a backend; use one of 'auto', {', '.join(map(repr, BACKENDS))}")
    reason = why_not(backend, operator, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot serve {operator} on {device.type}: {reason}")
    return backend


@functools.cache
def triton_kernels(package: str) -> ModuleType:
    """The Triton kernels of an operator's package, imported when they are first asked for."""
    return importlib.import_module(f"{package}.triton")


def traced() -> bool:
    """Whether a compiler, torch.func or a mode of fake tensors is looking, which see registered operators only and no values."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def transformed() -> bool:
    """Whether torch.func is transforming what runs (grad, vjp, jvp, vmap), outside of a compiler."""
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def define(name: str, schema: str, reference: Callable[..., Any], triton: Callable[..., Any]) -> None:
    """Defines an operator and what serves it beside the compiled kernels.

    The reference is the default kernel, so that the operator exists on every device; Triton's is the CUDA one where the CUDA library is
    not loaded. To the overload `fallback`, which has neither's compiled kernels, the CUDA library leaves what it does not take.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    for overload, on_gpu in ((name, has_triton and native.why_not_cuda() is not None), (f"{name}.fallback", has_triton)):
        torch.library.define(f"uegr_kernels::{overload}", schema)
        torch.library.impl(f"uegr_kernels::{overload}", "CompositeExplicitAutograd", reference)
        if on_gpu:
            torch.library.impl(f"uegr_kernels::{overload}", "CUDA", triton)
