"""The cells of a run: every combination of the options that makes sense, and why some cannot run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from bench.campaign.options import BenchConfig
from bench.catalogue.pairs import Pair
from bench.engines.registry import ENGINES, engine_kind, why_not, why_not_pair
from bench.records.schema import Cell, Gamma
from bench.workloads.base import buckets
from bench.workloads.registry import label

# options whose every value, if it was named, must be able to run in some cell -> the field of a cell
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


WhyNot = Callable[[str, Pair, str], str | None]  # (engine, pair, placement) -> why this machine is not enough for it


def plan(config: BenchConfig, why_no_room: WhyNot = lambda *_: None, device: str = "cpu") -> list[Plan]:
    """All cells, pair by pair and placement by placement so that models are loaded once.

    device: what the models run on, as torch names it.
    Raises ValueError if something that was named on the command line cannot run in any cell.
    """
    plans = [_plan(config, why_no_room, device, pair, *rest) for pair in config.pairs for rest in _combinations(config)]
    plans = list(dict.fromkeys(plans))
    runnable = [each.cell for each in plans if not each.skip]
    for option, parameter in NAMED_PARAMETERS.items():
        for each in getattr(config, option) if option in config.named else ():
            value = each.name if isinstance(each, Pair) else each
            if not any(getattr(cell, parameter) == value for cell in runnable):
                reason = next(each.skip for each in plans if getattr(each.cell, parameter) == value)
                raise ValueError(f"{option}={value} is asked for and must be able to run, but {reason}")
    if not runnable:
        raise ValueError(f"no cell can run: {plans[0].skip}")
    return plans


def _combinations(config: BenchConfig) -> Iterator[tuple[str, int, str, str, float | None, str, Gamma]]:
    """(workload, batch size, placement, engine, rate, method, gamma): what is compared comes one after the other."""
    names = [name for workload in config.workloads for name in buckets(label(workload), config.prompt_lengths)]
    for placement, workload, batch_size, engine, rate, method in product(
        config.placements, names, config.batch_sizes, config.engines, config.rate or (None,), config.methods
    ):
        for gamma in (0,) if method == "autoregressive" else config.gammas:
            yield workload, batch_size, placement, engine, rate, method, gamma


def _plan(
    config: BenchConfig,
    why_no_room: WhyNot,
    device: str,
    pair: Pair,
    workload: str,
    batch_size: int,
    placement: str,
    engine: str,
    rate: float | None,
    method: str,
    gamma: Gamma,
) -> Plan:
    skip = (
        why_not_pair(engine, pair, placement)
        or _why_no_arrivals(engine, rate)
        or why_not(engine, method, batch_size, config.verification, config.vllm)
        or why_no_room(engine, pair, placement)
    )
    if not skip and pair.lacks_draft(method):
        skip = f"pair={pair.name} has no draft for method={method}; name one with --pairs target=MODEL,draft=MODEL"
    if skip:  # one skipped cell says it for all
        rate = config.rate[0] if config.rate else None
        gamma = gamma if method == "autoregressive" else config.gammas[0]
    if not skip and config.synthetic_acceptance_rates:
        skip = _why_not_synthetic(engine, method, device)
    if not skip and gamma == "auto" and "auto gamma" not in engine_kind(engine).extras:
        skip = f"engine={engine} has no gamma=auto; use --gammas with numbers"
    return Plan(Cell(engine, pair.name, method, gamma, placement, workload, batch_size, rate), skip)


def _why_not_synthetic(engine: str, method: str, device: str) -> str | None:
    kind = engine_kind(engine)
    if "synthetic acceptance" not in kind.extras:
        return f"engine={engine} has no synthetic acceptance; leave out --synthetic-acceptance-rates"
    if kind.package == "vllm" and method != "autoregressive" and device == "cpu":  # asserted in its sampler, 0.32
        return f"engine={engine} has synthetic acceptance on GPUs only; leave out --synthetic-acceptance-rates"
    return None


def _why_no_arrivals(engine: str, rate: float | None) -> str | None:
    if rate is None or "arrivals" in engine_kind(engine).extras:
        return None
    able = ",".join(name for name, kind in ENGINES.items() if "arrivals" in kind.extras)
    return f"engine={engine} takes no requests while it decodes others; use --engines {able}, or leave out --rate"
