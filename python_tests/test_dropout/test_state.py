"""State: checkpointing, state_dict, copies, devices, dtypes."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from uegr_kernels.dropout import AdaptiveDropout

from .modules import assert_same_state, next_key, taught, teach, uniform


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, reentrant):
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(2)
        module, linear = AdaptiveDropout(6, p=0.5, backend=backend), nn.Linear(6, 6)
        teach(module, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        x = torch.ones(4, 6, requires_grad=True)
        # leaves something to fold: by the forward, not by the recompute
        module(x).sum().backward()
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


def test_state_dict(backend):
    module = taught(backend=backend)
    assert set(module.state_dict()) == {"_extra_state"} and not list(module.buffers())
    assert module.get_extra_state().tolist()[0] == [1.0, 2.0, 3.0]
    # sized by the state, or already
    for other in (AdaptiveDropout(), AdaptiveDropout(3)):
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
    """Checks that its rates are all p, and that it learns."""
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
    # whose owner moved parameters and buffers alone
    assert_new(copy.deepcopy(module), 4)
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
    # its square overflows float16
    module(x).backward(torch.full_like(x, 1000.0))
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
