"""Shared by all tests: the `backend` fixture, NaN-filled memory, seeds, and the one tolerance
table.
"""

import contextlib
import os
import pathlib
import sys
import typing

# before Triton is imported: its interpreter runs the kernels on the CPU
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
import torch

from uegr_kernels.core import backends

if os.environ["TRITON_INTERPRET"] == "1":
    # Triton is an extra
    with contextlib.suppress(ModuleNotFoundError):
        import interpreter

        interpreter.quicken()

hypothesis.settings.register_profile(
    "house",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("house")


def pytest_addoption(parser):
    parser.addoption(
        "--long",
        action="store_true",
        help="what takes minutes too: compiles for GPUs, Transformers' Trainer, examples, wheels, "
        "Triton's kernels on its interpreter",
    )
    parser.addoption(
        "--only-triton", action="store_true", help="of all tests, those of Triton's kernels alone"
    )
    parser.addoption(
        "--every-case",
        action="store_true",
        help="on interpreted Triton kernels too, all combinations of a test's parameters",
    )


# beside tests marked as long
LONG = (
    "test_cuda",
    "test_triton",
    "test_integrations",
    "test_docs_commands",
    "test_examples",
    "test_hub",
)


def pytest_collection_modifyitems(config, items):
    """Leaves out what is long, unless it is asked for: by option, or, but for Triton's kernels, by
    a file's name.

    Triton's interpreter, as slow as it is, gets the cases in triton_cases.txt alone.
    """
    named = any(argument.split("::")[0].endswith(".py") for argument in config.args)
    only_triton = config.getoption("--only-triton")
    everything = config.getoption("--long") or only_triton
    if not (named or everything):
        long = [
            item
            for item in items
            if item.path.stem in LONG
            or item.get_closest_marker("long")
            or {"wheel", "sdist"} & {*getattr(item, "fixturenames", ())}
        ]
        items[:] = [item for item in items if item not in set(long)]
        config.hook.pytest_deselected(items=long)
    slow = {
        item
        for item in items
        if item.path.stem == "test_triton_resources"
        or "[triton" in item.name
        or "-triton" in item.name
    }
    left_out = slow
    if everything:
        left_out = set(items) - slow if only_triton else set()
        whole = not any("::" in argument for argument in config.args)
        left_out |= set() if config.getoption("--every-case") else not_chosen(slow, whole=whole)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def chosen_for_triton():
    """Returns the cases in triton_cases.txt, by the test that they are of."""
    chosen, cases = {}, set()
    folder = pathlib.Path(__file__).parent
    for line in (folder / "triton_cases.txt").read_text().splitlines():
        if line.startswith("    "):
            cases.add(line.strip())
        elif not line.startswith("#"):
            cases = chosen[f"{folder.name}/{line}"] = set()
    return chosen


def not_chosen(items, *, whole):
    """Returns the cases of tests in triton_cases.txt that do not stand there.

    whole  all cases of a test are among the items: one that stands there and is none is an error
    """
    chosen, found = chosen_for_triton(), {}
    for item in items:
        test, _, case = item.nodeid.partition("[")
        if test in chosen:
            found.setdefault(test, {})[case.removesuffix("]")] = item
    for test, cases in found.items():
        if whole and (gone := chosen[test] - cases.keys()):
            raise pytest.UsageError(f"triton_cases.txt: {test} has no case {min(gone)!r}")
    return {
        item
        for test, cases in found.items()
        for case, item in cases.items()
        if case not in chosen[test]
    }


def operator_tests(operator: str) -> str:
    """Returns the name of an operator's tests: a file's, or that of a folder of them."""
    folder = pathlib.Path(__file__).parent / f"test_{operator}"
    return folder.name if folder.is_dir() else f"{folder.name}.py"


def serve_or_skip(request: pytest.FixtureRequest) -> str:
    """Returns the backend of a fixture's parameter; skips with the reason where one of the
    OPERATORS of the test module, or of its package, cannot be served.
    """
    module = request.module
    if not hasattr(module, "OPERATORS"):
        module = sys.modules[module.__package__]
    for operator in module.OPERATORS:
        reason = backends.why_not(request.param, operator, torch.device("cpu"))
        if reason is not None:
            pytest.skip(f"{request.param}, {operator}: {reason}")
    return request.param


@pytest.fixture(params=("reference", "cpp", "triton"))
def backend(request) -> str:
    """Gives every backend that serves the test module's OPERATORS ("folder.name") on the CPU."""
    return serve_or_skip(request)


@pytest.fixture(params=("cpp", "triton"))
def native(request) -> str:
    """Gives the same without the reference: what agreement with the reference is tested on."""
    return serve_or_skip(request)


@pytest.fixture
def process_group(tmp_path):
    """Gives a group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Makes torch.empty give NaN (the largest integer for integers), so that a result nobody wrote
    shows.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # what torch fills fresh memory under
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(20261121)


@pytest.fixture(autouse=True)
def one_thread():
    """Keeps to one thread: small tensors on many threads wait for each other on a busy machine. A
    test of threads sets their number itself.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Tolerance(typing.NamedTuple):
    """Says how elements agree: within `relative` of themselves plus `largest` of the tensor's
    largest magnitude.

    A share of `strays` may be further away, by one unit in the last place (`ulp`, relative): two
    roundings of nearly equal numbers.
    """

    relative: float
    largest: float
    strays: float = 0.0
    ulp: float = 0.0


TOLERANCES = {
    # p and g/p: z = 2*sharpness*(s~ - threshold) is rounded once at a size of up to 10, so exp(z)
    # is off by 10 * 2^-24, and each of some five operations by 2^-24. A result in 16 bits is
    # rounded once more, where nearly equal numbers may fall on two sides.
    "selection": {
        torch.float32: Tolerance(2e-6, 0.0),
        torch.float64: Tolerance(1e-14, 0.0),
        torch.bfloat16: Tolerance(2e-6, 0.0, strays=0.01, ulp=2**-7),
        torch.float16: Tolerance(2e-6, 0.0, strays=0.02, ulp=2**-9),
    },
    # A rank by the shared histogram: 1/p of every bin may be kept in float32, whatever the
    # gradient's dtype.
    "rank": {
        torch.float32: Tolerance(2e-6, 0.0),
        torch.float64: Tolerance(2e-6, 0.0),
        torch.bfloat16: Tolerance(2e-6, 0.0, strays=0.01, ulp=2**-7),
        torch.float16: Tolerance(2e-6, 0.0, strays=0.02, ulp=2**-9),
    },
    # Parameters and float32 states after a few steps: a moment that cancels keeps the error of what
    # was added, so the largest counts; 1e-6 is the bound on a hundred steps of AdamW that the
    # package promises. In float64 the same with 2^-53.
    "step": {
        torch.float32: Tolerance(2e-6, 1e-6),
        torch.float64: Tolerance(1e-14, 1e-14),
        torch.bfloat16: Tolerance(2e-6, 1e-6, strays=0.02, ulp=2**-7),
        torch.float16: Tolerance(2e-6, 1e-6, strays=0.05, ulp=2**-9),
    },
    "rank step": {
        torch.float32: Tolerance(2e-6, 1e-6),
        torch.float64: Tolerance(2e-6, 1e-6),
        torch.bfloat16: Tolerance(2e-6, 1e-6, strays=0.02, ulp=2**-7),
        torch.float16: Tolerance(2e-6, 1e-6, strays=0.05, ulp=2**-9),
    },
    # A hundred steps: the roundings of each step add up.
    "trajectory": {
        torch.float32: Tolerance(0.0, 1e-6),
        torch.float64: Tolerance(0.0, 1e-13),
        torch.bfloat16: Tolerance(0.0, 1e-6, strays=0.05, ulp=2**-6),
        torch.float16: Tolerance(0.0, 1e-6, strays=0.1, ulp=2**-8),
    },
    "equal": dict.fromkeys(
        (torch.float32, torch.float64, torch.bfloat16, torch.float16), Tolerance(0.0, 0.0)
    ),
}


def compare(
    actual: torch.Tensor,
    expected: torch.Tensor,
    operation: str,
    *,
    name: str = "result",
    ignore: torch.Tensor | None = None,
    scale: float = 1.0,
    row: torch.dtype | None = None,
) -> None:
    """Fails with the first differing element and its coordinates where `actual` is not `expected`
    by the table's row for its dtype.

    Non-finite elements must be the same ones. `ignore`: a bool tensor of elements that are not
    looked at. `scale` multiplies the bounds; `row`: the dtype of another row.
    """
    assert actual.dtype == expected.dtype, (
        f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    )
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    looked_at = torch.ones_like(expected, dtype=torch.bool) if ignore is None else ~ignore
    allowed = 0
    if expected.is_floating_point():
        tolerance = TOLERANCES[operation][row or expected.dtype]
        a, e = actual.detach().double(), expected.detach().double()
        finite, gaps = e.isfinite(), (a - e).abs()
        largest = e[finite].abs().max() if finite.any() else 0.0
        bound = scale * (tolerance.relative * e.abs() + tolerance.largest * largest)
        wrong = ~((a == e) | (a.isnan() & e.isnan()) | finite & (gaps <= bound)) & looked_at
        # What is added up keeps the last place of where it was rounded.
        strays = (
            wrong
            & finite
            & (
                gaps
                <= tolerance.ulp * (largest if tolerance.largest else e.abs())
                + torch.finfo(expected.dtype).smallest_normal
            )
        )
        allowed = int(tolerance.strays * wrong.numel() + 1) if tolerance.strays else 0
        if strays.sum() <= allowed:
            wrong &= ~strays
    else:
        wrong = (actual != expected) & looked_at
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ; the first at {at}: "
            f"{actual[at].item()!r}, expected {expected[at].item()!r}"
            + (f" (strays allowed: {allowed}, found: {int(strays.sum())})" if allowed else "")
        )
