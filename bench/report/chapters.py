"""What is said of a run: the answer first, then each question with its tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.analysis.best_gamma import best_gammas
from bench.analysis.engine_ratios import leads
from bench.records import fields
from bench.records.grouping import BLOCK, WITHOUT_ENGINE, drafting, fastest, grouped
from bench.records.results import Results
from bench.records.schema import Record
from bench.report import summary
from bench.report.charts import cost, decoding
from bench.report.columns import PARTS, heading, labels_of, shown, text
from bench.report.document import Chapter, Command, Document, Facts, Heading, Section, Table, section, table
from bench.report.format import between, cell_name, interval, percent, verdict
from bench.report.terminal import load


def chapter(run: Results, name: str) -> Chapter:
    """A run. name: for links."""
    pictures = cost.sections(run.pictured)
    sections = [
        *section("short", "In short", *summary.cautions(run), _fastest(run.cells)),
        *_speedups(run, pictures["speedup"]),
        *section("acceptance", "How much is accepted", _ACCEPTANCE, *pictures["acceptance"])[
            : bool(pictures["acceptance"])
        ],
        *_times(run, pictures["time"]),
        *section("throughput", "Throughput against latency", *_told(_THROUGHPUT, pictures["throughput"])),
        *_loads(run, pictures["load"]),
        *_energies(run, pictures["energy"]),
        *_qualities(run),
        *_certificates(run),
        *_published(run),
        *_costs(run, pictures["cost"]),
        *section("cells", "All cells", *_cells(run)),
        *section("machine", "How it was measured", *_machine(run)),
    ]
    about = (*_subject(run.cells), run.described())
    return Chapter(name, run.name, about, tuple(summary.cards(run)), tuple(sections))


def _subject(cells: Sequence[Record]) -> Iterator[str]:
    """What was decoded, in a line."""
    if not cells:
        return
    told = {name: list(dict.fromkeys(str(cell[name]) for cell in cells)) for name in ("pair", "workload", "engine")}
    distributions = dict.fromkeys(map(decoding.distribution, cells))
    numbers = sorted({cell["num_prompts"] for cell in cells})
    tokens = sorted({cell["max_tokens"] for cell in cells if cell["max_tokens"]})
    lengths = f" of up to {' or '.join(map(str, tokens))} tokens" if tokens else ""
    yield (
        f"{', '.join(told['pair'])}; {', '.join(told['workload'])}, {' or '.join(map(str, numbers))} prompts{lengths}, "
        f"{', '.join(distributions)}; decoded by {', '.join(told['engine'])}"
    )


_ACCEPTANCE = (
    "Accepted: of the tokens drafted, with 95 % intervals over prompts. Efficiency: of the tokens that a perfect draft "
    "would have emitted. By position: the share of steps in which that place of the draft was kept, for each method's "
    "longest fixed draft."
)
_THROUGHPUT = "Up and to the left is better. One point for each cell; point at it to see which."


def _told(sentence: str, pictures: Sequence[Any]) -> list[Any]:
    """A sentence about pictures, if there are any."""
    return [sentence, *pictures] if pictures else []


_FASTEST = (
    "throughput_tok_s",
    "speedup",
    "predicted_speedup",
    "acceptance_rate",
    "mean_acceptance_length",
    "num_outputs_equal",
)


def _fastest(cells: Sequence[Record]) -> Table:
    """The fastest cell of each engine, beside its plain decoding's block."""
    groups = grouped(drafting(cells), *BLOCK).values()
    best = [max(group, key=lambda cell: cell["speedup"]) for group in groups]
    return shown(best, _FASTEST, "The fastest method of each engine")


def _speedups(run: Results, pictures: Sequence[Any]) -> list[Section]:
    parted = [cell for cell in run.cells if cell["speedup_from_averaging"] is not None]
    names = ("predicted_speedup", *(f"speedup_from_{part}" for part in PARTS), "speedup", "expected_speedup")
    predicted = (
        "Predicted beside measured: what each part adds to the prediction to make the measured speed-up, and what the "
        "closed form of Leviathan et al. gives"
    )
    return section(
        "speedup",
        "How much faster",
        *_told(
            "Speed-ups are geometric means over prompts decoded side by side, with 95 % bootstrap intervals; below 1 "
            "is slower. A prediction knows acceptance and times of phases, and leaves out the prompt.",
            pictures,
        ),
        _leads(run.cells),
        _best_gammas(run.cells),
        shown(parted, names, predicted),
    )


def _leads(cells: Sequence[Record]) -> Table:
    """Engines beside each other, at the best that each can do."""
    blocks = grouped(cells, *WITHOUT_ENGINE)
    varying = labels_of(cells)[:-3] if cells else []
    rows = [
        (
            *(text(block[0], name) for name in varying),
            cell_name(each.ours),
            cell_name(each.theirs),
            between(each.times),
        )
        for block in blocks.values()
        for each in leads(block)
    ]
    headings: list[Heading | str] = [
        *(Heading(heading(name), name) for name in varying),
        "this",
        "over this",
        "times as fast [95 %]",
    ]
    return table(headings, rows, "Engines beside each other")


def _best_gammas(cells: Sequence[Record]) -> Table:
    """The best number of draft tokens: what costs and acceptance predict, and what was measured."""
    varying = labels_of(cells)[:-1] if cells else []
    rows = [
        (
            *(text(best.measured, name) for name in varying),
            str(best.predicted_gamma),
            f"{best.predicted[best.predicted_gamma]:.2f}",
            ", ".join(str(each["gamma"]) for each in best.records),
            str(best.measured["gamma"]),
            interval(best.measured, "speedup"),
        )
        for best in best_gammas(cells)
    ]
    ends: list[Heading | str] = [
        "predicted best",
        "its prediction",
        "measured",
        "measured best",
        Heading("speed-up [95 %]", "speedup"),
    ]
    headings: list[Heading | str] = [*(Heading(heading(name), name) for name in varying), *ends]
    return table(headings, rows, "The best gamma")


def _times(run: Results, pictures: Sequence[Any]) -> list[Section]:
    silent = [cell["engine"] for cell in run.cells if cell["scoring_time_s"] is None]
    told = [cell["engine"] for cell in run.cells if cell["scoring_time_s"] is not None]
    engines = [engine for engine in dict.fromkeys(silent) if engine not in told]
    untold = f"{' and '.join(engines)} do not tell the times of phases." if engines else ""
    sentence = (
        "A step drafts, scores the draft with the target, and accepts, recovers and draws. Scoring and verification "
        "are shown per emitted token, so that methods with fewer steps need less. Cells ran one after the other: if "
        "the machine was slower for a while, a cell's times are longer; only speed-ups are measured side by side. "
        f"{untold}"
    )
    return section("time", "Where the time goes", *_told(sentence.strip(), pictures))


def _loads(run: Results, pictures: Sequence[Any]) -> list[Section]:
    if not run.loads:
        return []
    names = [name for name in _LOAD if any(record.get(name) is not None for record in run.loads)]
    labels = ["rate", *(name for name in labels_of(run.loads) if name != "rate")]
    rows = [tuple(_load_text(record, name) for name in (*labels, *names)) for record in run.loads]
    headings = [Heading(heading(name), name) for name in (*labels, *names)]
    sentence = (
        "Requests arrive at a rate whether or not the earlier ones are done, and all times count from the arrival. "
        "Above 1 in the first picture a method pays; requests wait for each other, so that each rate is one run "
        "without an interval."
    )
    verdicts = [f"{line}." for block in grouped(run.loads, *BLOCK).values() for line in load.verdicts(block)]
    return section("load", "Under load", sentence, *pictures, *verdicts, table(headings, rows, "Each rate"))


_LOAD = (
    *("num_requests", "num_finished", "goodput", "within_limits_rate", "throughput_tok_s", "mean_num_in_flight"),
    *(f"{name}_p{percent}_s" for name in ("ttft", "inter_token", "latency") for percent in (50, 95, 99)),
)


def _load_text(record: Record, name: str) -> str:
    value = record.get(name)
    if name in ("throughput_tok_s", "within_limits_rate"):
        return text(record, name) if name == "throughput_tok_s" else percent(value)
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


_ENERGY = (
    "energy_j",
    "energy_per_token_j",
    "energy_per_accepted_token_j",
    "average_power_w",
    "peak_power_w",
    "average_utilisation_rate",
    "peak_memory_bytes",
    "peak_temperature_c",
)


def _energies(run: Results, pictures: Sequence[Any]) -> list[Section]:
    known = [cell for cell in run.cells if cell["energy_j"] is not None]
    unknown = [cell for cell in run.cells if cell["energy_j"] is None]
    reasons = _reasons(unknown, "energy_reason", "Energy was not measured", "The file does not say why")
    about = (
        "Energy is that of the whole device while the prompts were decoded, GPUs or else processor packages, idle "
        "power included."
        if known
        else ""
    )
    measured = shown(known, _ENERGY, "Energy, power and memory")
    return section("energy", "Energy", about, *reasons, *pictures, measured)


def _reasons(cells: Sequence[Record], name: str, what: str, unknown: str) -> list[str]:
    """Why something is not known, for how many cells."""
    counts: dict[str, int] = {}
    for cell in cells:
        reason = cell[name] or ""
        counts[reason] = counts.get(reason, 0) + 1
    number_of = {reason: f" of {count} cells" if len(counts) > 1 else "" for reason, count in counts.items()}
    return [f"{what}{number_of[each]}: {each or unknown.lower()}." for each in counts]


def _qualities(run: Results) -> list[Section]:
    known = [cell for cell in run.cells if cell["quality"] is not None]
    unknown = [cell for cell in run.cells if cell["quality"] is None and cell["quality_reason"]]
    reasons = _reasons(unknown, "quality_reason", "Outputs were not scored", "")
    names = ("quality_metric", "quality", "quality_baseline", "quality_difference")
    scores = shown(known, names, "The workload's own score, of the same prompts with and without speculation")
    return section("quality", "Quality", *reasons, scores)


def _certificates(run: Results) -> list[Section]:
    if not run.certificates:
        return []
    names = (
        "verification",
        "verdict",
        "p_value",
        "control_p_value",
        "num_draws",
        "tv_upper_bound",
        "min_detectable_tv",
    )
    audits = shown([{**record, "verdict": verdict(record)} for record in run.certificates], names, "Audits")
    reasons = [
        f"{record.get('engine')} {record.get('method')} {record.get('gamma')}: {'; '.join(map(str, told))}."
        for record in run.certificates
        if (told := record.get("reasons")) and record["verdict"] != "lossless"
    ]
    sentence = (
        "Every emitted token is compared with the target's exact distribution. Lossy means wrong and unlike the "
        "engine's own plain decoding; inconclusive says what a verdict takes."
    )
    return section("certificates", "Is it lossless", sentence, audits, *reasons)


def _published(run: Results) -> list[Section]:
    cells = [cell for cell in fastest(run.cells) if cell["published_source"]]
    if not cells:
        return []
    names = (
        "speedup",
        "published_speedup",
        "acceptance_rate",
        "published_acceptance_rate",
        "mean_acceptance_length",
        "published_mean_acceptance_length",
        "published_setting",
        "published_source",
    )
    sentence = "What others measured with the same pair and method; their machine and prompts are others."
    return section("published", "Beside published results", sentence, shown(cells, names, "Ours beside theirs"))


def _costs(run: Results, pictures: Sequence[Any]) -> list[Section]:
    sizes = [record for record in run.costs if record["step_s"] is None]
    steps = [record for record in run.costs if record["step_s"] is not None]
    bandwidths = [record["read_bandwidth"] for record in sizes if record["read_bandwidth"]]
    sentence = (
        f"This machine reads memory at {bandwidths[0] / 1e9:.1f} GB/s; the roofline is what reading weights and cache "
        "must take at that speed."
        if bandwidths
        else ""
    )
    return section(
        "cost",
        "What a step costs",
        sentence,
        *pictures,
        _cost_table(sizes, ("axis", "size", "median_s", "roofline_share"), "Time by size"),
        _cost_table(
            steps,
            ("axis", "size", "step_s", *(f"{phase}_share" for phase in _PHASES)),
            "Shares of a decode step; size is the number of rows",
        ),
    )


_PHASES = ("draft", "scoring", "verification", "bookkeeping")


def _cost_table(records: Sequence[Record], names: Sequence[str], caption: str) -> Table:
    headings = [Heading(heading(name), name) for name in names]
    rows = [
        tuple(percent(record[name], 1) if name in SHARES else text(record, name) for name in names)
        for record in records
    ]
    return table(headings, rows, caption)


SHARES = tuple(f"{phase}_share" for phase in _PHASES)

_CELLS = (
    "throughput_tok_s",
    "latency_s",
    "ttft_s",
    "inter_token_s",
    "speedup",
    "predicted_speedup",
    "acceptance_rate",
    "mean_acceptance_length",
    "system_efficiency",
    "draft_time_per_token_s",
    "prefill_time_s",
    "scoring_time_s",
    "verification_time_s",
    "speedup_of_reference",
    "num_outputs_equal",
)


def _cells(run: Results) -> Iterator[Any]:
    if run.cells:
        everything = shown(run.cells, _CELLS, "Every cell; --csv has all fields of each")
        yield Table(everything.headings, everything.rows, everything.caption, sortable=True)


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
        yield "The command:"
        yield Command(run.command)
    else:
        yield "The file does not tell the command that made it; files that are written now do."


def _options(run: Results) -> dict[str, Any]:
    """What all cells have in common."""
    names = ("dtype", "device", "quantisation", "verification", "max_tokens", "temperature", "top_p", "top_k", "seed")
    records = run.cells or run.costs
    common = {name: {str(record[name]) for record in records} for name in names if records}
    return {
        fields.column(name).heading: values.pop()
        for name, values in common.items()
        if len(values) == 1 and values != {"None"}
    }


def glossary(records: Iterable[Record]) -> Table:
    """One sentence for each field of the records, with the heading under which the tables show it."""
    names = fields.ordered(name for record in records for name in fields.scalars(record))
    rows = [
        (heading(name), name, fields.column(name).unit or "-", fields.column(name).meaning)
        for name in names
        if any(record.get(name) is not None for record in records)
    ]
    return table(["heading", "field", "unit", "meaning"], rows)


def document(runs: Sequence[Results], first: Sequence[Chapter] = ()) -> Document:
    """All runs. first: chapters before them, of what differs."""
    records = [record for run in runs for record in run.records]
    chapters = [chapter(run, f"run{index}") for index, run in enumerate(runs, 1)]
    return Document("Speculative decoding: what was measured", (*first, *chapters), glossary(records))
