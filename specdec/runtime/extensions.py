"""Extensions: workloads, engines and drafting methods that other packages bring.

An extension is named by an entry point of its group, or as `module:attribute`. Only metadata is read to list entry
points; a module is imported when an extension in it is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from specdec.runtime.checks import nearest

Group = Literal["specdec.workloads", "specdec.engines", "specdec.proposers", "specdec.scorers"]
REFERENCE = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<attribute>[^\W\d]\w*)")  # module:attribute
_REMEDY = "install the package that has it, or add its folder to PYTHONPATH"


class ExtensionError(ValueError):
    """An extension cannot be used; the message names its group, its name, what is wrong and the remedy."""


def is_extension(group: Group, name: str) -> bool:
    """Whether a name is written as `module:attribute` or is an installed entry point; imports nothing."""
    return REFERENCE.fullmatch(name) is not None or name in entry_points(group)


@cache
def entry_points(group: Group) -> dict[str, tuple[metadata.EntryPoint, ...]]:
    """The installed entry points of a group by name; several packages may declare the same name."""
    found: dict[str, tuple[metadata.EntryPoint, ...]] = {}
    for each in metadata.entry_points(group=group):
        found[each.name] = (*found.get(each.name, ()), each)
    return found


def load(group: Group, name: str, is_valid: Callable[[Any], bool], expected: str) -> Any:
    """The object that a name stands for, imported now.

    is_valid, expected: what it must be, as a check and in words.
    Raises ExtensionError if there is none, if it cannot be imported, or if it is something else.
    """
    loaded = _import(group, name, _reference(group, name))
    if not is_valid(loaded):
        raise ExtensionError(f"{group}: {name!r} must be {expected}, but it is {type(loaded).__name__} {loaded!r:.80}")
    return loaded


def source_files(group: Group, name: str) -> list[Path]:
    """The Python files of the package, or the one of the module, that an extension is in."""
    top = import_module(_reference(group, name).partition(":")[0].partition(".")[0])
    if not hasattr(top, "__path__"):
        return [Path(top.__file__)] if top.__file__ else []
    return sorted(path for folder in top.__path__ for path in Path(folder).rglob("*.py"))


def _reference(group: Group, name: str) -> str:
    """`module:attribute` of a name."""
    if REFERENCE.fullmatch(name):
        return name
    found = entry_points(group)
    references = {each.value for each in found.get(name, ())}
    if len(references) > 1:
        owners = " and ".join(sorted(_owner(each) for each in found[name]))
        raise ExtensionError(f"{group}: {name!r} must be declared once, but {owners} declare it; use module:attribute")
    if not references:
        known = ", ".join(sorted(found)) or "none"
        raise ExtensionError(
            f"{group}: {name!r} must be module:attribute or an installed entry point (installed: {known})"
            f"{nearest(name, found)}; {_REMEDY}"
        )
    (reference,) = references
    return reference


def _owner(entry_point: metadata.EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist else entry_point.value


def _import(group: Group, name: str, reference: str) -> Any:
    found = REFERENCE.fullmatch(reference)
    if not found:
        raise ExtensionError(f"{group}: {name!r} must be declared as module:attribute, not as {reference!r}")
    try:
        module = import_module(found["module"])
    except Exception as error:  # whatever an outside module raises, the user must learn whose it is
        reason = f"{type(error).__name__}: {error}"
        remedy = _REMEDY if isinstance(error, ModuleNotFoundError) else "correct the module"
        raise ExtensionError(f"{group}: {name!r} needs module {found['module']!r} ({reason}); {remedy}") from error
    return _attribute(group, name, module, found["attribute"])


def _attribute(group: Group, name: str, module: Any, attribute: str) -> Any:
    if not hasattr(module, attribute):
        public: Iterable[str] = (each for each in vars(module) if not each.startswith("_"))
        raise ExtensionError(
            f"{group}: {name!r} needs attribute {attribute!r}, which module {module.__name__!r} does not have"
            f"{nearest(attribute, public) or '; define it, or correct the name'}"
        )
    return getattr(module, attribute)
