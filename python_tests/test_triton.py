"""What is Triton's own: the generator in its language, tables and launches, and what the compilers make of the kernels."""

import pytest
import torch
from compiled import TARGETS, kernels
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


# What is compiled ahead of time: statements that launch every kernel, in the variants that are most likely to spill.
PARAMETER = "p = torch.nn.Parameter(torch.zeros(2048, dtype=torch.{})); p.grad = torch.zeros_like(p); "
ADAMW = "uk.SelectiveAdamW([p], seed=1, {}).step()"
SGD = "uk.SelectiveSGD([p], seed=1, {}).step()"
STEP = PARAMETER.format("float32") + ADAMW.format("")
PREVIOUS_STEP = PARAMETER.format("float32") + ADAMW.format("statistics='previous'")
STATEMENTS = {
    "step": STEP,
    "previous": PREVIOUS_STEP,
    "bfloat16": PARAMETER.format("bfloat16")
    + ADAMW.format("state_dtype=torch.bfloat16, amsgrad=True, target='update', statistics='previous', capturable=True"),
    "float64": PARAMETER.format("float64") + ADAMW.format("amsgrad=True, lr=torch.tensor(0.1)"),
    "strided rank": "p = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.float16).t()); p.grad = torch.zeros_like(p); "
    + SGD.format("momentum=0.9, nesterov=True, normalization='rank'"),
    "global": PARAMETER.format("float32") + SGD.format("scope='global', statistics='previous'"),
    "global rank": PARAMETER.format("float32") + SGD.format("scope='global', normalization='rank', momentum=0.9, rescale=False"),
    "gradients": PARAMETER.format("float32") + "uk.select_gradients_(p, seed=1, step=1, saliency=[p.grad.abs()])",
    "probability": PARAMETER.format("bfloat16") + "uk.selection_probability(p.grad, normalization='range')",
    "mask": PARAMETER.format("float32") + "uk.selection_mask(p.grad, seed=1, step=1, normalization='constant', keep_probability=0.5)",
}


def launched(name: str, target: str):
    return kernels(*STATEMENTS.values())[STATEMENTS[name], target]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", STATEMENTS)
def test_nothing_is_spilled(name, target):
    found = launched(name, target)
    assert found
    for kernel in found:
        assert kernel.spilled == 0, f"{kernel.name}: {kernel.spilled} spilled with {kernel.registers} registers"
        assert kernel.count(r"(LDL|STL|scratch).*") == 0, f"{kernel.name} uses local memory: {kernel.memory}"


def test_every_kernel_is_compiled():
    from uegr_kernels.selective import triton as selective

    every = {name for name, value in vars(selective).items() if hasattr(value, "run") and "program_id" in value.fn.__code__.co_names}
    assert every | {"join"} == {kernel.name for name in STATEMENTS for kernel in launched(name, "sm_90")}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["step", "previous"])
def test_the_whole_blocks_of_a_float32_step_are_read_and_written_by_128_bits(name, target):
    walk = next(kernel for kernel in launched(name, target) if kernel.name == "walk")
    threads = 256 if target.startswith("gfx") else 128
    each = 1024 // 4 // threads  # 128-bit accesses of a thread to a list's block
    loads, stores = walk.wide
    assert loads >= 5 * each  # parameter, moments, gradient; the gradient of what is gathered
    assert stores == 3 * each
    # Only unmasked accesses say how long the cache is to keep them.
    assert walk.count(r"(LDG|STG)\..*\.E[FL]\b(?!.*\b128\b).*") == 0, f"narrow accesses in whole blocks: {walk.memory}"
