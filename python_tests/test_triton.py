"""What is Triton's own: the generator in its language, tables and launches, and what the compilers make of the kernels."""

import pytest
import torch
from test_core import WORD_CASES

from uegr_kernels.core import philox

triton = pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")
import triton.language as tl  # noqa: E402

from uegr_kernels.core import triton_ops  # noqa: E402


@triton.jit
def words_kernel(out, numbers, BLOCK: tl.constexpr, IN_ORDER: tl.constexpr):
    first, offset, run, stride = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    stream, step, seed = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    if IN_ORDER:
        word = triton_ops.words_in_order(offset + first, seed, step, stream, BLOCK)
    else:
        word = triton_ops.words(triton_ops.element_indices(first + tl.arange(0, BLOCK), offset, run, stride), seed, step, stream)
    tl.store(out + tl.arange(0, BLOCK), word.to(tl.int32, bitcast=True))


def triton_words(first, n, layout, step, seed, in_order) -> list[int]:
    """The words of local elements [first, first + n), by one call for four neighbours or by a call each."""
    out = torch.zeros(max(triton.next_power_of_2(n), 4), dtype=torch.int32)
    stream, offset, run, stride = layout
    words_kernel[(1,)](out, torch.tensor([first, offset, run, stride, stream, step, seed]), BLOCK=len(out), IN_ORDER=in_order)
    return (out[:n].long() & 0xFFFFFFFF).tolist()


@pytest.mark.parametrize("seed", [5, -(2**63) + 11])
@pytest.mark.parametrize(("layout", "begin", "n"), WORD_CASES)
def test_words_are_the_references(layout, begin, n, seed):
    _, offset, run, _ = layout
    expected = philox.words(philox.element_indices(begin + n, layout[1:])[begin:], seed=seed, step=2**24 - 1, stream=layout[0])
    for in_order in (False, True)[: 2 if run >= begin + n and offset % 4 == 0 else 1]:
        assert triton_words(begin, n, layout, 2**24 - 1, seed, in_order) == expected.tolist()


def test_words_have_the_known_answers():
    for in_order in (False, True):
        assert triton_words(0, 4, (0, 0, 4, 4), 0, 0, in_order) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
