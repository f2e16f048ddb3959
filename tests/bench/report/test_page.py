"""The HTML page, parsed back: what it says is what the records say, and it needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_runs import audited, decoded, loaded, sized, write

from bench.records import campaigns, fields
from bench.report import rendering
from bench.report.charts.model import Bars, Chart, Line, Rows, Series
from bench.report.document import Chapter, Document, Section, Table, table
from bench.report.html import page, svg
from bench.report.html.markup import Markup, element, join

BASELINES = Path(__file__).parents[3] / "bench" / "baselines"
HOSTILE = "\"><script>alert(1)</script><img src=http://e/x onerror=alert(2)>&amp;'"


class Parsed(HTMLParser):
    """tags: (name, attributes) in order. tables: rows of texts by caption. texts: all that is shown or said."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br", "path", "line", "rect", "circle"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append(("", []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        self.texts.append(data)
        if inside in ("td", "th"):
            self.tables[-1][1][-1][-1] += data
        elif inside == "caption":
            self.tables[-1] = (data, self.tables[-1][1])

    def table(self, caption: str) -> list[list[str]]:
        (rows,) = [rows for each, rows in self.tables if each.startswith(caption)]
        return rows


def page_of(folder: Path, *records: Any, **changes: Any) -> str:
    return page.render(rendering.document(campaigns.read_all([write(folder / "run.json", records, **changes)])))


def test_tables_say_what_the_records_say(tmp_path: Path) -> None:
    cells = [decoded("autoregressive"), decoded("ngram", 2), decoded("eagle", 4, speedup=3.0, speedup_high=3.5)]
    parsed = Parsed(page_of(tmp_path, *cells))
    head, *rows = parsed.table("Every cell")
    assert dict(zip(head, rows[1], strict=True)) == {
        **{"engine": "specdec", "method": "ngram", "gamma": "2", "tokens/s": "6.7", "latency, s": "1.500"},
        **{"speed-up [95 %]": "2.00 [1.50, 2.50]", "predicted": "2.25", "accepted": "50.0%", "length": "3.00"},
        **{"efficiency": "60.0%", "ms per proposed token": "1.500", "scoring, s": "0.500", "verification, s": "0.062"},
        **{"same outputs": "2 of 2"},
    }
    assert rows[0][5:7] == ["-", "-"]  # plain decoding is not compared with itself
    assert parsed.table("The fastest method")[1][:5] == ["specdec", "eagle", "4", "6.7", "3.00 [1.50, 3.50]"]


MANY = (1.0, 2.0) * 5  # prompts enough for an answer


@pytest.mark.parametrize(
    ("latency_s", "changes"),
    [((1.0, 2.0), {}), (MANY, {"load_format": "dummy"}), (MANY, {"synthetic_acceptance_rates": [0.9]})],
)
def test_no_factor_of_random_weights_or_of_two_prompts_is_the_answer(
    latency_s: Any, changes: Any, tmp_path: Path
) -> None:
    """It stands in the table, with its interval, and the page says why it is no more."""
    fast = decoded("ngram", 2, latency_s, speedup=86.55, **changes)
    other = decoded("ngram", 2, latency_s, engine="vllm", speedup=1.0, **changes)
    told = page_of(tmp_path, fast, other)
    assert "86.55" in told
    assert "×" not in told.split("<table")[0]
    assert any(word in told for word in ("too few for a speed-up", "Random weights", "Acceptance was prescribed"))


def test_the_answer_comes_first(tmp_path: Path) -> None:
    cells = decoded("ngram", 2, MANY), decoded("eagle", 4, MANY, speedup=3.0, speedup_low=0.5)
    text = page_of(tmp_path, *cells)
    first = text.index("3.00×")
    assert first < text.index("<table")
    assert "specdec with eagle, gamma 4, over its plain decoding, 95 % interval 0.50 to 2.50; within it is 1" in text


def test_energy_quality_audits_and_published_results_are_told(tmp_path: Path) -> None:
    energy = {
        "energy_j": 12.5,
        "energy_per_token_j": 0.125,
        "energy_per_accepted_token_j": 0.5,
        "average_power_w": 50.0,
    }
    score = {"quality_metric": "rouge_1", "quality": 0.25, "quality_baseline": 0.5, "quality_difference": -0.25}
    score |= {"quality_difference_low": -0.5, "quality_difference_high": 0.0}
    source = {"published_speedup": 1.84, "published_acceptance_rate": 0.32, "published_source": "a paper"}
    records = [decoded("ngram", 2, **energy, **score, **source), audited("lossy"), audited("lossless", gamma=4)]
    parsed = Parsed(page_of(tmp_path, *records))
    assert parsed.table("Energy, power")[1][3:] == ["12.5", "0.125", "0.500", "50.0"]
    told = {caption: parsed.table(caption)[1] for caption in ("The workload's", "Audits", "Ours beside theirs")}
    assert told["The workload's"][3:] == ["rouge_1", "0.250", "0.500", "-0.250 [-0.500, +0.000]"]
    assert told["Audits"][3:] == ["token", "lossy", "0.5", "0.75", "20,000", "0.03", "0.04"]
    assert told["Ours beside theirs"][3:] == ["2.00 [1.50, 2.50]", "1.84", "50.0%", "32.0%", "3.00", "a paper"]
    assert "specdec ngram 2: p is small." in parsed.texts
    assert "1 of 2" in parsed.texts


def test_load_is_told_by_rate(tmp_path: Path) -> None:
    loads = [loaded(rate, *arm) for rate in (1.0, 2.5) for arm in (("autoregressive", 0, 2.0), ("ngram", 2, rate))]
    parsed = Parsed(page_of(tmp_path, *loads))
    assert parsed.texts[parsed.texts.index("1 requests/s") + 1] == (
        "up to this rate specdec with ngram, gamma 2, pays, by median latency; at 2.5 it does not"
    )
    rows = parsed.table("Each rate")
    told = dict(zip(rows[0], rows[4], strict=True))
    assert {name: told[name] for name in ("rate", "method", "requests", "goodput", "latency 95 %, s")} == {
        **{"rate": "2.5", "method": "ngram", "requests": "10", "goodput": "1.25", "latency 95 %, s": "5"},
    }
    assert "latency 99 %, s" not in told  # nobody reached it
    assert any(text.startswith("ngram 2: limits kept by 50 % up to 2.5") for text in parsed.texts)


def test_what_is_not_known_says_why(tmp_path: Path) -> None:
    reasons = {"energy_reason": "there is no meter", "quality_metric": "pass_at_1", "quality_reason": "code is not run"}
    parsed = Parsed(page_of(tmp_path, decoded("ngram", 2, **reasons), decoded("eagle", 2)))
    assert "Energy was not measured of 1 cells: there is no meter." in parsed.texts
    assert "Outputs were not scored: code is not run." in parsed.texts


def test_how_it_was_measured_is_told(tmp_path: Path) -> None:
    parsed = Parsed(page_of(tmp_path, decoded("ngram", 2), command="pytest bench/ --gammas '2'"))
    for text in ("2026-01-02 03:04:05 UTC", "a processor", "2.13.0", "abc", "pytest bench/ --gammas '2'"):
        assert text in parsed.texts
    assert any("does not tell the command" in text for text in Parsed(page_of(tmp_path, decoded("ngram", 2))).texts)


def test_every_heading_that_shows_a_field_is_explained(tmp_path: Path) -> None:
    parsed = Parsed(page_of(tmp_path, decoded("ngram", 2), sized("width", 1, 0.5), audited("lossy")))
    explained = {attributes["title"] for tag, attributes in parsed.tags if tag == "th" and "title" in attributes}
    glossary = "".join(parsed.texts)
    assert len(explained) > 20
    assert all(sentence in glossary for sentence in explained if sentence)
    assert explained <= {column.meaning for column in fields.COLUMNS.values()}


def numbers_of(parsed: Parsed) -> Iterator[list[list[str]]]:
    return (rows[1:] for caption, rows in parsed.tables if not caption)


def test_figures_have_their_numbers_beside_them(tmp_path: Path) -> None:
    parsed = Parsed(page_of(tmp_path, decoded("ngram", 2), decoded("ngram", "auto", acceptance_rate=0.625)))
    assert [
        ["ngram", "gamma 2", "0.5 [0.25, 0.75]"],
        ["ngram", "gamma auto", "0.625 [0.25, 0.75]"],
    ] in list(numbers_of(parsed))


CHART = Chart(
    "name",
    "what\nof which",
    "gamma: tokens",
    "speed-up",
    (
        Series("a", (1.0, 2.0, 4.0), (1.0, 1.5, 3.0), 0, (0.5, 1.0, 2.0), (2.0, 2.5, 3.5), num_loose=1),
        Series("b", (1.0, 4.0), (0.25, 2.0), 1),
        Series("b: predicted", (1.0, 4.0), (0.5, 1.75), 1, dashed=True),
    ),
)


def scale_of(drawn: str, attribute: str, labels: str) -> tuple[float, float]:
    """(place of 0, places for 1) of an axis, by two of its labels: as a reader finds it."""
    found = {
        float(text): float(place)
        for place, text in re.findall(rf'<text {attribute}="([\d.]+)"[^>]*class="{labels}">([\d.]+)</text>', drawn)
    }
    (first, start), (last, end) = min(found.items()), max(found.items())
    unit = (end - start) / (last - first)
    return start - first * unit, unit


def test_what_is_drawn_stands_where_its_numbers_are() -> None:
    drawn = svg.draw(CHART)
    x0, x1 = scale_of(re.sub(r' y="[\d.]+"', "", drawn), "x", "mid")
    y0, y1 = scale_of(re.sub(r' x="[\d.]+"', "", drawn), "y", "end")
    y0 -= 4  # a label stands that much below its line
    points = re.findall(r'<path d="M([\d.]+) ([\d.]+)[^"]*" class="point"/>', drawn)
    read = [((float(x) - x0) / x1, (float(y) - y0) / y1) for x, y in points]
    expected = [point for series in CHART.series if not series.dashed for point in zip(series.x, series.y, strict=True)]
    assert [y for _, y in read] == pytest.approx([y for _, y in expected], abs=0.01)
    assert [x for x, _ in read] == pytest.approx([x for x, _ in expected], abs=0.04)  # beside each other
    whiskers = re.findall(r'd="M[\d.]+ ([\d.]+)V([\d.]+)M', drawn)
    ends = [tuple((float(y) - y0) / y1 for y in pair) for pair in whiskers]
    assert ends == [pytest.approx(pair, abs=0.01) for pair in ((0.5, 2.0), (1.0, 2.5), (2.0, 3.5))]
    lines = re.findall(r'<path d="M([^"]+)" class="(line|dash)"/>', drawn)
    assert sorted((kind, path.count("L")) for path, kind in lines) == [("dash", 1), ("line", 1), ("line", 1)]


def test_one_long_interval_does_not_press_all_else_together() -> None:
    """It goes on beyond the axis, without a cap; its end is told in words."""
    series = Series("a", (1.0, 2.0), (1.0, 2.0), 0, (0.5, 1.0), (1.5, 90.0))
    drawn = svg.draw(Chart("", "", "gamma", "", (series,)))
    labels = [float(label) for label in re.findall(r'class="end">([\d.]+)</text>', drawn)]
    assert max(labels) == 6
    assert "a, gamma 2: 2 [1, 90]" in drawn
    whiskers = re.findall(r'd="(M[\d. ]+V[^"]+)"', drawn)
    assert [path.count("h6") for path in whiskers] == [2, 1]
    assert float(whiskers[1].partition("V")[2].partition("M")[0]) == svg.TOP
    rows = svg.draw(Rows("", "", "", (Line("a", 2.0, 1.0, 90.0), Line("b", 1.0, 0.5, 1.5))))
    assert max(float(label) for label in re.findall(r'class="mid">([\d.]+)</text>', rows)) == 6
    assert "2.00 [1.00, 90.00]" in rows


def test_rows_and_bars_are_drawn_to_scale() -> None:
    rows = Rows("name", "title", "speed-up", (Line("a", 1.5, 1.25, 2.0, 0, 1.75), Line("b", 0.5, 0.5, 0.5, 1)))
    drawn = svg.draw(rows)
    x0, x1 = scale_of(re.sub(r' y="[\d.]+"', "", drawn), "x", "mid")
    points = [(float(x) - x0) / x1 for x in re.findall(r'<path d="M([\d.]+) [^"]*" class="point"/>', drawn)]
    assert points == pytest.approx([1.5, 0.5], abs=0.01)
    (predicted,) = re.findall(r'<line x1="([\d.]+)"[^>]*class="predicted"/>', drawn)
    assert (float(predicted) - x0) / x1 == pytest.approx(1.75, abs=0.01)
    bars = Bars("name", "title", "share", ("draft", "scoring"), (("a", "1 ms", (0.25, 0.75)),))
    widths = [float(width) for width in re.findall(r'width="([\d.]+)"', svg.draw(bars))]
    assert widths[1] == pytest.approx(3 * widths[0], rel=1e-3)


@pytest.mark.parametrize(
    ("most", "labels"),
    [(1.0, "0 0.2 0.4 0.6 0.8 1"), (2.86, "0 1 2 3"), (0.29, "0 0.1 0.2 0.3"), (4000.0, "0 1,000 2,000 3,000 4,000")],
)
def test_ticks_are_round_and_hold_all(most: float, labels: str) -> None:
    assert " ".join(label for _, label in svg.ticks(most)) == labels
    assert svg.ticks(most)[-1][0] >= most


def test_labels_of_an_axis_do_not_touch_each_other() -> None:
    sizes = tuple(float(2**power) for power in range(20))
    drawn = svg.draw(Chart("", "", "", "", (Series("", sizes, sizes),), log_x=True))
    labels = re.findall(r'<text x="([\d.]+)" y="256" class="mid">([\d,]+)</text>', drawn)
    ends = [(float(x) - 3 * len(text), float(x) + 3 * len(text)) for x, text in labels]
    assert len(labels) > 5
    assert all(right < left for (_, right), (left, _) in pairwise(ends))
    assert labels[-1][1] == "524,288"


def test_colours_and_forms_tell_methods_apart() -> None:
    forms = {svg.marker(kind, 0, 0) for kind in range(svg.NUM_KINDS)}
    style = page.STYLE.read_text()
    assert len(forms) == svg.NUM_KINDS
    for scheme in (style[: style.index("@media")], style[style.index("@media") :]):
        colours = re.findall(r"--k\d: (#\w+);", scheme)
        assert len(set(colours)) == len(colours) == svg.NUM_KINDS


def test_text_is_escaped_wherever_it_comes_from() -> None:
    assert element("p", "<b>", title='"') == '<p title="&quot;">&lt;b&gt;</p>'
    assert join("<", Markup("<br>")) == "&lt;<br>"


def test_hostile_records_are_only_text(tmp_path: Path) -> None:
    fields = {name: HOSTILE for name, value in decoded("ngram", 2).items() if isinstance(value, str)}
    fields |= {"quality_reason": HOSTILE, "energy_reason": HOSTILE, "published_source": HOSTILE}
    records = [decoded("ngram", 2), decoded("ngram", 2) | fields, audited(HOSTILE, reasons=[HOSTILE])]
    records += [sized(HOSTILE, 2, 0.5), loaded(1.0, "ngram", 2) | {HOSTILE: HOSTILE, "workload": HOSTILE}]
    text = page_of(tmp_path, *records, command=HOSTILE, datetime=HOSTILE, machine_info={"cpu_model": HOSTILE})
    check_is_self_contained(text)
    parsed = Parsed(text)
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in parsed.tags}
    assert HOSTILE in parsed.texts


def check_is_self_contained(text: str) -> None:
    """No address of anything that a browser would fetch, and no handler of events."""
    parsed = Parsed(text)
    assert parsed.open == []
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "use", "image", "audio", "video", "form")
        assert not {"src", "srcset", "data", "action", "xlink:href", "style"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    for asset in (page.STYLE, page.SCRIPT):
        assert not re.search(r"url\(|@import|@font-face|https?:|fetch|import\(|XMLHttp", asset.read_text())
    targets = {attributes["id"] for _, attributes in parsed.tags if "id" in attributes}
    links = {(attributes["href"] or "")[1:] for tag, attributes in parsed.tags if tag == "a"}
    assert links <= targets


@pytest.mark.parametrize("path", sorted(BASELINES.glob("*.json")), ids=lambda path: path.stem)
def test_pages_of_committed_runs_need_nothing_else(path: Path) -> None:
    text = page.render(rendering.document(campaigns.read_all([path])))
    check_is_self_contained(text)
    assert len(text.encode()) < page.MAX_BYTES
    assert "nan" not in re.findall(r'="(nan|inf|-inf)', text)


def test_the_committed_page_is_what_its_run_gives() -> None:
    """After a change of the report: `python -m bench.report bench/baselines/engines-cpu.json --html THE_SAME.html`."""
    run = BASELINES / "engines-cpu.json"
    assert run.with_suffix(".html").read_text() == page.render(rendering.document(campaigns.read_all([run])))


def many(number: int) -> list[Any]:
    return [decoded("ngram", gamma, workload=f"w{block}") for block in range(number // 4) for gamma in (1, 2, 4, 8)]


def test_a_large_page_leaves_out_pictures_and_says_so(tmp_path: Path) -> None:
    document = rendering.document(campaigns.read_all([write(tmp_path / "run.json", many(400))]))
    whole, small = page.render(document), page.render(document, 500_000)
    assert len(whole.encode()) > 500_000 >= len(small.encode())
    assert "pictures are left out, to keep the page small; --plots draws them all." in small
    assert len(Parsed(small).table("Every cell")) == 401
    assert "left out, to keep" not in whole


def test_a_larger_one_leaves_out_rows_and_says_so() -> None:
    cells = Table(table(["cell"], []).headings, (("x" * 90,),) * 5000, "Every cell", sortable=True)
    section = Section("cells", "All cells", (cells,))
    document = Document("title", (Chapter("run", "run", (), (), (section,)),), table(["a", "b", "c", "d"], []))
    text = page.render(document, 200_000)
    assert len(Parsed(text).table("Every cell: the first 1000 of 5000 rows; --csv has all cells")) == 1001
    with pytest.raises(ValueError, match=r"the page has \d+ bytes and must have at most 10; report fewer runs"):
        page.render(document, 10)


def test_a_campaign_of_a_thousand_cells_stays_small(tmp_path: Path) -> None:
    text = page_of(tmp_path, *many(1000))
    assert len(text.encode()) <= page.MAX_BYTES
    assert len(Parsed(text).table("Every cell")) == 1001
