"""The start of a report: the numbers that answer the question, and cautions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.analysis.break_even import pays, stops_paying
from bench.analysis.engine_ratios import Lead, leads
from bench.analysis.saturation import saturation_rate
from bench.records.grouping import BLOCK, WITHOUT_ENGINE, drafting, grouped
from bench.records.results import Results
from bench.records.schema import Record
from bench.report.document import Card
from bench.report.format import cell_name, verdict

MAX_CARDS = 6
FEW_ROUNDS = 10
HEADLINE_ROUNDS = 5  # with fewer, a speed-up is shown in the tables only
FREE = 1.25  # tokens are called free up to this times the time of a step of one token


def cards(run: Results) -> Iterator[Card]:
    """The answers: the speed-up, its baseline, and whether the output is the same."""
    cells = [cell for cell in run.cells if _is_telling(cell)]
    blocks = list(grouped(cells, *WITHOUT_ENGINE).values())
    bests = [max(found, key=lambda cell: cell["speedup"]) for block in blocks if (found := _own(run, block))]
    for best in bests[:MAX_CARDS]:
        where = f" on {best['workload']}" if len({each["workload"] for each in bests}) > 1 else ""
        where += f", batch size {best['batch_size']}" if len({each["batch_size"] for each in bests}) > 1 else ""
        yield Card(f"{best['speedup']:.2f}×", f"{_arm(best)} over its plain decoding{where}, {_certainty(best)}")
    if len(blocks) == 1:
        yield from (Card(f"{each.times.estimate:.2f}×", _lead_sentence(each)) for each in _best_leads(blocks[0]))
    if same := _same_card(bests or drafting(run.cells)):
        yield same
    yield from _load_cards(run.loads)
    yield from _other_cards(run)


def _is_telling(cell: Record) -> bool:
    """Whether a cell's speed-up counts as an answer: measured on the output of a real model, over enough rounds."""
    is_real = cell["load_format"] != "dummy" and not cell.get("synthetic_acceptance_rates")
    is_real = is_real and cell["prompt_source"] == "text"
    return is_real and _num_rounds(cell) >= HEADLINE_ROUNDS


def _num_rounds(cell: Record) -> int:
    return int(-(-cell["num_prompts"] // cell["batch_size"]))


def _load_cards(loads: Sequence[Record]) -> Iterator[Card]:
    """The method of each engine that pays up to the highest rate, and what saturates the engine."""
    open_loop = [record for record in loads if record["rate"] is not None]
    for block in grouped(open_loop, *BLOCK).values():
        arms = grouped(block, "method", "gamma")
        yield from _saturation_cards(list(arms.values()))
        plain = arms.pop(("autoregressive", 0), [])
        ends = {arm: stops_paying(pays(plain, found)) for arm, found in arms.items() if pays(plain, found)}
        if ends:
            best = max(ends, key=lambda arm: (ends[arm][0] or 0.0, ends[arm][1] is None))
            yield from _load_card(_arm(arms[best][0]), *ends[best])


def _saturation_cards(arms: Sequence[Sequence[Record]]) -> Iterator[Card]:
    """The rate that saturates the method which finishes most requests."""
    known = [(found.estimate, arm) for arm in arms if (found := saturation_rate(arm))]
    if known:
        most, arm = max(known, key=lambda pair: pair[0])
        yield Card(f"{most:.3g} requests/s", f"saturate {_arm(arm[0]).removesuffix(',')}")


def _load_card(arm: str, last: float | None, first: float | None) -> Iterator[Card]:
    """Break-even. last, first: the last rate at which a method pays, the first at which not; None if unknown."""
    if last is not None:
        end = "the highest rate measured" if first is None else f"at {first:g} it does not"
        yield Card(f"{last:g} requests/s", f"up to this rate {arm} pays, by median latency; {end}")
    elif first is not None:
        yield Card("0 requests/s", f"{arm} does not pay even at {first:g} requests/s, by median latency")


def _best_leads(block: Sequence[Record]) -> list[Lead]:
    """The speed-up over each other engine at its best, or at plain decoding if it has no other method."""
    by_engine = {each.other["engine"]: each for each in leads(block)}  # the last one is that over its best
    return list(by_engine.values())


def _arm(record: Record) -> str:
    if record["method"] == "autoregressive":
        return f"{record['engine']}, plain decoding,"
    return f"{record['engine']} with {record['method']}, gamma {record['gamma']},"


def _own(run: Results, block: Sequence[Record]) -> list[Record]:
    """Cells of the reference engine; of all engines if it has none."""
    own = [cell for cell in drafting(block) if cell["engine"] == run.reference]
    return own or drafting(block)


def _certainty(record: Record) -> str:
    low, high = record["speedup_low"], record["speedup_high"]
    if low is None:
        return "from one round, without an interval"
    caution = "; it includes 1, so this may be chance" if low <= 1 <= high else ""
    return f"95 % interval {low:.2f} to {high:.2f}{caution}"


def _lead_sentence(found: Lead) -> str:
    times = found.times
    ends = "" if times.low is None else f", 95 % interval {times.low:.2f} to {times.high:.2f}"
    return f"{_arm(found.record)} over {_arm(found.other).removesuffix(',')}{ends}"


def _same_card(bests: Sequence[Record]) -> Card | None:
    known = [cell for cell in bests if cell["num_outputs_equal"] is not None]
    if not known:
        return None
    same, total = (sum(cell[name] for cell in known) for name in ("num_outputs_equal", "num_prompts"))
    return Card(f"{same} of {total}", "outputs with speculation are those of plain decoding, token for token")


def _other_cards(run: Results) -> Iterator[Card]:
    if run.certificates:
        lossless = [record for record in run.certificates if record["verdict"] == "lossless"]
        loosest = max(lossless, key=lambda record: record.get("max_tv") or 0.0, default={"verdict": "lossless"})
        yield Card(f"{len(lossless)} of {len(run.certificates)}", f"audits found speculation to be {verdict(loosest)}")
    steps = [record for record in run.costs if record["axis"] == "width"]
    if steps:
        one = min(steps, key=lambda record: record["size"])
        yield Card(f"{1e3 * one['median_s']:.1f} ms", f"a step of {one['size']} token of {one['pair']}, {one['dtype']}")
        free = max(
            (each for each in steps if each["median_s"] <= FREE * one["median_s"]), key=lambda each: each["size"]
        )
        if free is not one:
            times = free["median_s"] / one["median_s"]
            yield Card(f"{free['size']} tokens", f"take {times:.2f} times as long to score as one")


def cautions(run: Results) -> Iterator[str]:
    """Cautions to read before the numbers."""
    if run.shortage:
        yield f"{run.shortage}."
    if any(cell["load_format"] == "dummy" for cell in run.cells):
        yield "Random weights: only times are meaningful, not outputs or acceptance."
    if any(cell.get("synthetic_acceptance_rates") for cell in run.cells):
        yield "Acceptance was prescribed: only times are meaningful."
    if any(record["prompt_source"] != "text" for record in (*run.cells, *run.loads)):
        yield "Prompts of random tokens: only times are meaningful, not outputs or acceptance."
    rounds = [_num_rounds(cell) for cell in run.cells]
    if rounds and min(rounds) < FEW_ROUNDS:
        number = "1 round" if min(rounds) == 1 else f"{min(rounds)} rounds"
        short = ", and too few for a speed-up to be the answer" if min(rounds) < HEADLINE_ROUNDS else ""
        yield f"Only {number}: expect wide intervals{short}."
    if any(len(group) > 1 for group in grouped(drafting(run.cells), *WITHOUT_ENGINE, "engine", "method").values()):
        yield "The fastest gamma of a method is chosen by the same measurement, which favors it a little."
    if idle := [cell for cell in run.cells if cell["method"] != "autoregressive" and cell["num_drafted"] == 0]:
        yield f"Nothing was drafted by {', '.join(map(cell_name, idle))}: its speed-up differs from 1 only by noise."
    yield from _partings(run.cells)
    for workload, rows in dict.fromkeys((cell["workload"], cell["num_rows_skipped"]) for cell in run.cells):
        if rows:
            yield f"{rows} malformed rows of {workload} were skipped."
    for workload, rows in dict.fromkeys((cell["workload"], cell.get("num_rows_passed_over")) for cell in run.cells):
        if rows:
            yield f"{rows} rows of {workload} contain no prompt."


def _partings(cells: Sequence[Record]) -> Iterator[str]:
    """Outputs that differ from those of plain decoding, and how close to a tie each difference is."""
    parted = [cell for cell in cells if cell["num_outputs_equal"] not in (None, cell["num_prompts"])]
    if not parted:
        return
    engines = ", ".join(dict.fromkeys(cell["engine"] for cell in parted))
    margins = [each for cell in cells for each in cell.get("margin_at_difference") or () if each is not None]
    near = (
        " Where they first differ, the logits of the two most likely tokens are "
        f"{min(margins):.3f} to {max(margins):.3f} apart: in 16 bits a near tie may go either way."
        if margins
        else ""
    )
    yield f"In {len(parted)} of {len(cells)} cells ({engines}) some outputs differ from plain decoding's.{near}"
