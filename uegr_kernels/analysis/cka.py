"""Computes linear centred kernel alignment between the layers of two models (UEGR Fig. 2a;
Kornblith et al. 2019).
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.conv import _ConvNd as Convolution

from ..core import checks
from ..passes import Inputs
from .pictures import picture
from .watching import call, held, pooled

CHANNELS_SECOND = (BatchNorm, Convolution)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Computes ||Y^T X||^2 / (||X^T X|| ||Y^T Y||) of centred columns, in [0, 1]; 1 for x = y, up
    to rotation and scale.

    x [n, p], y [n, q]: n samples' features; give a few times more samples than features. NaN where
    one of them is constant. Raises ValueError for other shapes.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; give [n, p] and "
            "[n, q] of the same samples"
        )
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    between, own_x, own_y = (
        float(torch.linalg.matrix_norm(product)) for product in (y.T @ x, x.T @ x, y.T @ y)
    )
    return between**2 / (own_x * own_y) if own_x and own_y else float("nan")


def cka(
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable[tuple[Inputs, object]],
    layers: Sequence[str] | None = None,
    *,
    pooling: str = "mean",
) -> dict[str, float]:
    """Computes the linear CKA of each layer's features in the two models, on the same inputs, in
    eval mode.

    batches  pairs (inputs, labels); labels are not used. Inputs as in `BiStage`
    layers   names of modules that both have; None: the members of their nn.ModuleLists, or where
        there are none the direct children
    pooling  of outputs [N, T, d], a convolution's [N, d, T]: "mean" over the tokens (of
             `attention_mask`, where a dict has one) or the "first" token

    Returns the CKA by layer, in [0, 1], in order. The models are left as they were. Raises
    ValueError for an unknown layer or no batch.
    """
    checks.choice("pooling", pooling, ("mean", "first"))
    names = list(layers) if layers is not None else _blocks(model_a)
    for model, which in ((model_a, "model_a"), (model_b, "model_b")):
        missing = [name for name in names if name not in dict(model.named_modules())]
        if missing:
            raise ValueError(
                f"layers: {which} has no {missing[0]!r}; name modules of both, such "
                f"as {_blocks(model_a)[:3]}"
            )
    features: list[dict[str, list[Tensor]]] = [{name: [] for name in names} for _ in range(2)]
    with held(model_a), held(model_b), torch.no_grad():
        for inputs, _ in batches:
            for model, found in zip((model_a, model_b), features, strict=True):
                with _listening(model, names, found, inputs, pooling):
                    call(model, inputs)
    if names and not sum(map(len, features[0][names[0]])):
        raise ValueError(
            "batches holds none, or the model calls none of the layers; give pairs (inputs, labels)"
        )
    return {
        name: linear_cka(torch.cat(features[0][name]), torch.cat(features[1][name]))
        for name in names
    }


def plot_cka(series: dict[str, dict[str, float]], path: str | pathlib.Path) -> pathlib.Path:
    """Draws CKA over layers, or over epochs, a line for each entry (name -> {layer or epoch:
    CKA}); writes `path` and returns it.
    """
    with picture(path) as axes:
        for name, values in series.items():
            axes.plot([str(at) for at in values], list(values.values()), label=name)
        axes.set(ylabel="likeness to before (CKA)", ylim=(0, 1.02))
        if any(len(str(at)) > 3 for values in series.values() for at in values):
            axes.tick_params(axis="x", rotation=90)
        axes.legend()
    return pathlib.Path(path)


def _blocks(model: nn.Module) -> list[str]:
    members = [
        f"{name}.{i}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for i in range(len(module))
    ]
    return members or [name for name, _ in model.named_children()]


@contextlib.contextmanager
def _listening(
    model: nn.Module,
    names: Sequence[str],
    found: dict[str, list[Tensor]],
    inputs: Inputs,
    pooling: str,
) -> Iterator[None]:
    modules = dict(model.named_modules())

    def listen(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: Any) -> None:
            first = (
                output[0]
                if isinstance(output, tuple)
                else getattr(output, "last_hidden_state", output)
            )
            if isinstance(module, CHANNELS_SECOND) and first.dim() > 2:
                first = first.flatten(2).transpose(1, 2)
            found[name].append(pooled(first, inputs, pooling).double().cpu())

        return hook

    handles = [modules[name].register_forward_hook(listen(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
