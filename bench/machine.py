"""Measures this machine, by device ("cpu" or "cuda"): bandwidth, memory, launches, and how quiet
it is.
"""

import contextlib
import ctypes
import math
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from .timer import Step, sample

# processors that other programs use, from which on a machine does not count as quiet
BUSY = 0.2
# seconds over which that is measured
LOOK = 2.0


def no_gpu() -> str | None:
    """Returns why this machine cannot run a GPU's work, or None."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is built without CUDA and ROCm; install a GPU build of "
            "torch"
        )
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} is built for GPUs but finds none; look at the driver "
            "(`nvidia-smi`, `rocm-smi`)"
        )
    return None


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Makes torch.empty give NaN inside, so that a result which nobody wrote shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # what torch fills fresh memory under
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Copy:
    """Measures the bandwidth of a plain copy of a tensor much larger than the caches: bytes read
    plus bytes written, per second.
    """

    def __init__(self, size: int, device: str = "cpu"):
        self.source, self.target = (
            torch.ones(size // 4, device=device),
            torch.zeros(size // 4, device=device),
        )
        self.size, self.device = size, device

    def __call__(self, times: int = 5) -> list[float]:
        return [
            2 * self.size / sample(lambda: self.target.copy_(self.source), 1, self.device) / 1e9
            for _ in range(times)
        ]


def peak_extra(step: Step, device: str = "cpu") -> int | None:
    """Returns the bytes by which memory in use peaks above its start during one step: the GPU's as
    PyTorch's allocator counts them, else the resident set's (Linux; None elsewhere).

    Free heap memory is handed back first: what a step takes from it would not show.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        # resets the peak
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = _kilobytes("self/status", "VmHWM")
        step()
        return 1024 * max(0, _kilobytes("self/status", "VmHWM") - before)
    except (OSError, AttributeError):
        step()
        return None


def _kilobytes(file: str, key: str) -> int:
    lines = pathlib.Path("/proc", file).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def free_memory(device: str = "cpu") -> float:
    """Returns the bytes that can still be taken, infinity where that is not known."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    with contextlib.suppress(OSError):
        return 1024.0 * _kilobytes("meminfo", "MemAvailable")
    return math.inf


def launches(step: Step, device: str = "cpu") -> int | None:
    """Counts what one step starts, by torch's profiler.

    On a GPU: kernels that it ran, without copies and fills; None where the profiler saw none. On
    the CPU: calls of operators ("aten::add_", "uegr_kernels::uegr_loss") that no other operator
    made, and calls of graphs that torch.compile made.
    """
    # its notes on starting and stopping
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activity = (
        torch.profiler.ProfilerActivity.CUDA
        if device == "cuda"
        else torch.profiler.ProfilerActivity.CPU
    )
    with torch.profiler.profile(activities=[activity]) as profiler:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    # as recorded: profiler.events() builds a tree, which takes minutes for a million
    events = profiler.profiler.kineto_results.events()
    if device == "cuda":
        return sum(map(_is_kernel, events)) or None
    calls = [event for event in events if _is_call(event.name())]
    calls.sort(key=lambda event: (event.start_thread_id(), event.start_ns(), -event.duration_ns()))
    outermost, thread, until = 0, None, 0
    for event in calls:
        if event.start_thread_id() != thread or event.start_ns() >= until:
            outermost, thread, until = (
                outermost + 1,
                event.start_thread_id(),
                event.start_ns() + event.duration_ns(),
            )
    return outermost


def _is_kernel(event: Any) -> bool:
    on_gpu = (
        event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    )
    return on_gpu and not event.name().startswith(("Memcpy", "Memset"))


def _is_call(name: str) -> bool:
    operator = "::" in name and not name.startswith(("autograd::", "torch::autograd::"))
    return operator or "Call CompiledFxGraph" in name


def others_seconds() -> float | None:
    """Returns the CPU seconds that this machine has spent on anything but this process and its
    ended children, hypervisor included (Linux; None elsewhere).
    """
    with contextlib.suppress(OSError):
        user, nice, system, _, _, irq, softirq, steal = map(
            int, pathlib.Path("/proc/stat").read_text().split()[1:9]
        )
        # the compilers that torch.compile calls are its children
        own = sum(os.times()[:4])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own
    return None


def others_cpus(seconds: float = LOOK) -> float | None:
    """Returns how many processors other programs use, measured over these seconds of sleep."""
    before, started = others_seconds(), time.perf_counter()
    time.sleep(seconds)
    after, passed = others_seconds(), time.perf_counter() - started
    return None if before is None or after is None else (after - before) / passed


def is_quiet(others: float | None) -> bool:
    """Returns whether other programs take so little that figures hold; unknown counts as so."""
    return others is None or others < BUSY


def wait_until_quiet(seconds: float) -> str | None:
    """Waits until other programs are still, `seconds` at most; returns a warning where they are
    not.
    """
    until = time.monotonic() + seconds
    said = False
    while not is_quiet(others := others_cpus()):
        busy = f"other programs use {others:.2f} processors"
        if time.monotonic() >= until:
            return f"the machine is busy ({busy}): ratios are in doubt, times more so"
        if not said:
            print(f"{busy}: waiting up to {seconds:.0f} s", file=sys.stderr, flush=True)
        said = True
        time.sleep(min(5, max(0, until - time.monotonic())))
    return None


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Sets so many threads inside, as many as before after it; None: no change."""
    before = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
