"""The perturbing operators: schemas, fakes, and the choice of a backend. All write into
tensors they are given.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..core import backends as backends
from . import reference as reference

_triton = functools.partial(backends.triton_kernels, __package__)

# To the compiled kernels a norm and what it is taken over are positions here
# (csrc/perturbation/perturbation.h has the same order).
NORMS = ("l2", "linf")
PERS = ("sample", "token", "all")
WORDS = {"norm": NORMS, "per": PERS}

# seed: a 0-d int64 tensor, on the CPU or beside the others, which only kernels read; None: no
# random mask.
SCHEMAS = {
    "fgm_perturbation_": "Tensor grad, Tensor? mask, Tensor? seed, Tensor(a!) out, *, "
    "float epsilon, int norm, int per, float keep_probability, int step",
    "pgd_step_": "Tensor delta, Tensor grad, Tensor? mask, Tensor(a!) out, *, float step_size, "
    "float radius, int norm, int per",
    "perturb_weights_": "Tensor(a!)[] params, Tensor[] grads, Tensor? seed, *, "
    "int[] streams, float epsilon, bool together, float keep_probability, int step",
}


def _run(module: Callable[[], ModuleType], name: str, *tensors: Any, **options: Any) -> None:
    """The function `name` of a module, by an operator's arguments."""
    for key, words in WORDS.items():
        if key in options:
            number = options[key]
            if not 0 <= number < len(words):
                raise RuntimeError(
                    f"{key} is {number}; use "
                    f"{', '.join(f'{i} ({word})' for i, word in enumerate(words))}"
                )
            options[key] = words[number]
    getattr(module(), name)(*tensors, **options)


def _register(name: str, schema: str) -> None:
    def refuse_vmap(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            f"{name.rstrip('_')} of uegr_kernels does not run under "
            "torch.func.vmap; give the whole batch"
        )

    backends.define(
        name,
        f"({schema}) -> ()",
        functools.partial(_run, lambda: reference, name),
        functools.partial(_run, _triton, name),
    )
    torch.library.register_fake(f"uegr_kernels::{name}", lambda *_, **__: None)
    torch.library.register_vmap(f"uegr_kernels::{name}", refuse_vmap)


for _name, _schema in SCHEMAS.items():
    _register(_name, _schema)


def kernel(name: str, backend: str) -> Callable[..., None]:
    """An operator of a native backend, by its arguments."""
    if backend == "triton":
        return functools.partial(_run, _triton, name)
    operator: Callable[..., None] = getattr(torch.ops.uegr_kernels, name).default
    return operator


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(name: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves operator `name` (core.backends.choose)."""
    return backends.choose(backend, f"perturbation.{name}", device, dtype)


def call(name: str, backend: str, *tensors: Any, written: list[Tensor], **options: Any) -> None:
    """Runs the operator on a chosen backend; arguments as in SCHEMAS, norm and per by their
    names.
    """
    traced = backends.traced()
    if backend == "reference" and not traced:
        getattr(reference, name)(*tensors, **options)
        return
    numbers = {key: words.index(options[key]) for key, words in WORDS.items() if key in options}
    kernel(name, backend if backend == "triton" and not traced else "cpp")(
        *tensors, **options | numbers
    )
    # kernels registered outside PyTorch leave the versions alone, and autograd would miss a stale
    # graph
    if not traced:
        torch.autograd.graph.increment_version(written)
