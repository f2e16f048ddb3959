"""Load cells as text: how each method fares at each rate, up to which rate it pays, and up to which the limits hold."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from bench.analysis.break_even import highest_rate, pays, ratios, stops_paying
from bench.records.schema import PERCENTILES

Record = dict[str, Any]
COLUMNS = (
    "rate",
    "method",
    "gamma",
    "done",
    "good/s",
    "tok/s",
    "there",
    "first token",
    "gap in ms",
    "latency",
    "plain/",
)
WIDTHS = (5, 14, 5, 9, 6, 6, 5, 20, 14, 20, 6)
BLOCK = ("engine", "pair", "dtype", "device", "workload", "batch_size", "placement")


def lines(records: Sequence[Record]) -> list[str]:
    """The lines of the table: a block for each engine, pair, workload and batch size."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.get(name) for name in BLOCK), []).append(record)
    return [line for block in found.values() for line in _block(block)] + _notes(records)


def arms(block: Sequence[Record]) -> dict[tuple[str, Any], list[Record]]:
    """Records of a block by method and gamma, those of plain decoding first."""
    found: dict[tuple[str, Any], list[Record]] = {}
    for record in sorted(block, key=lambda record: record["method"] != "autoregressive"):
        found.setdefault((record["method"], record["gamma"]), []).append(record)
    return found


def _block(block: Sequence[Record]) -> Iterator[str]:
    by_arm = arms(block)
    plain = by_arm.get(("autoregressive", 0), [])
    curves = {arm: ratios(plain, found) for arm, found in by_arm.items()}
    yield from textwrap.wrap(_title(block[0]), 118)
    yield _line(COLUMNS)
    for record in sorted(block, key=lambda record: record["rate"]):
        ratio = curves[record["method"], record["gamma"]].get(record["rate"])
        yield _line(_row(record, ratio if record["method"] != "autoregressive" else None))
    yield ""
    for line in verdicts(block):
        yield from textwrap.wrap(line, 118)
    yield ""


def _title(record: Record) -> str:
    sampling = "greedy" if record["temperature"] == 0 else f"temperature {record['temperature']:g}"
    return (
        f"{record['engine']}, {record['pair']}, {record['dtype']} on {record['device']}, {record['workload']}, up to "
        f"{record['max_tokens']} tokens, {record['arrivals']} arrivals for {record['duration_s']:g} s, at most "
        f"{record['batch_size']} together, {sampling}"
    )


def _row(record: Record, ratio: float | None) -> list[str]:
    return [
        f"{record['rate']:g}",
        record["method"],
        str(record["gamma"]),
        f"{record['num_finished']}/{record['num_requests']}",
        f"{record['goodput']:.2f}",
        f"{record['throughput_tok_s']:.1f}",
        f"{record['mean_num_in_flight']:.1f}",
        _percentiles(record, "ttft", 1, 3),
        _percentiles(record, "inter_token", 1000, 0),
        _percentiles(record, "latency", 1, 3),
        "-" if ratio is None else f"{ratio:.2f}",
    ]


def _percentiles(record: Record, name: str, scale: float, digits: int) -> str:
    values = [record[f"{name}_p{percent}_s"] for percent in PERCENTILES]
    return " ".join("-" if value is None else f"{scale * value:.{digits}f}" for value in values)


def verdicts(block: Sequence[Record]) -> Iterator[str]:
    """A sentence for each method and gamma of a block."""
    by_arm = arms(block)
    plain = by_arm.get(("autoregressive", 0), [])
    return (_verdict(arm, found, pays(plain, found)) for arm, found in by_arm.items())


def _verdict(arm: tuple[str, Any], found: Sequence[Record], paid: dict[float, bool | None]) -> str:
    """Up to which rate an arm pays, and keeps the limits."""
    method, gamma = arm
    name = "plain decoding" if method == "autoregressive" else f"{method} {gamma}"
    rates = {percent: highest_rate(found, percent) for percent in PERCENTILES}
    kept = ", ".join(
        f"{percent} % up to {'no rate' if rate is None else f'{rate:g}'}" for percent, rate in rates.items()
    )
    limits = f"{name}: limits kept by {kept}"
    return limits if method == "autoregressive" or not paid else f"{limits}; {_said(*stops_paying(paid))}"


def _said(last: float | None, first: float | None) -> str:
    """last, first: the last rate at which a method pays, and the first at which it does not."""
    if first is not None:
        return f"does not pay at {first:g} requests/s{'' if last is None else f', does at {last:g}'}"
    return "whether it pays cannot be told" if last is None else f"pays at every rate up to {last:g} requests/s"


def _notes(records: Sequence[Record]) -> list[str]:
    first = records[0]
    text = (
        "Requests arrive whether or not earlier ones are done; all times count from the arrival, in seconds if not "
        "said otherwise, at 50, 95 and 99 % of all requests; unfinished ones count as slower than any other (-). done: "
        f"finished within {first['drain_s']:g} s after the last arrivals. good/s: requests per second with a first "
        f"token within {first['ttft_limit_s']:g} s and {first['inter_token_limit_s']:g} s from token to token. there: "
        "requests that wait or are decoded, on the average. plain/: median latency of plain decoding over the method's "
        "at the same arrivals; above 1 the method pays. A rate is one run in which requests wait for each other: no "
        "intervals."
    )
    return textwrap.wrap(text, 118)


def _line(cells: Sequence[str]) -> str:
    columns = [f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)]
    columns[1] = f"{cells[1]:<{WIDTHS[1]}}"
    return " ".join(columns).rstrip()
