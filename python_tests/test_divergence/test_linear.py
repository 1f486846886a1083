"""The losses from hidden states: what is computed in chunks is what the logits give."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uegr_kernels.divergence import (
    LossOptions,
    linear_pairwise_js,
    linear_uegr_loss,
    pairwise_js,
    reference,
    uegr_loss,
)

from .logits import batch, random_logits


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
    # a random direction for each input
    fast = {"fast_mode": backend == "triton"}
    assert torch.autograd.gradcheck(
        lambda c, a, w, b: linear_uegr_loss(c, a, w, labels, b, js_weight=0.5, **options),
        inputs,
        **fast,
    )
    assert torch.autograd.gradcheck(
        lambda a, w: linear_pairwise_js(a, w, **options), (adversarial, weight), **fast
    )


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
    with LargestTensor() as mode:
        reference.linear_uegr_loss(
            reference.uegr_loss_,
            hidden,
            weight,
            None,
            torch.zeros(256).long(),
            None,
            options=LossOptions(),
            needs=[True, True, True, False],
            dtype=torch.float32,
            chunk_rows=8,
        )
    # a chunk's, of 3 * 256 * 4000
    assert mode.largest == 3 * 8 * 4000


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
# scaled gradients take the place of the kept ones
@pytest.mark.parametrize("scale", [pytest.param("1", marks=pytest.mark.long), "0.5"])
@pytest.mark.parametrize("native", ["cpp"], indirect=True)
def test_linear_holds_one_chunk_at_a_time(native, scale):
    run = subprocess.run(
        [sys.executable, "-c", PEAK, scale], capture_output=True, text=True, check=True
    )
    # chunks of logits, matrix products' own buffers included
    assert float(run.stdout) < 3


def test_linear_without_rows(backend):
    hidden, weight = torch.zeros(2, 0, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    loss = linear_pairwise_js(hidden, weight, reduction="sum", backend=backend)
    loss.backward()
    assert loss == 0 and hidden.grad.shape == hidden.shape and (weight.grad == 0).all()
    assert linear_pairwise_js(hidden, weight, backend=backend).isnan()
    rows = linear_pairwise_js(hidden, weight, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(rows.sum(), weight)
    assert rows.shape == (0,) and (gradient == 0).all()
