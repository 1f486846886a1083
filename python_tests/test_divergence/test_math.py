"""The losses against SciPy, PyTorch's functions, literals and properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from uegr_kernels.divergence import LossParts, pairwise_js, uegr_loss

from .logits import DTYPES, LN2, batch, random_logits, scipy_js, torch_loss


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
    # what is handed out is nobody else's
    parts.clean_loss.add_(1)
    parts.loss.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, reduction):
    clean, adversarial, labels = batch(m=2, n=2, c=3)
    options = {"js_weight": 0.5, "label_smoothing": 0.1, "reduction": reduction, "backend": backend}
    assert torch.autograd.gradcheck(
        lambda c, a: uegr_loss(c, a, labels, **options), (clean, adversarial)
    )
    # a random direction for each input
    fast = {"fast_mode": backend == "triton"}
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
