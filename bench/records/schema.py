"""What identifies a cell and its record, and the version of the format."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace
from typing import Any, Literal

Record = dict[str, Any]  # of one cell
Gamma = int | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement, under the names of its pytest parameters.

    gamma: 0 for "autoregressive". rate: of arrivals in requests per second. concurrency: clients of a closed loop. Both
    are None for a fixed number of prompts.
    """

    engine: str
    pair: str
    method: str
    gamma: Gamma
    placement: str
    workload: str
    batch_size: int
    rate: float | None = None
    concurrency: int | None = None

    @property
    def id(self) -> str:
        *values, rate, concurrency = astuple(self)
        values += [] if rate is None else [f"{rate:g}"]
        values += [] if concurrency is None else [f"{concurrency}clients"]
        return "-".join(map(str, values))

    @property
    def is_load(self) -> bool:
        return self.rate is not None or self.concurrency is not None

    @property
    def shard_key(self) -> str:
        """Decides which shard it belongs to; methods are compared at each load, so they share a shard."""
        return replace(self, method="any", gamma=0).id if self.is_load else self.id

    @property
    def sweep_key(self) -> str:
        """The same in a sweep, whose rates share a shard, as it ends when one is saturated."""
        return self.shard_key if self.rate is None else replace(self, method="any", gamma=0, rate=None).id


LEVELS = ("rate", "concurrency")  # of a load; a load cell has one of them
CELL_FIELDS = tuple(field.name for field in fields(Cell) if field.name not in LEVELS)
LOAD_FIELDS = (*CELL_FIELDS, *LEVELS)
SCHEMA_VERSION = 1  # of a record
HEAD = b'{"schema_version": '  # the first bytes of a journal
PERCENTILES = (50, 95, 99)
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # left out of the name of a certificate
MAX_PARTS = 10_000  # of a campaign
