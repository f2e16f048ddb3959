"""Change the functions of a module that is already imported.

This is the same as importing a changed source if only code inside functions differs, and none of them has run yet.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType

Change = tuple[CodeType, CodeType]  # the code of a function, before and after


def changes(before: str, after: str, path: Path) -> list[Change] | None:
    """The functions and methods that differ between two sources of a module; None if code outside of them does."""
    try:
        return list(_changes(compile(before, path, "exec"), compile(after, path, "exec")))
    except (_RunsAtImportError, SyntaxError):
        return None


class _RunsAtImportError(Exception):
    """Code of the module's own or of a class body differs."""


def _changes(before: CodeType, after: CodeType) -> Iterator[Change]:
    if before == after:
        return
    if before.co_flags & inspect.CO_OPTIMIZED:  # a function; the bodies of modules and classes are not
        yield before, after
        return
    if _own(before) != _own(after):
        raise _RunsAtImportError
    for pair in zip(_nested(before), _nested(after), strict=True):
        yield from _changes(*pair)


def _nested(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _own(code: CodeType) -> CodeType:
    """A code without what is nested in it."""
    constants = tuple(None if isinstance(constant, CodeType) else constant for constant in code.co_consts)
    return code.replace(co_consts=constants)


def functions(path: Path) -> list[FunctionType]:
    """The function objects of this process that are defined in a file, wherever they are kept."""
    every = (each for each in gc.get_objects() if type(each) is FunctionType)  # isinstance would wake lazy objects
    return [each for each in every if each.__code__.co_filename == str(path)]


def find(functions: list[FunctionType], change: Change) -> list[FunctionType]:
    """The function objects of a change; none if it cannot be made in place."""
    before, after = change
    if before.co_freevars != after.co_freevars:
        return []
    return [each for each in functions if _identity(each.__code__) == _identity(before)]


def _identity(code: CodeType) -> tuple[str, int, bytes]:
    return code.co_qualname, code.co_firstlineno, code.co_code  # ==, of codes that have run, is not reliable


def lines(code: CodeType) -> set[int]:
    """The numbers of the lines of a function, without that of its head, which runs at import."""
    own = {line for _, _, line in code.co_lines() if line}
    return own.union(*map(lines, _nested(code))) - {code.co_firstlineno}
