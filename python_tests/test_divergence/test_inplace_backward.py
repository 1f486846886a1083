"""Gradients written over the logits, and gradients that are nobody else's."""

import pytest
import torch

from uegr_kernels.divergence import linear_pairwise_js, pairwise_js, uegr_loss

from .logits import batch, random_logits


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
