"""The native operators against the reference, from any number of threads."""

import types

import pytest
import torch

from uegr_kernels.dropout import op, reference

from .modules import DTYPES, RELATIVE


def native_operators(native):
    operators = (op.adaptive_dropout, op.adaptive_dropout_backward, op.dropout_rates_)
    return types.SimpleNamespace(**{each.name: each.kernel(native) for each in operators})


# Shapes: one unit, fewer and more than a block of 256 elements holds, rows that no block begins
# with; the last one sums in several parts.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["rates float32", "rates float64"])
@pytest.mark.parametrize(
    "shape", [(0, 3), (1000, 1), (300, 7), (3, 256), (5, 7, 257), (2, 1030), (70, 40, 100)], ids=str
)
def test_native_agrees_with_the_reference_from_any_number_of_threads(native, dtype, wide, shape):
    operators, key, kind = (
        native_operators(native),
        torch.tensor(-(2**63) + 5),
        torch.float64 if wide else torch.float32,
    )
    h, rates, pending = (
        torch.randn(shape).to(dtype),
        torch.rand(shape[-1], dtype=kind),
        torch.zeros(shape[-1], dtype=kind),
    )
    h.view(-1)[5:6] = torch.inf
    rates[:1] = 1.0
    results = []
    # the interpreter has one
    for threads in (1, 2, 4)[: 3 if native == "cpp" else 1]:
        torch.set_num_threads(threads)
        results.append(
            (
                operators.adaptive_dropout(h, rates, key, pending),
                *operators.adaptive_dropout_backward(h, rates, key),
            )
        )
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )
    expected = (
        reference.adaptive_dropout(h, rates, key, pending),
        *reference.adaptive_dropout_backward(h, rates, key),
    )
    for a, b in zip(results[0], expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=2 * RELATIVE[a.dtype] if a is not results[0][2] else 1e-6, atol=0
        )
        assert torch.equal(a == 0, b == 0) or dtype in (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("n", [0.0, 1.0, 1e-30], ids=["none seen", "seen", "small"])
@pytest.mark.parametrize("new", [0.0, 1.0], ids=["nothing new", "new"])
def test_native_rates_are_the_references(native, dtype, fold, n, new):
    results = []
    for rates in (op.dropout_rates_.kernel(native), reference.dropout_rates_):
        torch.manual_seed(3)
        norm, pending = (
            n * torch.rand(1000, dtype=dtype),
            new * torch.rand(1000, 2, dtype=dtype)[:, 0],
        )
        results.append(
            (rates(norm, pending, p=0.3, max_p=0.5, momentum=0.9, fold=fold), norm, pending)
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)


H, R, K = torch.zeros(2, 3), torch.zeros(3), torch.tensor(0)


RATES = {"p": 0.3, "max_p": 0.9, "momentum": 0.9, "fold": True}


WRONG_CALLS = {
    "rates": (lambda o: o.adaptive_dropout(H, R[:2], K, R), "rates must have one number"),
    "rates type": (
        lambda o: o.adaptive_dropout(H, R.half(), K, R),
        "rates must be float32 or float64",
    ),
    "bool": (lambda o: o.adaptive_dropout(H.bool(), R, K, R), "h is bool"),
    "key": (lambda o: o.adaptive_dropout_backward(H, R, R), "key must be an int64"),
    "norms": (
        lambda o: o.dropout_rates_(R.clone(), R[:2].clone(), **RATES),
        "must have one axis of the same size",
    ),
    "norms type": (
        lambda o: o.dropout_rates_(R.clone(), R.double(), **RATES),
        "and the same dtype",
    ),
    "norms expanded": (
        lambda o: o.dropout_rates_(R[:1].expand(3), R.clone(), **RATES),
        "gradient_norm is expanded",
    ),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_native_operators_check_their_arguments(native, case):
    call, message = WRONG_CALLS[case]
    with pytest.raises(RuntimeError, match=message):
        call(native_operators(native))
