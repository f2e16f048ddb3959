"""The result of a comparison: a record for JSON, and a table of it in Markdown for terminals and pages."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
VERDICTS = ("bit-equal", "rounding", "bug")  # from best to worst
OUTPUT_TOKENS = 128  # length of an output in the summary
_HEAD = (
    *("arrangement", "verdict", "positions that differ", "first difference", "largest gap"),
    *("error (rounding)", "in float32", "flips seen", "chance of a flip"),
)


def worst(verdicts: Sequence[str]) -> str:
    """The verdict on all arrangements."""
    return max(verdicts, key=VERDICTS.index)


def meets(verdict: str, required: str) -> bool:
    """Whether a verdict is at least as good as the required one."""
    return VERDICTS.index(verdict) <= VERDICTS.index(required)


def table(record: Record) -> str:
    """All arrangements, plain decoding first, in Markdown."""
    rows = [_HEAD, *(_row(each) for each in record["arrangements"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    ruler = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{ruler}|", *(f"| {line} |" for line in lines[1:])])


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    first, flips = row["first"], row["flips"]
    wide = row["in_float32"]
    return (
        row["name"],
        row["verdict"],
        f"{row['num_differing']} of {row['num_positions']}",
        f"text {first['text']}, token {first['position']}, logit {first['token']}" if first else "none",
        _number(row["max_gap"]),
        _error(row),
        _error(wide) if wide else "not run",
        f"{flips['num_flips']} of {flips['num_positions']}",
        f"{flips['rate']:.2g} ({flips['low']:.2g} to {flips['high']:.2g})",
    )


def _error(row: Mapping[str, Any]) -> str:
    """The error, and up to which it is rounding."""
    return f"{_number(row['max_error'])} (≤ {_number(row['allowed'])})"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"


def markdown(record: Record) -> str:
    """What was compared, all arrangements, and what the verdict means for greedy outputs."""
    sizes = f"{record['num_texts']} texts of {record['prompt_tokens']} prompt tokens and {record['num_tokens']} more"
    title = f"**{record['target']}, {record['implementation']}, {record['dtype']}**: {sizes} ({record['prompts']})."
    margins = ", ".join(f"{float(share):.0%} below {value:.3g}" for share, value in record["margins"].items())
    verdict = f"Verdict: **{record['verdict']}**. {_meaning(record)}. Margins of the top two logits: {margins}."
    return "\n\n".join([title, table(record), verdict])


def _meaning(record: Record) -> str:
    if record["verdict"] == "bug":
        wrong = [row["name"] for row in record["arrangements"] if row["verdict"] == "bug"]
        return f"The error of {', '.join(wrong)} is beyond rounding: outputs of these are wrong"
    if record["verdict"] == "bit-equal":
        return "Greedy outputs are the same whatever is computed beside a token"
    row = max(record["arrangements"], key=lambda row: float(row["flips"]["rate"]))
    rates = (row["flips"][name] for name in ("rate", "low", "high"))
    rate, low, high = (1 - (1 - each) ** OUTPUT_TOKENS for each in rates)
    return (
        f"Greedy outputs of {OUTPUT_TOKENS} tokens differ from plain decoding with a chance of {rate:.1%} "
        f"({low:.1%} to {high:.1%}) by rounding, most often with {row['name']}"
    )


def write_json(record: Record, path: Path) -> None:
    """Write a record. A number that is not finite, of a logit that is NaN, becomes null, as JSON has none."""
    path.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
