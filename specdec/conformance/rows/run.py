"""Run a comparison: load the yardstick and the tested model one after the other, and judge each arrangement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from specdec.conformance.rows.arrangements import Arrangement, Text
from specdec.conformance.rows.comparison import Deviation, Yardstick, deviations, exact_logits, judge, measure_noise
from specdec.conformance.rows.flips import margin_quantiles
from specdec.conformance.rows.report import Record, worst
from specdec.conformance.rows.scorers import Scorer
from specdec.runtime.progress import doing

Load = Callable[[torch.dtype], Scorer]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is tested. tested, ordinary: load it, and transformers' model of the same weights, in a dtype."""

    tested: Load
    ordinary: Load


@dataclass(frozen=True, slots=True)
class Level:
    """The comparison in one dtype."""

    yardstick: Yardstick
    deviations: Mapping[Arrangement, Deviation]


def compare(
    subject: Subject,
    texts: Sequence[Text],
    tried: Sequence[Arrangement],
    dtype: torch.dtype,
    *,
    in_float32: bool = True,
) -> Record:
    """Compare all arrangements in a dtype, and in float32 too if that is wider; only one model is in memory at a time.

    in_float32: whether to do the latter, without which a bug smaller than 16-bit rounding is not seen.
    Returns verdicts, deviations and margins for JSON.
    """
    with doing("scoring in float64"):
        exact = exact_logits(subject.ordinary(torch.float64), texts)
    dtypes = [dtype, torch.float32] if in_float32 and dtype.itemsize < 4 else [dtype]
    level, *wider = [_level(subject, texts, tried, each, exact) for each in dtypes]
    rows = [_row(arrangement, level, wider) for arrangement in level.deviations]
    return {
        "verdict": worst([row["verdict"] for row in rows]),
        "margins": margin_quantiles(exact),
        "arrangements": rows,
    }


def _level(
    subject: Subject, texts: Sequence[Text], tried: Sequence[Arrangement], dtype: torch.dtype, exact: Sequence[Any]
) -> Level:
    with doing(f"comparing in {_name(dtype)}"):
        yardstick = measure_noise(subject.ordinary(dtype), texts, exact, dtype)
        return Level(yardstick, deviations(subject.tested(dtype), texts, tried, exact))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row(arrangement: Arrangement, level: Level, wider: Sequence[Level]) -> Record:
    deviation, yardstick = level.deviations[arrangement], level.yardstick
    wide = [(each.deviations[arrangement], each.yardstick) for each in wider]
    in_float32 = wide[0] if wide else None
    return {
        **asdict(arrangement),
        "verdict": judge(deviation, yardstick, in_float32),
        **asdict(deviation),
        "noise": yardstick.noise,
        "allowed": yardstick.allowed,
        "in_float32": in_float32
        and {
            **{name: getattr(in_float32[0], name) for name in ("max_gap", "max_error", "num_differing")},
            "allowed": in_float32[1].allowed,
        },
    }
