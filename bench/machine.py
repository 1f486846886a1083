"""What is measured of this machine, by device ("cpu" or "cuda"): time, bandwidth, memory,
launches, and how quiet it is.
"""

import contextlib
import ctypes
import functools
import math
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

BUSY = 0.5  # load average above which a machine does not count as quiet
CLOCK = 2e9  # cycles a second that no GPU's clock exceeds by much
SHORTEST_PAUSE, LONGEST_PAUSE = 1e-3, 0.5  # seconds
Step = Callable[[], object]


def no_gpu() -> str | None:
    """Why this machine cannot run a GPU's work, or None."""
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


def sample(step: Step, repeats: int, device: str = "cpu") -> float:
    """Seconds one step takes, over `repeats` of them: in a row, on a GPU one by one."""
    if device == "cuda":
        return sum(on_gpu(step) for _ in range(repeats)) / repeats
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - started) / repeats


def on_gpu(step: Step) -> float:
    """Seconds a step takes between two events in the GPU's queue, with none of its data in the
    second-level cache.

    It is queued behind a pause ten times as long as the host takes to queue it, so that no kernel
    waits for the host.
    """
    host = host_seconds(step)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(CLOCK * min(max(10 * host, SHORTEST_PAUSE), LONGEST_PAUSE)))
    emptied_cache(device="cuda").sum()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def host_seconds(step: Step) -> float:
    """Seconds until a step is in the GPU's queue, which is empty before."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return seconds


@functools.cache
def emptied_cache(device: str) -> torch.Tensor:
    """What is read to drive everything else out of a GPU's second-level cache; nothing of it
    has to be written back.
    """
    return torch.zeros(2**26, device=device)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN inside, so that a result which nobody wrote shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)  # what torch fills fresh memory under
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Copy:
    """Bandwidth of a plain copy of a tensor much larger than the caches: the bytes read plus
    the bytes written, per second.
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
    """Bytes by which memory in use peaks above its start during one step: the GPU's as PyTorch's
    allocator counts them, else the resident set's (Linux; None elsewhere).

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
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
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
    """Bytes that can still be taken, infinity where that is not known."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    with contextlib.suppress(OSError):
        return 1024.0 * _kilobytes("meminfo", "MemAvailable")
    return math.inf


def launches(step: Step, device: str = "cpu") -> int | None:
    """What one step starts, by torch's profiler.

    On a GPU: kernels that it ran, without copies and fills; None where the profiler saw none. On
    the CPU: calls of operators ("aten::add_", "uegr_kernels::uegr_loss") that no other operator
    made, and calls of graphs that torch.compile made.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes on starting and stopping
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
    """CPU seconds that this machine has spent on anything but this process, hypervisor
    included (Linux; None elsewhere).
    """
    with contextlib.suppress(OSError):
        user, nice, system, _, _, irq, softirq, steal = map(
            int, pathlib.Path("/proc/stat").read_text().split()[1:9]
        )
        own = os.times()
        return (
            (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
            - own.user
            - own.system
        )
    return None


def wait_until_quiet(seconds: float) -> str | None:
    """Waits until the load average is low, `seconds` at most; returns a warning where it stays
    high.
    """
    until = time.monotonic() + seconds
    if seconds and os.getloadavg()[0] > BUSY:
        print(
            f"load average {os.getloadavg()[0]:.2f}: waiting up to {seconds:.0f} s for {BUSY}",
            file=sys.stderr,
            flush=True,
        )
    while os.getloadavg()[0] > BUSY:
        if time.monotonic() >= until:
            return (
                f"the machine is busy (load average {os.getloadavg()[0]:.2f} before the run): "
                "ratios are in doubt, times more so"
            )
        time.sleep(min(5, max(0, until - time.monotonic())))
    return None


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads inside, as many as before after it; None: no change."""
    before = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
