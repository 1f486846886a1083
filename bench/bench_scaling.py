"""Times the selective step over size, number of tensors and threads: time per element is to grow
with none of them.
"""

import torch

from . import shapes
from .bench_selective import adamw
from .harness import Case


def cases(quick: bool, device: str) -> list[Case]:
    sizes = [n for n in shapes.SIZES if n < 10**6 or not quick]
    counts = [n for n in shapes.COUNTS if n < 10**3 or not quick]
    found = [("one tensor", f"{n:,} elements in one tensor", [(n,)]) for n in sizes]
    found += [
        ("tensors of 1,000", f"{n:,} {'tensors' if n > 1 else 'tensor'} of 1,000", [(1000,)] * n)
        for n in counts
    ]
    threads = sorted({1, torch.get_num_threads()}) if device == "cpu" else [None]
    return [
        on_axis(axis, name, tensors, count, device)
        for count in threads
        for axis, name, tensors in found
    ]


def on_axis(axis: str, name: str, tensors: shapes.Shapes, threads: int | None, device: str) -> Case:
    ending = "" if threads is None else f", {threads} thread{'s' * (threads > 1)}"
    case = adamw(
        name + ending, tensors, "defaults (min-max)", device, kinds=("fused",), threads=threads
    )
    case.facts["axis"] = axis
    case.facts["threads"] = threads
    return case
