"""Times the host's part of a Triton step over many tensors, every kernel replaced by a no-op,
beside torch's fused AdamW.
"""

import os
from collections.abc import Callable

import torch

import uegr_kernels as uk

from .harness import Case, Contestant


def cases(quick: bool, device: str) -> list[Case]:
    tensors = 40 if quick else 400
    settings = {"defaults": {}, "previous": {"statistics": "previous"}}
    return [
        case(f"{tensors} tensors: {name}", options, tensors, device)
        for name, options in settings.items()
    ]


def case(name: str, options: dict, tensors: int, device: str) -> Case:
    if device == "cpu":
        # lets the backend take tensors on the CPU
        os.environ["TRITON_INTERPRET"] = "1"
    options = options | {"seed": 1, "backend": "triton", "capturable": True}

    def contestants() -> list[Contestant]:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        params = [torch.nn.Parameter(torch.zeros(64, device=device)) for _ in range(tensors)]
        # gradients move at every step, as after zero_grad()
        gradients = [[torch.ones_like(p) for p in params] for _ in range(2)]
        turn = [0]

        def stepping(
            optimizer: torch.optim.Optimizer, *kernels: tuple[object, str]
        ) -> Callable[[], object]:
            def step() -> None:
                turn[0] += 1
                for p, grad in zip(params, gradients[turn[0] % 2], strict=True):
                    p.grad = grad
                real = [getattr(owner, name) for owner, name in kernels]
                for owner, name in kernels:
                    setattr(owner, name, nothing)
                try:
                    optimizer.step()
                finally:
                    for (owner, name), kernel in zip(kernels, real, strict=True):
                        setattr(owner, name, kernel)

            return step

        ours = stepping(
            uk.SelectiveAdamW(params, **options), (JITFunction, "run"), (InterpretedFunction, "run")
        )
        fused = stepping(
            torch.optim.AdamW(params, fused=True),
            (torch, "_fused_adamw_"),
            (torch, "_foreach_add_"),
        )
        return [Contestant("uegr_kernels", ours), Contestant("torch fused", fused)]

    facts = {"tensors": tensors, "dtype": "float32", "backend": "triton"}
    # nothing is computed
    return Case(name, facts, 2**20, lambda: None, contestants, device=device)


def nothing(*args, **kwargs) -> None:
    """Stands in the place of a kernel or a launch."""
