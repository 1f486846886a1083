"""The backends: their names, their order on a device, and the one function that decides and
explains.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterable

import torch

from . import native

BACKENDS = ("reference", "cpp", "cuda", "triton")
# best first; ROCm calls itself cuda
ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def why_not(
    backend: str, operator: str, device: torch.device, dtype: torch.dtype | None = None
) -> str | None:
    """Returns None where `backend` can serve `operator` ("folder.name") on `device`, else why not
    and what to do, in a sentence.
    """
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", native.current_gpu())
    return _why_not(backend, operator, device, dtype, interpreted)


@functools.cache
def _why_not(
    backend: str, operator: str, device: torch.device, dtype: torch.dtype | None, interpreted: bool
) -> str | None:
    if backend == "reference":
        return None
    if dtype is not None and dtype not in DTYPES:
        return (
            "its kernels take float32, bfloat16, float16 and float64, not "
            f"{str(dtype).removeprefix('torch.')}; use backend='reference'"
        )
    needed = "cpu" if backend == "cpp" or interpreted else "cuda"
    gpu = None
    if needed == "cuda":
        gpu = device.index if device.type == "cuda" else native.current_gpu()
    reasons = _reasons_there(backend, operator, gpu, dtype)
    if device.type == needed:
        return reasons[0] if reasons else None
    if gpu is not None and (no_gpu := _why_no_gpu(backend)) is not None:
        reasons.append(no_gpu)
    where = f"{needed} tensors"
    if backend == "triton":
        alone = "CPU tensors alone under TRITON_INTERPRET=1 (unset it)"
        where = alone if interpreted else "CUDA and ROCm tensors"
    sentence = f"its kernels run on {where}, these are on {device.type}"
    if not reasons:
        return f"{sentence}; move them, or use backend='auto'"
    sentence += f"; moving them alone would not do: {'; and '.join(reasons)}"
    return sentence if "backend='auto'" in sentence else f"{sentence}; or use backend='auto'"


def _why_no_gpu(backend: str) -> str | None:
    """Returns why there is no GPU to move to, where the backend's own reasons do not say it."""
    if backend == "cuda" and (torch.version.cuda is None or native.why_not_cuda() is None):
        # the library, where it is loaded, has looked for a GPU itself
        return None
    return native.why_no_gpu()


def _reasons_there(
    backend: str, operator: str, gpu: int | None, dtype: torch.dtype | None
) -> list[str]:
    """Returns the reasons against a backend for tensors where its kernels run, on a GPU or (None)
    the CPU.
    """
    folder = operator.split(".")[0]
    found: list[str | None] = []
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return ["Triton is not installed; run `pip install triton`"]
        if importlib.util.find_spec(f"{native.PACKAGE}.{folder}.triton") is None:
            found.append(f"{operator} has no Triton kernel in this version; use backend='auto'")
        if gpu is not None:
            found.append(native.why_not_triton(gpu))
    elif backend == "cpp":
        found.append(native.why_not() or _why_no_kernel(operator, "C++", "CPU"))
    else:
        if dtype == torch.float64:
            found.append(
                "its kernels take float32, bfloat16 and float16, not float64; use "
                "backend='auto', 'triton' or 'reference'"
            )
        found.append(native.why_not_gpu(gpu or 0) or _why_no_kernel(operator, "CUDA", "CUDA"))
    return [reason for reason in found if reason is not None]


def _why_no_kernel(operator: str, language: str, key: str) -> str | None:
    if native.has_kernel(operator.split(".")[1], key):
        return None
    return f"{operator} has no {language} kernel in this version; use backend='auto'"


def check_name(backend: object) -> None:
    """Raises ValueError for what is neither "auto" nor a backend."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} is not a backend; use one of 'auto', "
            f"{', '.join(map(repr, BACKENDS))}"
        )


def choose(
    backend: str, operator: str, device: torch.device, dtype: torch.dtype | None = None
) -> str:
    """Returns the backend that serves the call: the best usable one for "auto", the named one or an
    error that says why not.

    Raises ValueError for a name that is no backend, RuntimeError for a backend that cannot serve
    the call.
    """
    check_name(backend)
    if backend == "auto":
        order = ORDER.get(device.type, ("reference",))
        return next(name for name in order if why_not(name, operator, device, dtype) is None)
    reason = why_not(backend, operator, device, dtype)
    if reason is not None:
        raise RuntimeError(
            f"backend={backend!r} cannot serve {operator} on {device.type}: {reason}"
        )
    return backend


# a compiler need not look into it
torch.compiler.assume_constant_result(choose)


def traced() -> bool:
    """Returns whether a compiler, torch.func or a mode of fake tensors is looking, which see
    registered operators only and no values.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def transformed() -> bool:
    """Returns whether torch.func is transforming what runs (grad, vjp, jvp, vmap), outside of a
    compiler.
    """
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def define(
    name: str, schema: str, reference: Callable[..., object], triton: Callable[..., object]
) -> None:
    """Defines an operator and what serves it beside the compiled kernels.

    The reference is the default kernel, so that the operator exists on every device; Triton's is
    the CUDA one where the CUDA library is not loaded, on GPUs that Triton supports. To the overload
    `fallback`, which has neither's compiled kernels, the CUDA library leaves what it does not take,
    and everything on a GPU that it does not run on.
    """
    has_triton = importlib.util.find_spec("triton") is not None

    def on_gpu(*args: object, **kwargs: object) -> object:
        supported = native.why_not_triton(_device(args).index or 0) is None
        return (triton if supported else reference)(*args, **kwargs)

    for overload, registered in (
        (name, has_triton and native.why_not_cuda() is not None),
        (f"{name}.fallback", has_triton),
    ):
        torch.library.define(native.qualified(overload), schema)
        torch.library.impl(native.qualified(overload), "CompositeExplicitAutograd", reference)
        if registered:
            torch.library.impl(native.qualified(overload), "CUDA", on_gpu)


def _device(arguments: Iterable[object]) -> torch.device:
    """Returns the device of an operator's first tensor, which may stand in a list."""
    nested = (x if isinstance(x, list) else [x] for x in arguments)
    return next(x.device for some in nested for x in some if isinstance(x, torch.Tensor))
