"""Attacks of several steps: PGD on the embeddings, and AdvEmbed, its form with one step per token."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..passes import Pass, attention_mask, check_count
from ..perturbation import fgm_perturbation, pgd_step
from .recipe import PassRecipe, check_flag, check_number

Start = Callable[[Tensor], Tensor]  # from the embedding's output to the first delta


class AttackRecipe(PassRecipe):
    """A recipe whose delta comes from projected ascent on the embeddings; every step is a pass of its own that changes nothing else.

    epsilon     radius of the ball;  steps  how many;  step_size  None: 2.5 * epsilon / steps
    norm, per   as in `pgd_step`, and norm="max": g divided by its largest |element|, the ball as for "linf"
    same_draw   every pass with the same dropout masks
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        epsilon: float,
        steps: int,
        step_size: float | None,
        norm: str,
        per: str,
        same_draw: bool,
        least_steps: int = 1,
        **options,
    ) -> None:
        check_number("epsilon", epsilon, 0)
        check_count("steps", steps, least_steps)
        check_flag("same_draw", same_draw)
        check_number("step_size", 0.0 if step_size is None else step_size, 0)
        self.epsilon, self.steps, self.same_draw = epsilon, steps, same_draw
        self.step_size = 2.5 * epsilon / max(steps, 1) if step_size is None else step_size
        self.norm, self.per = norm, per
        row = torch.zeros(1, 2, device="cpu")
        pgd_step(row, row, step_size=0.0, radius=0.0, norm="linf" if norm == "max" else norm, per=per, backend="reference")
        super().__init__(model, embedding, optimizer, **options)

    def _attack(self, inputs: Any, labels: Tensor, scale: float | Tensor, draw: Callable, clean: Pass | None = None) -> Tensor | None:
        """delta after all steps, the first from the `clean` pass's gradient where one is given; None after no step."""
        delta = self._start(attention_mask(inputs)) if self.steps else None
        for step in range(self.steps):
            if step or clean is None:
                with draw():
                    clean = self._ascend(inputs, labels, scale, delta)
            delta = torch.zeros_like(clean.gradient) if clean.delta is None else clean.delta
            delta = self._climb(delta, clean.gradient, attention_mask(inputs))
        return delta

    def _start(self, mask: Tensor | None) -> Start | None:
        """The first delta; None: zero."""
        return None

    def _climb(self, delta: Tensor, gradient: Tensor, mask: Tensor | None) -> Tensor:
        options = dict(step_size=self.step_size, radius=self.epsilon, per=self.per)
        return climb(delta, gradient, mask, norm=self.norm, **options, backend=self.backend)


class PGD(AttackRecipe):
    """Adversarial training with K steps of projected gradient ascent on the embeddings, PGD-K (METHODS 1, PGD-K).

    epsilon, norm, per     radius, and whose norm, as in `pgd_step`
    steps, step_size       K, and the size of one; None: 2.5 * epsilon / K
    clean_weight           of the clean pass's loss in L; 0: no clean pass
    random_start           start uniformly in the ball, not at 0
    same_draw              the same dropout masks in every pass
    first_step_from_clean  the clean pass's gradient makes the first step and saves a pass; needs a clean pass and no random start
    the common options     (`PassRecipe`)

    K + 2 forwards, 2 backwards and K that stop at the embedding; one less of each with first_step_from_clean.
    Losses: loss, clean_loss, adversarial_loss.
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        epsilon: float = 0.1,
        steps: int = 3,
        step_size: float | None = None,
        norm: str = "l2",
        per: str = "sample",
        clean_weight: float = 1.0,
        random_start: bool = False,
        same_draw: bool = False,
        first_step_from_clean: bool = False,
        **options,
    ) -> None:
        check_number("clean_weight", clean_weight, 0)
        check_flag("random_start", random_start)
        check_flag("first_step_from_clean", first_step_from_clean)
        if first_step_from_clean and (random_start or clean_weight == 0):
            raise ValueError("first_step_from_clean=True needs the clean pass's gradient; leave random_start out, and clean_weight above 0")
        self.clean_weight, self.random_start, self.first_step_from_clean = clean_weight, random_start, first_step_from_clean
        steps_options = dict(epsilon=epsilon, steps=steps, step_size=step_size, norm=norm, per=per, same_draw=same_draw)
        super().__init__(model, embedding, optimizer, **steps_options, **options)

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        losses, clean = {}, None
        with self._draws(self.same_draw) as draw:
            if self.clean_weight:
                with draw():
                    options = dict(weight=self.clean_weight, watched=self.first_step_from_clean)
                    losses["clean_loss"], clean = self._descend(inputs, labels, scale, **options)
            delta = self._attack(inputs, labels, scale, draw, clean if self.first_step_from_clean else None)
            with draw():
                losses["adversarial_loss"], _ = self._descend(inputs, labels, scale, delta, last=True)
        return {"loss": self.clean_weight * losses.get("clean_loss", 0.0) + losses["adversarial_loss"], **losses}

    def _start(self, mask: Tensor | None) -> Start | None:
        return uniform_in_ball(self.epsilon, self.norm, self.per, mask) if self.random_start else None


class AdvEmbed(PGD):
    """Adversarial training with one step per token on the embeddings, AdvEmbed (METHODS 1, AdvEmbed).

    epsilon, norm, per  0.1, and g divided by its largest |element| of each token; or as in `PGD`
    steps, step_size    1, of epsilon
    start               delta starts as U(0, 1) * start, in a pass of its own; 0: at the clean pass's gradient, which makes it `AT`'s cost
    the rest            as in `PGD`

    3 forwards, 2 backwards and 1 that stops at the embedding. Losses: loss, clean_loss, adversarial_loss.
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        epsilon: float = 0.1,
        steps: int = 1,
        step_size: float | None = None,
        norm: str = "max",
        per: str = "token",
        start: float = 1e-5,
        clean_weight: float = 1.0,
        same_draw: bool = False,
        **options,
    ) -> None:
        check_number("start", start, 0)
        self.start = start
        options |= dict(epsilon=epsilon, steps=steps, step_size=epsilon if step_size is None else step_size, norm=norm, per=per)
        from_clean = start == 0 and clean_weight != 0
        super().__init__(
            model, embedding, optimizer, clean_weight=clean_weight, same_draw=same_draw, first_step_from_clean=from_clean, **options
        )

    def _start(self, mask: Tensor | None) -> Start | None:
        return None if self.start == 0 else tiny_noise(self.start, mask)


def climb(
    delta: Tensor, gradient: Tensor, mask: Tensor | None, *, step_size: float, radius: float, norm: str, per: str, backend: str
) -> Tensor:
    """`pgd_step`, with one norm more: "max" divides g by its largest |element|; a zero or non-finite one makes no step."""
    if norm != "max":
        return pgd_step(delta, gradient, step_size=step_size, radius=radius, norm=norm, per=per, mask=mask, backend=backend)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    g = masked(gradient.to(wide), mask)
    axes = {"sample": tuple(range(1, g.dim())), "token": (-1,), "all": tuple(range(g.dim()))}[per]
    largest = g.abs().amax(axes, keepdim=True)
    direction = torch.where((largest > 0) & largest.isfinite(), g / largest, 0)
    return (delta.to(wide) + step_size * direction).clamp(-radius, radius).to(delta.dtype)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where((mask != 0).reshape(*mask.shape, *[1] * (x.dim() - mask.dim())), x, 0)


def drawn_apart() -> Callable[[Tensor], torch.Generator]:
    """A generator for noise, of its own: the numbers that a model draws for its dropout do not depend on there being a start.

    Its seed is drawn from torch's default CPU generator.
    """
    seed = int(torch.randint(2**62, ()))
    return lambda x: torch.Generator(x.device).manual_seed(seed)


def tiny_noise(size: float, mask: Tensor | None) -> Start:
    """U(0, 1) * size."""
    generator = drawn_apart()
    return lambda x: masked(torch.rand(x.shape, generator=generator(x), dtype=x.dtype, device=x.device) * size, mask)


def uniform_in_ball(radius: float, norm: str, per: str, mask: Tensor | None) -> Start:
    """Uniform in the ball over the tokens that are real: every element in [-radius, radius], or a direction and a length."""
    generator = drawn_apart()

    def start(x: Tensor) -> Tensor:
        source = dict(generator=generator(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        if norm != "l2":
            return masked((2 * torch.rand(x.shape, **source) - 1) * radius, mask).to(x.dtype)
        direction = fgm_perturbation(torch.randn(x.shape, **source), 1.0, per=per, mask=mask)
        axes = {"sample": tuple(range(1, x.dim())), "token": (-1,), "all": tuple(range(x.dim()))}[per]
        dimensions = masked(torch.ones_like(direction), mask).sum(axes, keepdim=True).clamp(min=1)
        return (direction * radius * torch.rand(dimensions.shape, **source) ** (1 / dimensions)).to(x.dtype)

    return start


def in_a_cube(size: float, mask: Tensor | None) -> Start:
    """U(-1, 1) * size / sqrt(L d) on the L real tokens of d elements: no longer than `size` (FreeLB's start)."""
    generator = drawn_apart()

    def start(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        elements = math.prod(x.shape[1:]) if mask is None else (mask != 0).sum(1) * math.prod(x.shape[2:])
        lengths = torch.as_tensor(elements, device=x.device).clamp(min=1).sqrt().reshape(-1, *[1] * (x.dim() - 1))
        return masked((2 * noise - 1) * size / lengths, mask).to(x.dtype)

    return start
