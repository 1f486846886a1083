"""Projected ascent on the embeddings: what recipes with attacks of several steps share, and
where an attack starts.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..passes import Pass
from ..perturbation import fgm_perturbation, masked, pgd_step
from .recipe import PassRecipe

Start = Callable[[Tensor], Tensor]  # from the embedding's output to the first delta


class AttackRecipe(PassRecipe):
    """A recipe whose delta comes from projected ascent on the embeddings; every step is a pass of
    its own that changes nothing else.

    epsilon     radius of the ball;  steps  how many;  step_size  None: 2.5 * epsilon / steps
    norm, per   as in `pgd_step`, and norm="max": g divided by its largest |element|, the ball as
        for "linf"
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
        **options: Any,
    ) -> None:
        epsilon = checks.number("epsilon", epsilon, 0)
        checks.integer("steps", steps, least_steps)
        checks.flag("same_draw", same_draw)
        step_size = None if step_size is None else checks.number("step_size", step_size, 0)
        self.epsilon, self.steps, self.same_draw = epsilon, steps, same_draw
        self.step_size = 2.5 * epsilon / max(steps, 1) if step_size is None else step_size
        self.norm, self.per = norm if steps else "", per
        row = torch.zeros(1, 2, device="cpu")
        pgd_step(
            row,
            row,
            step_size=0.0,
            radius=0.0,
            norm="linf" if norm == "max" else norm,
            per=per,
            backend="reference",
        )
        super().__init__(model, embedding, optimizer, **options)

    def _attack(
        self,
        labels: Tensor,
        scale: float | Tensor,
        draw: Callable[[], Any],
        clean: Pass | None = None,
    ) -> Any:
        """delta after all steps, the first from the `clean` pass's gradient where one is
        given; None after no step.
        """
        delta: Any = self._start(self._batch.mask) if self.steps else None
        for step in range(self.steps):
            if step or clean is None:
                with draw():
                    clean = self._ascend(labels, scale, delta)
            options: dict[str, Any] = dict(
                step_size=self.step_size, radius=self.epsilon, norm=self.norm, per=self.per
            )
            delta = climb(clean, **options, backend=self.backend)
        return delta

    def _start(self, mask: Tensor | None) -> Start | None:
        """The first delta; None: zero."""
        return None


def climb(
    pass_: Pass, *, step_size: float, radius: float, norm: str, per: str, backend: str
) -> Tensor:
    """`pgd_step` from a pass's delta along its gradient, with one norm more.

    "max" divides g by its largest |element|; a zero or non-finite one makes no step.
    """

    def step(g: Tensor) -> Tensor:
        delta = torch.zeros_like(g) if pass_.delta is None else pass_.measured(pass_.delta)
        if norm != "max":
            options: dict[str, Any] = dict(step_size=step_size, radius=radius, norm=norm, per=per)
            return pgd_step(delta, g, mask=pass_.mask, **options, backend=backend)
        wide = torch.promote_types(g.dtype, torch.float32)
        masked_g = masked(g.to(wide), pass_.mask)
        axes = {"sample": tuple(range(1, g.dim())), "token": (-1,), "all": tuple(range(g.dim()))}[
            per
        ]
        largest = masked_g.abs().amax(axes, keepdim=True)
        direction = torch.where((largest > 0) & largest.isfinite(), masked_g / largest, 0)
        return (delta.to(wide) + step_size * direction).clamp(-radius, radius).to(delta.dtype)

    return pass_.ascended(step)


def drawn_apart() -> Callable[[Tensor], torch.Generator]:
    """A generator for noise, of its own: the numbers that a model draws for its dropout do not
    depend on there being a start.

    Its seed is drawn from torch's default CPU generator.
    """
    seed = int(torch.randint(2**62, ()))
    return lambda x: torch.Generator(x.device).manual_seed(seed)


def tiny_noise(size: float, mask: Tensor | None) -> Start:
    """U(0, 1) * size."""
    generator = drawn_apart()
    return lambda x: masked(
        torch.rand(x.shape, generator=generator(x), dtype=x.dtype, device=x.device) * size, mask
    )


def uniform_in_ball(radius: float, norm: str, per: str, mask: Tensor | None) -> Start:
    """Uniform in the ball over the tokens that are real: every element in [-radius, radius],
    or a direction and a length.
    """
    generator = drawn_apart()

    def start(x: Tensor) -> Tensor:
        source: dict[str, Any] = dict(
            generator=generator(x),
            dtype=torch.promote_types(x.dtype, torch.float32),
            device=x.device,
        )
        if norm != "l2":
            return masked((2 * torch.rand(x.shape, **source) - 1) * radius, mask).to(x.dtype)
        direction = fgm_perturbation(torch.randn(x.shape, **source), 1.0, per=per, mask=mask)
        axes = {"sample": tuple(range(1, x.dim())), "token": (-1,), "all": tuple(range(x.dim()))}[
            per
        ]
        dimensions = masked(torch.ones_like(direction), mask).sum(axes, keepdim=True).clamp(min=1)
        return (direction * radius * torch.rand(dimensions.shape, **source) ** (1 / dimensions)).to(
            x.dtype
        )

    return start


def in_a_cube(size: float, mask: Tensor | None) -> Start:
    """U(-1, 1) * size / sqrt(L d) on the L real tokens of d elements: no longer than `size`
    (FreeLB's start).
    """
    generator = drawn_apart()

    def start(x: Tensor) -> Tensor:
        noise = torch.rand(
            x.shape,
            generator=generator(x),
            dtype=torch.promote_types(x.dtype, torch.float32),
            device=x.device,
        )
        elements = (
            math.prod(x.shape[1:]) if mask is None else (mask != 0).sum(1) * math.prod(x.shape[2:])
        )
        lengths = (
            torch.as_tensor(elements, device=x.device)
            .clamp(min=1)
            .sqrt()
            .reshape(-1, *[1] * (x.dim() - 1))
        )
        return masked((2 * noise - 1) * size / lengths, mask).to(x.dtype)

    return start
