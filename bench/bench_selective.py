"""Times the selective optimizers' step beside torch.optim's, other libraries' and plainer ways to
write it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

import uegr_kernels as uk
from uegr_kernels.core import backends

from . import peers, shapes
from .harness import Case, Contestant
from .timer import Step

# bytes up to which a second read of a gradient is served by a cache and moves nothing
IN_CACHE = {"cpu": 2**20, "cuda": 2**25}
# random elements, repeated to fill a tensor
BLOCK = 2**20
LR = 1e-5
BRAIN = {"state_dtype": torch.bfloat16}
SETTINGS = {
    "defaults (min-max)": {},
    "previous": {"statistics": "previous"},
    "previous, global": {"statistics": "previous", "scope": "global"},
    "rank, salient": {"normalization": "rank", "direction": "salient"},
    "constant": {"normalization": "constant"},
    "previous, bfloat16 moments": {"statistics": "previous"} | BRAIN,
}
# elements from which on slow peers are left out, and others get few rounds
SLOW, LARGE = 20_000_000, 200_000_000
# tensors from which on the slowest is left out
MANY = 300


def cases(quick: bool, device: str) -> list[Case]:
    models = {"small BERT": shapes.bert(64, 2, 1000)} if quick else dict(shapes.MODELS)
    models |= (
        {"1M in one tensor": [(1_000_000,)]} if quick else {"10M in one tensor": [(10_000_000,)]}
    )
    small = {
        f"{count:,} tensors of 64": [(64,)] * count
        for count in ([600] if quick else shapes.SMALL_COUNTS)
    }
    several = {name: models[name] for name in ("small BERT", "BERT-base") if name in models}
    found = [
        adamw(name, tensors, setting, device)
        for name, tensors in several.items()
        for setting in SETTINGS
    ]
    found += [
        adamw(name, tensors, next(iter(SETTINGS)), device)
        for name, tensors in (models | small).items()
        if name not in several
    ]
    found += [adamw(name, small[name], "previous", device) for name in list(small)[:1]]
    found += [
        adamw(name, models[name], "rank, salient", device) for name in models if name == "TextCNN"
    ]
    for name in models:
        if name in (*several, "1 B decoder", "7 B decoder"):
            found.append(adamw(name, models[name], "previous", device, torch.bfloat16))
    return [
        *found,
        *(
            case(f"{name}: SelectiveSGD, momentum 0.9", several[name], {}, device, sgd=True)
            for name in several
        ),
    ]


def adamw(
    name: str,
    tensors: shapes.Shapes,
    setting: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    **options,
) -> Case:
    """Returns a case of AdamW; in bfloat16 torch's moments are bfloat16 too, and so are ours."""
    brain = dtype == torch.bfloat16
    settings = SETTINGS[setting] | (BRAIN if brain else {})
    return case(
        f"{name}{', bfloat16' * brain}: {setting}", tensors, settings, device, dtype, **options
    )


def case(
    name: str,
    tensors: shapes.Shapes,
    options: dict,
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    sgd: bool = False,
    kinds: tuple[str, ...] = (),
    backend: str = "auto",
    threads: int | None = None,
) -> Case:
    """Plans a step of ours beside its peers; `kinds`: these of torch's peers and no other;
    `backend`: ours.
    """
    ours, torchs = (
        (uk.SelectiveSGD, torch.optim.SGD) if sgd else (uk.SelectiveAdamW, torch.optim.AdamW)
    )
    rule, moments = (
        ({"momentum": 0.9}, ("momentum_buffer",)) if sgd else ({}, ("exp_avg", "exp_avg_sq"))
    )
    sizes = [math.prod(shape) for shape in tensors]
    elements, largest = sum(sizes), max(sizes)
    state_dtype = options.get("state_dtype", torch.float32)
    once = options.get("statistics") == "previous" or options.get("normalization") == "constant"
    twice = 0 if once else sum(size for size in sizes if size * dtype.itemsize > IN_CACHE[device])
    must_move = (
        elements * (3 * dtype.itemsize + 2 * state_dtype.itemsize * len(moments))
        + twice * dtype.itemsize
    )
    # torch's: theta and moments read and written, g read
    least = elements * dtype.itemsize * (3 + 2 * len(moments))
    default = not options and not sgd and dtype == torch.float32

    def contestants() -> list[Contestant]:
        params = [filled(shape, dtype, device) for shape in tensors]
        for p in params:
            p.grad = filled(p.shape, dtype, device) * 1e-3
        shared: dict = {}

        def stepping(
            optimizer: torch.optim.Optimizer,
            of: torch.dtype = dtype,
            names: tuple[str, ...] = moments,
        ) -> Step:
            """Returns the optimizer's step over everyone's tensors; its counts are its own."""
            # ours lays such states out itself, and small ones fit beside each other
            if len(params) >= 500:
                return optimizer.step
            if of not in shared:
                shared[of] = [
                    [torch.zeros(p.shape, dtype=of, device=device) for _ in moments] for p in params
                ]
            counting = (ours, torchs)
            on = device if optimizer.defaults.get("fused") else "cpu"
            stepped = [p for group in optimizer.param_groups for p in group["params"]]
            for p, state in zip(stepped, shared[of], strict=True):
                # the libraries count in Python
                step = torch.tensor(0.0, device=on) if isinstance(optimizer, counting) else 0
                optimizer.state[p] = {"step": step, **dict(zip(names, state, strict=True))}
            return optimizer.step

        def selective(backend: str) -> Step:
            return stepping(
                ours(params, LR, **rule, **options, seed=0, backend=backend), state_dtype
            )

        def of_torch(kind: str, flags: dict, rounds: int | None, memory: int) -> Contestant:
            return Contestant(
                f"torch {kind}",
                stepping(torchs(params, LR, **rule, **flags)),
                least,
                rounds,
                memory,
            )

        few = 2 if elements > LARGE else None
        found = [Contestant("uegr_kernels", selective(backend), must_move)]
        every = {
            "fused": ({"fused": True}, None, 0),
            "foreach": ({"foreach": True}, few, 2 * elements * dtype.itemsize),
            "for-loop": ({"foreach": False}, few, 3 * largest * dtype.itemsize),
        }
        found += [of_torch(kind, *every[kind]) for kind in kinds or every]
        if kinds:
            return found
        if sgd:
            return [*found, plain(selective)]
        libraries = {
            "bitsandbytes": ("bitsandbytes", peers.bitsandbytes_adamw, ("state1", "state2")),
            "DeepSpeed": ("deepspeed", peers.deepspeed_adamw, moments),
        }
        for each, (package, make, names) in libraries.items():
            # their moments are float32
            facts = {
                "bytes": least,
                # on a CPU bitsandbytes takes a second for 100 M elements
                "rounds": few or (3 if (device, package) == ("cpu", "bitsandbytes") else None),
                "memory": 8 * elements * (dtype != torch.float32),
            }
            found.append(
                peers.library(
                    each,
                    package,
                    lambda make=make, names=names: stepping(make(params), torch.float32, names),
                    **facts,
                )
            )
        found.append(torchao(params))
        return [*found, roast_like(params, stepping), plain(selective), compiled(params, stepping)]

    def torchao(params: list[Tensor]) -> Contestant:
        named = "torchao, 8-bit moments"
        if not default or elements > LARGE or len(tensors) > MANY:
            return Contestant(
                named,
                None,
                missing="timed with the default options, up to BERT-base's size: "
                "it is compiled for each shape",
            )
        # moments of its own; a tensor of another size than whole blocks has float32 ones
        return peers.library(
            named,
            "torchao",
            lambda: peers.torchao_adamw(params).step,
            memory=8 * elements,
            rounds=5,
        )

    def roast_like(params: list[Tensor], stepping: Callable) -> Contestant:
        named = "RoAST-like"
        ranked = options.get("normalization") == "rank"
        if not (default or ranked):
            return Contestant(named, None, missing="timed with the default options, and by rank")
        if elements > LARGE or (ranked and elements > SLOW) or len(tensors) > 1000:
            return Contestant(
                named,
                None,
                missing=f"too slow for {elements:,} elements in {len(tensors):,} tensors",
            )
        salient = options.get("direction") == "salient"
        step = peers.five_passes(
            params, lambda twins: twice_stepping(stepping, twins), ranked=ranked, salient=salient
        )
        return Contestant(named, step, rounds=2, memory=32 * elements)

    def twice_stepping(stepping: Callable, twins: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(twins, LR)
        stepping(optimizer)
        return optimizer

    def plain(selective: Callable[[str], Step]) -> Contestant:
        """Builds the reference: some 100 bytes of temporaries an element, most of them for the
        random numbers.
        """
        named = "plain PyTorch"
        # it sorts
        ranked = options.get("normalization") == "rank"
        if elements > (SLOW / 10 if ranked else SLOW) or len(tensors) > MANY:
            return Contestant(
                named,
                None,
                missing=f"too slow for {elements:,} elements in {len(tensors):,} tensors",
            )
        return Contestant(named, selective("reference"), must_move, rounds=2, memory=120 * largest)

    def compiled(params: list[Tensor], stepping: Callable) -> Contestant:
        named = "plain PyTorch, compiled"
        if not default or len(tensors) > 1 or elements > SLOW:
            return Contestant(
                named,
                None,
                missing="timed with the default options, on one tensor: "
                "it is compiled for each shape",
            )
        twin = params[0].detach()
        twin.grad = params[0].grad
        optimizer = torch.optim.AdamW([twin], LR)
        stepping(optimizer)
        state = optimizer.state[twin] or {key: torch.zeros_like(twin) for key in moments}
        step = peers.compiled_reference(twin, state["exp_avg"], state["exp_avg_sq"], LR)
        return Contestant(named, step, must_move, rounds=5, memory=60 * elements, may_fail=True)

    def verify() -> str | None:
        def optimizer(params: list[Tensor], backend: str) -> torch.optim.Optimizer:
            return ours(params, 1e-3, **rule, **options, seed=0, backend=backend)

        return disagreement(optimizer, dtype, device, backend)

    chosen = backends.choose(backend, ours.operator.path, torch.device(device), dtype)
    facts = {
        "optimizer": ours.__name__,
        "options": {key: str(value) for key, value in options.items()},
        "backend": chosen,
    }
    facts |= {
        "tensors": len(tensors),
        "elements": elements,
        "dtype": str(dtype).removeprefix("torch."),
    }
    memory = elements * (
        2 * dtype.itemsize + sum({state_dtype.itemsize, dtype.itemsize}) * len(moments)
    )
    return Case(name, facts, memory, verify, contestants, device=device, threads=threads)


def filled(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Returns random numbers, the same ones over and over in a large tensor."""
    block = torch.randn(
        min(math.prod(shape), BLOCK), generator=torch.Generator().manual_seed(0)
    ).to(device, dtype)
    found = torch.empty(shape, dtype=dtype, device=device)
    for part in found.view(-1).split(BLOCK):
        part.copy_(block[: len(part)])
    return found


def disagreement(
    optimizer: Callable[[list[Tensor], str], torch.optim.Optimizer],
    dtype: torch.dtype,
    device: str,
    ours: str = "auto",
) -> str | None:
    """Tells what differs after two steps of ours and of the reference on a few small tensors.

    Gradients are rounded to bfloat16, so that a rank by histogram is exact. One element in a
    thousand may differ: the draw of a u next to p, or a stochastic rounding, turns on the last bit;
    in bfloat16 so may a last bit.
    """
    states = []
    for backend in (ours, "reference"):
        generator = torch.Generator().manual_seed(1)
        params = [
            torch.randn(shape, generator=generator).to(device, dtype)
            for shape in ((257, 129), (4096,), (3, 5, 7), (1,), ())
        ]
        stepper = optimizer(params, backend)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(device, dtype)
            stepper.step()
        states.append([{"parameter": p, **stepper.state[p]} for p in params])
    for mine, other in zip(*states, strict=True):
        for key, tensor in mine.items():
            close = torch.isclose(
                tensor,
                other[key],
                rtol=1e-4 if tensor.dtype == torch.float32 else 2**-7,
                atol=1e-6,
                equal_nan=True,
            )
            if int((~close).sum()) > tensor.numel() / 1000:
                return f"{int((~close).sum())} of {tensor.numel()} elements of {key}"
    return None
