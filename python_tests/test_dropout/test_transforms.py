"""Compilers, and the derivatives that are refused."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from uegr_kernels.dropout import AdaptiveDropout, reference


@pytest.mark.parametrize(
    ("compiler", "num_features"),
    [("aot_eager", None), pytest.param("inductor", 6, marks=pytest.mark.long)],
)
def test_compiled(backend, compiler, num_features):
    torch.manual_seed(4)
    module, linear = AdaptiveDropout(num_features, p=0.5, backend=backend), nn.Linear(6, 6)
    if num_features is None:
        module(torch.ones(1, 6))
    plain = copy.deepcopy(module)
    compiled = torch.compile(
        lambda x: module(linear(x)) * 2, fullgraph=True, backend=compiler, dynamic=True
    )
    for n in (4, 5, 4):
        x = torch.randn(n, 6, requires_grad=True)
        h = compiled(x)
        h.square().sum().backward()
        # folds; the same gradients reach it by hand
        plain(torch.ones(1, 6))
        torch.testing.assert_close(module.gradient_norm, plain.gradient_norm)
        reference.add_squares_(plain.pending, (4 * h).square().sum(0).detach())
        torch.testing.assert_close(module.pending, plain.pending)
        zeros = h == 0
        assert 0 < zeros.sum() < h.numel() and x.grad.isfinite().all()
        assert ((h / (2 * linear(x)))[~zeros] >= 1).all()


def test_compiled_sizes_itself(backend):
    module = AdaptiveDropout(p=0.5, backend=backend)
    compiled = torch.compile(module, backend="aot_eager")
    for _ in range(3):
        compiled(torch.ones(4, 6, requires_grad=True)).backward(torch.ones(4, 6))
    assert module.gradient_norm.tolist() == [2.0] * 6 and module.pending.tolist() == [4.0] * 6
    with pytest.raises(
        torch._dynamo.exc.Unsupported,
        match="give num_features, or call it once before torch.compile",
    ):
        torch.compile(AdaptiveDropout(backend=backend), backend="aot_eager", fullgraph=True)(
            torch.ones(4, 6)
        )


def test_compiled_after_inference_mode(backend):
    module = AdaptiveDropout(p=0.5, backend=backend)
    compiled = torch.compile(module, backend="aot_eager")
    with torch.inference_mode():
        compiled(torch.ones(4, 6))
    for _ in range(3):
        compiled(torch.ones(4, 6, requires_grad=True)).backward(torch.ones(4, 6))
    assert module.gradient_norm.tolist() == [2.0] * 6


def test_a_step_is_compiled_once(backend):
    # what other tests compiled of the module would count towards the limit of recompiles
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = AdaptiveDropout(6, p=0.5, backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for _ in range(4):
        compiled(torch.ones(4, 6, requires_grad=True)).backward(torch.ones(4, 6))
    assert counter.frame_count == 1 and module.gradient_norm.tolist() == [2.0] * 6


def test_compiled_with_a_width_that_changes(backend):
    torch._dynamo.reset()
    module = AdaptiveDropout(6, p=0.5, backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(torch.ones(4, 6))
    with pytest.warns(UserWarning, match="the last axis had size 6") as found:
        for width in (7, 8, 9, 6):
            assert set(compiled(torch.ones(40, width)).unique().tolist()) == {0.0, 2.0}
    assert sum("last axis" in str(each.message) for each in found) == 1
    compiled(torch.ones(4, 2, 6, 6))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    operators, key = torch.ops.uegr_kernels, torch.tensor(-5)
    h = torch.randn(4, 3, 2).permute(2, 1, 0).requires_grad_(requires_grad)
    rates, pending = torch.full((4,), 0.5), torch.zeros(4)
    torch.library.opcheck(operators.adaptive_dropout.default, (h, rates, key, pending))
    torch.library.opcheck(operators.adaptive_dropout_backward.default, (h.detach(), rates, key))
    options = {"p": 0.3, "max_p": 0.9, "momentum": 0.9, "fold": requires_grad}
    torch.library.opcheck(
        operators.dropout_rates_.default, (torch.zeros(4), torch.ones(4)), options
    )


def test_double_backward_is_refused(backend):
    module, x = AdaptiveDropout(backend=backend), torch.ones(2, 3, requires_grad=True)
    gradient = torch.autograd.grad(module(x * 2).square().sum(), x, create_graph=True)[0]
    with pytest.raises(
        RuntimeError, match="AdaptiveDropout of uegr_kernels has no second derivative"
    ):
        gradient.sum().backward()


def dual(f):
    def call(x):
        with forward_ad.dual_level():
            f(forward_ad.make_dual(x, torch.ones_like(x)))

    return call


TRANSFORMS = {
    "jvp": (lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), "has no forward-mode derivative"),
    "jacfwd": (
        lambda f: torch.func.jacfwd(f, randomness="different"),
        "has no forward-mode derivative|does not run under torch.func.vmap",
    ),
    "dual": (dual, "has no forward-mode derivative"),
    "grad": (lambda f: torch.func.grad(lambda x: f(x).sum()), "does not run under torch.func"),
    "vjp": (lambda f: lambda x: torch.func.vjp(f, x), "does not run under torch.func"),
    "jacrev": (lambda f: torch.func.jacrev(f), "does not run under torch.func"),
    "hessian": (
        lambda f: torch.func.hessian(lambda x: f(x).square().sum()),
        "forward-mode|torch.func|randomness",
    ),
    "grad of grad": (
        lambda f: torch.func.grad(lambda x: torch.func.grad(lambda x: f(x).sum())(x).sum()),
        "does not run under torch.func",
    ),
    "vmap": (
        lambda f: torch.func.vmap(f, randomness="different"),
        "does not run under torch.func.vmap",
    ),
    "vmap of grad": (
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()), randomness="different"),
        "torch.func",
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("num_features", [None, 3])
def test_transforms_are_refused(backend, transform, num_features):
    module = AdaptiveDropout(num_features, backend=backend)
    before, state = module.get_extra_state(), torch.get_rng_state()
    transformed, message = TRANSFORMS[transform]
    with pytest.raises(RuntimeError, match=message):
        transformed(module)(torch.ones(2, 4, 3))
    assert torch.equal(module.get_extra_state(), before) and torch.equal(
        torch.get_rng_state(), state
    )
    module(torch.ones(2, 3))


def test_the_plain_rate_has_all_derivatives():
    module, x = AdaptiveDropout(p=0.5), torch.randn(2, 2, 3, 3)
    torch.manual_seed(1)
    h, tangent = torch.func.jvp(module, (x,), (x,))
    assert torch.equal(h, tangent) and set((h / x).unique().tolist()) == {0.0, 2.0}
