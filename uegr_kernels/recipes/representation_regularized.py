"""ARAT: adversarial and clean representations held alike, asymmetrically, with a BatchNorm
branch for each.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.conv import _ConvNd as Convolution

from ..divergence import LossParts
from ..passes import Inputs, Pass, ranks_of, synchronisers, synchronises
from ..perturbation import ASCENT_NORMS
from . import options
from .attack import AttackRecipe, Start, uniform_ball_start
from .recipe import device_of, plain_names, recomputed, summed_over_ranks

CHANNELS_SECOND = (BatchNorm, Convolution)


class _Features:
    """Holds what the hooks on the layers have of the recipe, which copies and pickles of the model
    take along.

    seen  a layer's number: its output, while a pass that wants them is on
    """

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] | None = None

    def keep(self, i: int, module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        if self.seen is not None:
            self.seen[i] = output


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class ARAT(AttackRecipe):
    """Trains with adversarial and clean representations held alike, asymmetrically.

    See docs/methods.md, "ARAT".

    invariance_weight  c of L = w' CE(z') + w CE(z) + c * mean over layers of 1 - cos(h(f'), sg(f))
    layers             names of the modules whose outputs f, after ReLU and averaging over places,
                       are held alike: BatchNorm, LayerNorm, convolution or linear; None: the last
                       four BatchNorms, or, where there are none, LayerNorms, convolutions, ...
    predictor          h between the two, one a layer;  stop_gradient  sg, the clean side is a
        constant
    split              every BatchNorm has a branch for clean inputs; the model keeps the
        adversarial one, which it is tested with
    split_layer_norm   every LayerNorm as well
    clean_weight, adversarial_weight   w and w'; None: 1 - acc and acc, of the clean branch in eval
                       mode on the epoch's last `balance_rows` rows, from the end of the first
                       epoch; before that, and for regression, 0.5
    epsilon, steps, step_size, norm, per   of the attack, as in `pgd_step`; its step_size: epsilon/4
    random_start       uniform in the ball;  same_draw  every pass with the same dropout masks;  the
        common options  (`help(uk.recipes.plain)`)

    h and the clean branch have parameters of their own, `parameters()`; until `close()` they are in
    the last group of an optimizer given here, so build the recipe before a checkpoint of the
    optimizer is loaded. 2 + K forwards, 2 backwards and K that stop at the input. Losses: loss,
    clean_loss, adversarial_loss, invariance.
    """

    kept: ClassVar[tuple[str, ...]] = ("own_modules", "accuracy", "recent")

    passes: ClassVar[int] = 12

    invariance_weight: float = options.number(30.0)
    layers: str | Sequence[str] | None = None
    predictor: bool = options.flag(True)
    stop_gradient: bool = options.flag(True)
    split: bool = options.flag(True)
    split_layer_norm: bool = options.flag(False)
    clean_weight: float | None = options.number(None)
    adversarial_weight: float | None = options.number(None)
    balance_rows: int = options.integer(1000, 1)
    epsilon: float = options.number(8 / 255)
    steps: int = options.integer(10, 1)
    norm: str = options.choice("linf", ASCENT_NORMS)
    random_start: bool = options.flag(True)
    _layers: list[nn.Module] = dataclasses.field(init=False)
    _widths: list[int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.accuracy: float | None = None
        # inputs and labels of the epoch's last batches
        self.recent: list[tuple[Inputs, Tensor]] = []
        self._features = _Features()
        # own modules on all ranks
        self._synchronised = False
        model, optimizer = self.model, self.optimizer
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        self.predictors = nn.ModuleList(_predictor(width) for width in self._widths).to(
            device=device_of(model), dtype=dtype
        )
        kinds = (BatchNorm,) * self.split + (nn.LayerNorm,) * self.split_layer_norm
        self._split = [module for module in model.modules() if isinstance(module, kinds)]
        self.clean_branch = nn.ModuleList(copy.deepcopy(module) for module in self._split)
        self._hooks = [
            layer.register_forward_hook(functools.partial(self._features.keep, i))
            for i, layer in enumerate(self._layers)
        ]
        # a group of their own would be one that the learning rate's scheduler does not know
        if optimizer is not None:
            last = optimizer.param_groups[-1]
            last["params"].extend(self.parameters())
            if "param_names" in last:
                last["param_names"].extend(f"arat.{i}" for i in range(len(self.parameters())))

    def _settle_options(self) -> None:
        super()._settle_options()
        if (self.clean_weight is None) != (self.adversarial_weight is None):
            raise ValueError(
                "clean_weight and adversarial_weight are balanced together; give both, or neither"
            )
        self._layers = _layers(self.model, self.layers)
        widths = [_width(layer) for layer in self._layers]
        self._widths = widths if self.predictor else []

    def _default_step_size(self) -> float:
        return self.epsilon / 4

    def parameters(self) -> list[nn.Parameter]:
        """Returns the predictors' and the clean branch's: what the optimizer needs besides the
        model's.
        """
        return [*self.predictors.parameters(), *self.clean_branch.parameters()]

    @property
    def own_modules(self) -> dict[str, dict[str, Tensor]]:
        """Returns predictors and clean branch, for checkpoints."""
        return {
            "predictors": self.predictors.state_dict(),
            "clean_branch": self.clean_branch.state_dict(),
        }

    @own_modules.setter
    def own_modules(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.predictors.load_state_dict(state["predictors"])
        self.clean_branch.load_state_dict(state["clean_branch"])

    def close(self) -> None:
        """Removes the hooks, and the predictors from the optimizer."""
        for hook in getattr(self, "_hooks", []):
            hook.remove()
        if self.optimizer is not None and hasattr(self, "_hooks"):
            own = set(self.parameters())
            for group in self.optimizer.param_groups:
                group["params"][:] = [p for p in group["params"] if p not in own]
                if "param_names" in group:
                    del group["param_names"][len(group["params"]) :]
            for p in own:
                self.optimizer.state.pop(p, None)
        super().close()

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        self._synchronise_own()
        weight, adversarial_weight = self._weights()
        with self._draws(self.same_draw) as draw:
            delta = self._attack(labels, scale, draw)
            held = self._runner.without_sync() if self.stop_gradient else contextlib.nullcontext()
            with held, draw(), self._clean(), self._pass() as pass_:
                clean, features = self._recorded(labels, pass_)
                # its graph goes before the other's comes
                if self.stop_gradient:
                    (clean.loss * weight * scale).backward()
                    features = [f.detach() for f in features]
            held = contextlib.nullcontext() if self.stop_gradient else self._runner.without_sync()
            with draw():
                with held, self._pass(delta) as pass_:
                    adversarial, of_adversarial = self._recorded(labels, pass_)
                invariance = self._invariance(of_adversarial, features)
                term = adversarial_weight * adversarial.loss + self.invariance_weight * invariance
                with self._pass(delta if self.stop_gradient else recomputed) as pass_:
                    pass_.forward = False
                    (
                        (term if self.stop_gradient else term + weight * clean.loss) * scale
                    ).backward()
        self._average_over_ranks()
        self._remember(inputs, labels)
        losses = {
            "clean_loss": clean.clean_loss,
            "adversarial_loss": adversarial.clean_loss,
            "invariance": invariance.detach(),
        }
        loss = (
            weight * clean.clean_loss
            + adversarial_weight * adversarial.clean_loss
            + self.invariance_weight * losses["invariance"]
        )
        return {"loss": loss, **losses}

    def after_step(self) -> None:
        """Clears the gradients of the own parameters, which a model.zero_grad() does not reach."""
        for p in self.parameters():
            p.grad = None

    def epoch_end(self) -> None:
        """Balances the two losses by the clean branch's accuracy."""
        if not self.recent:
            return
        modes = [(module, module.training) for module in self.model.modules()]
        right = rows = 0
        try:
            self.model.eval()
            with torch.no_grad(), self._runner.without_sync(), self._clean():
                for inputs, labels in self.recent:
                    self._taken = self._runner.take(inputs, labels)
                    with self._pass() as pass_:
                        guesses = self._runner.call(pass_).argmax(1)
                    truth = labels.argmax(1) if labels.is_floating_point() else labels
                    counted = self._counted(labels)
                    right, rows = (
                        right + int(((guesses == truth) & counted).sum()),
                        rows + int(counted.sum()),
                    )
        finally:
            self._taken = None
            for module, training in modes:
                module.training = training
        self.accuracy, self.recent = right / rows if rows else self.accuracy, []

    def _start(self, mask: Tensor | None) -> Start | None:
        if not self.random_start:
            return None
        return uniform_ball_start(self.epsilon, self.norm, self.per, mask)

    def _weights(self) -> tuple[float, float]:
        if self.clean_weight is not None and self.adversarial_weight is not None:
            return self.clean_weight, self.adversarial_weight
        return (0.5, 0.5) if self.accuracy is None else (1 - self.accuracy, self.accuracy)

    @contextlib.contextmanager
    def _clean(self) -> Iterator[None]:
        """Gives the model its clean branch inside a `with`: each BatchNorm has the parameters and
        statistics of the other.
        """

        def swap() -> None:
            for module, other in zip(self._split, self.clean_branch, strict=True):
                module._parameters, other._parameters = other._parameters, module._parameters
                module._buffers, other._buffers = other._buffers, module._buffers

        swap()
        try:
            yield
        finally:
            swap()

    def _counted(self, labels: Tensor) -> Tensor:
        """Returns [N] bool: the rows that are not ignored."""
        if labels.is_floating_point():
            return torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        counted: Tensor = labels != self.ignore_index
        return counted

    def _recorded(self, labels: Tensor, pass_: Pass) -> tuple[LossParts, list[Tensor]]:
        """Returns the losses of one call of the model, and the features of every layer [n, d] for
        the n rows that are not ignored.
        """
        outputs = self._features.seen = {}
        try:
            logits = self._runner.call(pass_)
        finally:
            self._features.seen = None
        if len(outputs) < len(self._layers):
            raise RuntimeError(
                "one of the layers was not called in this pass; name layers that "
                "the model always calls"
            )
        counted = self._counted(labels)
        features = [
            _pooled(layer, outputs[i], pass_)[counted] for i, layer in enumerate(self._layers)
        ]
        return self._loss_of(logits, labels), features

    def _invariance(self, adversarial: list[Tensor], clean: list[Tensor]) -> Tensor:
        # a single row has no variance
        self.predictors.train(len(clean[0]) > 1)
        predicted = (
            [h(f) for h, f in zip(self.predictors, adversarial, strict=True)]
            if len(self.predictors)
            else adversarial
        )
        pairs = [
            (h, f, torch.promote_types(f.dtype, torch.float32))
            for h, f in zip(predicted, clean, strict=True)
        ]
        return torch.stack(
            [1 - F.cosine_similarity(h.to(wide), f.to(wide), dim=1).mean() for h, f, wide in pairs]
        ).mean()

    def _synchronise_own(self) -> None:
        """Sends rank 0's own modules to every rank, once, as the wrapper does with the model's."""
        if (
            not self._synchronised
            and synchronisers(self.model)
            and torch.distributed.is_available()
            and torch.distributed.is_initialized()
        ):
            with torch.no_grad():
                for own in (
                    *self.predictors.state_dict().values(),
                    *self.clean_branch.state_dict().values(),
                ):
                    torch.distributed.broadcast(own, group_src=0, group=ranks_of(self.model))
        self._synchronised = True

    def _average_over_ranks(self) -> None:
        """Averages the gradients that the wrapper does not know of, when it averages its own."""
        if synchronises(self.model):
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            world = torch.ones((), device=device_of(self.model))
            summed_over_ranks(self.model, [world, *gradients])
            for gradient in gradients:
                gradient.div_(world)

    def _remember(self, inputs: Inputs, labels: Tensor) -> None:
        if self.clean_weight is not None or self._regression:
            return
        # a checkpoint is to load with weights_only
        plain = dict(inputs) if isinstance(inputs, Mapping) else inputs
        self.recent.append((plain, labels))
        while (
            sum(int(self._counted(labels).sum()) for _, labels in self.recent[1:])
            >= self.balance_rows
        ):
            del self.recent[0]


def _layers(model: nn.Module, names: str | Sequence[str] | None) -> list[nn.Module]:
    if names is not None:
        modules = dict(plain_names(model.named_modules()))
        for name in [names] if isinstance(names, str) else names:
            if name not in modules or not name:
                raise ValueError(
                    f"layers names {name!r}, which is no module of model; name some "
                    f"of {', '.join(filter(None, modules))}"
                )
        return [modules[name] for name in ([names] if isinstance(names, str) else names)]
    for kind in (BatchNorm, nn.LayerNorm, Convolution, nn.Linear):
        found: list[nn.Module] = [module for module in model.modules() if isinstance(module, kind)]
        # not the logits, where there is anything else
        found = found[:-1] or found if kind is nn.Linear else found
        if found:
            return found[-4:]
    raise ValueError(
        "model has no BatchNorm, LayerNorm, convolution or linear layer; ARAT has "
        "nothing to hold alike"
    )


def _width(layer: nn.Module) -> int:
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1]
    for name in ("num_features", "out_channels", "out_features"):
        if isinstance(layer, (BatchNorm, Convolution, nn.Linear)) and hasattr(layer, name):
            return int(getattr(layer, name))
    raise ValueError(
        f"layers names a {type(layer).__name__}; name BatchNorm, LayerNorm, "
        "convolution or linear layers"
    )


def _predictor(width: int) -> nn.Module:
    narrow = max(1, width // 4)
    return nn.Sequential(
        nn.Linear(width, narrow, bias=False),
        nn.BatchNorm1d(narrow),
        nn.ReLU(),
        nn.Linear(narrow, width),
    )


def _pooled(layer: nn.Module, output: Tensor, pass_: Pass) -> Tensor:
    """Returns [N, d]: the mean over places after ReLU; over the real tokens where the places are
    tokens.
    """
    x, batch, mask = output.relu(), pass_.batch, pass_.mask
    if x.dim() == 2:
        return x
    if isinstance(layer, CHANNELS_SECOND):
        return x.flatten(2).mean(2)
    # time-first, or both are as long
    if list(x.shape[:2]) == [batch.length, batch.rows]:
        x = batch.first(x) if batch.length == batch.rows else x.transpose(0, 1)
    if mask is None or x.shape[:2] != mask.shape or x.dim() != 3:
        return x.flatten(1, -2).mean(1)
    real = (mask != 0).to(x.dtype)[..., None]
    return (x * real).sum(1) / real.sum(1).clamp(min=1)
