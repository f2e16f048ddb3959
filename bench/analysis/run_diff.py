"""Differences between two runs, cell by cell: faster, slower, no difference seen, or why they cannot be compared.

Times of two runs also differ with the load of the machine, so a verdict rests on what is paired inside each run: the
ratio to plain decoding of the same prompts, measured alternately. For a cell without such a pair (plain decoding
itself, costs of steps) different times only show that the machine changed, or everything on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.analysis.engine_ratios import time_per_token
from bench.records.grouping import round_clusters
from bench.records.intervals import Interval, geometric_mean_interval, unpaired_ratio_interval
from bench.records.results import Results, cell_id, kind_of
from bench.records.schema import Record

# must be equal for times of a cell to be comparable
CONDITIONS = (
    "target",
    "draft",
    "dtype",
    "device",
    "quantisation",
    "load_format",
    "engine_options",
    "verification",
    "synthetic_acceptance_rates",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "duration_s",
)
PROMPTS = ("num_prompts", "prompt_format", "turns", "template_arguments", "prompt_lengths", "seed")
MACHINE = ("cpu_model", "cpu_count", "gpus", "torch_num_threads", "cuda", "driver")
FASTER, SLOWER, NO_DIFFERENCE, INCOMPARABLE = "faster", "slower", "no difference seen", "not comparable"
MACHINE_CHANGED = "the machine changed"
VERDICTS = (FASTER, SLOWER, NO_DIFFERENCE, MACHINE_CHANGED, INCOMPARABLE)


@dataclass(frozen=True, slots=True)
class Difference:
    """A cell in two runs.

    record: of the later run if both have the cell. verdict: on the later one, as above, or "only in NAME".
    times: speed of the later one over the earlier: by the ratios to plain decoding if both runs have them, else by the
    times. plain: the same for plain decoding beside it, which shows a change of the machine or of the whole engine.
    ratios: of the speed-ups over plain decoding beside each, later over earlier, round by round; none if not paired.
    reference_ratios: likewise, of the reference engine's speeds over this one's with the same method.
    reasons: why there is no interval or no verdict. outputs_equal: whether all emitted tokens are equal; None if
    unknown.
    """

    record: Record
    verdict: str
    times: Interval | None = None
    plain: Interval | None = None
    reasons: tuple[str, ...] = ()
    outputs_equal: bool | None = None
    ratios: tuple[float, ...] = ()
    reference_ratios: tuple[float, ...] = ()


def differences(before: Results, after: Results) -> list[Difference]:
    """Of every cell that is in at least one of two runs, except audits, which have no times."""
    earlier, later = ({cell_id(each): each for each in _timed(run)} for run in (before, after))
    found = [
        _difference(before, after, earlier[name], record) if name in earlier else _lone(record, after)
        for name, record in later.items()
    ]
    return found + [_lone(record, before) for name, record in earlier.items() if name not in later]


def _timed(run: Results) -> list[Record]:
    return [*run.cells, *run.loads, *run.costs]


def _lone(record: Record, run: Results) -> Difference:
    return Difference(record, f"only in {run.name}")


def _difference(before: Results, after: Results, earlier: Record, later: Record) -> Difference:
    outputs_equal = _outputs_equal(earlier, later)
    reasons = tuple(_obstacles(before, after, earlier, later))
    if reasons:
        return Difference(later, INCOMPARABLE, reasons=reasons, outputs_equal=outputs_equal)
    if later["axis"] is not None:
        times = unpaired_ratio_interval(earlier["per_round_s"], later["per_round_s"])
        return Difference(later, _unpaired_verdict(times), times, reasons=_few(times))
    ratios, beside = _ratios(earlier, later, ""), _reference_ratios(earlier, later)
    clusters = round_clusters(later)
    if not _has_times(earlier, later, "", "baseline_"):
        times = geometric_mean_interval(ratios, clusters)
        return Difference(
            later, _unpaired_verdict(times), times, None, _few(times), outputs_equal, reference_ratios=beside
        )
    plain_ratios = _ratios(earlier, later, "baseline_")
    plain = geometric_mean_interval(plain_ratios, clusters)
    speedups = tuple(ratio / plain for ratio, plain in zip(ratios, plain_ratios, strict=True))
    times = geometric_mean_interval(speedups, clusters)
    return Difference(later, verdict(times), times, plain, _few(times), outputs_equal, speedups, beside)


def verdict(times: Interval) -> str:
    """By the interval of the ratio of speeds: a difference if it excludes 1."""
    if times.low is not None and times.low > 1:
        return FASTER
    return SLOWER if times.high is not None and times.high < 1 else NO_DIFFERENCE


def _unpaired_verdict(times: Interval) -> str:
    """Of unpaired times: whether the machine, or everything on it, is as fast as before."""
    return NO_DIFFERENCE if verdict(times) == NO_DIFFERENCE else MACHINE_CHANGED


def _few(times: Interval) -> tuple[str, ...]:
    return ("one round has no interval",) if times.low is None else ()


def _ratios(earlier: Record, later: Record, arm: str) -> list[float]:
    """Time per emitted token of the earlier over that of the later, round by round."""
    return [old / new for old, new in zip(time_per_token(earlier, arm), time_per_token(later, arm), strict=True)]


def _reference_ratios(earlier: Record, later: Record) -> tuple[float, ...]:
    """Of the reference engine's speeds over this one's, later over earlier; none if it was not beside it in both."""
    if not _has_times(earlier, later, "", "reference_"):
        return ()
    own, reference = _ratios(earlier, later, ""), _ratios(earlier, later, "reference_")
    return tuple(speed / base for speed, base in zip(reference, own, strict=True))


def _outputs_equal(earlier: Record, later: Record) -> bool | None:
    digests = {record.get("output_sha256") for record in (earlier, later)}
    return None if None in digests else len(digests) == 1


def _obstacles(before: Results, after: Results, earlier: Record, later: Record) -> Iterator[str]:
    """Why the times of a cell cannot be compared."""
    yield from circumstances(before, after, earlier, later)
    yield from _changes("options", earlier, later, CONDITIONS)
    yield from _changes("prompts", earlier, later, PROMPTS)
    if _other_prompts(before, after):
        yield "prompts: the workload's texts differ"
    if later["axis"] is not None:
        if not (earlier["per_round_s"] and later["per_round_s"]):
            yield "rounds: their times were not recorded"
    elif kind_of(later) == "loads":
        yield "load: requests wait for each other, so a run is a single observation"
    elif not _has_times(earlier, later, ""):
        yield "prompts: times of single prompts were not recorded, or for different numbers of prompts"


def circumstances(before: Results, after: Results, earlier: Record, later: Record) -> Iterator[str]:
    """Differences of the machine and of the versions that a cell's times depend on."""
    yield from _changes("machine", before.machine, after.machine, MACHINE)
    yield from _changes("versions", _versions(before, earlier), _versions(after, later))


def _changes(what: str, old: dict[str, Any], new: dict[str, Any], names: Sequence[str] = ()) -> Iterator[str]:
    """Values that differ."""
    for name in names or sorted({*old, *new}):
        if old.get(name) != new.get(name):
            yield f"{what}: {name} was {old.get(name)} and is {new.get(name)}"


def _versions(run: Results, record: Record) -> dict[str, Any]:
    """Versions that times depend on; specdec's own is what two runs compare."""
    versions = dict(run.machine.get("versions") or {})
    engine = str(record.get("engine") or "specdec")
    for name in ("specdec", "vllm"):
        versions.pop(name, None)
    others = {"engine": record.get("engine_version")} if engine != "specdec" else {}
    return {**versions, "python": run.machine.get("python_version"), **others}


def _other_prompts(before: Results, after: Results) -> bool:
    """Whether two runs of the same workloads had different texts; False if unknown."""
    old, new = (run.configuration or {} for run in (before, after))
    names = ("workloads", "num_prompts", "seed", "prompt_lengths")
    if any(old.get(name) != new.get(name) for name in names):
        return False  # the digest is of all workloads together
    digests = [each.get("prompts_sha256") for each in (old, new)]
    return None not in digests and digests[0] != digests[1]


def _has_times(earlier: Record, later: Record, *arms: str) -> bool:
    """Whether both have the times of their prompts in these arms, and equally many."""
    names = [f"{arm}{name}" for arm in arms for name in ("per_prompt_latency_s", "per_prompt_tokens")]
    lengths = {len(record.get(name) or ()) for record in (earlier, later) for name in names}
    return len(lengths) == 1 and 0 not in lengths
