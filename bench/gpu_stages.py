"""Runs `python -m bench.gpu_stages CASE`: one thing that a GPU is to show, in a process of its own;
bench/gpu.py runs them all.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import uegr_kernels as uk
from uegr_kernels.core import backends, native

from . import (
    bench_divergence,
    bench_dropout,
    bench_perturbation,
    bench_selective,
    gpu_clusters,
    harness,
    machine,
    shapes,
    timer,
)
from .gpu_runner import END, WRONG_BACKEND, answer

OPERATOR = "selective.selective_adamw_"
# One of each folder: all are in one library.
OPERATORS = ("selective_adamw_", "uegr_loss", "fgm_perturbation_", "adaptive_dropout")
BRAIN = torch.bfloat16
# seconds from a benchmark's last round to its limit
CLOSING = 2.5
# by which --small divides the larger sizes
FACTOR = 64


@dataclasses.dataclass(frozen=True)
class Place:
    """Says where a case runs, with which backend of ours, at which size, and until when."""

    device: str = "cuda"
    # "auto" on the CPU
    backend: str = "cuda"
    small: bool = False
    # by time.monotonic(): no round of a benchmark begins after it
    until: float = math.inf
    # with torch.compile among the peers
    compiled: bool = False
    # only call it once: what it compiles stays in its cache
    compile_alone: bool = False
    # under a profiler of kernels
    counters: bool = False


class Disagreement(Exception):
    """Says that ours is wrong."""


def agree(found: Tensor, expected: Tensor, what: str, allowed: float = 1e-5) -> None:
    gap = float(
        (found.double() - expected.double()).abs().max()
        / expected.double().abs().max().clamp_min(1e-30)
    )
    if not gap <= allowed:
        raise Disagreement(f"{what} by {gap:.1e} of its largest")


def nothing_wrong(reason: str | None) -> None:
    if reason:
        raise Disagreement(reason)


def wait(at: Place) -> None:
    if at.device == "cuda":
        torch.cuda.synchronize()


# ---- The probe


def probe(no_gpu: str | None) -> dict:
    """Tells what the machine and the package have; `no_gpu`: the reason not to touch a GPU."""
    said: dict = {"no_gpu": no_gpu, "torch": torch.__version__, "cuda": torch.version.cuda}
    said |= {
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "nvcc": shutil.which("nvcc"),
        "triton": None,
    }
    if importlib.util.find_spec("triton"):
        said["triton"] = triton_version()
    said |= {"backends": {"cuda": unloaded()}, "commit": harness.environment("probe")["commit"]}
    if no_gpu is None:
        device = torch.device("cuda", 0)
        said["backends"] = {
            name: backends.why_not(name, OPERATOR, device) for name in ("cuda", "triton")
        }
        said["backends"]["auto"] = backends.choose("auto", OPERATOR, device)
        properties = torch.cuda.get_device_properties(0)
        said |= {
            "gpu": properties.name,
            "memory": properties.total_memory,
            "processors": properties.multi_processor_count,
        }
        said |= {"l2": getattr(properties, "L2_cache_size", None), "driver": driver()}
        said["shared_memory"] = getattr(properties, "shared_memory_per_block_optin", None)
        said["capability"] = (
            ".".join(map(str, torch.cuda.get_device_capability())) if torch.version.cuda else None
        )
        # ahead of the first kernel
        answer(said)
        said["copy_rate"] = timer.spread(machine.Copy(2**30, "cuda")(5))["median"]
    return said


def unloaded() -> str | None:
    """Tells why the CUDA library is not loaded, or what it lacks, or None; asks no GPU."""
    lacking = [name for name in OPERATORS if not native.has_kernel(name, "CUDA")]
    return native.why_not_cuda() or (
        f"the CUDA library has no {', '.join(lacking)}" if lacking else None
    )


def triton_version() -> str | None:
    """Returns its distribution's, which has another name in ROCm's and nightly builds."""
    for name in ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "of an unknown version"


def driver() -> str | None:
    """Returns the driver's version, by the tool that comes with it, where it answers."""
    for command in (
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        ["rocm-smi", "--showdriverversion"],
    ):
        if shutil.which(command[0]):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                lines = subprocess.run(
                    command, capture_output=True, text=True, errors="replace", timeout=5
                ).stdout.split("\n")
                return next((line.strip() for line in reversed(lines) if line.strip()), None)
    return None


# ---- Smoke: does each operator run, and is it right?


def clusters(at: Place) -> dict:
    """Tells how many clusters run at once, by size; no more than a fact."""
    found = {"all": "asked of a GPU alone"} if at.device == "cpu" else gpu_clusters.clusters()
    return {
        "said": "clusters at once: "
        + ", ".join(f"{size}: {number}" for size, number in found.items())
    }


def mask(at: Place) -> None:
    """Compares the masks: u and p closer than 2^-22 may decide otherwise."""
    g = torch.randn(1 << (12 if at.small else 20), generator=torch.Generator().manual_seed(0))
    found = uk.selection_mask(g.to(at.device), seed=3, step=7, backend=at.backend).cpu()
    wrong = int((found != uk.selection_mask(g, seed=3, step=7, backend="reference")).sum())
    nothing_wrong(f"{wrong} of {len(g)} elements are selected otherwise" if wrong > 2 else None)


def step(at: Place, dtype: torch.dtype = torch.float32, **options) -> None:
    def optimizer(params: list[Tensor], backend: str) -> torch.optim.Optimizer:
        return uk.SelectiveAdamW(params, 1e-3, seed=0, backend=backend, **options)

    nothing_wrong(bench_selective.disagreement(optimizer, dtype, at.device, at.backend))


def loss(at: Place, classes: int) -> None:
    classes = max(10, classes // (FACTOR if at.small else 1))
    for dtype in (torch.float32, BRAIN):
        nothing_wrong(
            bench_divergence.logits_case(
                2, classes, 8, at.device, dtype, backend=at.backend
            ).verify()
        )


def fgm(at: Place) -> None:
    nothing_wrong(
        bench_perturbation.fgm("", (3, 70, 24), torch.float32, at.device, at.backend).verify()
    )


def pgd(at: Place) -> None:
    delta, g = torch.randn(2, 3, 70, 24, generator=torch.Generator().manual_seed(0)).to(at.device)
    found, expected = (
        uk.pgd_step(delta, g, step_size=0.1, radius=0.3, backend=b)
        for b in (at.backend, "reference")
    )
    agree(found, expected, "the perturbation")


def dropout(at: Place) -> None:
    for units in (24, 1001):
        nothing_wrong(
            bench_dropout.case("", (40, units), torch.float32, at.device, at.backend).verify()
        )


def captured(at: Place, function: Callable[[], object]) -> Callable[[], object]:
    """Returns what replays a function's kernels; on the CPU, the function. Capturing runs none of
    them.
    """
    if at.device == "cpu":
        return function
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def graph(at: Place) -> None:
    """Checks that replays between eager steps make what eager steps alone make."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((5, 41), (1025,), (70_001,))]
    gradients = [
        [torch.randn(p.shape, generator=generator).to(at.device) for p in start] for _ in range(5)
    ]
    results = []
    for replaying in (False, True):
        params = [torch.nn.Parameter(p.to(at.device)) for p in start]
        rate = torch.tensor(0.1, device=at.device)
        optimizer = uk.SelectiveAdamW(
            params, rate, seed=1, capturable=True, threshold=0.5, backend=at.backend
        )
        static = [torch.empty_like(p) for p in start]
        static = [g.to(at.device) for g in static]

        def one(
            grads: list[Tensor], params: list = params, optimizer: torch.optim.Optimizer = optimizer
        ) -> None:
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()

        one(gradients[0])
        replay = captured(at, functools.partial(one, static)) if replaying else None
        for k in range(1, 5):
            if replay and k % 2:
                torch._foreach_copy_(static, gradients[k])
                replay()
            else:
                one(gradients[k])
        wait(at)
        results.append([p.detach().cpu() for p in params])
    for i, (eager, replayed) in enumerate(zip(*results, strict=True)):
        nothing_wrong(
            None
            if torch.equal(eager, replayed)
            else f"parameter {i} of replayed steps differs from that of eager steps"
        )


def capture(at: Place) -> None:
    """Checks that a kernel's first call of the process stands in a graph: it is loaded while the
    graph is captured.
    """
    g = torch.randn(3, 70, 24, generator=torch.Generator().manual_seed(0)).to(at.device)
    out: list[Tensor] = []
    replay = captured(at, lambda: out.append(uk.fgm_perturbation(g, 0.1, backend=at.backend)))
    replay()
    agree(out[-1], uk.fgm_perturbation(g, 0.1, backend="reference"), "the captured perturbation")
    p = torch.nn.Parameter(torch.ones(70_001, device=at.device))
    p.grad = torch.linspace(-1, 1, 70_001, device=at.device)
    optimizer = uk.SelectiveAdamW([p], seed=1, capturable=True, backend=at.backend)
    captured(at, optimizer.step)()
    wait(at)
    q = torch.nn.Parameter(torch.ones(70_001, device=at.device))
    q.grad = p.grad.clone()
    uk.SelectiveAdamW([q], seed=1, capturable=True, backend=at.backend).step()
    agree(p.detach(), q.detach(), "the parameter after a captured first step", 0.0)


def sanitized(at: Place) -> None:
    """Runs every kernel on a little, for compute-sanitizer to look at; where it does not know the
    GPU, nothing of torch's runs either.
    """
    torch.ones(1, device=at.device).item()
    answer({"begun": True})
    brain = {"state_dtype": BRAIN}
    for options in (
        {},
        {"statistics": "previous"},
        {"normalization": "rank"},
        {"scope": "global"},
        brain,
    ):
        p = torch.nn.Parameter(torch.ones(70_001, device=at.device))
        p.grad = torch.randn_like(p)
        uk.SelectiveAdamW([p], seed=1, backend=at.backend, **options).step()
    for classes in (40, 2000, 20_000):
        x = torch.randn(
            2, 8, classes // (FACTOR if at.small else 1) + 1, device=at.device, requires_grad=True
        )
        uk.pairwise_js(x, backend=at.backend).backward()
    delta = torch.zeros_like(x.detach())
    uk.fgm_perturbation(delta + 1, 0.1, backend=at.backend)
    uk.pgd_step(delta, delta + 1, step_size=0.1, radius=0.3, backend=at.backend)
    x = torch.randn(100, 24, device=at.device, requires_grad=True)
    uk.AdaptiveDropout(24, backend=at.backend).to(at.device)(x).sum().backward()
    wait(at)


# ---- Benchmarks: the suites' cases, measured by the harness


def adamw(
    at: Place, setting: str, tensors: shapes.Shapes, dtype: torch.dtype = torch.float32
) -> harness.Case:
    if at.small:
        tensors = [(129, 65), (1000,)]
    kinds = ("fused", "foreach")
    return bench_selective.adamw(
        "step", tensors, setting, at.device, dtype, kinds=kinds, backend=at.backend
    )


def logits(at: Place, classes: int, dtype: torch.dtype) -> harness.Case:
    n = 4096 if classes <= 32_000 else 2048
    if at.small:
        classes, n = classes // FACTOR, 8
    return bench_divergence.logits_case(2, classes, n, at.device, dtype, backend=at.backend)


def dropped(at: Place, dtype: torch.dtype) -> harness.Case:
    shape = (4, 16, 64) if at.small else (*shapes.BERT_BATCH, 3072)
    return bench_dropout.case("adaptive dropout", shape, dtype, at.device, at.backend)


def perturbed(at: Place) -> harness.Case:
    return bench_perturbation.fgm(
        "embeddings",
        (4, 16, 64) if at.small else (32, 512, 1024),
        torch.float32,
        at.device,
        at.backend,
    )


def sweep(at: Place) -> harness.Case:
    """Times warps and the bytes of a group of tensors in the Triton step; ours, the first, is the
    setting in use.
    """
    from uegr_kernels.core import triton_ops

    tensors = [(129, 65), (1000,)] if at.small else shapes.MODELS["BERT-large"]
    case = bench_selective.case(
        "settings of the Triton step", tensors, {}, at.device, kinds=("fused",), backend=at.backend
    )
    before = triton_ops.WARPS, triton_ops.GROUP_BYTES
    every = [before, *((warps, group << 20) for warps in (2, 4, 8) for group in (8, 16, 24, 32))]

    def contestants() -> list[harness.Contestant]:
        ours = case.contestants()[0]

        def setting(warps: int, group: int) -> timer.Step:
            def step() -> None:
                triton_ops.WARPS, triton_ops.GROUP_BYTES = warps, group
                ours.step()

            return step

        named = {
            f"{warps} warps, {group >> 20} MiB": setting(warps, group)
            for warps, group in dict.fromkeys(every)
        }
        return [harness.Contestant(name, step, ours.bytes) for name, step in named.items()]

    return dataclasses.replace(case, contestants=contestants)


Large = "BERT-large"
BENCHES: dict[str, Callable[[Place], harness.Case]] = {
    "step": lambda at: adamw(at, "defaults (min-max)", shapes.MODELS[Large]),
    "previous": lambda at: adamw(at, "previous", shapes.MODELS[Large]),
    "bfloat16": lambda at: adamw(at, "previous", shapes.MODELS[Large], BRAIN),
    "1e9": lambda at: adamw(at, "defaults (min-max)", [(10**9,)]),
    "loss-32000": lambda at: logits(at, 32_000, BRAIN),
    "loss-128256": lambda at: logits(at, 128_256, BRAIN),
    "loss-32000-float32": lambda at: logits(at, 32_000, torch.float32),
    "loss-128256-float32": lambda at: logits(at, 128_256, torch.float32),
    "dropout": lambda at: dropped(at, BRAIN),
    "dropout-float32": lambda at: dropped(at, torch.float32),
    "fgm": perturbed,
    "sweep": sweep,
}


def bench(make: Callable[[Place], harness.Case], at: Place) -> dict:
    """Raises Disagreement where ours is wrong."""
    case = make(at)
    if at.compile_alone:
        found = {one.name: one for one in case.contestants()}
        found["torch.compile"].step()
        wait(at)
        return {"said": "compiled"}
    copy = machine.Copy(2**20 if at.small else 2**30, at.device)
    without = None if at.compiled else "torch.compile"
    record = harness.measure(
        case, 2 if at.small else 100, copy, lambda: None, without, until=at.until, profiled=False
    )
    nothing_wrong(record.get("error"))
    return record


# ---- A profile


PROFILED = ("step", "loss-32000", "dropout")


def profile(at: Place) -> dict:
    """Tells how long each kernel of three cases takes; with counters, a profiler outside looks at
    one step of each.
    """
    found: list[str] = []
    for name in PROFILED:
        ours = BENCHES[name](at).contestants()[0].step
        for _ in range(3):
            ours()
        wait(at)
        if at.counters and at.device == "cuda":
            torch.cuda.cudart().cudaProfilerStart()
            ours()
            wait(at)
            torch.cuda.cudart().cudaProfilerStop()
            continue
        activity = (
            torch.profiler.ProfilerActivity.CUDA
            if at.device == "cuda"
            else torch.profiler.ProfilerActivity.CPU
        )
        with torch.profiler.profile(activities=[activity]) as profiler:
            for _ in range(3):
                ours()
            wait(at)
        print(
            name,
            profiler.key_averages().table(row_limit=15, max_name_column_width=90),
            sep="\n",
            flush=True,
        )
        events = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)
        found += [
            f"{name}: {event.key[:40]} {event.device_time_total / 3:.1f} us" for event in events[:2]
        ]
    return {"said": "; ".join(found)}


# ---- The command


SMOKE: dict[str, Callable[[Place], dict | None]] = {
    "clusters": clusters,
    "mask": mask,
    "step": step,
    "previous": functools.partial(step, statistics="previous"),
    "bfloat16": functools.partial(step, dtype=BRAIN, state_dtype=BRAIN),
    "rank": functools.partial(step, normalization="rank"),
    **{f"loss-{c}": functools.partial(loss, classes=c) for c in (10, 2000, 32_000, 128_256)},
    "fgm": fgm,
    "pgd": pgd,
    "dropout": dropout,
    "graph": graph,
    "capture": capture,
}


def smoke(check: Callable[[Place], dict | None], at: Place) -> dict:
    with machine.poisoned_memory():
        found = check(at)
        wait(at)
    return found or {}


CASES: dict[str, Callable[[Place], dict]] = {
    **{f"smoke-{name}": functools.partial(smoke, check) for name, check in SMOKE.items()},
    **{f"bench-{name}": functools.partial(bench, make) for name, make in BENCHES.items()},
    "sanitized": lambda at: sanitized(at) or {},
    "profile": profile,
}


def every_case(at: Place) -> Iterator[str]:
    """Runs them all in this process, to see that they do; yields what went wrong."""
    for name, case in CASES.items():
        try:
            case(at)
        except Exception as error:
            yield f"{name}: {type(error).__name__}: {error}"


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 where ours is wrong; 2 for wrong arguments; 4 where another backend is in
    use than the one to be measured.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_stages", description="Runs one case of `python -m bench.gpu`."
    )
    parser.add_argument(
        "case",
        metavar="CASE",
        choices=("probe", "all", *CASES),
        help=f"probe, all, {', '.join(CASES)}",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--backend",
        choices=("auto", "cuda", "triton"),
        help="of ours; default: cuda, on the CPU auto",
    )
    parser.add_argument("--small", action="store_true", help="sizes that take a moment on a CPU")
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="of a benchmark by hand; default: %(default)s"
    )
    parser.add_argument("--compiled", action="store_true", help="torch.compile among the peers")
    parser.add_argument(
        "--compile-alone", action="store_true", help="call torch.compile's peer once, for its cache"
    )
    parser.add_argument(
        "--counters",
        action="store_true",
        help="run one step of each under a profiler of kernels such as ncu",
    )
    parser.add_argument("--no-gpu", action="store_true", help="of the probe: do not look for a GPU")
    options = parser.parse_args(arguments)
    why_none = "not looked for" if options.no_gpu else machine.no_gpu()
    if options.case == "probe":
        answer(probe(why_none))
        return 0
    if options.device == "cuda" and why_none:
        parser.error(f"--device cuda needs a GPU: {why_none}; or use --device cpu")
    backend = options.backend or ("cuda" if options.device == "cuda" else "auto")
    until = (
        float(os.environ[END]) - CLOSING
        if END in os.environ
        else time.monotonic() + options.seconds
    )
    at = Place(
        options.device,
        backend,
        options.small,
        until,
        options.compiled,
        options.compile_alone,
        options.counters,
    )
    if options.case == "all":
        wrong = list(every_case(at))
        print("\n".join(wrong), flush=True)
        answer({"said": f"{len(CASES) - len(wrong)} of {len(CASES)} cases ran on the {at.device}"})
        return int(bool(wrong))
    if reason := not_in_use(at):
        print(reason, flush=True)
        return WRONG_BACKEND
    try:
        result = CASES[options.case](at)
    except Disagreement as error:
        print(f"ours is wrong: {error}", flush=True)
        return 1
    answer({"backend": at.backend} | result)
    return 0


def not_in_use(at: Place) -> str | None:
    """Tells why calls would not be served by the backend that the case is to measure; "cuda" must
    be what "auto" takes too.
    """
    if at.device == "cpu":
        return None
    if reason := backends.why_not(at.backend, OPERATOR, torch.device(at.device)):
        return f"{at.backend} was to be measured and cannot be: {reason}"
    found = backends.choose("auto", OPERATOR, torch.device(at.device))
    return (
        (f"cuda was to be measured, and the backend in use is {found}")
        if at.backend == "cuda" != found
        else None
    )


if __name__ == "__main__":
    sys.exit(main())
