"""Adaptive dropout: masks, rates, what a backward leaves; state, checkpointing, compilers, bad
input.
"""

import copy
import io
import math
import pickle
import types
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from uegr_kernels.core import philox
from uegr_kernels.dropout import AdaptiveDropout, op, reference, replace_dropout

OPERATORS = ("dropout.adaptive_dropout",)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A result is rounded once, after 1 - r and a division in the rates' dtype, which is float32 but for
# .double() modules.
RELATIVE = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def next_key():
    """The key that the next call will draw; leaves the generator as it is."""
    state = torch.get_rng_state()
    key = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    torch.set_rng_state(state)
    return key


def uniform(shape, key):
    return philox.uniform(
        philox.words(torch.arange(math.prod(shape)), seed=key, step=0, stream=0)
    ).view(shape)


def teach(module, norms):
    """A call and a backward that leave the given norms of dL/dh_j, and the call that folds them."""
    norms = torch.as_tensor(norms, dtype=module.gradient_norm.dtype)
    x = torch.zeros(1, len(norms), dtype=norms.dtype, requires_grad=True)
    module(x).backward(norms[None])
    module(x.detach())


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
    teach(module, [0.0, 1.0, 2.0, 13.0])  # the mean is 4: rates 0, 0.05, 0.1 and, cut, 0.5
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
    module(torch.ones(2, 3))  # nothing seen since
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
    for threads in (1, 2, 4)[: 3 if native == "cpp" else 1]:  # the interpreter has one
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, reentrant):
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(2)
        module, linear = AdaptiveDropout(6, p=0.5, backend=backend), nn.Linear(6, 6)
        teach(module, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        x = torch.ones(4, 6, requires_grad=True)
        module(x).sum().backward()  # leaves something to fold: by the forward, not by the recompute
        x.grad = None

        def block(x, linear=linear, module=module):
            return module(linear(x)).square()

        y = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
        y.sum().backward()
        results.append(
            (y.detach(), x.grad, linear.weight.grad, module.gradient_norm, module.pending)
        )
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain)


def taught(norms=(1.0, 2.0, 3.0), num_features=None, **options):
    """A module that has seen these norms, and has one more backward's pending."""
    module = AdaptiveDropout(num_features, p=options.pop("p", 0.2), **options)
    module(torch.ones(1, len(norms)))
    teach(module, norms)
    x = torch.zeros(1, len(norms), requires_grad=True)
    module(x).backward(torch.ones(1, len(norms)))
    return module


def assert_same_state(one, other):
    assert torch.equal(one.gradient_norm, other.gradient_norm) and torch.equal(
        one.pending, other.pending
    )
    assert (
        one.gradient_norm.dtype == other.gradient_norm.dtype
        and one.gradient_norm.any()
        and one.pending.any()
    )


def test_state_dict(backend):
    module = taught(backend=backend)
    assert set(module.state_dict()) == {"_extra_state"} and not list(module.buffers())
    assert module.get_extra_state().tolist()[0] == [1.0, 2.0, 3.0]
    for other in (AdaptiveDropout(), AdaptiveDropout(3)):  # sized by the state, or already
        other.load_state_dict(module.state_dict())
        assert_same_state(other, module)
    fresh = AdaptiveDropout()
    fresh.load_state_dict(AdaptiveDropout().state_dict())
    assert fresh(torch.ones(2, 5)).shape == (2, 5)
    with pytest.raises(
        RuntimeError,
        match="size mismatch for gradient_norm: 3 units in the state, num_features=4 here",
    ):
        AdaptiveDropout(4).load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin.gradient_norm, module.gradient_norm) and repr(twin) == repr(module)


def test_a_saved_state_is_a_copy():
    module = taught()
    saved = module.state_dict()
    other = AdaptiveDropout()
    other.load_state_dict(saved, assign=True)
    for each in (module, other):
        before = saved["_extra_state"].clone()
        teach(each, [5.0, 5.0, 5.0])
        assert torch.equal(saved["_extra_state"], before)


@pytest.mark.parametrize("num_features", [None, 3])
def test_a_checkpoint_of_the_plain_model_loads_strictly(num_features):
    """It says nothing of the norms, and leaves them alone."""
    plain = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))
    model = nn.Sequential(nn.Linear(3, 3), taught(num_features=num_features))
    twin = copy.deepcopy(model[1])
    assert model.load_state_dict(plain.state_dict(), strict=True) == ([], [])
    assert_same_state(model[1], twin)
    missing = nn.Sequential(nn.Linear(3, 3), AdaptiveDropout()).state_dict()
    del missing["0.weight"]
    with pytest.raises(RuntimeError, match='Missing key.*: "0.weight"'):
        model.load_state_dict(missing)


@pytest.mark.parametrize("num_features", [None, 3])
def test_a_checkpoint_from_when_the_state_was_in_buffers(num_features):
    model = nn.Sequential(nn.Linear(3, 3), AdaptiveDropout(num_features))
    old = nn.Linear(3, 3).state_dict(prefix="0.")
    old |= {
        "1.gradient_norm": torch.tensor([1.0, 2.0, 3.0]),
        "1.pending": torch.tensor([4.0, 0.0, 0.0]),
    }
    assert model.load_state_dict(old) == ([], [])
    assert model[1].gradient_norm.tolist() == [1.0, 2.0, 3.0] and model[1].pending.tolist() == [
        4.0,
        0.0,
        0.0,
    ]
    with pytest.raises(RuntimeError, match="size mismatch for gradient_norm"):
        nn.Sequential(nn.Linear(3, 3), AdaptiveDropout(4)).load_state_dict(old)


@pytest.mark.parametrize(
    "state",
    [
        torch.zeros(2, 3),
        torch.zeros(3),
        torch.zeros(3, 3, dtype=torch.int64),
        {"gradient_norm": 1},
        None,
    ],
)
def test_an_extra_state_of_another_kind_is_refused(state):
    module = taught()
    before = module.get_extra_state()
    with pytest.raises(
        ValueError,
        match=r"the extra state of an AdaptiveDropout is a floating "
        r"tensor \[3, F\]",
    ):
        module.set_extra_state(state)
    with pytest.raises(RuntimeError, match="the extra state of an AdaptiveDropout"):
        module.load_state_dict({"_extra_state": state})
    assert torch.equal(module.get_extra_state(), before)


def test_a_run_goes_on_from_its_state(backend):
    def steps(module, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            x = torch.randn(4, 3, requires_grad=True)
            module(x).square().sum().backward()
        return module

    whole = steps(AdaptiveDropout(p=0.4, backend=backend), 0, 6)
    file = io.BytesIO()
    torch.save(steps(AdaptiveDropout(p=0.4, backend=backend), 0, 3).state_dict(), file)
    file.seek(0)
    again = AdaptiveDropout(p=0.4, backend=backend)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(steps(again, 3, 6), whole)


def test_a_copy_in_the_middle_of_a_step():
    module, linear = taught(), nn.Linear(3, 3)
    h = module(linear(torch.ones(2, 3)))
    twin = copy.deepcopy(module)
    before = twin.pending.clone()
    h.sum().backward()
    assert torch.equal(twin.pending, before) and not torch.equal(module.pending, before)
    twin(linear(torch.ones(2, 3))).sum().backward()
    assert (twin.pending > before).all()


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("num_features", [None, 3])
@pytest.mark.parametrize("called", [False, True], ids=["before the first call", "after it"])
def test_averaged_model(use_buffers, num_features, called):
    model = nn.Sequential(nn.Linear(3, 3), AdaptiveDropout(num_features, 0.5), nn.BatchNorm1d(3))
    if called:
        model(torch.ones(2, 3)).sum().backward()
    average = AveragedModel(model, use_buffers=use_buffers)
    for _ in range(2):
        model(torch.randn(4, 3)).square().sum().backward()
        average.update_parameters(model)
    torch.testing.assert_close(average.module[0].weight, model[0].weight)
    assert average(torch.ones(2, 3)).shape == (2, 3) and model[1].gradient_norm.any()


def assert_new(module, units):
    """Its rates are all p, and it learns."""
    x = torch.ones(50, units, requires_grad=True)
    expected = uniform(x.shape, next_key()) < torch.tensor(0.1)
    h = module(x)
    assert torch.equal(h == 0, expected)
    h.sum().backward()
    module(x)
    assert (
        module.gradient_norm.shape == (units,)
        and module.gradient_norm.isfinite().all()
        and module.gradient_norm.all()
    )


@pytest.mark.parametrize("num_features", [None, 4])
def test_from_the_meta_device(num_features):
    """`to_empty` gives memory that holds anything; deterministic algorithms fill it with NaN."""
    with torch.device("meta"):
        module = AdaptiveDropout(num_features, p=0.1)
    assert module(torch.ones(2, 4, device="meta")).shape == (2, 4)
    torch.use_deterministic_algorithms(True)
    try:
        moved = copy.deepcopy(module).to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_new(moved, 4)
    assert_new(copy.deepcopy(module), 4)  # whose owner moved parameters and buffers alone
    loaded = copy.deepcopy(module)
    loaded.load_state_dict(taught([1.0, 2.0, 3.0, 4.0]).state_dict(), assign=True)
    assert loaded.gradient_norm.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_to_empty_and_reset():
    module = taught()
    # what is there is no worse than what would be
    twin = copy.deepcopy(module).to_empty(device="cpu")
    assert_same_state(twin, module)
    twin.reset_parameters()
    assert not twin.get_extra_state().any()
    assert module.to("meta").gradient_norm.is_meta


def test_inference_mode_first(backend):
    """Whatever happens to a module in inference mode, it trains afterwards."""
    state = taught().state_dict()
    with torch.inference_mode():
        built = AdaptiveDropout(3, backend=backend)
        loaded = AdaptiveDropout(backend=backend)
        loaded.load_state_dict(state)
        called = AdaptiveDropout(backend=backend)
        called(torch.ones(2, 3))
        called.eval()(torch.ones(2, 3))
        moved = AdaptiveDropout(3, backend=backend).double().float()
    for module in (built, loaded, called.train(), moved):
        for _ in range(2):
            module(torch.ones(2, 3, requires_grad=True)).sum().backward()
        assert module.gradient_norm.all()
        with torch.inference_mode():
            module(torch.ones(2, 3))
        module(torch.ones(2, 3, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("num_features", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_does_not_matter(backend, num_features, dtype):
    torch.set_default_dtype(dtype)
    try:
        module = AdaptiveDropout(num_features, backend=backend)
        module(torch.ones(2, 3, dtype=torch.float32, requires_grad=True)).sum().backward()
        assert module.gradient_norm.dtype == module.pending.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("num_features", [None, 3])
def test_double_inputs_have_double_norms(backend, num_features):
    module = AdaptiveDropout(num_features, backend=backend)
    for _ in range(2):
        module(torch.ones(2, 3, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert module.gradient_norm.dtype == torch.float64 and module.gradient_norm.all()


def test_the_state_stays_wide(backend):
    module = AdaptiveDropout(3, backend=backend).half()
    assert module.gradient_norm.dtype == torch.float32
    x = torch.ones(2, 3, dtype=torch.float16, requires_grad=True)
    module(x).backward(torch.full_like(x, 1000.0))  # its square overflows float16
    assert module.pending.tolist() == [2e6] * 3 and x.grad.dtype == torch.float16
    # nor do its values pass through 16 bits
    for cast in (module.half, module.bfloat16, module.to_empty):
        cast(**({"device": "cpu"} if cast == module.to_empty else {}))
        assert module.pending.tolist() == [2e6] * 3
    assert module.double().pending.dtype == torch.float64


def test_share_memory():
    module = taught().share_memory()
    assert module.gradient_norm.is_shared() and module.pending.is_shared()
    module(torch.ones(2, 3))
    assert module.gradient_norm.is_shared()


# The plain rate


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
    teach(module.to(torch.float64), torch.ones(5))  # what has units still adapts
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
        plain(torch.ones(1, 6))  # folds; the same gradients reach it by hand
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
    if "attention.twice" in kept:  # one module under two names, which stays one
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
    "no axis": (lambda: AdaptiveDropout()(X[0, 0]), ValueError, r"input has shape \(\)"),
    "elsewhere": (
        lambda: AdaptiveDropout(3)(X.to("meta")),
        ValueError,
        "input is on meta, the module's state on cpu",
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
    "option": (lambda: replace_dropout(nn.Sequential(nn.Dropout()), rate=0.5), TypeError, "rate"),
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
