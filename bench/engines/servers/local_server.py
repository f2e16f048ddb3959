"""Servers that the benchmark starts on the loopback interface."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from bench.engines.base import Setup
from bench.engines.pool import Pool
from bench.engines.process import Child
from specdec.servers.client import Client
from specdec.servers.errors import EngineError

DEATH_S = 2.0  # a connection breaks slightly before its process has ended

C = TypeVar("C", bound=Client)


@dataclass(frozen=True, slots=True)
class Server(Generic[C]):
    """A healthy server. model: the name of the served model. child: its process, if it was started here."""

    client: C
    model: str
    child: Child | None = None

    def failure(self) -> EngineError | None:
        """The error of a server that was started here and has ended; None if it is running."""
        if self.child and self.child.ends_within(DEATH_S):
            return self.child.failure(f"must keep running, but {self.child.end()}")
        return None

    def close(self) -> None:
        if self.child:
            self.child.close()


@contextmanager
def dropping(pool: Pool[Server[C]], setup: Setup, server: Server[C]) -> Iterator[None]:
    """Drop a server from the pool if calling it fails; if it has ended, its last output is the error."""
    try:
        yield
    except EngineError as error:
        failure = server.failure() or error
        pool.drop(setup)
        raise failure from None


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_healthy(client: Client, child: Child, timeout_s: float) -> None:
    """Raise EngineError, with the last output, if a server ends before it is healthy, or is not healthy in time."""
    deadline_s = time.monotonic() + timeout_s
    while not client.is_healthy():
        if child.process.poll() is not None:
            raise child.failure(f"must become healthy, but {child.end()}")
        if time.monotonic() > deadline_s:
            raise child.failure(f"must become healthy within {timeout_s:g} s, but did not")
        time.sleep(0.2)
