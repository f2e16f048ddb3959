"""Processes or servers for setups, at most two at a time: a candidate and its baseline."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Generic, Protocol, TypeVar

from bench.catalogue.pairs import Pair, folder
from bench.engines.base import LoadOptions, Setup
from bench.records.schema import Gamma
from specdec.models.loading import read_vocabulary

MAX_ENGINES = 2


class Closable(Protocol):
    """A resource that must be closed."""

    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


class Pool(Generic[T]):
    """Starts a resource per setup on demand, and closes unused ones. start: takes minutes and gigabytes."""

    def __init__(self, start: Callable[[Setup], T]) -> None:
        self._start = start
        self._running: dict[Setup, T] = {}

    def __len__(self) -> int:
        return len(self._running)

    def prepare(self, setups: Collection[Setup]) -> None:
        """Close the resources of other setups, except a baseline if there is room; start missing ones."""
        idle = [setup for setup in self._running if setup not in setups]
        for setup in idle:
            if setup.method != "autoregressive" or len(setups) >= MAX_ENGINES:
                self._running.pop(setup).close()
        for setup in setups:
            if setup not in self._running:
                self._running[setup] = self._start(setup)

    def find(self, method: str, gamma: Gamma, num_prompts: int) -> tuple[Setup, T]:
        """The setup for a method and gamma, with a sufficient batch size, and its resource."""
        return next(
            (setup, resource)
            for setup, resource in self._running.items()
            if (setup.method, setup.gamma) == (method, gamma) and setup.batch_size >= num_prompts
        )

    def drop(self, setup: Setup) -> None:
        """Close a failed resource; the next cell that needs it starts another."""
        self._running.pop(setup).close()

    def close(self) -> None:
        while self._running:
            self._running.popitem()[1].close()


class PooledEngine(Generic[T]):
    """What engines with a resource per setup have in common; see `BenchEngine`. version: "" until one is started."""

    version = ""

    def __init__(
        self,
        pair: Pair,
        options: LoadOptions,
        stop_token_ids: Collection[int],
        start: Callable[[Setup], T] | None = None,
    ) -> None:
        """start: `_started` by default."""
        self._pair, self._options, self.dtype = pair, options, options.dtype
        self.stop_token_ids = frozenset(stop_token_ids)
        self._pool: Pool[T] = Pool(start or self._started)

    @property
    def tokenizer(self) -> Any:
        return read_vocabulary(folder(self._pair.target), self._pair.load_format).tokenizer

    @property
    def _vocab_size(self) -> int:
        return read_vocabulary(folder(self._pair.target), self._pair.load_format).vocab_size

    def prepare(self, setups: Collection[Setup]) -> None:
        self._pool.prepare(setups)

    def settle(self) -> None:
        """Nothing to wait for: the threads of an idle resource sleep, or spin only for a millisecond."""

    def close(self) -> None:
        self._pool.close()

    def _started(self, setup: Setup) -> T:
        """Start the resource of a setup. Raises EngineError."""
        raise NotImplementedError
