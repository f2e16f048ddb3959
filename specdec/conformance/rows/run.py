"""Run a comparison: load the yardstick and the tested model one after the other, and judge each arrangement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

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
    """What is tested.

    Attributes:
        tested: loads it in a dtype.
        ordinary: loads transformers' model in a dtype.
        exact: loads transformers' model of weights in this dtype, and converts them to float64: what is left of its
            difference from the others is arithmetic.
    """

    tested: Load
    ordinary: Load
    exact: Load


@dataclass(frozen=True, slots=True)
class Level:
    """The comparison in one dtype. margins: quantiles of the difference of the top two logits in float64."""

    margins: Mapping[float, float]
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
    dtypes = [dtype, torch.float32] if in_float32 and dtype.itemsize < 4 else [dtype]
    level, *wider = [_level(subject, texts, tried, each) for each in dtypes]
    rows = [_row(arrangement, level, wider) for arrangement in level.deviations]
    return {
        "verdict": worst([row["verdict"] for row in rows]),
        "margins": level.margins,
        "arrangements": rows,
    }


def _level(subject: Subject, texts: Sequence[Text], tried: Sequence[Arrangement], dtype: torch.dtype) -> Level:
    with doing(f"comparing in {str(dtype).removeprefix('torch.')}"):
        exact = exact_logits(subject.exact(dtype), texts)
        yardstick = measure_noise(subject.ordinary(dtype), texts, exact, dtype)
        return Level(margin_quantiles(exact), yardstick, deviations(subject.tested(dtype), texts, tried, exact))


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
