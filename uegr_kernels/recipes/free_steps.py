"""FreeAT and FreeLB: every pass along an ascending perturbation adds to an update."""

import dataclasses
import math
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..passes import Inputs, synchronisers, synchronises
from ..perturbation import NORMS
from . import options
from .attack import Start, climb, uniform_cube_start
from .recipe import PassRecipe


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FreeLB(PassRecipe):
    """Trains with one update from K passes along an ascending delta, free large-batch training.

    See docs/methods.md, "FreeLB".

    steps      K, the passes, each with weight 1/K
    adv_lr     size of a step of delta;  init_mag  delta_0 is U(-1, 1) * init_mag / sqrt(L d) on the
        L real tokens
    max_norm   radius of the ball; 0: no projection
    norm       "l2"; "max": the gradient is divided by its largest |element|, the ball is |delta| <=
        max_norm; "linf": its sign is taken
    same_draw  one dropout draw for all passes of a batch
    the common options  (`help(uk.recipes.plain)`)

    K forwards, K backwards, no clean pass. Losses: loss, adversarial_loss (the mean over the
    passes).
    """

    passes: ClassVar[int] = 3
    size_option: ClassVar[str | None] = "adv_lr"

    steps: int = options.integer(3, 1)
    adv_lr: float = options.number(0.1)
    init_mag: float = options.number(0.1)
    max_norm: float = options.number(0.0, -math.inf)
    norm: str = options.choice("l2", ("l2", "max", "linf"))
    same_draw: bool = options.flag(True)

    def _input_norm(self) -> str:
        return self.norm

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        losses = []
        mask, size = self._batch.mask, self.init_mag
        delta: Tensor | Start | None = uniform_cube_start(size, mask) if size else None
        radius = self.max_norm if self.max_norm > 0 else torch.finfo(torch.float32).max
        with self._draws(self.same_draw) as draw:
            for step in range(1, self.steps + 1):
                last = step == self.steps
                with draw():
                    loss, pass_ = self._descend(
                        labels, scale, delta, weight=1 / self.steps, watched=not last, last=last
                    )
                losses.append(loss)
                if not last:
                    delta = climb(
                        pass_,
                        step_size=self.adv_lr,
                        radius=radius,
                        norm=self.norm,
                        per="sample",
                        backend=self.backend,
                    )
        mean = torch.stack(losses).mean()
        return {"loss": mean, "adversarial_loss": mean}


T = TypeVar("T")


class FreeSettings(NamedTuple):
    """Holds FreeAT's options as they are used."""

    epsilon: float
    steps: int
    step_size: float
    norm: str
    init_mag: float
    persistent: bool


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FreeAT(PassRecipe):
    """Trains for free: every repeat of a batch both moves delta and updates the weights.

    See docs/methods.md, "FreeAT".

    optimizer   needed: `backward` steps it in every repeat, with unscaled gradients, and leaves no
                gradient (.grad is None); an optimizer.step() after it finds nothing to do. Under
                GradScaler do not call scaler.step for it. RuntimeError inside a wrapper's no_sync,
                where the ranks would step apart
    epsilon     radius of the ball; None: 0.1, or 4/255 with embedding=None
    steps       m, the repeats of a batch; None: 3, or 4 with embedding=None. Divide the epochs by
        it to keep the compute
    step_size   None: epsilon;  norm  "l2" or "linf"; None: "l2", or "linf" with embedding=None
    init_mag    length of a random start on the real tokens, as in `FreeLB`; None: epsilon, or 0
        with embedding=None
    persistent  delta goes on with the next batch; None: False, or True with embedding=None
        (positions of texts hold other words)
    the common options  (`help(uk.recipes.plain)`)

    m forwards, m backwards, m updates; each repeat has a dropout draw of its own. Losses: loss,
    adversarial_loss, the mean over them.
    """

    kept: ClassVar[tuple[str, ...]] = ("delta",)

    steps_itself: ClassVar[bool] = True
    passes: ClassVar[int] = 3

    epsilon: float | None = options.number(None)
    steps: int | None = options.integer(None, 1)
    step_size: float | None = options.number(None)
    norm: str | None = options.choice(None, NORMS)
    init_mag: float | None = options.number(None)
    persistent: bool | None = options.flag(None)
    delta: Tensor | None = dataclasses.field(init=False, default=None)
    _settings: FreeSettings = dataclasses.field(init=False)

    def _settle_options(self) -> None:
        super()._settle_options()
        images = self.embedding is None
        epsilon = _given(self.epsilon, 4 / 255 if images else 0.1)
        self._settings = FreeSettings(
            epsilon=epsilon,
            steps=_given(self.steps, 4 if images else 3),
            step_size=_given(self.step_size, epsilon),
            norm=_given(self.norm, "linf" if images else "l2"),
            init_mag=_given(self.init_mag, 0.0 if images else epsilon),
            persistent=_given(self.persistent, images),
        )

    def _input_norm(self) -> str:
        return self._settings.norm

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        optimizer, mask, losses = self._stepped(), self._batch.mask, []
        settings = self._settings
        if synchronisers(self.model) and not synchronises(self.model):
            raise RuntimeError(
                "free_at steps in every repeat, and inside no_sync each rank would "
                "step alone; call it outside"
            )
        start, delta = self._start(mask, len(labels)), None
        for _ in range(settings.steps):
            loss, pass_ = self._descend(
                labels, scale, start if delta is None else delta, watched=True, last=True
            )
            losses.append(loss)
            self._update(optimizer, scale)
            delta = climb(
                pass_,
                step_size=settings.step_size,
                radius=settings.epsilon,
                norm=settings.norm,
                per="sample",
                backend=self.backend,
            )
        if settings.persistent and delta is not None:
            delta = pass_.measured(delta)
            self.delta = (
                delta if self.delta is None else torch.cat([delta, self.delta[len(delta) :]])
            )
        mean = torch.stack(losses).mean()
        return {"loss": mean, "adversarial_loss": mean}

    def _start(self, mask: Tensor | None, rows: int) -> Start:
        size = self._settings.init_mag
        fresh = uniform_cube_start(size, mask) if size else torch.zeros_like

        def start(x: Tensor) -> Tensor:
            if self.delta is None or self.delta.shape[1:] != x.shape[1:]:
                self.delta = None
                return fresh(x)
            # a batch may be shorter or longer than the last
            return torch.cat([self.delta[:rows].to(x), fresh(x)[len(self.delta) :]])

        return start

    def _update(self, optimizer: torch.optim.Optimizer, scale: float | Tensor) -> None:
        gradients = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if isinstance(scale, Tensor) or scale != 1:
            for gradient in gradients:
                gradient.div_(scale)
        # as GradScaler does
        if not isinstance(scale, Tensor) or all(
            gradient.isfinite().all() for gradient in gradients
        ):
            optimizer.step()
            # the next repeat is in the caller's autocast region too
            torch.clear_autocast_cache()
        optimizer.zero_grad(set_to_none=True)


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
