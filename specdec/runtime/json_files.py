"""Small JSON files of somebody else's making: read, and their shapes checked, with one sentence for what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


def read_json(path: Path, what: str, make: Callable[[Any], T]) -> T:
    """What `make` makes of a file's content.

    what: the argument's name and the rule, for messages: "tree must be a JSON file with rank paths".
    Raises ValueError for a file that cannot be read, is no JSON, nests too deep, holds NaN or infinite numbers, or
    whose content `make` refuses with a ValueError, TypeError, KeyError or the like.
    """
    name, rule = what.split(" ", 1)
    try:
        return make(json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number))
    except RecursionError:
        cause = "it nests too deep"
    except KeyError as error:
        cause = f"{error} is missing"
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        cause = str(error)
    raise ValueError(f"{name}={str(path)!r} {rule}: {cause}")


def integers(value: Any, name: str) -> list[int]:
    """A list of integers. Raises ValueError for anything else."""
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise ValueError(f"{name} must be a list of integers")
    return value


def probabilities(value: Any, name: str) -> tuple[float, ...]:
    """A list of numbers in [0, 1] as a tuple. Raises ValueError for anything else."""
    if not isinstance(value, list) or not all(type(each) in (int, float) and 0 <= each <= 1 for each in value):
        raise ValueError(f"{name} must be a list of numbers in [0, 1]")
    return tuple(map(float, value))


def finite_number(value: Any, name: str) -> float:
    """A finite number. Raises ValueError for anything else."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number")
    return float(value)


def fields(value: Any) -> Mapping[str, Any]:
    """An object. Raises ValueError for anything else."""
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} is no JSON object")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")
