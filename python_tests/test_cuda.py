"""The CUDA kernels without a GPU: what nvcc and the disassembly say of them, and what they compute as their threads take turns on a host.

Tests that need a GPU stand at the end and skip without one.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

import uegr_kernels as uk
from uegr_kernels.core import backends, native

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = {path.parent.name: path for path in sorted((ROOT / "csrc").glob("*/*_cuda.cu"))}
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
TORCH = pathlib.Path(torch.__file__).parent
DEFINITIONS = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA")
INCLUDES = ("-Icsrc", "-isystem", f"{TORCH}/include")
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


@functools.cache
def compile_all(folder: pathlib.Path) -> dict:
    """(operator, architecture) -> the compile, running."""
    flags = ("-std=c++17", "-O3", "-cubin", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v")
    jobs = sorted(((path, arch) for path in SOURCES.values() for arch in ARCHITECTURES), key=lambda job: -job[0].stat().st_size)
    return {
        (path.parent.name, arch): WORKERS.submit(
            run, "nvcc", *flags, f"-arch={arch}", *DEFINITIONS, *INCLUDES, path, "-o", folder / f"{path.parent.name}_{arch}.cubin"
        )
        for path, arch in jobs
    }


@functools.cache
def kernels(folder: pathlib.Path, operator: str, arch: str) -> dict[str, Kernel]:
    report = compile_all(folder)[operator, arch].result()
    entries = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers", report, re.DOTALL
    )
    listing = run(cuobjdump(), "-sass", folder / f"{operator}_{arch}.cubin")
    code = {}
    for part in listing.split("Function : ")[1:]:
        name, _, text = part.partition("\n")
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", text, re.MULTILINE)
        code[name.strip()] = [(int(address, 16), line.strip()) for address, line in lines]
    return {
        short(name): Kernel(short(name), int(registers), int(stack), int(spilled), code[name])
        for name, stack, spilled, registers in entries
    }


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed: the CUDA sources are not compiled here")
    return tmp_path_factory.mktemp("cubins")


@pytest.fixture(params=ARCHITECTURES)
def read(request, compiled):
    """Reads an operator's kernels, compiled for one architecture."""
    if not cuobjdump():
        pytest.skip("cuobjdump, which comes with Triton and with the CUDA toolkit, is not installed")
    return lambda operator: kernels(compiled, operator, request.param)


@pytest.mark.parametrize("operator", SOURCES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sources_compile_without_a_warning(compiled, operator, arch):
    assert "Compiling entry function" in compile_all(compiled)[operator, arch].result()


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
def on_host(tmp_path_factory) -> pathlib.Path:
    """The CUDA operators compiled for a CPU, under the name of the baseline's library."""
    if not shutil.which("c++") or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux")
    folder = tmp_path_factory.mktemp("on_host")
    flags = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE")
    definitions = (*DEFINITIONS, "-DHAS_CLUSTERS=1", '-DLOOPS="loops_cuda.cuh"')
    sources = [*SOURCES.values(), ROOT / "python_tests/cuda_on_host/library.cpp"]
    objects = [folder / f"{path.stem}.o" for path in sources]
    compile_one = functools.partial(run, "c++", *flags, *definitions, *INCLUDES, "-Ipython_tests/cuda_on_host", "-x", "c++", "-c")
    list(WORKERS.map(lambda pair: compile_one(pair[0], "-o", pair[1]), zip(sources, objects, strict=True)))
    link = ("-Wl,-Bsymbolic", "-Wl,-z,defs", "-Wl,--no-as-needed", f"-L{TORCH}/lib", "-ltorch_cpu")
    run("c++", "-shared", *objects, "-o", folder / "uegr_kernels_baseline.so", *link)
    return folder


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
    "selective": "test_random_cases_agree or test_neutral_equals_torch or test_global_rank or (previous and strided) or nonfinite",
    "divergence": "not looks_at_the_labels",  # which takes the host to the device's values
    "perturbation": "cpp",
    "dropout": "cpp",
}


@pytest.mark.parametrize("operator", [*CHOICES, "large"])
def test_what_they_compute_passes_the_tests_of_the_cpu(on_host, operator):
    environment = {
        **os.environ,
        "CUDA_ON_HOST": str(on_host),
        "UEGR_KERNELS_ISA": "baseline",
        "PYTHONPATH": f"{ROOT / 'python_tests/cuda_on_host'}{os.pathsep}{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    options = ("-q", "-x", "-p", "plugin", "-p", "no:cacheprovider")
    if operator == "large":
        test = ROOT / "python_tests/cuda_on_host/large.py"
    else:
        test = ROOT / f"python_tests/test_{operator}.py"
        options += ("-k", f"cpp and not float64 and ({CHOICES[operator]})")
    assert " passed" in run(sys.executable, "-m", "pytest", *options, test, env=environment)


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


# ---- On a GPU


@pytest.fixture
def gpu() -> torch.device:
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here")
    reason = backends.why_not("cuda", "selective.selective_adamw_", device)
    if reason is not None:
        pytest.skip(f"cuda: {reason}")
    return device


def model(device: torch.device, dtype=torch.float32) -> list[torch.nn.Parameter]:
    shapes = (1 << 20, 1023, 3, 4096, 1, 0, 70_001)
    return [torch.nn.Parameter(torch.randn(n, device=device, dtype=dtype)) for n in shapes]


OPTIONS = [
    {},
    {"statistics": "previous"},
    {"normalization": "rank"},
    {"normalization": "constant", "keep_probability": 0.3},
    {"scope": "global", "direction": "salient"},
    {"target": "update", "rescale": False, "amsgrad": True},
    {"state_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_steps_agree_with_the_cpus(gpu, options, dtype):
    ours = model(gpu, dtype)
    theirs = [torch.nn.Parameter(p.detach().cpu()) for p in ours]
    optimizers = [uk.SelectiveAdamW(ps, seed=5, **options) for ps in (ours, theirs)]
    for step in range(3):
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            p.grad = q.grad.to(gpu)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        wrong = ~torch.isclose(p.detach().cpu().float(), q.detach().float(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)
        assert wrong.sum() <= 1 + 2e-6 * wrong.numel()  # u and p closer than 2^-22


def test_gpu_masks_equal_the_references(gpu):
    g = torch.randn(1 << 20)
    masks = [uk.selection_mask(x, seed=3, step=7, backend=b).cpu() for x, b in ((g.to(gpu), "cuda"), (g, "reference"))]
    assert (masks[0] != masks[1]).sum() <= 2


def test_gpu_graph_replay_equals_eager(gpu):
    torch.manual_seed(0)
    ours = model(gpu)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    gradients = [torch.randn_like(p) for p in ours]
    for ps in (ours, theirs):
        for p, g in zip(ps, gradients, strict=True):
            p.grad = g.clone()
    captured, eager = (uk.SelectiveAdamW(ps, seed=5, capturable=True) for ps in (ours, theirs))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        eager.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("classes", [10, 1000, 5000, 50_257, 128_256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_losses_agree_with_the_reference(gpu, classes, dtype):
    clean, adversarial = (torch.randn(*shape, 8, classes, device=gpu, dtype=dtype) for shape in ((), (2,)))
    labels = torch.randint(classes, (8,), device=gpu)
    found = []
    for backend in ("cuda", "reference"):
        x, y = (t.clone().requires_grad_() for t in (clean, adversarial))
        loss = uk.uegr_loss(x, y, labels, js_weight=1.0, label_smoothing=0.1, backend=backend)
        loss.backward()
        found.append((loss.detach(), x.grad, y.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def test_gpu_tensors_past_32_bits(gpu):
    n = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 20 * n:
        pytest.skip("the GPU has too little memory")
    p = torch.nn.Parameter(torch.zeros(n, device=gpu, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    uk.SelectiveAdamW([p], lr=1.0, weight_decay=0.0, normalization="constant", state_dtype=torch.bfloat16, seed=1).step()
    assert (p.detach()[[0, 2**31 - 1, 2**31, n - 1]] == -1).all()


def test_gpu_memory_is_clean_under_the_sanitizer(gpu):
    sanitizer = shutil.which("compute-sanitizer")
    if not sanitizer:
        pytest.skip("compute-sanitizer, which comes with the CUDA toolkit, is not installed")
    program = "import torch, uegr_kernels as uk; p = torch.nn.Parameter(torch.ones(70001, device='cuda')); p.grad = torch.randn_like(p); "
    program += "uk.SelectiveAdamW([p], seed=1, backend='cuda').step(); x = torch.randn(2, 8, 5000, device='cuda', requires_grad=True); "
    program += "uk.pairwise_js(x, backend='cuda').backward(); torch.cuda.synchronize()"
    for tool in ("memcheck", "racecheck"):
        run(sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", program)
