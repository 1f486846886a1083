"""The selective optimizers' step beside torch.optim's and plain PyTorch's."""

import math
from collections.abc import Callable

import torch

import uegr_kernels as uk
from uegr_kernels.core import backends

from .harness import Case, Contestant

Shapes = list[tuple[int, ...]]
IN_CACHE = 2**18  # elements up to which a second read of a gradient is served by a core's own cache and moves nothing
SETTINGS = {
    "defaults (min-max)": {},
    "previous": {"statistics": "previous"},
    "previous, global": {"statistics": "previous", "scope": "global"},
    "rank, salient": {"normalization": "rank", "direction": "salient"},
    "constant": {"normalization": "constant"},
    "previous, bfloat16 moments": {"statistics": "previous", "state_dtype": torch.bfloat16},
}
ADAMW = uk.SelectiveAdamW, torch.optim.AdamW, {}, ("exp_avg", "exp_avg_sq")
SGD = uk.SelectiveSGD, torch.optim.SGD, {"momentum": 0.9}, ("momentum_buffer",)


def cases(quick: bool) -> list[Case]:
    bert = ("BERT-base", bert_shapes()) if not quick else ("small BERT", bert_shapes(hidden=64, layers=2, words=1000))
    large = ("100M in one tensor", [(100_000_000,)]) if not quick else ("1M in one tensor", [(1_000_000,)])
    small = ("5,000 tensors of 64", [(64,)] * 5000) if not quick else ("500 tensors of 64", [(64,)] * 500)
    found = [adamw(*bert, setting) for setting in SETTINGS]
    found += [adamw(*sizes, setting) for sizes in (large, small) for setting in list(SETTINGS)[:2]]
    return [*found, case(f"{bert[0]}: SelectiveSGD, momentum 0.9", bert[1], {}, *SGD)]


def adamw(sizes: str, shapes: Shapes, setting: str) -> Case:
    return case(f"{sizes}: {setting}", shapes, SETTINGS[setting], *ADAMW)


def bert_shapes(hidden: int = 768, layers: int = 12, words: int = 30522) -> Shapes:
    """BERT for classification in two classes: 201 tensors and 109,483,778 elements as it stands, at its published sizes."""

    def linear(outputs: int, inputs: int) -> Shapes:
        return [(outputs, inputs), (outputs,)]

    norm = [(hidden,), (hidden,)]
    layer = [*linear(hidden, hidden) * 4, *norm, *linear(4 * hidden, hidden), *linear(hidden, 4 * hidden), *norm]
    embeddings = [(words, hidden), (512, hidden), (2, hidden), *norm]
    return [*embeddings, *layer * layers, *linear(hidden, hidden), *linear(2, hidden)]


def case(name: str, shapes: Shapes, options: dict, ours: Callable, torchs: Callable, line: dict, moments: tuple[str, ...]) -> Case:
    sizes = [math.prod(shape) for shape in shapes]
    moment = torch.finfo(options.get("state_dtype", torch.float32)).bits // 8
    twice = sum(size for size in sizes if size > IN_CACHE) if options.get("statistics") != "previous" else 0
    if options.get("normalization") == "constant":
        twice = 0
    least = sum(sizes) * (12 + 8 * len(moments))  # theta read and written, g read, moments read and written
    must_move = sum(sizes) * (12 + 2 * moment * len(moments)) + 4 * twice

    def contestants() -> list[Contestant]:
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=generator) for shape in shapes]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * 1e-3
        shared: dict = {}

        def stepping(optimizer: torch.optim.Optimizer, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
            """The optimizer's step over everyone's tensors; its counts are its own."""
            if len(params) >= 500:  # ours lays such states out itself, and small ones fit beside each other
                return optimizer.step
            if dtype not in shared:
                shared[dtype] = [{key: torch.zeros(p.shape, dtype=dtype) for key in moments} for p in params]
            for p, state in zip(params, shared[dtype], strict=True):
                optimizer.state[p] = {"step": torch.tensor(0.0), **state}
            return optimizer.step

        def selective(backend: str) -> Callable[[], object]:
            return stepping(ours(params, 1e-5, **line, **options, seed=0, backend=backend), options.get("state_dtype", torch.float32))

        found = [Contestant("uegr_kernels", selective("auto"), must_move)]
        for kind, flags in (("fused", {"fused": True}), ("foreach", {"foreach": True}), ("for-loop", {"foreach": False})):
            found.append(Contestant(f"torch {kind}", stepping(torchs(params, 1e-5, **line, **flags)), least))
        if max(sizes) > 30_000_000:  # of which it makes some 100 bytes of temporaries an element
            return [*found, Contestant("plain PyTorch", None, missing=f"a tensor of {max(sizes):,} elements would take it too much memory")]
        if max(sizes) > 10_000_000 and options:  # half a minute a step
            return [*found, Contestant("plain PyTorch", None, missing="timed with the default options only")]
        return [*found, Contestant("plain PyTorch", selective("reference"), must_move, rounds=2)]

    def verify() -> str | None:
        return disagreement(lambda params, backend: ours(params, 1e-3, **line, **options, seed=0, backend=backend))

    backend = backends.choose("auto", f"selective.{ours.operator}", torch.device("cpu"), torch.float32)
    facts = {"optimizer": ours.__name__, "options": {key: str(value) for key, value in options.items()}, "backend": backend}
    facts |= {"tensors": len(shapes), "elements": sum(sizes), "dtype": "float32"}
    memory = sum(sizes) * (8 + 4 * len(moments) + (moment * len(moments) if moment != 4 else 0))
    return Case(name, facts, memory, verify, contestants)


def disagreement(optimizer: Callable[[list[torch.Tensor], str], torch.optim.Optimizer]) -> str | None:
    """What differs after two steps of ours and of the reference on a few small tensors.

    Gradients are rounded to bfloat16, so that a rank by histogram is exact. One element in a thousand may differ: the draw of a u next to
    p, or a stochastic rounding, turns on the last bit.
    """
    states = []
    for backend in ("auto", "reference"):
        generator = torch.Generator().manual_seed(1)
        params = [torch.randn(shape, generator=generator) for shape in ((257, 129), (4096,), (3, 5, 7), (1,), ())]
        stepper = optimizer(params, backend)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).bfloat16().float()
            stepper.step()
        states.append([{"parameter": p, **stepper.state[p]} for p in params])
    for mine, other in zip(*states, strict=True):
        for key, tensor in mine.items():
            wrong = int((~torch.isclose(tensor, other[key], rtol=1e-4, atol=1e-6, equal_nan=True)).sum())
            if wrong > tensor.numel() / 1000:
                return f"{wrong} of {tensor.numel()} elements of {key}"
    return None
