"""Rows of data sets: files of JSON lines and Parquet, and the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.workloads.base import Malformed, UnavailableError
from specdec.prompts import rows

HUB_TIMEOUT_S = 5
Rows = Iterator[tuple[str, dict[str, Any]]]  # each with its place, for messages


@dataclass(frozen=True, slots=True)
class HubSet:
    """A data set on the hub, one configuration and split of it."""

    name: str
    configuration: str
    split: str
    revision: str | None = None


def rows_of(path: Path, malformed: Malformed) -> Rows:
    """The rows of a file. Raises ValueError as `specdec.prompts.rows` does, and if Parquet cannot be read."""
    return _parquet_rows(path) if path.suffix == ".parquet" else rows(path, malformed.meet)


def _parquet_rows(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UnavailableError(f"{path} must be read with pyarrow ({error}); pip install pyarrow") from None
    try:
        batches = parquet.ParquetFile(path).iter_batches()
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{path}:row {number}", row
    except (ArrowException, OSError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"{path}: must be a whole Parquet file ({cause}); get it again") from None


def hub_rows(workload: str, hub: HubSet, file: str) -> Rows:
    """The rows of a data set, downloaded once. file: the name that it may have in a data folder instead.

    Raises UnavailableError within seconds if it cannot be downloaded.
    """
    remedy = f"connect to the network, or put it into a folder as {file} and name that with --data-dir"
    try:
        import datasets
    except ImportError as error:
        raise UnavailableError(
            f"workloads={workload} must be read from the hub with datasets ({error}); "
            f"pip install datasets, or put it into a folder as {file} and name that with --data-dir"
        ) from None
    try:
        _require_connection(hub)
        data = datasets.load_dataset(hub.name, hub.configuration, split=hub.split, revision=hub.revision)
    except Exception as error:  # HTTP, files, caches: each library below has its own
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnavailableError(
            f"workloads={workload} must be downloaded from the hub once ({cause}); {remedy}"
        ) from error
    return ((f"{hub.name}:row {number}", row) for number, row in enumerate(data, 1))


def _require_connection(hub: HubSet) -> None:
    """Let `datasets` look only into its cache if the hub cannot be reached: it tries for half a minute otherwise."""
    import datasets
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(hub.name, revision=hub.revision, timeout=HUB_TIMEOUT_S)
    except Exception:
        datasets.config.HF_HUB_OFFLINE = True
