"""The selective step over size, number of tensors and threads: time per element is to grow with none of them."""

from .bench_selective import SETTINGS, adamw
from .harness import Case


def cases(quick: bool) -> list[Case]:
    sizes = [10**k for k in range(3, 6 if quick else 9)]
    counts = [10**k for k in range(0, 3 if quick else 5)]
    found = [("one tensor", f"{n:,} elements in one tensor", [(n,)]) for n in sizes]
    found += [("tensors of 1,000", f"{n:,} tensors of 1,000", [(1000,)] * n) for n in counts]
    return [_on_axis(adamw(name, shapes, next(iter(SETTINGS))), axis) for axis, name, shapes in found]


def _on_axis(case: Case, axis: str) -> Case:
    case.facts["axis"] = axis
    return case
