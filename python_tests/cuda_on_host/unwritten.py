"""What an operator would multiply by 1, or move by 0, it does not write: the memory may be read
only. Run by test_cuda.py, for a write ends the process.
"""

import ctypes
import mmap

import pytest
import torch

import uegr_kernels as uk
from uegr_kernels.core import native
from uegr_kernels.divergence import op

# the operators below are called past what would load it
assert native.load()[0] == "baseline"
# the memory lives as long as the process
KEPT = []


def read_only(values: torch.Tensor) -> torch.Tensor:
    """Gives the values in pages that nobody may write."""
    memory = mmap.mmap(-1, -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    KEPT.append(memory)
    tensor = (
        torch.frombuffer(memory, dtype=values.dtype, count=values.numel())
        .view(values.shape)
        .copy_(values)
    )
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert (
        protect(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(len(memory)), mmap.PROT_READ)
        == 0
    )
    return tensor


# whole accesses, single elements, a bias
SHAPES = [(2, 3, 16), (2, 3, 7), (5, 2048), (33,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_times_one(shape, dtype):
    values = torch.randn(shape).to(dtype)
    values.view(-1)[:3] = torch.tensor([-0.0, torch.inf, torch.nan])
    gradients = read_only(values)
    torch.ops.uegr_kernels.scale_gradients_([gradients], torch.ones(()))
    if len(shape) > 1:
        torch.ops.uegr_kernels.scale_gradients_([gradients], torch.ones(shape[-2]))
    assert torch.equal(gradients.nan_to_num(7.0), values.nan_to_num(7.0))


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_rows_times_one_beside_others(shape):
    # 0, 1, 2, ..
    values, factors = torch.randn(shape), torch.arange(shape[-2]).float()
    found = values.clone()
    torch.ops.uegr_kernels.scale_gradients_([found], factors)
    torch.testing.assert_close(found, values * factors[:, None], rtol=0, atol=0)


def test_gradients_that_are_all_selected():
    values = torch.randn(100)
    g = read_only(values)
    torch.ops.uegr_kernels.select_gradients_(
        [g],
        [],
        scope_statistics=None,
        layout=[0, 0, 100, 100],
        step=1,
        seed=1,
        threshold=0.8,
        sharpness=5.0,
        normalization=3,
        salient=False,
        previous=False,
        rescale=True,
        min_probability=0.0,
        keep_probability=1.0,
        target_update=False,
    )
    assert torch.equal(g, values)


@pytest.mark.parametrize("size", [4096, 77])
def test_weights_that_do_not_move(size):
    values = torch.randn(size)
    values[0] = -0.0
    still, moving = torch.nn.Parameter(read_only(values)), torch.nn.Parameter(values.clone())
    arguments = [torch.zeros(size), torch.ones(size)], None
    options = {
        "streams": [0, 1],
        "epsilon": 0.5,
        "together": False,
        "keep_probability": 1.0,
        "step": 0,
    }
    with torch.no_grad():
        torch.ops.uegr_kernels.perturb_weights_([still, moving], *arguments, **options)
    assert torch.equal(still, values) and torch.signbit(still[0])
    torch.testing.assert_close(moving.detach(), values + 0.5 / size**0.5)


def test_the_gradient_of_a_sum_of_rows_is_handed_out_as_it_is(monkeypatch):
    x = torch.randn(2, 4, 24, requires_grad=True)
    handed = []
    scale = op.scale_gradients_.default
    monkeypatch.setattr(
        op.scale_gradients_,
        "default",
        lambda g, by: scale([*map(read_only, g)], by) or handed.append(by),
    )
    uk.pairwise_js(x * 1, reduction="none", backend="cpp").sum().backward()
    assert [by.tolist() for by in handed] == [[1.0] * 4]
