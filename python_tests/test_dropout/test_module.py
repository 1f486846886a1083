"""The module among others: functional calls, autocast, `replace_dropout`, bad input."""

import copy

import numpy
import pytest
import torch
from torch import nn

from uegr_kernels.dropout import AdaptiveDropout, replace_dropout


def test_functional_calls():
    """The state is no part of the parameters and buffers: a functional call updates the
    module's own.
    """
    model = nn.Sequential(nn.Linear(3, 3), AdaptiveDropout(3, 0.5))
    weights = {"0.weight": torch.eye(3), "0.bias": torch.zeros(3)}
    for _ in range(2):
        torch.func.functional_call(model, weights, torch.ones(4, 3, requires_grad=True)).backward(
            torch.ones(4, 3)
        )
    assert model[1].gradient_norm.tolist() == [2.0] * 3
    models = [copy.deepcopy(model) for _ in range(2)]
    stacked = torch.func.stack_module_state(models)
    base = copy.deepcopy(model).to("meta")
    with pytest.raises(RuntimeError, match="does not run under torch.func.vmap"):
        torch.func.vmap(
            lambda p, b: torch.func.functional_call(base, (p, b), torch.ones(4, 3)),
            randomness="different",
        )(*stacked)
    base.eval()
    torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), torch.ones(4, 3)))(
        *stacked
    )


def test_numbers_of_numpy():
    module = AdaptiveDropout(
        numpy.int64(3), numpy.float32(0.5), max_p=numpy.float64(0.75), momentum=numpy.float32(0.5)
    )
    assert repr(module) == "AdaptiveDropout(3, p=0.5, max_p=0.75, momentum=0.5, backend='auto')"
    assert module(torch.ones(2, 3)).shape == (2, 3)


def test_autocast(backend):
    module, linear = AdaptiveDropout(p=0.5, backend=backend), nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        h = module(linear(torch.ones(8, 4)))
    h.float().square().sum().backward()
    assert (
        h.dtype == torch.bfloat16
        and module.pending.dtype == torch.float32
        and linear.weight.grad.isfinite().all()
    )


def test_replace_dropout(backend):
    shared = nn.Dropout(0.25, inplace=True)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Dropout(0.1), nn.Sequential(shared, nn.Dropout2d(0.5)), shared
    )
    model[3].eval()
    assert replace_dropout(model, max_p=0.8, backend=backend) == 2
    assert isinstance(model[1], AdaptiveDropout) and (
        model[1].p,
        model[1].max_p,
        model[1].training,
    ) == (0.1, 0.8, True)
    assert model[2][0] is model[3] and (model[3].p, model[3].training) == (0.25, False)
    assert isinstance(model[2][1], nn.Dropout2d) and replace_dropout(model) == 0
    other = nn.ModuleDict({"a": nn.Dropout(0.1), "b": nn.Dropout(0.2)})
    assert (
        replace_dropout(other, p=0.3, num_features=5) == 2
        and other["b"].p == 0.3
        and other["b"].gradient_norm.shape == (5,)
    )


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        ((), []),
        (("*.drop",), ["attention.drop"]),
        ("attention.*", ["attention.drop", "attention.twice"]),
        (["twice", "no such name"], ["attention.twice", "twice"]),
        (("*",), ["attention.drop", "attention.twice", "out", "twice"]),
    ],
    ids=str,
)
def test_replace_dropout_skips_by_name(skip, kept):
    twice = nn.Dropout(0.3)
    model = nn.ModuleDict(
        {
            "attention": nn.ModuleDict({"drop": nn.Dropout(0.1), "twice": twice}),
            "out": nn.Dropout(0.2),
            "twice": twice,
        }
    )
    before = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Dropout)
    ]
    # one module under two names, which stays one
    if "attention.twice" in kept:
        kept = sorted({*kept, "twice"})
    count = replace_dropout(model, skip=skip)
    after = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if not list(module.children())
    }
    assert sorted(name for name, module in after.items() if isinstance(module, nn.Dropout)) == kept
    assert sum(isinstance(module, AdaptiveDropout) for module in model.modules()) == count
    assert after["attention.twice"] is after["twice"] and sorted(after) == sorted(before)


def test_replaced_transformer_trains(backend):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)
    assert replace_dropout(layer, backend=backend) == 3
    for _ in range(2):
        layer(torch.randn(2, 5, 8)).square().sum().backward()
    assert layer.dropout.gradient_norm.shape == (16,) and (layer.dropout.gradient_norm > 0).any()


X = torch.zeros(2, 3)


BAD_INPUT = {
    "p": (
        lambda: AdaptiveDropout(p=1.5),
        ValueError,
        r"p=1.5 is out of range; give a number in "
        r"\[0, 1\]",
    ),
    "max_p": (lambda: AdaptiveDropout(max_p=-0.1), ValueError, "max_p=-0.1 is out of range"),
    "momentum": (
        lambda: AdaptiveDropout(momentum=1.0),
        ValueError,
        r"momentum=1.0 is out of "
        r"range; give a number in \[0, "
        r"1\)",
    ),
    "text": (lambda: AdaptiveDropout(p="0.5"), TypeError, "p='0.5' is a str"),
    "features": (lambda: AdaptiveDropout(0), ValueError, "num_features=0 is out of range"),
    "features type": (lambda: AdaptiveDropout(0.3), TypeError, "num_features=0.3 is a float"),
    "backend": (
        lambda: AdaptiveDropout(backend="rocm"),
        ValueError,
        "backend='rocm' is not a backend",
    ),
    "absent backend": (
        lambda: AdaptiveDropout(backend="cuda")(X),
        RuntimeError,
        "backend='cuda' cannot serve dropout.adaptive_dropout",
    ),
    "width": (
        lambda: AdaptiveDropout(4)(X),
        ValueError,
        r"input of shape \(2, 3\) has 3 units, "
        r"the module 4",
    ),
    "no tensor": (lambda: AdaptiveDropout()([1.0]), TypeError, "input is a list"),
    "integers": (lambda: AdaptiveDropout()(X.long()), TypeError, "input is torch.int64"),
    "complex": (
        lambda: AdaptiveDropout()(X.to(torch.complex64)),
        TypeError,
        "input is torch.complex64",
    ),
    "sparse": (lambda: AdaptiveDropout()(X.to_sparse()), TypeError, "input is sparse"),
    "no axis": (
        lambda: AdaptiveDropout()(X[0, 0]),
        ValueError,
        r"input has shape \(\); give \[..., F\]",
    ),
    "no units": (
        lambda: AdaptiveDropout()(X[:, :0]),
        ValueError,
        r"input of shape \(.*, 0\) has an empty last axis",
    ),
    "elsewhere": (
        lambda: AdaptiveDropout(3)(X.to("meta")),
        ValueError,
        "input is on meta and the module's state on cpu; move one",
    ),
    "no model": (lambda: replace_dropout([nn.Dropout()]), TypeError, "model is a list"),
    "a dropout": (
        lambda: replace_dropout(nn.Dropout()),
        ValueError,
        "model is itself an nn.Dropout",
    ),
    "skip": (
        lambda: replace_dropout(nn.Sequential(nn.Dropout()), skip=(1,)),
        TypeError,
        "skip names 1, a int",
    ),
    "option of none": (lambda: replace_dropout(nn.Sequential(), max_p=2), ValueError, "max_p=2"),
    "option": (
        lambda: replace_dropout(nn.Sequential(nn.Dropout()), momentun=0.5),
        TypeError,
        "AdaptiveDropout has no option 'momentun'.*; 'momentum' is near",
    ),
    "option value": (
        lambda: replace_dropout(nn.Sequential(nn.Dropout()), p=2),
        ValueError,
        "p=2 is out of range",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        call()
