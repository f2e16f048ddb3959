"""What goes wrong with an engine or its server."""

from __future__ import annotations


class EngineError(RuntimeError):
    """An engine cannot run a cell; the run continues with the others. The message names the engine and a remedy."""


class BusyError(EngineError):
    """The server is unreachable or overloaded: a retry may succeed."""
