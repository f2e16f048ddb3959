"""The HTML page, parsed back: it shows the values of the records and loads nothing from outside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_runs import audited, decoded, loaded, sized, write

from bench.records import campaigns, fields
from bench.report import rendering
from bench.report.document import Chapter, Document, Section, Table, table
from bench.report.html import page

BASELINES = Path(__file__).parents[3] / "bench" / "baselines"
HOSTILE = "\"><script>alert(1)</script><img src=http://e/x onerror=alert(2)>&amp;'"


class Parsed(HTMLParser):
    """tags: (name, attributes) in order. tables: rows of texts by caption. texts: all visible or accessible text."""

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


def test_tables_agree_with_the_records(tmp_path: Path) -> None:
    cells = [decoded("autoregressive"), decoded("ngram", 2), decoded("eagle", 4, speedup=3.0, speedup_high=3.5)]
    parsed = Parsed(page_of(tmp_path, *cells))
    head, *rows = parsed.table("Every cell")
    assert dict(zip(head, rows[1], strict=True)) == {
        **{"engine": "specdec", "method": "ngram", "gamma": "2", "tokens/s": "6.7", "latency, s": "1.500"},
        **{"speed-up [95 %]": "2.00 [1.50, 2.50]", "same outputs": "2 of 2", "length [95 %]": "3.00"},
        "accepted [95 %]": "50.0% [25.0%, 75.0%]",
    }
    head, _, times, _ = parsed.table("Times of every cell")
    assert dict(zip(head[3:], times[3:], strict=True)) == {
        **{"efficiency": "60.0%", "ms per proposed token": "1.500", "scoring, s": "0.500", "verification, s": "0.062"},
    }
    assert parsed.table("From predicted to measured")[1][3:] == ["2.00 [1.50, 2.50]", "2.25"]
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
    """It stands in the table, with its interval, and the page explains why it is not an answer."""
    fast = decoded("ngram", 2, latency_s, speedup=86.55, **changes)
    other = decoded("ngram", 2, latency_s, engine="vllm", speedup=1.0, **changes)
    text = page_of(tmp_path, fast, other)
    assert "86.55" in text
    assert "×" not in text.split("<table")[0]
    assert any(word in text for word in ("too few for a speed-up", "Random weights", "Acceptance was prescribed"))


def test_the_answer_comes_first(tmp_path: Path) -> None:
    cells = decoded("ngram", 2, MANY), decoded("eagle", 4, MANY, speedup=3.0, speedup_low=0.5)
    text = page_of(tmp_path, *cells)
    first = text.index("3.00×")
    assert first < text.index("<table")
    assert "specdec with eagle, gamma 4, over its plain decoding, 95 % interval 0.50 to 2.50; it includes 1" in text


def test_energy_quality_audits_and_published_results_are_shown(tmp_path: Path) -> None:
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
    tables = {caption: parsed.table(caption)[1] for caption in ("The workload's", "Audits", "This run and published")}
    assert tables["The workload's"][3:] == ["rouge_1", "0.250", "0.500", "-0.250 [-0.500, +0.000]"]
    assert tables["Audits"][3:] == ["token", "lossy (TV > 0.02)", "0.5", "0.75", "20,000", "0.03", "0.04"]
    assert tables["This run and published"][3:] == [
        "2.00 [1.50, 2.50]",
        "50.0% [25.0%, 75.0%]",
        "3.00",
        "1.84",
        "32.0%",
        "a paper",
    ]
    assert "specdec ngram 2: p is small." in parsed.texts
    assert "1 of 2" in parsed.texts


def test_load_results_are_listed_by_rate(tmp_path: Path) -> None:
    loads = [loaded(rate, *arm) for rate in (1.0, 2.5) for arm in (("autoregressive", 0, 2.0), ("ngram", 2, rate))]
    parsed = Parsed(page_of(tmp_path, *loads))
    assert parsed.texts[parsed.texts.index("1 requests/s") + 1] == (
        "up to this rate specdec with ngram, gamma 2, pays, by median latency; at 2.5 it does not"
    )
    rows = parsed.table("By arrival rate")
    row = dict(zip(rows[0], rows[4], strict=True))
    assert {name: row[name] for name in ("rate", "method", "finished", "goodput", "latency p50 p95 p99, s")} == {
        **{"rate": "2.5", "method": "ngram", "finished": "9 of 10", "goodput": "1.25"},
        "latency p50 p95 p99, s": "2.500 5.000 -",  # not everybody reached the last
    }
    assert row["plain latency ratio"] == "0.80"  # plain decoding's 2 s over 2.5 s
    assert any(text.startswith("ngram 2: limits kept by 50 % up to 2.5") for text in parsed.texts)


def test_engines_under_load_have_distinct_names(tmp_path: Path) -> None:
    loads = [loaded(2.0, "ngram", 2, engine=engine) for engine in ("specdec", "vllm")]
    verdicts = [each for each in Parsed(page_of(tmp_path, *loads)).texts if "limits kept" in each]
    assert [each.partition(":")[0] for each in verdicts] == ["specdec ngram 2", "vllm ngram 2"]


def test_unknown_values_give_a_reason(tmp_path: Path) -> None:
    reasons = {"energy_reason": "there is no meter", "quality_metric": "pass_at_1", "quality_reason": "code is not run"}
    parsed = Parsed(page_of(tmp_path, decoded("ngram", 2, **reasons), decoded("eagle", 2)))
    assert "Energy was not measured in 1 cells: there is no meter." in parsed.texts
    assert "Outputs were not scored: code is not run." in parsed.texts


def test_the_measurement_setup_is_shown(tmp_path: Path) -> None:
    parsed = Parsed(page_of(tmp_path, decoded("ngram", 2), command="pytest bench/ --gammas '2'"))
    for text in ("2026-01-02 03:04:05 UTC", "a processor", "2.13.0", "abc", "pytest bench/ --gammas '2'"):
        assert text in parsed.texts
    assert any("does not record the command" in text for text in Parsed(page_of(tmp_path, decoded("ngram", 2))).texts)


def test_every_heading_that_shows_a_field_is_explained(tmp_path: Path) -> None:
    parsed = Parsed(page_of(tmp_path, decoded("ngram", 2), sized("width", 1, 0.5), audited("lossy")))
    explained = {attributes["title"] for tag, attributes in parsed.tags if tag == "th" and "title" in attributes}
    glossary = "".join(parsed.texts)
    assert len(explained) > 20
    assert all(sentence in glossary for sentence in explained if sentence)
    assert explained <= {field.meaning for field in fields.FIELDS.values()}


def numbers_of(parsed: Parsed) -> Iterator[list[list[str]]]:
    return (rows[1:] for caption, rows in parsed.tables if not caption)


def test_figures_have_their_numbers_beside_them(tmp_path: Path) -> None:
    parsed = Parsed(page_of(tmp_path, decoded("ngram", 2), decoded("ngram", "auto", acceptance_rate=0.625)))
    assert [
        ["ngram", "gamma 2", "0.5 [0.25, 0.75]"],
        ["ngram", "gamma auto", "0.625 [0.25, 0.75]"],
    ] in list(numbers_of(parsed))


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
    for asset in (*page.STYLES, page.SCRIPT):
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


def test_the_committed_page_is_that_of_its_run() -> None:
    """After a change of the report: `python -m bench.report bench/baselines/engines-cpu.json --html THE_SAME.html`."""
    run = BASELINES / "engines-cpu.json"
    assert run.with_suffix(".html").read_text() == page.render(rendering.document(campaigns.read_all([run])))


def many(number: int) -> list[Any]:
    return [decoded("ngram", gamma, workload=f"w{block}") for block in range(number // 4) for gamma in (1, 2, 4, 8)]


def test_a_large_page_omits_charts_with_a_note(tmp_path: Path) -> None:
    document = rendering.document(campaigns.read_all([write(tmp_path / "run.json", many(400))]))
    whole, small = page.render(document), page.render(document, 500_000)
    assert len(whole.encode()) > 500_000 >= len(small.encode())
    assert "charts are omitted to keep the page small; --plots writes all of them." in small
    assert len(Parsed(small).table("Every cell")) == 401
    assert "are omitted to keep" not in whole


def test_a_larger_page_omits_rows_with_a_note() -> None:
    cells = Table(table(["cell"], []).headings, (("x" * 90,),) * 5000, "Every cell", sortable=True)
    section = Section("cells", "All cells", (cells,))
    document = Document("title", (Chapter("run", "run", (), (), (section,)),), table(["a", "b", "c", "d"], []))
    text = page.render(document, 200_000)
    assert len(Parsed(text).table("Every cell: the first 1000 of 5000 rows; --csv has all of them")) == 1001
    with pytest.raises(ValueError, match=r"the page has \d+ bytes and must have at most 10; report fewer runs"):
        page.render(document, 10)


def test_a_campaign_of_a_thousand_cells_stays_small(tmp_path: Path) -> None:
    text = page_of(tmp_path, *many(1000))
    assert len(text.encode()) <= page.MAX_BYTES
    assert len(Parsed(text).table("Every cell")) == 1001
