"""What the CPU's tests have no reason to look at: rows for warps, blocks and clusters, tensors
of many items. Run by test_cuda.py.
"""

import ctypes

import pytest
import torch

import uegr_kernels as uk
from uegr_kernels.core import native


@pytest.mark.parametrize(
    ("classes", "passes"),
    [
        # a warp, ragged
        (5, 2),
        # a block of a warp
        (100, 2),
        # no pairs
        (1024, 1),
        # a block
        (2000, 2),
        (2003, 2),
        # a cluster of 2
        (5000, 2),
        # of 4, ragged
        (9001, 2),
        # three passes, a cluster of 2
        (5000, 3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_losses(classes, passes, dtype, in_place):
    clean, adversarial = (
        3 * torch.randn(*shape, 3, classes).to(dtype) for shape in ((), (passes,))
    )
    # a class that dominates its row
    adversarial[0, 1, 2] = 40
    labels = torch.tensor([1, -100, classes - 1])
    found = []
    for backend in ("cpp", "reference"):
        x, y = (t.clone().requires_grad_() for t in (clean, adversarial))
        options = {
            "js_weight": 1.0,
            "label_smoothing": 0.1,
            "inplace_backward": in_place,
            "backend": backend,
        }
        loss = uk.uegr_loss(x * 1, y * 1, labels, **options)
        loss.backward()
        found.append((loss.detach(), x.grad, y.grad))
    tolerance = (
        {"rtol": 2e-2, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 1e-7}
    )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(
    ("classes", "m"),
    [
        # a block of 128 threads; every row begins elsewhere
        (1500, 2),
        (2003, 1),
        # a block, or a cluster of 2
        (5003, 2),
        # a cluster of 2, or of 4
        (9001, 2),
        # labels alone
        (1027, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_that_begin_anywhere(classes, m, dtype, smoothing):
    # The rows of a sample begin at one place of 16 bytes, those of the next at another.
    rows = 8
    clean = 3 * torch.randn(rows, classes).to(dtype)
    adversarial = 3 * torch.randn(m, rows, classes).to(dtype) if m else None
    labels = torch.tensor([0, classes - 1, -100, 7, 1, 2, -100, 3])
    found = []
    for backend in ("cpp", "reference"):
        x = clean.clone().requires_grad_()
        y = None if adversarial is None else adversarial.clone().requires_grad_()
        options = {"js_weight": 1.0, "label_smoothing": smoothing, "reduction": "none"}
        loss = uk.uegr_loss(x, y, labels, backend=backend, **options)
        loss.sum().backward()
        # the forward alone
        with torch.no_grad():
            alone = uk.uegr_loss(x, y, labels, backend=backend, **options)
        assert torch.equal(alone, loss.detach())
        found.append((loss.detach(), x.grad, *(() if y is None else (y.grad,))))
    tolerance = {
        torch.float32: {"rtol": 2e-5, "atol": 1e-6},
        torch.bfloat16: {"rtol": 2e-2, "atol": 1e-4},
        torch.float16: {"rtol": 2e-3, "atol": 1e-4},
    }[dtype]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(
    ("classes", "m", "soft"),
    [
        # a chunk or two
        (6, 3, False),
        # every row begins elsewhere
        (1003, 4, False),
        (1003, 2, True),
        # a cluster
        (3001, 8, True),
        # labels alone
        (514, 0, True),
        # no pairs
        (257, 1, True),
        # more passes than stay on chip: the sweep
        (40, 9, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_passes_and_soft_labels(classes, m, soft, dtype):
    rows = 5
    clean = 3 * torch.randn(rows, classes).to(dtype)
    adversarial = 3 * torch.randn(m, rows, classes).to(dtype) if m else None
    if m:
        # a class that dominates its row
        adversarial[0, 1, 2] = 40
        adversarial[m - 1, 2, 0] = -torch.inf
        adversarial[:, 3, 1] = -torch.inf
    labels = torch.tensor([0, classes - 1, -100, 5, 4])
    if soft:
        labels = torch.randn(rows, classes).softmax(-1).to(dtype)
        if m:
            labels[2:4, :2] = 0
    found = []
    for backend in ("cpp", "reference"):
        x = clean.clone().requires_grad_()
        y = None if adversarial is None else adversarial.clone().requires_grad_()
        loss = uk.uegr_loss(x, y, labels, js_weight=1.0, reduction="none", backend=backend)
        loss.sum().backward()
        found.append((loss.detach(), x.grad, *(() if y is None else (y.grad,))))
    tolerance = (
        {"rtol": 2e-2, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-6}
    )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("where", ["one pass", "both", "a row", "nan"])
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinite_logits(where, m, dtype):
    # rows begin anywhere
    x = torch.randn(m, 3, 1001).to(dtype)
    if where == "a row":
        x[0, 1] = -torch.inf
    else:
        some = slice(None) if where == "both" else 1
        x[some, 1, ::7] = torch.nan if where == "nan" else -torch.inf
    found = []
    for backend in ("cpp", "reference"):
        y = x.clone().requires_grad_()
        loss = uk.pairwise_js(y, reduction="none", backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), y)))
    tolerance = (
        {"rtol": 2e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-4}
    )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **tolerance, equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "m", "expected"),
    [
        # a fine-tuning batch: one launch
        ((16, 2), 2, 1),
        ((16, 2), 0, 1),
        ((64, 64), 2, 1),
        # count, loss, sum
        ((65, 2), 2, 3),
        ((16, 65), 2, 3),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_launches_of_a_forward(shape, m, expected, reduction):
    x = torch.randn(shape)
    y = torch.randn(m, *shape) if m else None
    labels = torch.randint(0, shape[1], shape[:1])
    labels[3] = -100
    found = []
    for backend in ("cpp", "reference"):
        a = x.clone().requires_grad_()
        b = None if y is None else y.clone().requires_grad_()
        before = launches()
        loss = uk.uegr_loss(a, b, labels, reduction=reduction, backend=backend)
        if backend == "cpp":
            assert launches() - before == expected
        loss.sum().backward()
        found.append((loss.detach(), a.grad, *(() if b is None else (b.grad,))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dominated", [False, True])
def test_small_divergences_are_exact(dominated):
    x = torch.randn(1, 4, 3000)
    if dominated:
        x[..., 17] = 20
    near = (x + 1e-3 * torch.randn_like(x)).clone()
    pair = torch.cat((x, near)).requires_grad_()
    found = uk.pairwise_js(pair, reduction="none", backend="cpp")
    exact = uk.pairwise_js(pair.double(), reduction="none", backend="reference")
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), pair)
    (expected,) = torch.autograd.grad(exact.sum(), pair)
    assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()
    same = torch.cat((x, x)).requires_grad_()
    nothing = uk.pairwise_js(same, reduction="none", backend="cpp")
    assert (nothing == 0).all()
    assert torch.autograd.grad(nothing.sum(), same)[0].count_nonzero() == 0


@pytest.mark.parametrize("refused", ["nothing", "large clusters", "clusters"])
# clusters of 2, and of 16
@pytest.mark.parametrize("classes", [5000, 33_000])
def test_a_device_that_refuses_clusters_sweeps(monkeypatch, refused, classes):
    monkeypatch.setenv("CUDA_ON_HOST_REFUSES", refused)
    x = (3 * torch.randn(2, 1, classes)).requires_grad_()
    found = []
    for backend in ("cpp", "reference"):
        loss = uk.pairwise_js(x, backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)


def launches():
    return ctypes.CDLL(str(native.LIBRARIES / "uegr_kernels_baseline.so")).launches_on_host()


def at_place(values, place):
    """The same values, from an element on that no access of 128 bits need begin at."""
    room = torch.empty(values.numel() + place, dtype=values.dtype)
    return room[place:].view(values.shape).copy_(values)


TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-7},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-7},
    torch.float16: {"rtol": 2**-9, "atol": 1e-7},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("shape", "place", "masked"),
    [
        ((2, 3, 64), 0, True),
        ((2, 3, 64), 0, False),
        # groups begin anywhere
        ((3, 5, 61), 0, False),
        ((2, 3, 64), 1, False),
        # several pieces, with ends of tokens within
        ((2, 3, 5500), 0, True),
        # every piece has ends; whole counters, or half packs
        ((2, 3, 5501), 4, False),
        ((2, 3, 5501), 3, False),
        # tokens longer than a piece
        ((1, 2, 20_000), 0, True),
        ((1, 2, 20_000), 2, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_perturbations_of_tensors_that_begin_anywhere(shape, place, masked, norm, dtype):
    g, delta = (at_place(torch.randn(shape).to(dtype), place) for _ in range(2))
    mask = None
    if masked:
        mask = torch.ones(shape[:2], dtype=torch.bool)
        mask[0, 1] = mask[-1, 0] = False
        # what is masked is not looked at
        g[~mask] = torch.nan
    for per in ("sample", "token", "all"):
        options = {"norm": norm, "per": per, "mask": mask}
        found = []
        for backend in ("cpp", "reference"):
            clean = g.nan_to_num(0.0) if backend == "reference" else g
            found.append(
                (
                    uk.fgm_perturbation(clean, 0.3, backend=backend, **options),
                    uk.fgm_perturbation(
                        clean, 0.3, backend=backend, keep_probability=0.6, seed=5, **options
                    ),
                    uk.pgd_step(
                        delta, clean, step_size=0.3, radius=2.0, backend=backend, **options
                    ),
                )
            )
        for a, b in zip(*found, strict=True):
            assert torch.equal(a == 0, b == 0)
            torch.testing.assert_close(a, b, **TOLERANCE[dtype])


@pytest.mark.parametrize("together", [False, True], ids=["each", "all"])
@pytest.mark.parametrize("keep_probability", [1.0, 0.5])
def test_weights_of_all_kinds_move_at_once(together, keep_probability):
    # size, dtype, and where the weight and its gradient begin
    kinds = [(n, dtype, 0, 0) for dtype in TOLERANCE for n in (2, 768, 40_001)]
    kinds += [
        # no counter begins where a whole access does
        (20_003, torch.float32, 3, 3),
        (20_003, torch.bfloat16, 4, 4),
        # element by element
        (20_003, torch.float32, 0, 3),
    ]
    start = [torch.randn(n).to(dtype) for n, dtype, _, _ in kinds]
    grads = [at_place(torch.randn_like(x), kind[3]) for x, kind in zip(start, kinds, strict=True)]
    options = {"per": "all" if together else "tensor", "keep_probability": keep_probability}
    found = []
    for backend in ("cpp", "reference"):
        params = [
            torch.nn.Parameter(at_place(x, kind[2])) for x, kind in zip(start, kinds, strict=True)
        ]
        before = launches()
        with uk.perturbed_weights(params, 0.3, gradients=grads, seed=9, backend=backend, **options):
            # three dtypes and what is misaligned, twice; the factors
            if backend == "cpp":
                assert launches() - before == 2 * 4 + 1
            found.append([p.detach().clone() for p in params])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[a.dtype])


@pytest.mark.parametrize(
    ("per", "length", "step", "onto_ball"),
    [
        # a group is one piece's: from its norm to its step at once
        ("token", 768, 1, 1),
        ("sample", 768, 1, 1),
        ("all", 768, 1, 1),
        ("sample", 6000, 3, 5),
    ],
)
def test_launches_of_a_perturbation(per, length, step, onto_ball):
    g = torch.randn(2, 3, length)
    before = launches()
    uk.fgm_perturbation(g, 0.1, per=per, backend="cpp")
    assert launches() - before == step
    uk.pgd_step(g, g, step_size=0.1, radius=0.2, per=per, backend="cpp")
    assert launches() - before == step + onto_ball
    uk.pgd_step(g, g, step_size=0.1, radius=0.2, per=per, norm="linf", backend="cpp")
    assert launches() - before == 2 * step + onto_ball


OPTIONS = [
    {},
    {"statistics": "previous"},
    {"normalization": "rank"},
    {"target": "update", "amsgrad": True},
    {"state_dtype": torch.bfloat16},
    {"state_dtype": torch.bfloat16, "statistics": "previous"},
    {"scope": "global"},
    {"scope": "global", "statistics": "previous"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps(options, dtype):
    # some share a group, one is larger than the window, two have a tail
    shapes = (70_000, 1023, 3, 4096, 1, 0, 200_003)
    start = [torch.randn(n).to(dtype) for n in shapes]
    found = []
    for backend in ("cpp", "reference"):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = uk.SelectiveAdamW(params, lr=0.1, seed=5, backend=backend, **options)
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()
        found.append(
            [p.detach().float() for p in params]
            + [optimizer.state[p]["exp_avg"].float() for p in params]
        )
    rank, coarse = "normalization" in options, dtype == torch.bfloat16 or "state_dtype" in options
    for a, b in zip(*found, strict=True):
        # A rank, and with it 1/p, is off by its bin's share, which the exact reference has not.
        wrong = ~torch.isclose(
            a, b, rtol=0.2 if rank else 2e-2 if coarse else 1e-4, atol=1e-2 if rank else 1e-4
        )
        # u and p may be closer than their rounding
        assert wrong.sum() <= (0.05 * a.numel() + 2 if rank else 1 + 1e-5 * a.numel())


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("saliency", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_selected(dtype, saliency, scope):
    # whole accesses and what is left of them; memory that none covers; strides
    shapes = (70_000, 1023, 3, 4096, 1, 0)
    start = [torch.randn(n).to(dtype) for n in shapes]
    start += [torch.randn(4097).to(dtype)[1:], torch.randn(64, 96).to(dtype).t()]
    s = None if saliency is None else [torch.rand(g.shape).to(saliency) for g in start]
    found = []
    for backend in ("cpp", "reference"):
        params = [torch.nn.Parameter(torch.empty_like(g)) for g in start]
        for p, g in zip(params, start, strict=True):
            p.grad = g.clone()
        uk.select_gradients_(params, seed=7, step=3, saliency=s, scope=scope, backend=backend)
        found.append([p.grad for p in params])
    for a, b in zip(*found, strict=True):
        # u and p may be closer than their rounding
        other = (a == 0) != (b == 0)
        assert other.sum() <= 1e-5 * a.numel()
        kept = ~other
        torch.testing.assert_close(a[kept].float(), b[kept].float(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_are_the_references(dtype):
    # 1/p is the same number everywhere, so nothing may differ
    options = {"normalization": "constant", "keep_probability": 0.5, "seed": 2**63 - 5, "step": 9}
    start = [torch.ones(n, dtype=dtype) for n in (70_001, 4096, 5)]
    found = []
    for backend in ("cpp", "reference"):
        params = [torch.nn.Parameter(torch.empty_like(g)) for g in start]
        for p, g in zip(params, start, strict=True):
            p.grad = g.clone()
        uk.select_gradients_(params, backend=backend, **options)
        found.append([p.grad for p in params])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and {*a.unique().tolist()} == {0, 2}


def step_in_float64(backend):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float64))
    p.grad = p.detach().cos()
    uk.SelectiveAdamW([p], lr=0.1, seed=5, backend=backend).step()
    return [p.detach()]


def mask_in_float64(backend):
    return [
        uk.selection_mask(
            torch.linspace(-1, 1, 50, dtype=torch.float64), seed=1, step=2, backend=backend
        )
    ]


def loss_of(shape, dtype):
    def call(backend):
        x = torch.linspace(-3, 3, shape[0] * 20, dtype=dtype).view(shape).requires_grad_()
        loss = uk.pairwise_js(x, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss * 2, x, retain_graph=True)]

    return call


def perturbation_in_float64(backend):
    return [
        uk.fgm_perturbation(
            torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4), 0.1, backend=backend
        )
    ]


def dropout_in_float64(backend):
    torch.manual_seed(3)
    x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(10, 4).requires_grad_()
    dropout = uk.AdaptiveDropout(4, 0.5, backend=backend)
    y = dropout(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), x), dropout.pending]


LEFT = [
    step_in_float64,
    mask_in_float64,
    loss_of((2, 4, 5), torch.float64),
    loss_of((33, 4, 5), torch.float32),
]


@pytest.mark.parametrize("call", [*LEFT, perturbation_in_float64, dropout_in_float64])
def test_what_they_do_not_take_goes_to_the_reference(call):
    for ours, expected in zip(call("cpp"), call("reference"), strict=True):
        assert torch.equal(ours, expected)
