"""DropAttack: randomly masked attacks on the embeddings and on chosen weights, in one step or
in K.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..perturbation import fgm_perturbation, perturbed_weights
from .recipe import PassRecipe, check_reached, named_parameters


class DropAttack(PassRecipe):
    """Adversarial training with randomly masked attacks on the embeddings and on weights (METHODS
    1, DropAttack I and I&W).

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
    attack_input              False: the weights alone;  the common options  (`PassRecipe`)

    L = CE(F(e; w)) + CE(F(e + M r; w)) + CE(F(e; W + M_W r_W)); the masks do not rescale. The
    weights' pass goes backward while they are perturbed, and leaving it restores every bit. 2
    forwards and backwards for (I), 3 for (I&W). Losses: loss, clean_loss, adversarial_loss (input),
    weight_loss.
    """

    steps = 1

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        epsilon: float = 0.44,  # the paper's 5 of a batch of 128, by sample
        norm: str = "l2",
        per: str = "sample",
        keep_probability: float = 0.5,
        weights: str | Sequence[str] = (),
        epsilon_weights: float = 5.0,
        keep_probability_weights: float = 0.5,
        attack_input: bool = True,
        **options: Any,
    ) -> None:
        self._perturbation: dict[str, Any] = dict(
            epsilon=epsilon, norm=norm, per=per, keep_probability=keep_probability
        )
        # raises for a wrong option
        fgm_perturbation(
            torch.zeros(1, 2, device="cpu"), **self._perturbation, seed=0, backend="reference"
        )
        epsilon_weights = checks.number("epsilon_weights", epsilon_weights, 0)
        keep_probability_weights = checks.number(
            "keep_probability_weights", keep_probability_weights, 0, 1
        )
        checks.flag("attack_input", attack_input)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; pass the nn.Module to train")
        self.weights = list(named_parameters(model, weights).values())
        if not attack_input and not self.weights:
            raise ValueError(
                "attack_input=False attacks nothing without weights; name some, or leave it True"
            )
        if options.get("relative") is True and self.weights:
            raise ValueError(
                "relative=True measures the embeddings, and weights have none; leave "
                "one of relative and weights out"
            )
        self.epsilon_weights, self.keep_probability_weights, self.attack_input = (
            epsilon_weights,
            keep_probability_weights,
            attack_input,
        )
        self.norm = norm
        super().__init__(model, embedding, optimizer, **options)

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        with self._hooked_gradients() as of_weights:
            loss, clean = self._descend(labels, scale, watched=True)
        g_x, g_w = clean.gradient, of_weights
        check_reached(g_w)
        options: dict[str, Any]
        # of both masks, which all steps share
        seeds = [int(torch.randint(2**62, ())) for _ in range(2)]
        of_input, of_weight = [], []
        for step in range(1, self.steps + 1):
            last = step == self.steps
            if self.attack_input:
                options = dict(
                    mask=clean.mask, seed=seeds[0], backend=self.backend, **self._perturbation
                )
                delta = clean.ascended(functools.partial(fgm_perturbation, **options), g_x)
                options = dict(
                    weight=1 / self.steps, watched=not last, last=last and not self.weights
                )
                of_this, pass_ = self._descend(labels, scale, delta, **options)
                of_input.append(of_this)
                g_x = g_x if last else g_x + pass_.gradient
            if self.weights:
                options = dict(
                    gradients=g_w,
                    keep_probability=self.keep_probability_weights,
                    seed=seeds[1],
                    backend=self.backend,
                )
                with (
                    perturbed_weights(self.weights, self.epsilon_weights, **options),
                    self._hooked_gradients() as of_weights,
                ):
                    of_this, _ = self._descend(labels, scale, weight=1 / self.steps, last=last)
                of_weight.append(of_this)
                g_w = [_added(before, new) for before, new in zip(g_w, of_weights, strict=True)]
        means = {"adversarial_loss": of_input, "weight_loss": of_weight}
        losses = {"clean_loss": loss} | {
            name: torch.stack(each).mean() for name, each in means.items() if each
        }
        total: Any = sum(losses.values())
        return {"loss": total, **losses}

    @contextlib.contextmanager
    def _hooked_gradients(self) -> Iterator[list[Tensor | None]]:
        """Yields the attacked weights' gradients of the backward inside, and of nothing that
        .grad held before.
        """
        gradients: list[Tensor | None] = [None] * len(self.weights)

        def keep(i: int, gradient: Tensor) -> None:
            gradients[i] = gradient.clone()  # .grad may take the tensor itself, and then grows

        handles = [
            weight.register_hook(lambda gradient, i=i: keep(i, gradient))
            for i, weight in enumerate(self.weights)
        ]
        try:
            yield gradients
        finally:
            for handle in handles:
                handle.remove()


class DropAttackK(DropAttack):
    """DropAttack in K steps, with one mask for all of them (METHODS 1, DropAttack-K).

    steps     K; each attacks along the clean gradient plus 1/K of that of every step before it, and
              its perturbation, of the full size, takes the place of the one before
    the rest  as in `DropAttack`, which is K = 1

    The K input passes, and the K of the weights, count 1/K each. 1 + K forwards and backwards for
    (I), 1 + 2K for (I&W).
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        steps: int = 3,
        **options: Any,
    ) -> None:
        checks.integer("steps", steps, 1)
        self.steps = steps
        super().__init__(model, embedding, optimizer, **options)


def _added(before: Tensor | None, new: Tensor | None) -> Tensor | None:
    return before if new is None else new if before is None else before + new
