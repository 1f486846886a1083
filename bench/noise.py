"""SGD's covariance: simulated on a small quadratic, and measured over many runs of a small model on text, beside its closed forms."""

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
CASES: dict[str, dict[str, Any]] = {  # steps at each learning rate, then the options
    "learning rate 0.2": {"rates": (0.2,)},
    "0.2, then 0.02": {"rates": (0.2, 0.02)},
    "0.05, momentum 0.9": {"rates": (0.05,), "momentum": 0.9},
    "0.2, selective, p = 0.3": {"rates": (0.2,), "keep_probability": 0.3},
}
PARAMETERS = 30  # of the small model at most: a covariance of selective SGD takes the fourth power of it


def quadratic(case: dict[str, Any], chains: int) -> tuple[dict[int, float], dict[int, float], float]:
    """tr S by step of chains that start at 0: the closed form, the simulation by the optimizer itself, and the stationary closed form.

    Each learning rate has its share of the steps.
    """
    rates, momentum, keep = case["rates"], case.get("momentum", 0.0), case.get("keep_probability", 1.0)
    theta = nn.Parameter(torch.zeros(chains, len(HESSIAN), dtype=torch.float64))
    optimizer = sgd([theta], rates[0], keep, momentum)
    generator, root = torch.Generator().manual_seed(0), torch.linalg.cholesky(NOISE)
    options = {"momentum": momentum, "keep_probability": keep}
    closed, simulated, start = {0: 0.0}, {0: 0.0}, torch.zeros_like(HESSIAN)
    each = STEPS // len(rates)
    for i, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        for step in range(1, each + 1):
            theta.grad = theta.detach() @ HESSIAN + torch.randn(theta.shape, generator=generator, dtype=theta.dtype) @ root.T
            optimizer.step()
            covariance = uk.analysis.sgd_covariance(HESSIAN, NOISE, lr, steps=step, initial=start, **options)
            closed[i * each + step] = covariance.trace().item()
            if step % EVERY == 0:
                simulated[i * each + step] = torch.cov(theta.detach().T).trace().item()
        start = covariance
    return closed, simulated, uk.analysis.sgd_covariance(HESSIAN, NOISE, rates[-1], **options).trace().item()


def sgd(parameters: list[nn.Parameter], lr: float, keep: float, momentum: float = 0.0) -> torch.optim.Optimizer:
    """Plain, or selective with one probability for all and rescaling."""
    if keep == 1:
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    seed = int(torch.randint(2**62, ()))
    return uk.SelectiveSGD(parameters, lr=lr, momentum=momentum, normalization="constant", keep_probability=keep, seed=seed)


class Bag(TextClassifier):
    """The mean of the word vectors, linear: few enough weights for whole Hessians."""

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
    """How the small model's linear layer is trained: by SGD on the adversarial loss (AT), over batches drawn with replacement.

    spread  standard deviation of the weights at the start;  the last half of the epochs runs at a tenth of the learning rate
    """

    epochs: int
    batch: int = 16
    lr: float = 0.5
    spread: float = 0.1
    epsilon: float = 0.5

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


def chain(model: Bag, batches: Callable[[Tensor], Batch], rows: int, how: Training, keep: float, seed: int) -> Tensor:
    """The weights [epochs + 1, D] of one run."""
    torch.manual_seed(seed)
    model.flat = how.spread * torch.randn(len(model.flat))
    optimizer = sgd(list(model.linear.parameters()), how.lr, keep)
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


def by_epoch(model: Bag, chains: Tensor, train: Batch, test: Batch, how: Training, keep: float) -> list[dict[str, float]]:
    """What the closed forms say of each epoch, H and C taken at the chains' mean, beside what the chains [R, epochs + 1, D] did.

    H and C are whole matrices, of the adversarial loss with its perturbation held fixed, and of the clean loss where it says so.
    """
    s = torch.eye(chains.shape[2], dtype=torch.float64) * how.spread**2
    start = MultivariateNormal(torch.zeros(len(s), dtype=torch.float64), s)
    steps, found = len(train[1]) // how.batch, []
    for epoch in range(how.epochs):
        model.flat = chains[:, epoch].mean(0)  # where the epoch begins
        h, noise = hessian_and_noise(model, *train, how.epsilon)
        s = uk.analysis.sgd_covariance(h, noise / how.batch, how.rate(epoch), steps=steps, initial=s, keep_probability=keep)
        model.flat = chains[:, epoch + 1].mean(0)
        h, noise = hessian_and_noise(model, *train, how.epsilon)
        clean, _ = hessian_and_noise(model, *train, 0.0)
        told = uk.analysis.sgd_diagnostic(h, s)
        robust, plain = zip(*(errors(model, of, how.epsilon) for of in (train, test)), strict=True)
        texts, delta = attack(model, *train, how.epsilon)
        found.append(
            {
                "tr S, closed form": told["trace"],
                "tr S, measured": torch.cov(chains[:, epoch + 1].double().T).trace().item(),
                "tr(HS)/2": told["excess_loss"],
                "tr(HS)/2, clean": uk.analysis.sgd_diagnostic(clean, s)["excess_loss"],
                "largest eigenvalue": uk.analysis.largest_eigenvalue(model, functools.partial(loss, texts + delta, *train)),
                "largest eigenvalue, clean": torch.linalg.eigvalsh(clean)[-1].item(),
                "tr H": h.trace().item(),
                "tr C": noise.trace().item() / how.batch,
                "KL to the start": kl_divergence(MultivariateNormal(model.flat.double(), s), start).item(),
                "robust error, train": robust[0],
                "robust error, test": robust[1],
                "robust gap": robust[1] - robust[0],
                "clean gap": plain[1] - plain[0],
            }
        )
    return found


def loss(embedded: Tensor, inputs: dict[str, Tensor], labels: Tensor, model: Bag) -> Tensor:
    return F.cross_entropy(model.classify(embedded, inputs["attention_mask"]), labels)


def attack(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The embedded words, and FGM's perturbation of them at the present weights."""
    with torch.enable_grad():
        embedded = model.embedding(inputs["ids"]).detach().requires_grad_()
        total = F.cross_entropy(model.classify(embedded, inputs["attention_mask"]), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(total, embedded)
    return embedded.detach(), uk.fgm_perturbation(gradient, epsilon, mask=inputs["attention_mask"])


def hessian_and_noise(model: Bag, inputs: dict[str, Tensor], labels: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Of the loss in the linear layer's weights: the Hessian, and the covariance of one text's gradient, float64."""
    embedded, delta = attack(model, inputs, labels, epsilon)
    features = model.pool(embedded + delta, inputs["attention_mask"]).double()
    names, shapes = zip(*((name, p.shape) for name, p in model.linear.named_parameters()), strict=True)

    def of(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = weights.split([shape.numel() for shape in shapes])
        own = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model.linear, own, (x,)), y)

    at = model.flat.double()
    each = torch.func.vmap(torch.func.grad(of), (None, 0, 0))(at, features[:, None], labels[:, None])
    return torch.autograd.functional.hessian(lambda w: of(w, features, labels), at), torch.cov(each.T, correction=0)


def errors(model: Bag, batch: Batch, epsilon: float) -> tuple[float, float]:
    """Robust and clean error."""
    clean, robust = uk.analysis.accuracy_under_attack(model, model.embedding, [batch], [epsilon])
    return 1 - robust.accuracy, 1 - clean.accuracy
