"""One run of the benchmarks: its plan, its journal, and the measurement of each kind of cell."""

from __future__ import annotations

import os
from functools import partial
from typing import Any, Protocol, TextIO

import pytest

from bench.campaign import arrivals
from bench.campaign.config import BenchConfig
from bench.campaign.options import result_options
from bench.campaign.plan import Plan, plan
from bench.engines.registry import extension_files
from bench.measure import machine
from bench.measure.context import Context
from bench.measure.journal import Entry, Journal
from bench.measure.models import Models
from bench.measure.paired import Clock
from bench.measure.progress import NOWHERE
from bench.measure.prompts import Prompts
from bench.records.fields import KINDS
from bench.records.schema import CELL_FIELDS, Cell, Record


class Identified(Protocol):
    """A cell of any kind."""

    @property
    def id(self) -> str: ...


class Measurer(Protocol):
    """Measures the cells of one kind."""

    def measure(self, cell: Any, benchmark: Any) -> Entry:
        """Measure a cell with the pytest-benchmark fixture; returns its record and the times of its rounds."""
        ...


NUM_CONFIRMING = 2  # saturated rates in a row that end a sweep: one may be a false alarm
# what names in the journal begin with, by the kind of cell
_PREFIXES = {"cells": "", "loads": "load-", "costs": "cost-", "certificates": "equivalence-"}


class Session:
    """Checks the options before any expensive work, then measures cell by cell.

    plans: all cells. records: of finished cells by kind, in order of the run; kinds as in `bench.records.results`:
    cells, loads, costs, certificates.
    cells_of_shards: number of cells in each shard. clock: pytest-benchmark's timer.
    failure: why the results could not be written.
    Raises ValueError naming an option that cannot be satisfied here.
    """

    def __init__(self, config: BenchConfig) -> None:
        self.config, self.clock = config, Clock()
        self.device = machine.resolve_device(config.device)
        self._arrivals = {
            rate: arrivals.arrivals(rate, config.duration, config.arrivals, config.seed) for rate in config.rates
        }
        self.plans = plan(config, partial(machine.why_no_room, config=config, device=self.device), self.device)
        self.prompts = Prompts(config, max(map(len, self._arrivals.values()), default=0))
        self.models = Models(config, self.device)
        self.progress: TextIO = NOWHERE
        self.records: dict[str, list[Record]] = {kind: [] for kind in KINDS}
        self.cells_of_shards: list[int] = []
        self.failure: str | None = None
        self.num_resumed = 0
        self._journal: Journal | None = None
        self._measurers: dict[str, Measurer] = {}

    @property
    def journal(self) -> Journal:
        assert self._journal is not None, "the session is not open"
        return self._journal

    def open(self, progress: TextIO = NOWHERE) -> None:
        """Start or resume the journal; nothing is written before. progress: stream for progress bars."""
        config, self.progress = self.config, progress
        self._journal = Journal.open(config.journal, self.configuration(), resume=config.resume)
        names = {self._name("loads" if config.is_load else "cells", each.cell) for each in self.plans}
        self.num_resumed = len(self.journal.cells.keys() & names)

    def _measurer(self, kind: str) -> Measurer:
        """The measurer of a kind, made when its first cell is measured."""
        if kind not in self._measurers:
            context = Context(self.config, self.device, self.models, self.prompts, self.progress)
            self._measurers[kind] = self._made_measurer(kind, context)
        return self._measurers[kind]

    def _made_measurer(self, kind: str, context: Context) -> Measurer:
        # these import transformers, which takes seconds: not for a usage error, or a run that is replayed
        if kind == "cells":
            from bench.measure.cells.closed_loop import ClosedLoop

            return ClosedLoop(context, [each.cell for each in self.plans if not each.skip])
        if kind == "loads":
            from bench.measure.cells.loaded import Loaded

            return Loaded(context, self._arrivals)
        if kind == "costs":
            from bench.measure.cost.sweep import CostSweep

            return CostSweep(context, self.roofline)
        from bench.measure.cells.audit import Audits

        return Audits(context)

    def close(self) -> None:
        """Unload the models and close the journal."""
        self.models.close()
        if self.progress is not NOWHERE:
            self.progress.close()
        if self._journal:
            self._journal.close()

    def why_skipped(self, plan: Plan) -> str | None:
        """Why a cell cannot run here, with a remedy; None if it can."""
        return plan.skip or self.prompts.why_unavailable(plan.cell)

    def why_saturated(self, cell: Cell) -> str | None:
        """Why a sweep ends before a cell: the rates before it saturated the same engine and method."""
        if not self.config.sweep or cell.rate is None:
            return None
        names = CELL_FIELDS
        arm = [each for each in self.records["loads"] if all(each[name] == getattr(cell, name) for name in names)]
        lower = [each for each in arm if each["rate"] is not None and each["rate"] < cell.rate][-NUM_CONFIRMING:]
        if len(lower) < NUM_CONFIRMING or not all(each["is_saturated"] for each in lower):
            return None
        rates = " and ".join(f"{each['rate']:g}" for each in lower)
        return f"saturated at {rates} requests/s"

    def run(self, kind: str, cell: Identified, benchmark: Any) -> Record:
        """The record of a cell, from the journal, or measured and added to it."""
        name = self._name(kind, cell)
        if name in self.journal.cells:
            self.clock.replay(benchmark, self.journal.cells[name].rounds_s)
        else:
            self._keep(name, self._measurer(kind).measure(cell, benchmark))
        self.records[kind].append(self.journal.cells[name].record)
        return self.records[kind][-1]

    def roofline(self) -> Record:
        """The memory bandwidth of this machine, from the journal, or measured and added to it."""
        import torch

        from bench.measure.cost import roofline

        if "roofline" not in self.journal.cells:
            sizes = roofline.SMOKE_SIZES if self.config.smoke else roofline.SIZES
            self._keep("roofline", Entry(roofline.measure(torch.device(self.device), sizes), []))
        return self.journal.cells["roofline"].record

    def versions(self) -> dict[str, str | None]:
        """Versions of the packages that results depend on; those of other engines from what runs them."""
        installed = machine.versions()
        if {"vllm", "vllm-server"} & set(self.config.engines):
            from bench.engines import vllm  # imports transformers

            installed["vllm"] = vllm.installed_version(self.config.vllm_python)
        if "openvino" in self.config.engines:
            from bench.engines import openvino

            installed["openvino_genai"] = openvino.installed_version(self.config.openvino_python)
        if "llama-server" in self.config.engines:
            from bench.engines.servers import llama_server

            installed["llama.cpp"] = llama_server.version_of(self.config.llama_server)
        return installed

    def configuration(self) -> dict[str, Any]:
        """Everything that affects results: cells of different configurations must not be mixed."""
        return {
            **result_options(self.config),
            "device": self.device,
            "prompts_sha256": self.prompts.sha256(),
            "versions": self.versions(),
            "source_sha256": machine.source_sha256(extension_files(self.config.engines, self.config.methods)),
            "cpu_model": machine.cpu_model(),
            "cpu_count": os.cpu_count(),
        }

    def _name(self, kind: str, cell: Identified) -> str:
        """Of a cell in the journal."""
        return _PREFIXES[kind] + cell.id

    def _keep(self, name: str, entry: Entry) -> None:
        try:
            self.journal.append(name, entry)
        except OSError as error:
            pytest.exit(
                f"journal={self.journal.path} must be writable ({error.strerror}); the cells before this one "
                "are in it: free space and run again with --resume",
                returncode=3,
            )
