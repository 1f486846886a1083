"""The checks of arguments, the tests of memory, and what an operator's definition checks."""

import math
import re

import numpy as np
import pytest
import torch

from uegr_kernels.core import checks, memory
from uegr_kernels.divergence import op

# Checks: one policy for numbers, Python's and NumPy's.


@pytest.mark.parametrize(
    "value", [1, 1.0, np.float32(1), np.float16(1), np.int8(1), np.array(1.0)[()]], ids=repr
)
def test_numbers_of_python_and_numpy_are_taken(value):
    found = checks.number("x", value, 0, 1)
    assert type(found) is float and found == 1


@pytest.mark.parametrize("value", [True, np.bool_(True), "1", None, [1.0], 1j], ids=repr)
def test_what_is_no_number_is_refused(value):
    for check in (checks.number, checks.integer):
        with pytest.raises(TypeError, match=r"x=.* is a \w+; give an? (number|integer)"):
            check("x", value)


@pytest.mark.parametrize(
    ("value", "options", "rule"),
    [
        (math.nan, {}, "give a finite number"),
        (math.inf, {}, "give a finite number"),
        (10**400, {}, "give a finite number"),
        # finite, and what multiplies it overflows
        (-1.5e308, {}, "give a finite number"),
        (-1, {"low": 0}, "give a finite number >= 0"),
        (0, {"low": 0, "without": 0}, "give a finite number > 0"),
        (2, {"low": 0, "high": 1}, "give a number in [0, 1]"),
        (1, {"low": 0, "high": 1, "without": 1}, "give a number in [0, 1)"),
        (np.float32(0), {"low": 0, "high": 1, "without": 0}, "give a number in (0, 1]"),
    ],
    ids=str,
)
def test_a_number_out_of_range_says_the_range(value, options, rule):
    with pytest.raises(ValueError, match=re.escape(f"is out of range; {rule}")):
        checks.number("x", value, **options)


def test_integers_and_flags():
    for value in (3, np.int32(3), np.uint8(3)):
        assert type(checks.integer("x", value, 0, bits=8)) is int
    for value, rule in ((-1, "integer in [0, 2^8)"), (256, "integer in [0, 2^8)")):
        with pytest.raises(ValueError, match=re.escape(rule)):
            checks.integer("x", value, 0, bits=8)
    with pytest.raises(TypeError, match="x=3.0 is a float; give an integer"):
        checks.integer("x", 3.0)
    assert checks.flag("x", np.bool_(False)) is False
    with pytest.raises(TypeError, match="x=1 is a int; give True or False"):
        checks.flag("x", 1)
    assert [checks.signed_seed(s) for s in (-1, 2**64 - 1, 2**63)] == [-1, -1, -(2**63)]


def test_choices():
    assert checks.choice("x", "b", ("a", "b")) == "b"
    for value in ("c", "", None, 0, ["a"]):
        with pytest.raises(ValueError, match=r"x=.* is not one of its values; use 'a', 'b'"):
            checks.choice("x", value, ("a", "b"))


# Memory: what overlaps, by layouts that slicing, expanding and as_strided give.

BLOCK = torch.zeros(6, 8)


@pytest.mark.parametrize(
    ("tensor", "overlaps"),
    [
        pytest.param(BLOCK, False, id="dense"),
        pytest.param(BLOCK.T[1::2], False, id="a view"),
        pytest.param(BLOCK[:1].expand(3, 8), True, id="expanded"),
        pytest.param(BLOCK[:0, :1].expand(0, 4), False, id="expanded, nothing in it"),
        pytest.param(BLOCK.as_strided((4, 3), (2, 1)), True, id="windows"),
        pytest.param(BLOCK.as_strided((2, 3), (3, 2)), False, id="strides that miss each other"),
        pytest.param(BLOCK.as_strided((3, 4), (3, 2)), True, id="strides that meet"),
    ],
)
def test_overlaps_itself(tensor, overlaps):
    assert memory.overlaps_itself(tensor) == overlaps


@pytest.mark.parametrize(
    ("tensors", "pair"),
    [
        pytest.param([BLOCK[:3], BLOCK[3:]], None, id="halves"),
        pytest.param([BLOCK[:, :4], BLOCK[:, 4:]], None, id="columns"),
        pytest.param([BLOCK[:, :5], BLOCK[:, 4:]], (0, 1), id="a common column"),
        pytest.param([BLOCK[::2], BLOCK[1::2].T], None, id="interleaved, of other strides"),
        pytest.param([BLOCK[0], BLOCK[1], BLOCK[:2].T], (0, 2), id="rows and both"),
        pytest.param([BLOCK, torch.zeros(6, 8)], None, id="two storages"),
    ],
)
def test_shared(tensors, pair):
    assert memory.shared(tensors) == pair


def test_an_operator_says_which_numbers_stand_for_words():
    options = {**op.LossOptions().numbers(), "reduction": 3, "needs": [False]}
    with pytest.raises(
        RuntimeError, match=r"reduction is 3; use 0 \(mean\), 1 \(sum\), 2 \(none\)"
    ):
        op.uegr_loss.fallback([BLOCK], None, **options)
