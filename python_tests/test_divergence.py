"""The losses: against other people's functions, literals and properties; gradients, memory,
compilers, bad input.
"""

import copy
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.spatial.distance
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uegr_kernels.divergence import (
    LossParts,
    PairwiseJSLoss,
    UEGRLoss,
    linear_pairwise_js,
    linear_uegr_loss,
    op,
    pairwise_js,
    reference,
    uegr_loss,
)

OPERATORS = ("divergence.uegr_loss",)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# |difference| allowed in a loss or a gradient near 1: the rounding of the result, and of logits
# near 5 in the exponent.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LN2 = math.log(2)


def random_logits(*shape, dtype=torch.float64, seed=0, scale=2.0):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * scale
    ).to(dtype)


def batch(m=3, n=5, c=7, dtype=torch.float64, requires_grad=True):
    """Clean logits, adversarial logits, labels of which one is ignored."""
    labels = torch.randint(0, c, (n,), generator=torch.Generator().manual_seed(1))
    labels[1] = -100
    clean, adversarial = (
        random_logits(n, c, dtype=dtype, seed=2),
        random_logits(m, n, c, dtype=dtype, seed=3),
    )
    return clean.requires_grad_(requires_grad), adversarial.requires_grad_(requires_grad), labels


def scipy_js(logits):
    """Rows' sum over pairs, by SciPy."""
    p = logits.detach().double().softmax(-1).numpy()
    pairs = [(k, l) for k in range(len(p)) for l in range(k + 1, len(p))]
    return torch.tensor(
        [
            sum(scipy.spatial.distance.jensenshannon(p[k, i], p[l, i]) ** 2 for k, l in pairs)
            for i in range(p.shape[1])
        ]
    )


def torch_js(logits):
    """The same by F.kl_div, differentiable; plain, for distributions that are not close."""
    log_p = logits.log_softmax(-1)
    total = 0
    for k in range(len(logits)):
        for l in range(k + 1, len(logits)):
            mean = torch.logsumexp(torch.stack((log_p[k], log_p[l])), 0) - LN2
            total = (
                total
                + sum(
                    F.kl_div(mean, log_p[i], log_target=True, reduction="none").sum(-1)
                    for i in (k, l)
                )
                / 2
            )
    return total


def torch_loss(clean, adversarial, labels, js_weight, reduction="mean", **options):
    """L_train by PyTorch's functions; every term divided by the rows that are not ignored."""
    keep = (
        labels != options.get("ignore_index", -100)
        if labels.dim() == 1
        else torch.ones(len(labels), dtype=torch.bool)
    )
    rows = F.cross_entropy(clean, labels, reduction="none", **options)
    rows = rows + sum(
        F.cross_entropy(x, labels, reduction="none", **options) for x in adversarial
    ) / len(adversarial)
    rows = (rows + js_weight * torch_js(adversarial)).where(keep, 0)
    return {"mean": rows.sum() / keep.sum(), "sum": rows.sum(), "none": rows}[reduction]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [2, 3, 5])
def test_js_equals_scipy(backend, dtype, m):
    logits = random_logits(m, 6, 9, dtype=dtype)
    js = pairwise_js(logits, reduction="none", backend=backend)
    assert js.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(js.double(), scipy_js(logits), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pairwise_js(logits, backend=backend), js.mean())
    torch.testing.assert_close(
        pairwise_js(list(logits), reduction="sum", backend=backend), js.sum()
    )


def test_js_literals(backend):
    # P = (3/4, 1/4), Q = (1/4, 3/4): M is uniform, JS = ln 2 - H(1/4) = 3/4 ln 3 - ln 2 =
    # 0.130812...
    x = torch.tensor([[[math.log(3), 0.0]], [[0.0, math.log(3)]]], dtype=torch.float64)
    assert pairwise_js(x, backend=backend).item() == pytest.approx(0.13081203594113698, abs=1e-15)
    # ln(3)/2 - 3/8 = by hand: dJS/dx_0 = p_0 (log(p_0/M_0) - KL(P||M))/2 = 3/8 (ln 3/2 - (3/4 ln 3
    # - ln 2)) = 0.1029949...
    x.requires_grad_()
    pairwise_js(x, backend=backend).backward()
    assert x.grad[0, 0, 0].item() == pytest.approx(
        0.375 * (math.log(1.5) - 0.13081203594113698), abs=1e-15
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_logits_give_exactly_zero(backend, dtype):
    row = random_logits(4, 33, dtype=dtype, scale=20.0)
    row[0, :5] = -torch.inf
    logits = torch.stack((row, row, row)).requires_grad_()
    loss = pairwise_js(logits, reduction="none", backend=backend)
    loss.sum().backward()
    assert loss.count_nonzero() == 0 and logits.grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_disjoint_logits_give_ln2(backend, dtype):
    x = torch.full((2, 1, 4), -torch.inf, dtype=dtype)
    x[0, 0, :2] = x[1, 0, 2:] = 1.0
    x.requires_grad_()
    loss = pairwise_js(x, backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(LN2, rel=1e-6)
    assert x.grad.isfinite().all() and x.grad.abs().max() < 1e-6
    far = torch.tensor([[[80.0, -80.0]], [[-80.0, 80.0]]], dtype=dtype)
    assert pairwise_js(far, backend=backend).item() == pytest.approx(LN2, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(2, 4),
    n=st.integers(0, 4),
    c=st.integers(1, 40),
    scale=st.sampled_from([1e-4, 1.0, 80.0]),
    seed=st.integers(0, 99),
    masked=st.integers(0, 3),
)
def test_js_properties(m, n, c, scale, seed, masked):
    logits = random_logits(m, n, c, dtype=torch.float32, seed=seed).clamp(-1, 1) * scale
    logits[:, :, 1 : 1 + masked] = -torch.inf
    js = pairwise_js(logits, reduction="none")
    assert js.shape == (n,) and (js >= 0).all() and (js <= m * (m - 1) / 2 * LN2 * (1 + 1e-6)).all()
    torch.testing.assert_close(
        pairwise_js(logits.flip(0), reduction="none"), js, rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        js.double(),
        pairwise_js(logits.double(), reduction="none"),
        rtol=1e-5,
        atol=1e-7 * m * (m - 1) / 2,
    )
    shifted = pairwise_js(logits.double() + 3, reduction="none")
    torch.testing.assert_close(js.double(), shifted, rtol=1e-5, atol=1e-7 * m * (m - 1) / 2)


def test_gradients_in_float32_are_right_to_the_rows_largest(backend):
    logits = random_logits(3, 8, 200, seed=5).clamp(-1, 1) * 80
    wide, narrow = logits.clone().requires_grad_(), logits.float().requires_grad_()
    pairwise_js(wide.float().double(), reduction="sum", backend="reference").backward()
    pairwise_js(narrow, reduction="sum", backend=backend).backward()
    largest = wide.grad.abs().amax(-1, keepdim=True)
    assert ((narrow.grad - wide.grad).abs() / largest).max() < 1e-5


def compare_with_wide_reference(native, logits, labels, **options):
    """Losses to 1e-5 or 1e-7 nats a pair, gradients to 1e-5 of their row's largest or 1e-7,
    against the reference in float64.
    """
    narrow, wide = (
        [x.clone().requires_grad_() for x in logits],
        [x.double().requires_grad_() for x in logits],
    )
    call = {"reduction": "none", "return_parts": True, "js_weight": 0.5} | options
    parts = uegr_loss(*narrow, labels, backend=native, **call)
    expected = uegr_loss(*wide, labels, backend="reference", **call)
    for found, value in zip(parts, expected, strict=True):
        torch.testing.assert_close(
            found.double(),
            value,
            rtol=1e-5,
            atol=1e-7 * max(1, len(logits[1]) * (len(logits[1]) - 1) // 2),
        )
    parts.loss.sum().backward()
    expected.loss.sum().backward()
    for x, y in zip(narrow, wide, strict=True):
        assert (
            (x.grad - y.grad).abs() <= (1e-5 * y.grad.abs().amax(-1, keepdim=True)).clamp(min=1e-7)
        ).all()


# Around one vector, one block of 1024, and passes from none in pairs to more than a fixed number.
@pytest.mark.parametrize("c", [1, 2, 15, 16, 17, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 6, 8])
def test_kernel_is_the_wide_reference(native, m, c):
    if native == "triton" and m * c > 5000:
        m = 2  # many passes of many blocks take the interpreter long
    logits = [
        random_logits(3, c, dtype=torch.float32, seed=1, scale=5.0),
        random_logits(m, 3, c, dtype=torch.float32, seed=2, scale=5.0),
    ]
    compare_with_wide_reference(native, logits, torch.tensor([0, -100, c - 1]))
    compare_with_wide_reference(
        native, logits, torch.tensor([0, -100, c // 2]), label_smoothing=0.1
    )
    compare_with_wide_reference(native, logits, random_logits(3, c, seed=3).softmax(-1))


def test_kernel_is_the_wide_reference_far_out(native):
    for scale in (20, 80):
        logits = [random_logits(4, 2000, dtype=torch.float32, seed=1).clamp(-1, 1) * scale]
        logits.append(random_logits(2, 4, 2000, dtype=torch.float32, seed=2).clamp(-1, 1) * scale)
        for x in logits:
            x[..., 3:9] = -torch.inf
        compare_with_wide_reference(native, logits, torch.tensor([0, 1, 100, 1999]))
    # What has no distance left in float32, and more than it holds.
    x = torch.tensor(
        [[[3e38, -3e38, 0.0]], [[-3e38, 3e38, -torch.inf]], [[2e9, 2e9, -2e9]]]
    ).requires_grad_()
    js = pairwise_js(x, backend=native)
    js.backward()
    torch.testing.assert_close(
        js.item(), pairwise_js(x.detach().double(), backend="reference").item(), rtol=1e-6, atol=0
    )
    assert x.grad.isfinite().all()


# Rows far from each other, rows that one class holds most of: where differences of logits and of
# log ratios cancel.
@pytest.mark.parametrize("c", [2, 7, 1000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_kernel_is_the_wide_reference_where_terms_cancel(native, c, scale):
    offsets = torch.tensor([79.0, -78.3, 12.7, 41.9]).view(4, 1, 1)
    n = 64 if native == "cpp" else 8
    logits = (random_logits(4, n, c, dtype=torch.float32, seed=3, scale=scale) + offsets).clamp(
        -80, 80
    )
    compare_with_wide_reference(native, [logits[0], logits[1:]], torch.arange(n) % c, js_weight=1.0)
    x = logits[1:].clone().requires_grad_()
    wide = x.detach().double().requires_grad_()
    pairwise_js(x, reduction="sum", backend=native).backward()
    pairwise_js(wide, reduction="sum", backend="reference").backward()
    assert (
        (x.grad - wide.grad).abs()
        <= (1e-5 * wide.grad.abs().amax(-1, keepdim=True)).clamp(min=1e-7)
    ).all()


def test_shifted_logits_are_identical(native):
    logits = random_logits(5, 65).mul(4).round() + torch.tensor([0.0, 16.0, -37.0]).view(3, 1, 1)
    logits.requires_grad_()
    js = pairwise_js(logits, reduction="none", backend=native)
    js.sum().backward()
    assert (js == 0).all() and (logits.grad == 0).all()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_logit_gives_nan(backend, wrong):
    x = random_logits(2, 3, 40, dtype=torch.float32)
    x[1, 2, 7] = wrong
    js = pairwise_js(x, reduction="none", backend=backend)
    assert js[:2].isfinite().all() and js[2].isnan()


def test_a_clean_pass_alone(native):
    clean, labels = random_logits(5, 40, dtype=torch.float32), torch.arange(5)
    options = {
        "js_weight": 0.01,
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "reduction": "mean",
        "regression": False,
        "needs": [True],
    }
    loss, _, (gradient,) = op.kernel(op.uegr_loss, native)([clean], labels, **options)
    torch.testing.assert_close(loss, F.cross_entropy(clean.requires_grad_(), labels))
    torch.testing.assert_close(
        gradient,
        torch.autograd.grad(F.cross_entropy(clean, labels), clean)[0],
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.parametrize("native", ["cpp"], indirect=True)
def test_the_number_of_threads_changes_nothing(native):
    clean, adversarial = (
        random_logits(70, 999, dtype=torch.float32),
        random_logits(3, 70, 999, dtype=torch.float32, seed=1),
    )
    labels = torch.arange(70)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        inputs = [clean.clone().requires_grad_(), adversarial.clone().requires_grad_()]
        parts = uegr_loss(*inputs, labels, js_weight=1.0, return_parts=True, backend=native)
        results.append((*parts, *torch.autograd.grad(parts.loss, inputs)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("c", [4096, 4099])
def test_gradients_too_large_for_a_cache(native, c):
    # They are written past it: in whole lines, or with rows that begin inside of one.
    n = 600 if native == "cpp" else 4
    logits = [
        random_logits(n, c, dtype=torch.float32, seed=1),
        random_logits(2, n, c, dtype=torch.float32, seed=2),
    ]
    compare_with_wide_reference(native, logits, torch.arange(n))


@pytest.mark.parametrize("native", ["cpp"], indirect=True)
def test_the_kernel_looks_at_the_labels_before_it_writes(native):
    logits = [torch.zeros(4, 3), torch.zeros(2, 4, 3)]
    options = {
        "js_weight": 0.01,
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "reduction": 0,
        "regression": False,
        "needs": [True, True],
    }
    with pytest.raises(RuntimeError, match="labels hold 3; give classes from 0 to 2"):
        torch.ops.uegr_kernels.uegr_loss_.default(logits, torch.tensor([0, 1, 2, 3]), **options)
    assert all(x.count_nonzero() == 0 for x in logits)
    with pytest.raises(ValueError, match="labels hold -1"):
        linear_uegr_loss(
            torch.zeros(4, 3),
            torch.zeros(2, 4, 3),
            torch.zeros(3, 3),
            torch.tensor([0, 1, 2, -1]),
            backend=native,
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.3}, {"ignore_index": 2}, {"js_weight": 1.5}], ids=str
)
def test_loss_and_gradients_equal_pytorchs(backend, reduction, options):
    clean, adversarial, labels = batch()
    labels[1] = options.get("ignore_index", -100)
    given, weights = {"js_weight": 0.01} | options, torch.linspace(-1, 2, 5, dtype=torch.float64)
    inputs = (clean, adversarial)
    ours = uegr_loss(clean, adversarial, labels, reduction=reduction, backend=backend, **given)
    theirs = torch_loss(clean, adversarial, labels, reduction=reduction, **given)
    torch.testing.assert_close(ours, theirs)
    chain = (lambda x: (x * weights).sum()) if reduction == "none" else (lambda x: 3 * x)
    for a, b in zip(
        torch.autograd.grad(chain(ours), inputs),
        torch.autograd.grad(chain(theirs), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


# Without adversarial passes: the loss of the labels alone.


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.3}, {"ignore_index": 2}, {"js_weight": 1.5}], ids=str
)
def test_labels_alone_equal_pytorchs_cross_entropy(backend, reduction, options):
    clean, _, labels = batch()
    labels[1] = options.get("ignore_index", -100)
    parts = uegr_loss(
        clean, None, labels, reduction=reduction, return_parts=True, backend=backend, **options
    )
    theirs = {key: value for key, value in options.items() if key != "js_weight"}
    expected = F.cross_entropy(clean, labels, reduction=reduction, **theirs)
    torch.testing.assert_close(parts.loss, expected)
    assert torch.equal(parts.clean_loss, parts.loss.detach())
    assert (parts.adversarial_loss == 0).all() and (parts.divergence == 0).all()
    assert parts.adversarial_loss.shape == parts.divergence.shape == parts.loss.shape
    weights = torch.linspace(-1, 2, 5, dtype=torch.float64)
    chain = (lambda x: (x * weights).sum()) if reduction == "none" else (lambda x: 3 * x)
    torch.testing.assert_close(
        torch.autograd.grad(chain(parts.loss), clean)[0],
        torch.autograd.grad(chain(expected), clean)[0],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_alone_in_every_dtype(backend, dtype):
    clean, _, labels = batch(dtype=dtype)
    loss = uegr_loss(clean, None, labels, backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = clean.detach().double().requires_grad_()
    expected = F.cross_entropy(wide, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(
        clean.grad.double(), wide.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 10
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_alone_as_probabilities(backend, smoothing):
    clean, soft = batch()[0], random_logits(5, 7, seed=9).softmax(-1)
    ours = uegr_loss(clean, None, soft, label_smoothing=smoothing, backend=backend)
    theirs = F.cross_entropy(clean, soft, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, clean)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("c", [1, 3])
def test_labels_alone_of_a_regression(backend, c):
    clean, values = random_logits(4, c).requires_grad_(), random_logits(4, c, seed=2)
    parts = uegr_loss(clean, None, values, task="regression", return_parts=True, backend=backend)
    theirs = F.mse_loss(clean, values)
    torch.testing.assert_close(parts.loss, theirs)
    assert parts.adversarial_loss == 0 and parts.divergence == 0
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, clean)[0] for loss in (parts.loss, theirs))
    )


@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_labels_alone_of_a_linear_layer(backend, reduction, chunk_rows):
    hidden, _, labels = batch()
    weight, bias = random_logits(7, 7, seed=4), random_logits(7, seed=5)
    inputs = (hidden, weight.requires_grad_(), bias.requires_grad_())
    parts = linear_uegr_loss(
        hidden,
        None,
        weight,
        labels,
        bias,
        reduction=reduction,
        chunk_rows=chunk_rows,
        return_parts=True,
        backend=backend,
    )
    theirs = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction=reduction)
    torch.testing.assert_close(parts.loss, theirs)
    assert (parts.adversarial_loss == 0).all() and (parts.divergence == 0).all()
    for x, y in zip(
        torch.autograd.grad(parts.loss.sum() * 3, inputs),
        torch.autograd.grad(theirs.sum() * 3, inputs),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_labels_alone_write_the_gradient_over_the_logits(backend):
    clean, _, labels = batch()
    (expected,) = torch.autograd.grad(F.cross_entropy(clean, labels), clean)
    logits = clean * 1
    pointer, seen = logits.data_ptr(), []
    loss = uegr_loss(logits, None, labels, inplace_backward=True, backend=backend)
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    loss.backward()
    torch.testing.assert_close(clean.grad, expected)
    assert seen == [pointer]


def test_labels_alone_in_a_module_under_a_compiler_and_under_torch_func(backend):
    clean, _, labels = batch()
    expected = F.cross_entropy(clean, labels)
    (gradient,) = torch.autograd.grad(expected, clean)
    loss = UEGRLoss(backend=backend)
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        found = run(clean, None, labels)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, clean)[0], gradient)
    found = torch.func.grad(lambda x: uegr_loss(x, None, labels, backend=backend))(clean.detach())
    torch.testing.assert_close(found, gradient)


def test_labels_alone_all_ignored_or_without_rows(backend):
    clean, _, labels = batch()
    none = torch.full_like(labels, -100)
    loss = uegr_loss(clean, None, none, backend=backend)
    loss.backward()
    assert loss.isnan() and clean.grad.count_nonzero() == 0
    assert uegr_loss(clean, None, none, reduction="sum", backend=backend) == 0
    assert uegr_loss(clean[:0], None, labels[:0], backend=backend).isnan()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_probabilities_as_labels(backend, smoothing):
    clean, adversarial, _ = batch()
    labels = random_logits(5, 7, seed=9).softmax(-1).requires_grad_()
    ours = uegr_loss(
        clean, adversarial, labels, label_smoothing=smoothing, js_weight=0.5, backend=backend
    )
    theirs = torch_loss(clean, adversarial, labels.detach(), 0.5, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    assert labels.grad is None
    for a, b in zip(
        (clean.grad, adversarial.grad),
        torch.autograd.grad(theirs, (clean, adversarial)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    float_labels = uegr_loss(
        clean,
        adversarial,
        labels.float(),
        label_smoothing=smoothing,
        js_weight=0.5,
        backend=backend,
    )
    torch.testing.assert_close(float_labels, ours, rtol=1e-6, atol=0)


@pytest.mark.parametrize("c", [1, 3])
def test_regression_is_squared_error(backend, c):
    clean, adversarial = (
        random_logits(4, c).requires_grad_(),
        random_logits(3, 4, c, seed=1).requires_grad_(),
    )
    labels = random_logits(4, c, seed=2)
    shaped = labels[:, 0] if c == 1 else labels
    ours = uegr_loss(clean, adversarial, shaped, task="regression", js_weight=0.7, backend=backend)
    pairs = sum(F.mse_loss(adversarial[k], adversarial[l]) for k, l in ((0, 1), (0, 2), (1, 2)))
    theirs = (
        F.mse_loss(clean, labels)
        + sum(F.mse_loss(x, labels) for x in adversarial) / 3
        + 0.7 * pairs
    )
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (clean, adversarial)),
        torch.autograd.grad(theirs, (clean, adversarial)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_parts(backend, reduction):
    clean, adversarial, labels = batch()
    parts = uegr_loss(
        clean,
        adversarial,
        labels,
        js_weight=0.25,
        reduction=reduction,
        return_parts=True,
        backend=backend,
    )
    assert isinstance(parts, LossParts) and parts._fields == (
        "loss",
        "clean_loss",
        "adversarial_loss",
        "divergence",
    )
    assert parts.loss.requires_grad and not any(part.requires_grad for part in parts[1:])
    torch.testing.assert_close(
        parts.loss, parts.clean_loss + parts.adversarial_loss + 0.25 * parts.divergence
    )
    torch.testing.assert_close(
        parts.clean_loss, F.cross_entropy(clean, labels, reduction=reduction)
    )
    theirs = sum(F.cross_entropy(x, labels, reduction=reduction) for x in adversarial) / 3
    torch.testing.assert_close(parts.adversarial_loss, theirs)
    js = scipy_js(adversarial).where(labels != -100, 0)
    torch.testing.assert_close(
        parts.divergence, {"mean": js.sum() / 4, "sum": js.sum(), "none": js}[reduction]
    )
    parts.clean_loss.add_(1)  # what is handed out is nobody else's
    parts.loss.sum().backward()


def test_all_rows_ignored(backend):
    clean, adversarial, labels = batch()
    parts = uegr_loss(
        clean, adversarial, torch.full_like(labels, -100), return_parts=True, backend=backend
    )
    assert all(part.isnan() for part in parts)
    parts.loss.backward()
    assert clean.grad.count_nonzero() == 0 and adversarial.grad.count_nonzero() == 0
    assert (
        uegr_loss(
            clean, adversarial, torch.full_like(labels, -100), reduction="sum", backend=backend
        )
        == 0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_rows_ignored_in_the_mean_of_a_loss_scale(backend, dtype):
    clean, adversarial, labels = batch(dtype=dtype)
    loss = uegr_loss(clean, adversarial, torch.full_like(labels, -100), backend=backend)
    (loss * 1024).backward()
    assert loss.isnan() and clean.grad.count_nonzero() == 0


def test_masked_classes(backend):
    clean, adversarial, labels = batch()
    with torch.no_grad():
        clean[:, 3], adversarial[:, :, 3] = -torch.inf, -torch.inf
        labels[labels == 3] = 2
    ours = uegr_loss(clean, adversarial, labels, backend=backend)
    without = [x.detach()[..., [0, 1, 2, 4, 5, 6]] for x in (clean, adversarial)]
    torch.testing.assert_close(
        ours, uegr_loss(*without, labels - (labels > 3).long(), backend=backend)
    )
    ours.backward()
    assert (
        clean.grad.isfinite().all()
        and (clean.grad[:, 3] == 0).all()
        and (adversarial.grad[:, :, 3] == 0).all()
    )
    soft = F.one_hot(labels.clamp(min=0), 7).double()
    assert uegr_loss(clean, adversarial, soft, backend=backend).isfinite()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_on_a_masked_class_is_infinite(backend, smoothing):
    clean, adversarial, labels = batch()
    with torch.no_grad():
        clean[0, labels[0] if smoothing == 0 else (labels[0] + 1) % 7] = -torch.inf
    parts = uegr_loss(
        clean,
        adversarial,
        labels,
        label_smoothing=smoothing,
        reduction="none",
        return_parts=True,
        backend=backend,
    )
    assert (
        parts.loss[0] == torch.inf
        and parts.clean_loss[0] == torch.inf
        and parts.loss[1:].isfinite().all()
    )
    theirs = F.cross_entropy(clean, labels, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(parts.clean_loss, theirs)
    parts.loss.sum().backward()
    torch.testing.assert_close(clean.grad, torch.autograd.grad(theirs.sum(), clean)[0])


def test_row_of_minus_infinity_is_nan_and_alone(backend):
    clean, adversarial, labels = batch()
    with torch.no_grad():
        adversarial[1, 0] = -torch.inf  # a row that counts
        adversarial[1, 1] = -torch.inf  # a row that is ignored
    parts = uegr_loss(
        clean, adversarial, labels, reduction="none", return_parts=True, backend=backend
    )
    assert (
        parts.divergence[0].isnan() and parts.loss[0].isnan() and parts.clean_loss.isfinite().all()
    )
    assert parts.loss[1] == 0 and parts.loss[1:].isfinite().all()
    parts.loss[1:].sum().backward()
    assert clean.grad.isfinite().all() and adversarial.grad[:, 1].count_nonzero() == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, reduction):
    clean, adversarial, labels = batch(m=2, n=2, c=3)
    options = {"js_weight": 0.5, "label_smoothing": 0.1, "reduction": reduction, "backend": backend}
    assert torch.autograd.gradcheck(
        lambda c, a: uegr_loss(c, a, labels, **options), (clean, adversarial)
    )
    fast = {"fast_mode": backend == "triton"}  # a random direction for each input
    assert torch.autograd.gradcheck(
        lambda c, a, b: uegr_loss(c, [a, b], labels, **options), (clean, *adversarial), **fast
    )
    assert torch.autograd.gradcheck(
        lambda a: pairwise_js(a, reduction=reduction, backend=backend), (adversarial,), **fast
    )
    values = random_logits(2, 3, seed=8)
    options |= {"task": "regression", "label_smoothing": 0.0}
    assert torch.autograd.gradcheck(
        lambda c, a: uegr_loss(c, a, values, **options), (clean, adversarial), **fast
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_gradcheck(backend, reduction):
    clean, adversarial, labels = batch(m=2, n=3, c=2)
    weight, bias = (
        random_logits(3, 2, seed=4).requires_grad_(),
        random_logits(3, seed=5).requires_grad_(),
    )
    labels = labels.clamp(max=2)
    options = {"reduction": reduction, "chunk_rows": 2, "backend": backend}
    inputs = (clean, adversarial, weight, bias)
    fast = {"fast_mode": backend == "triton"}  # a random direction for each input
    assert torch.autograd.gradcheck(
        lambda c, a, w, b: linear_uegr_loss(c, a, w, labels, b, js_weight=0.5, **options),
        inputs,
        **fast,
    )
    assert torch.autograd.gradcheck(
        lambda a, w: linear_pairwise_js(a, w, **options), (adversarial, weight), **fast
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_half_precision(backend, dtype, reduction):
    clean, adversarial, labels = batch(dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in (clean, adversarial)]
    loss = uegr_loss(
        clean, adversarial, labels, js_weight=1.0, reduction=reduction, backend=backend
    )
    expected = uegr_loss(*wide, labels, js_weight=1.0, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6)
    loss.sum().backward()
    expected.sum().backward()
    for x, y in zip((clean, adversarial), wide, strict=True):
        assert x.grad.dtype == dtype
        torch.testing.assert_close(
            x.grad.double(), y.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 10
        )


def test_small_float16_gradients_survive_a_loss_scale(backend):
    clean, adversarial = (
        torch.zeros(16, 64000, dtype=torch.float16, requires_grad=True),
        torch.zeros(2, 16, 64000, dtype=torch.float16),
    )
    loss = uegr_loss(clean, adversarial, torch.zeros(16, dtype=torch.long), backend=backend)
    (loss * 65536).backward()
    # 1/64000 of 1/16 of 65536; 1/(64000*16) itself is below float16's normal numbers.
    torch.testing.assert_close(clean.grad[0, 1].item(), 65536 / 16 / 64000, rtol=2e-3, atol=0)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 5),
    c=st.integers(1, 9),
    m=st.integers(1, 3),
    layout=st.sampled_from(["permuted", "sliced", "expanded", "list"]),
)
def test_any_strides(n, c, m, layout):
    clean, adversarial, labels = batch(m, max(n, 2), c, requires_grad=False)
    clean, adversarial, labels = clean[:n].contiguous(), adversarial[:, :n].contiguous(), labels[:n]
    view = {
        "permuted": lambda: adversarial.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "sliced": lambda: torch.stack((adversarial, adversarial), -1)[..., 0],
        "expanded": lambda: adversarial[:1].expand(m, n, c),
        "list": lambda: list(adversarial.transpose(1, 2).contiguous().transpose(1, 2)),
    }[layout]()
    dense = torch.stack(list(view)).contiguous()
    torch.testing.assert_close(
        uegr_loss(clean, view, labels, reduction="none"),
        uegr_loss(clean, dense, labels, reduction="none"),
        rtol=1e-12,
        atol=1e-15,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_backward_writes_the_gradient_over_the_logits(backend, reduction):
    clean, adversarial, labels = batch()
    expected = uegr_loss(clean, adversarial, labels, reduction=reduction, backend=backend)
    gradients = torch.autograd.grad(expected.sum() * 2, (clean, adversarial))
    logits = [clean * 1, adversarial * 1]
    pointers, versions = [x.data_ptr() for x in logits], [x._version for x in logits]
    loss = uegr_loss(*logits, labels, reduction=reduction, inplace_backward=True, backend=backend)
    torch.testing.assert_close(loss, expected)
    assert all(x._version > version for x, version in zip(logits, versions, strict=True))
    seen = []
    for x in logits:
        x.register_hook(lambda g: seen.append(g.data_ptr()))
    (loss.sum() * 2).backward(retain_graph=True)
    assert sorted(seen) == sorted(pointers)
    torch.testing.assert_close(clean.grad, gradients[0])
    torch.testing.assert_close(adversarial.grad, gradients[1])
    with pytest.raises(RuntimeError, match="inplace_backward=True hands its gradients out once"):
        loss.sum().backward()


def test_inplace_backward_writes_only_where_a_gradient_is_needed(backend):
    clean, adversarial, labels = batch()
    with torch.no_grad():
        kept = adversarial.clone()
        uegr_loss(clean, adversarial, labels, inplace_backward=True, backend=backend)
        pairwise_js(adversarial, inplace_backward=True, backend=backend)
    assert torch.equal(adversarial, kept)
    first, second = adversarial[0].detach().clone(), adversarial[1] * 1
    before, version = first.clone(), first._version
    uegr_loss(
        clean.detach(), [first, second], labels, inplace_backward=True, backend=backend
    ).backward()
    assert torch.equal(first, before) and first._version == version


def test_inplace_backward_of_an_operation_that_saves_its_output_raises(backend):
    clean, adversarial, labels = batch()
    loss = uegr_loss(clean.tanh(), adversarial * 1, labels, inplace_backward=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_backward_of_a_leaf_gives_it_a_gradient_of_its_own(backend):
    clean, adversarial, labels = batch()
    expected = torch.autograd.grad(uegr_loss(clean, adversarial, labels, backend=backend), clean)[0]
    uegr_loss(clean, adversarial, labels, inplace_backward=True, backend=backend).backward()
    torch.testing.assert_close(clean.grad, expected)
    assert clean.grad.data_ptr() != clean.data_ptr()


def test_inplace_backward_refuses_overlapping_logits(backend):
    adversarial = batch()[1]
    expanded = (adversarial[:1] * 1).expand(3, 5, 7)
    for logits in (expanded, list(expanded)):
        with pytest.raises(RuntimeError, match="inplace_backward"):
            pairwise_js(logits, inplace_backward=True, backend=backend)
    whole = random_logits(5, 3, 7).requires_grad_() * 1
    # interleaved, but apart
    pairwise_js(whole.unbind(1), inplace_backward=True, backend=backend).backward()
    labels = batch()[2]
    whole = random_logits(5, 4, 7).requires_grad_()
    logits, over = ((x[:, 0], x[:, 1:].transpose(0, 1)) for x in (whole, whole * 1))
    (expected,) = torch.autograd.grad(uegr_loss(*logits, labels, backend=backend), whole)
    loss = uegr_loss(*over, labels, inplace_backward=True, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(loss, whole)[0], expected)
    with pytest.raises(RuntimeError, match="two of the logits share memory"):
        uegr_loss(whole[:, 0], whole.transpose(0, 1), labels, inplace_backward=True)


def test_retained_graph_gives_the_same_gradient_again(backend):
    clean, adversarial, labels = batch()
    loss = uegr_loss(clean, adversarial, labels, backend=backend)
    loss.backward(retain_graph=True)
    once = clean.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(clean.grad, 3 * once, rtol=0, atol=0)


@pytest.mark.parametrize("linear", [False, True])
def test_a_gradient_handed_out_is_nobody_elses(backend, linear):
    logits, weight = random_logits(2, 5, 7).requires_grad_(), random_logits(9, 7, seed=1)
    loss = (
        linear_pairwise_js(logits, weight, backend=backend)
        if linear
        else pairwise_js(logits, backend=backend)
    )
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = first.clone()
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    second.zero_()
    (third,) = torch.autograd.grad(loss * 2, logits)
    torch.testing.assert_close(third, 2 * expected)
    assert torch.equal(first, expected)


def test_loss_may_be_changed_in_place(backend):
    clean, adversarial, labels = batch()
    loss = uegr_loss(clean, adversarial, labels, backend=backend)
    loss += 1
    loss.backward()


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(backend, linear, reduction):
    clean, adversarial, labels = batch()
    weight = random_logits(7, 7, seed=6).requires_grad_()
    arguments = (clean, adversarial, weight, labels) if linear else (clean, adversarial, labels)
    loss = (linear_uegr_loss if linear else uegr_loss)(
        *arguments, reduction=reduction, backend=backend
    ).sum()
    gradient = torch.autograd.grad(loss, clean, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), clean)


def test_vmap_is_refused(backend):
    clean, adversarial, labels = (torch.stack((x.detach(), x.detach())) for x in batch())
    with pytest.raises(
        RuntimeError, match="uegr_loss of uegr_kernels does not run under torch.func.vmap"
    ):
        torch.func.vmap(lambda c, a, y: uegr_loss(c, a, y, backend=backend))(
            clean, adversarial, labels
        )
    with pytest.raises(
        RuntimeError, match="uegr_loss of uegr_kernels does not run under torch.func.vmap"
    ):
        torch.func.vmap(lambda y: uegr_loss(clean[0], adversarial[0], y, backend=backend))(labels)
    with pytest.raises(
        RuntimeError, match="linear_pairwise_js of uegr_kernels does not run under torch.func.vmap"
    ):
        torch.func.vmap(lambda a: linear_pairwise_js(a, clean[0], backend=backend))(adversarial)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_of_a_batch_of_gradients_are_theirs_one_by_one(backend, reduction):
    clean, passes = torch.randn(3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    loss = uegr_loss(clean, passes, torch.tensor([0, 1, 2]), reduction=reduction, backend=backend)
    by_loss = (
        torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]])
        if reduction == "none"
        else torch.tensor([1.0, 2.0])
    )
    batched = torch.autograd.grad(
        loss, (clean, passes), by_loss, is_grads_batched=True, retain_graph=True
    )
    for i, one in enumerate(by_loss):
        for found, right in zip(
            batched, torch.autograd.grad(loss, (clean, passes), one, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(found[i], right)


def losses_of_one_tensor(backend, inplace_backward=False, reduction="mean"):
    """Each loss as a function of its adversarial logits or hidden states [3, 5, 7], and the
    same by PyTorch's functions.
    """
    clean, _, labels = batch(requires_grad=False)
    weight, bias = random_logits(4, 7, seed=5), random_logits(4, seed=6)
    few = labels.clamp(max=3)
    options = {"reduction": reduction, "backend": backend}
    over = options | {"inplace_backward": inplace_backward}

    def by_torch(x):
        rows = torch_js(x)
        return {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]

    return {
        "pairwise_js": (lambda x: pairwise_js(x * 1, **over), by_torch),
        "PairwiseJSLoss": (lambda x: PairwiseJSLoss(**over)(list(x * 1)), by_torch),
        "uegr_loss": (
            lambda x: uegr_loss(clean, x * 1, labels, js_weight=0.4, **over),
            lambda x: torch_loss(clean, x, labels, 0.4, reduction),
        ),
        "linear_pairwise_js": (
            lambda x: linear_pairwise_js(x, weight, bias, chunk_rows=2, **options),
            lambda x: by_torch(F.linear(x, weight, bias)),
        ),
        "linear_uegr_loss": (
            lambda x: linear_uegr_loss(clean, x, weight, few, js_weight=0.4, **options),
            lambda x: torch_loss(F.linear(clean, weight), F.linear(x, weight), few, 0.4, reduction),
        ),
    }


def forward_mode(f, x, t, *, requires_grad=False):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(requires_grad), t))


FORWARD_MODE = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,)),
    "linearize": lambda f, x, t: torch.func.linearize(f, x),
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x, t: torch.func.hessian(lambda x: f(x).sum())(x),
    "jvp of grad": lambda f, x, t: torch.func.jvp(
        torch.func.grad(lambda x: f(x).sum()), (x,), (t,)
    ),
    "grad of jvp": lambda f, x, t: torch.func.grad(
        lambda x: torch.func.jvp(f, (x,), (t,))[1].sum()
    )(x),
    "dual": forward_mode,
    "dual that requires grad": lambda f, x, t: forward_mode(f, x, t, requires_grad=True),
    "compiled jvp": lambda f, x, t: torch.compile(
        lambda x, t: torch.func.jvp(f, (x,), (t,)), backend="eager"
    )(x, t),
    "compiled dual": lambda f, x, t: torch.compile(
        lambda x, t: forward_mode(f, x, t), backend="eager"
    )(x, t),
}


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("mode", FORWARD_MODE)
@pytest.mark.parametrize("name", losses_of_one_tensor("auto"))
def test_forward_mode_is_refused(backend, name, mode, inplace_backward):
    torch._dynamo.reset()
    loss, x = losses_of_one_tensor(backend, inplace_backward)[name][0], random_logits(3, 5, 7)
    with pytest.raises(
        RuntimeError, match="of uegr_kernels has no forward-mode derivative .*torch.func.grad"
    ):
        FORWARD_MODE[mode](loss, x, torch.ones_like(x))
    with torch.autograd.forward_ad.dual_level():  # what has no tangent is served
        torch.testing.assert_close(loss(x), losses_of_one_tensor(backend)[name][1](x))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", losses_of_one_tensor("auto"))
def test_torch_func_differentiates_backward(backend, name, reduction):
    loss, by_torch = losses_of_one_tensor(backend, inplace_backward=True, reduction=reduction)[name]
    x = random_logits(3, 5, 7)
    expected = torch.func.jacrev(by_torch)(x)
    value, pull = torch.func.vjp(loss, x)
    torch.testing.assert_close(value, by_torch(x))
    torch.testing.assert_close(
        pull(torch.ones_like(value))[0], expected if reduction == "mean" else expected.sum(0)
    )
    torch.testing.assert_close(torch.func.jacrev(loss)(x), expected)
    gradient = torch.func.grad(lambda x: loss(x).sum() * 3)
    torch.testing.assert_close(gradient(x), torch.func.grad(lambda x: by_torch(x).sum() * 3)(x))
    for second in (
        torch.func.grad(lambda x: gradient(x).square().sum()),
        torch.func.jacrev(gradient),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            second(x)


def test_torch_func_reaches_every_tensor_but_labels(backend):
    clean, adversarial, labels = batch(requires_grad=False)
    weight, bias, soft = random_logits(7, 7, seed=5), random_logits(7, seed=6), clean.softmax(-1)

    def ours(clean, adversarial, weight, bias, labels=labels):
        return linear_uegr_loss(
            clean, adversarial, weight, labels, bias, js_weight=0.4, backend=backend
        )

    def by_torch(clean, adversarial, weight, bias):
        return torch_loss(
            F.linear(clean, weight, bias), F.linear(adversarial, weight, bias), labels, 0.4
        )

    arguments = clean, adversarial, weight, bias
    for f, g in zip(
        torch.func.grad(ours, (0, 1, 2, 3))(*arguments),
        torch.func.grad(by_torch, (0, 1, 2, 3))(*arguments),
        strict=True,
    ):
        torch.testing.assert_close(f, g)
    for loss in (
        lambda y: ours(*arguments, y),
        lambda y: uegr_loss(clean, adversarial, y, backend=backend),
    ):
        with pytest.raises(
            RuntimeError,
            match=r"uegr_loss of uegr_kernels has no derivative: "
            r".*labels\.detach\(\)",
        ):
            torch.func.grad(loss)(soft)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(loss, (soft,), (soft,))
        torch.func.grad(lambda x, loss=loss: loss(x.detach()) + x.sum())(soft)


@pytest.mark.filterwarnings("error")  # NumPy warns where a comparison overflows its narrow types
def test_numpys_numbers_and_flags_are_taken(backend):
    clean, adversarial, labels = batch(requires_grad=False)
    plain = {
        "js_weight": 0.5,
        "label_smoothing": 0.25,
        "ignore_index": -100,
        "return_parts": True,
        "inplace_backward": False,
    }
    numpys = dict(
        zip(
            plain,
            (np.float32(0.5), np.float16(0.25), np.int64(-100), np.bool_(True), np.bool_(False)),
            strict=True,
        )
    )
    for name in (*plain, "chunk_rows"):
        options = (
            plain
            | {"chunk_rows": 2}
            | {
                key: value
                for key, value in (numpys | {"chunk_rows": np.int32(2)}).items()
                if key == name
            }
        )
        found = linear_uegr_loss(
            clean, adversarial, random_logits(7, 7), labels, backend=backend, **options
        )
        expected = linear_uegr_loss(
            clean, adversarial, random_logits(7, 7), labels, backend=backend, **plain, chunk_rows=2
        )
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    for x, y in zip(
        UEGRLoss(**numpys, backend=backend)(clean, adversarial, labels),
        uegr_loss(clean, adversarial, labels, **plain, backend=backend),
        strict=True,
    ):
        assert torch.equal(x, y)
    with pytest.raises(TypeError, match="js_weight=True is a bool"):
        uegr_loss(clean, adversarial, labels, js_weight=True, backend=backend)
    with pytest.raises(TypeError, match="js_weight=.* is a bool"):
        uegr_loss(clean, adversarial, labels, js_weight=np.bool_(True), backend=backend)


@pytest.mark.parametrize(
    ("compiler", "reduction", "inplace_backward"),
    [("aot_eager", "none", True), ("inductor", "mean", False)],
)
def test_compiled(backend, compiler, reduction, inplace_backward):
    def run(clean, adversarial, labels):
        options = {"reduction": reduction, "backend": backend, "inplace_backward": inplace_backward}
        parts = uegr_loss(clean * 1, adversarial * 1, labels, return_parts=True, **options)
        return parts.loss.sum(), parts.divergence

    compiled = torch.compile(run, fullgraph=True, backend=compiler, dynamic=True)
    for n in (5, 6):
        clean, adversarial, labels = batch(m=2, n=n)
        inputs = (clean, adversarial)
        (loss, divergence), (expected, other) = compiled(*inputs, labels), run(*inputs, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(divergence, other)
        for a, b in zip(
            torch.autograd.grad(loss * 2, inputs),
            torch.autograd.grad(expected * 2, inputs),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_compiled(backend, reduction):
    def run(clean, adversarial, weight, labels):
        options = {"reduction": reduction, "backend": backend}
        return (
            linear_uegr_loss(clean, adversarial, weight, labels, chunk_rows=2, **options).sum()
            + pairwise_js(adversarial, **options).sum()
        )

    compiled, weight = (
        torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True),
        random_logits(7, 7, seed=4).requires_grad_(),
    )
    for n in (5, 6):
        clean, adversarial, labels = batch(m=2, n=n)
        inputs = (clean, adversarial, weight)
        loss, expected = compiled(*inputs, labels), run(*inputs, labels)
        torch.testing.assert_close(loss, expected)
        for a, b in zip(
            torch.autograd.grad(loss * 2, inputs),
            torch.autograd.grad(expected * 2, inputs),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("needs", [(True, True), (False, True), (False, False)], ids=str)
def test_opcheck(reduction, needs):
    clean, adversarial, labels = batch()
    clean, adversarial = (
        clean.detach().requires_grad_(needs[0]),
        adversarial.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0),
    )
    adversarial.requires_grad_(needs[1])
    options = {
        "js_weight": 0.5,
        "label_smoothing": 0.1,
        "ignore_index": -100,
        "regression": False,
        "needs": list(needs),
    }
    operators = torch.ops.uegr_kernels
    torch.library.opcheck(
        operators.uegr_loss.default,
        ([clean, adversarial], labels),
        options | {"reduction": reduction},
    )
    torch.library.opcheck(
        operators.uegr_loss_.default,
        ([clean.detach().clone(), adversarial.detach().clone()], labels),
        options | {"reduction": reduction},
    )
    weight = random_logits(7, 7, seed=4).requires_grad_()
    linear = options | {"needs": [*needs, True, False], "reduction": reduction}
    linear |= {"dtype": torch.float64, "chunk_rows": 2, "backend": "reference"}
    torch.library.opcheck(
        operators.linear_uegr_loss.default,
        ([clean, adversarial], weight, None, labels, None),
        linear,
    )
    gradients, scale = (
        [clean.detach(), adversarial.detach()],
        torch.tensor(2.0, dtype=torch.float64),
    )
    torch.library.opcheck(operators.scale_gradients.default, (gradients, scale, torch.zeros(3)))
    torch.library.opcheck(
        operators.scale_gradients_.default, ([x.clone() for x in gradients], scale)
    )


@pytest.mark.parametrize("chunk_rows", [None, 1, 2, 100])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_equals_unchunked(backend, chunk_rows, reduction):
    if backend == "triton" and chunk_rows == 1:
        pytest.skip("chunks of two rows show the same in half of the interpreter's time")
    clean, adversarial, labels = batch(n=7, c=6)
    weight, bias = (
        random_logits(9, 6, seed=4).requires_grad_(),
        random_logits(9, seed=5).requires_grad_(),
    )
    for with_bias in (True, False):
        inputs = (clean, adversarial, weight, bias) if with_bias else (clean, adversarial, weight)
        b, options = bias if with_bias else None, {"reduction": reduction, "backend": backend}
        linear = linear_uegr_loss(
            clean,
            adversarial,
            weight,
            labels,
            b,
            js_weight=0.4,
            chunk_rows=chunk_rows,
            return_parts=True,
            **options,
        )
        plain = uegr_loss(
            F.linear(clean, weight, b),
            F.linear(adversarial, weight, b),
            labels,
            js_weight=0.4,
            return_parts=True,
            **options,
        )
        for x, y in zip(linear, plain, strict=True):
            torch.testing.assert_close(x, y)
        for x, y in zip(
            torch.autograd.grad(linear[0].sum() * 3, inputs),
            torch.autograd.grad(plain[0].sum() * 3, inputs),
            strict=True,
        ):
            torch.testing.assert_close(x, y)
        js = linear_pairwise_js(adversarial, weight, b, chunk_rows=chunk_rows, **options)
        other = pairwise_js(F.linear(adversarial, weight, b), **options)
        torch.testing.assert_close(js, other)
        for x, y in zip(
            torch.autograd.grad(js.sum(), inputs[1:]),
            torch.autograd.grad(other.sum(), inputs[1:]),
            strict=True,
        ):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("wanted", ["clean", "adversarial", "weight", "bias", "none"])
def test_linear_gives_the_gradients_that_are_needed(backend, wanted):
    clean, adversarial, labels = batch(requires_grad=False)
    tensors = {
        "clean": clean,
        "adversarial": adversarial,
        "weight": random_logits(7, 7, seed=4),
        "bias": random_logits(7, seed=5),
    }
    if wanted != "none":
        tensors[wanted].requires_grad_()
    options = {"js_weight": 0.4, "backend": backend}
    loss = linear_uegr_loss(
        clean, adversarial, tensors["weight"], labels, tensors["bias"], chunk_rows=2, **options
    )
    assert loss.requires_grad == (wanted != "none")
    if wanted != "none":
        logits = [F.linear(x, tensors["weight"], tensors["bias"]) for x in (clean, adversarial)]
        expected = torch.autograd.grad(uegr_loss(*logits, labels, **options), tensors[wanted])[0]
        torch.testing.assert_close(torch.autograd.grad(loss, tensors[wanted])[0], expected)


def test_linear_under_autocast_is_cast_as_linear_is(backend):
    clean, adversarial, labels = batch()
    clean, adversarial = (
        clean.detach().float().requires_grad_(),
        adversarial.detach().float().requires_grad_(),
    )
    weight, bias = (
        torch.nn.Parameter(random_logits(7, 7, seed=4).float()),
        torch.nn.Parameter(random_logits(7, seed=5).float()),
    )
    inputs = (clean, adversarial, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(clean, weight, bias), F.linear(adversarial, weight, bias)
        assert logits[0].dtype == torch.bfloat16
        plain = uegr_loss(*logits, labels, backend=backend)
        linear = linear_uegr_loss(
            clean, adversarial, weight, labels, bias, chunk_rows=2, backend=backend
        )
    torch.testing.assert_close(linear, plain, rtol=2e-2, atol=2e-2)
    for x, y in zip(
        torch.autograd.grad(linear, inputs), torch.autograd.grad(plain, inputs), strict=True
    ):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=3e-2, atol=3e-2)


def test_linear_sums_the_weights_gradient_in_float32(backend):
    # A bfloat16 sum of ones ends at 256.
    hidden = torch.ones(300, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(300, dtype=torch.long)
    rows = 10 if backend == "triton" else 1
    loss = linear_uegr_loss(
        hidden, hidden[None], weight, labels, reduction="sum", chunk_rows=rows, backend=backend
    )
    assert torch.autograd.grad(loss, weight)[0].flatten().tolist() == [-300.0, 300.0]


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.largest = max(
            [self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))]
        )
        return out


def test_linear_never_has_the_logits():
    hidden, weight = [torch.randn(256, 8), torch.randn(2, 256, 8)], torch.randn(4000, 8)
    options = {
        "js_weight": 0.01,
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "reduction": "mean",
        "regression": False,
    }
    options |= {"needs": [True, True, True, False], "dtype": torch.float32, "chunk_rows": 8}
    with LargestTensor() as mode:
        reference.linear_uegr_loss(
            reference.uegr_loss_, hidden, weight, None, torch.zeros(256).long(), None, **options
        )
    assert mode.largest == 3 * 8 * 4000  # a chunk's, of 3 * 256 * 4000


PEAK = """
import torch, sys
import uegr_kernels as uk
torch.set_num_threads(2)
N, C, H, m = 1024, 20000, 256, 2
weight = torch.randn(C, H).mul_(0.02).requires_grad_()
hidden = [torch.randn(N, H, requires_grad=True), torch.randn(m, N, H, requires_grad=True)]
uk.linear_uegr_loss(*[x[..., :8, :] for x in hidden], weight[:64], torch.arange(8)).backward()
tensors = [weight, *hidden]
for x in tensors:
    x.grad = None
lines = lambda: open("/proc/self/status")
kib = lambda key: next(int(line.split()[1]) for line in lines() if line.startswith(key))
before = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
loss = uk.linear_uegr_loss(*hidden, weight, torch.zeros(N).long(), chunk_rows=128)
(loss * float(sys.argv[1])).backward()
extra = (kib("VmHWM") - before) * 1024 - 4 * sum(x.grad.numel() for x in tensors)
print(extra / (4 * 3 * 128 * C))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("scale", ["1", "0.5"])  # scaled gradients take the place of the kept ones
@pytest.mark.parametrize("native", ["cpp"], indirect=True)
def test_linear_holds_one_chunk_at_a_time(native, scale):
    run = subprocess.run(
        [sys.executable, "-c", PEAK, scale], capture_output=True, text=True, check=True
    )
    assert float(run.stdout) < 3  # chunks of logits, matrix products' own buffers included


def test_linear_without_rows(backend):
    hidden, weight = torch.zeros(2, 0, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    loss = linear_pairwise_js(hidden, weight, reduction="sum", backend=backend)
    loss.backward()
    assert loss == 0 and hidden.grad.shape == hidden.shape and (weight.grad == 0).all()
    assert linear_pairwise_js(hidden, weight, backend=backend).isnan()


def test_modules(backend):
    clean, adversarial, labels = batch()
    module = UEGRLoss(js_weight=0.3, label_smoothing=0.1, backend=backend)
    expected = uegr_loss(
        clean, adversarial, labels, js_weight=0.3, label_smoothing=0.1, backend=backend
    )
    assert torch.equal(module(clean, adversarial, labels), expected)
    js = PairwiseJSLoss(reduction="sum", backend=backend)
    assert torch.equal(js(adversarial), pairwise_js(adversarial, reduction="sum", backend=backend))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(clean, adversarial, labels), module(clean, adversarial, labels))
    assert repr(js) == f"PairwiseJSLoss(reduction='sum', backend='{backend}')"
    with pytest.raises(TypeError, match="UEGRLoss has no option 'lambda_'"):
        UEGRLoss(lambda_=1)
    with pytest.raises(ValueError, match="reduction='max' is not one of its values"):
        PairwiseJSLoss(reduction="max")


X = torch.zeros(2, 4, 3)
Y = torch.zeros(4, dtype=torch.long)
BAD_INPUT = {
    "one pass": (lambda: pairwise_js(X[:1]), ValueError, "logits hold one pass"),
    "two axes": (
        lambda: pairwise_js(X[0]),
        ValueError,
        r"logits has shape \(4, 3\); give \[m, N, "
        r"C\]",
    ),
    "no tensor": (lambda: pairwise_js(3), TypeError, "logits is a int"),
    "list of lists": (lambda: pairwise_js([[1.0], [2.0]]), TypeError, r"logits\[0\] is a list"),
    "integers": (lambda: pairwise_js(X.long()), TypeError, "logits is torch.int64"),
    "complex": (lambda: pairwise_js(X.to(torch.complex64)), TypeError, "logits is torch.complex64"),
    "sparse": (lambda: pairwise_js(X.to_sparse()), TypeError, "logits is sparse"),
    "no classes": (lambda: pairwise_js(X[..., :0]), ValueError, "empty last axis"),
    "unequal rows": (
        lambda: pairwise_js([X[0], X[1, :3]]),
        ValueError,
        r"logits\[1\] has rows "
        r"\(3, 3\)",
    ),
    "unequal dtypes": (
        lambda: uegr_loss(X[0], X.double(), Y),
        TypeError,
        "adversarial_logits is torch.float64",
    ),
    "unequal devices": (
        lambda: uegr_loss(X[0], X.to("meta"), Y),
        ValueError,
        "adversarial_logits is on meta",
    ),
    "labels elsewhere": (
        lambda: uegr_loss(X[0], X, Y.to("meta")),
        ValueError,
        "labels are on meta",
    ),
    "reduction": (
        lambda: pairwise_js(X, reduction="avg"),
        ValueError,
        "reduction='avg' is not one of its values; use 'mean'",
    ),
    "task": (lambda: uegr_loss(X[0], X, Y, task="ranking"), ValueError, "task='ranking'"),
    "smoothing": (
        lambda: uegr_loss(X[0], X, Y, label_smoothing=1.5),
        ValueError,
        "label_smoothing=1.5 is out of range",
    ),
    "weight": (
        lambda: uegr_loss(X[0], X, Y, js_weight=-1),
        ValueError,
        "js_weight=-1 is out of range",
    ),
    "weight type": (
        lambda: uegr_loss(X[0], X, Y, js_weight="1"),
        TypeError,
        "js_weight='1' is a str",
    ),
    "ignore": (
        lambda: uegr_loss(X[0], X, Y, ignore_index=0.5),
        TypeError,
        "ignore_index=0.5 is a float",
    ),
    "flag": (lambda: uegr_loss(X[0], X, Y, return_parts=1), TypeError, "return_parts=1 is a int"),
    "backend": (
        lambda: pairwise_js(X, backend="rocm"),
        ValueError,
        "backend='rocm' is not a backend",
    ),
    "label range": (
        lambda: uegr_loss(X[0], X, Y + 3),
        ValueError,
        "labels hold 3; give classes from 0 to 2",
    ),
    "negative label": (lambda: uegr_loss(X[0], X, Y - 1), ValueError, "labels hold -1"),
    "label shape": (lambda: uegr_loss(X[0], X, Y[:3]), ValueError, r"labels have shape \(3,\)"),
    "label type": (
        lambda: uegr_loss(X[0], X, Y.float()),
        TypeError,
        r"labels \[N\] are torch.float32",
    ),
    "label bool": (lambda: uegr_loss(X[0], X, Y.bool()), TypeError, "labels are torch.bool"),
    "soft shape": (
        lambda: uegr_loss(X[0], X, X[0, :, :2]),
        ValueError,
        r"labels have shape \(4, "
        r"2\)",
    ),
    "soft ignored": (
        lambda: uegr_loss(X[0], X, X[0], ignore_index=1),
        ValueError,
        "ignore_index=1 means nothing",
    ),
    "regression on indices": (
        lambda: uegr_loss(X[0], X, Y, task="regression"),
        TypeError,
        "takes floats",
    ),
    "regression shape": (
        lambda: uegr_loss(X[0], X, Y.float(), task="regression"),
        ValueError,
        r"labels have shape \(4,\)",
    ),
    "regression smoothed": (
        lambda: uegr_loss(X[0], X, X[0], task="regression", label_smoothing=0.1),
        ValueError,
        "means nothing",
    ),
    "hidden": (lambda: linear_pairwise_js(X[0], X[0]), ValueError, r"hidden has shape \(4, 3\)"),
    "weight shape": (
        lambda: linear_pairwise_js(X, X[0, :, :2]),
        ValueError,
        r"hidden has H = 3, weight of shape \(4, 2\) 2",
    ),
    "bias shape": (
        lambda: linear_pairwise_js(X, X[0], X[0, 0]),
        ValueError,
        r"bias has shape \(3,\); give \[C\] = \(4,\)",
    ),
    "bias dtype": (
        lambda: linear_pairwise_js(X, X[0], torch.zeros(4).double()),
        TypeError,
        "bias is torch.float64 and hidden",
    ),
    "hidden rows": (
        lambda: linear_uegr_loss(X[0, :3], X, X[0], Y[:3]),
        ValueError,
        "adversarial_hidden has 4 rows and clean_hidden 3",
    ),
    "chunk": (
        lambda: linear_pairwise_js(X, X[0], chunk_rows=0),
        ValueError,
        "chunk_rows=0 is out of range",
    ),
    "chunk type": (
        lambda: linear_pairwise_js(X, X[0], chunk_rows=1.5),
        TypeError,
        "chunk_rows=1.5 is a float",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        call()


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(
        RuntimeError, match="backend='cuda' cannot serve divergence.uegr_loss on cpu: .*; "
    ):
        pairwise_js(X, backend="cuda")
