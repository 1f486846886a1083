"""Times ours beside its peers in alternation, counts bytes and memory, and keeps the results; README.md states the protocol."""

import contextlib
import ctypes
import gc
import importlib.util
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import uegr_kernels
from uegr_kernels.core import native

ROOT = pathlib.Path(__file__).parent.parent
SHORTEST = 0.01  # seconds a sample takes at least: shorter steps are repeated within one
BUSY = 0.5  # load average above which a machine does not count as quiet


@dataclass(frozen=True)
class Contestant:
    """One implementation at work on a case's tensors; `step` is None where it cannot run, and `missing` says why."""

    name: str
    step: Callable[[], object] | None
    bytes: int = 0  # that one step must move
    rounds: int | None = None  # at most so many, for the very slow; None: all
    missing: str = ""


@dataclass(frozen=True)
class Case:
    """What to time. `verify` returns what is wrong with ours on a small problem, or None; `contestants` builds them, ours first."""

    name: str
    facts: dict  # copied into the result: sizes, dtype, options
    memory: int  # bytes the tensors take
    verify: Callable[[], str | None]
    contestants: Callable[[], list[Contestant]]
    breakdown: Callable[[], dict[str, float]] | None = None  # shares of ours by part, measured apart


def sample(step: Callable[[], object], repeats: int) -> float:
    """Seconds one step takes, over `repeats` of them in a row."""
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - started) / repeats


def spread(values: list[float]) -> dict:
    """Median and quartiles, to six digits."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {name: float(f"{value:.6g}") for name, value in (("median", middle), ("q1", low), ("q3", high))}


class Copy:
    """Bandwidth of a plain copy of a tensor much larger than the caches: the bytes read plus the bytes written, per second."""

    def __init__(self, size: int):
        self.source, self.target = torch.ones(size // 4), torch.zeros(size // 4)
        self.size = size

    def __call__(self, times: int = 5) -> list[float]:
        return [2 * self.size / sample(lambda: self.target.copy_(self.source), 1) / 1e9 for _ in range(times)]


def peak_extra(step: Callable[[], object]) -> int | None:
    """Bytes by which the resident set peaks above its start during one step (Linux; None elsewhere).

    Free heap memory is handed back first: what a step takes from it would not show.
    """
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


def free_memory() -> float:
    with contextlib.suppress(OSError):
        return 1024.0 * _kilobytes("meminfo", "MemAvailable")
    return math.inf


def others_seconds() -> float | None:
    """CPU seconds that this machine has spent on anything but this process, hypervisor included (Linux; None elsewhere)."""
    with contextlib.suppress(OSError):
        user, nice, system, _, _, irq, softirq, steal = map(int, pathlib.Path("/proc/stat").read_text().split()[1:9])
        own = os.times()
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system
    return None


def wait_until_quiet(seconds: float) -> str | None:
    """Waits until the load average is low, `seconds` at most; returns a warning where it stays high."""
    until = time.monotonic() + seconds
    if seconds and os.getloadavg()[0] > BUSY:
        print(f"load average {os.getloadavg()[0]:.2f}: waiting up to {seconds:.0f} s for {BUSY}", file=sys.stderr, flush=True)
    while os.getloadavg()[0] > BUSY:
        if time.monotonic() >= until:
            return f"the machine is busy (load average {os.getloadavg()[0]:.2f} before the run): ratios are in doubt, times more so"
        time.sleep(min(5, max(0, until - time.monotonic())))
    return None


def measure(case: Case, rounds: int, copy: Copy, tick: Callable[[], None]) -> dict:
    """The case's result. A B A C A B A C ...: ours beside each peer in every round, the ratio taken from neighbours."""
    line: dict = {"case": case.name, **case.facts, "rounds": rounds}
    if case.memory > 0.8 * free_memory():
        return line | {"skipped": f"needs {case.memory / 1e9:.1f} GB, more than 80 % of what is free"}
    if wrong := case.verify():
        return line | {"error": f"ours and the reference disagree: {wrong}"}
    everyone = case.contestants()
    ours, *peers = [one for one in everyone if one.step]
    line["load_before"], started, others = os.getloadavg(), time.perf_counter(), others_seconds()
    gigabytes, repeats, extra = copy(), {}, {}
    times: dict[str, list[float]] = {one.name: [] for one in (ours, *peers)}
    ratios: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for one in (ours, *peers):  # the warm-up
        one.step()
        extra[one.name] = peak_extra(one.step)
        repeats[one.name] = 1 if one.rounds else math.ceil(SHORTEST / sample(one.step, 1))
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for peer in [peer for peer in peers if turn < (peer.rounds or rounds)] or [None]:
                for one in filter(None, (ours, peer)):
                    times[one.name].append(sample(one.step, repeats[one.name]))
                if peer:
                    ratios[peer.name].append(times[ours.name][-1] / times[peer.name][-1])
            tick()
    finally:
        gc.enable()
    line["copy_gb_s"] = spread(gigabytes + copy())
    line["load_after"] = os.getloadavg()
    line["others_cpus"] = None if others is None else round((others_seconds() - others) / (time.perf_counter() - started), 3)
    line["contestants"] = []
    for one in everyone:
        if not one.step:
            line["contestants"].append({"name": one.name, "missing": one.missing})
            continue
        rate = one.bytes / statistics.median(times[one.name]) / 1e9
        result = {"name": one.name, "seconds": spread(times[one.name]), "samples": len(times[one.name]), "repeats": repeats[one.name]}
        result |= {"ours_over_this": spread(ratios[one.name])} if one.name in ratios else {}
        result |= {"bytes": one.bytes, "gb_s": round(rate, 3), "copy_share": round(rate / line["copy_gb_s"]["median"], 4)}
        line["contestants"].append(result | {"peak_extra_bytes": extra[one.name]})
    return line | ({"breakdown": case.breakdown()} if case.breakdown else {})


def environment(command: str) -> dict:
    """Where and with what a run is made."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    versions = {"uegr_kernels": uegr_kernels.__version__, "torch": torch.__version__, "python": platform.python_version()}
    machine = {"cpu": cpu, "cpus": os.cpu_count(), "system": platform.system(), "isa": native.load()[0], "threads": torch.get_num_threads()}
    time_utc = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"device": "cpu", "machine": machine, "versions": versions, "commit": _commit(), "command": command, "time": time_utc}


def _commit() -> str | None:
    """The commit, with "+" where the package or the benches differ from it; None outside git."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "csrc", "uegr_kernels", "setup.py", "bench/*.py"]).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def keep(path: pathlib.Path, line: dict, names: list[str]) -> list[dict]:
    """Puts a result in the place of the case's old one; the file is replaced whole. Cases that are no more go."""
    lines = {old["case"]: old for old in read(path)} | {line["case"]: line}
    ordered = [lines[name] for name in names if name in lines]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(each) + "\n" for each in ordered))
    os.replace(aside, path)
    return ordered


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields what moves a progress bar on by one, under a name; without tqdm, or away from a terminal, there is no bar."""
    if importlib.util.find_spec("tqdm") is None:
        yield lambda name: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="round", disable=None) as bar:

        def tick(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        yield tick
