"""Times the main cases at small sizes under pytest-benchmark: `pytest bench --benchmark-only`.
Wrong results fail, no time does; the seconds are timer.py's.
"""

import importlib

import pytest

from . import machine, timer
from .harness import Case, Contestant
from .timer import Step

pytest.importorskip(
    "pytest_benchmark",
    reason="pytest-benchmark is not installed; run `pip install pytest-benchmark`",
)

DEVICE = "cpu" if machine.no_gpu() else "cuda"
# a suite's cases at the sizes of --quick
MAIN = {
    "selective": (
        "small BERT: defaults (min-max)",
        "small BERT: previous",
        "600 tensors of 64: defaults (min-max)",
    ),
    "divergence": (
        "UEGR loss, m = 2, N = 16, C = 1,000",
        "UEGR loss, m = 2, N = 16, C = 2",
        "pairwise JS, m = 2, N = 16, C = 1,000",
        "linear UEGR loss, m = 2, N = 16, H = 32, C = 1,000",
    ),
    "perturbation": ("FGM, small, 4 x 16 x 64", "FGM, small, 4 x 16 x 64, bfloat16"),
    "dropout": ("small, 4 x 16 x 64", "small, 4 x 16 x 64, bfloat16"),
    "bistage": ("small BERT, 4 x 16 words, m = 2",),
}


def main_cases() -> list[Case]:
    found = []
    for suite, names in MAIN.items():
        cases = {
            case.name: case
            for case in importlib.import_module(f".bench_{suite}", __package__).cases(True, DEVICE)
        }
        found += [cases[name] for name in names]
    return found


def parameters() -> list:
    return [
        pytest.param(case, one, id=f"{case.name} / {one.name}")
        for case in main_cases()
        for one in case.contestants()
    ]


class Samples:
    """Stands for a clock that moves by what the timer says a step takes, and by nothing else."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, step: Step) -> Step:
        """Returns what takes one sample of a step, which is warm."""
        repeats = timer.repeats_of(step, DEVICE)

        def take() -> None:
            self.now += timer.sample(step, repeats, DEVICE)

        return take


SAMPLES = Samples()


@pytest.mark.benchmark(timer=SAMPLES)
@pytest.mark.parametrize(("case", "contestant"), parameters())
def test_step(benchmark, case: Case, contestant: Contestant):
    if contestant.step is None:
        pytest.skip(contestant.missing)
    assert case.verify() is None
    contestant.step()
    benchmark.group = case.name
    benchmark.pedantic(SAMPLES.taking(contestant.step), rounds=5, warmup_rounds=1)
