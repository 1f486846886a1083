"""BiStage against the method's steps spelt out with torch's own functions, and every promise
about hooks, rows, modes and errors.
"""

import contextlib
import copy
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from uegr_kernels import AdaptiveDropout, BiStage, recipes
from uegr_kernels.models import MODELS, TextCNN

N, T, WORDS, CLASSES = 5, 9, 30, 4


class Small(nn.Module):
    """Has an embedding, a dropout and two linear layers over the mean; subclasses change how the
    embedding is used.
    """

    def __init__(
        self, dropout: float = 0.0, classes: int = CLASSES, adaptive: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.hidden = nn.Linear(6, 8)
        self.dropout = AdaptiveDropout(8, dropout) if adaptive else nn.Dropout(dropout)
        self.output = nn.Linear(8, classes)

    def look_up(self, ids):
        return self.embedding(ids)

    def classify(self, x, mask=None):
        return self.output(self.dropout(torch.tanh(self.hidden(x))).mean(1))

    def forward(self, ids):
        return self.classify(self.look_up(ids))


def batch(seed: int = 0, classes: int = CLASSES):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, WORDS, (N, T), generator=generator), torch.randint(
        0, classes, (N,), generator=generator
    )


def gradients(model):
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def outcome(model, run):
    """Gives what `run` returns and the gradients it leaves, from none and from one random state."""
    model.zero_grad()
    torch.manual_seed(7)
    return run(), {name: gradient.clone() for name, gradient in gradients(model).items()}


def assert_equal(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def method(
    model,
    ids,
    labels,
    *,
    mask=None,
    epsilon=0.1,
    passes=2,
    js_weight=0.01,
    unit=None,
    one_by_one=False,
    rates=None,
    **options,
):
    """Runs docs/methods.md, "UEGR", steps 1 to 4 in torch's words: returns L_train and its parts
    after their backward.
    """
    weights = torch.ones(ids.shape) if mask is None else mask
    x = model.embedding(ids)
    x.retain_grad()
    clean = model.classify(x, weights != 0)
    clean_loss = F.cross_entropy(clean, labels, **options)
    clean_loss.backward()
    g = x.grad * weights[..., None]
    delta = epsilon * (F.normalize(g.flatten(1), dim=1).view_as(g) if unit is None else unit(g))
    logits = []
    for k in range(passes) if one_by_one else (slice(passes),):
        copies = 1 if one_by_one else passes
        if rates is not None:
            own, model.dropout.p = model.dropout.p, rates[k]
        words = model.embedding(ids.repeat(copies, 1)) + delta.repeat(copies, 1, 1)
        logits += model.classify(words, weights.repeat(copies, 1) != 0).split(len(ids))
        if rates is not None:
            model.dropout.p = own
    adversarial_loss = sum(F.cross_entropy(each, labels, **options) for each in logits) / passes
    counted = labels != options.get("ignore_index", -100)
    logp = [F.log_softmax(each[counted], -1) for each in logits]
    divergence = torch.zeros((), dtype=clean.dtype)
    for k in range(passes):
        for l in range(k):
            middle = (logp[k].exp() + logp[l].exp()).log() - torch.log(
                torch.tensor(2.0, dtype=clean.dtype)
            )
            divergence = (
                divergence
                + sum(
                    F.kl_div(middle, q, log_target=True, reduction="batchmean")
                    for q in (logp[k], logp[l])
                )
                / 2
            )
    (adversarial_loss + js_weight * divergence).backward()
    return (
        clean_loss + adversarial_loss + js_weight * divergence,
        clean_loss,
        adversarial_loss,
        divergence,
        clean,
    )


CASES = {
    "defaults, no dropout": {},
    "dropout": {"dropout": 0.4},
    "one pass": {"passes": 1},
    "four passes, heavy divergence": {"passes": 4, "js_weight": 3.0, "dropout": 0.4},
    "pass by pass": {"passes": 3, "dropout": 0.4, "passes_at_once": 1},
    "large epsilon": {"epsilon": 5.0},
    "no perturbation": {"epsilon": 0.0, "dropout": 0.4},
    "sign": {"norm": "linf"},
    "per token": {"per": "token"},
    "per batch": {"per": "all"},
    "smoothed labels": {"label_smoothing": 0.2},
    "ignored label": {"ignore_index": 1},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("form", ["backward", "loss"])
def test_it_is_the_method(case, form):
    case = dict(case)
    dropout = case.pop("dropout", 0.0)
    model = TextCNN(WORDS, CLASSES, dimension=6, filters=5, dropout=dropout).double()
    ids, labels = batch()
    ids[1, 4:] = 0
    mask = (ids != 0).double()
    inputs = {"ids": ids, "attention_mask": mask}
    stage = BiStage(model, model.embedding, **case)
    run = (
        (lambda: stage.backward(inputs, labels))
        if form == "backward"
        else lambda: stage.loss(inputs, labels).backward()
    )
    result, actual = outcome(model, run)

    units = {
        "sign": torch.sign,
        "token": lambda g: F.normalize(g, dim=-1),
        "all": lambda g: F.normalize(g.flatten(), dim=0).view_as(g),
    }
    unit = units.get("sign" if case.pop("norm", None) else case.pop("per", None))
    one_by_one = case.pop("passes_at_once", None) == 1
    expected_parts, expected = outcome(
        model,
        lambda: method(model, ids, labels, mask=mask, unit=unit, one_by_one=one_by_one, **case),
    )
    assert_equal(actual, expected, rtol=1e-9, atol=1e-12)
    if form == "backward":
        for name, value in zip(result._fields, expected_parts, strict=True):
            torch.testing.assert_close(
                getattr(result, name),
                value.detach(),
                rtol=1e-9,
                atol=1e-12,
                msg=lambda text, name=name: f"{name}: {text}",
            )
            assert not getattr(result, name).requires_grad


def test_ignored_rows_and_no_dropout_leave_zero_divergence():
    model = Small().double()
    result = BiStage(model, model.embedding).backward(*batch())
    assert result.divergence.item() == pytest.approx(0, abs=1e-12)
    assert result._fields == ("loss", "clean_loss", "adversarial_loss", "divergence", "logits")
    assert result.loss.item() == pytest.approx(
        (result.clean_loss + result.adversarial_loss + 0.01 * result.divergence).item()
    )


def test_regression_compares_outputs_by_squares():
    model = Small(dropout=0.4, classes=1).double()
    ids, _ = batch()
    labels = torch.randn(N, dtype=torch.float64)
    stage = BiStage(model, model.embedding, task="regression", js_weight=0.5)
    result, actual = outcome(model, lambda: stage.backward(ids, labels))
    _, of_loss = outcome(model, lambda: stage.loss(ids, labels).backward())
    assert_equal(actual, of_loss, rtol=1e-9, atol=1e-12)
    assert result.clean_loss.item() == pytest.approx(F.mse_loss(result.logits[:, 0], labels).item())
    assert result.divergence > 0


@pytest.mark.parametrize("name", MODELS)
def test_backward_equals_the_loss_for_every_model(name):
    model = MODELS[name](WORDS, CLASSES, dimension=8).double()
    ids, labels = batch()
    ids[1, 4:] = 0
    stage = BiStage(model, model.embedding, epsilon=0.5)
    inputs = {"ids": ids, "attention_mask": ids != 0}
    result, actual = outcome(model, lambda: stage.backward(inputs, labels))
    loss, _ = outcome(model, lambda: stage.loss(inputs, labels))
    _, expected = outcome(model, lambda: stage.loss(inputs, labels).backward())
    assert_equal(actual, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=0)


# Cost


def counted(model):
    """Counts rows that a model's first layer after the embedding sees forward and backward."""
    rows = types.SimpleNamespace(forward=[], backward=[])
    model.hidden.register_forward_hook(
        lambda module, inputs, output: rows.forward.append(len(output))
    )
    model.hidden.register_full_backward_hook(
        lambda module, gradient, outputs: rows.backward.append(len(outputs[0]))
    )
    return rows


@pytest.mark.parametrize(
    "passes, at_once, rates, forward, backward",
    [
        (2, None, None, [1, 2], [1, 2]),
        (4, None, None, [1, 4], [1, 4]),
        (4, 9, None, [1, 4], [1, 4]),
        (2, 1, None, [1, 1, 1, 1, 1], [1, 1, 1]),
        (3, 2, None, [1, 2, 1, 2, 1], [1, 2, 1]),
        (2, None, (0.3, 0.3), [1, 2], [1, 2]),
        (2, None, (0.1, 0.5), [1, 1, 1], [1, 1, 1]),
        (2, 1, (0.1, 0.5), [1, 1, 1, 1, 1], [1, 1, 1]),
    ],
)
def test_rows(passes, at_once, rates, forward, backward):
    model = Small()
    rows = counted(model)
    BiStage(model, model.embedding, passes=passes, passes_at_once=at_once, dropout=rates).backward(
        *batch()
    )
    assert rows.forward == [N * k for k in forward]
    assert rows.backward == [N * k for k in backward]


@pytest.mark.parametrize("form", ["backward", "loss"])
def test_passes_at_once_changes_memory_only(form):
    model = Small().double()
    inputs, labels = batch()

    def run(at_once):
        stage = BiStage(model, model.embedding, passes=4, js_weight=1.0, passes_at_once=at_once)
        result = outcome(
            model,
            lambda: (
                stage.backward(inputs, labels)
                if form == "backward"
                else stage.loss(inputs, labels).backward()
            ),
        )[1]
        stage.close()
        return result

    for at_once in (1, 2, 3):
        assert_equal(run(at_once), run(None), rtol=1e-9, atol=1e-12)


def test_one_graph_is_alive_at_a_time():
    alive, most = [0], [0]

    class Counting(Small):
        def classify(self, x, mask=None):
            y = super().classify(x, mask)
            if y.requires_grad:
                alive[0] += 1
                most[0] = max(most[0], alive[0])
                x.register_hook(lambda gradient: alive.__setitem__(0, alive[0] - 1))
            return y

    model = Counting()
    BiStage(model, model.embedding, passes=5, passes_at_once=1).backward(*batch())
    assert most == [1] and alive == [0]


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_a_pass_runs_again_with_the_same_masks(adaptive):
    rates = (0.3, 0.4, 0.5)
    results = []
    for at_once in (None, 1):
        torch.manual_seed(1)
        model = Small(dropout=0.2, adaptive=adaptive).double()
        stage = BiStage(
            model, model.embedding, passes=3, js_weight=2.0, dropout=rates, passes_at_once=at_once
        )
        # adaptive rates need a gradient to have been seen
        for seed in range(3):
            torch.manual_seed(seed)
            model.zero_grad()
            result = stage.backward(*batch(seed))
        norms = {
            name: getattr(model.dropout, name) for name in ("gradient_norm", "pending") if adaptive
        }
        results.append((gradients(model), norms, result, torch.get_rng_state()))
    (grads, norms, result, state), (grads_again, norms_again, result_again, state_again) = results
    assert_equal(grads_again, grads, rtol=1e-9, atol=1e-12)
    assert_equal(norms_again, norms, rtol=1e-9, atol=1e-15)
    assert torch.equal(result.loss, result_again.loss) and torch.equal(state, state_again)


# Inputs and outputs


def test_dict_tuple_and_tensor_inputs():
    class Many(Small):
        def forward(self, ids, attention_mask=None, bias=None, options=None, table=None):
            assert options == "as is" and table.shape == (3, CLASSES)
            assert len(ids) == len(bias) and (
                attention_mask is None or len(attention_mask) == len(ids)
            )
            return self.classify(self.look_up(ids)) + bias + table[0]

    model = Many().double()
    ids, labels = batch()
    bias, table = (
        torch.randn(N, CLASSES, dtype=torch.float64),
        torch.randn(3, CLASSES, dtype=torch.float64),
    )
    stage = BiStage(model, model.embedding)
    _, of_tuple = outcome(model, lambda: stage.backward((ids, None, bias, "as is", table), labels))
    _, of_dict = outcome(
        model,
        lambda: stage.backward(
            {"ids": ids, "bias": bias, "options": "as is", "table": table}, labels
        ),
    )
    assert_equal(of_tuple, of_dict, rtol=0, atol=0)
    plain = Small().double()
    plain.load_state_dict(model.state_dict())
    _, of_tensor = outcome(plain, lambda: BiStage(plain, plain.embedding).backward(ids, labels))
    assert of_tensor.keys() == of_tuple.keys()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: z,
        lambda z: (z, "more"),
        lambda z: types.SimpleNamespace(logits=z),
        lambda z: {"loss": None, "logits": z},
    ],
    ids=["tensor", "tuple", "object", "dict"],
)
def test_outputs(wrap):
    class Wrapping(Small):
        def forward(self, ids):
            return wrap(super().forward(ids))

    model = Wrapping()
    result = BiStage(model, model.embedding).backward(*batch())
    assert result.logits.shape == (N, CLASSES)


def test_attention_mask_keeps_padding_unperturbed():
    class Masked(Small):
        def forward(self, ids, attention_mask):
            self.seen = self.look_up(ids)
            return self.classify(self.seen)

    model = Masked().double()
    ids, labels = batch()
    mask = torch.ones(N, T)
    mask[:, 6:] = 0
    BiStage(model, model.embedding, epsilon=2.0).backward(
        {"ids": ids, "attention_mask": mask}, labels
    )
    delta = (model.seen.detach() - model.embedding(ids.repeat(2, 1)).detach()).unflatten(0, (2, N))
    assert torch.equal(delta[0], delta[1]) and delta[:, :, 6:].abs().max() == 0
    torch.testing.assert_close(
        delta.flatten(2).norm(dim=2), torch.full((2, N), 2.0, dtype=torch.float64)
    )


@pytest.mark.parametrize("input_range", [None, (-0.5, 0.5)])
def test_no_embedding_perturbs_the_floating_input(input_range):
    seen = []

    class Dense(nn.Sequential):
        def forward(self, x, counts):
            seen.append(x.detach())
            return super().forward(x)

    model = Dense(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    x, labels = torch.rand(N, 6, dtype=torch.float64) - 0.5, batch()[1]
    x.grad = torch.ones_like(x)
    stage = BiStage(model, None, epsilon=0.4, input_range=input_range)
    _, actual = outcome(model, lambda: stage.backward((x, torch.arange(N)), labels))
    _, expected = outcome(model, lambda: stage.loss((x, torch.arange(N)), labels).backward())
    assert_equal(actual, expected, rtol=1e-9, atol=1e-12)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(leaf, None), labels), leaf)
    perturbed = x + 0.4 * F.normalize(g, dim=1)
    torch.testing.assert_close(
        seen[1], (perturbed if input_range is None else perturbed.clamp(*input_range)).repeat(2, 1)
    )
    assert not x.requires_grad and torch.equal(x.grad, torch.ones_like(x))


# Scale, accumulation, precision


@pytest.mark.parametrize("scale", [0.25, torch.tensor(1024.0)], ids=["number", "tensor"])
def test_scale_multiplies_the_gradient_only(scale):
    model = Small(dropout=0.3).double()
    inputs, labels = batch()
    stage = BiStage(model, model.embedding)
    plain, expected = outcome(model, lambda: stage.backward(inputs, labels))
    scaled, actual = outcome(model, lambda: stage.backward(inputs, labels, scale=scale))
    assert_equal(
        actual,
        {name: value * float(scale) for name, value in expected.items()},
        rtol=1e-9,
        atol=1e-12,
    )
    for before, after in zip(plain, scaled, strict=True):
        torch.testing.assert_close(after, before)


def test_gradients_accumulate_and_do_not_steer():
    model = Small().double()
    inputs, labels = batch()
    stage = BiStage(model, model.embedding, epsilon=1.0)
    _, once = outcome(model, lambda: stage.backward(inputs, labels))

    def from_ones():
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        stage.backward(inputs, labels)

    _, twice = outcome(model, from_ones)
    assert_equal(twice, {name: value + 1 for name, value in once.items()}, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_once", [None, 1])
def test_autocast(dtype, at_once):
    model = Small()
    inputs, labels = batch()
    stage = BiStage(model, model.embedding, passes_at_once=at_once)
    exact, expected = outcome(model, lambda: stage.backward(inputs, labels))
    with torch.autocast("cpu", dtype=dtype):
        result, actual = outcome(model, lambda: stage.backward(inputs, labels, scale=64.0))
    assert result.logits.dtype == dtype and result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, exact.loss, rtol=2e-2, atol=0)
    assert_equal(
        {name: value / 64 for name, value in actual.items()}, expected, rtol=0.1, atol=5e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype):
    model = Small().to(dtype)
    assert BiStage(model, model.embedding).backward(*batch()).loss.dtype == torch.float32
    assert all(
        gradient.dtype == dtype and gradient.isfinite().all()
        for gradient in gradients(model).values()
    )


# The hook


class LookedUpWithoutGrad(Small):
    def look_up(self, ids):
        with torch.no_grad():
            return self.embedding(ids)


class Multiplies(Small):
    def look_up(self, ids):
        return self.embedding(ids) * torch.arange(1, 7)


class MultipliesInPlace(Small):
    def look_up(self, ids):
        return self.embedding(ids).mul_(torch.arange(1, 7))


class Recomputes(Small):
    def forward(self, ids):
        return checkpoint(super().forward, ids, use_reentrant=False)


@pytest.mark.parametrize(
    "kind, frozen, twin",
    [
        (Small, True, Small),
        (LookedUpWithoutGrad, False, Small),
        (MultipliesInPlace, False, Multiplies),
        (MultipliesInPlace, True, Multiplies),
        (Recomputes, False, Small),
        (Recomputes, True, Small),
    ],
)
@pytest.mark.parametrize("form", ["backward", "loss"])
def test_unusual_embeddings(kind, frozen, twin, form):
    if kind is Recomputes:
        # `loss` says that it does not serve these
        form = "backward"
    usual, model = twin(dropout=0.3).double(), kind(dropout=0.3).double()
    model.load_state_dict(usual.state_dict())
    model.embedding.requires_grad_(not frozen)
    options = {"epsilon": 1.0, "dropout": (0.5, 0.5) if kind is Recomputes else None}
    stages = [BiStage(each, each.embedding, **options) for each in (usual, model)]
    _, expected = outcome(usual, lambda: stages[0].backward(*batch()))
    _, actual = outcome(
        model,
        lambda: (
            stages[1].backward(*batch())
            if form == "backward"
            else stages[1].loss(*batch()).backward()
        ),
    )
    if frozen or kind is LookedUpWithoutGrad:
        del expected["embedding.weight"]
    assert_equal(actual, expected, rtol=1e-9, atol=1e-12)


# of passes that keep no graph
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("at_once", [None, 1])
@pytest.mark.parametrize("form", ["backward", "loss"])
def test_reentrant_checkpointing_behind_a_frozen_embedding(form, at_once):
    class Block(Small):
        reentrant = False

        def classify(self, x, mask=None):
            x = checkpoint(lambda x: torch.tanh(self.hidden(x)), x, use_reentrant=self.reentrant)
            return self.output(x.mean(1))

    model = Block().double()
    model.embedding.requires_grad_(False)
    stage = BiStage(model, model.embedding, epsilon=1.0, passes_at_once=at_once)
    found = []
    for model.reentrant in (False, True):
        # whose first half is torch.autograd.grad
        if form == "loss" and model.reentrant:
            with pytest.raises(RuntimeError, match="use_reentrant=True"):
                stage.loss(*batch())
            return
        found.append(
            outcome(
                model,
                lambda: (
                    stage.backward(*batch())
                    if form == "backward"
                    else stage.loss(*batch()).backward()
                ),
            )[1]
        )
    assert_equal(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_recomputed_passes_keep_their_own_rates():
    usual, model = Small(dropout=0.3).double(), Recomputes(dropout=0.3).double()
    model.load_state_dict(usual.state_dict())
    rates = (0.1, 0.7)
    _, expected = outcome(
        usual, lambda: BiStage(usual, usual.embedding, dropout=rates).backward(*batch())
    )
    _, actual = outcome(
        model, lambda: BiStage(model, model.embedding, dropout=rates).backward(*batch())
    )
    assert_equal(actual, expected, rtol=1e-9, atol=1e-12)


def test_hook_lives_until_close_and_sleeps_between_passes():
    model = Small()
    inputs, labels = batch()
    before = model(inputs)
    stage = BiStage(model, model.embedding, epsilon=3.0)
    assert len(model.embedding._forward_hooks) == 1
    stage.backward(inputs, labels)
    assert torch.equal(model(inputs), before)
    with torch.no_grad():
        assert not model.embedding(inputs).requires_grad
    assert len(copy.deepcopy(model).embedding._forward_hooks) == 1
    stage.close()
    stage.close()
    assert len(model.embedding._forward_hooks) == 0
    with pytest.raises(RuntimeError, match="closed"):
        stage.backward(inputs, labels)


def test_two_stages_on_one_model_do_not_disturb_each_other():
    model = Small().double()
    first = BiStage(model, model.embedding, epsilon=1.0)
    _, alone = outcome(model, lambda: first.backward(*batch()))
    BiStage(model, model.embedding, epsilon=2.0)
    _, beside = outcome(model, lambda: first.backward(*batch()))
    assert_equal(beside, alone, rtol=0, atol=0)


class Calls(Small):
    """Calls the embedding as often as it is told, in a pass of the given number, then fails if
    it is told to.
    """

    times, at, fail, count = 1, 1, False, 0

    def forward(self, ids):
        self.count += 1
        if self.count != self.at:
            return super().forward(ids)
        x = (
            self.embedding.forward(ids)
            if self.times == 0
            else [self.embedding(ids) for _ in range(self.times)].pop()
        )
        if self.fail:
            raise KeyError("of the model")
        return self.classify(x)


@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize(
    "told, error, text",
    [
        ({"times": 2}, RuntimeError, "called twice"),
        ({"times": 0}, RuntimeError, "did not run.*compiled before"),
        ({"fail": True}, KeyError, "of the model"),
    ],
)
def test_after_an_error_the_model_is_as_before(told, error, text, at):
    model = Calls(dropout=0.2).eval()
    inputs, labels = batch()
    expected = model(inputs)
    stage = BiStage(model, model.embedding, epsilon=3.0, passes_at_once=1, dropout=(0.6, 0.7))
    vars(model).update(told, at=at, count=0)
    with pytest.raises(error, match=text):
        stage.backward(inputs, labels)
    vars(model).update(times=1, fail=False)
    assert torch.equal(model(inputs), expected) and model.dropout.p == 0.2
    # and works again
    stage.backward(inputs, labels)


def test_logits_that_ignore_the_embedding():
    class Deaf(Small):
        def forward(self, ids):
            self.embedding(ids)
            return self.output(torch.ones(len(ids), 8))

    model = Deaf()
    stage = BiStage(model, model.embedding)
    for run in (stage.backward, stage.loss):
        with pytest.raises(RuntimeError, match="does not depend on the embedding"):
            run(*batch())


def test_compiled_after_the_stage_was_built():
    model = Small(dropout=0.0).double()
    stage = BiStage(model, model.embedding, epsilon=1.0)
    eager, expected = outcome(model, lambda: stage.backward(*batch()))
    model.compile(backend="eager")
    for _ in range(2):
        compiled, actual = outcome(model, lambda: stage.backward(*batch()))
        torch.testing.assert_close(compiled.loss, eager.loss)
        assert_equal(actual, expected, rtol=1e-9, atol=1e-12)


# Modes, dropout rates, random state


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_the_callers(training):
    modes = []

    class Watching(Small):
        def forward(self, ids):
            modes.append(self.training)
            return super().forward(ids)

    model = Watching(dropout=0.5).train(training)
    BiStage(model, model.embedding, passes_at_once=1).backward(*batch())
    assert modes == [training] * 5 and model.training == training


@pytest.mark.parametrize(
    "options, seen",
    [
        ({"dropout": (0.1, 0.5)}, [0.2, 0.1, 0.5]),
        ({"dropout": (0.5, 0.5)}, [0.2, 0.5]),
        ({"dropout": (0.1, 0.5), "passes_at_once": 1}, [0.2, 0.1, 0.5, 0.1, 0.5]),
    ],
)
@pytest.mark.filterwarnings("ignore:dropout[23]d. Received a 3")
@pytest.mark.parametrize(
    "layer", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, AdaptiveDropout]
)
def test_rates_are_set_for_their_pass_and_restored(layer, options, seen):
    rates = []
    model = Small()
    model.dropout = layer(p=0.2)
    model.dropout.register_forward_pre_hook(lambda module, inputs: rates.append(module.p))
    # Dropout2d and 3d want images when they drop
    model.eval()
    BiStage(model, model.embedding, **options).backward(*batch())
    assert rates == seen and model.dropout.p == 0.2


def test_rates_are_the_methods():
    model = TextCNN(WORDS, CLASSES, dimension=6, filters=5, dropout=0.2).double()
    stage = BiStage(model, model.embedding, dropout=(0.1, 0.6), js_weight=1.0)
    ids, labels = batch()
    expected = outcome(
        model, lambda: method(model, ids, labels, one_by_one=True, rates=(0.1, 0.6), js_weight=1.0)
    )[1]
    for run in (lambda: stage.backward(ids, labels), lambda: stage.loss(ids, labels).backward()):
        assert_equal(outcome(model, run)[1], expected, rtol=1e-9, atol=1e-12)


# Synchronisation


class Synchronising(Small):
    """Notes at each backward whether it would synchronise, as DDP's hooks would see it."""

    def __init__(self, switch: bool) -> None:
        super().__init__()
        self.sync, self.noted = True, []
        if switch:
            self.set_requires_gradient_sync = lambda value: setattr(self, "sync", value)
        else:
            self.no_sync = self.without
        self.hidden.weight.register_post_accumulate_grad_hook(
            lambda parameter: self.noted.append(self.sync)
        )

    @contextlib.contextmanager
    def without(self):
        before, self.sync = self.sync, False
        yield
        self.sync = before

    @property
    def require_backward_grad_sync(self):
        return self.sync or hasattr(self, "set_requires_gradient_sync")


@pytest.mark.parametrize("switch", [False, True], ids=["no_sync", "set_requires_gradient_sync"])
@pytest.mark.parametrize(
    "options, noted",
    [
        ({}, [False, True]),
        ({"passes": 3, "passes_at_once": 1}, [False, False, False, True]),
        ({"dropout": (0.1, 0.2)}, [False, False, True]),
    ],
)
def test_only_the_last_backward_synchronises(switch, options, noted):
    model = Synchronising(switch)
    stage = BiStage(model, model.embedding, **options)
    stage.backward(*batch())
    assert model.noted == noted and model.sync
    if not switch:
        model.noted.clear()
        with model.no_sync():
            stage.backward(*batch())
        assert not any(model.noted)


@pytest.mark.parametrize(
    "options",
    [{}, {"passes_at_once": 1}, {"dropout": (0.2, 0.4)}],
    ids=["batch", "one by one", "rates"],
)
@pytest.mark.parametrize("form", ["backward", "loss"])
@pytest.mark.parametrize("inside", [False, True], ids=["outermost", "inside"])
def test_under_ddp(process_group, options, form, inside):
    plain = Small(dropout=0.2).double()
    inner = copy.deepcopy(plain)
    reductions = []

    def note(state, bucket):
        reductions.append(bucket.buffer().clone())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model = nn.parallel.DistributedDataParallel(inner)
    model.register_comm_hook(None, note)
    stages = [
        BiStage(plain, plain.embedding, **options),
        BiStage(nn.Sequential(model) if inside else model, inner.embedding, **options),
    ]

    def run(stage):
        return stage.backward(*batch()) if form == "backward" else stage.loss(*batch()).backward()

    for _ in range(3):
        reductions.clear()
        _, expected = outcome(plain, lambda: run(stages[0]))
        _, actual = outcome(model, lambda: run(stages[1]))
        assert_equal(
            {name.removeprefix("module."): value for name, value in actual.items()},
            expected,
            rtol=1e-9,
            atol=1e-12,
        )
        # once, and the whole gradient
        (reduced,) = reductions
        torch.testing.assert_close(
            reduced.norm(), torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
        )
    if form == "backward":
        with model.no_sync():
            stages[1].backward(*batch())
        assert len(reductions) == 1 and model.require_backward_grad_sync


def test_a_static_graph_is_refused(process_group):
    inner = Small()
    model = nn.parallel.DistributedDataParallel(inner, static_graph=True)
    for build in (BiStage, *(getattr(recipes, name) for name in recipes.NAMES)):
        with pytest.raises(ValueError, match="static_graph=True"):
            build(model, inner.embedding)
    assert not inner.embedding._forward_hooks


# Errors


@pytest.mark.parametrize("kind", ["tensor", "list", "list, in any order"])
def test_texts_packed_by_their_lengths(kind):
    """Copies of a batch are not sorted by length; the error says what is."""

    class Packed(Small):
        def __init__(self):
            super().__init__()
            self.reader = nn.LSTM(6, 8, batch_first=True)

        def forward(self, ids, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(
                self.embedding(ids), lengths, batch_first=True, enforce_sorted="any" not in kind
            )
            return self.output(self.reader(packed)[1][0][0])

    model = Packed().double()
    ids, labels = batch()
    lengths = [9, 7, 6, 2, 1]
    inputs = ids, torch.tensor(lengths) if kind == "tensor" else lengths
    for run in (BiStage(model, model.embedding).backward, BiStage(model, model.embedding).loss):
        # In any order torch packs as many texts as there are lengths, without a word.
        error, text = (
            (ValueError, "rows of logits for 2 x 5") if "any" in kind else (RuntimeError, "lengths")
        )
        with pytest.raises(error, match=f"(?s){text}.*passes_at_once=1"):
            run(inputs, labels)
    found = BiStage(model, model.embedding, passes_at_once=1).backward(inputs, labels).loss
    torch.testing.assert_close(
        found, recipes.at(model, model.embedding).backward(inputs, labels)["loss"]
    )


def test_bags_of_words_that_begin_at_offsets():
    """Copies of the offsets are no offsets of copies."""

    class Bags(Small):
        def __init__(self):
            super().__init__()
            self.embedding = nn.EmbeddingBag(WORDS, 6)

        def forward(self, ids, offsets=None):
            return self.output(self.hidden(self.embedding(ids, offsets)))

    model = Bags().double()
    ids, labels = batch()
    bags = ids.flatten(), torch.arange(0, N * T, T)
    expected = BiStage(model, model.embedding).backward(ids, labels).loss
    torch.testing.assert_close(
        BiStage(model, model.embedding, passes_at_once=1).backward(bags, labels).loss, expected
    )
    for run in (BiStage(model, model.embedding).backward, BiStage(model, model.embedding).loss):
        with pytest.raises(ValueError, match="(?s)offsets.*passes_at_once=1"):
            run(bags, labels)


def test_an_encoder_decoder_is_told_which_embedding():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    sizes |= {
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
        "vocab_size": WORDS,
        "eos_token_id": 2,
        "num_labels": CLASSES,
    }
    config = transformers.BartConfig(
        **sizes, dropout=0.0, pad_token_id=0, bos_token_id=1, decoder_start_token_id=2
    )
    model = transformers.BartForSequenceClassification(config)
    ids, labels = batch()
    ids = torch.where(ids == 2, 3, ids)
    ids[:, -1] = 2
    with pytest.raises(
        RuntimeError,
        match=r"encoder-decoder: pass the encoder's embedding, "
        r"model.get_encoder\(\)",
    ):
        BiStage(model, model.model.shared).backward({"input_ids": ids}, labels)
    of_encoder = model.get_encoder().get_input_embeddings()
    assert BiStage(model, of_encoder).backward({"input_ids": ids}, labels).loss.isfinite()
    # one for both
    model.set_input_embeddings(nn.Embedding(WORDS, 8))
    with pytest.raises(
        RuntimeError,
        match="called twice.*encoder-decoder: pass the encoder's embedding.*of its own",
    ):
        BiStage(model, model.model.shared).backward({"input_ids": ids}, labels)


@pytest.mark.parametrize("embedding", [True, False])
def test_an_empty_batch(embedding):
    model = Small() if embedding else nn.Linear(T, CLASSES)
    stage = BiStage(model, model.embedding if embedding else None)
    ids, labels = batch()
    x = ids if embedding else ids.float()
    for inputs in (x[:0], (x[:0],), {"ids" if embedding else "input": x[:0]}):
        for run in (stage.backward, stage.loss):
            with pytest.raises(ValueError, match="the batch is empty"):
                run(inputs, labels[:0])
    assert gradients(model) == {}


def test_logits_and_labels_that_do_not_fit():
    ids, labels = batch()

    class Gives(Small):
        give = staticmethod(lambda z: z)

        def forward(self, ids):
            return self.give(super().forward(ids))

    for give, given, error, text in (
        (
            lambda z: z[:, None].expand(-1, T, -1),
            labels,
            ValueError,
            r"logits of shape \[5, 9, "
            r"4\].*token classification",
        ),
        (
            lambda z: z[:, 0],
            labels,
            ValueError,
            r"logits of shape \[5\]; these methods take \[N, "
            r"C\]",
        ),
        (lambda z: z.int(), labels, TypeError, "logits of torch.int32"),
        (lambda z: {"out": z}, labels, TypeError, r"returned a dict with \['out'\]; return logits"),
        (lambda z: z, labels[:4], ValueError, r"5 rows of logits for 4 labels"),
        (lambda z: z, labels.tolist(), TypeError, "labels are a list"),
        (lambda z: z, labels + 2, ValueError, "labels hold"),
        (lambda z: z, labels.to("meta"), ValueError, "labels are on meta and the logits on cpu"),
    ):
        model = Gives()
        model.give = give
        stage = BiStage(model, model.embedding)
        for run in (stage.backward, stage.loss):
            with pytest.raises(error, match=text):
                run(ids, given)
        assert gradients(model) == {}


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"epsilon": -1.0}, ValueError, "epsilon"),
        ({"epsilon": "much"}, TypeError, "epsilon"),
        ({"passes": 0}, ValueError, "passes=0"),
        ({"passes": 2.0}, TypeError, "passes=2.0"),
        ({"passes_at_once": 0}, ValueError, "passes_at_once=0"),
        ({"passes_at_once": True}, TypeError, "passes_at_once=True"),
        ({"js_weight": -1.0}, ValueError, "js_weight"),
        ({"norm": "l3"}, ValueError, "norm='l3'"),
        ({"per": "word"}, ValueError, "per='word'"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
        ({"task": "ranking"}, ValueError, "task='ranking'"),
        ({"dropout": 0.3}, TypeError, "dropout=0.3"),
        ({"dropout": (0.3,)}, ValueError, "one rate.*per pass"),
        ({"dropout": (0.3, 1.5)}, ValueError, r"in \[0, 1\]"),
        ({"input_range": (0.0, 1.0)}, ValueError, "embedding=None"),
        ({"embedding": None, "input_range": (1.0, 0.0)}, ValueError, "low < high"),
        (
            {"embedding": None, "input_range": 1.0},
            ValueError,
            r"input_range=1.0; pass \(low, "
            r"high\)",
        ),
        ({"embedding": None, "input_range": ("0", "1")}, ValueError, "input_range=.*low < high"),
        ({"dropout": [0.1, "0.2"]}, ValueError, "dropout=.*one rate in"),
        ({"embedding": nn.Embedding(2, 2)}, ValueError, "not a module of model"),
        ({"model": len}, TypeError, "nn.Module"),
        ({"backend": "fast"}, ValueError, "backend='fast'"),
    ],
    ids=str,
)
def test_wrong_options(options, error, text):
    model = Small()
    options = {"model": model, "embedding": model.embedding} | options
    with pytest.raises(error, match=text):
        BiStage(options.pop("model"), options.pop("embedding"), **options)
    assert not model.embedding._forward_hooks


def test_numbers_of_numpy_are_kept_as_pythons():
    options = {
        "passes": 2,
        "passes_at_once": 1,
        "epsilon": 0.5,
        "js_weight": 0.25,
        "label_smoothing": 0.125,
        "ignore_index": -7,
    }
    of_numpy = {name: np.array(value)[()] for name, value in options.items()}
    model = Small()
    stage = BiStage(model, model.embedding, dropout=[np.float32(0.5), np.float64(0.25)], **of_numpy)
    kept = {name: getattr(stage, name) for name in options}
    assert kept == options and stage.dropout == [0.5, 0.25]
    assert [type(value) for value in kept.values()] == [int, int, float, float, float, int]
    assert [type(rate) for rate in stage.dropout] == [float, float]
    assert "np." not in repr(stage)
    stage.backward(*batch())


def test_wrong_calls():
    model = Small()
    inputs, labels = batch()
    stage = BiStage(model, model.embedding)
    for scale, text in (
        (0.0, "scale=0.0"),
        (-1.0, "scale=-1.0"),
        (float("nan"), "scale=nan"),
        (torch.ones(2), "0-d"),
    ):
        with pytest.raises(ValueError, match=text):
            stage.backward(inputs, labels, scale=scale)
    for scale in ("2", None, True):
        with pytest.raises(TypeError, match=f"scale={scale!r}"):
            stage.backward(inputs, labels, scale=scale)
    for run in (stage.backward, stage.loss):
        with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are disabled"):
            run(inputs, labels)
    with pytest.raises(ValueError, match="labels"):
        stage.backward(inputs, labels[:3])
    assert gradients(model) == {}
    with pytest.raises(ValueError, match="here are 2"):
        BiStage(model, None).backward((torch.ones(2, 2), torch.ones(2, 2)), labels)
    with pytest.raises(TypeError, match="returned a int"):
        BiStage(Constant(), None).backward(torch.ones(2, 2), labels)


class Constant(nn.Module):
    def forward(self, x):
        return 3


def test_every_row_has_logits():
    class Fixed(Small):
        def forward(self, ids):
            return super().forward(ids)[:N]

    model = Fixed()
    with pytest.raises(ValueError, match="rows of logits"):
        BiStage(model, model.embedding).backward(*batch())


def test_a_named_backend_reaches_the_operators():
    model = Small(dropout=0.2).double()
    results = [
        outcome(model, lambda b=b: BiStage(model, model.embedding, backend=b).backward(*batch()))[1]
        for b in ("auto", "reference")
    ]
    assert_equal(*results, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="backend='cuda'"):
        BiStage(model, model.embedding, backend="cuda").backward(*batch())
