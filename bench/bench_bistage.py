"""Times a whole training step of a small BERT: UEGR's beside plain AdamW's, and where its time
goes.
"""

import copy
import statistics
from collections.abc import Callable

import torch
from torch import nn

import uegr_kernels as uk
from uegr_kernels.models import TextTransformer

from . import timer
from .harness import Case, Contestant

WORDS, CLASSES = 8000, 2


def cases(quick: bool, device: str) -> list[Case]:
    sizes = (
        {"dimension": 32, "layers": 1, "heads": 2}
        if quick
        else {"dimension": 256, "layers": 4, "heads": 4}
    )
    batch = (4, 16) if quick else (16, 64)
    return [
        case(
            f"small BERT, {batch[0]} x {batch[1]} words, m = {passes}", sizes, batch, passes, device
        )
        for passes in (2, 3)
    ]


def case(name: str, sizes: dict, batch: tuple[int, int], passes: int, device: str) -> Case:
    torch.manual_seed(0)
    start = TextTransformer(WORDS, CLASSES, **sizes).to(device)
    ids, labels = (
        torch.randint(0, WORDS, batch).to(device),
        torch.randint(0, CLASSES, batch[:1]).to(device),
    )
    loss = nn.functional.cross_entropy

    def uegr(backend: str) -> Callable[[], object]:
        model = copy.deepcopy(start)
        stage = uk.BiStage(model, model.embedding, passes=passes, backend=backend)
        optimizer = uk.SelectiveAdamW(model.parameters(), 1e-4, seed=0, backend=backend)

        def step() -> None:
            optimizer.zero_grad()
            stage.backward(ids, labels)
            optimizer.step()

        return step

    def adamw(forwards: int) -> Callable[[], object]:
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            for _ in range(forwards):
                loss(model(ids), labels).backward()
            optimizer.step()

        return step

    def contestants() -> list[Contestant]:
        return [
            Contestant("uegr_kernels", uegr("auto")),
            Contestant("AdamW, one pass", adamw(1)),
            Contestant("AdamW, 1 + m passes", adamw(1 + passes)),
            Contestant("UEGR in plain PyTorch", uegr("reference"), rounds=2),
        ]

    def verify() -> str | None:
        losses = []
        for backend in ("auto", "reference"):
            torch.manual_seed(1)
            model = copy.deepcopy(start)
            losses.append(
                float(
                    uk.BiStage(model, model.embedding, passes=passes, backend=backend)
                    .backward(ids, labels)
                    .loss
                )
            )
        return (
            None
            if abs(losses[0] - losses[1]) < 1e-4
            else (f"the loss is {losses[0]} and {losses[1]}")
        )

    def breakdown() -> dict[str, float]:
        """Returns shares of a step, each part by itself, medians of ten."""
        model = copy.deepcopy(start)
        optimizer = uk.SelectiveAdamW(model.parameters(), 1e-4, seed=0)
        x = model.embedding(ids)
        wide = ids.repeat(passes, 1)
        clean, adversarial = (
            torch.randn(*shape, batch[0], CLASSES, device=device, requires_grad=True)
            for shape in ((), (passes,))
        )
        loss(model(ids), labels).backward()
        parts: dict[str, Callable[[], object]] = {
            "clean pass": lambda: loss(model(ids), labels).backward(),
            "adversarial passes": lambda: loss(model(wide), labels.repeat(passes)).backward(),
            "loss": lambda: uk.uegr_loss(clean, adversarial, labels).backward(),
            "perturbation": lambda: uk.fgm_perturbation(x.detach(), 0.1),
            "optimizer": optimizer.step,
        }
        sampled = timer.in_turn(parts, 10, device)
        seconds = {part: statistics.median(values) for part, values in sampled.items()}
        return {part: round(value / sum(seconds.values()), 4) for part, value in seconds.items()}

    parameters = sum(p.numel() for p in start.parameters())
    facts = {
        "model": "TextTransformer",
        **sizes,
        "batch": list(batch),
        "passes": passes,
        "parameters": parameters,
    }
    return Case(name, facts, 80 * parameters, verify, contestants, breakdown, device)
