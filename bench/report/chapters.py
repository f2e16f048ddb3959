"""The sections of a report on a run: the answer first, then each question with its tables and charts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from bench.analysis.best_gamma import best_gammas
from bench.analysis.break_even import level, speedups
from bench.analysis.engine_ratios import leads
from bench.records import fields
from bench.records.grouping import BLOCK, WITHOUT_ENGINE, drafting, fastest, grouped
from bench.records.intervals import Interval
from bench.records.results import Results
from bench.records.schema import LEVELS, Record
from bench.report import acceptance, summary
from bench.report.charts import run as charts
from bench.report.charts.model import Picture
from bench.report.charts.names import distribution
from bench.report.columns import heading, labels_of, shown, text
from bench.report.document import Chapter, Command, Document, Facts, Heading, Section, Table, section, table
from bench.report.format import cell_name, interval
from bench.report.sentences import load_verdicts, overheads, tree_gain


def chapter(run: Results, name: str) -> Chapter:
    """A run. name: for links."""
    pictures = charts.sections(run.pictured)
    sections = [
        *section("short", "Summary", *summary.cautions(run), *overheads(run.cells), _fastest(run.cells)),
        *_speedups(run, pictures["speedup"]),
        *section("acceptance", "Acceptance", *_explained(_ACCEPTANCE, pictures["acceptance"]), *acceptance.parts(run)),
        *_times(run, pictures["time"]),
        *section("throughput", "Throughput vs. latency", *_explained(_THROUGHPUT, pictures["throughput"])),
        *_loads(run, pictures["load"]),
        *_energies(run, pictures["energy"]),
        *_qualities(run),
        *_certificates(run),
        *_published(run),
        *_costs(run, pictures["cost"]),
        *section("cells", "All cells", *_cells(run)),
        *section("machine", "Environment and command", *_machine(run)),
    ]
    about = (*_subject(run.cells or run.loads), run.described())
    return Chapter(name, run.name, tuple(filter(None, about)), tuple(summary.cards(run)), tuple(sections))


def _subject(records: Sequence[Record]) -> Iterator[str]:
    """A sentence on the decoded workload."""
    if not records:
        return
    subject = {name: ", ".join(dict.fromkeys(str(record[name]) for record in records)) for name in _SUBJECT}
    special = [subject[name] for name in ("placement", "quantisation") if subject[name] != fields.field(name).default]
    raw = " as raw text" if subject["prompt_format"] == "raw" else ""
    prompts, tokens = _range(records, "num_prompts"), _range(records, "max_tokens")
    yield (
        f"{', '.join([subject['pair'], subject['dtype'], *special])} on {subject['device']}; "
        f"{subject['workload']}{raw}, "
        f"{prompts or 'some'} prompts of up to {tokens or 'some'} tokens, batch size {subject['batch_size']}, "
        f"{', '.join(dict.fromkeys(map(distribution, records)))}; decoded by {subject['engine']}"
    )


_SUBJECT = ("pair", "dtype", "placement", "quantisation", "device", "workload", "prompt_format", "batch_size", "engine")


def _range(records: Sequence[Record], name: str) -> str:
    """The smallest and the largest value of a field; "" if unknown."""
    values = [record[name] for record in records if record[name]]
    return " to ".join(dict.fromkeys([str(min(values)), str(max(values))])) if values else ""


_ACCEPTANCE = (
    "Acceptance rate is the share of drafted tokens that are accepted, with 95 % intervals over prompts. "
    "System efficiency is the number of emitted tokens over the number a perfect draft would emit. Acceptance by "
    "position is the share of steps that accept the token at that position, for each method's longest fixed draft. "
    "Acceptance length over the text is the mean number of tokens per step, by the position at which steps begin."
)
_THROUGHPUT = "One point per cell; up and to the left is better. Point at one to see its gamma and batch size."


def _explained(sentence: str, pictures: Sequence[Picture]) -> list[Any]:
    """Charts below a sentence about them, if there are any."""
    return [sentence, *pictures] if pictures else []


def _fastest(cells: Sequence[Record]) -> Table:
    """The fastest cell of each engine."""
    groups = grouped(drafting(cells), *BLOCK).values()
    best = [max(group, key=lambda cell: cell["speedup"]) for group in groups]
    return shown(best, "fastest", "The fastest method of each engine")


def _speedups(run: Results, pictures: Sequence[Any]) -> list[Section]:
    predicted = [cell for cell in run.cells if cell["predicted_speedup"] is not None]
    return section(
        "speedup",
        "Speed-up",
        *_explained(_SPEEDUP, pictures),
        _leads(run.cells),
        _best_gammas(run.cells),
        shown(predicted, "parts", "From predicted to measured speed-up: what each effect adds"),
    )


_SPEEDUP = (
    "Time per token of plain decoding over that of the method, for the same prompts decoded in turns by the same "
    "engine: geometric mean over prompts with a 95 % interval. Below 1 the method is slower. Predictions "
    "follow from the acceptance rate and the time of each phase, and exclude prefill."
)


def _leads(cells: Sequence[Record]) -> Table:
    """Engines against each other, each at its best."""
    blocks = grouped(cells, *WITHOUT_ENGINE)
    varying = labels_of(cells)[:-3] if cells else []
    rows = [
        (
            *(text(block[0], name) for name in varying),
            cell_name(each.record),
            cell_name(each.other),
            interval(each.times),
        )
        for block in blocks.values()
        for each in leads(block)
    ]
    headings: list[Heading | str] = [Heading(heading(name), name) for name in varying]
    headings += ["engine", "against", "times as fast [95 %]"]
    return table(headings, rows, "Engines against each other", len(varying) + 2)


def _best_gammas(cells: Sequence[Record]) -> Table:
    """The best number of draft tokens: predicted from costs and acceptance, and measured."""
    varying = labels_of(cells)[:-1] if cells else []
    rows = [
        (
            *(text(best.measured, name) for name in varying),
            str(best.predicted_gamma),
            f"{best.predicted[best.predicted_gamma]:.2f}",
            ", ".join(str(each["gamma"]) for each in best.records),
            str(best.measured["gamma"]),
            text(best.measured, "speedup"),
        )
        for best in best_gammas(cells)
    ]
    headings: list[Heading | str] = [Heading(heading(name), name) for name in varying]
    headings += ["predicted best", "its speed-up", "measured", "measured best"]
    headings += [Heading(heading("speedup"), "speedup")]
    return table(headings, rows, "Best gamma", len(varying))


def _times(run: Results, pictures: Sequence[Picture]) -> list[Section]:
    reporting = {cell["engine"] for cell in run.cells if cell["scoring_time_s"] is not None}
    silent = [engine for engine in dict.fromkeys(cell["engine"] for cell in run.cells) if engine not in reporting]
    missing = f" Phase times are not available for {' and '.join(silent)}." if silent else ""
    times = shown(run.cells, "details", "Times of every cell")
    return section("time", "Time per phase", *_explained(_TIME + missing, pictures), times)


_TIME = (
    "A step drafts tokens, scores them with the target model, and verifies them: it accepts or rejects, and samples "
    "the recovered or bonus token. Scoring and verification are shown per emitted token, so fewer steps mean less "
    "time. These are absolute times of cells that ran one after the other, so they also reflect changes in machine "
    "load; speed-ups do not."
)


def _loads(run: Results, pictures: Sequence[Picture]) -> list[Section]:
    if not run.loads:
        return []
    loops = [[record for record in run.loads if record[name] is not None] for name in LEVELS]
    open_loop, closed_loop = loops
    varying = [name for name in BLOCK if len({record[name] for record in run.loads}) > 1]
    verdicts = [
        f"{' '.join([*(text(block[0], name) for name in varying), line])}."
        for loop in loops
        for block in grouped(loop, *BLOCK).values()
        for line in load_verdicts(block)
    ]
    return section(
        "load",
        "Under load",
        _load_sentence(run.loads[0], open_loop, closed_loop),
        *pictures,
        _load_table(open_loop, "rate", "By arrival rate"),
        _load_table(closed_loop, "concurrency", "By number of clients"),
        *verdicts,
    )


def _load_sentence(first: Record, open_loop: Sequence[Record], closed_loop: Sequence[Record]) -> str:
    """How requests arrived, and what the numbers are of."""
    parts = []
    if open_loop:
        parts.append(
            f"Requests arrive for {first['duration_s']:g} s ({open_loop[0]['arrivals']} arrivals), whether or not "
            f"earlier ones are finished, and may finish up to {first['drain_s']:g} s later."
        )
    if closed_loop:
        parts.append(
            "Clients of a closed loop each send the next request "
            f"{closed_loop[0]['think_time_s'] or 0:g} s after the answer to the one before, for "
            f"{first['duration_s']:g} s: a server that stalls gets fewer requests, so these latencies cannot be "
            "compared with those at a rate."
        )
    parts.append(
        "All times count from the arrival. A request is good if its first token comes within "
        f"{first['ttft_limit_s']:g} s and the others within {first['inter_token_limit_s']:g} s each. A method pays "
        "where the ratio of plain decoding's median latency to its own is above 1."
    )
    if first["window_start_s"] is not None:
        parts.append(
            f"Numbers are of the time from {first['window_start_s']:g} to {first['window_end_s']:g} s. Requests wait "
            "for each other, so intervals are over ten consecutive parts of it; where an engine is saturated, which "
            "means that latency surely grows by more than 2 % of the time, nothing is steady and ratios have none."
        )
    else:
        parts.append("Requests wait for each other: each rate is one observation without an interval.")
    return " ".join(parts)


def _load_table(loads: Sequence[Record], name: str, caption: str) -> Table:
    """The table of load cells by level, with the ratio of plain decoding's median latency to each method's."""
    labels = [name, *(label for label in labels_of(loads) if label not in LEVELS)] if loads else []
    found: dict[int, Interval | None] = {}
    for block in grouped(loads, *BLOCK).values():
        arms = grouped(block, "method", "gamma")
        plain = arms.pop(("autoregressive", 0), [])
        for arm in arms.values():
            by_level = speedups(plain, arm)
            found |= {id(record): by_level.get(level(record)) for record in arm}
    ordered = sorted(loads, key=level)
    cells = ["-" if (ratio := found.get(id(record))) is None else interval(ratio) for record in ordered]
    shown_loads = shown(ordered, "load", caption, labels)
    return _with_column(shown_loads, "plain latency ratio", cells) if loads else shown_loads


def _with_column(table: Table, heading: str, cells: Sequence[str]) -> Table:
    """A table with a column after its labels that is not a field of its records."""
    place = table.num_labels
    headings = (*table.headings[:place], Heading(heading), *table.headings[place:])
    rows = [(*row[:place], cell, *row[place:]) for row, cell in zip(table.rows, cells, strict=True)]
    return replace(table, headings=headings, rows=tuple(rows))


def _energies(run: Results, pictures: Sequence[Any]) -> list[Section]:
    known = [cell for cell in run.cells if cell["energy_j"] is not None]
    unknown = [cell for cell in run.cells if cell["energy_j"] is None]
    reasons = _reasons(unknown, "energy_reason", "Energy was not measured", "the file does not say why")
    about = (
        "Energy of the whole device while the prompts were decoded, idle power included: of the GPUs or, without any, "
        "of the CPU packages."
        if known
        else ""
    )
    measured = shown(known, "energy", "Energy, power and memory")
    return section("energy", "Energy", about, *reasons, *pictures, measured)


def _reasons(cells: Sequence[Record], name: str, what: str, unknown: str) -> list[str]:
    """Why a value is missing, and in how many cells."""
    counts: dict[str, int] = {}
    for cell in cells:
        reason = cell[name] or ""
        counts[reason] = counts.get(reason, 0) + 1
    cells_of = {reason: f" in {count} cells" if len(counts) > 1 else "" for reason, count in counts.items()}
    return [f"{what}{cells_of[each]}: {each or unknown}." for each in counts]


def _qualities(run: Results) -> list[Section]:
    known = [cell for cell in run.cells if cell["quality"] is not None]
    unknown = [cell for cell in run.cells if cell["quality"] is None and cell["quality_reason"]]
    reasons = _reasons(unknown, "quality_reason", "Outputs were not scored", "")
    scores = shown(known, "quality", "The workload's own metric on the same prompts, with and without speculation")
    return section("quality", "Quality", *reasons, scores)


def _certificates(run: Results) -> list[Section]:
    if not run.certificates:
        return []
    audits = shown(run.certificates, "audits", "Audits")
    explanations = [
        f"{record.get('engine')} {record.get('method')} {record.get('gamma')}: {'; '.join(map(str, reasons))}."
        for record in run.certificates
        if (reasons := record.get("reasons")) and record["verdict"] != "lossless"
    ]
    return section("certificates", "Losslessness audits", _AUDITS, audits, *explanations)


_AUDITS = (
    "Each audit tests the emitted tokens against the target's exact distribution. Lossy: they deviate, and the "
    "engine's plain decoding does not deviate likewise. Inconclusive: the reason below says what a verdict would need."
)


def _published(run: Results) -> list[Section]:
    cells = [cell for cell in fastest(run.cells) if cell["published_source"]]
    if not cells:
        return []
    sentence = "Published for the same models and method, on other machines and prompts."
    return section(
        "published", "Published results", sentence, shown(cells, "published", "This run and published results")
    )


def _costs(run: Results, pictures: Sequence[Picture]) -> list[Section]:
    sizes = [record for record in run.costs if record["step_s"] is None]
    steps = [record for record in run.costs if record["step_s"] is not None]
    bandwidth = next((record["read_bandwidth"] for record in sizes if record["read_bandwidth"]), None)
    roofline = [_ROOFLINE.format(bandwidth / 1e9)] if bandwidth else []
    per_token = [f"{1e6 * record['median_s'] / record['tokens']:.1f}" for record in sizes]
    return section(
        "cost",
        "Step costs",
        *roofline,
        *pictures,
        tree_gain(sizes),
        _with_column(shown(sizes, "sizes", "Time by size", ["axis", "size"]), "µs per token", per_token),
        shown(steps, "steps", "Phases of a decode step; size is the batch size", ["method", "temperature", "size"]),
    )


_ROOFLINE = (
    "Measured memory read bandwidth is {:.1f} GB/s; the roofline is the time it takes to read the weights and the KV "
    "cache once at that rate."
)


def _cells(run: Results) -> Iterator[Table]:
    yield replace(shown(run.cells, "cells", "Every cell; --csv has all fields"), sortable=True)


def _machine(run: Results) -> Iterator[Any]:
    machine = run.machine
    facts = {
        "date": run.date[:19].replace("T", " ") + (" UTC" if run.date.endswith("+00:00") else ""),
        "processor": machine.get("cpu_model"),
        "cores": machine.get("cpu_count"),
        "threads": machine.get("torch_num_threads"),
        "GPUs": ", ".join(map(str, machine.get("gpus") or ())) or "none",
        "CUDA": machine.get("cuda"),
        "driver": machine.get("driver"),
        "system": " ".join(str(machine[name]) for name in ("system", "machine") if machine.get(name)),
        "Python": machine.get("python_version"),
        **(machine.get("versions") or {}),
        "commit": run.commit,
        **_options(run),
    }
    yield Facts(tuple((name, str(value)) for name, value in facts.items() if value not in (None, "")))
    if run.command:
        yield "Command:"
        yield Command(run.command)
    else:
        yield "The file does not record the command that produced it; newer versions do."


def _options(run: Results) -> dict[str, Any]:
    """Options that are the same in all cells."""
    names = ("dtype", "device", "quantisation", "verification", "max_tokens", "temperature", "top_p", "top_k", "seed")
    records = run.cells or run.costs
    common = {name: {str(record[name]) for record in records} for name in names if records}
    return {heading(name): values.pop() for name, values in common.items() if len(values) == 1 and values != {"None"}}


def glossary(records: Iterable[Record]) -> Table:
    """A sentence for each field of the records, with the heading that tables show it under."""
    names = fields.ordered(name for record in records for name in fields.scalars(record))
    rows = [
        (heading(name), name, fields.field(name).unit or "-", fields.field(name).meaning)
        for name in names
        if any(record.get(name) is not None for record in records)
    ]
    return table(["heading", "field", "unit", "meaning"], rows)


def document(runs: Sequence[Results], compared: Sequence[Chapter] = ()) -> Document:
    """The report on all runs. compared: chapters on the changes between them, which come first."""
    records = [record for run in runs for record in run.records]
    chapters = [chapter(run, f"run{index}") for index, run in enumerate(runs, 1)]
    return Document("Speculative decoding benchmark", (*compared, *chapters), glossary(records))
