"""Loads the compiled library, or remembers in one sentence why not."""

import functools
import os
import pathlib

import torch

LIBRARIES = pathlib.Path(__file__).parent.parent / "_lib"
# Weakest first; torch reports AVX512 only with F, BW, DQ, VL and FMA, and AVX2 only with FMA.
ISAS = ("baseline", "avx2", "avx512")
SUPPORTED = {"AVX2": 1, "AVX512": 2}


def supported_isas() -> tuple[str, ...]:
    """The instruction sets this processor can run, weakest first."""
    return ISAS[: SUPPORTED.get(torch.backends.cpu.get_cpu_capability(), 0) + 1]


def _library(isa: str) -> pathlib.Path:
    return LIBRARIES / f"uegr_kernels_{isa}.so"


@functools.cache
def load() -> tuple[str | None, str | None]:
    """Loads exactly one library; returns (instruction set, None) or (None, the reason in a sentence)."""
    wanted = os.environ.get("UEGR_KERNELS_ISA")
    if wanted is not None and wanted not in ISAS:
        raise ValueError(f"UEGR_KERNELS_ISA={wanted!r} is not an instruction set; set it to one of {', '.join(ISAS)}, or unset it")
    if wanted is not None and wanted not in supported_isas():
        raise RuntimeError(f"UEGR_KERNELS_ISA={wanted} is more than this processor has ({supported_isas()[-1]}); choose a weaker one or unset it")
    built = [isa for isa in supported_isas() if _library(isa).exists()]
    isa = wanted or (built[-1] if built else None)
    if isa is None or not _library(isa).exists():
        note = LIBRARIES / "not_built.txt"
        reason = note.read_text().strip() if note.exists() else f"{_library(isa or 'baseline')} does not exist"
        return None, f"the compiled library was not built: {reason}; install a C++17 compiler and run `pip install --force-reinstall --no-deps .` again"
    try:
        torch.ops.load_library(str(_library(isa)))
    except OSError as error:
        return None, f"{_library(isa).name} does not load into torch {torch.__version__}: {error}; rebuild it with `pip install --force-reinstall --no-deps .`"
    return isa, None


def why_not() -> str | None:
    """None where the library is loaded, else the reason and the remedy in a sentence."""
    return load()[1]


def has_kernel(operator: str, dispatch_key: str) -> bool:
    """Whether a compiled kernel stands behind `uegr_kernels::operator` for a dispatch key ("CPU", "CUDA")."""
    load()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"uegr_kernels::{operator}", dispatch_key)
