"""Keeps what has been run in a file of JSON records, and makes what is missing in processes of
their own.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import math
import multiprocessing
import os
import pathlib
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from uegr_kernels.finetune.data import UserError

from .. import harness, machine

# a dataclass with all that a run's figures depend on
Run = TypeVar("Run")


class Call(NamedTuple):
    """Holds how a run is made: `work` of the run and the rest, in a process of its own."""

    work: Callable[..., Any]
    run: Any
    rest: tuple[Any, ...]


class Runs(Generic[Run]):
    """Holds the results of the runs on file, and makes those that are missing.

    path           the file; a run's record is added as soon as it ends, so the whole is made in
                   pieces
    jobs, threads  runs at a time, and threads of each;  command  whose environment records tell
    about          what every record of this command says beside its run

    A subclass says what a run is: `settings_in`, `key_of`, `call_of` and `name_of`.
    """

    # of the runs that count
    protocol: int

    def __init__(self, path: pathlib.Path, jobs: int, threads: int, command: str) -> None:
        self.path, self.jobs, self.threads = path, jobs, threads
        self.done: dict[str, dict[str, Any]] = {}
        for record in whole_records(path):
            if record["settings"].get("protocol", 1) == self.protocol and self.is_ours(record):
                self.done[self.key_of(self.settings_in(record))] = record
        here = harness.environment(command)
        self.about: dict[str, Any] = {
            "commit": here["commit"],
            "cpu": here["machine"]["cpu"],
            "torch": here["versions"]["torch"],
        }

    def is_ours(self, record: dict[str, Any]) -> bool:
        """Returns whether a record is of the data that these runs are of."""
        return True

    def settings_in(self, record: dict[str, Any]) -> Run:
        """Returns the run that a record is of."""
        raise NotImplementedError

    def key_of(self, run: Run) -> str:
        """Returns what tells a run from others, the protocol's number among it."""
        raise NotImplementedError

    def call_of(self, run: Run, checkpoint: pathlib.Path) -> Call:
        """Returns how a run is made."""
        raise NotImplementedError

    def name_of(self, run: Run) -> str:
        """Returns a few words that name a run."""
        raise NotImplementedError

    def facts_of(self, run: Run) -> dict[str, Any]:
        """Returns what the run's record says beside its settings and its result."""
        return {}

    def __contains__(self, run: Run) -> bool:
        return self.key_of(run) in self.done

    def __getitem__(self, run: Run) -> dict[str, Any]:
        found: dict[str, Any] = self.done[self.key_of(run)]["result"]
        return found

    def finish(self, wanted: Iterable[Run], what: str) -> None:
        """Makes what is missing."""
        missing = list({self.key_of(run): run for run in wanted if run not in self}.values())
        if not missing:
            return
        checkpoints = self.path.parent / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        calls = [self.call_of(run, checkpoint(checkpoints, self.key_of(run))) for run in missing]
        with tqdm(
            total=len(missing), desc=what, unit="run", mininterval=1 if sys.stderr.isatty() else 60
        ) as bar:
            for run, result in results(calls, self.jobs, self.threads):
                self._keep(run, result)
                bar.set_postfix_str(self.name_of(run), refresh=False)
                bar.update()
        # another command may have runs there
        with contextlib.suppress(OSError):
            checkpoints.rmdir()

    def _keep(self, run: Run, result: dict[str, Any]) -> None:
        record = {
            "settings": dataclasses.asdict(run),
            "result": rounded(result),
            **self.facts_of(run),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **self.about,
        }
        self.done[self.key_of(run)] = record
        with self.path.open("a") as file:
            # another command may write there too
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def whole_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the records of a file; a last one that was cut off is taken out of it."""
    text = path.read_text() if path.exists() else ""
    kept, _, cut = text.rpartition("\n")
    if cut:
        path.write_text(kept + "\n" * bool(kept))
    try:
        return [json.loads(line) for line in kept.split("\n") if line]
    except ValueError as error:
        raise UserError(
            f"{path} is no file of runs ({error}); move it away, or name another --output"
        ) from None


def refused(error: Exception) -> int:
    """Says what is wrong with arguments or data; returns the exit status."""
    print(f"error: {error}", file=sys.stderr)
    return 2


def stopped(advice: str) -> int:
    """Says how to go on after Ctrl-C; returns the exit status."""
    print(f"\nStopped. {advice}", file=sys.stderr)
    return 130


def rounded(value: Any) -> Any:
    """Returns a result with its floats to six digits; what is not finite is None."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def checkpoint(folder: pathlib.Path, key: str) -> pathlib.Path:
    """Returns the folder of a run's state while it is not finished."""
    return folder / f"{random.Random(key).getrandbits(64):016x}"


def results(calls: Sequence[Call], jobs: int, threads: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields each call's run with its result, as they come; `jobs` at a time, of so many threads
    each.
    """
    if jobs == 1:
        with machine.threads(threads):
            yield from ((run, work(run, *rest)) for work, run, rest in calls)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        jobs, context, torch.set_num_threads, (threads,)
    ) as pool:
        waiting = {pool.submit(work, run, *rest): run for work, run, rest in calls}
        try:
            yield from (
                (waiting[future], future.result())
                for future in concurrent.futures.as_completed(waiting)
            )
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
