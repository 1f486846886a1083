"""Times steps, on a CPU and on a GPU, by one protocol: warm-up, then rounds in which the variants
take turns; medians with quartiles.

On a GPU a sample is one step between two events in the queue, behind a pause that outlasts the
host's part of it, and with the second-level cache emptied. The cache is emptied by reading other
data, as a step that updates what it is given has no second set of inputs to turn to. On a CPU a
sample is as many steps in a row as last SHORTEST.
"""

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# seconds a sample takes at least on a CPU: shorter steps are repeated within one
SHORTEST = 0.01
# rounds, however late it is
FEWEST = 3
# cycles a second that no GPU's clock exceeds by much
CLOCK = 2e9
# seconds
SHORTEST_PAUSE, LONGEST_PAUSE = 1e-3, 0.5
Step = Callable[[], object]


@dataclass(frozen=True)
class Variant:
    """Holds one of the steps to compare, after its warm-up; rounds  at most, None: all."""

    step: Step
    repeats: int = 1
    rounds: int | None = None


@dataclass
class Times:
    """Holds seconds of a step by sample, and for a peer ours over it by round."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


def repeats_of(step: Step, device: str) -> int:
    """Returns how many steps make a sample: so many that a CPU's lasts long enough."""
    return 1 if device == "cuda" else math.ceil(SHORTEST / sample(step, 1, device))


def alternated(
    variants: dict[str, Variant],
    rounds: int,
    device: str,
    *,
    until: float = math.inf,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Samples the first variant, ours, beside each other one in every round, A B A C A D, so that
    a ratio is taken from neighbours.

    until  by time.monotonic(): no round begins after it, but for the first few;  tick  called after
        each round
    """
    (ours, own), *peers = variants.items()
    times = {name: Times() for name in variants}
    with _no_collection():
        for turn in range(rounds):
            if turn >= FEWEST and time.monotonic() > until:
                break
            left = [name for name, peer in peers if turn < (peer.rounds or rounds)]
            for name in left or [None]:
                times[ours].seconds.append(sample(own.step, own.repeats, device))
                if name is not None:
                    peer = variants[name]
                    times[name].seconds.append(sample(peer.step, peer.repeats, device))
                    times[name].ratios.append(times[ours].seconds[-1] / times[name].seconds[-1])
            tick()
    return times


def in_turn(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Returns seconds of each step, after one that warms up, all of them once in every round."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with _no_collection():
        for _ in range(rounds):
            for name, step in steps.items():
                seconds[name].append(sample(step, 1, device))
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Returns median and quartiles, to six digits."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {
        name: float(f"{value:.6g}")
        for name, value in (("median", middle), ("q1", low), ("q3", high))
    }


def sample(step: Step, repeats: int, device: str = "cpu") -> float:
    """Returns the seconds that one step takes, over `repeats` of them: in a row, on a GPU one by
    one.
    """
    if device == "cuda":
        return sum(_on_gpu(step) for _ in range(repeats)) / repeats
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - started) / repeats


def host_seconds(step: Step) -> float:
    """Returns the seconds until a step is in the GPU's queue, which is empty before."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return seconds


def _on_gpu(step: Step) -> float:
    """Returns the seconds that a step takes between two events in the GPU's queue, with none of its
    data in the second-level cache.

    It is queued behind a pause ten times as long as the host takes to queue it, so that no kernel
    waits for the host.
    """
    host = host_seconds(step)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(CLOCK * min(max(10 * host, SHORTEST_PAUSE), LONGEST_PAUSE)))
    other_data(device="cuda").sum()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@functools.cache
def other_data(device: str) -> torch.Tensor:
    """Returns what is read to drive everything else out of a GPU's second-level cache; nothing of
    it has to be written back.
    """
    return torch.zeros(2**26, device=device)


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
