"""The cells of one command on an existing Ray cluster.

The campaign is divided into parts, one for each pair in each placement (`--shard I/N --shard-by pair`), so that the
models of a pair are loaded once. A part is a task of Ray with the GPUs of its placement and its share of the node's
processors. Journals are kept here, cell by cell: when a node dies, its part continues on another one, and only the cell
that was running is measured again.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench.campaign import options, shards
from bench.campaign.config import BenchConfig
from bench.campaign.part import Outcome, Started, measure
from specdec.models.placement import num_devices

ROOT = Path(__file__).parents[2]
NOT_UPLOADED = [".git", "/tests", "/docs", "/mutation"]
INSTALL = "pip install -e '.[ray]'"  # or ray alone
GPU_KIND = "accelerator_type:"  # the start of the resource by which Ray names a node's kind of GPU
MAX_CAUSE = 200  # characters of Ray's explanation of a loss
FORWARDED = ("OMP_NUM_THREADS",)  # environment variables; and those of the options


class ClusterError(ValueError):
    """A campaign that the cluster cannot run; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Part:
    """The cells of a pair in a placement. index: from 1."""

    index: int
    number: int
    pair: str
    placement: str
    num_gpus: int

    @property
    def shard(self) -> str:
        return f"{self.index}/{self.number}"

    @property
    def name(self) -> str:
        return f"part {self.shard} ({self.pair}, {self.placement})"

    @property
    def file_name(self) -> str:
        """Without a suffix."""
        return f"part-{self.index}-of-{self.number}"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a task reserves on a node. others: custom resources of Ray, by which nodes are chosen."""

    num_cpus: int
    num_gpus: int
    others: Mapping[str, float] = field(default_factory=dict)


# ---- the command


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the benchmarks: its options, the file for its results, and the commit of the sources."""

    arguments: tuple[str, ...]
    config: BenchConfig
    results: Path
    commit_info: dict[str, Any]


class _Reader:
    """A plugin of pytest that reads the options and ends before anything is collected."""

    command: Command | None = None

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = tuple(arguments)

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> int:
        try:
            options_ = options.parse_config(config)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        results: Path | None = config.getoption("benchmark_json")
        if results is None:
            raise pytest.UsageError("--benchmark-json must name a file: the merged run is written there")
        if options_.shard:
            raise pytest.UsageError(f"shard={options_.shard} must be left out: the cluster runs all parts")
        commit_info = config.hook.pytest_benchmark_generate_commit_info(config=config)
        self.command = Command(self._arguments, options_, results, commit_info)
        return 0


def read_command(arguments: Sequence[str]) -> Command:
    """A command by its arguments. Raises ClusterError for options that cannot be used, after pytest printed why."""
    reader = _Reader(arguments)
    status = pytest.main([*arguments], plugins=[reader])
    if reader.command is None:
        raise ClusterError(
            f"pytest must accept {shlex.join(arguments)}, but ended with status {int(status)}; see above"
        )
    return reader.command


def parts_of(config: BenchConfig, nodes: Sequence[Mapping[str, float]]) -> list[Part]:
    """The parts of a command. nodes: resources of the nodes, by Ray's names."""
    models = shards.models_of(config)
    return [
        Part(index, len(models), pair, placement, gpus_needed(placement, config, nodes))
        for index, (pair, placement) in enumerate(models, 1)
    ]


def gpus_needed(placement: str, config: BenchConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """The GPUs of a part: those of its placement, or of vLLM's parallelism if that is larger; all of a node for auto.

    0 on the CPU, and for --device auto in a cluster without GPUs.
    """
    most = int(max((node.get("GPU", 0) for node in nodes), default=0))
    if config.device == "cpu" or (config.device == "auto" and not most):
        return 0
    if ":" in config.device:
        raise ClusterError(f"device={config.device} must be auto, cpu or cuda: Ray chooses the GPUs of each part")
    vllm = json.loads(config.vllm_options)
    parallel = int(vllm.get("tensor_parallel_size", 1)) * int(vllm.get("pipeline_parallel_size", 1))
    uses_vllm = any(engine.startswith("vllm") for engine in config.engines)
    needed = most if placement == "auto" else num_devices(placement)
    return max(needed, parallel if uses_vllm else 1, 1)


def needs_of(part: Part, nodes: Sequence[Mapping[str, float]], others: Mapping[str, float]) -> Needs:
    """What a part reserves: its GPUs, and the node's share of processors for them. On the CPU it has a whole node.

    Two parts that share processors would slow each other down. Raises ClusterError if no node has so many GPUs, or
    if nodes have different ones.
    """
    able = [node for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= part.num_gpus]
    able = [node for node in able if all(node.get(name, 0) >= number for name, number in others.items())]
    if not able:
        most = max((node.get("GPU", 0) for node in nodes), default=0)
        raise ClusterError(
            f"{part.name} must fit on one node with {part.num_gpus} GPUs{' and ' if others else ''}"
            f"{', '.join(others)}, but the nodes of the cluster have at most {most:g} GPUs; add such a node, or use "
            "other --placements"
        )
    kinds = sorted({name for node in able for name in node if name.startswith(GPU_KIND)} if part.num_gpus else ())
    if len(kinds) > 1:
        raise ClusterError(
            f"{part.name} must run on one kind of GPU, but the cluster has {', '.join(kinds)}; choose one with "
            f"""--resources '{{"{kinds[0]}": 0.001}}'"""
        )
    cpus = (node["CPU"] * (part.num_gpus / node["GPU"] if part.num_gpus else 1) for node in able)
    return Needs(max(1, int(min(cpus))), part.num_gpus, others)


# ---- the run


def load_ray() -> Any:
    """The module `ray`. Raises ClusterError with the command that installs it."""
    try:
        import ray
    except ImportError as error:
        raise ClusterError(f"--ray needs Ray ({error}); {INSTALL}") from error
    return ray


def connect(address: str) -> Any:
    """Ray, connected to a cluster whose workers get this checkout. Raises ClusterError if there is no such cluster."""
    ray = load_ray()
    if "://" in address:
        raise ClusterError(
            f"ray={address} must be auto or HOST:PORT, from one of the cluster's machines; elsewhere use "
            "`ray job submit` for this command"
        )
    try:
        ray.init(
            address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"working_dir": str(ROOT), "excludes": NOT_UPLOADED},
        )
    except (ConnectionError, ray.exceptions.RaySystemError) as error:
        raise ClusterError(f"ray={address} must be a running cluster ({error}); start one with `ray start`") from error
    return ray


class Campaign:
    """Runs parts on a cluster and keeps what they finish.

    folder: of the journals. retries: how often a part is run again after it is lost. show: prints a line.
    """

    def __init__(
        self, ray: Any, arguments: Sequence[str], folder: Path, retries: int, show: Callable[[str], None] = print
    ) -> None:
        self._ray, self._arguments, self._folder = ray, [*arguments], folder
        self._retries, self._show = retries, show
        # Ray's own retries would start from the beginning
        self._task = ray.remote(max_retries=0, num_returns="streaming")(measure)
        self._configuration: dict[str, Any] = {}

    def run(self, parts: Mapping[Part, Needs]) -> dict[Part, Outcome]:
        """The outcomes of the parts, without those that could not be finished, which are reported."""
        self._folder.mkdir(parents=True, exist_ok=True)
        running = {self._start(*each): each for each in parts.items()}
        attempts = dict.fromkeys(parts, 1)
        outcomes: dict[Part, Outcome] = {}
        while running:
            (task, *_), _ = self._ray.wait([*running], num_returns=1)
            part, needs = running.pop(task)
            try:
                if outcome := self._received(part, self._ray.get(next(task))):
                    outcomes[part] = outcome
                else:
                    running[task] = part, needs
            except self._ray.exceptions.RayError as error:
                self._report_loss(part, error, is_last=attempts[part] > self._retries)
                if attempts[part] <= self._retries:
                    attempts[part] += 1
                    running[self._start(part, needs)] = part, needs
            except ClusterError as error:
                self._ray.cancel(task)
                self._show(f"{part.name}: {error}")
        return {part: outcomes[part] for part in parts if part in outcomes}

    def journal(self, part: Part) -> Path:
        """The file for a part's finished cells."""
        return self._folder / f"{part.file_name}.jsonl"

    def _start(self, part: Part, needs: Needs) -> Any:
        """A task of Ray that yields what `measure` does."""
        journal, arguments = self.journal(part), [*self._arguments, "--shard", part.shard, "--shard-by", "pair"]
        finished = journal.read_bytes() if journal.exists() else b""
        task = self._task.options(
            num_cpus=needs.num_cpus, num_gpus=needs.num_gpus, resources=dict(needs.others), name=part.name
        )
        return task.remote(arguments, _variables(), finished)

    def _received(self, part: Part, piece: bytes | Started | Outcome) -> Outcome | None:
        """Keep what a part handed over; its outcome if that is the end."""
        if isinstance(piece, Started):
            self._show(f"{part.name}: runs on {piece.host}, process {piece.process}")
        elif isinstance(piece, Outcome):
            self._folder.joinpath(f"{part.file_name}.txt").write_text(piece.printed)
            self._show(f"{part.name}: ended with {self._num_cells(part)} cells")
            return piece
        else:
            self._keep(part, piece)
        return None

    def _keep(self, part: Part, lines: bytes) -> None:
        """Append lines to a part's journal. Raises ClusterError if their machine differs from the other parts'."""
        configuration = json.loads(lines.partition(b"\n")[0]).get("configuration")
        if configuration:  # the first line of a journal
            self._configuration = self._configuration or configuration
            check_same(self._configuration, configuration)
        with self.journal(part).open("ab") as journal:
            journal.write(lines)
        if self._num_cells(part):
            self._show(f"{part.name}: {self._num_cells(part)} cells finished")

    def _report_loss(self, part: Part, error: Exception, *, is_last: bool) -> None:
        cause = " ".join(str(error).split())[:MAX_CAUSE]
        then = "given up; --resume continues" if is_last else "it is run again"
        self._show(f"{part.name}: lost with {self._num_cells(part)} cells finished; {then} ({cause})")

    def _num_cells(self, part: Part) -> int:
        journal = self.journal(part)
        return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def check_same(first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise ClusterError if two parts have different configurations, which include the machine and the versions."""
    for name in first:
        if name != "shard" and other.get(name) != first[name]:
            raise ClusterError(
                f"must run on the same kind of machine as the other parts, but {name} was {first[name]} and is "
                f"{other.get(name)}; choose nodes with --resources, or run it alone"
            )


def _variables() -> dict[str, str]:
    """Environment variables of this process that options and threads depend on."""
    return {name: value for name, value in os.environ.items() if name.startswith(options.PREFIX) or name in FORWARDED}
