"""On a GPU for which the library holds no code every operator leaves its call to the overload
`fallback`. Run by test_cuda.py.
"""

import pytest
import torch

import uegr_kernels as uk
from uegr_kernels.core import native


def step(cls, **options):
    def call(backend):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = cls([p], lr=0.1, seed=5, backend=backend, **options)
        for _ in range(2):
            p.grad = p.detach().cos()
            optimizer.step()
        return [
            p.detach(),
            *(state for state in optimizer.state[p].values() if isinstance(state, torch.Tensor)),
        ]

    return call


def selected(backend):
    p = torch.nn.Parameter(torch.zeros(50))
    p.grad = torch.linspace(-1, 1, 50)
    uk.select_gradients_(p, seed=3, step=1, backend=backend)
    mask = uk.selection_mask(p.grad, seed=3, step=1, backend=backend)
    return [p.grad, mask, uk.selection_probability(p.grad, backend=backend)]


def loss(backend):
    x, y = (torch.linspace(-3, 3, n).requires_grad_() for n in (20, 40))
    found = uk.uegr_loss(x.view(4, 5), y.view(2, 4, 5), torch.tensor([1, 0, 4, 2]), backend=backend)
    return [
        found.detach(),
        *torch.autograd.grad(found * 2, (x, y), retain_graph=True),
        *torch.autograd.grad(found * 2, (x, y)),
    ]


def loss_in_place(backend):
    x = torch.linspace(-3, 3, 40).requires_grad_()
    found = uk.pairwise_js((x * 1).view(2, 4, 5), inplace_backward=True, backend=backend)
    return [found.detach(), *torch.autograd.grad(found * 2, x)]


def linear_loss(backend):
    hidden, weight = (
        torch.linspace(-1, 1, 24).view(2, 4, 3).requires_grad_(),
        torch.linspace(-2, 1, 15).view(5, 3).requires_grad_(),
    )
    found = uk.linear_pairwise_js(hidden, weight, backend=backend)
    return [found.detach(), *torch.autograd.grad(found * 2, (hidden, weight))]


def perturbations(backend):
    g, p = (
        torch.linspace(-1, 1, 12).view(3, 4),
        torch.nn.Parameter(torch.linspace(0, 1, 12).view(3, 4)),
    )
    with uk.perturbed_weights([p], 0.1, gradients=[g], backend=backend):
        moved = p.detach().clone()
    return [
        uk.fgm_perturbation(g, 0.1, backend=backend),
        uk.pgd_step(g, g, step_size=0.1, radius=0.3, backend=backend),
        moved,
    ]


def dropout(backend):
    torch.manual_seed(3)
    x = torch.linspace(-1, 1, 40).view(10, 4).requires_grad_()
    module = uk.AdaptiveDropout(4, 0.5, backend=backend)
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), x), module.pending]


CALLS = [
    step(uk.SelectiveAdamW),
    step(uk.SelectiveAdamW, normalization="range", scope="global", amsgrad=True),
    step(uk.SelectiveSGD, momentum=0.9, statistics="previous"),
    *(selected, loss, loss_in_place, linear_loss, perturbations, dropout),
]


@pytest.mark.parametrize("call", CALLS)
def test_every_operator_is_the_references(call):
    for ours, expected in zip(call("cpp"), call("reference"), strict=True):
        assert torch.equal(ours, expected)


def test_the_library_says_so(monkeypatch):
    monkeypatch.setattr(
        native,
        "_cuda_library",
        lambda: native.load_functions(native.LIBRARIES / "uegr_kernels_baseline.so"),
    )
    assert native.probe(0) == "cudaErrorNoKernelImageForDevice"
    assert native.architectures() == ("8.0", "9.0a", "10.0+PTX")
    assert native.versions() == ("12.4", "13.0")
