"""The checks of arguments, before anything is done: one rule and one sentence for each kind."""

import difflib
import math
import sys
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import DTYPES as DTYPES
from .backends import check_name

# types that are numbers at first sight
PLAIN = frozenset((float, int))
# Of the numbers that are options: it leaves room below float64's largest, 1.8e308, for what they
# are multiplied with before a kernel has them, as a learning rate with a bias correction.
LARGEST = 1e300
backend = check_name


def is_number(value: object) -> bool:
    """Returns whether a value is a number of Python's or NumPy's; True and False are none."""
    kind = type(value)
    return kind in PLAIN or (kind is not bool and isinstance(value, Real))


def is_integer(value: object) -> bool:
    """Returns whether a value is an integer of Python's or NumPy's; True and False are none."""
    kind = type(value)
    return kind is int or (kind is not bool and isinstance(value, Integral))


def plain(value: Any) -> Any:
    """Returns a number of NumPy's as Python's, which compares with any other without an overflow in
    NumPy's narrow types; other values as they are.
    """
    return value.item() if type(value) not in PLAIN and hasattr(value, "item") else value


def number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    without: float | None = None,
) -> float:
    """Returns the value of a finite number of Python's or NumPy's in [low, high], of which the
    bound `without` is left out.
    """
    if type(value) not in PLAIN and not is_number(value):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a number")
    found = plain(value)
    if not (low <= found <= high and -LARGEST <= found <= LARGEST) or found == without:
        least = "" if low == -math.inf else f" {'>' if low == without else '>='} {low:g}"
        ends = "(" if low == without else "[", ")" if high == without else "]"
        span = f"number in {ends[0]}{low:g}, {high:g}{ends[1]}"
        rule = f"finite number{least}" if high == math.inf else span
        raise ValueError(f"{name}={found!r} is out of range; give a {rule}")
    return float(found)


def integer(name: str, value: Any, low: float = -math.inf, *, bits: int | None = None) -> int:
    """Returns the value of an integer of Python's or NumPy's that is at least `low` and below
    2^bits.
    """
    if type(value) is not int and not is_integer(value):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give an integer")
    if value < low or (bits is not None and value >= 2**bits):
        span = f">= {low}" if bits is None else f"in [{low}, 2^{bits})"
        raise ValueError(f"{name}={value!r} is out of range; give an integer {span}")
    return int(value)


def signed_seed(value: object) -> int:
    """Returns any integer as the operators take a seed: its value modulo 2^64, as a two's
    complement of 64 bits.
    """
    return (integer("seed", value) + 2**63) % 2**64 - 2**63


def is_flag(value: object) -> bool:
    """Returns whether a value is True or False, Python's or NumPy's; nobody has NumPy's before its
    module is imported, which is not done here.
    """
    numpy = sys.modules.get("numpy")
    return isinstance(value, bool) or (numpy is not None and isinstance(value, numpy.bool_))


def flag(name: str, value: object) -> bool:
    """Returns the value of True or False, Python's or NumPy's."""
    if type(value) is not bool and not is_flag(value):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give True or False")
    return bool(value)


def near(word: object, names: Iterable[str]) -> str:
    """Returns the end of a message that says what a misspelt word may mean, or nothing."""

    def spelt(name: object) -> str:
        return str(name).lower().replace("-", "_")

    by_spelling = {spelt(name): name for name in names}
    found = difflib.get_close_matches(spelt(word), by_spelling, 1)
    return f"; {by_spelling[found[0]]!r} is near" if found else ""


def choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Returns a word that is one of the choices; ValueError for what is not."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name}={value!r} is not one of its values; use {', '.join(map(repr, choices))}"
            + near(value, choices)
        )
    return value


def options(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for the name of an option that is not one of the owner's."""
    unknown = set(given) - set(known)
    if unknown:
        raise TypeError(
            f"{owner} has no option {min(unknown)!r}; its options are {', '.join(sorted(known))}"
            + near(min(unknown), known)
        )


def is_tensor(name: str, x: object, shape: str = "") -> None:
    """Raises TypeError for what is no tensor; `shape` is what the caller wants, in words."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; give a tensor{shape and ' '}{shape}")


def floating(name: str, x: Tensor) -> None:
    """Raises TypeError for a tensor of a dtype that no kernel computes with."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}; give float32, bfloat16, float16 or float64")


def tensor(name: str, x: Tensor, shape: str = "") -> None:
    """Raises TypeError for what is no dense tensor of floating point; `shape` is what the
    caller wants, in words.
    """
    is_tensor(name, x, shape)
    if x.layout != torch.strided:
        raise TypeError(
            f"{name} is sparse ({x.layout}); give {name}.to_dense(), or build an "
            "embedding with sparse=False"
        )
    floating(name, x)


def axes(name: str, x: Tensor, shape: str, count: int | None = None) -> None:
    """Raises as `tensor` does, and ValueError for another number of axes than `count` (None: at
    least one) or an empty last one.
    """
    tensor(name, x, shape)
    if x.dim() == 0 or count not in (None, x.dim()):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; give {shape}")
    if x.shape[-1] == 0:
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} has an empty last axis; give at least one element"
        )


def labels(given: object) -> None:
    """Raises TypeError for labels that are no tensor."""
    if not isinstance(given, Tensor):
        raise TypeError(f"labels are a {type(given).__name__}; give a tensor")


def labels_with(labels: Tensor, others: str, device: torch.device) -> None:
    """Raises ValueError for labels that are not where the others are."""
    if labels.device != device:
        raise ValueError(
            f"labels are on {labels.device} and {others} on {device}; move them with .to()"
        )


def classes(labels: Tensor, count: int, ignore_index: int) -> None:
    """Raises ValueError for class indices outside [0, count) that are not `ignore_index`."""
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= count))]
    if len(wrong):
        raise ValueError(
            f"labels hold {wrong[0].item()}; give classes from 0 to {count - 1}, or "
            f"{ignore_index} (ignore_index) for rows to leave out"
        )


def same_device(first: str, x: Tensor, name: str, y: Tensor) -> None:
    """Raises ValueError where two tensors are on different devices."""
    if y.device != x.device:
        raise ValueError(f"{name} is on {y.device} and {first} on {x.device}; move one with .to()")


def same_placement(first: str, x: Tensor, name: str, y: Tensor) -> None:
    """Raises where two tensors differ in dtype (TypeError) or device (ValueError)."""
    if y.dtype != x.dtype:
        raise TypeError(f"{name} is {y.dtype} and {first} {x.dtype}; cast one with .to()")
    same_device(first, x, name, y)


def same_shape(first: str, x: Tensor, name: str, y: Tensor) -> None:
    """Raises ValueError where two tensors differ in shape."""
    if y.shape != x.shape:
        raise ValueError(
            f"{name} has shape {tuple(y.shape)} and {first} {tuple(x.shape)}; give the same"
        )


def same_shape_and_placement(first: str, x: Tensor, name: str, y: Tensor) -> None:
    """Raises where two tensors differ in shape, device (ValueError) or dtype (TypeError)."""
    same_shape(first, x, name, y)
    same_placement(first, x, name, y)


def refuse_transforms(
    name: str, tensors: Sequence[Tensor], advice: str, constants: Sequence[Tensor] = ()
) -> None:
    """Raises RuntimeError for derivatives that a kernel cannot give, which would else come out as
    0.

    tensors    must have no forward-mode tangent (torch.func.jvp, jacfwd, linearize, dual tensors)
        and not be under torch.func.vmap
    constants  must not be differentiated by at all, neither by torch.func.grad, vjp and jacrev

    Outside of forward mode and torch.func, which is nearly always, this is two looks at flags.
    """
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        _refuse(name, tensors, advice, constants)


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="uegr_kernels runs uncompiled under forward mode and torch.func; leave fullgraph out"
)
def _refuse(name: str, tensors: Sequence[Tensor], advice: str, constants: Sequence[Tensor]) -> None:
    """Looks through every level of torch.func, which a compiler cannot: it leaves the function
    that gets here to Python.
    """
    _Transformed.apply(name, advice, *tensors, *constants)  # type: ignore[no-untyped-call]
    if any(map(_tracked, constants)):
        raise RuntimeError(f"{name} of uegr_kernels has no derivative: {advice}")


def _tracked(tensor: Tensor) -> bool:
    """Returns whether a level of torch.func differentiates by the tensor."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad:
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


class _Told(Protocol):
    """Types what is kept for `jvp`."""

    name: object
    advice: object

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _Transformed(torch.autograd.Function):
    """Computes nothing; at every level of torch.func PyTorch calls `jvp` where an argument has
    a tangent, `vmap` where one is batched.
    """

    @staticmethod
    def forward(name: str, advice: str, *tensors: Tensor) -> Tensor:
        return torch.empty(())

    @staticmethod
    def setup_context(ctx: _Told, inputs: tuple[object, ...], output: Tensor) -> None:
        ctx.name, ctx.advice = inputs[:2]
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: _Told, *_: object) -> NoReturn:
        raise RuntimeError(
            f"{ctx.name} of uegr_kernels has no forward-mode derivative (torch.func.jvp, jacfwd, "
            f"dual tensors): {ctx.advice}"
        )

    @staticmethod
    def vmap(info: object, in_dims: object, name: str, advice: str, *_: object) -> NoReturn:
        raise RuntimeError(
            f"{name} of uegr_kernels does not run under torch.func.vmap; give the whole batch"
        )
