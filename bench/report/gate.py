"""The verdict for continuous integration, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.analysis.regressions import Judged, judged
from bench.analysis.run_diff import differences
from bench.records.results import Results
from bench.report.format import cell_name, interval


def slower(runs: Sequence[Results], false_alarm_rate: float, tolerance: float) -> tuple[bool, list[str]]:
    """Whether the later of two runs is slower in any cell, and why.

    Raises ValueError for another number of runs, and if no cell can be judged.
    """
    if len(runs) != 2:
        raise ValueError(f"fail_on=slower must have two runs, the earlier and the later, but has {len(runs)}")
    found = differences(*runs)
    cells = judged(found, false_alarm_rate, tolerance)
    return any(each.is_slower for each in cells), list(_lines(cells, len(found), false_alarm_rate, tolerance))


def _lines(cells: Sequence[Judged], num_all: int, false_alarm_rate: float, tolerance: float) -> Iterator[str]:
    slow = [each for each in cells if each.is_slower]
    for each in slow:
        record = each.difference.record
        place = f"{record['pair']}, {record['workload']}, batch size {record['batch_size']}"
        name = cell_name(record)
        if each.of_reference:
            name = f"{record['reference_engine']} autoregressive, beside {name},"
        yield f"slower: {name} on {place}: {interval(each.times, '.3f')} times as fast as before"
    reach = sorted(each.detectable for each in cells)
    yield (
        f"{len(slow)} of {len(cells)} cells are more than {tolerance:.1%} slower; {num_all - len(cells)} others have "
        f"nothing beside them in both runs. Without a change this happens in {false_alarm_rate:.1%} of comparisons. A "
        f"slowdown of {reach[0]:.1%} to {reach[-1]:.1%}, by cell, would have been found with even chances."
    )
