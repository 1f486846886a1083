"""Masks, scales, rates and their moving average against their definitions."""

import pytest
import torch

from uegr_kernels.dropout import AdaptiveDropout

from .modules import DTYPES, RELATIVE, next_key, teach, uniform


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8,), (3, 7), (2, 5, 9), (0, 4)], ids=str)
def test_mask_and_scale(backend, dtype, shape):
    module, x = AdaptiveDropout(p=0.4, backend=backend), torch.rand(shape, dtype=dtype) + 0.5
    dropped = uniform(shape, next_key()) < torch.tensor(0.4)
    h = module(x)
    assert h.dtype == dtype and torch.equal(h == 0, dropped)
    torch.testing.assert_close(
        h.double(), x.double().where(~dropped, 0) / 0.6, rtol=RELATIVE[dtype], atol=0
    )


def test_gradient_has_the_forwards_mask(backend):
    module, x = AdaptiveDropout(p=0.4, backend=backend), torch.rand(3, 7, 5, requires_grad=True)
    h = module(x)
    weights = torch.randn(3, 7, 5)
    h.backward(weights)
    torch.testing.assert_close(x.grad, weights * (h / x).detach())
    torch.testing.assert_close(module.pending, weights.square().sum((0, 1)))


def test_gradcheck(backend):
    module = AdaptiveDropout(p=0.4, backend=backend).double()

    def run(x):
        torch.manual_seed(7)
        return module(x)

    teach(module, [1.0, 2.0, 3.0, 4.0])
    rates = module.gradient_norm.clone()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: (module.pending.zero_(), run(x))[1], x)
    assert torch.equal(module.gradient_norm, rates)


def test_rates_follow_the_norms(backend):
    module = AdaptiveDropout(4, p=0.2, max_p=0.5, backend=backend)
    # the mean is 4: rates 0, 0.05, 0.1 and, cut, 0.5
    teach(module, [0.0, 1.0, 2.0, 13.0])
    x = torch.ones(20000, 4)
    expected = uniform(x.shape, next_key()) < torch.tensor([0.0, 0.05, 0.1, 0.5])
    h = module(x)
    assert torch.equal(h == 0, expected)
    torch.testing.assert_close(h.amax(0), torch.tensor([1.0, 1 / 0.95, 1 / 0.9, 2.0]))
    share = (h == 0).float().mean(0)
    assert ((share - torch.tensor([0.0, 0.05, 0.1, 0.5])).abs() < 5 * (0.25 / 20000) ** 0.5).all()
    assert ((h.mean(0) - 1).abs() < 5 / 20000**0.5).all()
    module.p = 0.1
    assert (
        (module(x) == 0).float().mean(0) - torch.tensor([0.0, 0.025, 0.05, 0.325])
    ).abs().max() < 0.02


def test_moving_average(backend):
    module = AdaptiveDropout(3, momentum=0.75, backend=backend)
    teach(module, [1.0, 2.0, 0.0])
    # the first one sets n
    assert module.gradient_norm.tolist() == [1.0, 2.0, 0.0] and module.pending.count_nonzero() == 0
    teach(module, [5.0, 2.0, 4.0])
    assert module.gradient_norm.tolist() == [2.0, 2.0, 1.0]
    # nothing seen since
    module(torch.ones(2, 3))
    assert module.gradient_norm.tolist() == [2.0, 2.0, 1.0]


def test_backwards_between_folds_add_their_squares(backend):
    module, x = AdaptiveDropout(2, backend=backend), torch.zeros(1, 2, requires_grad=True)
    first, second = module(x), module(x)
    first.backward(torch.tensor([[3.0, 0.0]]))
    second.backward(torch.tensor([[4.0, 1.0]]))
    assert module.pending.tolist() == [25.0, 1.0] and module.gradient_norm.count_nonzero() == 0
    with torch.no_grad():
        module(x)
    assert module.gradient_norm.tolist() == [5.0, 1.0]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e30])
def test_norms_that_are_not_finite_are_dropped(backend, bad):
    module = AdaptiveDropout(2, backend=backend)
    x = torch.zeros(1, 2, requires_grad=True)
    module(x).backward(torch.tensor([[bad, 2.0]]))
    assert module.pending.tolist() == [0.0, 4.0]
    module(x).backward(torch.tensor([[3.0, bad]]))
    assert module.pending.tolist() == [9.0, 0.0] and module.gradient_norm.tolist() == [0.0, 2.0]


def test_eval_is_the_identity(backend):
    module, x = AdaptiveDropout(p=0.9, backend=backend).eval(), torch.randn(3, 4)
    state = torch.get_rng_state()
    assert (
        module(x) is x
        and module.gradient_norm.numel() == 0
        and torch.equal(torch.get_rng_state(), state)
    )


@pytest.mark.parametrize(("p", "kept"), [(0.0, 1.0), (1.0, 0.0)])
def test_extreme_rates(backend, p, kept):
    module, x = (
        AdaptiveDropout(p=p, max_p=1.0, backend=backend),
        torch.ones(50, 4, requires_grad=True),
    )
    h = module(x)
    h.sum().backward()
    assert (h == kept).all() and (x.grad == kept).all()


def test_seed_fixes_the_masks(backend):
    module, x = AdaptiveDropout(p=0.5, backend=backend), torch.ones(8, 8)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize("layout", ["permuted", "sliced", "expanded"])
def test_any_strides(backend, layout):
    dense = torch.rand(3, 4, 5)
    x = (
        {
            "permuted": dense.permute(2, 1, 0).contiguous().permute(2, 1, 0),
            "sliced": torch.stack((dense, dense), -1)[..., 1],
            "expanded": dense[:1].expand(3, 4, 5),
        }[layout]
        .detach()
        .requires_grad_()
    )
    module, results = AdaptiveDropout(p=0.5, backend=backend), []
    for input in (x, x.detach().contiguous().requires_grad_()):
        module.pending.zero_()
        torch.manual_seed(1)
        h = module(input)
        results.append((h.detach(), *torch.autograd.grad(h.sum(), input), module.pending.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
