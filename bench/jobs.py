"""Training runs in processes of their own, for `bench.accuracy` and the evidence on a
pre-trained model.
"""

import concurrent.futures
import multiprocessing
import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import machine


def results(
    work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int, threads: int
) -> Iterator[tuple[Any, Any]]:
    """The first argument of each call with what `work` returned for it, as they come; `jobs`
    at a time, of so many threads each.
    """
    if jobs == 1:
        with machine.threads(threads):
            yield from ((call[0], work(*call)) for call in calls)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        jobs, context, torch.set_num_threads, (threads,)
    ) as pool:
        waiting = {pool.submit(work, *call): call[0] for call in calls}
        try:
            yield from (
                (waiting[future], future.result())
                for future in concurrent.futures.as_completed(waiting)
            )
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def checkpoint(folder: pathlib.Path, key: str) -> pathlib.Path:
    """Where the run of this key keeps its state while it is not finished."""
    return folder / f"{random.Random(key).getrandbits(64):016x}.pt"
