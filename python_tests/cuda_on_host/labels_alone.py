"""The losses of labels alone, without another pass: F.cross_entropy and F.mse_loss, and their
gradients. Run by test_cuda.py, on the CPU's library and on the CUDA operators for a host.
"""

import pytest
import torch
import torch.nn.functional as F

from uegr_kernels.core import native

# the operators below are called past what would load it
assert native.load()[0] == "baseline"
LOSSES = torch.ops.uegr_kernels
REDUCTIONS = ("mean", "sum", "none")


def run(x, labels, *, reduction, smoothing=0.0, ignore_index=-100, regression=False, inplace=False):
    """Returns the loss, its parts and the gradient by the logits."""
    logits = x.clone()
    arguments = {
        "js_weight": 0.7,
        "label_smoothing": smoothing,
        "ignore_index": ignore_index,
        "reduction": REDUCTIONS.index(reduction),
        "regression": regression,
        "needs": [True],
    }
    if inplace:
        return (*LOSSES.uegr_loss_([logits], labels, **arguments), logits)
    loss, parts, (gradient,) = LOSSES.uegr_loss([logits], labels, **arguments)
    assert torch.equal(logits, x)
    return loss, parts, gradient


def agree(found, x, loss_of):
    """Checks the loss, its parts and its gradient against another's."""
    loss, parts, gradient = found
    wide = x.double().requires_grad_()
    expected = loss_of(wide)
    expected.sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(loss, expected.detach().float(), **close)
    torch.testing.assert_close(parts[0], expected.detach().float(), **close)
    # no adversarial loss, no divergence
    assert not parts[1:].any()
    torch.testing.assert_close(gradient, wide.grad.float(), **close)


# what a warp, a block and single elements take on a GPU
SIZES = [(5, 8), (3, 37), (4, 1024), (2, 2048), (2, 2051)]


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_class_indices(size, reduction, smoothing, inplace):
    x, labels = 3 * torch.randn(size), torch.randint(size[1], size[:1])
    found = run(x, labels, reduction=reduction, smoothing=smoothing, inplace=inplace)
    agree(
        found,
        x,
        lambda x: F.cross_entropy(x, labels, reduction=reduction, label_smoothing=smoothing),
    )


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ignored_rows(size, reduction, inplace):
    x, labels = torch.randn(size), torch.randint(size[1], size[:1])
    labels[1] = 3
    labels[0] = 4
    found = run(x, labels, reduction=reduction, ignore_index=3, inplace=inplace)
    agree(found, x, lambda x: F.cross_entropy(x, labels, reduction=reduction, ignore_index=3))


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_soft_labels(reduction, smoothing, inplace):
    x, labels = torch.randn(6, 19), torch.rand(6, 19).softmax(-1)
    found = run(x, labels, reduction=reduction, smoothing=smoothing, inplace=inplace)
    agree(
        found,
        x,
        lambda x: F.cross_entropy(
            x, labels.double(), reduction=reduction, label_smoothing=smoothing
        ),
    )


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_regression(reduction, inplace):
    x, labels = torch.randn(6, 3), torch.randn(6, 3)

    def squares(x):
        rows = (x - labels).square().mean(-1)
        return rows if reduction == "none" else getattr(rows, reduction)()

    found = run(x, labels, reduction=reduction, regression=True, inplace=inplace)
    agree(found, x, squares)


def test_half_precision():
    x, labels = torch.randn(6, 16).bfloat16(), torch.randint(16, (6,))
    loss, parts, gradient = run(x, labels, reduction="mean")
    wide = x.float().requires_grad_()
    expected = F.cross_entropy(wide, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, wide.grad.bfloat16())
    assert parts.tolist() == [loss.item(), 0, 0]
