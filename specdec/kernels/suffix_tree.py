"""The suffix tree of `specdec.proposers.suffix_tree` in C++, compiled once per machine; it needs no special CPU."""

from __future__ import annotations

import platform
from array import array
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any
from weakref import finalize

from specdec.kernels import cpp

_SOURCE = Path(__file__).with_name("suffix_tree.cpp")
# contracted sums would have other bits than Python's
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=off")
_UNUSED = "copied drafts are looked up in Python, which takes longer"
_SIGNATURES = {
    "new": (c_void_p, (c_int64,)),
    "delete": (None, (c_void_p,)),
    "extend": (None, (c_void_p, c_void_p, c_int64)),
    "complete": (None, (c_void_p,)),
    "forget_oldest": (None, (c_void_p,)),
    "num_nodes": (c_int64, (c_void_p,)),
    "num_tokens": (c_int64, (c_void_p,)),
    "copy": (c_int64, (c_void_p, c_void_p, c_int64, c_int64, c_double, c_double, c_void_p, c_void_p)),
}


def available() -> bool:
    """Whether this machine has the compiled tree; the first call compiles it."""
    return platform.system() == "Linux" and _library() is not None


class CompiledTree:
    """A tree that grows token by token; complete texts can be dropped, oldest first.

    depth: maximum length of counted runs, at least 2.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._functions = _functions()
        self._tree = self._functions["new"](depth)
        self._tokens, self._reach = array("q"), array("d")  # of the last copy: arrays of ctypes take longer to create
        finalize(self, self._functions["delete"], self._tree)

    @property
    def num_nodes(self) -> int:
        """Number of runs that occurred at least twice."""
        return int(self._functions["num_nodes"](self._tree))

    @property
    def num_tokens(self) -> int:
        """Number of tokens, with the separator after each complete text."""
        return int(self._functions["num_tokens"](self._tree))

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the growing text."""
        given = array("q", tokens)
        self._functions["extend"](self._tree, *given.buffer_info())

    def complete(self) -> None:
        """Complete the growing text and start the next."""
        self._functions["complete"](self._tree)

    def forget_oldest(self) -> None:
        """Drop the oldest complete text; no text may be growing."""
        self._functions["forget_oldest"](self._tree)

    def copy(
        self, after: Sequence[int] | None, limit: int, doubt: float, least: float
    ) -> tuple[list[int], list[float]]:
        """Tokens and their reach, at most `limit`; see `proposers.suffix.copy_from`.

        after: the tokens that the copy continues; None for the growing text. least: the reach at which a copy ends.
        """
        if len(self._tokens) < limit:
            self._tokens, self._reach = array("q", bytes(8 * limit)), array("d", bytes(8 * limit))
        context = array("q", after or ())
        address, size = context.buffer_info()
        results = (self._tokens.buffer_info()[0], self._reach.buffer_info()[0])
        number = self._functions["copy"](
            self._tree, address, -1 if after is None else size, limit, doubt, least, *results
        )
        return self._tokens[:number].tolist(), self._reach[:number].tolist()


@cache
def _library() -> Any:
    return cpp.compiled("suffix-tree", [_SOURCE], (), _FLAGS, _UNUSED)


@cache
def _functions() -> dict[str, Any]:
    functions = {name: getattr(_library(), f"suffix_tree_{name}") for name in _SIGNATURES}
    for name, function in functions.items():
        function.restype, function.argtypes = _SIGNATURES[name]
    return functions
