"""Triton's operators called directly: a loss of labels without an adversarial pass, and memory that
is left alone.
"""

import ctypes
import faulthandler
import mmap
import os
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F

import uegr_kernels as uk
from uegr_kernels.divergence import LossOptions, op
from uegr_kernels.perturbation import op as perturbation

pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")


# ---- Labels alone: the loss is the cross entropy, or the squares

ROWS = 5
CASES = {
    "indices": {},
    "smoothed": {"label_smoothing": 0.1},
    "soft": {"labels": "soft"},
    "soft, smoothed": {"labels": "soft", "label_smoothing": 0.1},
    "regression": {"labels": "values", "task": "regression"},
}


def labels_of(kind: str, classes: int, dtype: torch.dtype) -> torch.Tensor:
    if kind == "indices":
        labels = torch.arange(ROWS) % classes
        labels[1] = -100
        return labels
    values = torch.randn(ROWS, classes, dtype=dtype)
    return values.softmax(-1) if kind == "soft" else values


def expected(x, labels, reduction, label_smoothing, task):
    if task == "regression":
        rows = F.mse_loss(x, labels, reduction="none").mean(-1)
        return {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]
    return F.cross_entropy(x, labels, reduction=reduction, label_smoothing=label_smoothing)


# rows of a block: several, one, a part; each reduction; gradients over the logits and beside them
RUNS = [
    (3, "mean", False),
    (3, "none", True),
    (300, "sum", True),
    (4099, "none", False),
    (4099, "mean", True),
]


@pytest.mark.parametrize(("classes", "reduction", "in_place"), RUNS)
@pytest.mark.parametrize("case", CASES)
def test_labels_alone(case, classes, reduction, in_place):
    dtype = torch.float32 if classes == 300 else torch.float64
    options = {"label_smoothing": 0.0, "task": "classification", "labels": "indices"} | CASES[case]
    x = torch.randn(ROWS, classes, dtype=dtype)
    labels = labels_of(options.pop("labels"), classes, dtype)
    leaf = x.clone().requires_grad_()
    want = expected(leaf, labels, reduction, **options)
    (want_gradient,) = torch.autograd.grad(want.sum(), leaf)
    name = "uegr_loss_" if in_place else "uegr_loss"
    loss, parts, *rest = getattr(op, name).kernel("triton")(
        [x],
        labels,
        options=LossOptions(js_weight=0.5, reduction=reduction, **options),
        needs=[True],
    )
    gradient = x if in_place else rest[0][0]
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(parts[0], want.detach())
    assert (parts[1:] == 0).all()
    torch.testing.assert_close(gradient, want_gradient)


def test_labels_alone_without_a_gradient():
    x, labels = torch.randn(ROWS, 10), torch.arange(ROWS)
    loss, _, gradients = op.uegr_loss.kernel("triton")(
        [x], labels, options=LossOptions(js_weight=0.5), needs=[False]
    )
    torch.testing.assert_close(loss, F.cross_entropy(x, labels))
    assert gradients == []


# ---- What is multiplied by 1, or moved by 0, is neither read nor written

# the memory lives as long as the process
KEPT = []
# each row has pages of its own
ROW_BYTES = mmap.PAGESIZE


def protect(tensor: torch.Tensor, access: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).mprotect
    assert call(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(ROW_BYTES), access) == 0


def rows_of_pages(rows: int, classes: int, dtype: torch.dtype) -> torch.Tensor:
    memory = mmap.mmap(-1, rows * ROW_BYTES)
    KEPT.append(memory)
    tensor = torch.frombuffer(memory, dtype=dtype).view(rows, -1)
    return tensor.copy_(torch.randn(tensor.shape))[:, :classes]


def touches(rows: Iterable[torch.Tensor], run) -> bool:
    """Says whether `run`, in a process of its own, reads or writes the rows."""
    for row in rows:
        protect(row, 0)
    child = os.fork()
    if child == 0:
        status = 1
        faulthandler.disable()
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    (_, status) = os.waitpid(child, 0)
    for row in rows:
        protect(row, mmap.PROT_READ | mmap.PROT_WRITE)
    # 11: a segmentation fault
    assert status in (0, 11), "the call failed"
    return status != 0


# rows of a block: several (whole accesses, single elements), one
CLASSES = [8, 7, 1000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_row", [False, True], ids=["one factor", "by row"])
@pytest.mark.parametrize("classes", CLASSES)
def test_gradients_times_one_are_left_alone(classes, by_row, dtype):
    gradients = rows_of_pages(4, classes, dtype)
    scale, ones = op.scale_gradients_.kernel("triton"), torch.ones((4,) if by_row else ())
    assert not touches(gradients, lambda: scale([gradients], ones))
    assert touches(gradients[:1], lambda: scale([gradients], 2 * ones))


@pytest.mark.parametrize("classes", CLASSES)
def test_rows_times_one_are_left_alone_beside_others(classes):
    gradients = rows_of_pages(6, classes, torch.float32)
    factors = torch.tensor([1.0, 0.5, 1.0, torch.nan, -1.0, 1.0])
    scale = op.scale_gradients_.kernel("triton")
    assert not touches([gradients[i] for i in (0, 2, 5)], lambda: scale([gradients], factors))
    assert touches(gradients[1:2], lambda: scale([gradients], factors))
    want = gradients * factors[:, None]
    scale([gradients], factors)
    torch.testing.assert_close(gradients, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("by_row", [False, True], ids=["one factor", "by row"])
def test_what_is_times_one_is_copied_where_it_goes_elsewhere(by_row):
    gradient = torch.randn(4, 7)
    ones = torch.ones((4,) if by_row else ())
    (scaled,) = op.scale_gradients.kernel("triton")([gradient], ones, torch.zeros(3))
    assert torch.equal(scaled, gradient)


def test_gradients_that_are_all_selected_are_left_alone():
    p = torch.nn.Parameter(torch.zeros(100))
    pages = rows_of_pages(1, 100, torch.float32)
    p.grad = pages[0]

    def select(keep_probability: float) -> None:
        options = {"normalization": "constant", "keep_probability": keep_probability}
        uk.select_gradients_([p], seed=1, step=1, backend="triton", **options)

    assert not touches(pages, lambda: select(1.0))
    assert touches(pages, lambda: select(0.5))


def test_weights_that_do_not_move_are_left_alone():
    pages = rows_of_pages(1, 100, torch.float32)
    options = {"streams": [0], "together": False, "keep_probability": 1.0, "step": 0}

    def move(epsilon: float) -> None:
        perturbation.perturb_weights_.kernel("triton")(
            [pages[0]], [torch.ones(100)], None, epsilon=epsilon, **options
        )

    assert not touches(pages, lambda: move(0.0))
    assert touches(pages, lambda: move(0.5))
