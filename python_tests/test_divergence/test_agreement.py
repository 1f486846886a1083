"""The kernels against the reference in float64, in every dtype and layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uegr_kernels.divergence import linear_uegr_loss, pairwise_js, uegr_loss

from .logits import DTYPES, TOLERANCE, batch, random_logits


def test_gradients_in_float32_are_right_to_the_rows_largest(backend):
    logits = random_logits(3, 8, 200, seed=5).clamp(-1, 1) * 80
    wide, narrow = logits.clone().requires_grad_(), logits.float().requires_grad_()
    pairwise_js(wide.float().double(), reduction="sum", backend="reference").backward()
    pairwise_js(narrow, reduction="sum", backend=backend).backward()
    largest = wide.grad.abs().amax(-1, keepdim=True)
    assert ((narrow.grad - wide.grad).abs() / largest).max() < 1e-5


def compare_with_wide_reference(native, logits, labels, **options):
    """Compares losses to 1e-5 or 1e-7 nats a pair, gradients to 1e-5 of their row's largest or
    1e-7, against the reference in float64.
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
        # many passes of many blocks take the interpreter long
        m = 2
    logits = [
        random_logits(3, c, dtype=torch.float32, seed=1, scale=5.0),
        random_logits(m, 3, c, dtype=torch.float32, seed=2, scale=5.0),
    ]
    compare_with_wide_reference(native, logits, torch.tensor([0, -100, c - 1]))
    compare_with_wide_reference(
        native, logits, torch.tensor([0, -100, c // 2]), label_smoothing=0.1
    )
    compare_with_wide_reference(native, logits, random_logits(3, c, seed=3).softmax(-1))


# more passes than an integer has bits; many passes of rows that no registers hold
@pytest.mark.parametrize(("m", "c"), [(33, 5), (5, 3001)])
def test_kernel_is_the_wide_reference_of_many_passes(native, m, c):
    clean, adversarial = batch(m, 2, c, dtype=torch.float32)[:2]
    logits = [clean.detach(), adversarial.detach()]
    compare_with_wide_reference(native, logits, torch.tensor([c - 1, 0]))
    some = [x.clone().requires_grad_(k % 3 != 1) for k, x in enumerate(logits[1])]
    pairwise_js(some, backend=native).backward()
    wide = logits[1].double().requires_grad_()
    pairwise_js(wide, backend="reference").backward()
    for k, x in enumerate(some):
        if x.requires_grad:
            torch.testing.assert_close(x.grad.double(), wide.grad[k], rtol=1e-4, atol=1e-7)
        else:
            assert x.grad is None


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
