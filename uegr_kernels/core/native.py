"""Loads the compiled libraries, or remembers in one sentence why not."""

import functools
import os
import pathlib

import torch

LIBRARIES = pathlib.Path(__file__).parent.parent / "_lib"
ISAS = ("baseline", "avx2", "avx512")  # weakest first
# torch says AVX2 only of a processor that has FMA too, AVX512 only of one with F, BW, DQ and VL; its own kernels use what setup.py does.
SUPPORTED = {"AVX2": 1, "AVX512": 2}
REMEDY = "then run `pip install --force-reinstall --no-deps .` in the source folder"


def supported_isas() -> tuple[str, ...]:
    """The instruction sets this processor can run, weakest first."""
    return ISAS[: SUPPORTED.get(torch.backends.cpu.get_cpu_capability(), 0) + 1]


def built_isas() -> tuple[str, ...]:
    """The instruction sets the installed package has a library for, weakest first."""
    return tuple(isa for isa in ISAS if _library(isa).exists())


def _library(isa: str) -> pathlib.Path:
    return LIBRARIES / f"uegr_kernels_{isa}.so"


@functools.cache
def load() -> tuple[str | None, str | None]:
    """Loads exactly one library; returns (instruction set, None) or (None, the reason and the remedy in a sentence).

    Raises ValueError where UEGR_KERNELS_ISA is no instruction set, RuntimeError where this processor lacks it.
    """
    wanted = os.environ.get("UEGR_KERNELS_ISA")
    if wanted is not None and wanted not in ISAS:
        raise ValueError(f"UEGR_KERNELS_ISA={wanted!r} is not an instruction set; set it to one of {', '.join(ISAS)}, or unset it")
    if wanted is not None and wanted not in supported_isas():
        raise RuntimeError(f"UEGR_KERNELS_ISA={wanted} is more than this processor has ({supported_isas()[-1]}); choose that or unset it")
    usable = [isa for isa in supported_isas() if isa in built_isas()]
    isa = wanted or (usable[-1] if usable else "baseline")
    library, note = _library(isa), LIBRARIES / "not_built.txt"
    if not library.exists():
        reason = note.read_text().strip() if note.exists() else f"{library} does not exist (install a C++17 compiler)"
        return None, f"the compiled library was not built: {reason}; put that right, {REMEDY}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return None, f"{library.name} does not load into torch {torch.__version__}: {error}; install torch 2.11 or newer, {REMEDY}"
    return isa, None


@functools.cache
def why_not_cuda() -> str | None:
    """None where the CUDA library is loaded, which it is for a CUDA build of torch alone; else the reason and the remedy in a sentence."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch"
    library, note = LIBRARIES / "uegr_kernels_cuda.so", LIBRARIES / "cuda_not_built.txt"
    if not library.exists():
        reason = note.read_text().strip() if note.exists() else f"{library} does not exist (install the CUDA toolkit, for nvcc)"
        return f"the CUDA library was not built: {reason}; put that right, {REMEDY}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load into torch {torch.__version__}: {error}; install torch 2.11 or newer, {REMEDY}"
    return None


def why_not() -> str | None:
    """None where the library is loaded, else the reason and the remedy in a sentence."""
    return load()[1]


def has_kernel(operator: str, dispatch_key: str) -> bool:
    """Whether a compiled kernel stands behind `uegr_kernels::operator` for a dispatch key ("CPU", "CUDA")."""
    load() if dispatch_key == "CPU" else why_not_cuda()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"uegr_kernels::{operator}", dispatch_key)
