"""The table at the end of a run: what was measured, in at most 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby

from bench.analysis.best_gamma import Record, best_gammas
from bench.analysis.engine_ratios import leads
from bench.report.format import best_gamma, interval, lead, number, percent

WIDTHS = (12, 14, 5, 6, 7, 8, 6, 17, 9, 20, 5)
PARTS = ("truncation", "bookkeeping", "prefill", "averaging")
PART_WIDTHS = (14, 14, 5, 9, 10, 11, 8, 9, 8)
ENERGY_WIDTHS = (12, 14, 5, 9, 9, 10, 9, 7, 11, 11, 9)


def render(records: Sequence[Record]) -> list[str]:
    """The lines of the table: a block for each pair, workload, batch size and so on, a line for each cell."""
    lines: list[str] = []
    for title, group in groupby(records, _title):
        block = list(group)
        lines += [
            *textwrap.wrap(title, 118),
            _line(_header(records[0])),
            *[_line(_row(record)) for record in block],
            "",
        ]
        lines += [*_published(block), *_attributions(block), *_energies(block), *_best_gammas(block)]
        lines += [*_qualities(block), *_leads(block)]
    return lines + _notes(records)


def _attributions(block: Sequence[Record]) -> list[str]:
    """How each predicted speed-up becomes the measured one; nothing where nothing was predicted."""
    rows = [_attribution(record) for record in block if record.get("speedup_from_averaging") is not None]
    header = ["from predicted", "to measured", "gamma", "predicted", *PARTS, "measured"]
    return [_line(row, PART_WIDTHS) for row in (header, *rows)] + [""] if rows else []


def _attribution(record: Record) -> list[str]:
    parts = [f"{record[f'speedup_from_{part}']:+z.3f}" for part in PARTS]
    ends = [f"{record[name]:.3f}" for name in ("predicted_speedup", "speedup")]
    return [record["engine"], record["method"], str(record["gamma"]), ends[0], *parts, ends[1]]


def _published(block: Sequence[Record]) -> list[str]:
    """What others measured with the same pair and method."""
    found = {record["method"]: record for record in block if record.get("published_source")}
    lines = [line for record in found.values() for line in textwrap.wrap(_publication(record), 118)]
    return [*lines, ""] if lines else []


def _publication(record: Record) -> str:
    speedup, length = record["published_speedup"], record["published_mean_acceptance_length"]
    facts = [
        *([f"speed-up {speedup:g}"] if speedup else []),
        *([f"{percent(record['published_acceptance_rate'])} accepted"] if record["published_acceptance_rate"] else []),
        *([f"length {length:g}"] if length else []),
    ]
    where = f"{record['published_setting']} ({record['published_source']})"
    return f"published with {record['method']}: {', '.join(facts)}; {where}"


def _energies(block: Sequence[Record]) -> list[str]:
    """What each cell took in energy, power and memory; nothing where none of it was measured."""
    rows = [_energy(record) for record in block if record.get("energy_j") is not None]
    header = ["energy of", "method", "gamma", "J", "J/token", "J/accepted", "W", "peak W", "utilisation", "peak memory"]
    return [_line(row, ENERGY_WIDTHS) for row in ([*header, "peak C"], *rows)] + [""] if rows else []


def _energy(record: Record) -> list[str]:
    peak_memory = record["peak_memory_bytes"]
    return [
        record["engine"],
        record["method"],
        str(record["gamma"]),
        number(record["energy_j"], 1),
        number(record["energy_per_token_j"], 3),
        number(record["energy_per_accepted_token_j"], 3),
        number(record["average_power_w"], 1),
        number(record["peak_power_w"], 1),
        percent(record["average_utilisation_rate"]),
        "-" if peak_memory is None else f"{peak_memory / 1e9:.1f} GB",
        number(record["peak_temperature_c"], 0),
    ]


def _best_gammas(block: Sequence[Record]) -> list[str]:
    lines = [best_gamma(best) for best in best_gammas(block)]
    return [*lines, ""] if lines else []


def _leads(block: Sequence[Record]) -> list[str]:
    lines = [lead(found) for found in leads(block)]
    return [*lines, ""] if lines else []


def _qualities(block: Sequence[Record]) -> list[str]:
    lines = [_quality(record) for record in block if record.get("quality") is not None]
    return [*lines, ""] if lines else []


def _quality(record: Record) -> str:
    said = (
        f"{record['engine']} {record['method']} {record['gamma']}: {record['quality_metric']} {record['quality']:.3f}"
    )
    if record["quality_difference"] is None:
        return said
    low, high = record["quality_difference_low"], record["quality_difference_high"]
    interval = f" [{low:+.3f}, {high:+.3f}]" if low is not None else ""
    difference = f"difference {record['quality_difference']:+.3f}{interval}"
    return f"{said}, of autoregressive decoding {record['quality_baseline']:.3f}, {difference}"


def _title(record: Record) -> str:
    sampling = "greedy" if record["temperature"] == 0 else f"temperature {record['temperature']:g}"
    workload = record["workload"] + (" as raw text" if record.get("prompt_format") == "raw" else "")
    return (
        f"{record['pair']}, {record['dtype']} on {record['device']}, {workload}, "
        f"{record['num_prompts']} prompts of up to {record['max_tokens']} tokens, "
        f"batch size {record['batch_size']}, {sampling}{_special(record)}{_caution(record)}"
    )


def _special(record: Record) -> str:
    """How the weights are stored and placed, if otherwise than usual."""
    placement, quantisation = record.get("placement", "same"), record.get("quantisation", "none")
    placed = f", placed {placement}" if placement != "same" else ""
    return placed + (f", {quantisation}" if quantisation != "none" else "")


def _caution(record: Record) -> str:
    """What keeps a block's outputs from being a model's."""
    reasons = [
        *(["random weights"] if record.get("load_format") == "dummy" else []),
        *(["prescribed acceptance"] if record.get("synthetic_acceptance_rates") else []),
    ]
    return f" ({', '.join(reasons)}: times only)" if reasons else ""


def _header(record: Record) -> list[str]:
    return [
        "engine",
        "method",
        "gamma",
        "tok/s",
        "latency",
        "accepted",
        "length",
        "speed-up",
        "predicted",
        f"{record['reference_engine']} is faster"[:20],
        "equal",
    ]


def _row(record: Record) -> list[str]:
    return [
        record["engine"],
        record["method"],
        str(record["gamma"]),
        number(record["throughput_tok_s"], 1),
        number(record["latency_s"], 3),
        percent(record["acceptance_rate"]),
        number(record["mean_acceptance_length"], 2),
        interval(record, "speedup"),
        number(record["predicted_speedup"], 2),
        interval(record, "speedup_of_reference"),
        _equal(record),
    ]


def _line(cells: Sequence[str], widths: Sequence[int] = WIDTHS) -> str:
    columns = [f"{cell:<{width}}" for cell, width in zip(cells[:2], widths[:2], strict=True)]
    columns += [f"{cell:>{width}}" for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return " ".join(columns).rstrip()


def _equal(record: Record) -> str:
    equal = record["num_outputs_equal"]
    equal = record["num_outputs_equal_reference"] if equal is None else equal
    return "-" if equal is None else f"{equal}/{record['num_prompts']}"


def _notes(records: Sequence[Record]) -> list[str]:
    """How to read the columns, and what goes for all of them."""
    reference = records[0]["reference_engine"]
    num_rounds = min(-(-record["num_prompts"] // record["batch_size"]) for record in records)
    caution = ": few, so they are somewhat too narrow" if num_rounds < 10 else ""
    sentences = [
        "latency: seconds per prompt. accepted: of the tokens drafted. length: tokens per target call. speed-up: over "
        "the same engine's autoregressive decoding. predicted: from acceptance and phase times. "
        f"{reference} is faster: over this engine with the same method and gamma. Speed-ups are geometric means over "
        f"prompts decoded side by side, with 95 % bootstrap intervals ({num_rounds} rounds{caution}). equal: outputs "
        f"the same as autoregressive decoding's, or for that as {reference}'s; in 16 bits a near tie may fall either "
        "way."
    ]
    if margins := [each for record in records for each in record.get("margin_at_difference") or [] if each is not None]:
        sentences.append(
            f"Where outputs part the two likeliest tokens' logits are {min(margins):.3f} to {max(margins):.3f} apart."
        )
    if overheads := [100 * rate for record in records if (rate := record["overhead_rate"]) is not None]:
        sentences.append(f"Outside model forwards: {min(overheads):.1f} to {max(overheads):.1f} % of the time.")
    if any(record.get("energy_j") is not None for record in records):
        sentences.append(
            "Energy: of the whole device while the prompts were decoded, GPUs or else processor packages, idle power "
            "included."
        )
    if recording_s := sum(record.get("recording_time_s") or 0 for record in records):
        sentences.append(f"Of the time measured {recording_s:.1f} s went into recording shapes.")
    for reason in dict.fromkeys(record.get("quality_reason") for record in records):
        sentences += [f"Quality is not known: {reason}."] if reason else []
    for workload, rows in dict.fromkeys((record["workload"], record.get("num_rows_skipped")) for record in records):
        sentences += [f"Malformed rows of {workload} that were skipped: {rows}."] if rows else []
    for workload, rows in dict.fromkeys((record["workload"], record.get("num_rows_passed_over")) for record in records):
        sentences += [f"Rows of {workload} that hold no prompt: {rows}."] if rows else []
    if any(record.get("speedup_from_averaging") is not None for record in records):
        sentences.append(
            "From predicted to measured, each counted in both arms: tokens cut behind a stop token, bookkeeping, "
            "prompts and the first token; averaging is the rest: geometric means over prompts against ratios of total "
            "times. Predicted best gamma: from acceptance by position and from costs of steps at the gammas measured."
        )
    return textwrap.wrap(" ".join(sentences), 118)
