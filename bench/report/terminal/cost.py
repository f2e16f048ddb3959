"""The cost sweep as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.records import phases


def lines(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The tables of the cost cells: times by size, with what is reached of the roofline, and shares of a step."""
    steps = [record for record in records if record["axis"] in phases.SWEEPS]
    sizes = [record for record in records if record["axis"] not in phases.SWEEPS]
    if sizes:
        yield (
            f"memory is read at {sizes[0]['read_bandwidth'] / 1e9:.1f} GB/s; of roofline: time to read a block as "
            "large as weights and cache, over the time measured"
        )
        yield f"{'axis':14}{'size':>8}{'ms':>10}{'us/token':>10}{'of roofline':>13}"
        yield from map(_line, sizes)
        yield from _worth_of_trees(sizes)
    if steps:
        yield f"{'a decode step':16}{'':10}{'rows':>5}{'ms':>9}" + "".join(f"{phase:>14}" for phase in phases.PHASES)
        yield from map(_line_of_shares, steps)


def _worth_of_trees(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Where trees pay, by their costs and by how often the draft's nodes were accepted where that was measured."""
    trees = [record for record in records if record["axis"] == "tree"]
    plain = next((record for record in records if (record["axis"], record["size"]) == ("width", 1)), None)
    if not trees or not plain:
        return
    speedups = [each["expected_tokens"] * plain["median_s"] / each["median_s"] for each in trees]
    best = max(zip(speedups, trees, strict=True), key=lambda pair: pair[0])
    paying = [each["size"] for speedup, each in zip(speedups, trees, strict=True) if speedup > 1]
    yield (
        f"trees expect {best[0]:.2f} times the tokens per second of plain decoding with {best[1]['size']} nodes in "
        f"{best[1]['depth']} levels; "
        + (f"the largest measured that pays has {max(paying)}" if paying else "none measured pays")
    )


def _line(record: dict[str, Any]) -> str:
    share = record["roofline_share"]
    return (
        f"{record['axis']:14}{record['size']:>8}{1e3 * record['median_s']:>10.3f}"
        f"{1e6 * record['median_s'] / record['tokens']:>10.1f}{'-' if share is None else f'{share:.0%}':>13}"
    )


def _line_of_shares(record: dict[str, Any]) -> str:
    distribution = "greedy" if record["temperature"] == 0 else f"at {record['temperature']:g}"
    shares = "".join(f"{record[f'{phase}_share']:>14.1%}" for phase in phases.PHASES)
    return f"{record['method']:16}{distribution:10}{record['size']:>5}{1e3 * record['step_s']:>9.2f}{shares}"
