"""Every recipe against the numbered steps of its method spelt out with torch's own functions,
and what all of them promise.
"""

import collections
import contextlib
import copy
import datetime
import fractions
import gzip
import inspect
import math
import pathlib
import pickle
import runpy
import types
import warnings

import numpy
import pytest
import scipy.stats
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import uegr_kernels as uk
from uegr_kernels import recipes
from uegr_kernels.models import MODELS
from uegr_kernels.passes import buffers_held
from uegr_kernels.perturbation import reference

N, T, WORDS, D, CLASSES = 4, 7, 30, 6, 3
LR = 0.1


class Small(nn.Module):
    """Embedding, LSTM, convolution, BatchNorm, mean over time (padding included), LayerNorm,
    dropout, linear.
    """

    def __init__(self, dropout=0.0, classes=CLASSES):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, D)
        self.lstm = nn.LSTM(D, 5, batch_first=True)
        self.convolution = nn.Conv1d(5, 6, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(6)
        self.layer_norm = nn.LayerNorm(6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, classes)

    def classify(self, x):
        x = self.lstm(x)[0].transpose(1, 2)
        return self.head(
            self.dropout(self.layer_norm(self.batch_norm(self.convolution(x)).tanh().mean(2)))
        )

    def forward(self, ids, attention_mask=None):
        return self.classify(self.embedding(ids))


class Images(nn.Module):
    """A small convolutional net over images in [0, 1]."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.batch_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)

    def classify(self, x):
        return self.head(self.batch_norm(self.convolution(x)).relu().mean((2, 3)))

    def forward(self, x):
        return self.classify(x)


def small(dropout=0.3, **options):
    torch.manual_seed(3)
    return Small(dropout, **options).double()


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (
        torch.randint(1, WORDS, (N, T), generator=generator),
        torch.randint(0, CLASSES, (N,), generator=generator),
    )
    ids[1, 4:], ids[2, 2:] = 0, 0
    return {"ids": ids, "attention_mask": (ids != 0).long()}, labels


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(N, 1, 6, 6, generator=generator, dtype=torch.float64), torch.randint(
        0, CLASSES, (N,), generator=generator
    )


def build(name, model, *more, **options):
    """The recipe of this name, on the model's embedding."""
    return getattr(recipes, name)(model, getattr(model, "embedding", None), *more, **options)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LR)


def state(model):
    """All that a call may change in the model."""
    return {
        **{name: p.detach().clone() for name, p in model.state_dict().items()},
        **{
            f"{name}'s gradient": p.grad.clone()
            for name, p in model.named_parameters()
            if p.grad is not None
        },
    }


def assert_equal(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_steps(model, run, restated, rtol=1e-9, atol=1e-12):
    """Both leave the same gradients, weights, buffers and random state, and return the same
    losses.
    """
    twin = copy.deepcopy(model)
    torch.manual_seed(11)
    losses = run(model)
    drawn = torch.get_rng_state()
    torch.manual_seed(11)
    expected = restated(twin)
    assert torch.equal(torch.get_rng_state(), drawn), "other random numbers were drawn"
    assert_equal(
        losses,
        {name: torch.as_tensor(loss).detach() for name, loss in expected.items()},
        rtol=rtol,
        atol=atol,
    )
    assert_equal(state(model), state(twin), rtol=rtol, atol=atol)
    assert not any(loss.requires_grad for loss in losses.values())


# The methods, step by step


class Steps:
    """One batch and one model, in the words of METHODS: e, CE, N2; what a method's numbered
    steps are made of.
    """

    def __init__(self, model, inputs, labels, task="classification"):
        self.model, self.labels, self.task = model, labels, task
        self.inputs, self.mask = (
            (inputs["ids"], inputs["attention_mask"])
            if isinstance(inputs, dict)
            else (inputs, None)
        )

    def embedded(self):
        return (
            self.model.embedding(self.inputs) if hasattr(self.model, "embedding") else self.inputs
        )

    def loss(self, logits):
        return (
            F.cross_entropy(logits, self.labels)
            if self.task == "classification"
            else F.mse_loss(logits, self.labels)
        )

    def clean(self, weight=1.0):
        """Loss of the clean pass, which goes backward, and g."""
        e = self.embedded()
        e = e if e.requires_grad else e.clone().requires_grad_()
        e.retain_grad()
        loss = self.loss(self.model.classify(e))
        (weight * loss).backward()
        return loss, self.masked(e.grad)

    def masked(self, g):
        return g if self.mask is None else g * self.mask[..., None]

    def adversarial(self, delta, weight=1.0):
        loss = self.loss(self.model.classify(self.embedded() + delta))
        (weight * loss).backward()
        return loss

    def input_gradient(self, delta):
        """d CE / d delta of a pass that leaves parameters and BatchNorm's statistics alone."""
        statistics = {name: b.clone() for name, b in self.model.named_buffers()}
        delta = delta.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.loss(self.model.classify(self.embedded() + delta)), delta)
        for name, b in self.model.named_buffers():
            b.data = statistics[name]
        return self.masked(g)


def unit(g):
    return F.normalize(g.flatten(1), dim=1).view_as(g)


@pytest.mark.parametrize("weight", [0.0, 0.01])
@pytest.mark.parametrize("name", ["plain", "l1", "l2"])
def test_plain(name, weight):
    def restated(model):
        steps = Steps(model, *batch())
        loss = steps.loss(model.classify(steps.embedded()))
        penalty = {
            "plain": lambda: 0.0,
            "l1": lambda: weight * sum(p.abs().sum() for p in model.parameters()),
            "l2": lambda: weight / 2 * sum((p**2).sum() for p in model.parameters()),
        }[name]()
        (loss + penalty).backward()
        return {
            "loss": loss + penalty,
            "clean_loss": loss,
            **({} if name == "plain" else {"penalty": penalty}),
        }

    options = {} if name == "plain" else {"weight": weight}
    assert_same_steps(
        small(), lambda model: build(name, model, **options).backward(*batch()), restated
    )


def test_l2_is_sgds_weight_decay():
    model, twin = small(), small()
    for each, decay, name, options in ((model, 0, "l2", {"weight": 0.1}), (twin, 0.1, "plain", {})):
        torch.manual_seed(0)
        build(name, each, **options).backward(*batch())
        torch.optim.SGD(each.parameters(), lr=0.1, weight_decay=decay).step()
    assert_equal(
        dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-9, atol=1e-12
    )


def test_dropout_is_a_switch():
    model = small(dropout=0.5)
    without = [build("plain", model, dropout=0.0).backward(*batch())["loss"] for _ in range(2)]
    assert torch.equal(*without) and model.dropout.p == 0.5
    assert not torch.equal(*[build("plain", model).backward(*batch())["loss"] for _ in range(2)])


UNITS = {
    "l2": unit,
    "token": lambda g: F.normalize(g, dim=-1),
    "all": lambda g: F.normalize(g.flatten(), dim=0).view_as(g),
    "linf": torch.sign,
}


@pytest.mark.parametrize("clean_weight", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(
    "name, kind", [("at", "l2"), ("at", "token"), ("at", "all"), ("fgsm", "linf")]
)
def test_at(name, kind, clean_weight):
    def restated(model):
        steps = Steps(model, *batch())
        losses = {}
        if clean_weight:
            losses["clean_loss"], g = steps.clean(clean_weight)
            g = g / clean_weight
        else:
            g = steps.input_gradient(torch.zeros(N, T, D, dtype=torch.float64))
        losses["adversarial_loss"] = steps.adversarial(0.7 * UNITS[kind](g))
        return {
            "loss": clean_weight * losses.get("clean_loss", 0) + losses["adversarial_loss"],
            **losses,
        }

    options = {
        "epsilon": 0.7,
        "clean_weight": clean_weight,
        **({"per": kind} if kind in ("token", "all") else {}),
    }
    assert_same_steps(
        small(), lambda model: build(name, model, **options).backward(*batch()), restated
    )


def test_fgsm_perturbs_by_epsilon():
    model = small()
    assert_same_steps(
        model,
        lambda model: build("fgsm", model).backward(*batch()),
        lambda model: build("at", model, epsilon=0.01, norm="linf").backward(*batch()),
    )


def ball(delta, radius, kind):
    if kind in ("linf", "max"):
        return delta.clamp(-radius, radius)
    return delta * (radius / delta.flatten(1).norm(dim=1)).clamp(max=1).view(
        -1, *[1] * (delta.dim() - 1)
    )


@contextlib.contextmanager
def draw_of(drawn, same):
    """The random state that the first pass found, and afterwards the one there was."""
    present = torch.get_rng_state()
    if not drawn or not same:
        drawn.append(present)
        yield
        return
    torch.set_rng_state(drawn[0])
    yield
    torch.set_rng_state(present)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epsilon": 0.5, "steps": 2, "step_size": 0.4},
        {"norm": "linf", "step_size": 0.04},
        {"clean_weight": 0.0},
        {"clean_weight": 0.5, "same_draw": True},
        {"first_step_from_clean": True},
    ],
    ids=str,
)
def test_pgd(options):
    def restated(model):
        given = {
            "epsilon": 0.1,
            "steps": 3,
            "norm": "l2",
            "clean_weight": 1.0,
            "same_draw": False,
        } | options
        steps, losses, drawn = Steps(model, *batch()), {}, []
        delta = torch.zeros(N, T, D, dtype=torch.float64)
        if given["clean_weight"]:
            with draw_of(drawn, given["same_draw"]):
                losses["clean_loss"], g = steps.clean(given["clean_weight"])
        for step in range(given["steps"]):
            if step or not options.get("first_step_from_clean"):
                with draw_of(drawn, given["same_draw"]):
                    g = steps.input_gradient(delta)
            size = options.get("step_size", 2.5 * given["epsilon"] / given["steps"])
            delta = ball(delta + size * UNITS[given["norm"]](g), given["epsilon"], given["norm"])
        with draw_of(drawn, given["same_draw"]):
            losses["adversarial_loss"] = steps.adversarial(delta)
        return {
            "loss": given["clean_weight"] * losses.get("clean_loss", 0)
            + losses["adversarial_loss"],
            **losses,
        }

    assert_same_steps(
        small(), lambda model: build("pgd", model, **options).backward(*batch()), restated
    )


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("per", ["sample", "token", "all"])
def test_random_start_is_in_the_ball(norm, per):
    seen = []

    class Watching(Small):
        def classify(self, x):
            seen.append(x.detach())
            return super().classify(x)

    model = Watching().double()
    inputs, labels = batch()
    build("pgd", model, random_start=True, epsilon=0.3, norm=norm, per=per, steps=1).backward(
        inputs, labels
    )
    delta = seen[1] - seen[0]
    kinds = {"sample": delta.flatten(1), "token": delta, "all": delta.flatten()}
    sizes = kinds[per].norm(dim=-1) if norm == "l2" else kinds[per].abs().amax(-1)
    real = (
        (inputs["attention_mask"] != 0)
        if per == "token"
        else torch.ones_like(sizes, dtype=torch.bool)
    )
    assert sizes.max() <= 0.3 * (1 + 1e-6) and sizes[real].min() > 0
    assert delta[inputs["attention_mask"] == 0].abs().max() < 1e-12


def per_token(g):
    largest = g.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, g / largest, 0)


@pytest.mark.parametrize("start", [1e-5, 0.0])
def test_adv_embed(start):
    def restated(model):
        steps = Steps(model, *batch())
        noise = torch.zeros(N, T, D, dtype=torch.float64)
        clean, g = steps.clean()
        if start:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
            noise = steps.masked(
                torch.rand(N, T, D, dtype=torch.float64, generator=generator) * start
            )
            g = steps.input_gradient(noise)
        adversarial = steps.adversarial((noise + 0.1 * per_token(g)).clamp(-0.1, 0.1))
        return {"loss": clean + adversarial, "clean_loss": clean, "adversarial_loss": adversarial}

    assert_same_steps(
        small(), lambda model: build("adv_embed", model, start=start).backward(*batch()), restated
    )


def cube(steps, size):
    """FreeLB's random start."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    noise = 2 * torch.rand(N, T, D, dtype=torch.float64, generator=generator) - 1
    return steps.masked(noise) * size / (steps.mask.sum(1) * D).sqrt()[:, None, None]


@pytest.mark.parametrize("max_norm", [0.0, 0.12])
@pytest.mark.parametrize("same_draw", [True, False])
@pytest.mark.parametrize("norm", ["l2", "max"])
def test_free_lb(max_norm, same_draw, norm):
    def restated(model):
        steps, drawn, losses = Steps(model, *batch()), [], []
        delta = cube(steps, 0.1)
        for _ in range(3):
            with draw_of(drawn, same_draw):
                delta.requires_grad_()
                loss = steps.loss(model.classify(steps.embedded() + delta))
                (loss / 3).backward()
            losses.append(loss)
            g = steps.masked(delta.grad)
            g = unit(g) if norm == "l2" else g / g.abs().amax((1, 2), keepdim=True)
            delta = (delta + 0.1 * g).detach()
            delta = ball(delta, max_norm, norm) if max_norm else delta
        return {"loss": sum(losses) / 3, "adversarial_loss": sum(losses) / 3}

    options = {"max_norm": max_norm, "same_draw": same_draw, "norm": norm}
    assert_same_steps(
        small(), lambda model: build("free_lb", model, **options).backward(*batch()), restated
    )


def test_one_pass_of_free_lb_without_a_start_is_plain_training():
    def free(model):
        return {
            "loss": build("free_lb", model, steps=1, init_mag=0.0, max_norm=0.0).backward(*batch())[
                "loss"
            ]
        }

    assert_same_steps(
        small(),
        free,
        lambda model: {"loss": build("plain", model).backward(*batch())["loss"]},
        rtol=0,
        atol=0,
    )


def test_free_at_on_text():
    def restated(model):
        steps, optimizer, losses = Steps(model, *batch()), sgd(model), []
        delta = cube(steps, 0.2)
        for _ in range(3):
            delta.requires_grad_()
            loss = steps.loss(model.classify(steps.embedded() + delta))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            delta = ball((delta + 0.2 * unit(steps.masked(delta.grad))).detach(), 0.2, "l2")
        return {"loss": sum(losses) / 3, "adversarial_loss": sum(losses) / 3}

    for scale in (1.0, torch.tensor(4.0)):
        assert_same_steps(
            small(),
            lambda model, scale=scale: build("free_at", model, sgd(model), epsilon=0.2).backward(
                *batch(), scale=scale
            ),
            restated,
        )


def test_free_at_on_images_keeps_delta_between_batches():
    """The last batch is shorter, the next one longer again."""
    x, labels = images()
    torch.manual_seed(3)
    model = Images().double()
    twin = copy.deepcopy(model)
    recipe, optimizer = build("free_at", model, sgd(model), input_range=(0.0, 1.0)), sgd(twin)
    noise, radius = torch.zeros_like(x), 4 / 255
    for rows in (N, 2, N):
        recipe.backward(x[:rows], labels[:rows])
        for _ in range(4):
            delta = noise[:rows].clone().requires_grad_()
            F.cross_entropy(twin((x[:rows] + delta).clamp(0, 1)), labels[:rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            noise[:rows] = (delta + radius * delta.grad.sign()).detach().clamp(-radius, radius)
        torch.testing.assert_close(recipe.delta, noise)
    assert_equal(state(model), state(twin), rtol=1e-9, atol=1e-12)


def test_free_at_needs_its_optimizer():
    model = small()
    recipe = build("free_at", model)
    with pytest.raises(RuntimeError, match="needs the optimizer"):
        recipe.backward(*batch())


def test_free_at_skips_updates_that_overflow():
    model = small()
    model.head.bias.data[0] = torch.inf
    before = state(model)
    build("free_at", model, sgd(model)).backward(*batch(), scale=torch.tensor(2.0))
    assert_equal(
        {k: v for k, v in state(model).items() if "batch_norm" not in k},
        {k: v for k, v in before.items() if "batch_norm" not in k},
    )


def of_weights(loss, weights):
    return torch.autograd.grad(loss, weights, retain_graph=True)


@contextlib.contextmanager
def moved(weights, by):
    """The weights plus `by`, then their copies again."""
    before = [w.detach().clone() for w in weights]
    for w, v in zip(weights, by, strict=True):
        w.data = w.data + v
    yield
    for w, copied in zip(weights, before, strict=True):
        w.data = copied


def masked_by(seed, keep, stream=0):
    """The public generator's mask of a tensor."""
    return lambda x: reference.kept(
        x, torch.tensor(seed), keep_probability=keep, step=0, stream=stream
    )


@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize(
    "weights", [(), ("lstm.weight_ih_l0", "conv*.weight"), ("batch_norm.weight",)], ids=str
)
@pytest.mark.parametrize(
    "name, passes", [("drop_attack", 1), ("drop_attack_k", 1), ("drop_attack_k", 3)]
)
def test_drop_attack(name, passes, weights, keep):
    def restated(model):
        steps = Steps(model, *batch())
        attacked = {
            (): [],
            ("batch_norm.weight",): [model.batch_norm.weight],
            ("lstm.weight_ih_l0", "conv*.weight"): [
                model.lstm.weight_ih_l0,
                model.convolution.weight,
            ],
        }[weights]
        e = steps.embedded()
        e.retain_grad()
        clean = steps.loss(model.classify(e))
        g_w = of_weights(clean, attacked) if attacked else []
        clean.backward()
        g_x = steps.masked(e.grad)
        seeds = [int(torch.randint(2**62, ())) for _ in range(2)]
        of_input, of_weight = [], []
        for _ in range(passes):
            delta = (0.7 * unit(g_x) * masked_by(seeds[0], keep)(g_x)).requires_grad_()
            loss = steps.loss(model.classify(steps.embedded() + delta))
            (loss / passes).backward()
            g_x = g_x + steps.masked(delta.grad)
            of_input.append(loss)
            if attacked:
                by = [
                    2.0
                    * F.normalize(g.flatten(), dim=0).view_as(g)
                    * masked_by(seeds[1], keep, i)(g)
                    for i, g in enumerate(g_w)
                ]
                with moved(attacked, by):
                    loss = steps.loss(model.classify(steps.embedded()))
                    g_w = [
                        g + new / passes
                        for g, new in zip(g_w, of_weights(loss, attacked), strict=True)
                    ]
                    (loss / passes).backward()
                of_weight.append(loss)
        losses = {"clean_loss": clean, "adversarial_loss": sum(of_input) / passes}
        losses |= {"weight_loss": sum(of_weight) / passes} if attacked else {}
        return {"loss": sum(losses.values()), **losses}

    options = {
        "epsilon": 0.7,
        "keep_probability": keep,
        "weights": weights,
        "epsilon_weights": 2.0,
        "keep_probability_weights": keep,
    }
    options |= {} if name == "drop_attack" else {"steps": passes}
    assert_same_steps(
        small(),
        lambda model: build(name, model, **options).backward(*batch()),
        restated,
        rtol=1e-8,
        atol=1e-11,
    )


def test_one_step_of_drop_attack_k_is_drop_attack():
    options = {"weights": "lstm.*"}
    assert_same_steps(
        small(),
        lambda model: build("drop_attack_k", model, steps=1, **options).backward(*batch()),
        lambda model: build("drop_attack", model, **options).backward(*batch()),
        rtol=0,
        atol=0,
    )


def test_the_mask_of_drop_attack_is_kept_and_does_not_rescale():
    seen = []

    class Watching(Small):
        def classify(self, x):
            seen.append(x.detach())
            return super().classify(x)

    torch.manual_seed(3)
    model = Watching().double()
    ids = torch.randint(1, WORDS, (N, 200))
    build("drop_attack_k", model, epsilon=2.0, steps=3).backward(ids, batch()[1])
    clean, *attacked = seen
    kept = [(x - clean).abs() > 1e-12 for x in attacked]
    assert all(torch.equal(mask, kept[0]) for mask in kept) and 0.4 < kept[0].double().mean() < 0.6
    for x in attacked:
        sizes = (x - clean).flatten(1).norm(dim=1)
        assert (sizes < 2.0).all() and (sizes > 1.0).all()  # about sqrt(p) * epsilon, and no 1/p


@pytest.mark.parametrize("same_draw", [True, False])
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam(adaptive, same_draw):
    def restated(model):
        steps, drawn, weights = Steps(model, *batch()), [], list(model.parameters())
        with draw_of(drawn, same_draw):
            clean = steps.loss(model.classify(steps.embedded()))
            g = torch.autograd.grad(clean, weights)
        statistics = {name: b.clone() for name, b in model.named_buffers()}
        scaled = [w.detach().abs() * x if adaptive else x for w, x in zip(weights, g, strict=True)]
        length = torch.cat([x.flatten() for x in scaled]).norm()
        by = [
            (w.detach().abs() * x if adaptive else x) / length
            for w, x in zip(weights, scaled, strict=True)
        ]
        with draw_of(drawn, same_draw), moved(weights, [0.3 * v for v in by]):
            loss = steps.loss(model.classify(steps.embedded()))
            loss.backward()
        for name, b in model.named_buffers():
            b.data = statistics[name]
        return {"loss": loss, "clean_loss": clean}

    options = {"rho": 0.3, "adaptive": adaptive, "same_draw": same_draw}
    assert_same_steps(
        small(), lambda model: build("sam", model, **options).backward(*batch()), restated
    )


@pytest.mark.parametrize(
    "name, options",
    [("sam", {"rho": 0.0}), ("awp", {"gamma": 0.0}), ("awp", {"warmup_epochs": 1})],
    ids=str,
)
def test_without_a_perturbation_of_weights_it_is_plain_training(name, options):
    def none(model):
        return {"loss": build(name, model, **options).backward(*batch())["loss"]}

    assert_same_steps(
        small(),
        none,
        lambda model: {"loss": build("plain", model).backward(*batch())["loss"]},
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("attack", [0, 2])
def test_awp(attack):
    """Two steps with decay and momentum, which see w + v."""

    def optimizer_of(model):
        return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=0.1)

    def run(model):
        optimizer = optimizer_of(model)
        recipe = build("awp", model, optimizer, gamma=0.2, steps=attack, epsilon=0.5)
        for step in range(2):
            optimizer.zero_grad()
            losses = recipe.backward(*batch(step))
            recipe.before_step()
            optimizer.step()
            recipe.after_step()
        return losses

    def restated(model):
        optimizer = optimizer_of(model)
        weights = [p for name, p in model.named_parameters() if p.dim() > 1 and "weight" in name]
        for step in range(2):
            steps = Steps(model, *batch(step))
            delta = torch.zeros(N, T, D, dtype=torch.float64)
            for _ in range(attack):
                delta = ball(
                    delta + 2.5 * 0.5 / attack * unit(steps.input_gradient(delta)), 0.5, "l2"
                )
            statistics = {name: b.clone() for name, b in model.named_buffers()}
            proxy = copy.deepcopy(model)
            state_of_proxy = [
                p for name, p in proxy.named_parameters() if p.dim() > 1 and "weight" in name
            ]
            loss = steps.loss(proxy.classify(proxy.embedding(steps.inputs) + delta))
            g = torch.autograd.grad(loss, state_of_proxy)
            assert all(torch.equal(b, statistics[name]) for name, b in model.named_buffers())
            ascent = [0.01 * x for x in g]
            v = [
                0.2 * w.detach().norm() / (a.norm() + 1e-20) * a
                for w, a in zip(weights, ascent, strict=True)
            ]
            optimizer.zero_grad()
            for w, x in zip(weights, v, strict=True):
                w.data += x
            loss = steps.loss(model.classify(steps.embedded() + delta))
            loss.backward()
            optimizer.step()
            for w, x in zip(weights, v, strict=True):
                w.data -= x
        return {"loss": loss}

    assert_same_steps(small(), run, restated, rtol=1e-8, atol=1e-11)


def test_awp_leaves_the_weights_between_steps():
    """Exact after backward, after a step that was skipped, and after close."""
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    recipe = build("awp", model, gamma=0.5)
    recipe.backward(*batch())
    assert all(map(torch.equal, before, model.parameters()))
    recipe.before_step()
    assert not torch.equal(before[0], model.embedding.weight)
    recipe.after_step()
    assert all(map(torch.equal, before, model.parameters()))
    recipe.before_step()
    recipe.close()
    assert all(map(torch.equal, before, model.parameters()))


def test_child_tuning_f_keeps_a_fresh_share_of_every_gradient():
    model = small()
    recipe = build("child_tuning_f", model, sgd(model), keep_probability=0.4)
    kept = []
    for _ in range(2):
        torch.manual_seed(0)
        model.zero_grad()
        recipe.backward(*batch())
        whole = torch.cat([p.grad.flatten() for p in model.parameters()])
        recipe.before_step()
        masked = torch.cat([p.grad.flatten() for p in model.parameters()])
        live = whole != 0
        kept.append((masked != 0)[live])
        torch.testing.assert_close(masked[live], torch.where(kept[-1], whole[live] / 0.4, 0))
    assert 0.3 < kept[0].double().mean() < 0.5 and 0.3 < (kept[0] == kept[1]).double().mean() < 0.7


def fisher(model, batches, weights, most):
    """Sums of squared batch gradients, each tensor clipped first."""
    total = [torch.zeros_like(w) for w in weights]
    for inputs, labels in batches:
        steps = Steps(copy.deepcopy(model), inputs, labels)
        twins = [
            dict(steps.model.named_parameters())[name]
            for name, w in model.named_parameters()
            if any(w is each for each in weights)
        ]
        for sum_of, g in zip(
            total,
            torch.autograd.grad(steps.loss(steps.model.classify(steps.embedded())), twins),
            strict=True,
        ):
            sum_of += (g * min(1.0, most / (g.norm().item() + 1e-6))) ** 2 / len(batches)
    return total


@pytest.mark.parametrize("keep", [0.3, 1.0])
@pytest.mark.parametrize("target", ["gradient", "update"])
def test_child_tuning_d(target, keep):
    model = small()
    twin = copy.deepcopy(model)
    chosen = [twin.lstm.weight_ih_l0, twin.lstm.weight_hh_l0, twin.convolution.weight]
    batches = [batch(i) for i in range(3)]
    make = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = (
        torch.optim.AdamW(model.parameters(), **make),
        torch.optim.AdamW(twin.parameters(), **make),
    )
    options = {
        "names": ("lstm.weight*", "convolution.weight"),
        "keep_probability": keep,
        "target": target,
        "max_grad_norm": 0.05,
    }
    recipe = build("child_tuning_d", model, optimizers[0], **options)
    before = state(model)
    torch.manual_seed(1)
    recipe.prepare(batches)
    assert_equal(state(model), before, rtol=0, atol=0)
    torch.manual_seed(1)
    of_fisher = fisher(twin, batches, chosen, 0.05)
    cut = numpy.percentile(torch.cat([f.flatten() for f in of_fisher]).numpy(), (1 - keep) * 100)
    masks = [f >= cut for f in of_fisher]
    if keep < 1:
        assert sum(mask.sum() for mask in masks) / sum(
            mask.numel() for mask in masks
        ) == pytest.approx(keep, abs=0.01)
    for step in range(2):
        torch.manual_seed(step)
        optimizers[0].zero_grad()
        recipe.backward(*batch(step))
        recipe.before_step()
        optimizers[0].step()
        recipe.after_step()
        torch.manual_seed(step)
        optimizers[1].zero_grad()
        steps = Steps(twin, *batch(step))
        steps.loss(twin.classify(steps.embedded())).backward()
        copies = [w.detach().clone() for w in chosen]
        if target == "gradient":
            for w, mask in zip(chosen, masks, strict=True):
                w.grad *= mask
        optimizers[1].step()
        if target == "update":
            for w, mask, copied in zip(chosen, masks, copies, strict=True):
                w.data = torch.where(mask, w.data, copied)
        recipe.epoch_end()  # the mask is the run's
    assert_equal(state(model), state(twin), rtol=1e-7, atol=1e-7)


def test_child_tuning_d_keeps_ties_and_makes_its_mask_of_the_first_epoch():
    model = small()
    recipe = build("child_tuning_d", model, names="embedding.weight")  # most words do not occur
    recipe.backward(*batch())
    gradient = model.embedding.weight.grad.clone()
    recipe.before_step()
    assert torch.equal(model.embedding.weight.grad, gradient)
    recipe.epoch_end()
    (mask,) = recipe.masks
    assert (
        mask[gradient == 0].all() == (0.3 * mask.numel() > (gradient != 0).sum())
        and mask[gradient.abs().argmax() // D].any()
    )
    default = build("child_tuning_d", model)
    # "layer" is in their names
    assert [id(p) for p in default._masked] == [id(p) for p in model.layer_norm.parameters()]
    assert len(build("child_tuning_d", Images())._masked) == len(list(Images().parameters()))


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("detached", [False, True])
def test_roast(form, detached):
    def restated(model):
        steps = Steps(model, *batch())
        z0 = model.classify(steps.embedded())
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        n = steps.masked(torch.rand(N, T, D, dtype=torch.float64, generator=generator) * 1e-5)
        delta = n + 0.3 * per_token(steps.input_gradient(n))
        h = steps.embedded()
        z1 = model.classify((h.detach() if detached else h) + delta)
        clean, adversarial, between = (
            steps.loss(z0),
            steps.loss(z1),
            divergence(z0, z1, "mean" if form == "paper" else "sum"),
        )
        loss = (clean + adversarial if form == "paper" else clean / 2) + 0.5 * between
        loss.backward()
        losses = {"loss": loss, "clean_loss": clean, "divergence": between}
        return losses | ({"adversarial_loss": adversarial} if form == "paper" else {})

    options = {
        "epsilon": 0.3,
        "kl_weight": 0.5,
        "form": form,
        "detach_embedding": detached,
        "seed": 1,
    }
    assert_same_steps(
        small(), lambda model: build("roast", model, **options).backward(*batch()), restated
    )


def test_roast_masks_once_an_epoch_by_the_rank_of_the_last_one():
    model = small(0.0)
    options = {
        "names": ("lstm.*", "convolution.*"),
        "threshold": 0.6,
        "sharpness": 4.0,
        "seed": 3,
        "backend": "reference",
    }
    recipe = build("roast", model, **options)
    chosen = [p for name, p in model.named_parameters() if name.startswith(("lstm", "convolution"))]
    sums, masks = [], []
    for epoch in range(3):
        sums.append([torch.zeros_like(p) for p in chosen])
        masks.append([])
        for step in range(3):
            model.zero_grad()
            recipe.backward(*batch(10 * epoch + step))
            raw, others = [p.grad.clone() for p in chosen], model.head.weight.grad.clone()
            recipe.before_step()
            if step:  # the first batch is skipped
                for total, g in zip(sums[-1], raw, strict=True):
                    total += g**2
            assert torch.equal(model.head.weight.grad, others)
            masks[-1].append(
                torch.cat(
                    [(p.grad / g).flatten() for p, g in zip(chosen, raw, strict=True)]
                ).nan_to_num(0)
            )
        recipe.epoch_end()
    # the first epoch is trained whole
    assert torch.equal(masks[0][0], torch.ones_like(masks[0][0]) * (masks[0][0] != 0))
    for epoch in (1, 2):
        saliency = torch.cat([total.flatten() for total in sums[epoch - 1]])
        rank = (
            torch.from_numpy(scipy.stats.rankdata(saliency.numpy(), "min").astype(float) - 1)
            / saliency.numel()
        )
        live = masks[epoch][0] != 0
        torch.testing.assert_close(
            masks[epoch][0][live], 1 + torch.exp(-8.0 * (rank[live] - 0.6)), rtol=1e-5, atol=0
        )
        expected = torch.sigmoid(8.0 * (rank - 0.6)).mean()
        assert live.double().mean() == pytest.approx(expected.item(), abs=0.06)
        for later in masks[epoch][1:]:
            both = (later != 0) & live
            torch.testing.assert_close(later[both], masks[epoch][0][both])
    assert not torch.equal(masks[1][0] != 0, masks[2][0] != 0)


def test_roast_prepared():
    model = small()
    recipe = build("roast", model, names="lstm.*", seed=3)
    recipe.prepare([batch(i) for i in range(2)])
    assert [mask.shape for mask in recipe.masks] == [p.shape for p in model.lstm.parameters()]
    for name in ("roast", "child_tuning_d"):
        with pytest.raises(ValueError, match="batches"):
            build(name, model).prepare([])


def test_roast_does_not_take_a_recomputed_embedding():
    class Recomputes(Small):
        def forward(self, ids, attention_mask=None):
            return checkpoint(super().forward, ids, use_reentrant=False)

    with pytest.raises(RuntimeError, match="leave it out of the checkpointed part"):
        build("roast", Recomputes()).backward(*batch())


@pytest.mark.parametrize("name", [name for name in recipes.NAMES if name != "roast"])
def test_a_recomputed_embedding(name):
    class Recomputes(Small):
        def forward(self, ids, attention_mask=None):
            return checkpoint(super().forward, ids, use_reentrant=False)

    results = []
    for kind in (Small, Recomputes):
        torch.manual_seed(3)
        model = kind(0.3).double()
        model.batch_norm.track_running_stats = False  # which a recompute would move again
        torch.manual_seed(5)
        results.append((build(name, model, sgd(model)).backward(*batch()), state(model)))
    for actual, expected in zip(*results, strict=True):
        assert_equal(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["decoupled", "penalty", "annealed"])
@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_weight_consolidation(form, strength):
    make = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-6}
    options = {
        "kappa": strength,
        "gamma": strength,
        "k": 0.5,
        "t0": 2,
        "form": form,
        "names": ("lstm.*", "embedding.*"),
    }

    def run(model):
        optimizer = torch.optim.AdamW(model.parameters(), **make)
        recipe = build("weight_consolidation", model, optimizer, **options)
        for step in range(3):
            optimizer.zero_grad()
            losses = recipe.backward(*batch(step))
            recipe.before_step()
            optimizer.step()
            recipe.after_step()
        return {"clean_loss": losses["clean_loss"]}

    def restated(model):
        chosen = [
            p for name, p in model.named_parameters() if name.startswith(("lstm", "embedding"))
        ]
        origin = [p.detach().clone() for p in chosen]
        optimizer = torch.optim.AdamW(model.parameters(), **make)
        for step in range(1, 4):
            optimizer.zero_grad()
            steps = Steps(model, *batch(step - 1))
            loss = steps.loss(model.classify(steps.embedded()))
            penalty = (
                sum(((p - p0) ** 2).sum() for p, p0 in zip(chosen, origin, strict=True))
                * strength
                / 2
            )
            (loss + (penalty if form == "penalty" else 0)).backward()
            before = [p.detach().clone() for p in chosen]
            if form == "decoupled":
                for p, p0 in zip(chosen, origin, strict=True):
                    p.data -= 0.02 * strength * (p.data - p0)
            optimizer.step()
            if form == "annealed":
                lam = 1 / (1 + math.exp(-0.5 * (step - 2)))
                for p, p0, w in zip(chosen, origin, before, strict=True):
                    moments = optimizer.state[p]
                    m, v = (
                        moments["exp_avg"] / (1 - 0.9**step),
                        moments["exp_avg_sq"] / (1 - 0.999**step),
                    )
                    p.data = (
                        w
                        - 0.02 * lam * m / (v.sqrt() + 1e-6)
                        - 0.02 * (1 - lam) * strength * (w - p0)
                        - 0.02 * 0.1 * w
                    )
        return {"clean_loss": loss}

    # The convolution's bias, ahead of BatchNorm, has a gradient of nothing but rounding, which
    # AdamW magnifies.
    assert_same_steps(small(), run, restated, rtol=1e-7, atol=1e-8)


def test_weight_consolidation_needs_a_small_enough_lr():
    model = small()
    with pytest.raises(RuntimeError, match="needs the optimizer"):
        build("weight_consolidation", model).before_step()
    with pytest.raises(ValueError, match="lr=0.1 times gamma=5000"):
        build("weight_consolidation", model, sgd(model), form="annealed").before_step()


class Twice(nn.Module):
    """Two convolutions with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.second, self.second_norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def features(self, x, norms):
        first = norms[0](self.first(x))
        second = norms[1](self.second(first.relu()))
        return self.head(second.relu().mean((2, 3))), [
            f.relu().mean((2, 3)) for f in (first, second)
        ]

    def forward(self, x):
        return self.features(x, (self.first_norm, self.second_norm))[0]


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("predictor", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_arat(split, predictor, stop_gradient):
    x, labels = images()

    def run(model):
        optimizer = sgd(model)
        options = {
            "split": split,
            "predictor": predictor,
            "stop_gradient": stop_gradient,
            "random_start": False,
        }
        recipe = build(
            "arat",
            model,
            optimizer,
            input_range=(0.0, 1.0),
            invariance_weight=2.0,
            steps=3,
            **options,
        )
        losses = recipe.backward(x, labels)
        assert {id(p) for p in recipe.parameters()} <= {
            id(p) for p in optimizer.param_groups[-1]["params"]
        }
        optimizer.step()
        own = recipe.parameters()
        assert all(p.grad is not None for p in own)
        recipe.after_step()
        assert all(p.grad is None for p in own)
        recipe.close()
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
            id(p) for p in model.parameters()
        ]
        assert len(optimizer.state) <= len(list(model.parameters()))
        return losses | {f"own {i}": p.detach().sum() for i, p in enumerate(own)}

    def restated(model):
        own = [
            nn.Sequential(
                nn.Linear(d, d // 4, bias=False),
                nn.BatchNorm1d(d // 4),
                nn.ReLU(),
                nn.Linear(d // 4, d),
            )
            for d in (4, 8)
        ]
        own = own if predictor else []
        for h in own:
            h.double()
        norms = model.first_norm, model.second_norm
        clean_norms = copy.deepcopy(norms) if split else norms
        delta = torch.zeros_like(x)
        for _ in range(3):
            statistics = copy.deepcopy(model.state_dict())
            delta.requires_grad_()
            (g,) = torch.autograd.grad(
                F.cross_entropy(model((x + delta).clamp(0, 1)), labels), delta
            )
            delta = (delta + 2 / 255 * g.sign()).detach().clamp(-8 / 255, 8 / 255)
            model.load_state_dict(statistics)
        z, f = model.features(x, clean_norms)
        z_adversarial, f_adversarial = model.features((x + delta).clamp(0, 1), norms)
        f = [each.detach() for each in f] if stop_gradient else f
        predicted = (
            [h(each) for h, each in zip(own, f_adversarial, strict=True)] if own else f_adversarial
        )
        invariance = (
            sum(
                1 - F.cosine_similarity(h, each).mean()
                for h, each in zip(predicted, f, strict=True)
            )
            / 2
        )
        clean, adversarial = F.cross_entropy(z, labels), F.cross_entropy(z_adversarial, labels)
        loss = 0.5 * clean + 0.5 * adversarial + 2.0 * invariance
        loss.backward()
        extra = [
            *(p for h in own for p in h.parameters()),
            *(p for norm in clean_norms for p in norm.parameters() if split),
        ]
        torch.optim.SGD([*model.parameters(), *extra], lr=LR).step()
        losses = {
            "loss": loss,
            "clean_loss": clean,
            "adversarial_loss": adversarial,
            "invariance": invariance,
        }
        return losses | {f"own {i}": p.detach().sum() for i, p in enumerate(extra)}

    torch.manual_seed(3)
    model = Twice().double()
    if not predictor:
        assert_same_steps(
            model, run, lambda twin: restated_without_draws(restated, twin), rtol=1e-8, atol=1e-10
        )
    else:
        assert_same_steps(model, run, restated, rtol=1e-8, atol=1e-10)


def restated_without_draws(restated, twin):
    """The restatement builds predictors that are not there; what it draws for them does not
    count.
    """
    before = torch.get_rng_state()
    losses = restated(twin)
    torch.set_rng_state(before)
    return losses


def test_arat_balances_by_the_clean_branchs_accuracy():
    torch.manual_seed(3)
    model = Twice().double()
    recipe = build("arat", model, sgd(model), steps=1, invariance_weight=0.0, balance_rows=6)
    for step in range(4):
        losses = recipe.backward(*images(step))
        torch.testing.assert_close(
            losses["loss"], (losses["clean_loss"] + losses["adversarial_loss"]) / 2
        )
    assert len(recipe.recent) == 2  # of four rows each
    clean = copy.deepcopy(model)
    clean.first_norm, clean.second_norm = copy.deepcopy(list(recipe.clean_branch))
    clean.eval()
    right = sum((clean(x).argmax(1) == labels).sum().item() for x, labels in map(images, (2, 3)))
    modes, before = [module.training for module in model.modules()], state(model)
    recipe.epoch_end()
    assert recipe.accuracy == right / 8 and [module.training for module in model.modules()] == modes
    assert_equal(state(model), before, rtol=0, atol=0)
    recipe.accuracy = 0.75
    losses = recipe.backward(*images())
    torch.testing.assert_close(
        losses["loss"], 0.25 * losses["clean_loss"] + 0.75 * losses["adversarial_loss"]
    )
    for given, other in zip(model.modules(), clean.modules(), strict=True):
        assert type(given) is type(other)


def test_arat_without_invariance_and_branches_is_at_on_images():
    x, labels = images()
    results = []
    options = {"epsilon": 0.1, "norm": "linf", "input_range": (0.0, 1.0)}
    alone = {
        "invariance_weight": 0.0,
        "split": False,
        "predictor": False,
        "random_start": False,
        "steps": 1,
        "step_size": 0.1,
    }
    for name, more in (
        ("at", {}),
        ("arat", {**alone, "clean_weight": 1.0, "adversarial_weight": 1.0}),
    ):
        torch.manual_seed(3)
        model = Twice().double()
        losses = build(name, model, **options, **more).backward(x, labels)
        results.append((losses["loss"], state(model)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_equal(results[1][1], results[0][1], rtol=1e-9, atol=1e-12)


def test_arat_leaves_padding_out_of_its_features():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm, self.head = (
                nn.Embedding(WORDS, D),
                nn.LayerNorm(D),
                nn.Linear(D, CLASSES),
            )

        def classify(self, x):
            return self.head(self.norm(x).tanh().mean(1))

        def forward(self, ids, attention_mask):
            return self.classify(self.embedding(ids))

    model = Tokens().double()
    inputs, labels = batch()
    steps = Steps(model, inputs, labels)
    e = steps.embedded().detach()
    delta = 0.3 * steps.input_gradient(torch.zeros_like(e)).sign()
    kept = inputs["attention_mask"][..., None]
    of_clean, of_adversarial = (
        (model.norm(x).relu() * kept).sum(1) / kept.sum(1) for x in (e, e + delta)
    )
    expected = 1 - F.cosine_similarity(of_clean, of_adversarial).mean()
    options = {
        "predictor": False,
        "random_start": False,
        "steps": 1,
        "epsilon": 0.3,
        "step_size": 0.3,
    }
    torch.testing.assert_close(
        build("arat", model, layers="norm", **options).backward(inputs, labels)["invariance"],
        expected.detach(),
    )


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("predictor", [True, False])
def test_arat_as_if_ignored_rows_were_not_there(predictor, stop_gradient, random_start):
    torch.manual_seed(3)
    first = nn.Sequential(
        nn.Embedding(WORDS, D), nn.Flatten(), nn.Linear(T * D, 6), nn.Tanh(), nn.Linear(6, CLASSES)
    ).double()
    ids, labels = torch.randint(WORDS, (8, T)), torch.arange(8) % CLASSES
    kept = torch.arange(8) < 5  # those before the others, so that they start at the same noise
    results = []
    for inputs, targets in ((ids, torch.where(kept, labels, -100)), (ids[kept], labels[kept])):
        model = copy.deepcopy(first)
        torch.manual_seed(4)
        options = {
            "predictor": predictor,
            "stop_gradient": stop_gradient,
            "random_start": random_start,
            "balance_rows": 6,
            "steps": 2,
        }
        recipe = recipes.arat(model, model[0], **options)
        torch.manual_seed(5)
        losses, *_ = [recipe.backward(inputs, targets) for _ in range(3)]
        remembered = len(recipe.recent)
        recipe.epoch_end()
        grads = {
            f"gradient {i}": p.grad
            for i, p in enumerate([*model.parameters(), *recipe.parameters()])
        }
        results.append(
            losses
            | grads
            | {"accuracy": torch.tensor(recipe.accuracy), "remembered": torch.tensor(remembered)}
        )
    assert_equal(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_arat_where_every_row_is_ignored():
    model = nn.Sequential(
        nn.Embedding(WORDS, D), nn.Flatten(), nn.Linear(T * D, 6), nn.Tanh(), nn.Linear(6, CLASSES)
    )
    loss = recipes.arat(model, model[0], steps=1).backward(
        batch()[0]["ids"], torch.full((N,), -100)
    )["loss"]
    assert loss.isnan()


def test_arat_splits_the_norms_it_is_told_to():
    for options, kinds in (
        ({}, [nn.BatchNorm1d]),
        ({"split_layer_norm": True}, [nn.BatchNorm1d, nn.LayerNorm]),
        ({"split": False}, []),
    ):
        model = small()
        recipe = build("arat", model, steps=1, **options)
        assert [type(module) for module in recipe.clean_branch] == kinds
        before = copy.deepcopy(recipe.clean_branch.state_dict())
        recipe.backward(*batch())
        assert all(p.grad is not None for p in recipe.parameters())
        assert all(p.grad is not None for p in model.parameters())
        moved_buffers = [
            name
            for name, value in recipe.clean_branch.state_dict().items()
            if not torch.equal(value, before[name])
        ]
        assert all("running" in name or "tracked" in name for name in moved_buffers) and bool(
            moved_buffers
        ) == bool(kinds)


def test_arat_finds_layers_in_any_model():
    layers = [
        build("arat", model)._layers
        for model in (small(), nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
    ]
    assert [type(layer) for layer in layers[0]] == [nn.BatchNorm1d] and [
        layer.out_features for layer in layers[1]
    ] == [3]
    with pytest.raises(ValueError, match="nothing to hold alike"):
        build("arat", nn.Sequential(nn.Flatten()))


def divergence(first, second, reduction="mean"):
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    kind = {"mean": "batchmean", "sum": "sum"}[reduction]
    return (
        F.kl_div(log_q, log_p, log_target=True, reduction=kind)
        + F.kl_div(log_p, log_q, log_target=True, reduction=kind)
    ) / 2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["r_drop", "r_at", "r_at_su"])
def test_r_drop_and_r_at(name, reduction):
    def restated(model):
        steps, losses, delta = Steps(model, *batch()), {}, 0
        if name != "r_drop":
            losses["clean_loss"], g = steps.clean()
            delta = 0.5 * unit(g)
        pair = [model.classify(steps.embedded() + delta) for _ in range(2)]
        of_pair = sum(steps.loss(z) for z in pair) / 2
        losses["clean_loss" if name == "r_drop" else "adversarial_loss"] = of_pair
        losses["divergence"] = divergence(*pair, reduction)
        (of_pair + 2.0 * losses["divergence"]).backward()
        return {
            "loss": losses["clean_loss"]
            + losses.get("adversarial_loss", 0)
            + 2.0 * losses["divergence"],
            **losses,
        }

    options = {"alpha": 2.0, "reduction": reduction} | (
        {} if name == "r_drop" else {"epsilon": 0.5}
    )
    options |= {"seed": 0} if name == "r_at_su" else {}
    assert_same_steps(
        small(), lambda model: build(name, model, **options).backward(*batch()), restated
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_divergence_of_regression_and_of_ignored_rows(reduction):
    def restated(model, task, ignored):
        inputs, labels = batch()
        labels = (
            torch.linspace(-1, 1, N, dtype=torch.float64)[:, None]
            if task == "regression"
            else labels
        )
        steps = Steps(model, inputs, labels, task)
        pair = [model.classify(steps.embedded()) for _ in range(2)]
        loss = (
            sum(
                F.mse_loss(z, labels)
                if task == "regression"
                else F.cross_entropy(z, labels, ignore_index=ignored)
                for z in pair
            )
            / 2
        )
        kept = labels.squeeze() != ignored
        between = (
            divergence(*(z[kept] for z in pair), reduction)
            if task != "regression"
            else F.mse_loss(*pair, reduction=reduction)
        )
        (loss + between).backward()
        return {"loss": loss + between, "clean_loss": loss, "divergence": between}

    inputs, labels = batch()
    values = torch.linspace(-1, 1, N, dtype=torch.float64)
    ignored = int(labels[0])
    assert_same_steps(
        small(classes=1),
        lambda model: build("r_drop", model, task="regression", reduction=reduction).backward(
            inputs, values
        ),
        lambda model: restated(model, "regression", -100),
    )
    assert_same_steps(
        small(),
        lambda model: build("r_drop", model, ignore_index=ignored, reduction=reduction).backward(
            inputs, labels
        ),
        lambda model: restated(model, "classification", ignored),
    )


def test_masked_classes_add_nothing_to_the_divergence():
    class Masked(Small):
        def classify(self, x):
            return torch.cat(
                [super().classify(x), torch.full((len(x), 1), -torch.inf, dtype=x.dtype)], 1
            )

    results = []
    for kind in (Small, Masked):
        torch.manual_seed(3)
        model = kind(0.3).double()
        torch.manual_seed(5)
        results.append((build("r_drop", model).backward(*batch()), state(model)))
    for actual, expected in zip(*results, strict=True):
        assert_equal(actual, expected, rtol=1e-9, atol=1e-12)


# Identities (METHODS 5)


def run(name, model, **options):
    torch.manual_seed(6)
    losses = build(name, model, sgd(model), **options).backward(*batch())
    return losses, {key: p.grad for key, p in model.named_parameters()}


def test_without_a_perturbation():
    """eps = 0 turns AT into 2x CE, R-AT into CE + R-Drop, UEGR into CE + R-Drop with JS."""
    _, plain = run("plain", small(0.0))
    _, at = run("at", small(0.0), epsilon=0.0)
    assert_equal(at, {key: 2 * g for key, g in plain.items()}, rtol=1e-9, atol=1e-12)
    _, r_drop = run("r_drop", small(0.0))
    _, r_at = run("r_at", small(0.0), epsilon=0.0)
    assert_equal(r_at, {key: g + plain[key] for key, g in r_drop.items()}, rtol=1e-9, atol=1e-12)
    _, uegr = run("uegr", small(0.0), epsilon=0.0, seed=0)
    assert_equal(uegr, r_at, rtol=1e-9, atol=1e-12)
    with_dropout, _ = run("uegr", small(0.3), epsilon=0.0, seed=0, js_weight=1.0)
    assert 0 < with_dropout["divergence"] < torch.log(torch.tensor(2.0))


def test_uegr_without_divergence_and_selection_is_at():
    """lambda = 0, m = 1 and threshold -> infinity (printed)."""
    models = small(), small()
    for name, model, options in (
        ("at", models[0], {"epsilon": 0.5}),
        (
            "uegr",
            models[1],
            {
                "epsilon": 0.5,
                "js_weight": 0.0,
                "passes": 1,
                "threshold": 1e6,
                "seed": 0,
                "adaptive_dropout": False,
            },
        ),
    ):
        optimizer = sgd(model)
        for step in range(2):
            torch.manual_seed(step)
            optimizer.zero_grad()
            recipe = build(name, model, optimizer, **options)
            recipe.backward(*batch(step))
            recipe.before_step()
            optimizer.step()
    assert_equal(state(models[0]), state(models[1]), rtol=1e-9, atol=1e-12)


def test_drop_attack_with_everything_kept_is_at():
    def attack(model):
        return build("drop_attack", model, epsilon=0.5, keep_probability=1.0).backward(*batch())

    model = small(0.0)  # the masks' seeds are drawn between the passes
    twin = copy.deepcopy(model)
    assert_equal(
        attack(model), build("at", twin, epsilon=0.5).backward(*batch()), rtol=1e-12, atol=0
    )
    assert_equal(state(model), state(twin), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name, options",
    [
        ("child_tuning_f", {"keep_probability": 1.0}),
        ("child_tuning_d", {"keep_probability": 1.0}),
        ("weight_consolidation", {"kappa": 0.0}),
    ],
)
def test_with_everything_kept_it_is_plain_adamw(name, options):
    results = []
    for each, given in ((name, options), ("plain", {})):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        torch.manual_seed(6)
        train(each, model, optimizer=optimizer, **given)
        results.append(state(model))
    assert_equal(*results, rtol=0, atol=0)


@pytest.mark.parametrize("weights, times", [((), 2), (("lstm.*",), 3)], ids=str)
def test_drop_attack_with_nothing_kept_is_plain_training_so_many_times(weights, times):
    _, plain = run("plain", small(0.0))
    _, attacked = run(
        "drop_attack",
        small(0.0),
        keep_probability=0.0,
        keep_probability_weights=0.0,
        weights=weights,
    )
    assert_equal(attacked, {key: times * g for key, g in plain.items()}, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["r_drop", "r_at", "uegr"])
def test_without_dropout_nothing_diverges(name):
    losses, _ = run(name, small(0.0), **({"seed": 0} if name == "uegr" else {}))
    assert losses["divergence"].abs() < 1e-12


def test_jensen_shannon_is_at_most_half_the_symmetric_divergence():
    logits = 3 * torch.randn(2, 50, 4, dtype=torch.float64)
    assert (uk.pairwise_js(logits, reduction="sum") <= divergence(*logits, "sum") / 2).all()


@pytest.mark.parametrize("adaptive", [False, True, None])
def test_uegr_is_the_stage(adaptive):
    """By default on the model with adaptive dropout, which it gives back."""
    options = {"epsilon": 0.5, "passes": 3, "js_weight": 0.3, "label_smoothing": 0.1}

    def stage(model):
        plain = model.dropout
        if adaptive is not False:
            uk.replace_dropout(model)
        for step in range(3):  # the rates differ once a gradient has been seen
            result = uk.BiStage(model, model.embedding, **options).backward(*batch(step))._asdict()
        model.dropout = plain
        del result["logits"]
        return result

    def run(model):
        plain = model.dropout
        recipe = build(
            "uegr",
            model,
            seed=0,
            **options,
            **({} if adaptive is None else {"adaptive_dropout": adaptive}),
        )
        results = [recipe.backward(*batch(step)) for step in range(3)]
        recipe.close()
        assert (
            model.dropout is plain
            and type(plain) is nn.Dropout
            and vars(plain).keys() == vars(nn.Dropout()).keys()
        )
        return results[-1]

    assert_same_steps(small(), run, stage)


@pytest.mark.parametrize("name", ["uegr", "r_at_su", "child_tuning_f"])
def test_the_update_is_selective(name):
    """The same masks inside SelectiveSGD's step and ahead of torch's SGD, from the same seed."""
    inside, outside = small(), small()
    options = (
        {"keep_probability": 0.4}
        if name == "child_tuning_f"
        else {"threshold": 0.05, "sharpness": 3.0}
    )
    optimizers = uk.SelectiveSGD(inside.parameters(), lr=LR, seed=5), sgd(outside)
    of_inside = build(name, inside, optimizers[0], **options)
    of_outside = build(name, outside, optimizers[1], seed=5, **options)
    assert options.items() <= optimizers[0].param_groups[0].items()
    masked = 0
    for step in range(2):
        for model, recipe, optimizer in (
            (inside, of_inside, optimizers[0]),
            (outside, of_outside, optimizers[1]),
        ):
            torch.manual_seed(step)
            optimizer.zero_grad()
            recipe.backward(*batch(step))
            recipe.before_step()
            masked += model is outside and sum(
                (p.grad == 0).sum() for p in (model.head.weight, model.lstm.weight_ih_l0)
            )
            optimizer.step()
            recipe.after_step()
    assert masked > 0
    assert_equal(
        state(inside) | grads_apart(inside),
        state(outside) | grads_apart(inside),
        rtol=1e-9,
        atol=1e-12,
    )


def grads_apart(model):
    """Names of gradients, which a selective step leaves as they were."""
    return {name: torch.zeros(()) for name in state(model) if name.endswith("gradient")}


def test_selection_with_adamw_defaults_to_a_drawn_seed():
    model = small()
    torch.manual_seed(1)
    first = build("uegr", model, torch.optim.AdamW(model.parameters())).selection["seed"]
    torch.manual_seed(1)
    assert build("uegr", model).selection["seed"] == first != build("uegr", model).selection["seed"]


# Cost


# forwards, backwards, and how often those reach the parameters, where two of them may be walked in
# one call
COSTS = {
    "plain": (1, 1, 1),
    "l1": (1, 1, 1),
    "l2": (1, 1, 1),
    "at": (2, 2, 2),
    "fgsm": (2, 2, 2),
    "pgd": (5, 5, 2),  # K = 3
    "free_at": (3, 3, 3),
    "free_lb": (3, 3, 3),
    "r_drop": (2, 2, 1),
    "r_at": (3, 3, 2),
    "r_at_su": (3, 3, 2),
    "uegr": (2, 2, 2),  # of N and of 2N rows
    "drop_attack": (2, 2, 2),
    "drop_attack_k": (4, 4, 4),  # K = 3
    "child_tuning_f": (1, 1, 1),
    "child_tuning_d": (1, 1, 1),
    "roast": (3, 3, 1),
    "weight_consolidation": (1, 1, 1),
    "arat": (12, 12, 2),  # K = 10
    "adv_embed": (3, 3, 2),
    "sam": (2, 2, 1),
    "awp": (2, 2, 1),
}


def count(model):
    counts = types.SimpleNamespace(forward=0, backward=0, reached=0)

    def add(what):
        setattr(counts, what, getattr(counts, what) + 1)

    model.register_forward_hook(lambda *_: add("forward"))
    model.head.register_full_backward_hook(lambda *_: add("backward"))
    model.head.weight.register_post_accumulate_grad_hook(lambda p: add("reached"))
    return counts


@pytest.mark.parametrize("name", recipes.NAMES)
def test_cost(name):
    model = small()
    counts = count(model)
    build(name, model, sgd(model)).backward(*batch())
    assert (counts.forward, counts.backward, counts.reached) == COSTS[name]


@pytest.mark.parametrize(
    "name, options, forwards",
    [
        ("pgd", {"steps": 5}, 7),
        ("pgd", {"first_step_from_clean": True}, 4),
        ("pgd", {"clean_weight": 0.0}, 4),
        ("free_lb", {"steps": 2}, 2),
        ("free_at", {"steps": 5}, 5),
        ("adv_embed", {"start": 0.0}, 2),
        ("adv_embed", {"steps": 2}, 4),
        ("drop_attack", {"weights": "lstm.weight_ih_l0"}, 3),
        ("drop_attack", {"weights": "*", "attack_input": False}, 2),
        ("drop_attack_k", {"steps": 2, "weights": "lstm.weight_ih_l0"}, 5),
        ("awp", {"steps": 3}, 5),
    ],
)
def test_cost_by_option(name, options, forwards):
    model = small()
    counts = count(model)
    build(name, model, sgd(model), **options).backward(*batch())
    assert counts.forward == counts.backward == forwards


# What all of them promise


def test_names():
    assert all(callable(getattr(recipes, name)) for name in recipes.NAMES) and len(
        set(recipes.NAMES)
    ) == len(recipes.NAMES)
    assert uk.recipes is recipes


def train(name, model, *, steps=2, optimizer=None, data=batch, **options):
    """A few steps with everything called; returns the losses and the recipe."""
    optimizer = sgd(model) if optimizer is None else optimizer
    recipe = build(name, model, optimizer, **options)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(recipe.backward(*data(step)))
        recipe.before_step()
        optimizer.step()
        recipe.after_step()
    recipe.epoch_end()
    return losses, recipe


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_call_changes_gradients_and_statistics_only(name):
    model = small()
    model.dropout.eval()
    before, modes = state(model), [module.training for module in model.modules()]
    recipe = build(name, model, sgd(model))
    hooks = len(model.embedding._forward_hooks)
    losses = recipe.backward(*batch())
    assert hooks <= 1 and "loss" in losses
    assert all(
        loss.dim() == 0 and loss.isfinite() and not loss.requires_grad for loss in losses.values()
    )
    assert [module.training for module in model.modules()] == modes
    after = state(model)
    for key, value in before.items():
        if not key.startswith("batch_norm.") or key.endswith(("weight", "bias")):
            assert torch.equal(after[key], value) or name == "free_at", key
    assert (
        all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        or name == "free_at"
    )
    recipe.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="closed"):
        recipe.backward(*batch())


class Failing(Small):
    """Fails in its forward of the given number, or in that one's backward."""

    at, where, count = 0, "forward", 0

    def classify(self, x):
        self.count += 1
        if self.count == self.at and self.where == "forward":
            raise KeyError("of the model")
        logits = super().classify(x)
        if self.count == self.at:
            logits.register_hook(self.fail)
        return logits

    def fail(self, gradient):
        raise KeyError("of the model")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", recipes.NAMES)
def test_an_exception_leaves_the_model_as_it_was(name, where):
    forwards = COSTS[name][0]
    torch.manual_seed(3)
    model = Failing(0.3).double()
    recipe = build(name, model, sgd(model))
    for at in range(1, forwards + 1):
        before, modes = state(model), [module.training for module in model.modules()]
        buffers = {name: b.data_ptr() for name, b in model.named_buffers()}
        vars(model).update(at=at, where=where, count=0)
        with pytest.raises(KeyError, match="of the model"):
            recipe.backward(*batch())
        vars(model).update(at=0)
        after = state(model)
        for key, value in before.items():
            if not key.startswith("batch_norm.") and not key.endswith("gradient"):
                assert torch.equal(after[key], value) or name == "free_at", key
        assert [module.training for module in model.modules()] == modes and model.dropout.p == 0.3
        assert {name: b.data_ptr() for name, b in model.named_buffers()} == buffers
        assert all(p.grad is None for p in model.parameters())
        with torch.no_grad():
            assert not model.embedding(batch()[0]["ids"]).requires_grad  # the hook sleeps
        model.zero_grad()
    recipe.backward(*batch())  # and works again


@pytest.mark.parametrize("name", recipes.NAMES)
def test_scale_and_earlier_gradients(name):
    """scale multiplies the gradient only; what .grad held before is added to, and steers
    nothing (R5).
    """
    if name == "free_at":
        pytest.skip("it steps, and leaves no gradient")
    results = []
    for scale, start in ((1.0, 0.0), (torch.tensor(8.0), 0.0), (1.0, 3.0)):
        model = small()
        for p in model.parameters():
            p.grad = torch.full_like(p, start)
        recipe = build(name, model)
        torch.manual_seed(4)
        losses = recipe.backward(*batch(), scale=scale)
        results.append(
            (losses, {key: (p.grad - start) / scale for key, p in model.named_parameters()})
        )
    for losses, gradients in results[1:]:
        assert_equal(losses, results[0][0], rtol=1e-9, atol=1e-12)
        assert_equal(gradients, results[0][1], rtol=1e-7, atol=1e-10)


# which perturb the table itself
@pytest.mark.parametrize("name", [name for name in recipes.NAMES if name not in ("sam", "awp")])
def test_padding_is_not_perturbed(name):
    """What a mask hides is the same in every pass, whatever the padding does to the loss (R3)."""
    seen = []

    class Watching(Small):
        def classify(self, x):
            seen.append(x.detach().clone())
            return super().classify(x)

    torch.manual_seed(3)
    model = Watching().double()
    inputs, labels = batch()
    build(name, model, torch.optim.SGD(model.parameters(), lr=0.0)).backward(inputs, labels)
    hidden = inputs["attention_mask"] == 0
    for x in seen:
        for part in x.split(N):
            torch.testing.assert_close(part[hidden], seen[0][:N][hidden], rtol=0, atol=1e-12)


class Factor(Small):
    """Logits times a factor a sample, which makes gradients zero, tiny or infinite."""

    def forward(self, ids, attention_mask=None, factor=None):
        return self.classify(self.embedding(ids)) * factor[:, None]


@pytest.mark.parametrize("name", recipes.NAMES)
def test_zero_and_tiny_gradients(name):
    """A zero gradient perturbs nothing; a tiny one as much as any (R2)."""
    torch.manual_seed(3)
    model = Factor().double()
    inputs, labels = batch()
    for factor in (0.0, 1e-25):
        model.zero_grad()
        losses = build(name, model, sgd(model)).backward(
            inputs | {"factor": torch.full((N,), factor, dtype=torch.float64)}, labels
        )
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", recipes.NAMES)
@pytest.mark.parametrize("data", [batch, images], ids=["text", "images"])
def test_regression(name, data):
    """Squared error in the place of cross-entropy, squared differences in that of the
    divergences (R9).
    """
    model = small(0.0, classes=1) if data is batch else Images(1).double()

    def targets(step):
        return data(step)[0], torch.randn(
            N, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
        )

    inputs, values = targets(0)
    expected = F.mse_loss(
        copy.deepcopy(model)(**inputs if isinstance(inputs, dict) else {"x": inputs})[:, 0], values
    ).detach()
    losses, recipe = train(name, model, data=targets, task="regression")
    assert all(loss.isfinite() for each in losses for loss in each.values())
    torch.testing.assert_close(losses[0].get("clean_loss", expected), expected)
    recipe.close()


@pytest.mark.parametrize("name", recipes.NAMES)
@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "frozen embedding"])
def test_precision_and_frozen_embeddings(name, kind):
    model = Small(0.3)
    model.embedding.requires_grad_(kind != "frozen embedding")
    model = model.bfloat16() if kind == "bfloat16" else model
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        losses = build(name, model, sgd(model)).backward(*batch())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert (model.embedding.weight.grad is None) == (
        kind == "frozen embedding" or name == "free_at"
    )


MOVING = [
    ("sam", {"rho": 2.0}),
    ("sam", {"rho": 2.0, "adaptive": True}),
    ("awp", {"gamma": 0.9}),
    ("awp", {"gamma": 0.9, "steps": 1}),
    ("drop_attack", {"weights": "head.weight"}),
    ("drop_attack_k", {"weights": ("head.weight", "convolution.weight")}),
    ("free_at", {}),
    ("weight_consolidation", {}),
    ("weight_consolidation", {"form": "annealed", "gamma": 1.0}),
    ("child_tuning_d", {"target": "update", "names": "*"}),
    ("arat", {"steps": 1}),
]


@pytest.mark.parametrize("name, options", MOVING, ids=str)
def test_autocast_sees_the_weights_where_they_are(name, options):
    """Its casts of weights are kept until the region ends; as without them, whatever is called
    inside.
    """
    results = []
    for cache in (True, False):
        torch.manual_seed(3)
        model = Small()
        recipe = build(name, model, sgd(model), **options)
        losses = []
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            for step in range(2):
                model(**batch(step)[0])  # every weight is cast once
                losses.append(recipe.backward(*batch(step))["loss"])
                losses.append(model.eval()(**batch(step)[0]).detach().sum())
                model.train()
                recipe.before_step()
                losses.append(recipe.backward(*batch(step))["loss"])
                recipe.before_step()
                recipe.optimizer.step()
                torch.clear_autocast_cache()  # a step of torch's does not
                model(**batch(step)[0])
                recipe.after_step()
                losses.append(recipe.backward(*batch(step))["loss"])
        results.append(losses)
        recipe.close()
    assert results[0] == results[1]


class Blocks(nn.Module):
    """A block behind the embedding that activation checkpointing recomputes."""

    def __init__(self, reentrant):
        super().__init__()
        self.embedding, self.block, self.head = (
            nn.Embedding(WORDS, D),
            nn.Linear(D, D),
            nn.Linear(D, CLASSES),
        )
        self.reentrant = reentrant

    def forward(self, ids, attention_mask):
        x = checkpoint(
            lambda x: self.block(x).tanh(), self.embedding(ids), use_reentrant=self.reentrant
        )
        return self.head(x.mean(1))


# whose gradients that stop at the embedding torch refuses there
GRAD = ("pgd", "roast", "adv_embed", "sam", "awp", "arat")


@pytest.mark.parametrize("name", recipes.NAMES)
def test_reentrant_checkpointing_behind_a_frozen_embedding(name):
    results = []
    for reentrant in (False, True):
        torch.manual_seed(3)
        model = Blocks(reentrant).double()
        model.embedding.requires_grad_(False)
        recipe = build(name, model, sgd(model))
        torch.manual_seed(4)
        if reentrant and name in GRAD:
            with pytest.raises(RuntimeError, match="use_reentrant=True"):
                recipe.backward(*batch())
            return
        recipe.backward(*batch())
        results.append(state(model))
    assert_equal(results[1], results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["child_tuning_d", "roast"])
def test_saliency_behind_reentrant_checkpointing_is_not_lost(name):
    model = Blocks(True).double()
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        build(name, model, names=("block*", "head*")).prepare([batch()])


@pytest.mark.parametrize("name", recipes.NAMES)
def test_an_empty_batch(name):
    model = small()
    optimizer = sgd(model)
    recipe = build(name, model, optimizer)
    inputs, labels = batch()
    before, drawn = state(model), torch.get_rng_state()
    for empty in (
        {key: value[:0] for key, value in inputs.items()},
        inputs["ids"][:0],
        (inputs["ids"][:0],),
    ):
        with pytest.raises(ValueError, match="the batch is empty"):
            recipe.backward(empty, labels[:0])
    with pytest.raises(ValueError, match="the batch is empty"):
        recipe.backward(inputs["ids"][:0], labels)
    if hasattr(recipe, "prepare"):
        with pytest.raises(ValueError, match="the batch is empty"):
            recipe.prepare([(inputs, labels), (inputs["ids"][:0], labels[:0])])
        assert recipe.squares == [] and recipe.masks == []
    assert_equal(state(model), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), drawn) or hasattr(recipe, "prepare")
    recipe.backward(inputs, labels)  # and works again


@pytest.mark.parametrize("name", recipes.NAMES)
def test_mistakes_are_told_in_the_users_words(name):
    class Tokens(Small):
        def forward(self, ids, attention_mask=None):
            return self.head(self.layer_norm(self.embedding(ids)))

    model, (inputs, labels) = Tokens().double(), batch()
    with pytest.raises(
        ValueError,
        match=r"logits of shape \[4, 7, 3\].*\[N, C\].*token "
        r"classification",
    ):
        build(name, model, sgd(model)).backward(inputs, labels)
    model = small()
    for wrong, error, text in (
        (labels[:3], ValueError, "4 rows of logits for 3 labels|labels are for 3 rows"),
        (labels[:, None], ValueError, r"labels have shape \(4, 1\)"),
        (labels + 1.0, TypeError, "labels"),
        (labels + 7, ValueError, "labels hold"),
        (labels.tolist(), TypeError, "labels are a list"),
        (labels[0], ValueError, r"labels have shape \(\)"),
    ):
        with pytest.raises(error, match=text):
            build(name, model, sgd(model)).backward(inputs, wrong)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_dicts_with_logits(name):
    class Named(Small):
        def forward(self, ids, attention_mask=None):
            return {"logits": super().forward(ids)}

    results = []
    for kind in (Small, Named):
        torch.manual_seed(3)
        model = kind().double()
        recipe = build(name, model, sgd(model))
        torch.manual_seed(4)
        results.append(recipe.backward(*batch()))
    assert_equal(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, options",
    [("free_lb", {}), ("roast", {}), ("sam", {}), ("arat", {"steps": 1})],
    ids=lambda value: str(value),
)
def test_a_model_compiled_after_the_recipe_was_built(name, options):
    results = []
    for compiled in (False, True):
        model = small(0.0)
        torch.manual_seed(0)
        recipe = build(name, model, **options)
        if compiled:
            torch._dynamo.reset()
            model.compile(backend="eager")
        for step in range(2):
            model.zero_grad()
            torch.manual_seed(step)
            losses = recipe.backward(*batch(step))
        results.append((losses, state(model)))
    for actual, expected in zip(*results, strict=True):
        assert_equal(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_adaptive_dropout(name):
    model = Small(0.3)
    uk.replace_dropout(model)
    losses, _ = train(name, model)
    assert (
        all(loss.isfinite() for each in losses for loss in each.values())
        and model.dropout.pending.isfinite().all()
    )
    assert model.dropout.gradient_norm.max() > 0


def test_ascents_leave_the_norms_alone():
    """Nothing is dropped and next to nothing moved: each descent leaves what the plain loss
    leaves.
    """
    norms = []
    for each, given in (("plain", {}), ("sam", {"rho": 1e-9})):
        model = small(0.0)
        uk.replace_dropout(model)
        recipe = build(each, model, **given)
        for _ in range(2):
            recipe.backward(*batch())
        norms.append((model.dropout.gradient_norm, model.dropout.pending))
    for ascended, plain in zip(norms[1], norms[0], strict=True):
        torch.testing.assert_close(ascended, plain, rtol=1e-6, atol=0)


def test_what_a_held_pass_leaves_is_dropped():
    model = small(0.3)
    uk.replace_dropout(model)
    model(**batch()[0]).sum().backward()
    layer, before = model.dropout, (model.dropout.gradient_norm, model.dropout.pending)
    values = [tensor.clone() for tensor in before]
    with buffers_held(model):
        for step in range(2):
            model(**batch(step)[0]).sum().backward()
        assert layer.gradient_norm.all()
    assert layer.gradient_norm is before[0] and layer.pending is before[1]
    assert all(torch.equal(tensor, value) for tensor, value in zip(before, values, strict=True))


@pytest.mark.parametrize(
    "name, options",
    [("free_lb", {"adv_lr": 0.0, "init_mag": 0.0}), ("sam", {"rho": 0.0})],
    ids=["free_lb", "sam"],
)
def test_the_same_draw_of_adaptive_dropout(name, options):
    """Later passes drop the units that the first one dropped, though there are gradient norms
    in between.
    """
    losses = []
    for each, given in (("plain", {}), (name, options)):
        model = small()
        uk.replace_dropout(model)
        train("plain", model, steps=1)
        torch.manual_seed(6)
        losses.append(build(each, model, **given).backward(*batch())["loss"])
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_docstring(name):
    """One line that says what it is, and under 25 in all; the section of METHODS is named."""
    lines = getattr(recipes, name).__doc__.strip().splitlines()
    assert (
        lines[0].endswith((".", ")"))
        and len(lines) < 25
        and (name == "plain" or "METHODS" in lines[0])
    )


def test_an_optimizer_given_later_selects_by_itself():
    model = small()
    recipe = build("uegr", model, seed=5, threshold=0.05)
    recipe.optimizer = uk.SelectiveSGD(model.parameters(), lr=LR)
    recipe.backward(*batch())
    before = model.head.weight.grad.clone()
    recipe.before_step()
    assert torch.equal(model.head.weight.grad, before)
    assert (
        recipe.optimizer.param_groups[0]["threshold"],
        recipe.optimizer.param_groups[0]["seed"],
    ) == (0.05, 5)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_images(name):
    """embedding=None perturbs the input itself, within its range."""
    seen = []

    class Watching(Images):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    torch.manual_seed(3)
    model = Watching().double()
    losses, _ = train(name, model, data=images, input_range=(0.0, 1.0))
    assert all(loss.isfinite() for each in losses for loss in each.values())
    assert all(x.min() >= 0 and x.max() <= 1 for x in seen)


def test_at_on_images():
    x, labels = images()

    def restated(model):
        leaf = x.clone().requires_grad_()
        clean = F.cross_entropy(model(leaf), labels)
        clean.backward()
        adversarial = F.cross_entropy(model((x + 2.0 * unit(leaf.grad)).clamp(0, 1)), labels)
        adversarial.backward()
        return {"loss": clean + adversarial, "clean_loss": clean, "adversarial_loss": adversarial}

    torch.manual_seed(3)
    assert_same_steps(
        Images().double(),
        lambda model: build("at", model, epsilon=2.0, input_range=(0.0, 1.0)).backward(x, labels),
        restated,
    )


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


SHARDED = {  # what recipes of whole weights say to sharded ones
    "sam": (RuntimeError, "train whole ones"),
    "awp": (RuntimeError, "train whole ones"),
    "drop_attack": (RuntimeError, "train whole ones"),
    "child_tuning_d": (TypeError, "train with DDP"),
    "roast": (TypeError, "train with DDP"),
}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize(
    "name", ["l1", "at", "pgd", "free_lb", "r_at_su", "weight_consolidation", *SHARDED]
)
def test_sharded_parameters(process_group, name):
    plain, sharded = small(), small()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for module in (sharded.lstm, sharded.convolution, sharded):
        fully_shard(module, mesh=mesh)
    options = {
        "drop_attack": {"weights": "lstm.*"},
        "weight_consolidation": {"form": "penalty"},
    }.get(name, {})

    def train_one(model):
        optimizer = uk.SelectiveSGD(model.parameters(), lr=LR, seed=5)
        recipe = build(name, model, optimizer, **options)
        torch.manual_seed(6)
        for step in range(2):
            optimizer.zero_grad()
            losses = recipe.backward(*batch(step))
            recipe.before_step()
            optimizer.step()
            recipe.after_step()
        return losses, [p.full_tensor() if model is sharded else p for p in model.parameters()]

    if name in SHARDED:
        error, text = SHARDED[name]
        with pytest.raises(error, match=text):
            train_one(sharded)
        return
    (expected, weights), (losses, actual) = train_one(plain), train_one(sharded)
    assert_equal(losses, expected, rtol=1e-9, atol=1e-12)
    for x, y in zip(actual, weights, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def one_rank(rank, path):
    torch.set_num_threads(1)
    store, patience = torch.distributed.FileStore(path, 2), datetime.timedelta(minutes=3)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=patience
    )
    try:
        for name in recipes.NAMES:
            for inside in (False, True):
                one_recipe(name, rank, inside)
    finally:
        torch.distributed.destroy_process_group()


class Wrapper(nn.Module):
    """Somebody's module around the model."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


def one_recipe(name, rank, inside):
    """Under DDP, or with DDP inside another module, beside the same recipe on a plain model
    whose gradients are averaged by hand.
    """
    given = {
        "arat": {"steps": 2},
        "awp": {"epsilon": 0.5, "steps": 1},
        "drop_attack_k": {"weights": "*lstm.*", "steps": 2},
    }
    options = given.get(name, {})
    plain = small()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    inner, reductions = wrapped.module, []

    def note(state, bucket, reductions=reductions):
        reductions.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, note)
    optimizer = sgd(wrapped)
    torch.manual_seed(0)
    of_plain = build(name, plain, sgd(plain), **options)
    torch.manual_seed(rank)  # what the recipe draws when it is built must not part the ranks
    recipe = getattr(recipes, name)(
        Wrapper(wrapped) if inside else wrapped, inner.embedding, optimizer, **options
    )
    for step in range(2):
        data = batch(2 * step + rank)
        optimizer.zero_grad()
        # FreeAT steps by itself, AWP ascends with all ranks' gradients, ARAT has weights of its
        # own, which step.
        compared = name not in ("free_at", "awp") and not (name == "arat" and step)
        if compared:
            plain.load_state_dict(inner.state_dict())
            plain.zero_grad()
            torch.manual_seed(10 + rank)
            expected = of_plain.backward(*data)
            expected_gradient = torch.cat([p.grad.flatten() for p in plain.parameters()])
            torch.distributed.all_reduce(expected_gradient)
        reductions.clear()
        torch.manual_seed(10 + rank)
        losses = recipe.backward(*data)
        assert sum(reductions) == (3 if name == "free_at" else 1) * sum(
            p.numel() for p in inner.parameters()
        ), (name, reductions)
        if compared:
            assert_equal(losses, expected, rtol=1e-9, atol=1e-12)
            gradient = torch.cat([p.grad.flatten() for p in inner.parameters()])
            assert torch.allclose(gradient, expected_gradient / 2, rtol=1e-9, atol=1e-12), (
                f"{name}: another gradient"
            )
        recipe.before_step()
        optimizer.step()
        recipe.after_step()
        recipe.epoch_end()
        own = recipe.parameters() if name == "arat" else []
        here = torch.cat([p.detach().flatten() for p in (*inner.parameters(), *own)])
        there = [torch.empty_like(here) for _ in range(2)]
        torch.distributed.all_gather(there, here)
        assert torch.equal(*there), f"{name}: the ranks have parted"
    if name != "free_at":
        reductions.clear()
        with wrapped.no_sync():
            recipe.backward(*data)
        assert not reductions and wrapped.require_backward_grad_sync, name
    recipe.close()


def test_under_ddp_only_the_last_backward_synchronises(tmp_path):
    """Two processes: this one and another."""
    path = str(tmp_path / "store")
    other = torch.multiprocessing.get_context("spawn").Process(target=one_rank, args=(1, path))
    other.start()
    try:
        one_rank(0, path)
        other.join()
        assert other.exitcode == 0
    finally:
        other.kill()


@pytest.mark.parametrize("name", recipes.NAMES)
def test_resume(name):
    """Two steps, a checkpoint, two more: as four steps at once, bit for bit."""

    def four(interrupted):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        recipe = build(name, model, optimizer)
        for step in range(4):
            if step == 2 and interrupted:
                saved = copy.deepcopy(
                    [model.state_dict(), optimizer.state_dict(), recipe.state_dict()]
                )
                random = torch.get_rng_state()
                recipe.close()
                model = small()
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
                recipe = build(name, model, optimizer)
                for each, content in zip((model, optimizer, recipe), saved, strict=True):
                    each.load_state_dict(content)
                torch.set_rng_state(random)
            optimizer.zero_grad()
            recipe.backward(*batch(step))
            recipe.before_step()
            optimizer.step()
            recipe.after_step()
            if step == 0:
                recipe.epoch_end()
        return model.state_dict()

    torch.manual_seed(9)
    whole = four(False)
    torch.manual_seed(9)
    assert_equal(four(True), whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_wrong_options(name):
    model = small()
    for options, error, text in (
        ({"no_such_option": 1}, TypeError, "no option 'no_such_option'; its options are"),
        ({"task": "ranking"}, ValueError, "task='ranking'"),
        ({"backend": "fast"}, ValueError, "backend='fast'"),
        ({"input_range": (0.0, 1.0)}, ValueError, "embedding=None"),
    ):
        with pytest.raises(error, match=text):
            build(name, model, **options)
    with pytest.raises(TypeError, match="optimizer is a float"):
        build(name, model, 0.1)
    with pytest.raises(ValueError, match="not a module of model"):
        getattr(recipes, name)(model, nn.Embedding(2, 2))
    with pytest.raises(ValueError, match="recipe"):
        build(name, model).load_state_dict({"recipe": "other"})
    model = small()
    with contextlib.suppress(TypeError):
        build(name, model, no_such_option=1)
    assert not model.embedding._forward_hooks


@pytest.mark.parametrize(
    "name, options, error, text",
    [
        ("l1", {"weight": -1.0}, ValueError, "weight=-1.0"),
        ("at", {"epsilon": -1.0}, ValueError, "epsilon=-1.0"),
        ("at", {"norm": "l3"}, ValueError, "norm='l3'"),
        ("at", {"clean_weight": "one"}, TypeError, "clean_weight='one'"),
        ("at", {"dropout": 1.5}, ValueError, "dropout=1.5"),
        ("at", {"relative": 1}, TypeError, "relative=1"),
        ("pgd", {"steps": 0}, ValueError, "steps=0"),
        ("pgd", {"step_size": -1.0}, ValueError, "step_size=-1.0"),
        ("pgd", {"random_start": 1}, TypeError, "random_start=1"),
        (
            "pgd",
            {"first_step_from_clean": True, "random_start": True},
            ValueError,
            "first_step_from_clean",
        ),
        ("adv_embed", {"per": "word"}, ValueError, "per='word'"),
        ("free_at", {"steps": 0}, ValueError, "steps=0"),
        ("free_at", {"norm": "max"}, ValueError, "norm='max'"),
        ("free_lb", {"adv_lr": -1.0}, ValueError, "adv_lr=-1.0"),
        ("free_lb", {"same_draw": None}, TypeError, "same_draw=None"),
        ("drop_attack", {"keep_probability": 1.5}, ValueError, "keep_probability=1.5"),
        (
            "drop_attack",
            {"weights": ("lstm.weight_ih",)},
            ValueError,
            "'lstm.weight_ih' matches no trainable parameter",
        ),
        ("drop_attack", {"attack_input": False}, ValueError, "attack_input=False"),
        ("drop_attack_k", {"steps": 0}, ValueError, "steps=0"),
        ("sam", {"rho": -0.1}, ValueError, "rho=-0.1"),
        ("awp", {"gamma": "a"}, TypeError, "gamma='a'"),
        ("awp", {"warmup_epochs": -1}, ValueError, "warmup_epochs=-1"),
        ("child_tuning_f", {"keep_probability": 0.0}, ValueError, "keep_probability"),
        ("child_tuning_f", {"target": "update"}, ValueError, "target='update'"),
        ("child_tuning_d", {"keep_probability": 0.0}, ValueError, "keep_probability=0"),
        ("child_tuning_d", {"names": "*bert*"}, ValueError, "matches no trainable parameter"),
        ("roast", {"form": "book"}, ValueError, "form='book'"),
        ("roast", {"sharpness": -1.0}, ValueError, "sharpness=-1.0"),
        ("roast", {"names": [1]}, TypeError, "1 is a int"),
        ("weight_consolidation", {"kappa": -1.0}, ValueError, "kappa=-1.0"),
        ("weight_consolidation", {"form": "linear"}, ValueError, "form='linear'"),
        ("weight_consolidation", {"names": "head"}, ValueError, "'head' matches no"),
        ("arat", {"layers": ("lstm",)}, ValueError, "names a LSTM"),
        ("arat", {"layers": ("norm",)}, ValueError, "'norm', which is no module"),
        ("arat", {"clean_weight": 1.0}, ValueError, "give both"),
        ("arat", {"split": None}, TypeError, "split=None"),
        ("r_drop", {"alpha": -1.0}, ValueError, "alpha=-1.0"),
        ("r_at", {"reduction": "none"}, ValueError, "reduction='none'"),
        ("r_at_su", {"threshold": None}, TypeError, "threshold"),
        ("uegr", {"threshold": "high"}, TypeError, "threshold"),
        ("uegr", {"normalization": "max"}, ValueError, "normalization='max'"),
        ("uegr", {"seed": 1.0}, TypeError, "seed=1.0"),
    ],
    ids=str,
)
def test_wrong_values(name, options, error, text):
    model = small()
    with pytest.raises(error, match=text):
        build(name, model, sgd(model), **options)
    assert not model.embedding._forward_hooks


# The example


def test_the_example_on_sentence_similarity(tmp_path, capsys):
    for part in ("train", "test"):
        lines = [
            f"{score:.3f}\tA man eats {word} ||| A man eats rice\n"
            for score, word in zip((0, 1, 2, 5), "abcd", strict=True)
        ]
        with gzip.open(tmp_path / f"{part}.tsv.gz", "wt") as file:
            file.writelines(["label\ttext\n", *lines * 3])
    example = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "examples" / "stsb.py"))
    pearson, spearman = example["main"](
        [str(tmp_path), "--recipe", "r_at", "--epochs", "8", "--batch", "4"]
    )
    assert pearson > 0.9 and spearman > 0.9
    assert capsys.readouterr().out.startswith("epoch 1: loss ")


@pytest.mark.parametrize("name", ["child_tuning_d", "roast", "weight_consolidation"])
def test_a_step_that_a_loss_scaler_skips_leaves_no_trace(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    )
    ids, labels = torch.randint(0, 9, (8, 3)), torch.randint(0, 2, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = getattr(uk.recipes, name)(model, model[0], optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(6):
        optimizer.zero_grad()
        recipe.backward(ids, labels, scale=scaler.scale(torch.ones(())))
        if i == 2:
            for p in model.parameters():
                p.grad.fill_(float("inf"))
        before = [p.detach().clone() for p in model.parameters()]
        scaler.unscale_(optimizer)
        recipe.before_step()
        scaler.step(optimizer)
        scaler.update()
        recipe.after_step()
        if i == 2:
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    recipe.epoch_end()
    if hasattr(recipe, "masks"):
        assert 0 < torch.cat([(mask != 0).float().flatten() for mask in recipe.masks]).mean() < 1


# Adaptive dropout that UEGR lends


class Many(Small):
    """Dropouts of several kinds and places: one module twice, one that is adaptive already,
    one that is out of the registry.
    """

    def __init__(self):
        super().__init__(0.3)
        self.shared = self.again = nn.Dropout(0.2)
        self.own = uk.AdaptiveDropout(p=0.1)
        self.channels = nn.Dropout1d(0.1)
        self.aside = [self.shared]

    def classify(self, x):
        return super().classify(self.again(self.own(self.aside[0](self.channels(x)))))


def many():
    torch.manual_seed(3)
    return Many().double()


def all_of(model):
    """Every module with its place, its class, and what it is made of."""
    named = model.named_modules(remove_duplicate=False)
    return [
        (
            name,
            module,
            type(module),
            {key: value for key, value in vars(module).items() if key != "training"},
        )
        for name, module in named
    ]


def assert_same_modules(model, before):
    after = all_of(model)
    assert [row[:3] for row in after] == [row[:3] for row in before]
    for (*_, state), (_, module, _, was) in zip(after, before, strict=True):
        assert state.keys() == was.keys() or isinstance(module, uk.AdaptiveDropout)


def step_of(recipe, step=0):
    torch.manual_seed(step)
    recipe.optimizer.zero_grad()
    losses = recipe.backward(*batch(step))
    recipe.before_step()
    recipe.optimizer.step()
    recipe.after_step()
    return losses


def test_uegr_lends_adaptive_dropout_and_takes_it_back():
    model = many()
    before, keys = all_of(model), model.state_dict().keys()
    recipe = build("uegr", model, sgd(model), seed=0)
    assert (
        not any(type(module) is nn.Dropout for module in model.modules())
        and type(model.channels) is nn.Dropout1d
    )
    assert (
        isinstance(model.dropout, uk.AdaptiveDropout)
        and model.again is model.shared
        and (model.dropout.p, model.shared.p) == (0.3, 0.2)
    )
    for step in range(3):
        step_of(recipe, step)
    assert (
        model.dropout.gradient_norm.all()
        and model.shared.gradient_norm.shape == (D,)
        and model.own.gradient_norm.all()
    )
    assert model.state_dict().keys() == keys and "own._extra_state" in keys
    assert set(recipe.state_dict()["adaptive_dropout"]) == {"dropout", "shared"}
    model.dropout.p = 0.4
    model.eval()
    recipe.close()
    recipe.close()
    assert_same_modules(model, before)
    assert model.dropout.p == 0.4 and not model.dropout.training and not model.shared.training
    with pytest.raises(RuntimeError, match="closed"):
        recipe.backward(*batch())


@pytest.mark.parametrize("wrapped", [False, True])
def test_lent_dropout_is_resumed_exactly(wrapped, tmp_path):
    """Under the names of the plain model, wrapped or not."""

    def train(first, last, start=None):
        model = many()
        recipe = recipes.uegr(
            Through(model) if wrapped else model, model.embedding, sgd(model), seed=0
        )
        if start is not None:
            model.load_state_dict(start["model"])
            recipe.load_state_dict(start["recipe"])
        for step in range(first, last):
            step_of(recipe, step)
        return {"model": copy.deepcopy(model.state_dict()), "recipe": recipe.state_dict()}

    whole = train(0, 5)
    torch.save(train(0, 2), tmp_path / "state.pt")
    again = train(2, 5, torch.load(tmp_path / "state.pt", weights_only=True))
    assert_equal(again["model"], whole["model"], rtol=0, atol=0)
    assert_equal(
        again["recipe"]["adaptive_dropout"], whole["recipe"]["adaptive_dropout"], rtol=0, atol=0
    )
    assert set(whole["recipe"]["adaptive_dropout"]) == {"dropout", "shared"}


class Through(nn.Module):
    """A wrapper whose model is called `module`, as DDP's."""

    def __init__(self, wrapped):
        super().__init__()
        self.module = wrapped

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_names_are_the_plain_models_whatever_wraps_its_parts():
    def wrapped():
        plain = small()
        plain.layer_norm, plain.dropout = (
            checkpoint_wrapper(plain.layer_norm),
            torch.compile(checkpoint_wrapper(plain.dropout)),
        )
        return nn.Sequential(torch.compile(plain)), plain

    outer, model = wrapped()
    recipe = recipes.uegr(outer, model.embedding, seed=0)
    assert list(recipe.adaptive_dropout) == ["0.dropout"]
    outer, model = wrapped()
    recipes.child_tuning_d(outer, model.embedding, names="0.layer_norm.weight")


def test_lent_dropout_remembers_that_it_turned_plain():
    class Attending(Small):
        """Drops its attention's probabilities, [N, T, T]."""

        def classify(self, x):
            weights = self.attention((x @ x.transpose(1, 2)).softmax(2))
            return super().classify(weights @ x)

    def attending():
        torch.manual_seed(3)
        model = Attending(0.3)
        model.attention = nn.Dropout(0.2)
        return model.double()

    def short(recipe, width, seed):
        torch.manual_seed(seed)
        inputs, labels = batch(seed)
        recipe.backward({key: value[:, :width] for key, value in inputs.items()}, labels)

    model = attending()
    recipe = build("uegr", model, seed=0)
    short(recipe, 7, 0)
    with pytest.warns(UserWarning, match=r"^attention: the last axis had size 7") as found:
        short(recipe, 5, 1)
        short(recipe, 6, 2)
    assert sum("last axis" in str(each.message) for each in found) == 1
    twin = attending()
    twin.load_state_dict(model.state_dict())
    other = build("uegr", twin, seed=0)
    other.load_state_dict(recipe.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each, of in ((recipe, model), (other, twin)):
            of.zero_grad()
            short(each, 7, 3)
    assert_equal(state(twin), state(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"js_weigth": 1.0},
        {"passes": 0},
        {"threshold": "high"},
        {"backend": "rocm"},
        {"adaptive_dropout": 1},
        {"normalization": "max"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_wrong_option_leaves_the_dropouts(options):
    model = many()
    before = all_of(model)
    with pytest.raises((TypeError, ValueError)):
        build("uegr", model, sgd(model), **options)
    assert_same_modules(model, before)


def test_an_exception_in_a_pass_leaves_the_dropouts_to_close():
    torch.manual_seed(3)
    model = Failing(0.3).double()
    vars(model).update(at=2, where="backward", count=0)
    before = all_of(model)
    recipe = build("uegr", model)
    with pytest.raises(KeyError, match="of the model"):
        recipe.backward(*batch())
    vars(model).update(at=0)
    recipe.backward(*batch())
    recipe.close()
    assert_same_modules(model, before)


def test_two_recipes_share_the_dropouts():
    model = many()
    before = all_of(model)
    first, second = build("uegr", model, seed=0), build("uegr", model, seed=0)
    first.backward(*batch())
    first.close()
    second.backward(*batch())
    assert second.state_dict()["adaptive_dropout"]["dropout"][0].any()  # folded by the second
    second.close()
    first.close()
    assert_same_modules(model, before)


def test_a_dropout_that_does_something_else_stays():
    class Own(nn.Dropout):
        def forward(self, x):
            return x

    class Named(nn.Dropout):
        def set_rate(self, p):
            self.p = p

    model = small()
    model.dropout, model.other = Named(0.2), Own(0.2)
    recipe = build("uegr", model)
    assert isinstance(model.dropout, uk.AdaptiveDropout) and type(model.other) is Own
    model.dropout.set_rate(0.4)
    recipe.backward(*batch())
    assert recipe.state_dict()["adaptive_dropout"]["dropout"].shape == (3, 6)
    assert type(copy.deepcopy(model).dropout) is Named
    recipe.close()
    assert type(model.dropout) is Named and model.dropout.p == 0.4


def test_the_state_of_other_dropouts_is_refused():
    state = build("uegr", many(), seed=0).state_dict()
    model = small()
    recipe = build("uegr", model, seed=1)
    for wrong, message in (
        (state, "of the dropouts .*'dropout', 'shared'.*the model's are .*'dropout'"),
        (
            {key: value for key, value in state.items() if key != "adaptive_dropout"},
            "adaptive_dropout=False; build it so",
        ),
        (state | {"adaptive_dropout": {"dropout": torch.zeros(2)}}, r"a floating tensor \[3, F\]"),
        (state | {"adaptive_dropout": None}, "of the dropouts None"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.load_state_dict(wrong)
        assert recipe.selection["seed"] == 1
    with pytest.raises(ValueError, match="load it into the recipe that gave it"):
        build("uegr", small(), adaptive_dropout=False).load_state_dict(state)


def test_a_copy_of_the_model_in_the_midst():
    """As for an average of the weights: its keys are the plain model's, and in eval mode it is
    the same function.
    """
    model = many()
    recipe = build("uegr", model, sgd(model), seed=0)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for step in range(2):
        step_of(recipe, step)
        average.update_parameters(model)
    plain = many()
    plain.load_state_dict(average.module.state_dict())
    ids = batch()[0]["ids"]
    assert torch.equal(plain.eval()(ids), average.eval()(ids))
    recipe.close()


@pytest.mark.parametrize("name", recipes.NAMES)
def test_copies_and_pickles_in_the_midst(name, tmp_path):
    """They have the model's own modules, which no close() would give back to them, and train on."""
    model = small()
    model.dropout.register_forward_hook(noted)
    recipe = build(name, model, sgd(model))
    step_of(recipe)
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), copy.copy(model.dropout), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    assert [
        type(each) for each in (copies[0].dropout, copies[1], copies[2].dropout, copies[3].dropout)
    ] == [nn.Dropout] * 4
    ids = batch()[0]["ids"]
    for each in (copies[0], *copies[2:]):
        assert each.dropout.p == 0.3 and list(each.dropout._forward_hooks.values()) == [noted]
        assert torch.equal(each.eval()(ids), model.eval()(ids))
        step_of(build(name, each.train(), sgd(each)))
    step_of(recipe)
    recipe.close()
    assert vars(model.dropout).keys() == vars(copies[1]).keys()


def noted(module, args, output):
    pass


def test_the_state_after_close_is_the_last():
    recipe = build("uegr", model := many(), sgd(model), seed=0)
    step_of(recipe)
    before = recipe.state_dict()
    for _ in range(2):
        recipe.close()
        after = recipe.state_dict()["adaptive_dropout"]
        assert_equal(after, before["adaptive_dropout"], rtol=0, atol=0)
    assert after["dropout"].any()
    build("uegr", many(), seed=0).load_state_dict(before)


def test_free_at_does_not_step_ranks_apart(process_group):
    model = small()
    recipe = recipes.free_at(
        wrapped := nn.parallel.DistributedDataParallel(model), model.embedding, sgd(model)
    )
    before = state(model)
    with wrapped.no_sync(), pytest.raises(RuntimeError, match="no_sync"):
        recipe.backward(*batch())
    assert_equal(state(model), before, rtol=0, atol=0)
    recipe.backward(*batch())


def test_arats_state_loads_with_weights_only_whatever_the_inputs_are(tmp_path):
    recipe = build("arat", model := small(), sgd(model), steps=1)
    inputs, labels = batch()
    recipe.backward(collections.UserDict(inputs), labels)
    torch.save(recipe.state_dict(), tmp_path / "recipe.pt")
    kept = torch.load(tmp_path / "recipe.pt", weights_only=True)["recent"]
    assert_equal(kept[0][0], inputs, rtol=0, atol=0)


def test_lent_dropout_compiles():
    model = small()
    recipe = build("uegr", model, seed=0)
    model.compile(backend="aot_eager")
    for step in range(3):
        recipe.backward(*batch(step))
    assert model.dropout.gradient_norm.all()
    recipe.close()
    assert type(model.dropout) is nn.Dropout and model(batch()[0]["ids"]).shape == (N, CLASSES)


def test_a_model_compiled_before_is_refused():
    torch._dynamo.reset()
    model = torch.compile(small(), backend="aot_eager")
    model(**batch()[0])
    before = all_of(model)
    recipe = build("uegr", model)
    with pytest.raises(RuntimeError, match="build this before compiling"):
        recipe.backward(*batch())
    recipe.close()
    assert_same_modules(model, before)


@pytest.mark.parametrize("kind", MODELS)
def test_the_models_here_train_with_lent_dropout(kind):
    torch.manual_seed(3)
    model = MODELS[kind](WORDS, CLASSES, dimension=8)
    recipe = build("uegr", model, torch.optim.AdamW(model.parameters(), lr=0.01), seed=0)
    for length in (7, 5, 9, 6):
        ids = torch.randint(1, WORDS, (N, length))
        recipe.optimizer.zero_grad()
        losses = recipe.backward({"ids": ids}, torch.randint(CLASSES, (N,)))
        recipe.before_step()
        recipe.optimizer.step()
        assert losses["loss"].isfinite()
    states = recipe.state_dict()["adaptive_dropout"]
    assert "dropout" in states and all(
        each[0].any() and not each[2].any() for each in states.values()
    )


NUMBERS = [
    (name, option)
    for name in uk.recipes.NAMES
    for option, parameter in inspect.signature(getattr(uk.recipes, name)).parameters.items()
    if type(parameter.default) is float
]


@pytest.mark.parametrize("name, option", NUMBERS, ids=lambda value: value)
def test_numbers_are_taken_by_one_rule(name, option):
    """A fraction works as the same float does: what a recipe keeps is a number of Python's."""
    losses = []
    for value in (0.5, fractions.Fraction(1, 2), numpy.float32(0.5)):
        torch.manual_seed(0)
        embedding = nn.Embedding(9, 4)
        model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(8, 3))
        recipe = getattr(uk.recipes, name)(
            model, embedding, torch.optim.SGD(model.parameters(), lr=0.1), **{option: value}
        )
        losses.append(recipe.backward(torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 1])))
        recipe.before_step()
        recipe.after_step()
        recipe.close()
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], equal_nan=True)
    for bad in ("1", True, 1j, torch.tensor(0.5)):
        with pytest.raises(TypeError, match=f"{option}="):
            getattr(uk.recipes, name)(
                model, embedding, torch.optim.SGD(model.parameters(), lr=0.1), **{option: bad}
            )
