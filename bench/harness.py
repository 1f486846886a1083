"""Times ours beside its peers, counts bytes and memory, and keeps the results;
README.md states the protocol.
"""

import argparse
import contextlib
import gc
import importlib.metadata
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
from dataclasses import dataclass, field, replace

import torch

import uegr_kernels
from uegr_kernels.core import native

from . import machine, timer
from .timer import Step, spread

ROOT = pathlib.Path(__file__).parent.parent
# of the free memory that a case may take
SHARE = 0.8
# packages whose versions are kept, where they are installed
PEERS = ("triton", "liger_kernel", "bitsandbytes", "torchao", "deepspeed")


@dataclass(frozen=True)
class Contestant:
    """Holds one implementation at work on a case's tensors; `step` is None where it cannot run, and
    `missing` says why.
    """

    name: str
    step: Step | None
    # that one step must move; 0: not stated
    bytes: int = 0
    # at most so many, for the very slow; None: all
    rounds: int | None = None
    # bytes that it takes beside the case's
    memory: int = 0
    # other people's code that need not run here: an error of its first step is the reason why it is
    # missing
    may_fail: bool = False
    missing: str = ""
    # of the step, timed apart
    parts: dict[str, Step] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Holds what to time. `verify` returns what is wrong with ours on a small problem, or None;
    `contestants` builds them, ours first.
    """

    name: str
    # copied into the result: sizes, dtype, options
    facts: dict
    # bytes the tensors take
    memory: int
    verify: Callable[[], str | None]
    contestants: Callable[[], list[Contestant]]
    # shares of ours by part, measured apart
    breakdown: Callable[[], dict[str, float]] | None = None
    device: str = "cpu"
    # None: as many as the run has
    threads: int | None = None


def measure(
    case: Case,
    rounds: int,
    copy: machine.Copy,
    tick: Callable[[], None],
    without: str | None = None,
    *,
    until: float = math.inf,
    profiled: bool = True,
) -> dict:
    """Returns the case's record: ours beside each peer in every round.

    until: by time.monotonic(), no round begins after it, but for the first three. profiled:
    launches are counted.
    """
    record: dict = {"case": case.name, **case.facts, "rounds": rounds}
    gc.collect()
    if "torch._dynamo" in sys.modules:
        # else a function is compiled for the shapes of eight cases and no more
        torch.compiler.reset()
    room = SHARE * machine.free_memory(case.device)
    if case.memory > room:
        return record | {
            "skipped": f"needs {case.memory / 1e9:.1f} GB, more than {SHARE:.0%} of what is free"
        }
    with machine.threads(case.threads):
        with machine.poisoned_memory():
            wrong = case.verify()
        if wrong:
            return record | {"error": f"ours and the reference disagree: {wrong}"}
        everyone = [_allowed(one, room - case.memory, without) for one in case.contestants()]
        return (
            record
            | _alternate(everyone, rounds, copy, tick, until, profiled)
            | ({"breakdown": case.breakdown()} if case.breakdown else {})
        )


def _allowed(one: Contestant, room: float, without: str | None) -> Contestant:
    if one.memory > room:
        return replace(
            one,
            step=None,
            missing=f"takes {one.memory / 1e9:.1f} GB beside the "
            f"tensors, more than {SHARE:.0%} of what is free",
        )
    if without and without in one.name and one.name != "uegr_kernels":
        return replace(one, step=None, missing=f"left out by --without {without}")
    return one


def _alternate(
    everyone: list[Contestant],
    rounds: int,
    copy: machine.Copy,
    tick: Callable[[], None],
    until: float,
    profiled: bool,
) -> dict:
    """Returns what is found of the contestants, and how quiet the machine was meanwhile."""
    record: dict = {"load_before": os.getloadavg()}
    started, others, gigabytes = time.perf_counter(), machine.others_seconds(), copy()
    results, repeats = {}, {}
    for i, one in enumerate(everyone):
        try:
            if one.step:
                results[one.name], repeats[one.name] = _warmed_up(one, copy.device, profiled)
        except Exception as error:
            if not one.may_fail:
                raise
            reason = (
                f"{type(error).__name__}: "
                f"{(str(error).strip().splitlines() or ['no message'])[0][:200]}"
            )
            everyone[i] = replace(one, step=None, missing=reason)
    present = [one for one in everyone if one.step]
    variants = {one.name: timer.Variant(one.step, repeats[one.name], one.rounds) for one in present}
    times = timer.alternated(variants, rounds, copy.device, until=until, tick=tick)
    parts = timer.in_turn(
        {(one.name, part): step for one in present for part, step in one.parts.items()},
        5,
        copy.device,
    )
    record["copy_gb_s"] = spread(gigabytes + copy())
    record["load_after"] = os.getloadavg()
    record["others_cpus"] = (
        None
        if others is None
        else round((machine.others_seconds() - others) / (time.perf_counter() - started), 3)
    )
    record["contestants"] = []
    for one in everyone:
        if not one.step:
            record["contestants"].append({"name": one.name, "missing": one.missing})
            continue
        seconds, ratios = times[one.name].seconds, times[one.name].ratios
        rate = one.bytes / statistics.median(seconds) / 1e9
        result = {
            "name": one.name,
            "seconds": spread(seconds),
            "samples": len(seconds),
            "repeats": repeats[one.name],
        }
        result |= {"ours_over_this": spread(ratios)} if ratios else {}
        result |= {
            "bytes": one.bytes,
            "gb_s": round(rate, 3),
            "copy_share": round(rate / record["copy_gb_s"]["median"], 4),
        }
        if one.parts:
            result["parts"] = {part: spread(parts[one.name, part]) for part in one.parts}
        record["contestants"].append(result | results[one.name])
    return record


def _warmed_up(one: Contestant, device: str, profiled: bool) -> tuple[dict, int]:
    """Makes a first step; returns what a step takes and starts, and how many make a sample."""
    one.step()
    found: dict = {"peak_extra_bytes": machine.peak_extra(one.step, device)}
    found["launches"] = machine.launches(one.step, device) if profiled else None
    if device == "cuda":
        found["host_seconds"] = min(timer.host_seconds(one.step) for _ in range(3))
        return found, 1
    return found, 1 if one.rounds else timer.repeats_of(one.step, device)


def environment(command: str, device: str = "cpu") -> dict:
    """Returns where and with what a run is made."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    versions = {
        "uegr_kernels": uegr_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for package in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    here = {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "system": platform.system(),
        "isa": native.load()[0],
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        here |= {"gpu": properties.name, "gpu_memory": properties.total_memory}
        versions["cuda"] = torch.version.cuda or f"ROCm {torch.version.hip}"
    time_utc = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "device": device,
        "machine": here,
        "versions": versions,
        "commit": commit(),
        "command": command,
        "time": time_utc,
    }


def commit() -> str | None:
    """Returns the commit, with "+" where package or benches differ from it; None outside git."""
    git = ["git", "-C", str(ROOT)]
    try:
        newest = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [
                *git,
                "diff",
                "--quiet",
                "HEAD",
                "--",
                "csrc",
                "uegr_kernels",
                "setup.py",
                "bench/*.py",
            ]
        ).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return newest + "+" * bool(changed)


def count(text: str) -> int:
    """Reads a positive number of the command line."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def read(path: pathlib.Path) -> list[dict]:
    """Reads the records of a file."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def keep(path: pathlib.Path, record: dict, names: list[str]) -> list[dict]:
    """Puts a record in the place of the case's old one; the file is replaced whole. Cases that
    are no more go.
    """
    records = {old["case"]: old for old in read(path)} | {record["case"]: record}
    ordered = [records[name] for name in names if name in records]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(each) + "\n" for each in ordered))
    os.replace(aside, path)
    return ordered


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """Yields what moves a progress bar on by some rounds, under a name; without tqdm, or away
    from a terminal, there is no bar.
    """
    if importlib.util.find_spec("tqdm") is None:
        yield lambda name, rounds: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="round", disable=None) as bar:

        def tick(name: str, rounds: int) -> None:
            bar.set_description(name)
            bar.update(rounds)

        yield tick
