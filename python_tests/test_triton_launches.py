"""Every public function's kernels, in all pairs of option values, compile and keep their
registers: for each target, with both Tritons.
"""

import itertools
import json
import pathlib
import re

import compile_all
import launches
import pytest
import torch

import uegr_kernels as uk
from bench import triton_code

FUNCTIONS = [(family, name) for family, names in launches.FAMILIES.items() for name in names]


def test_every_public_name_has_statements_or_a_reason():
    known = {name for _, name in FUNCTIONS} | set(launches.COMPOSED)
    unknown = sorted(set(uk.__all__) - known)
    assert not unknown, (
        f"put {unknown} into launches.FAMILIES, or into launches.COMPOSED with what they call"
    )


@pytest.mark.parametrize(("family", "name"), FUNCTIONS)
def test_every_option_has_values(family, name):
    unknown = [
        p
        for p in launches.parameters(getattr(uk, name))
        if p not in launches.VALUES[family] and p not in launches.SAME[family]
    ]
    assert not unknown, (
        f"{name}: give {unknown} values in launches.VALUES, or a place in launches.SAME if they "
        "change no kernel"
    )


@pytest.mark.parametrize(("family", "name"), FUNCTIONS)
def test_every_pair_of_values_stands_in_a_statement(family, name):
    table = launches.VALUES[family]
    rows = launches.rows(family)
    assert any(row["function"] == name for row in rows)
    own = [option for option in table if option in launches.options(family, name)]
    lacking = []
    for a, b in itertools.combinations(own, 2):
        for x, y in itertools.product(table[a], table[b]):
            excluded = any(
                {"function": name, a: x, b: y}.items() >= some.items()
                for some in launches.EXCLUDED[family]
            )
            if not excluded and not any(
                row.get(a, ...) == x and row.get(b, ...) == y for row in rows
            ):
                lacking.append((a, x, b, y))
    assert not lacking


def test_statements_are_at_most_40_and_call_every_function():
    statements = launches.statements()
    assert len(statements) <= 40
    called = set(re.findall(r"uk\.(\w+)\(", "\n".join(statements)))
    assert called == {name for _, name in FUNCTIONS}


def test_a_new_option_is_asked_for(monkeypatch):
    monkeypatch.setattr(uk, "pgd_step", lambda delta, grad, *, momentum, backend="auto": delta)
    with pytest.raises(AssertionError, match="pgd_step: give .'momentum'. values"):
        test_every_option_has_values("perturbation", "pgd_step")


@pytest.mark.parametrize("statement", launches.statements())
def test_statements_are_calls_that_run(statement):
    exec(statement, {"torch": torch, "uk": uk})


def leaves_all_alone(statement):
    """Tells whether every probability is 1: the gradients stay as they are, and nothing is
    launched.
    """
    words = ("select_gradients_(", "normalization='constant'", "keep_probability=1.0")
    return all(word in statement for word in words)


EVERY = [
    pytest.param(*one, id="-".join(("triton", *one)))
    for one in itertools.product(triton_code.VERSIONS, triton_code.TARGETS)
]


@pytest.mark.parametrize(("version", "target"), EVERY)
def test_every_statement_compiles_and_spills_next_to_nothing(version, target):
    pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")
    if (reason := triton_code.why_not(version)) is not None:
        pytest.skip(reason)
    found = triton_code.usage(*launches.calls())[version, target]
    assert [line["statement"] for line in found] == list(launches.calls())
    errors = [f"{line['error']} in\n{line['statement']}" for line in found if "error" in line]
    assert not errors, "\n".join(errors)
    for line in found:
        assert bool(line["kernels"]) != leaves_all_alone(line["statement"]), line["statement"]
        spilled = [kernel[:4] for kernel in line["kernels"] if kernel[3] > triton_code.MOST_SPILLED]
        assert not spilled or "float64" in line["statement"], f"{spilled} in\n{line['statement']}"


@pytest.mark.parametrize(("family", "name"), FUNCTIONS)
def test_the_product_has_calls_without_repetition(family, name):
    calls = launches.product(family, name, "float32")
    assert calls and len(set(calls)) == len(calls)


def test_what_is_committed_of_the_product_compiled_and_spills_next_to_nothing():
    path = pathlib.Path(__file__).parent.parent / "bench/results/triton_code.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    keys = [tuple(line[key] for key in compile_all.KEYS) for line in lines]
    assert lines and len(set(keys)) == len(keys)
    families = {name: family for family, name in FUNCTIONS}
    for line in lines:
        name, dtype = line["function"], line["dtype"]
        assert line["calls"] == len(launches.product(families[name], name, dtype)), line
        assert line["kernels"] and not line["errors"], line
        assert dtype == "float64" or line["most_spilled"] <= triton_code.MOST_SPILLED, line
