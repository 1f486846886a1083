"""Second derivatives, forward mode, torch.func, compilers."""

import pytest
import torch
import torch.nn.functional as F

from uegr_kernels.divergence import (
    PairwiseJSLoss,
    linear_pairwise_js,
    linear_uegr_loss,
    pairwise_js,
    uegr_loss,
)

from .logits import batch, random_logits, torch_js, torch_loss


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
    """Gives each loss as a function of its adversarial logits or hidden states [3, 5, 7], and the
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
    # what has no tangent is served
    with torch.autograd.forward_ad.dual_level():
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


@pytest.mark.parametrize(
    ("compiler", "reduction", "inplace_backward"),
    [("aot_eager", "none", True), pytest.param("inductor", "mean", False, marks=pytest.mark.long)],
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
