"""The plain rate: inputs without units, and a width that changes."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from uegr_kernels.dropout import AdaptiveDropout, replace_dropout

from .modules import taught, teach


@pytest.mark.parametrize("num_features", [None, 5])
def test_four_axes_have_no_units(backend, num_features):
    module = AdaptiveDropout(num_features, p=0.4, backend=backend)
    before = module.get_extra_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for width in (5, 7):
            torch.manual_seed(2)
            x = torch.rand(4, 6, width, width, requires_grad=True)
            h = module(x)
            torch.manual_seed(2)
            torch.rand(4, 6, width, width)
            assert torch.equal(h, nn.functional.dropout(x, 0.4))
            h.sum().backward()
    assert torch.equal(module.get_extra_state(), before)
    # what has units still adapts
    teach(module.to(torch.float64), torch.ones(5))
    assert module.gradient_norm.all()


def test_a_width_that_changes(backend):
    model = nn.Sequential(nn.Dropout(0.4))
    replace_dropout(model, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(2):
            model(torch.ones(2, 5, requires_grad=True)).sum().backward()
    with pytest.warns(
        UserWarning,
        match=r"^0: the last axis had size 5 and now has "
        r"another.*skip",
    ) as found:
        for width in (7, 5, 9, 5, 5):
            h = model(torch.ones(1000, width, requires_grad=True))
            # norms that would have their say
            h.backward(10 * torch.rand(1000, 1) * torch.arange(width))
            share = (h == 0).float().mean(0)
            assert ((share - 0.4).abs() < 5 * (0.24 / 1000) ** 0.5).all()
    assert sum("last axis" in str(each.message) for each in found) == 1
    again = nn.Sequential(AdaptiveDropout(p=0.4, backend=backend))
    again.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for width in (5, 8):
            x = torch.ones(3, width)
            results = []
            for each in (model, again, copy.deepcopy(model)):
                torch.manual_seed(1)
                results.append(each(x))
            assert all(torch.equal(h, results[0]) for h in results)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recompute_of_what_came_before_the_change(backend, reentrant):
    """XLNet drops two widths with one module: the first is recomputed after the second has
    turned the rate plain.
    """
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(2)
        module, linear = AdaptiveDropout(p=0.5, backend=backend), nn.Linear(8, 4)

        def block(x, module=module, linear=linear):
            return module(linear(module(x))).square()

        for _ in range(2):
            x = torch.ones(4, 8, requires_grad=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                y = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
                y.sum().backward()
            results.append((y.detach(), x.grad, linear.weight.grad.clone()))
    for plain, again in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_width_that_changes_after_a_resume():
    """What a state_dict says was seen counts as a call."""
    for module in (AdaptiveDropout(3), AdaptiveDropout()):
        module.load_state_dict(taught().state_dict())
        with pytest.warns(UserWarning, match="An AdaptiveDropout: the last axis had size 3"):
            module(torch.ones(2, 4))
    module = AdaptiveDropout(3)
    module(torch.ones(2, 3))
    with pytest.warns(UserWarning, match="had size 3"):
        module(torch.ones(2, 4))
    # the first call
    with pytest.raises(ValueError, match=r"input of shape \(2, 4\) has 4 units, the module 3"):
        AdaptiveDropout(3)(torch.ones(2, 4))
