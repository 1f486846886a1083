"""AdvEmbed: one step of ascent per token on the embeddings."""

from typing import Any

from torch import Tensor, nn

from .attack import Start, tiny_noise
from .pgd import PGD
from .recipe import check_number


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
        **options: Any,
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
