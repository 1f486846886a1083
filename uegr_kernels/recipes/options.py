"""An option of a recipe: a keyword of its class with a default and a check, declared once.

A recipe is a dataclass whose keyword-only fields are its options. Recipes inherit the options of
the class that they build on, and declare those again whose default is another one.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..core import checks


def option(default: Any, check: Callable[[str, Any], Any]) -> Any:
    """Declares an option; the recipe keeps what check(name, value) returns, or the value where
    that is None. None passes unchecked where it is the default.
    """
    return dataclasses.field(default=default, metadata={"check": check})


def number(default: float | None, low: float = 0, high: float = math.inf) -> Any:
    """Declares a number in [low, high]."""
    return option(default, functools.partial(checks.number, low=low, high=high))


def positive_share(default: float) -> Any:
    """Declares a number in (0, 1]."""

    def check(name: str, value: Any) -> float:
        share = checks.number(name, value, 0, 1)
        if share == 0:
            raise ValueError(f"{name}={value!r} trains nothing; give a number in (0, 1]")
        return share

    return option(default, check)


def integer(default: int | None, low: float = -math.inf, *, bits: int | None = None) -> Any:
    """Declares an integer of at least `low`, below 2^bits."""
    return option(default, functools.partial(checks.integer, low=low, bits=bits))


def flag(default: bool | None) -> Any:
    """Declares True or False."""
    return option(default, checks.flag)


def choice(default: str | None, choices: Sequence[str]) -> Any:
    """Declares one of some words."""
    return option(default, functools.partial(checks.choice, choices=choices))


def backend() -> Any:
    """Declares the backend of the operators."""
    return option("auto", lambda name, value: checks.backend(value))


def check_values(recipe: Any) -> None:
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


def names_of(recipe: Any) -> set[str]:
    """Returns the names of the options that a recipe's class declares."""
    return {field.name for field in dataclasses.fields(recipe) if field.init and field.kw_only}


class Signature:
    """Gives a class the signature of its `__init__`, whatever its `__new__` takes."""

    def __get__(self, recipe: Any, kind: Any) -> inspect.Signature:
        signature = inspect.signature(kind.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])
