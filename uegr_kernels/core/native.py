"""Loads the compiled libraries, or remembers in one sentence why not."""

import ctypes
import functools
import os
import pathlib

import torch

# on the Kernel Hub each build has its own name
PACKAGE = __name__.removesuffix(".core.native")
# of the operators, in the libraries too
NAMESPACE = PACKAGE.rpartition(".")[2]
LIBRARIES = pathlib.Path(__file__).parent.parent / "_lib"
# weakest first
ISAS = ("baseline", "avx2", "avx512")
# torch says AVX2 only of a processor that has FMA too, AVX512 only of one with F, BW, DQ and VL;
# its own kernels use what setup.py does.
SUPPORTED = {"AVX2": 1, "AVX512": 2}
# what the CUDA runtime calls code that a GPU does not run
NO_CODE = {
    f"cudaError{name}"
    for name in (
        *(
            "NoKernelImageForDevice",
            "InvalidDeviceFunction",
            "InvalidKernelImage",
            "UnsupportedPtxVersion",
        ),
        *("InvalidPtx", "JitCompilerNotFound", "JitCompilationDisabled"),
    )
}
# the oldest architecture that the CUDA kernels compile for, and Triton supports
LEAST = (8, 0)
# Without --no-cache-dir pip may take a wheel again that it made of a source archive.
REMEDY = (
    "then run `pip install --force-reinstall --no-deps --no-cache-dir .` in the source folder, or "
    "with what was installed (an archive, a name) in the place of the dot"
)


def qualified(operator: str) -> str:
    """Returns an operator's name with the namespace that torch has it in."""
    return f"{NAMESPACE}::{operator}"


def supported_isas() -> tuple[str, ...]:
    """Returns the instruction sets this processor can run, weakest first."""
    return ISAS[: SUPPORTED.get(torch.backends.cpu.get_cpu_capability(), 0) + 1]


def built_isas() -> tuple[str, ...]:
    """Returns the instruction sets the installed package has a library for, weakest first."""
    return tuple(isa for isa in ISAS if _library(isa).exists())


def _library(isa: str) -> pathlib.Path:
    return LIBRARIES / f"uegr_kernels_{isa}.so"


def _why_missing(library: pathlib.Path, note: str, tool: str) -> str:
    """Returns why a library is not there and what to do, as the end of a sentence."""
    told, source = LIBRARIES / note, LIBRARIES.parent.parent
    if told.exists():
        return f"{told.read_text().strip()}; put that right, {REMEDY}"
    # `python -m` in a clone finds the clone's package ahead of the installed one.
    if not LIBRARIES.exists() and (source / "setup.py").exists():
        return (
            f"Python took the package from its source folder, {source}, where nothing is built; "
            "start Python in another folder, to have the installed one, or run `pip install -e .` "
            "in this one"
        )
    return f"{library} does not exist (install {tool}); put that right, {REMEDY}"


@functools.cache
def load() -> tuple[str | None, str | None]:
    """Loads exactly one library; returns (instruction set, None) or (None, the reason and the
    remedy in a sentence).

    Raises ValueError where UEGR_KERNELS_ISA is no instruction set, RuntimeError where this
    processor lacks it.
    """
    wanted = os.environ.get("UEGR_KERNELS_ISA")
    if wanted is not None and wanted not in ISAS:
        raise ValueError(
            f"UEGR_KERNELS_ISA={wanted!r} is not an instruction set; set it to one of "
            f"{', '.join(ISAS)}, or unset it"
        )
    if wanted is not None and wanted not in supported_isas():
        raise RuntimeError(
            f"UEGR_KERNELS_ISA={wanted} is more than this processor has ({supported_isas()[-1]}); "
            "choose that or unset it"
        )
    usable = [isa for isa in supported_isas() if isa in built_isas()]
    isa = wanted or (usable[-1] if usable else "baseline")
    library = _library(isa)
    if not library.exists():
        reason = _why_missing(library, "not_built.txt", "a C++17 compiler")
        return None, f"the compiled library was not built: {reason}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return None, (
            f"{library.name} does not load into torch {torch.__version__}: {error}; "
            f"install torch 2.11 or newer, {REMEDY}"
        )
    return isa, None


@functools.cache
def why_not_cuda() -> str | None:
    """Returns None where the CUDA library is loaded, which it is for a CUDA build of torch alone;
    else the reason and the remedy in a sentence.
    """
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch"
    library = LIBRARIES / "uegr_kernels_cuda.so"
    if not library.exists():
        reason = _why_missing(library, "cuda_not_built.txt", "the CUDA toolkit, for nvcc")
        return f"the CUDA library was not built: {reason}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return (
            f"{library.name} does not load into torch {torch.__version__}: {error}; install "
            f"torch 2.11 or newer, {REMEDY}"
        )
    return None


def current_gpu() -> int:
    """Returns the GPU that a device without an index means."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0


def why_no_gpu() -> str | None:
    """Returns None where torch finds a GPU, else the reason and the remedy in a sentence."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA and ROCm; install a build with one of them"
    if not torch.cuda.is_available():
        return "torch finds no GPU or no driver here; see what nvidia-smi (or rocm-smi) says"
    return None


@functools.cache
def _cuda_library() -> ctypes.CDLL:
    """Returns the loaded CUDA library, for what is no operator (csrc/core/probe.cuh)."""
    return load_functions(LIBRARIES / "uegr_kernels_cuda.so")


def load_functions(path: pathlib.Path) -> ctypes.CDLL:
    """Returns a CUDA library's functions that are no operators."""
    library = ctypes.CDLL(str(path))
    library.uegr_kernels_probe.restype = library.uegr_kernels_architectures.restype = (
        ctypes.c_char_p
    )
    return library


def probe(index: int) -> str:
    """Returns what the CUDA runtime says of the library's kernels on a GPU: "cudaSuccess" where
    they run.
    """
    name: bytes = _cuda_library().uegr_kernels_probe(index)
    return name.decode()


def versions() -> tuple[str, str]:
    """Returns the CUDA that the driver is made for ("0.0": no driver), and the one that the library
    is built with.
    """
    driver, library = ctypes.c_int(), ctypes.c_int()
    _cuda_library().uegr_kernels_versions(ctypes.byref(driver), ctypes.byref(library))
    known, built = (
        f"{number.value // 1000}.{number.value % 1000 // 10}" for number in (driver, library)
    )
    return known, built


def architectures() -> tuple[str, ...]:
    """Returns what the loaded CUDA library holds code for, in TORCH_CUDA_ARCH_LIST's words."""
    names: bytes = _cuda_library().uegr_kernels_architectures()
    return tuple(names.decode().split("/"))


def holds_code(capability: tuple[int, int]) -> bool:
    """Returns whether the CUDA library holds code that an architecture runs.

    That is code of its major number and no newer, or PTX that is no newer; "a" is for one alone,
    "f" for one major number.
    """
    for name in architectures():
        number, _, ptx = name.partition("+")
        major, minor = (int(digits) for digits in number.rstrip("af").split("."))
        if number.endswith("a"):
            found = capability == (major, minor)
        elif ptx and not number.endswith("f"):
            found = capability >= (major, minor)
        else:
            found = capability >= (major, minor) and capability[0] == major
        if found:
            return True
    return False


@functools.cache
def why_not_gpu(index: int) -> str | None:
    """Returns None where the CUDA library's kernels run on a GPU, else the reason and the remedy in
    a sentence.

    The GPU is asked once.
    """
    reason = why_not_cuda()
    if reason is not None:
        return reason
    answer = probe(index)
    if answer == "cudaSuccess":
        return None
    if answer == "cudaErrorInsufficientDriver":
        driver, library = versions()
        if driver == "0.0":
            return "no NVIDIA driver was found; install one"
        return (
            f"the driver is made for CUDA {driver}, older than the {library} that the CUDA library "
            "is built with; update the driver, or put an older toolkit's nvcc first in PATH, "
            f"{REMEDY}"
        )
    if answer == "cudaErrorNoDevice":
        return "the driver finds no GPU; see what nvidia-smi says, and CUDA_VISIBLE_DEVICES"
    if answer not in NO_CODE:
        return f"CUDA answers {answer} on GPU {index}; see whether other programs run there"
    capability = torch.cuda.get_device_capability(index)
    least, here = (f"{major}.{minor}" for major, minor in (LEAST, capability))
    missing = (
        f"the CUDA library holds code for {', '.join(architectures())}, which GPU {index}, a "
        f"{here}, does not run ({answer})"
    )
    if capability < LEAST:
        return (
            f"{missing}, and its kernels need {least} or newer; use backend='auto', 'triton' or "
            "'reference'"
        )
    return f"{missing}; set TORCH_CUDA_ARCH_LIST={here}, {REMEDY}"


@functools.cache
def why_not_triton(index: int) -> str | None:
    """Returns None where Triton supports a GPU, else the reason and the remedy in a sentence."""
    # ROCm; a GPU that tensors only feign
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST:
        return None
    least, here = (f"{major}.{minor}" for major, minor in (LEAST, capability))
    return (
        f"Triton supports NVIDIA GPUs from {least} on, and GPU {index} is a {here}; use "
        "backend='auto' or 'reference'"
    )


def why_not() -> str | None:
    """Returns None where the library is loaded, else the reason and the remedy in a sentence."""
    return load()[1]


def has_kernel(operator: str, dispatch_key: str) -> bool:
    """Returns whether a compiled kernel stands behind an operator for a dispatch key ("CPU",
    "CUDA").
    """
    load() if dispatch_key == "CPU" else why_not_cuda()
    return torch._C._dispatch_has_kernel_for_dispatch_key(qualified(operator), dispatch_key)
