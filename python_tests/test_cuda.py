"""The CUDA kernels without a GPU: what nvcc and the disassembly say, and what they compute as their threads take turns on a host."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import uegr_kernels as uk
from uegr_kernels.core import backends, native

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = {path.parent.name: path for path in sorted((ROOT / "csrc").glob("*/*_cuda.cu"))}
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
TORCH = pathlib.Path(torch.__file__).parent
DEFINITIONS = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA")
INCLUDES = ("-Icsrc", "-isystem", f"{TORCH}/include")
HEADERS = sorted(path for ending in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{ending}"))
WORKERS = concurrent.futures.ThreadPoolExecutor(os.cpu_count())


def run(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=500, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout + done.stderr


# ---- What the compiler says


@dataclasses.dataclass
class Kernel:
    name: str
    registers: int
    stack: int  # bytes
    spilled: int
    instructions: list[tuple[int, str]]  # address, text

    def loops(self) -> list[list[str]]:
        """The innermost loops."""
        spans = []
        for address, text in self.instructions:
            target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                spans.append((int(target[1], 16), address))
        inner = [(a, b) for a, b in spans if not any(a <= c and d <= b for c, d in spans if (a, b) != (c, d))]
        return [[text for address, text in self.instructions if a <= address <= b] for a, b in inner]

    def element_loops(self) -> list[list[str]]:
        """Those that elements pass through: the ones with whole accesses."""
        return [loop for loop in self.loops() if any(is_whole(text) for text in loop if is_global(text))]


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def is_global(text: str) -> bool:
    return re.match(r"LDG|STG|LD\.|ST\.", opcode(text)) is not None


def is_whole(text: str) -> bool:
    return ".128" in opcode(text)


def count(loop: list[str], pattern: str) -> int:
    return sum(re.match(pattern, opcode(text)) is not None for text in loop)


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    bundled = pathlib.Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return found or (str(bundled) if bundled and bundled.exists() else None)


def short(mangled: str) -> str:
    """The function's own name and its template's arguments: step_fullILb0ELb0E..."""
    rest = re.sub(r"^_ZN4uegr(\d+)", lambda m: f"{m[1]}|", mangled).split("|", 1)
    if len(rest) == 2:
        rest = [rest[1][int(rest[0]) :]]
    return re.sub(r"^\d+", "", rest[-1])


def kept(name: str, command: list, sources: list[pathlib.Path], make) -> pathlib.Path:
    """build/cuda_tests/NAME_HASH/, filled by make(folder) unless it was made of the same command and contents before."""
    digest = hashlib.sha256(repr((list(map(str, command)), torch.__version__)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = ROOT / "build/cuda_tests" / f"{name}_{digest.hexdigest()[:16]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        for old in folder.parent.glob(f"{name}_*"):
            shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as fresh:
            make(pathlib.Path(fresh))
            os.rename(fresh, folder)
    return folder


def compile_one(path: pathlib.Path, arch: str) -> pathlib.Path:
    """A folder with the compiler's report and the disassembly."""
    flags = ["-std=c++17", "-O3", "-cubin", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v", f"-arch={arch}"]
    command = ["nvcc", *flags, *DEFINITIONS, *INCLUDES, path]

    def make(folder: pathlib.Path) -> None:
        (folder / "report.txt").write_text(run(*command, "-o", folder / "cubin"))
        (folder / "sass.txt").write_text(run(cuobjdump(), "-sass", folder / "cubin") if cuobjdump() else "")

    return kept(f"{path.stem}_{arch}", [*command, nvcc_version(), cuobjdump()], [*HEADERS, path], make)


@functools.cache
def nvcc_version() -> str:
    return run("nvcc", "--version")


@functools.cache
def compile_all() -> dict:
    """(operator, architecture) -> the compile, running; the longest first."""
    jobs = sorted(((path, arch) for path in SOURCES.values() for arch in ARCHITECTURES), key=lambda job: -job[0].stat().st_size)
    return {(path.parent.name, arch): WORKERS.submit(compile_one, path, arch) for path, arch in jobs}


@functools.cache
def kernels(operator: str, arch: str) -> dict[str, Kernel]:
    folder = compile_all()[operator, arch].result()
    report = (folder / "report.txt").read_text()
    entries = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers", report, re.DOTALL
    )
    listing = (folder / "sass.txt").read_text()
    code = {}
    for part in listing.split("Function : ")[1:]:
        name, _, text = part.partition("\n")
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", text, re.MULTILINE)
        code[name.strip()] = [(int(address, 16), line.strip()) for address, line in lines]
    return {
        short(name): Kernel(short(name), int(registers), int(stack), int(spilled), code[name])
        for name, stack, spilled, registers in entries
    }


@pytest.fixture(params=ARCHITECTURES)
def arch(request) -> str:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed: the CUDA sources are not compiled here")
    return request.param


@pytest.fixture
def read(arch):
    """Reads an operator's kernels, compiled for one architecture."""
    if not cuobjdump():
        pytest.skip("cuobjdump, which comes with Triton and with the CUDA toolkit, is not installed")
    return lambda operator: kernels(operator, arch)


@pytest.mark.parametrize("operator", SOURCES)
def test_sources_compile_without_a_warning(arch, operator):
    report = (compile_all()[operator, arch].result() / "report.txt").read_text()
    assert "Compiling entry function" in report and "warning" not in report


@pytest.mark.parametrize("operator", SOURCES)
def test_full_blocks_keep_to_registers_and_whole_accesses(read, operator):
    found = {name: kernel for name, kernel in read(operator).items() if "_full" in name}
    assert found, "no kernel is named full"
    for name, kernel in found.items():
        assert (kernel.stack, kernel.spilled) == (0, 0), f"{name} spills"
        assert not [text for _, text in kernel.instructions if re.match(r"LDL|STL", opcode(text))], f"{name} uses local memory"
        loops = kernel.element_loops()
        assert loops, f"{name} has no loop over elements"
        accesses = [text for loop in loops for text in loop if is_global(text)]
        narrow = [text for text in accesses if not is_whole(text)]
        assert len(narrow) <= 0.05 * len(accesses), f"{name}: {narrow}"


def test_the_step_in_float32_is_light(read):
    found = {name: kernel for name, kernel in read("selective").items() if name.startswith("step_full")}
    assert len(found) == 7, found.keys()  # AdamW and SGD, target, AMSGrad or momentum; one pair has too many states
    for name, kernel in found.items():
        assert kernel.registers <= 48, f"{name}: {kernel.registers} registers"
        (loop,) = [loop for loop in kernel.element_loops() if count(loop, "STG")]
        assert len(loop) <= 4 * 70, f"{name}: {len(loop) / 4} instructions an element"
        assert 0 < count(loop, r"IMAD\.WIDE|IMAD\.HI") <= 4 * 5, f"{name}: wide multiplications"
        assert 0 < count(loop, "MUFU") <= 4 * 3, f"{name}: special functions"


def test_the_loss_takes_two_special_functions_a_logit(read):
    found = {name: kernel for name, kernel in read("divergence").items() if name.startswith("loss_full")}
    assert len(found) == 6, found.keys()  # a warp, a block, a cluster; one or two passes in the pairs
    for name, kernel in found.items():
        # A loop takes 8 logits of a row, or of two. What runs once a row, logarithms in double above all, stands outside.
        special = [(count(loop, "MUFU"), 8) for loop in kernel.loops() if count(loop, "MUFU")]
        reads = sum(count(loop, "LDG") > 0 for loop in kernel.element_loops())
        assert special and reads, name
        per_row = sum(n for n, _ in special) / (8 * reads)
        assert per_row <= 2, f"{name}: {per_row} special functions a logit"


# ---- What they compute, on a host


@pytest.fixture(scope="session")
def on_host() -> pathlib.Path:
    """The CUDA operators compiled for a CPU, under the name of the baseline's library."""
    if not shutil.which("c++") or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
    stand_ins = ['-DLOOPS="loops_cuda.cuh"', '-DINSTRUCTIONS="instructions.h"']
    definitions = [*DEFINITIONS, "-DHAS_CLUSTERS=1", "-DARCHITECTURES=8.0/9.0a/10.0+PTX", *stand_ins]
    command = ["c++", *flags, *definitions, *INCLUDES, "-Ipython_tests/cuda_on_host", "-x", "c++", "-c"]
    host = ROOT / "python_tests/cuda_on_host"
    sources = [*SOURCES.values(), host / "library.cpp"]

    def make(folder: pathlib.Path) -> None:
        objects = [folder / f"{path.stem}.o" for path in sources]
        list(WORKERS.map(lambda pair: run(*command, pair[0], "-o", pair[1]), zip(sources, objects, strict=True)))
        link = ("-Wl,-Bsymbolic", "-Wl,-z,defs", "-Wl,--no-as-needed", f"-L{TORCH}/lib", "-ltorch_cpu")
        run("c++", "-shared", *objects, "-o", folder / "uegr_kernels_baseline.so", *link)

    return kept("on_host", command, [*HEADERS, *sources, *sorted(host.glob("*.h"))], make)


def test_every_function_of_both_sides_runs_on_a_host():
    """A function for hosts and devices is called by what a host compiles: the CPU's sources, the CUDA sources above, the bindings."""
    headers = {path: path.read_text() for path in (ROOT / "csrc").rglob("*.h")}
    code = "\n".join(
        [*headers.values(), *(path.read_text() for ending in ("cpp", "cu", "cuh") for path in (ROOT / "csrc").rglob(f"*.{ending}"))]
    )
    names = {name for text in headers.values() for name in re.findall(r"(?:HOST_DEVICE|CALLED_ON_BOTH)\b[^;={}()\n]*?(\w+)\(", text)}
    assert {"philox", "power_of_two", "drawn_factor", "add_log_ratios", "direction_factor", "dropped"} <= names
    for name in names:
        definitions = len(re.findall(rf"(?:HOST_DEVICE|CALLED_ON_BOTH)\b[^;={{}}()\n]*?\b{name}\(", code))
        assert len(re.findall(rf"\b{name}\b", code)) > definitions, f"nothing calls {name}"


# A choice of each operator's own tests: every option, dtype and layout comes up in the random cases; float64 is not for these kernels.
CHOICES = {
    "selective": "random_cases_agree or neutral_equals_torch or global_rank or (previous and strided) or nonfinite",
    "divergence": "half_precision or parts or regression or as_labels or ignored or minus_infinity or literals or backward_writes",
    "perturbation": "not number_of_threads",  # which is for large tensors
    "dropout": "cpp",
}


def pytest_on(library: pathlib.Path | None, *arguments, **variables) -> None:
    """The CPU's tests run on a library of CUDA operators for a host, or on the CPU's own."""
    environment = {
        **os.environ,
        **variables,
        "CUDA_ON_HOST": str(library),
        "UEGR_KERNELS_ISA": "baseline",
        "PYTHONPATH": f"{ROOT / 'python_tests/cuda_on_host'}{os.pathsep}{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    options = ("-q", "-x", "-p", "no:cacheprovider", *(("-p", "plugin") if library else ()))
    assert " passed" in run(sys.executable, "-m", "pytest", *options, *arguments, env=environment)


@pytest.mark.parametrize("operator", CHOICES)
def test_what_they_compute_passes_the_tests_of_the_cpu(on_host, operator):
    pytest_on(on_host, "-k", f"cpp and not float64 and ({CHOICES[operator]})", ROOT / f"python_tests/test_{operator}.py")


def test_what_they_compute_of_long_rows_and_many_items(on_host):
    pytest_on(on_host, ROOT / "python_tests/cuda_on_host/large.py")


@pytest.mark.parametrize("on_gpu", [True, False], ids=["cuda", "cpp"])
def test_what_would_stay_as_it_is_is_not_written(request, on_gpu):
    pytest_on(request.getfixturevalue("on_host") if on_gpu else None, ROOT / "python_tests/cuda_on_host/unwritten.py")


def test_a_gpu_that_the_library_has_no_code_for_is_served_by_others(on_host):
    pytest_on(on_host, ROOT / "python_tests/cuda_on_host/without_code.py", CUDA_ON_HOST_REFUSES="code")


# ---- The package around them


def test_a_torch_without_cuda_never_loads_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(native, "LIBRARIES", tmp_path)
    (tmp_path / "uegr_kernels_cuda.so").write_text("no library")
    assert native.why_not_cuda.__wrapped__() == "this torch is built without CUDA; install a CUDA build of torch"


def test_a_missing_library_is_one_sentence_with_reason_and_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "LIBRARIES", tmp_path)
    assert re.fullmatch(
        r"the CUDA library was not built: .* \(install the CUDA toolkit, for nvcc\); .*pip install.*", native.why_not_cuda.__wrapped__()
    )
    (tmp_path / "cuda_not_built.txt").write_text("the cat sat on nvcc (lift the cat)\n")
    assert "was not built: the cat sat on nvcc (lift the cat); " in native.why_not_cuda.__wrapped__()
    (tmp_path / "uegr_kernels_cuda.so").write_text("no library")
    assert "does not load into torch" in native.why_not_cuda.__wrapped__()


def test_float64_is_refused_with_a_reason():
    reason = backends.why_not("cuda", "selective.selective_adamw_", torch.device("cuda"), torch.float64)
    assert "float64" in reason and "triton" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fake_tensors_of_a_gpu_are_served(monkeypatch, dtype):
    pytest.importorskip("triton")  # the reference needs more of a GPU than a CPU build of torch can feign
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    torch.compiler.reset()
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, device="cuda", dtype=dtype)
        dropout = uk.AdaptiveDropout(4)
        dropout.gradient_norm, dropout.pending = torch.empty(2, 4, device="cuda")  # a CPU build of torch cannot move a module
        for call in (
            lambda: uk.pairwise_js(x),
            lambda: uk.fgm_perturbation(x, 0.1),
            lambda: uk.selection_mask(x, seed=1, step=1),
            lambda: dropout(x),
        ):
            for served in (call(), torch.compile(call, backend="eager", fullgraph=True)()):
                assert served.device.type == "cuda"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("8.0", ["-gencode arch=compute_80,code=sm_80"]),
        ("9.0a 10.0+PTX", [f"-gencode arch=compute_{code.split('_')[1]},code={code}" for code in ("sm_90a", "sm_100", "compute_100")]),
    ],
)
def test_the_build_takes_architectures_as_torch_does(names, words):
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "csrc/build_cuda.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert build.architectures(names) == words
    with pytest.raises(ValueError, match="'Hopper' .*give numbers"):
        build.architectures("8.0;Hopper")
