"""Reading and validating small JSON files from users, with one-sentence error messages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


def read_json(path: Path, what: str, make: Callable[[Any], T]) -> T:
    """Read a JSON file and convert its content with `make`.

    what: the argument's name and rule, for messages: "tree must be a JSON file of rank paths".
    Raises ValueError for a file that cannot be read, is not JSON, is nested too deeply, or holds NaN or infinities,
    and if `make` raises a ValueError, TypeError, KeyError or the like.
    """
    name, rule = what.split(" ", 1)
    try:
        return make(json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number))
    except RecursionError:
        cause = "it is nested too deeply"
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
        raise ValueError(f"a {type(value).__name__} is not a JSON object")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
