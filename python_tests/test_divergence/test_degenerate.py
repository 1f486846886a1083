"""Rows and classes that do not count, logits that are none, and float16's range."""

import math

import pytest
import torch
import torch.nn.functional as F

from uegr_kernels.divergence import pairwise_js, uegr_loss

from .logits import batch, random_logits


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_logit_gives_nan(backend, wrong):
    x = random_logits(2, 3, 40, dtype=torch.float32)
    x[1, 2, 7] = wrong
    js = pairwise_js(x, reduction="none", backend=backend)
    assert js[:2].isfinite().all() and js[2].isnan()


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
        # a row that counts
        adversarial[1, 0] = -torch.inf
        # a row that is ignored
        adversarial[1, 1] = -torch.inf
    parts = uegr_loss(
        clean, adversarial, labels, reduction="none", return_parts=True, backend=backend
    )
    assert (
        parts.divergence[0].isnan() and parts.loss[0].isnan() and parts.clean_loss.isfinite().all()
    )
    assert parts.loss[1] == 0 and parts.loss[1:].isfinite().all()
    parts.loss[1:].sum().backward()
    assert clean.grad.isfinite().all() and adversarial.grad[:, 1].count_nonzero() == 0


def test_small_float16_gradients_survive_a_loss_scale(backend):
    clean, adversarial = (
        torch.zeros(16, 64000, dtype=torch.float16, requires_grad=True),
        torch.zeros(2, 16, 64000, dtype=torch.float16),
    )
    loss = uegr_loss(clean, adversarial, torch.zeros(16, dtype=torch.long), backend=backend)
    (loss * 65536).backward()
    # 1/64000 of 1/16 of 65536; 1/(64000*16) itself is below float16's normal numbers.
    torch.testing.assert_close(clean.grad[0, 1].item(), 65536 / 16 / 64000, rtol=2e-3, atol=0)
