"""What every op.py needs of an operator: its definition, and its call on a chosen backend."""

import functools
from collections.abc import Callable, Mapping
from typing import Generic, NoReturn, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from . import backends, native

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Context(Protocol):
    """Types what PyTorch gives a forward to leave things for its backward."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


class Operator(Generic[P, R]):
    """Defines an operator in the package's namespace, and calls it on a backend that `choose` gave.

    package      the folder's, `__package__` in its op.py
    schema       "name(arguments) -> results", as PyTorch writes it
    reference    reference.py's function of that name
    load_triton  op.py's function that imports the folder's Triton kernels and sets `triton` of its
        operators, each to the function with the reference's arguments; called at first use
    fake         what the results are like, by the same arguments
    words        for each option that the schema has as a number, the words whose positions it
        counts
    no_vmap      the sentence of the error under torch.func.vmap; None: as PyTorch does without a
        rule

    A call takes and checks by types the reference's arguments, with words. Only the schema, and so
    the compiled kernels, have numbers.
    """

    def __init__(
        self,
        package: str,
        schema: str,
        reference: Callable[P, R],
        *,
        load_triton: Callable[[], None],
        fake: Callable[..., object],
        words: Mapping[str, tuple[str, ...]],
        no_vmap: str | None,
    ) -> None:
        self.reference, self.words = reference, words
        self.triton: Callable[P, R] | None = None
        self._load_triton = load_triton
        self.name = schema.partition("(")[0]
        self.path = f"{package.rpartition('.')[2]}.{self.name}"
        name, arguments = native.qualified(self.name), schema.removeprefix(self.name)
        by_reference = functools.partial(self.by_schema, reference)
        by_triton = functools.partial(self.by_schema, self._by_triton)
        backends.define(self.name, arguments, by_reference, by_triton)
        # which takes any arguments
        if fake is not writes_only:
            fake = functools.partial(self.by_schema, fake)
        for overload in (name, f"{name}.fallback"):
            torch.library.register_fake(overload, fake)
        if no_vmap is not None:
            refuse_vmap(self.name, no_vmap)
        packet = getattr(getattr(torch.ops, native.NAMESPACE), self.name)
        self.default, self.fallback = packet.default, packet.fallback
        # positions, and names of keywords
        self._written = [
            argument.name if argument.kwarg_only else position
            for position, argument in enumerate(self.default._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]

    def choose(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        """Returns the backend that serves the operator (core.backends.choose)."""
        return backends.choose(backend, self.path, device, dtype)

    def kernel(self, backend: str) -> Callable[P, R]:
        """Returns the operator's function of a chosen backend, by the reference's arguments."""
        if backend == "reference":
            return self.reference
        return self._triton_kernel() if backend == "triton" else self.registered

    def _triton_kernel(self) -> Callable[P, R]:
        if self.triton is None:
            self._load_triton()
        if self.triton is None:
            raise RuntimeError(f"{self.path} was given no Triton function; set it in its op.py")
        return self.triton

    def registered(self, *tensors: P.args, **options: P.kwargs) -> R:
        """Calls the operator through PyTorch's dispatcher, which compilers and torch.func see."""
        return self.call(self.default, tensors, options)

    def call(
        self, overload: Callable[..., R], tensors: tuple[object, ...], options: Mapping[str, object]
    ) -> R:
        """Calls an overload with the reference's arguments."""
        return overload(*tensors, **self.in_numbers(options))

    def __call__(self, backend: str, /, *tensors: P.args, **options: P.kwargs) -> R:
        """Runs an operator that writes into its arguments, and increases their versions.

        Through the dispatcher while a compiler or torch.func looks, else directly.
        """
        if backends.traced():
            return self.registered(*tensors, **options)
        result = self.kernel(backend)(*tensors, **options)
        # autograd would miss a stale graph
        if backend != "reference":
            torch.autograd.graph.increment_version(self.written(tensors, options))
        return result

    def written(self, tensors: tuple[object, ...], options: Mapping[str, object]) -> list[Tensor]:
        """Returns the tensors, of a call's, that the operator writes into."""
        found: list[Tensor] = []
        for at in self._written:
            given = options[at] if isinstance(at, str) else tensors[at]
            if isinstance(given, list):
                found += given
            elif isinstance(given, Tensor):
                found.append(given)
        return found

    def in_numbers(self, options: Mapping[str, object]) -> dict[str, object]:
        """Returns the reference's options as the schema has them."""
        numbers = dict(options)
        for name, words in self.words.items():
            if name in options:
                numbers[name] = words.index(options[name])
        return numbers

    def in_words(self, options: dict[str, object]) -> dict[str, object]:
        """Returns the schema's options as the reference has them.

        Raises RuntimeError for a number that stands for no word.
        """
        found = dict(options)
        for name, words in self.words.items():
            if name not in options:
                continue
            number = options[name]
            if not isinstance(number, int | torch.SymInt) or not 0 <= number < len(words):
                known = ", ".join(f"{i} ({word})" for i, word in enumerate(words))
                raise RuntimeError(f"{name} is {number}; use {known}")
            found[name] = words[number]
        return found

    def by_schema(self, function: Callable[..., T], *tensors: object, **options: object) -> T:
        """Calls a function that has the reference's arguments by the schema's."""
        return function(*tensors, **self.in_words(options))

    def _by_triton(self, *tensors: P.args, **options: P.kwargs) -> R:
        return self._triton_kernel()(*tensors, **options)


def writes_only(*_: object, **__: object) -> None:
    """Returns nothing: the fake of an operator that only writes into its arguments."""


def refuse_vmap(operator: str, sentence: str) -> None:
    """Makes an operator raise RuntimeError with the sentence under torch.func.vmap."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise RuntimeError(sentence)

    torch.library.register_vmap(native.qualified(operator), refuse)
