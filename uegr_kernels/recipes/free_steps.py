"""FreeAT and FreeLB: every pass along an ascending perturbation adds to an update."""

from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..passes import synchronisers, synchronises
from .attack import Start, climb, in_a_cube
from .recipe import PassRecipe


class FreeLB(PassRecipe):
    """Free large-batch adversarial training: K passes along an ascending delta, one update from all
    of them (METHODS 1, FreeLB).

    steps      K, the passes, each with weight 1/K
    adv_lr     size of a step of delta;  init_mag  delta_0 is U(-1, 1) * init_mag / sqrt(L d) on the
        L real tokens
    max_norm   radius of the ball; 0: no projection
    norm       "l2"; "max": the gradient is divided by its largest |element|, the ball is |delta| <=
        max_norm; "linf": its sign is taken
    same_draw  one dropout draw for all passes of a batch
    the common options  (`PassRecipe`)

    K forwards, K backwards, no clean pass. Losses: loss, adversarial_loss (the mean over the
    passes).
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        steps: int = 3,
        adv_lr: float = 0.1,
        init_mag: float = 0.1,
        max_norm: float = 0.0,
        norm: str = "l2",
        same_draw: bool = True,
        **options: Any,
    ) -> None:
        checks.integer("steps", steps, 1)
        adv_lr = checks.number("adv_lr", adv_lr, 0)
        init_mag = checks.number("init_mag", init_mag, 0)
        max_norm = checks.number("max_norm", max_norm, -float("inf"))
        checks.choice("norm", norm, ("l2", "max", "linf"))
        checks.flag("same_draw", same_draw)
        self.steps, self.adv_lr, self.init_mag, self.max_norm, self.norm, self.same_draw = (
            steps,
            adv_lr,
            init_mag,
            max_norm,
            norm,
            same_draw,
        )
        super().__init__(model, embedding, optimizer, **options)

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        losses = []
        delta: Any = in_a_cube(self.init_mag, self._batch.mask) if self.init_mag else None
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


class FreeAT(PassRecipe):
    """Free adversarial training: every repeat of a batch both moves delta and updates the weights
    (METHODS 1, FreeAT).

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
    the common options  (`PassRecipe`)

    m forwards, m backwards, m updates; each repeat has a dropout draw of its own. Losses: loss,
    adversarial_loss, the mean over them.
    """

    kept = ("delta",)

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        epsilon: float | None = None,
        steps: int | None = None,
        step_size: float | None = None,
        norm: str | None = None,
        init_mag: float | None = None,
        persistent: bool | None = None,
        **options: Any,
    ) -> None:
        image = embedding is None
        self.epsilon = (4 / 255 if image else 0.1) if epsilon is None else epsilon
        self.steps = (4 if image else 3) if steps is None else steps
        self.step_size = self.epsilon if step_size is None else step_size
        self.norm = ("linf" if image else "l2") if norm is None else norm
        self.init_mag = (0.0 if image else self.epsilon) if init_mag is None else init_mag
        self.persistent = image if persistent is None else persistent
        self.delta: Tensor | None = None
        for name in ("epsilon", "step_size", "init_mag"):
            setattr(self, name, checks.number(name, getattr(self, name), 0))
        checks.integer("steps", self.steps, 1)
        checks.choice("norm", self.norm, ("l2", "linf"))
        checks.flag("persistent", self.persistent)
        super().__init__(model, embedding, optimizer, **options)

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        optimizer, mask, losses = self._stepped(), self._batch.mask, []
        if synchronisers(self.model) and not synchronises(self.model):
            raise RuntimeError(
                "free_at steps in every repeat, and inside no_sync each rank would "
                "step alone; call it outside"
            )
        delta: Any = self._start(mask, len(labels))
        for _ in range(self.steps):
            loss, pass_ = self._descend(labels, scale, delta, watched=True, last=True)
            losses.append(loss)
            self._update(optimizer, scale)
            delta = climb(
                pass_,
                step_size=self.step_size,
                radius=self.epsilon,
                norm=self.norm,
                per="sample",
                backend=self.backend,
            )
        if self.persistent:
            delta = pass_.measured(delta)
            self.delta = (
                delta if self.delta is None else torch.cat([delta, self.delta[len(delta) :]])
            )
        mean = torch.stack(losses).mean()
        return {"loss": mean, "adversarial_loss": mean}

    def _start(self, mask: Tensor | None, rows: int) -> Start:
        fresh = in_a_cube(self.init_mag, mask) if self.init_mag else torch.zeros_like

        def start(x: Tensor) -> Tensor:
            if self.delta is None or self.delta.shape[1:] != x.shape[1:]:
                self.delta = None
                return fresh(x)
            # a batch may be shorter or longer than the last
            return torch.cat([self.delta[:rows].to(x), fresh(x)[len(self.delta) :]])

        return start

    def _update(self, optimizer: Any, scale: float | Tensor) -> None:
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
            torch.clear_autocast_cache()  # the next repeat is in the caller's autocast region too
        optimizer.zero_grad(set_to_none=True)
