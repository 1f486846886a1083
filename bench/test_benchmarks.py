"""The main cases at small sizes under pytest-benchmark: `pytest bench --benchmark-only`. Wrong
results fail, no time does.
"""

import importlib

import pytest
import torch

from . import machine
from .harness import Case, Contestant
from .machine import Step

pytest.importorskip(
    "pytest_benchmark",
    reason="pytest-benchmark is not installed; run `pip install pytest-benchmark`",
)

DEVICE = "cpu" if machine.no_gpu() else "cuda"
MAIN = {  # a suite's cases at the sizes of --quick
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


@pytest.mark.parametrize(("case", "contestant"), parameters())
def test_step(benchmark, case: Case, contestant: Contestant):
    if contestant.step is None:
        pytest.skip(contestant.missing)
    assert case.verify() is None
    benchmark.group = case.name
    benchmark.pedantic(waited_for(contestant.step), rounds=5, warmup_rounds=2)


def waited_for(step: Step) -> Step:
    """The step as the processor's clock sees the whole of it."""
    if DEVICE == "cpu":
        return step

    def both() -> None:
        step()
        torch.cuda.synchronize()

    return both
