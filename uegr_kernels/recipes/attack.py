"""Perturbations of the embeddings as recipes make them: in one step, or by projected ascent in
several; and where such an ascent starts.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from ..passes import Pass
from ..perturbation import ASCENT_NORMS, NORMS, PERS, fgm_perturbation, masked, pgd_step
from . import options
from .recipe import PassRecipe

# from the embedding's output to the first delta
Start = Callable[[Tensor], Tensor]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class StepRecipe(PassRecipe):
    """Trains with a delta of one step along the gradient at the embeddings.

    epsilon, norm, per  the size of delta, as in `fgm_perturbation`
    """

    epsilon: float = options.number(0.1)
    norm: str = options.choice("l2", NORMS)
    per: str = options.choice("sample", PERS)

    def _input_norm(self) -> str:
        return self.norm

    def _step(
        self,
        pass_: Pass,
        g: Tensor | None = None,
        *,
        keep_probability: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Returns delta along g, or along the gradient that the pass left."""
        step = functools.partial(
            fgm_perturbation,
            epsilon=self.epsilon,
            norm=self.norm,
            per=self.per,
            mask=pass_.mask,
            keep_probability=keep_probability,
            seed=seed,
            backend=self.backend,
        )
        return pass_.ascended(step, g)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class AttackRecipe(PassRecipe):
    """Trains with a delta of projected ascent on the embeddings; every step is a pass of its own
    that changes nothing else.

    epsilon     radius of the ball;  steps  how many;  step_size  None: 2.5 * epsilon / steps
    norm, per   as in `pgd_step`
    same_draw   every pass with the same dropout masks
    """

    epsilon: float = options.number(0.1)
    steps: int = options.integer(3, 1)
    step_size: float | None = options.number(None)
    norm: str = options.choice("l2", ASCENT_NORMS)
    per: str = options.choice("sample", PERS)
    same_draw: bool = options.flag(False)

    def _input_norm(self) -> str:
        return self.norm if self.steps else ""

    def _default_step_size(self) -> float:
        return 2.5 * self.epsilon / max(self.steps, 1)

    def _attack(
        self,
        labels: Tensor,
        scale: float | Tensor,
        draw: Callable[[], contextlib.AbstractContextManager[None]],
        clean: Pass | None = None,
    ) -> Tensor | None:
        """Returns delta after all steps, the first from the `clean` pass's gradient where one is
        given; None after no step.
        """
        start = self._start(self._batch.mask) if self.steps else None
        delta: Tensor | None = None
        step_size = self._default_step_size() if self.step_size is None else self.step_size
        for step in range(self.steps):
            if step or clean is None:
                with draw():
                    clean = self._ascend(labels, scale, start if delta is None else delta)
            delta = climb(
                clean,
                step_size=step_size,
                radius=self.epsilon,
                norm=self.norm,
                per=self.per,
                backend=self.backend,
            )
        return delta

    def _start(self, mask: Tensor | None) -> Start | None:
        """Returns the first delta; None: zero."""
        return None


def climb(
    pass_: Pass, *, step_size: float, radius: float, norm: str, per: str, backend: str
) -> Tensor:
    """Returns `pgd_step` from a pass's delta along its gradient."""

    def step(g: Tensor) -> Tensor:
        at = pass_.delta
        delta = pass_.measured(at) if isinstance(at, Tensor) else torch.zeros_like(g)
        return pgd_step(
            delta,
            g,
            step_size=step_size,
            radius=radius,
            norm=norm,
            per=per,
            mask=pass_.mask,
            backend=backend if norm != "max" else "auto",
        )

    return pass_.ascended(step)


def drawn_apart() -> Callable[[Tensor], torch.Generator]:
    """Returns a generator for noise, of its own: the numbers that a model draws for its dropout do
    not depend on there being a start.

    Its seed is drawn from torch's default CPU generator.
    """
    seed = int(torch.randint(2**62, ()))
    return lambda x: torch.Generator(x.device).manual_seed(seed)


def tiny_noise_start(size: float, mask: Tensor | None) -> Start:
    """Starts at U(0, 1) * size."""
    generator = drawn_apart()
    return lambda x: masked(
        torch.rand(x.shape, generator=generator(x), dtype=x.dtype, device=x.device) * size, mask
    )


class _Source(TypedDict):
    generator: torch.Generator
    dtype: torch.dtype
    device: torch.device


def uniform_ball_start(radius: float, norm: str, per: str, mask: Tensor | None) -> Start:
    """Starts uniformly in the ball over the tokens that are real: every element in [-radius,
    radius], or a direction and a length.
    """
    generator = drawn_apart()

    def start(x: Tensor) -> Tensor:
        source = _Source(
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


def uniform_cube_start(size: float, mask: Tensor | None) -> Start:
    """Starts at U(-1, 1) * size / sqrt(L d) on the L real tokens of d elements: no longer than
    `size` (FreeLB's start).
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
