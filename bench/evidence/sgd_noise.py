"""Compares SGD's covariance: simulated on a small quadratic, and measured over many runs of a small
model on text, beside its closed forms.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn import functional as F

import uegr_kernels as uk
from uegr_kernels.models import TextClassifier

# Of the quadratic: neither commutes with the other.
HESSIAN = torch.tensor([[1.0, 0.4, 0.0], [0.4, 0.5, 0.1], [0.0, 0.1, 0.2]], dtype=torch.float64)
NOISE = torch.tensor([[1.0, -0.3, 0.2], [-0.3, 0.6, 0.0], [0.2, 0.0, 0.8]], dtype=torch.float64)
STEPS, EVERY = 120, 8
# steps at each learning rate, then the options
CASES: dict[str, dict[str, Any]] = {
    "learning rate 0.2": {"rates": (0.2,)},
    "0.2, then 0.02": {"rates": (0.2, 0.02)},
    "0.05, momentum 0.9": {"rates": (0.05,), "momentum": 0.9},
    "0.2, selective, p = 0.3": {"rates": (0.2,), "keep_probability": 0.3},
}
# of the attack on the small model
EPSILON = 0.5
# of the small model at most: a covariance of selective SGD takes the fourth power of it
PARAMETERS = 30


def quadratic(
    case: dict[str, Any], chains: int
) -> tuple[dict[int, float], dict[int, float], float]:
    """Returns tr S by step of chains that start at 0: the closed form, the simulation by the
    optimizer itself, and the stationary closed form.

    Each learning rate has its share of the steps.
    """
    rates, momentum, keep = (
        case["rates"],
        case.get("momentum", 0.0),
        case.get("keep_probability", 1.0),
    )
    theta = nn.Parameter(torch.zeros(chains, len(HESSIAN), dtype=torch.float64))
    optimizer = sgd([theta], rates[0], keep, momentum)
    generator, root = torch.Generator().manual_seed(0), torch.linalg.cholesky(NOISE)
    options = {"momentum": momentum, "keep_probability": keep}
    closed, simulated, start = {0: 0.0}, {0: 0.0}, torch.zeros_like(HESSIAN)
    each = STEPS // len(rates)
    for i, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        for step in range(1, each + 1):
            theta.grad = (
                theta.detach() @ HESSIAN
                + torch.randn(theta.shape, generator=generator, dtype=theta.dtype) @ root.T
            )
            optimizer.step()
            covariance = uk.analysis.sgd_covariance(
                HESSIAN, NOISE, lr, steps=step, initial=start, **options
            )
            closed[i * each + step] = covariance.trace().item()
            if step % EVERY == 0:
                simulated[i * each + step] = torch.cov(theta.detach().T).trace().item()
        start = covariance
    return (
        closed,
        simulated,
        uk.analysis.sgd_covariance(HESSIAN, NOISE, rates[-1], **options).trace().item(),
    )


def sgd(
    parameters: list[nn.Parameter], lr: float, keep: float, momentum: float = 0.0
) -> torch.optim.Optimizer:
    """Returns SGD, plain or selective with one probability for all and rescaling."""
    if keep == 1:
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    seed = int(torch.randint(2**62, ()))
    return uk.SelectiveSGD(
        parameters,
        lr=lr,
        momentum=momentum,
        normalization="constant",
        keep_probability=keep,
        seed=seed,
    )


class Bag(TextClassifier):
    """Classifies by the mean of the word vectors, linear: few enough weights for whole Hessians."""

    def __init__(self, words: int, classes: int) -> None:
        super().__init__(words, max(1, PARAMETERS // classes - 1))
        self.linear = nn.Linear(self.embedding.embedding_dim, classes)

    def classify(self, x: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.pool(x, mask))
        return logits

    def pool(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = mask.to(x.dtype)[..., None]
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1)

    @property
    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.linear.parameters()])

    @flat.setter
    def flat(self, values: Tensor) -> None:
        torch.nn.utils.vector_to_parameters(values, self.linear.parameters())


Batch = tuple[dict[str, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Training:
    """Holds how the small model's linear layer is trained by SGD, over batches drawn with
    replacement.

    keep     the probability that an element is updated;  epsilon  of FGM, under which the loss is
        taken (AT); 0: the clean loss
    deviation  standard deviation of the weights at the start
    The second half of the epochs runs at a tenth of the learning rate.
    """

    epochs: int
    keep: float = 1.0
    epsilon: float = 0.0
    batch: int = 16
    lr: float = 1.0
    deviation: float = 0.1

    def rate(self, epoch: int) -> float:
        return self.lr if epoch < self.epochs // 2 else self.lr / 10


def embed(model: Bag, batches: Callable[[Tensor], Batch], rows: int, epochs: int) -> None:
    """Trains the whole model by AdamW on clean texts, and freezes its word vectors."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for chosen in torch.randperm(rows).split(16):
            inputs, labels = batches(chosen)
            optimizer.zero_grad()
            F.cross_entropy(model(**inputs), labels).backward()
            optimizer.step()
    model.embedding.weight.requires_grad_(False)


def chain(
    model: Bag, batches: Callable[[Tensor], Batch], rows: int, how: Training, seed: int
) -> Tensor:
    """Returns the weights [epochs + 1, D] of one run."""
    torch.manual_seed(seed)
    model.flat = how.deviation * torch.randn(len(model.flat))
    optimizer = sgd(list(model.linear.parameters()), how.lr, how.keep)
    recipe = uk.recipes.at(model, model.embedding, optimizer, epsilon=how.epsilon, clean_weight=0.0)
    found = [model.flat]
    for epoch in range(how.epochs):
        optimizer.param_groups[0]["lr"] = how.rate(epoch)
        for _ in range(rows // how.batch):
            optimizer.zero_grad()
            recipe.backward(*batches(torch.randint(rows, (how.batch,))))
            recipe.before_step()
            optimizer.step()
            recipe.after_step()
        found.append(model.flat)
    recipe.close()
    return torch.stack(found)


def by_epoch(
    model: Bag, chains: Tensor, train: Batch, test: Batch, how: Training
) -> list[dict[str, float]]:
    """Returns what the closed forms say of each epoch, H and C taken at the chains' mean, beside
    what the chains [R, epochs + 1, D] did.

    H and C are whole matrices, of the loss that was trained on; `curvature` says how. "the same,
    attack fixed" is by power iteration.
    """
    s = torch.eye(chains.shape[2], dtype=torch.float64) * how.deviation**2
    start = MultivariateNormal(torch.zeros(len(s), dtype=torch.float64), s)
    steps, found = len(train[1]) // how.batch, []
    model.flat = chains[:, 0].mean(0)
    h, c, g = curvature(model, *train, how)
    for epoch in range(how.epochs):
        # The closed form is that at the minimum; away from it the selection scatters the mean
        # gradient g too, by (1/p - 1) g g.
        noise = c + (1 - how.keep) * torch.diag(g * g)
        s = uk.analysis.sgd_covariance(
            h, noise, how.rate(epoch), steps=steps, initial=s, keep_probability=how.keep
        )
        model.flat = chains[:, epoch + 1].mean(0)
        h, c, g = curvature(model, *train, how)
        told = uk.analysis.sgd_diagnostic(h, s)
        (robust, plain), (robust_test, plain_test) = (
            errors(model, batch) for batch in (train, test)
        )
        texts = attacked(model, *train, how.epsilon)
        found.append(
            {
                "tr S, closed form": told["trace"],
                "tr S, measured": torch.cov(chains[:, epoch + 1].double().T).trace().item(),
                "tr(HS)/2": told["excess_loss"],
                "largest eigenvalue": torch.linalg.eigvalsh(h)[-1].item(),
                "the same, attack fixed": uk.analysis.largest_eigenvalue(
                    model, functools.partial(loss, texts, *train)
                ),
                "tr H": h.trace().item(),
                "tr C": c.trace().item(),
                "KL to the start": kl_divergence(
                    MultivariateNormal(model.flat.double(), s), start
                ).item(),
                "robust error, train": robust,
                "robust gap": robust_test - robust,
                "clean gap": plain_test - plain,
            }
        )
    return found


def loss(embedded: Tensor, inputs: dict[str, Tensor], labels: Tensor, model: Bag) -> Tensor:
    return F.cross_entropy(model.classify(embedded, inputs["attention_mask"]), labels)


def at_embedding(
    model: nn.Module, inputs: dict[str, Tensor], labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the embedded words, and the loss's gradient at them, which `fgm_perturbation` takes:
    `accuracy_under_attack` perturbs in the same way and shows the answers alone.
    """
    with torch.enable_grad():
        embedded = model.embedding(inputs["ids"]).detach().requires_grad_()
        total = F.cross_entropy(
            model.classify(embedded, inputs["attention_mask"]), labels, reduction="sum"
        )
        (gradient,) = torch.autograd.grad(total, embedded)
    return embedded.detach(), gradient


def attacked(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, epsilon: float) -> Tensor:
    """Returns the embedded words, moved by FGM at the present weights."""
    embedded, gradient = at_embedding(model, inputs, labels)
    return embedded + uk.fgm_perturbation(gradient, epsilon, mask=inputs["attention_mask"])


def curvature(
    model: Bag, inputs: dict[str, Tensor], labels: Tensor, how: Training
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes of the loss in the linear layer's weights: the Hessian, the covariance of a batch's
    gradient, and its mean, float64.

    The perturbation follows the weights, so the Hessian is that of the worst case: differences of
    gradients, and their symmetric part.
    """
    at, near = model.flat, 1e-2
    each = gradients(model, inputs, labels, how)
    columns = []
    for i in range(len(at)):
        pair = []
        for sign in (1, -1):
            model.flat = at + sign * near * torch.eye(len(at))[i]
            pair.append(gradients(model, inputs, labels, how).mean(0))
        columns.append((pair[0] - pair[1]) / (2 * near))
    model.flat = at
    hessian = torch.stack(columns)
    return (hessian + hessian.T) / 2, torch.cov(each.T, correction=0) / how.batch, each.mean(0)


def gradients(model: Bag, inputs: dict[str, Tensor], labels: Tensor, how: Training) -> Tensor:
    """Returns the gradients of the loss at each text [N, D], float64."""
    features = model.pool(
        attacked(model, inputs, labels, how.epsilon), inputs["attention_mask"]
    ).double()
    weights = {name: p.detach().double() for name, p in model.linear.named_parameters()}

    def of(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model.linear, weights, (x,)), y)

    found = torch.func.vmap(torch.func.grad(of), (None, 0, 0))(
        weights, features[:, None], labels[:, None]
    )
    return torch.cat([g.flatten(1) for g in found.values()], 1)


def errors(model: Bag, batch: Batch) -> tuple[float, float]:
    """Returns robust and clean error."""
    clean, robust = uk.analysis.accuracy_under_attack(model, model.embedding, [batch], [EPSILON])
    return 1 - robust.accuracy, 1 - clean.accuracy
