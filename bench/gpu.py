"""`python -m bench.gpu`: checks the machine, builds, runs the GPU tests and benchmarks, writes JSON, a table and pictures, in 8 minutes."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import uegr_kernels as uk
from uegr_kernels.core import backends

from . import harness, shapes
from .bench_divergence import ours, plain
from .machine import no_gpu

NO_GPU = 3
SECONDS = 450  # for everything; 8 minutes with what starting and stopping take
TESTS = 180  # of them, at most
ROUNDS = 20


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 where a test failed or ours was wrong; 2 for wrong arguments; 3 where there is no GPU."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Everything that needs a GPU. Exit status 3: there is none.")
    parser.add_argument("--output", metavar="DIR", type=pathlib.Path, default=harness.ROOT / "build" / "gpu", help="default: build/gpu")
    parser.add_argument("--skip-tests", action="store_true", help="benchmarks alone")
    options = parser.parse_args(arguments)
    until = time.monotonic() + SECONDS
    options.output.mkdir(parents=True, exist_ok=True)
    about = harness.environment(shlex.join(["python", "-m", "bench.gpu", *arguments])) | machine()
    report(options.output, about, [], None)
    if about["no_gpu"]:
        print(f"No GPU was found: {about['no_gpu']}. No test and no benchmark was run; {options.output / 'gpu.json'} says the same.")
        return NO_GPU
    print(f"{about['gpu']}, driver {about['driver']}, torch {about['versions']['torch']}", flush=True)
    about["build"] = build()
    print(about["build"], flush=True)
    tests = None if options.skip_tests else run_tests(options.output, min(TESTS, until - time.monotonic()))
    lines: list[dict] = []
    report(options.output, about, lines, tests)
    for name, case in CASES.items():
        if time.monotonic() > until - 20:
            lines.append({"case": name, "skipped": "no time was left"})
            continue
        try:
            lines.append({"case": name} | case(until))
        except (RuntimeError, ValueError) as error:  # one case that cannot run leaves the others their turn
            lines.append({"case": name, "error": str(error).splitlines()[0]})
        torch.cuda.empty_cache()
        print(row(lines[-1]), flush=True)
        report(options.output, about, lines, tests)
    pictures(options.output, lines)
    print(f"Written: {options.output}")
    return int(any("error" in line for line in lines) or (tests is not None and tests["status"] != 0))


def machine() -> dict:
    """What this machine has, and why it cannot run a GPU's work, or None."""
    found: dict = {"no_gpu": no_gpu(), "nvcc": shutil.which("nvcc"), "triton": None}
    if importlib.util.find_spec("triton"):
        found["triton"] = importlib.metadata.version("triton")
    if found["no_gpu"] is None:
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory": properties.total_memory, "processors": properties.multi_processor_count}
        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "driver": driver(), "device": "cuda"}
        found["backend"] = backends.choose("auto", "selective.selective_adamw_", torch.device("cuda"), torch.float32)
    return found


def driver() -> str:
    """The driver's version, by the tool that comes with it."""
    for command in (["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], ["rocm-smi", "--showdriverversion"]):
        if shutil.which(command[0]):
            return subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()[-1]
    return "unknown"


def build() -> str:
    """Compiles in place what this machine can compile, for its own GPU alone; a failure leaves Triton."""
    try:
        own = ".".join(map(str, torch.cuda.get_device_capability()))
        run = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=harness.ROOT,
            env={"TORCH_CUDA_ARCH_LIST": own} | os.environ,
            capture_output=True,
            text=True,
            timeout=180,
        )
    except subprocess.TimeoutExpired:
        return "build: stopped after three minutes"
    return "build: done" if run.returncode == 0 else f"build: failed: {run.stderr.strip().splitlines()[-1:]}"


def run_tests(output: pathlib.Path, seconds: float) -> dict:
    """Every test with "gpu" in its name, on compiled kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "gpu", "python_tests"]
    log = output / "tests.txt"
    with log.open("w") as file:
        try:
            environment = os.environ | {"TRITON_INTERPRET": "0"}
            status = subprocess.run(command, cwd=harness.ROOT, env=environment, stdout=file, stderr=file, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            status = 124
    last = log.read_text().strip().splitlines()[-1:] or ["nothing was printed"]
    print(f"tests: {last[0]}", flush=True)
    return {"status": status, "summary": last[0] if status != 124 else f"stopped after {seconds:.0f} seconds"}


# ---- Timing.


def events(step: Callable[[], object]) -> float:
    """Seconds a step takes on the GPU; a second's thousandth of other work ahead of it hides the launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def alternate(steps: dict[str, Callable[[], object]], must_move: int, until: float) -> dict:
    """Medians of each, taken in turns, and the copy bandwidth of the same minutes."""
    for step in steps.values():
        for _ in range(3):
            step()
    source, target = (torch.empty(2**28, device="cuda") for _ in range(2))
    steps = steps | {"copy": lambda: target.copy_(source)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(events(step))
        if time.monotonic() > until - 10:
            break
    copied = 2 * 4 * len(source) / statistics.median(times.pop("copy"))
    first = next(iter(times))
    found = {}
    for name, values in times.items():
        rate = must_move / statistics.median(values)
        found[name] = {"seconds": harness.spread(values), "gb_s": rate / 1e9, "copy_share": rate / copied}
        if name != first:
            found[name]["ours_over_this"] = harness.spread([a / b for a, b in zip(times[first], values, strict=True)])
    return {"bytes": must_move, "copy_gb_s": copied / 1e9, "contestants": found}


def step_case(
    tensors: shapes.Shapes = shapes.MODELS["BERT-large"], dtype: torch.dtype = torch.float32, **options
) -> Callable[[float], dict]:
    """A step beside torch's fused one."""

    def case(until: float) -> dict:
        params = [torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in tensors]
        for p in params:
            p.grad = torch.randn_like(p)
        moments = {} if dtype == torch.float32 else {"state_dtype": dtype}
        mine = uk.SelectiveAdamW(params, seed=1, capturable=True, **moments, **options)
        fused = torch.optim.AdamW(params, fused=True, capturable=True)
        return alternate({"uegr_kernels": mine.step, "torch fused": fused.step}, 7 * dtype.itemsize * sum(p.numel() for p in params), until)

    return case


def sweep(until: float) -> dict:
    """Warps and the size of a group of tensors in the Triton step."""
    from uegr_kernels.core import triton_ops

    params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes.MODELS["BERT-large"]]
    for p in params:
        p.grad = torch.randn_like(p)
    steps = {}

    def setting(warps: int, group: int) -> Callable[[], object]:
        optimizer = uk.SelectiveAdamW(params, seed=1, backend="triton")

        def step() -> None:
            triton_ops.WARPS, triton_ops.GROUP_BYTES = warps, group
            optimizer.step()

        return step

    before = triton_ops.WARPS, triton_ops.GROUP_BYTES
    everything = [before, *((warps, group << 20) for warps in (2, 4, 8) for group in (8, 16, 24, 32))]
    steps = {f"{warps} warps, {group >> 20} MiB": setting(warps, group) for warps, group in dict.fromkeys(everything)}
    try:
        return alternate(steps, 28 * sum(p.numel() for p in params), until)
    finally:
        triton_ops.WARPS, triton_ops.GROUP_BYTES = before


def loss_case(m: int, n: int, c: int, dtype: torch.dtype) -> Callable[[float], dict]:
    """The UEGR loss, forward and backward, beside what one writes with torch's functions."""

    def case(until: float) -> dict:
        leaves = [torch.randn(*shape, c, device="cuda", dtype=dtype).requires_grad_() for shape in ((n,), (m, n))]
        labels = torch.randint(c, (n,), device="cuda")

        def step(loss: Callable) -> Callable[[], object]:
            def run() -> None:
                for leaf in leaves:
                    leaf.grad = None
                loss(*leaves, labels).backward()

            return run

        rows = min(n, 8)
        small = [leaf.detach()[..., :rows, :] for leaf in leaves]
        gap = float((ours(*small, labels[:rows]) - plain(*(leaf.double() for leaf in small), labels[:rows])).abs())
        if gap > 1e-3:
            raise ValueError(f"ours and the plain functions disagree by {gap:.1e}")
        peers = {"torch.compile": step(torch.compile(plain, fullgraph=True, dynamic=False)), "eager": step(plain)}
        return alternate({"uegr_kernels": step(ours)} | peers, 2 * (m + 1) * n * c * dtype.itemsize, until)

    return case


def perturbation(until: float) -> dict:
    g = torch.randn(16, 128, 768, device="cuda")

    def eager() -> torch.Tensor:
        return 0.1 * torch.nn.functional.normalize(g.view(16, -1)).view_as(g)

    return alternate({"uegr_kernels": lambda: uk.fgm_perturbation(g, 0.1), "eager": eager}, 8 * g.numel(), until)


def dropout_case(dtype: torch.dtype) -> Callable[[float], dict]:
    def case(until: float) -> dict:
        x = torch.randn(16, 128, 3072, device="cuda", dtype=dtype).requires_grad_()
        upstream = torch.randn_like(x)

        def step(dropout: Callable) -> Callable[[], object]:
            def run() -> None:
                x.grad = None
                dropout(x).backward(upstream)

            return run

        steps = {"uegr_kernels": step(uk.AdaptiveDropout(3072, 0.3).cuda()), "torch": step(torch.nn.Dropout(0.3))}
        return alternate(steps, 4 * x.numel() * dtype.itemsize, until)

    return case


CASES: dict[str, Callable[[float], dict]] = {
    "step, BERT-large": step_case(),
    "step, BERT-large, previous": step_case(statistics="previous"),
    "step, BERT-large, previous, Triton": step_case(statistics="previous", backend="triton"),
    "step, BERT-large, Triton": step_case(backend="triton"),
    "step, BERT-large, bfloat16": step_case(dtype=torch.bfloat16),
    "step, one tensor of 1e9": step_case([(10**9,)]),
    "loss, m=2, N=4096, C=32000, bfloat16": loss_case(2, 4096, 32000, torch.bfloat16),
    "loss, m=2, N=4096, C=128256, bfloat16": loss_case(2, 4096, 128256, torch.bfloat16),
    "loss, m=2, N=4096, C=128256, float32": loss_case(2, 4096, 128256, torch.float32),
    "loss, m=2, N=16, C=2, float32": loss_case(2, 16, 2, torch.float32),
    "perturbation, 16 x 128 x 768": perturbation,
    "dropout, 16 x 128 x 3072, float32": dropout_case(torch.float32),
    "dropout, 16 x 128 x 3072, bfloat16": dropout_case(torch.bfloat16),
    "sweep of the Triton step": sweep,
}


# ---- What is written.


def row(line: dict) -> str:
    """A case in the table, a row per contestant."""
    reason = line.get("error") or line.get("skipped")
    if reason:
        return f"| {line['case']} | {reason} | | | |"
    rows = []
    for name, one in line["contestants"].items():
        ratio = one["ours_over_this"]["median"] if "ours_over_this" in one else None
        figures = f"{1e6 * one['seconds']['median']:,.1f} | {'' if ratio is None else f'{ratio:.3f}'} | {one['copy_share']:.0%}"
        rows.append(f"| {line['case']} | {name} | {figures} |")
    return "\n".join(rows)


def report(output: pathlib.Path, about: dict, lines: list[dict], tests: dict | None) -> None:
    """gpu.json and gpu.md, whole, after every case."""
    (output / "gpu.json").write_text(json.dumps(about | {"tests": tests, "results": lines}, indent=1) + "\n")
    texts = ["# GPU", about["no_gpu"] and f"No GPU was found: {about['no_gpu']}.", tests and f"Tests: {tests['summary']}"]
    if not about["no_gpu"]:
        texts.append(f"{about['gpu']}, driver {about['driver']}, torch {about['versions']['torch']}, {about['commit']}")
        head = "| case | | us | ours / this | of a copy |\n| --- | --- | --- | --- | --- |"
        texts.append("\n".join([head, *map(row, lines)]))
    (output / "gpu.md").write_text("\n\n".join(filter(None, texts)) + "\n")


def pictures(output: pathlib.Path, lines: list[dict]) -> None:
    """A bar chart of each case's medians; without matplotlib there are none."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for number, line in enumerate(line for line in lines if "contestants" in line):
        figure, axes = pyplot.subplots(figsize=(7, 1 + 0.4 * len(line["contestants"])))
        axes.barh(list(line["contestants"]), [1e6 * one["seconds"]["median"] for one in line["contestants"].values()])
        axes.invert_yaxis()
        axes.set(title=line["case"], xlabel="microseconds, median")
        figure.savefig(output / f"gpu-{number}.png", bbox_inches="tight", dpi=120)
        pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
