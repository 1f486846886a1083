"""An option of a recipe: a keyword of its class with a default and a check, declared once.

A recipe is a dataclass whose keyword-only fields are its options. Recipes inherit the options of
the class that they build on, and declare those again whose default is another one.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from ..core import checks

KEYWORD = inspect.Parameter.KEYWORD_ONLY
T = TypeVar("T")
Number = TypeVar("Number", bound=float | None)
Integer = TypeVar("Integer", bound=int | None)
Flag = TypeVar("Flag", bound=bool | None)
Word = TypeVar("Word", bound=str | None)


class Declares(Protocol):
    """Has fields, as every dataclass does."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]


def option(default: T, check: Callable[[str, object], object]) -> T:
    """Declares an option; the recipe keeps what check(name, value) returns, or the value where
    that is None. None passes unchecked where it is the default.
    """
    return dataclasses.field(default=default, kw_only=True, metadata={"check": check})


def number(default: Number, low: float = 0, high: float = math.inf) -> Number:
    """Declares a number in [low, high]."""
    return option(default, functools.partial(checks.number, low=low, high=high))


def positive_share(default: float) -> float:
    """Declares a number in (0, 1]."""

    def check(name: str, value: object) -> float:
        share = checks.number(name, value, 0, 1)
        if share == 0:
            raise ValueError(f"{name}={value!r} trains nothing; give a number in (0, 1]")
        return share

    return option(default, check)


def integer(default: Integer, low: float = -math.inf, *, bits: int | None = None) -> Integer:
    """Declares an integer of at least `low`, below 2^bits."""
    return option(default, functools.partial(checks.integer, low=low, bits=bits))


def flag(default: Flag) -> Flag:
    """Declares True or False."""
    return option(default, checks.flag)


def choice(default: Word, choices: Sequence[str]) -> Word:
    """Declares one of some words."""
    return option(default, functools.partial(checks.choice, choices=choices))


def backend() -> str:
    """Declares the backend of the operators."""
    return option("auto", lambda name, value: checks.backend(value))


def check_values(recipe: Declares) -> None:
    """Checks every option's value by its declaration, and keeps numbers as Python's."""
    for field in dataclasses.fields(recipe):
        check = field.metadata.get("check")
        if check is None:
            continue
        value = getattr(recipe, field.name)
        if value is not None or field.default is not None:
            kept = check(field.name, value)
            if kept is not None:
                setattr(recipe, field.name, kept)


def names_of(recipe: type[Declares]) -> set[str]:
    """Returns the names of the options that a recipe's class declares: its keywords."""
    parameters = inspect.signature(recipe.__init__).parameters
    return {name for name, parameter in parameters.items() if parameter.kind is KEYWORD}


class Signature:
    """Gives a class the signature of its `__init__`, whatever its `__new__` takes."""

    def __get__(self, recipe: object, kind: Any) -> inspect.Signature:
        signature = inspect.signature(kind.__init__)
        parameters = list(signature.parameters.values())[1:]
        # that of every recipe stands behind its own
        parameters.sort(key=lambda parameter: parameter.name == "backend")
        return signature.replace(parameters=parameters)
