"""The cells of a run: all valid combinations of the options, and why some of them cannot run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from bench.campaign import shards
from bench.campaign.config import LOAD, BenchConfig
from bench.catalogue.pairs import Pair
from bench.engines.registry import ENGINES, engine_kind, why_not, why_not_pair
from bench.records.schema import Cell
from bench.workloads.base import buckets
from bench.workloads.registry import label

# options of which every named value must be able to run in some cell -> the field of a cell
NAMED_PARAMETERS = {
    "engines": "engine",
    "methods": "method",
    "batch_sizes": "batch_size",
    "pairs": "pair",
    "placements": "placement",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A cell and why it is skipped, with the remedy; None if it can run."""

    cell: Cell
    skip: str | None


WhyNot = Callable[[str, Pair, str], str | None]  # (engine, pair, placement) -> why it does not fit into this machine


def plan(config: BenchConfig, why_no_room: WhyNot = lambda *_: None, device: str = "cpu") -> list[Plan]:
    """All cells, ordered by pair and placement so that models are loaded once.

    device: of the models, as torch names it. Raises ValueError if a value that was named cannot run in any cell.
    """
    plans = [
        _plan(config, why_no_room, device, pair, cell) for pair in config.pairs for cell in _combinations(config, pair)
    ]
    plans = list(dict.fromkeys(plans))
    _check(config, _own(config, plans))
    return plans


def _own(config: BenchConfig, plans: Sequence[Plan]) -> list[Plan]:
    """The cells of this machine where pairs are distributed: another pair need not fit into it."""
    if config.shard_by != "pair":
        return list(plans)
    index, _ = shards.parse(config.shard)
    return [each for each in plans if shards.part_of_cell(each.cell, config) == index]


def _check(config: BenchConfig, plans: Sequence[Plan]) -> None:
    """Raise ValueError if none of these cells can run, or a value that was named cannot in any of them."""
    for option, parameter in NAMED_PARAMETERS.items():
        for each in getattr(config, option) if option in config.named else ():
            value = each.name if isinstance(each, Pair) else each
            skips = [plan.skip for plan in plans if getattr(plan.cell, parameter) == value]
            if skips and all(skips):
                raise ValueError(f"{option}={value} was requested and must be able to run, but {skips[0]}")
    if plans and all(each.skip for each in plans):
        raise ValueError(f"no cell can run: {plans[0].skip}")


def _combinations(config: BenchConfig, pair: Pair) -> Iterator[Cell]:
    """The cells of a pair in the order of the run: those that are compared follow each other."""
    names = [name for workload in config.workloads for name in buckets(label(workload), config.prompt_lengths)]
    for placement, workload, batch_size, engine, level, method in product(
        config.placements, names, config.slots, config.engines, _levels(config), config.methods
    ):
        for gamma in (0,) if method == "autoregressive" else config.gammas:
            yield Cell(engine, pair.name, method, gamma, placement, workload, batch_size, *level)


def _levels(config: BenchConfig) -> list[tuple[float | None, int | None]]:
    """(rate, concurrency) of each load; both None for a fixed number of prompts."""
    levels: list[tuple[float | None, int | None]] = [(rate, None) for rate in config.rates]
    return [*levels, *((None, clients) for clients in config.concurrency)] or [(None, None)]


def _plan(config: BenchConfig, why_no_room: WhyNot, device: str, pair: Pair, cell: Cell) -> Plan:
    skip = (
        why_not_pair(cell.engine, pair, cell.placement)
        or _why_no_arrivals(cell)
        or why_not(cell.engine, cell.method, cell.batch_size, config.verification, config.peers)
        or why_no_room(cell.engine, pair, cell.placement)
        or _why_no_draft(pair, cell.method)
    )
    if skip:  # for every gamma and load: one skipped cell stands for all of them
        gamma = cell.gamma if cell.method == "autoregressive" else config.gammas[0]
        rate, concurrency = _levels(config)[0]
        return Plan(replace(cell, gamma=gamma, rate=rate, concurrency=concurrency), skip)
    if config.prescribes_acceptance:
        skip = _why_not_synthetic(cell.engine, cell.method, device)
    if not skip and cell.gamma == "auto" and "auto gamma" not in engine_kind(cell.engine).extras:
        skip = f"engine={cell.engine} has no gamma=auto; use --gammas with numbers"
    return Plan(cell, skip)


def _why_no_draft(pair: Pair, method: str) -> str | None:
    if pair.lacks_draft(method):
        return f"pair={pair.name} has no draft for method={method}; name one with --pairs target=MODEL,draft=MODEL"
    return None


def _why_not_synthetic(engine: str, method: str, device: str) -> str | None:
    kind = engine_kind(engine)
    if "synthetic acceptance" not in kind.extras:
        return f"engine={engine} has no synthetic acceptance; leave it out"
    if kind.package == "vllm" and method != "autoregressive" and device == "cpu":  # asserted in its sampler, 0.32
        return f"engine={engine} has synthetic acceptance on GPUs only; leave it out"
    return None


def _why_no_arrivals(cell: Cell) -> str | None:
    if not cell.is_load or "arrivals" in engine_kind(cell.engine).extras:
        return None
    able = ",".join(name for name, kind in ENGINES.items() if "arrivals" in kind.extras)
    return f"engine={cell.engine} takes no requests while it decodes others; use --engines {able}, or leave out {LOAD}"
