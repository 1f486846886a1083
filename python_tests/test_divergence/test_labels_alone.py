"""Without adversarial passes: the loss of the labels alone, against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from uegr_kernels.divergence import LossOptions, UEGRLoss, linear_uegr_loss, op, uegr_loss

from .logits import DTYPES, TOLERANCE, batch, random_logits


def test_a_clean_pass_alone(native):
    clean, labels = random_logits(5, 40, dtype=torch.float32), torch.arange(5)
    loss, _, (gradient,) = op.kernel(op.uegr_loss, native)(
        [clean], labels, options=LossOptions(), needs=[True]
    )
    torch.testing.assert_close(loss, F.cross_entropy(clean.requires_grad_(), labels))
    torch.testing.assert_close(
        gradient,
        torch.autograd.grad(F.cross_entropy(clean, labels), clean)[0],
        rtol=1e-5,
        atol=1e-7,
    )


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
