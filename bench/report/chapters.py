"""The sections of a report on a run: the answer first, then each question with its tables and charts."""

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
from bench.report.charts import run as charts
from bench.report.charts.model import Picture
from bench.report.charts.names import distribution
from bench.report.columns import PARTS, heading, labels_of, shown, text
from bench.report.document import Chapter, Command, Document, Facts, Heading, Section, Table, section, table
from bench.report.format import between, cell_name, interval, percent, verdict
from bench.report.terminal import load


def chapter(run: Results, name: str) -> Chapter:
    """A run. name: for links."""
    pictures = charts.sections(run.pictured)
    sections = [
        *section("short", "Summary", *summary.cautions(run), _fastest(run.cells)),
        *_speedups(run, pictures["speedup"]),
        *section("acceptance", "Acceptance", *_explained(_ACCEPTANCE, pictures["acceptance"])),
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
    about = (*_subject(run.cells), run.described())
    return Chapter(name, run.name, about, tuple(summary.cards(run)), tuple(sections))


def _subject(cells: Sequence[Record]) -> Iterator[str]:
    """What was decoded, in a line."""
    if not cells:
        return
    pairs, workloads, engines = (
        ", ".join(dict.fromkeys(str(cell[name]) for cell in cells)) for name in ("pair", "workload", "engine")
    )
    distributions = ", ".join(dict.fromkeys(map(distribution, cells)))
    num_prompts = " or ".join(map(str, sorted({cell["num_prompts"] for cell in cells})))
    max_tokens = " or ".join(map(str, sorted({cell["max_tokens"] for cell in cells if cell["max_tokens"]})))
    lengths = f", up to {max_tokens} tokens each" if max_tokens else ""
    yield f"{pairs}; {workloads}, {num_prompts} prompts{lengths}; {distributions}; engines: {engines}"


_ACCEPTANCE = (
    "Acceptance rate is the share of drafted tokens that are accepted, with 95 % bootstrap intervals over prompts. "
    "System efficiency is the number of emitted tokens over the number a perfect draft would emit. Acceptance by "
    "position is the share of steps that accept the token at that position, for each method's longest fixed draft."
)
_THROUGHPUT = "One point per cell; up and to the left is better. Point at one to see its gamma and batch size."


def _explained(sentence: str, pictures: Sequence[Picture]) -> list[Any]:
    """Charts below a sentence about them, if there are any."""
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
    """The fastest cell of each engine."""
    groups = grouped(drafting(cells), *BLOCK).values()
    best = [max(group, key=lambda cell: cell["speedup"]) for group in groups]
    return shown(best, _FASTEST, "The fastest method of each engine")


def _speedups(run: Results, pictures: Sequence[Any]) -> list[Section]:
    attributed = [cell for cell in run.cells if cell["speedup_from_averaging"] is not None]
    columns = ("predicted_speedup", *(f"speedup_from_{part}" for part in PARTS), "speedup", "expected_speedup")
    caption = "From predicted to measured speed-up: what each effect adds, and the closed form of Leviathan et al."
    return section(
        "speedup",
        "Speed-up",
        *_explained(_SPEEDUP, pictures),
        _leads(run.cells),
        _best_gammas(run.cells),
        shown(attributed, columns, caption),
    )


_SPEEDUP = (
    "Time per token of plain decoding over that of the method, for the same prompts decoded in turns by the same "
    "engine: geometric mean over prompts with a 95 % bootstrap interval. Below 1 the method is slower. Predictions "
    "follow from the acceptance rate and the time of each phase, and exclude prefill."
)


def _leads(cells: Sequence[Record]) -> Table:
    """Engines against each other, each at its best."""
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
        "engine",
        "against",
        "times as fast [95 %]",
    ]
    return table(headings, rows, "Engines against each other")


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
            interval(best.measured, "speedup"),
        )
        for best in best_gammas(cells)
    ]
    headings: list[Heading | str] = [Heading(heading(name), name) for name in varying]
    headings += ["predicted best", "its speed-up", "measured", "measured best"]
    headings += [Heading("speed-up [95 %]", "speedup")]
    return table(headings, rows, "Best gamma")


def _times(run: Results, pictures: Sequence[Picture]) -> list[Section]:
    reporting = {cell["engine"] for cell in run.cells if cell["scoring_time_s"] is not None}
    silent = [engine for engine in dict.fromkeys(cell["engine"] for cell in run.cells) if engine not in reporting]
    missing = f" Phase times are not available for {' and '.join(silent)}." if silent else ""
    return section("time", "Time per phase", *_explained(_TIME + missing, pictures))


_TIME = (
    "A step drafts tokens, scores them with the target model, and verifies them: it accepts or rejects, and samples "
    "the recovered or bonus token. Scoring and verification are shown per emitted token, so fewer steps mean less "
    "time. These are absolute times of cells that ran one after the other, so they also reflect changes in machine "
    "load; speed-ups do not."
)


def _loads(run: Results, pictures: Sequence[Picture]) -> list[Section]:
    if not run.loads:
        return []
    known = [name for name in _LOAD if any(record.get(name) is not None for record in run.loads)]
    columns = ["rate", *(name for name in labels_of(run.loads) if name != "rate"), *known]
    rows = [tuple(_load_text(record, name) for name in columns) for record in run.loads]
    headings = [Heading(heading(name), name) for name in columns]
    verdicts = [f"{line}." for block in grouped(run.loads, *BLOCK).values() for line in load.verdicts(block)]
    return section("load", "Under load", _UNDER_LOAD, *pictures, *verdicts, table(headings, rows, "By arrival rate"))


_UNDER_LOAD = (
    "Open-loop load: requests arrive at a fixed rate whether or not earlier ones have finished, and latencies count "
    "from the arrival. Where the speed-up under load is above 1, speculation pays off. Requests of a run queue behind "
    "each other and are not independent, so each rate is one observation without an interval."
)
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
    reasons = _reasons(unknown, "energy_reason", "Energy was not measured", "the file does not say why")
    about = (
        "Energy of the whole device while the prompts were decoded, idle power included: of the GPUs or, without any, "
        "of the CPU packages."
        if known
        else ""
    )
    measured = shown(known, _ENERGY, "Energy, power and memory")
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
    names = ("quality_metric", "quality", "quality_baseline", "quality_difference")
    scores = shown(known, names, "The workload's own metric on the same prompts, with and without speculation")
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
    sentence = "Published for the same models and method, on other machines and prompts."
    return section("published", "Published results", sentence, shown(cells, names, "This run and published results"))


def _costs(run: Results, pictures: Sequence[Picture]) -> list[Section]:
    sizes = [record for record in run.costs if record["step_s"] is None]
    steps = [record for record in run.costs if record["step_s"] is not None]
    bandwidth = next((record["read_bandwidth"] for record in sizes if record["read_bandwidth"]), None)
    roofline = [_ROOFLINE.format(bandwidth / 1e9)] if bandwidth else []
    phases = ("axis", "size", "step_s", *(f"{phase}_share" for phase in _PHASES))
    return section(
        "cost",
        "Step costs",
        *roofline,
        *pictures,
        _cost_table(sizes, ("axis", "size", "median_s", "roofline_share"), "Time by size"),
        _cost_table(steps, phases, "Phases of a decode step; size is the batch size"),
    )


_ROOFLINE = (
    "Measured memory read bandwidth is {:.1f} GB/s; the roofline is the time it takes to read the weights and the KV "
    "cache once at that rate."
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
        everything = shown(run.cells, _CELLS, "Every cell; --csv has all fields")
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
        yield "Command:"
        yield Command(run.command)
    else:
        yield "The file does not record the command that produced it; newer versions do."


def _options(run: Results) -> dict[str, Any]:
    """Options that are the same in all cells."""
    names = ("dtype", "device", "quantisation", "verification", "max_tokens", "temperature", "top_p", "top_k", "seed")
    records = run.cells or run.costs
    common = {name: {str(record[name]) for record in records} for name in names if records}
    return {
        fields.column(name).heading: values.pop()
        for name, values in common.items()
        if len(values) == 1 and values != {"None"}
    }


def glossary(records: Iterable[Record]) -> Table:
    """A sentence for each field of the records, with the heading that tables show it under."""
    names = fields.ordered(name for record in records for name in fields.scalars(record))
    rows = [
        (heading(name), name, fields.column(name).unit or "-", fields.column(name).meaning)
        for name in names
        if any(record.get(name) is not None for record in records)
    ]
    return table(["heading", "field", "unit", "meaning"], rows)


def document(runs: Sequence[Results], compared: Sequence[Chapter] = ()) -> Document:
    """All runs. compared: chapters on what changed between them, which come first."""
    records = [record for run in runs for record in run.records]
    chapters = [chapter(run, f"run{index}") for index, run in enumerate(runs, 1)]
    return Document("Speculative decoding benchmark", (*compared, *chapters), glossary(records))
