"""DropAttack: randomly masked attacks on the embeddings and on chosen weights, in one step or
in K.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..passes import Inputs
from ..perturbation import perturbed_weights
from . import options
from .attack import StepRecipe
from .recipe import check_reached, named_parameters


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class DropAttack(StepRecipe):
    """Trains against randomly masked attacks on the embeddings and on weights.

    See docs/methods.md, "DropAttack I and I&W".

    Without `weights` it is the paper's variant (I), which attacks the input alone; with them (I&W),
    or the weights alone.

    epsilon, norm, per        the size of the input's attack, as in `fgm_perturbation`; per="all" is
        the whole batch's norm
    keep_probability          p, of an element of it to be attacked, in [0, 1]
    weights                   names of the parameters to attack together in a pass of their own,
                              such as "lstm.weight_ih_l0"; * stands for anything; none: DropAttack
                              (I)
    epsilon_weights, keep_probability_weights   the L2 size of each attacked tensor's perturbation,
        and p there
    attack_input              False: the weights alone
    the common options        (`help(uk.recipes.plain)`)

    L = CE(F(e; w)) + CE(F(e + M r; w)) + CE(F(e; W + M_W r_W)); the masks do not rescale. The
    weights' pass goes backward while they are perturbed, and leaving it restores every bit. 2
    forwards and backwards for (I), 3 for (I&W). Losses: loss, clean_loss, adversarial_loss (input),
    weight_loss.
    """

    passes: ClassVar[int] = 2
    size_option: ClassVar[str | None] = "epsilon"

    steps: int = dataclasses.field(init=False, default=1)
    # the paper's 5 of a batch of 128, by sample
    epsilon: float = options.number(0.44)
    keep_probability: float = options.number(0.5, 0, 1)
    weights: str | Sequence[str] = ()
    epsilon_weights: float = options.number(5.0)
    keep_probability_weights: float = options.number(0.5, 0, 1)
    attack_input: bool = options.flag(True)
    _attacked: list[nn.Parameter] = dataclasses.field(init=False)

    def _settle_options(self) -> None:
        super()._settle_options()
        self._attacked = list(named_parameters(self.model, self.weights).values())
        if not self.attack_input and not self._attacked:
            raise ValueError(
                "attack_input=False attacks nothing without weights; name some, or leave it True"
            )
        if self.relative and self._attacked:
            raise ValueError(
                "relative=True measures the embeddings, and weights have none; leave "
                "one of relative and weights out"
            )

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        with self._hooked_gradients() as of_weights:
            loss, clean = self._descend(labels, scale, watched=True)
        g_x, g_w = clean.gradient, of_weights
        check_reached(g_w)
        # of both masks, which all steps share
        seeds = [int(torch.randint(2**62, ())) for _ in range(2)]
        of_input, of_weight = [], []
        for step in range(1, self.steps + 1):
            last = step == self.steps
            if self.attack_input:
                delta = self._step(
                    clean, g_x, keep_probability=self.keep_probability, seed=seeds[0]
                )
                of_this, pass_ = self._descend(
                    labels,
                    scale,
                    delta,
                    weight=1 / self.steps,
                    watched=not last,
                    last=last and not self._attacked,
                )
                of_input.append(of_this)
                g_x = g_x if last else g_x + pass_.gradient
            if self._attacked:
                moved = perturbed_weights(
                    self._attacked,
                    self.epsilon_weights,
                    gradients=g_w,
                    keep_probability=self.keep_probability_weights,
                    seed=seeds[1],
                    backend=self.backend,
                )
                with moved, self._hooked_gradients() as of_weights:
                    of_this, _ = self._descend(labels, scale, weight=1 / self.steps, last=last)
                of_weight.append(of_this)
                g_w = [_added(before, new) for before, new in zip(g_w, of_weights, strict=True)]
        means = {"adversarial_loss": of_input, "weight_loss": of_weight}
        losses = {"clean_loss": loss} | {
            name: torch.stack(each).mean() for name, each in means.items() if each
        }
        return {"loss": sum(losses.values(), torch.zeros_like(loss)), **losses}

    @contextlib.contextmanager
    def _hooked_gradients(self) -> Iterator[list[Tensor | None]]:
        """Yields the attacked weights' gradients of the backward inside, and of nothing that
        .grad held before.
        """
        gradients: list[Tensor | None] = [None] * len(self._attacked)

        def keep(i: int, gradient: Tensor) -> None:
            # .grad may take the tensor itself, and then grows
            gradients[i] = gradient.clone()

        handles = [
            weight.register_hook(lambda gradient, i=i: keep(i, gradient))
            for i, weight in enumerate(self._attacked)
        ]
        try:
            yield gradients
        finally:
            for handle in handles:
                handle.remove()


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class DropAttackK(DropAttack):
    """Trains as `DropAttack` does in K steps, with one mask for all of them.

    See docs/methods.md, "DropAttack-K".

    steps     K; each attacks along the clean gradient plus 1/K of that of every step before it, and
              its perturbation, of the full size, takes the place of the one before
    the rest  as in DropAttack, which is K = 1 (`help(uk.recipes.drop_attack)`)

    The K input passes, and the K of the weights, count 1/K each. 1 + K forwards and backwards for
    (I), 1 + 2K for (I&W).
    """

    passes: ClassVar[int] = 4

    steps: int = options.integer(3, 1)


def _added(before: Tensor | None, new: Tensor | None) -> Tensor | None:
    return before if new is None else new if before is None else before + new
