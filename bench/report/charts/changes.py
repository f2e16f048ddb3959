"""The chart of changes between two runs: the speed of each cell relative to the first run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bench.analysis.run_diff import FASTER, MACHINE_CHANGED, NO_DIFFERENCE, SLOWER, Difference
from bench.records.results import Results
from bench.report.charts.model import Line, Rows
from bench.report.charts.names import file_name
from bench.report.columns import labels_of, text

MAX_LINES = 48
KINDS = {NO_DIFFERENCE: -1, SLOWER: 1, FASTER: 2, MACHINE_CHANGED: 4}


def pictures(before: Results, after: Results, found: Sequence[Difference]) -> Iterator[Rows]:
    """A forest plot per engine of the comparable cells, at most the `MAX_LINES` that changed most."""
    compared = [each for each in found if each.times is not None]
    largest = {id(each) for each in sorted(compared, key=_change, reverse=True)[:MAX_LINES]}
    shown = [each for each in compared if id(each) in largest]
    labels = labels_of([each.record for each in compared])
    lines = [_line(each, labels) for each in shown]
    cut = f", the {len(shown)} largest changes of {len(compared)}" if len(compared) > len(shown) else ""
    for engine in dict.fromkeys(map(_engine, shown)):
        own = [line for line, each in zip(lines, shown, strict=True) if _engine(each) == engine]
        kinds = {line.kind for line in own}
        yield Rows(
            file_name(f"changes-since-{before.name}-{engine}"),
            f"Times as fast as before: {engine}{cut}\n{after.name} against {before.name}",
            "after / before [95 %]; above 1 is faster",
            tuple(own),
            reference_label="unchanged",
            x_min=min(1.0, *(line.low for line in lines)),
            x_max=max(1.0, *(line.high for line in lines)),
            digits=3,
            keys=tuple((kind, verdict) for verdict, kind in KINDS.items() if kind in kinds),
        )


def _change(found: Difference) -> float:
    return abs(math.log(found.times.estimate)) if found.times else 0.0


def _engine(found: Difference) -> str:
    return "step costs" if found.record["axis"] is not None else str(found.record["engine"])


def _line(found: Difference, labels: Sequence[str]) -> Line:
    times, record = found.times, found.record
    assert times
    low, high = (times.estimate if end is None else end for end in (times.low, times.high))
    names = labels if record["axis"] is None else ("axis", "size")
    label = " ".join(text(record, name) for name in names if name != "engine")
    return Line(label, times.estimate, low, high, KINDS[found.verdict])
