"""Small models and batches, and the words in which the methods' numbered steps are spelt out with
torch's own functions.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from uegr_kernels import recipes

N, T, WORDS, D, CLASSES = 4, 7, 30, 6, 3


LR = 0.1


class Small(nn.Module):
    """Has embedding, LSTM, convolution, BatchNorm, mean over time (padding included), LayerNorm,
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
    """Has a small convolutional net over images in [0, 1]."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.batch_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)

    def classify(self, x):
        return self.head(self.batch_norm(self.convolution(x)).relu().mean((2, 3)))

    def forward(self, x):
        return self.classify(x)


def skip_without_autocast_lstm():
    """Skips where torch itself cannot run an LSTM under autocast: oneDNN has none in bfloat16 for
    processors without AVX-512.
    """
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nn.LSTM(D, 5)(torch.zeros(T, N, D))
    except RuntimeError as error:
        pytest.skip(f"torch cannot run an LSTM under autocast here: {str(error).splitlines()[0]}")


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
    """Gives the recipe of this name, on the model's embedding."""
    return getattr(recipes, name)(model, getattr(model, "embedding", None), *more, **options)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LR)


def state(model):
    """Gives all that a call may change in the model."""
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
    """Checks that both leave the same gradients, weights, buffers and random state, and return the
    same losses.
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


class Steps:
    """Steps one batch and one model, in the words of docs/methods.md: e, CE, N2; what a method's
    numbered steps are made of.
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
        """Gives the loss of the clean pass, which goes backward, and g."""
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
        """Gives d CE / d delta of a pass that leaves weights and BatchNorm's statistics alone."""
        statistics = {name: b.clone() for name, b in self.model.named_buffers()}
        delta = delta.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.loss(self.model.classify(self.embedded() + delta)), delta)
        for name, b in self.model.named_buffers():
            b.data = statistics[name]
        return self.masked(g)


def unit(g):
    return F.normalize(g.flatten(1), dim=1).view_as(g)


UNITS = {
    "l2": unit,
    "token": lambda g: F.normalize(g, dim=-1),
    "all": lambda g: F.normalize(g.flatten(), dim=0).view_as(g),
    "linf": torch.sign,
}


def ball(delta, radius, kind):
    if kind in ("linf", "max"):
        return delta.clamp(-radius, radius)
    return delta * (radius / delta.flatten(1).norm(dim=1)).clamp(max=1).view(
        -1, *[1] * (delta.dim() - 1)
    )


@contextlib.contextmanager
def draw_of(drawn, same):
    """Gives the random state that the first pass found, and afterwards the one there was."""
    present = torch.get_rng_state()
    if not drawn or not same:
        drawn.append(present)
        yield
        return
    torch.set_rng_state(drawn[0])
    yield
    torch.set_rng_state(present)


def per_token(g):
    largest = g.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, g / largest, 0)


def cube(steps, size):
    """Gives FreeLB's random start."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    noise = 2 * torch.rand(N, T, D, dtype=torch.float64, generator=generator) - 1
    return steps.masked(noise) * size / (steps.mask.sum(1) * D).sqrt()[:, None, None]


@contextlib.contextmanager
def moved(weights, by):
    """Moves the weights by `by`, and back."""
    before = [w.detach().clone() for w in weights]
    for w, v in zip(weights, by, strict=True):
        w.data = w.data + v
    yield
    for w, copied in zip(weights, before, strict=True):
        w.data = copied


def divergence(first, second, reduction="mean"):
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    kind = {"mean": "batchmean", "sum": "sum"}[reduction]
    return (
        F.kl_div(log_q, log_p, log_target=True, reduction=kind)
        + F.kl_div(log_p, log_q, log_target=True, reduction=kind)
    ) / 2


def run(name, model, **options):
    torch.manual_seed(6)
    losses = build(name, model, sgd(model), **options).backward(*batch())
    return losses, {key: p.grad for key, p in model.named_parameters()}


# forwards, backwards, and how often those reach the parameters, where two of them may run in
# one call
COSTS = {
    "plain": (1, 1, 1),
    "l1": (1, 1, 1),
    "l2": (1, 1, 1),
    "at": (2, 2, 2),
    "fgsm": (2, 2, 2),
    # K = 3
    "pgd": (5, 5, 2),
    "free_at": (3, 3, 3),
    "free_lb": (3, 3, 3),
    "r_drop": (2, 2, 1),
    "r_at": (3, 3, 2),
    "r_at_su": (3, 3, 2),
    # of N and of 2N rows
    "uegr": (2, 2, 2),
    "drop_attack": (2, 2, 2),
    # K = 3
    "drop_attack_k": (4, 4, 4),
    "child_tuning_f": (1, 1, 1),
    "child_tuning_d": (1, 1, 1),
    "roast": (3, 3, 1),
    "weight_consolidation": (1, 1, 1),
    # K = 10
    "arat": (12, 12, 2),
    "adv_embed": (3, 3, 2),
    "sam": (2, 2, 1),
    "awp": (2, 2, 1),
}


def train(name, model, *, steps=2, optimizer=None, data=batch, **options):
    """Takes a few steps with everything called; returns the losses and the recipe."""
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


def step_of(recipe, step=0):
    torch.manual_seed(step)
    recipe.optimizer.zero_grad()
    losses = recipe.backward(*batch(step))
    recipe.before_step()
    recipe.optimizer.step()
    recipe.after_step()
    return losses
