"""Checking arguments."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def require(holds: bool, message: str) -> None:
    """Raise ValueError with the message unless it holds."""
    if not holds:
        raise ValueError(message)


def require_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ValueError naming the nearest spelling unless a value is one of those allowed."""
    known = list(allowed)
    require(value in known, f"{name}={value!r} must be one of {', '.join(known)}{nearest(value, known)}")


def require_integer(name: str, value: Any, least: int, remedy: str = "") -> None:
    """Raise ValueError unless a value is an integer of at least `least`; remedy: what to do else, with a semicolon."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    require(is_integer, f"{name}={value!r} must be an integer of at least {least}{remedy}")
    require(value >= least, f"{name}={value!r} must be at least {least}{remedy}")


def nearest(value: object, known: Iterable[str]) -> str:
    """A question to append to a message where a name is likely misspelt; else nothing."""
    found = get_close_matches(str(value), list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def require_keywords(keywords: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Raise TypeError naming the nearest spelling unless all keywords are among those known to `owner`."""
    known = list(known)
    for name in keywords:
        if name not in known:
            raise TypeError(f"{name}= must be an argument of {owner}{nearest(name, known)}")


def with_spelling(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function name the nearest of its arguments where a keyword is unknown, as Python 3.13 does by itself."""
    known, owner = list(inspect.signature(function).parameters), function.__qualname__.removesuffix(".__init__")

    @wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> T:
        require_keywords(keywords, known, owner)
        return function(*arguments, **keywords)

    return call


def with_constructor_spelling(made: type[T]) -> type[T]:
    """Likewise for the constructor of a class."""
    made.__init__ = with_spelling(made.__init__)  # type: ignore[method-assign]
    return made


def renamed(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a function take keyword arguments by their old names, too, with a DeprecationWarning. names: old -> new."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> T:
            for old in names.keys() & keywords.keys():
                message = f"{old}= is now {names[old]}=; the old name goes with the next release"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                keywords[names[old]] = keywords.pop(old)
            return function(*arguments, **keywords)

        return call

    return decorate
