"""Makes every analysis of `uk.analysis` on models trained on real text, a picture and its data each
(`python -m bench.analyses --data DIR`).
"""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import uegr_kernels as uk
from uegr_kernels.analysis.attack import STRENGTHS
from uegr_kernels.finetune import measures
from uegr_kernels.finetune.classifiers import Classifier
from uegr_kernels.finetune.data import UserError
from uegr_kernels.models import MODELS

from .. import harness, machine
from ..tables import table
from . import data, sgd_noise, training
from .accuracy import RESULTS
from .data import Row, read
from .plan import METHODS, RATES, settings_of, with_parents
from .report import mean_and_deviation
from .runs import refused, stopped
from .training import Settings, Start

DOCS = harness.ROOT / "docs" / "analyses"
# attacks by the norm of a text's embeddings
RELATIVE = (0.01, 0.03, 0.1)
# Layers whose outputs are features of a text: the last but one, named for the dropout behind it, is
# what the logits are made of.
LAYERS = {
    "textcnn": (
        "embedding",
        "convolutions.0",
        "convolutions.1",
        "convolutions.2",
        "dropout",
        "linear",
    ),
    "bilstm": ("embedding", "dropout", "linear"),
    "texthan": ("embedding", "dropout", "linear"),
    "transformer": ("embedding", "encoder.layers.0", "encoder.layers.1", "dropout", "linear"),
}
ARAT: dict[str, dict[str, Any]] = {
    "neither": {"stop_gradient": False, "predictor": False},
    "stop-gradient": {"stop_gradient": True, "predictor": False},
    "stop-gradient and predictor": {"stop_gradient": True, "predictor": True},
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Holds how much of everything: test rows compared (CKA), attacked, and under the landscape's
    loss; its points; Hutchinson's samples.
    """

    examples: int = 500
    epochs: int = 6
    seeds: int = 3
    compared: int = 768
    attacked: int = 128
    plane_rows: int = 128
    points: int = 11
    samples: int = 12
    outside: int = 500
    conflict_batches: int = 8
    # chains of the simulation on a quadratic
    quadratics: int = 4000
    # and on text
    chains: int = 20
    chain_rows: int = 96
    chain_epochs: int = 16


QUICK = Sizes(40, 1, 1, 32, 16, 16, 3, 2, 32, 1, 50, 3, 32, 2)


class Tuned(NamedTuple):
    """Holds a classifier that was trained on the first half of the rows, then tuned on the second,
    and what makes batches of rows for it.
    """

    classifier: Classifier
    encoded: Callable[[list[Row]], training.Batches]

    @property
    def model(self) -> nn.Module:
        return self.classifier.model


class Lab:
    """Holds the data, the models, and what has been seen while they were trained."""

    def __init__(self, options: argparse.Namespace, sizes: Sizes, bar: Any) -> None:
        self.options, self.sizes, self.bar = options, sizes, bar
        self.data = read(options.data, options.set)
        self.seeds = range(options.seed, options.seed + sizes.seeds)
        self.cka: dict[str, dict[str, list[dict[str, float]]]] = {}
        path = RESULTS / "points.json"
        self.points: dict[str, dict[str, Any]] = (
            json.loads(path.read_text()) if path.exists() else {}
        )

    def settings(self, name: str, seed: int) -> Settings:
        """Returns the settings of a method at its tuned point, or where it has none at the middle
        of its space.
        """
        parent = METHODS[name].parent or name
        space = RATES | METHODS[parent].space
        point = {key: values[len(values) // 2] for key, values in space.items()}
        point |= self.points.get(f"{parent} {self.options.set} {self.options.model}", {})
        rows, epochs = self.sizes.examples, self.sizes.epochs
        start = Settings(
            self.options.set,
            self.options.model,
            "plain",
            seed,
            epochs=epochs,
            examples=rows,
            final=False,
        )
        return settings_of(with_parents(name), point, start)

    @functools.cache  # noqa: B019
    def halves(self, seed: int) -> tuple[list[Row], list[Row], list[Row]]:
        """Returns rows to train on first, rows to tune on, rows to validate on."""
        both, held = training.split(
            self.data,
            dataclasses.replace(self.settings("dropout", seed), examples=2 * self.sizes.examples),
        )
        return both[: len(both) // 2], both[len(both) // 2 :], held

    def new(self, settings: Settings) -> Tuned:
        """Returns a model, not yet trained, with the words of both halves."""
        first, second, _ = self.halves(settings.seed)
        torch.manual_seed(settings.seed)
        classifier = training.build(settings, self.data, first + second)
        return Tuned(classifier, functools.partial(training.batches_of, classifier, self.data))

    def trained(
        self,
        settings: Settings,
        rows: int,
        weights: dict[str, Tensor] | None,
        watch: training.Watch | None = None,
    ) -> Tuned:
        """Returns a model trained on the first (0) or second (1) half."""
        start, halves = self.new(settings), self.halves(settings.seed)
        if weights:
            start.model.load_state_dict(weights)
        whole = Start(halves[rows], halves[2], start.classifier)
        training.run(settings, self.options.data, start=whole, watch=watch)
        self.bar.update()
        return start

    @functools.cache  # noqa: B019
    def first(self, seed: int) -> nn.Module:
        """Returns what every method starts from: plain training with dropout on the first half."""
        return self.trained(self.settings("dropout", seed), 0, None).model.eval()

    @functools.cache  # noqa: B019
    def tuned(self, name: str, seed: int) -> Tuned:
        """Returns a method's model; the first seed's are compared with what they started from,
        epoch by epoch, where that is asked for.
        """
        watch = self.follow(name) if "cka" in self.options.only and seed == self.seeds[0] else None
        return self.trained(self.settings(name, seed), 1, self.first(seed).state_dict(), watch)

    def picture(self, name: str) -> pathlib.Path:
        return self.options.output / f"{name}.png"

    def batches(self, tuned: Tuned, rows: list[Row]) -> list[tuple[dict[str, Tensor], Tensor]]:
        of = tuned.encoded(rows)
        return list(map(of, training.in_order(len(rows))))

    def follow(self, name: str) -> training.Watch:
        """Keeps the CKA of each layer after each epoch, on clean and on attacked texts."""
        seed = self.seeds[0]
        before = Moved(self.first(seed))
        batches = self.batches(
            self.new(self.settings(name, seed)), self.data.test[: self.sizes.compared]
        )
        layers = [f"model.{layer}" for layer in LAYERS[self.options.model]]
        found = self.cka[name] = {
            condition: [] for condition in ("clean", *(f"FGM {e:g}" for e in STRENGTHS))
        }

        def watch(epoch: int, model: nn.Module, recipe: Any) -> None:
            gradients = [sgd_noise.at_embedding(model, *batch)[1] for batch in batches]
            for epsilon, seen in zip((0.0, *STRENGTHS), found.values(), strict=True):
                deltas = [
                    uk.fgm_perturbation(gradient, epsilon, mask=inputs["attention_mask"])
                    for gradient, (inputs, _) in zip(gradients, batches, strict=True)
                ]
                moved = [
                    (inputs | {"delta": delta}, labels)
                    for (inputs, labels), delta in zip(batches, deltas, strict=True)
                ]
                alike = uk.analysis.cka(before, Moved(model), moved, layers)
                seen.append({layer.removeprefix("model."): value for layer, value in alike.items()})

        return watch


class Moved(nn.Module):
    """Wraps a model whose embedded words are moved by `delta`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, delta: Tensor, **inputs: Tensor) -> Tensor:
        handle = self.model.embedding.register_forward_hook(
            lambda module, args, output: output + delta, prepend=True
        )
        try:
            return self.model(**inputs)
        finally:
            handle.remove()


# The analyses: each returns its data and a table, and draws its pictures

Found = tuple[dict[str, Any], str]


def cka(lab: Lab) -> Found:
    for name in lab.options.methods:
        lab.tuned(name, lab.seeds[0])
    conditions = list(next(iter(lab.cka.values())))
    last = {
        f"{name}, {condition}": lab.cka[name][condition][-1]
        for name in lab.cka
        for condition in (conditions[0], conditions[-1])
    }
    uk.analysis.plot_cka(
        {name: epochs[conditions[0]][-1] for name, epochs in lab.cka.items()},
        lab.picture("cka-layers"),
    )
    uk.analysis.plot_cka(
        {
            name: {i: mean(each) for i, each in enumerate(found[conditions[-1]], 1)}
            for name, found in lab.cka.items()
        },
        lab.picture("cka-epochs"),
    )
    rows = [
        [name, *(f"{mean(epochs[condition][-1]):.3f}" for condition in conditions)]
        for name, epochs in lab.cka.items()
    ]
    text = table(["method", *conditions], rows)
    rows = [[name, *(f"{value:.3f}" for value in layers.values())] for name, layers in last.items()]
    text += "\n\n" + table(["method, texts", *next(iter(last.values()))], rows)
    return {"cka": lab.cka}, (
        f"Linear CKA after the last epoch: the mean over layers, then by layer.\n\n{text}"
    )


def attacks(lab: Lab) -> Found:
    found: dict[str, dict[str, list[list[uk.analysis.Attacked]]]] = {}
    for name in lab.options.methods:
        found[name] = {"fgm": [], "pgd": [], "relative": []}
        for seed in lab.seeds:
            tuned = lab.tuned(name, seed)
            batches = lab.batches(tuned, lab.data.test[: lab.sizes.attacked])
            look = functools.partial(
                uk.analysis.accuracy_under_attack, tuned.model, tuned.classifier.embedding, batches
            )
            for kind in ("fgm", "pgd"):
                found[name][kind].append(look(STRENGTHS, kind))
            found[name]["relative"].append(look(RELATIVE, "pgd", relative=True))
            lab.bar.update()
    middle = {
        name: {kind: list(map(averaged, zip(*seeds, strict=True))) for kind, seeds in of.items()}
        for name, of in found.items()
    }
    for kind in ("fgm", "pgd", "relative"):
        uk.analysis.plot_accuracy_under_attack(
            {name: of[kind] for name, of in middle.items()}, lab.picture(f"attack-{kind}")
        )
    drops = {
        f"{name}, {kind.upper()}": of[kind]
        for name, of in middle.items()
        for kind in ("fgm", "pgd")
    }
    uk.analysis.plot_accuracy_under_attack(drops, lab.picture("attack-drop"), drop=True)

    def cells(of: dict[str, list[list[uk.analysis.Attacked]]], kind: str) -> list[str]:
        return [
            mean_and_deviation([each.accuracy for each in level])
            for level in list(zip(*of[kind], strict=True))[1:]
        ]

    share = next(iter(middle.values()))["pgd"]
    rows = [
        [
            name,
            mean_and_deviation([each[0].accuracy for each in of["pgd"]]),
            *cells(of, "fgm"),
            *cells(of, "pgd"),
        ]
        for name, of in found.items()
    ]
    text = table(
        ["method", "clean", *(f"{kind} {e:g}" for kind in ("FGM", "PGD") for e in STRENGTHS)], rows
    )
    text += (
        "\n\nOf the norm of a text's embeddings these epsilons are "
        f"{', '.join(f'{each.relative:.2%}' for each in share[1:])}.\n\n"
    )
    rows = []
    for name, of in found.items():
        gaps = [
            [p.drop - f.drop for f, p in zip(*pair, strict=True)]
            for pair in zip(of["fgm"], of["pgd"], strict=True)
        ]
        losses = [
            mean_and_deviation([each.drop for each in level])
            for level in list(zip(*of["pgd"], strict=True))[1:]
        ]
        rows.append(
            [
                name,
                *losses,
                *(mean_and_deviation(list(level)) for level in list(zip(*gaps, strict=True))[1:]),
                *cells(of, "relative"),
            ]
        )
    heads = [*(f"PGD's drop {e:g}" for e in STRENGTHS), *(f"beyond FGM's {e:g}" for e in STRENGTHS)]
    text += table(["method", *heads, *(f"PGD {e:g} of the norm" for e in RELATIVE)], rows)
    return {"attack": found}, text


def landscape(lab: Lab) -> Found:
    planes, told = {}, {}
    for name in lab.options.methods:
        tuned = lab.tuned(name, lab.seeds[0])
        rows = lab.data.test[: lab.sizes.plane_rows]
        inputs, labels = tuned.encoded(rows)(range(len(rows)))

        def loss(
            model: nn.Module, inputs: dict[str, Tensor] = inputs, labels: Tensor = labels
        ) -> Tensor:
            return F.cross_entropy(model(**inputs), labels)

        plane = planes[name] = uk.analysis.loss_plane(
            tuned.model, loss, seed=lab.options.seed, points=lab.sizes.points
        )
        top = uk.analysis.largest_eigenvalue(
            tuned.model, loss, iterations=5 * lab.sizes.samples, tolerance=1e-2
        )
        trace, error = uk.analysis.hessian_trace(tuned.model, loss, samples=lab.sizes.samples)
        middle = plane.values[len(plane.a) // 2, len(plane.b) // 2].item()
        rise = plane.values.mean().item() - middle
        told[name] = {
            "loss": middle,
            "rise": rise,
            "largest_eigenvalue": top,
            "trace": trace,
            "error": error,
        }
        lab.bar.update()
    for surface in (False, True):
        uk.analysis.plot_loss_plane(
            planes, lab.picture("landscape-surface" if surface else "landscape"), surface=surface
        )
    rows = [
        [
            name,
            f"{of['loss']:.3f}",
            f"{of['rise']:.3f}",
            f"{of['largest_eigenvalue']:.3g}",
            f"{of['trace']:.3g} ± {of['error']:.2g}",
        ]
        for name, of in told.items()
    ]
    text = table(
        [
            "method",
            "test loss",
            "mean rise on the plane",
            "largest eigenvalue",
            "trace ± standard error",
        ],
        rows,
    )
    values = {
        name: [[float(f"{value:.4g}") for value in row] for row in plane.values.tolist()]
        for name, plane in planes.items()
    }
    return {"at": next(iter(planes.values())).a.tolist(), "values": values, "curvature": told}, text


def confidence(lab: Lab) -> Found:
    others = [name for name in data.sets_in(lab.options.data) if name != lab.options.set]
    others = [name for name in others if read(lab.options.data, name).metric != "correlation"]
    if not others:
        raise UserError(
            f"--data {lab.options.data}: no set beside {lab.options.set}, whose texts "
            "a model could tell from its own; add one"
        )
    found: dict[str, dict[str, list[float]]] = {}
    first: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    for name in lab.options.methods:
        own = found[name] = {key: [] for key in ("accuracy", "error", *others)}
        for seed in lab.seeds:
            tuned = lab.tuned(name, seed)
            inside = logits(lab, tuned, lab.data.test)
            labels = torch.tensor(
                measures.numbers(training.examples_of(lab.data.test), lab.data.labels)
            )
            own["accuracy"].append((inside.argmax(1) == labels).double().mean().item())
            own["error"].append(uk.analysis.calibration_error(inside, labels))
            outside = {}
            for other in others:
                rows = read(lab.options.data, other).test[: lab.sizes.outside]
                outside[other] = logits(
                    lab, tuned, [Row(lab.data.labels[0], row.texts) for row in rows]
                )
                own[other].append(uk.analysis.ood_auroc(inside, outside[other]))
            first.setdefault(name, (inside, outside))
            lab.bar.update()
    uk.analysis.plot_calibration(
        {name: inside for name, (inside, _) in first.items()}, labels, lab.picture("calibration")
    )
    shown = "uegr" if "uegr" in first else next(iter(first))
    uk.analysis.plot_ood_auroc(*first[shown], lab.picture("ood"))
    rows = [
        [name, *(mean_and_deviation(values) for values in of.values())]
        for name, of in found.items()
    ]
    text = table(
        ["method", "accuracy", "calibration error", *(f"AUROC, {other}" for other in others)], rows
    )
    return {"confidence": found, "drawn": shown}, f"All in hundredths.\n\n{text}"


def logits(lab: Lab, tuned: Tuned, rows: list[Row]) -> Tensor:
    with torch.no_grad():
        return torch.cat([tuned.model.eval()(**inputs) for inputs, _ in lab.batches(tuned, rows)])


def conflict(lab: Lab) -> Found:
    found: dict[str, list[uk.analysis.Conflict]] = {}
    seed = lab.seeds[0]
    for name, options in ARAT.items():
        options = {"norm": "l2", "epsilon": STRENGTHS[1], "steps": 3, **options}
        settings = dataclasses.replace(
            lab.settings("dropout", seed), method="arat", options=options
        )
        rows = lab.halves(seed)[1][: settings.batch * lab.sizes.conflict_batches]
        batch = lab.new(settings).encoded(rows)
        batches = [
            batch(range(i, min(i + settings.batch, len(rows))))
            for i in range(0, len(rows), settings.batch)
        ]
        seen = found[name] = []

        def watch(
            epoch: int, model: nn.Module, recipe: Any, batches: list = batches, seen: list = seen
        ) -> None:
            each = [opposition(model, recipe, *batch) for batch in batches]
            seen.append(
                uk.analysis.Conflict(
                    mean([one.cosine for one in each]), mean([one.opposed for one in each])
                )
            )

        lab.trained(settings, 1, lab.first(seed).state_dict(), watch)
    uk.analysis.plot_gradient_conflict(found, lab.picture("conflict"))
    rows = []
    for name, epochs in found.items():
        rows.append(
            [
                name,
                *(
                    f"{value:.3f}"
                    for one in (epochs[0], epochs[-1])
                    for value in (one.cosine, one.opposed)
                ),
            ]
        )
    text = table(
        ["ARAT with", "cosine, first epoch", "opposed", "cosine, last epoch", "opposed"], rows
    )
    return {"conflict": found}, text


def opposition(
    model: nn.Module, recipe: Any, inputs: dict[str, Tensor], labels: Tensor
) -> uk.analysis.Conflict:
    """Compares the gradients of ARAT's adversarial loss and of its invariance, each from a call
    with the other weights at 0 and the same draws.
    """
    weights = ("adversarial_weight", "invariance_weight", "clean_weight")
    kept, state, gradients = (
        {name: getattr(recipe, name) for name in weights},
        recipe.state_dict(),
        [],
    )
    state = copy.deepcopy(state)
    model.train()
    for chosen in weights[:2]:
        for name in weights:
            setattr(recipe, name, float(name == chosen))
        model.zero_grad()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            recipe.backward(inputs, labels)
        gradients.append(
            [
                None if p.grad is None else p.grad.clone()
                for p in model.parameters()
                if p.requires_grad
            ]
        )
    for name, value in kept.items():
        setattr(recipe, name, value)
    recipe.after_step()
    recipe.load_state_dict(state)
    model.zero_grad()
    return uk.analysis.gradient_conflict(model, *gradients)


def covariance(lab: Lab) -> Found:
    torch.manual_seed(lab.options.seed)
    closed, simulated, last = {}, {}, {}
    for name, case in sgd_noise.CASES.items():
        closed[name], simulated[name], last[name] = sgd_noise.quadratic(case, lab.sizes.quadratics)
        lab.bar.update()
    uk.analysis.plot_sgd_covariance(closed, simulated, lab.picture("covariance"))
    rows = []
    for name, seen in simulated.items():
        off = [abs(value / closed[name][step] - 1) for step, value in seen.items() if step]
        values = (closed[name][max(seen)], seen[max(seen)], last[name])
        rows.append([name, *(f"{value:.4f}" for value in values), f"{max(off):.1%}"])
    text = table(
        [
            "SGD",
            "tr S at the last dot, closed form",
            "simulated",
            "stationary",
            "largest difference at any step",
        ],
        rows,
    )
    found = {
        name: {"closed": closed[name], "simulated": simulated[name], "stationary": last[name]}
        for name in closed
    }
    return {"chains": lab.sizes.quadratics, "covariance": found}, text


SGD: dict[str, dict[str, float]] = {
    "clean loss": {},
    "clean loss, selective": {"keep": 0.3},
    "adversarial loss": {"epsilon": sgd_noise.EPSILON},
    "adversarial loss, selective": {"epsilon": sgd_noise.EPSILON, "keep": 0.3},
}
DRAWN = ["tr S, closed form", "tr S, measured", "tr(HS)/2", "largest eigenvalue", "tr H", "tr C"]
DRAWN += ["KL to the start", "robust gap", "clean gap"]


def diagnostic(lab: Lab) -> Found:
    seed, sizes = lab.seeds[0], lab.sizes
    first, second, _ = lab.halves(seed)
    whole, encoded = lab.new(lab.settings("dropout", seed))
    model = sgd_noise.Bag(whole.embedding.num_embeddings, len(lab.data.labels))
    sgd_noise.embed(model, encoded(first), len(first), sizes.epochs)
    rows, others = second[: sizes.chain_rows], lab.data.test[: sizes.outside]
    train, test = encoded(rows)(range(len(rows))), encoded(others)(range(len(others)))
    found = {}
    for name, options in SGD.items():
        how, chains = sgd_noise.Training(sizes.chain_epochs, **options), []
        for i in range(sizes.chains):
            chains.append(sgd_noise.chain(model, encoded(rows), len(rows), how, seed + i))
            lab.bar.update()
        found[name] = sgd_noise.by_epoch(model, torch.stack(chains), train, test, how)
    drawn = {
        name: [{key: one[key] for key in DRAWN} for one in epochs] for name, epochs in found.items()
    }
    uk.analysis.plot_sgd_diagnostic(drawn, lab.picture("diagnostic"))
    half = how.epochs // 2
    heads = list(found[name][0])
    lines = [
        [f"{name} {epoch}", *(f"{found[name][epoch - 1][head]:.3g}" for head in heads)]
        for name in found
        for epoch in dict.fromkeys((1, max(1, half), how.epochs))
    ]
    about = {
        "parameters": len(model.flat),
        "texts": len(rows),
        "runs": sizes.chains,
        "settings": how,
    }
    told = (
        f"{about['parameters']} parameters, {len(rows)} texts, {sizes.chains} runs, batch "
        f"{how.batch}, selective: p = {how.keep:g}, "
    )
    told += (
        f"adversarial: epsilon = {how.epsilon:g}; learning rate {how.lr:g} up to epoch {half}, "
        f"then {how.lr / 10:g}."
    )
    return {
        "about": about,
        "epochs": found,
    }, f"{told}\n\n{table(['SGD on the, after epoch', *heads], lines)}"


# What all share


def mean(values: Iterable[float] | dict[str, float]) -> float:
    return statistics.fmean(values.values() if isinstance(values, dict) else values)


def figures_of(attacked: uk.analysis.Attacked) -> dict[str, float]:
    """Returns what came of an attack, but for the single texts: they are many, and those of several
    runs have nothing in common.
    """
    found = dataclasses.asdict(attacked)
    del found["outcomes"], found["predicted"]
    return found


def averaged(found: Iterable[uk.analysis.Attacked]) -> uk.analysis.Attacked:
    """Returns the mean of each figure."""
    several = list(map(figures_of, found))
    return uk.analysis.Attacked(
        **{name: mean(each[name] for each in several) for name in several[0]}
    )


def rounded(value: Any) -> Any:
    """Returns data for JSON: floats to five digits, NaN as null."""
    if isinstance(value, uk.analysis.Attacked):
        return rounded(figures_of(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return rounded(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return (
        (float(f"{value:.5g}") if math.isfinite(value) else None)
        if isinstance(value, float)
        else value
    )


class Part(NamedTuple):
    """Holds an analysis: the function, and how often it advances the bar beside training."""

    of: Callable[[Lab], Found]
    ticks: Callable[[Sizes, int], int]
    # of every method
    models: bool = True


PARTS = {
    "cka": Part(cka, lambda sizes, methods: 0),
    "attack": Part(attacks, lambda sizes, methods: methods * sizes.seeds),
    "landscape": Part(landscape, lambda sizes, methods: methods),
    "confidence": Part(confidence, lambda sizes, methods: methods * sizes.seeds),
    "conflict": Part(conflict, lambda sizes, methods: len(ARAT), models=False),
    "covariance": Part(covariance, lambda sizes, methods: len(sgd_noise.CASES), models=False),
    "diagnostic": Part(diagnostic, lambda sizes, methods: len(SGD) * sizes.chains, models=False),
}


def ticks(options: argparse.Namespace, sizes: Sizes) -> int:
    own = sum(PARTS[name].ticks(sizes, len(options.methods)) for name in options.only)
    seeds = sizes.seeds if {"attack", "confidence"} & set(options.only) else 1
    if any(PARTS[name].models for name in options.only):
        return own + seeds * (1 + len(options.methods))
    return own + ("conflict" in options.only)


# The command


def parser() -> argparse.ArgumentParser:
    def names(known: Iterable[str]) -> Callable[[str], list[str]]:
        def chosen(text: str) -> list[str]:
            found = list(known) if text == "all" else text.split(",")
            for name in found:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
            return found

        return chosen

    top = argparse.ArgumentParser(
        prog="python -m bench.analyses", description="Looks at models trained on real text."
    )
    add, usual = top.add_argument, Sizes()
    add(
        "--data",
        metavar="DIR",
        type=pathlib.Path,
        required=True,
        help="folders NAME/train.tsv.gz, NAME/test.tsv.gz, or GLUE's",
    )
    add(
        "--set",
        metavar="NAME",
        default="agnews",
        help="the set in DIR to train on; default agnews. The others are out of distribution",
    )
    add("--model", choices=[name for name in MODELS if name in LAYERS], default="textcnn")
    add(
        "--methods",
        metavar="LIST",
        type=names(METHODS),
        default="dropout,at,r_drop,uegr,drop_attack",
        help=f"of {','.join(METHODS)}",
    )
    add(
        "--only",
        metavar="LIST",
        type=names(PARTS),
        default="all",
        help=f"some of {','.join(PARTS)}",
    )
    add(
        "--examples",
        metavar="N",
        type=harness.count,
        help=f"to train on at first, and as many to tune on; default {usual.examples}",
    )
    add("--epochs", metavar="N", type=harness.count, help=f"of each; default {usual.epochs}")
    add(
        "--seeds",
        metavar="N",
        type=harness.count,
        help=f"models of each method; default {usual.seeds}",
    )
    add("--seed", metavar="N", type=int, default=0, help="the first one; default 0")
    add("--quick", action="store_true", help="very small, to see that it runs: a matter of seconds")
    add(
        "--threads",
        metavar="N",
        type=harness.count,
        default=1,
        help="more pay for large models on an idle machine; default 1",
    )
    add(
        "--output",
        metavar="DIR",
        type=pathlib.Path,
        help="default docs/analyses, with --quick build/analyses",
    )
    return top


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 for wrong arguments or data, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "bench.analyses", *arguments])
    try:
        options = parser().parse_args(arguments)
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("the pictures need matplotlib: pip install matplotlib")
        given = {
            key: getattr(options, key)
            for key in ("examples", "epochs", "seeds")
            if getattr(options, key)
        }
        sizes = dataclasses.replace(QUICK if options.quick else Sizes(), **given)
        options.output = options.output or (
            harness.ROOT / "build" / "analyses" if options.quick else DOCS
        )
        data.sets_in(options.data)
        if read(options.data, options.set).metric == "correlation":
            raise UserError(f"--set {options.set} is a regression; name a set with classes")
        options.output.mkdir(parents=True, exist_ok=True)
        with machine.threads(options.threads):
            run(options, sizes, command)
    except UserError as error:
        return refused(error)
    except KeyboardInterrupt:
        return stopped("The analyses that are finished are written; --only LIST makes the others.")
    return 0


def run(options: argparse.Namespace, sizes: Sizes, command: str) -> None:
    """Writes each analysis as soon as it is finished: data, pictures, and its table into the
    document beside the folder.
    """
    here = harness.environment(command)
    today = time.strftime("%Y-%m-%d", time.gmtime())
    about = {
        "command": command,
        "commit": here["commit"],
        "torch": here["versions"]["torch"],
        "time": today,
    }
    with tqdm(
        total=ticks(options, sizes), unit="step", mininterval=1 if sys.stderr.isatty() else 60
    ) as bar:
        lab = Lab(options, sizes, bar)
        for name in options.only:
            bar.set_description(name)
            data, text = PARTS[name].of(lab)
            used = (
                {method: lab.settings(method, lab.seeds[0]) for method in options.methods}
                if PARTS[name].models
                else {}
            )
            whole = about | {"sizes": sizes, "settings": used} | data
            (options.output / f"{name}.json").write_text(json.dumps(rounded(whole)) + "\n")
            source = (
                f"`{command}`, {about['time']}, at {about['commit']}; data: "
                f"[{name}.json]({options.output.name}/{name}.json)"
            )
            tell(options.output.with_suffix(".md"), name, f"{text}\n\n{source}")
            bar.clear()
            print(f"{name}\n\n{text}\n", flush=True)
    print(f"Data and pictures: {options.output}")


def tell(document: pathlib.Path, name: str, text: str) -> None:
    """Puts the text between its marks in the document, where there is one."""
    if not document.exists():
        return
    marks = (f"<!-- {name}: generated by python -m bench.analyses -->", f"<!-- end of {name} -->")
    block = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
    document.write_text(
        block.sub(lambda _: f"{marks[0]}\n{text}\n\n{marks[1]}", document.read_text())
    )
