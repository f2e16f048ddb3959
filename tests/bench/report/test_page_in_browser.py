"""The page in a real browser: no error, nothing fetched, everything to be seen, at any width, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import browser
from helpers.bench_runs import audited, decoded, loaded, sized, write
from helpers.browser import Browser

from bench.records import campaigns
from bench.report import rendering
from bench.report.html import page

PROGRAM = browser.executable()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs a browser: apt-get install chromium")

BASELINES = Path(__file__).parents[3] / "bench" / "baselines"
WIDTH = "document.documentElement.scrollWidth"  # innerWidth grows with it on telephones
# elements with a place on the page, of all that there are
SEEN = (
    "(of => [...document.querySelectorAll(of)].filter(each => each.checkVisibility() && each.offsetWidth !== 0).length)"
)
ROWS = "[...document.querySelectorAll('.sortable tbody tr')].filter(each => !each.hidden)"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    assert PROGRAM is not None
    with browser.running(PROGRAM) as started:
        yield started


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with cells of all kinds."""
    folder = tmp_path_factory.mktemp("page")
    loads = [loaded(rate, *arm) for rate in (1.0, 2.0) for arm in (("ngram", 2, rate), ("autoregressive", 0, 1.5))]
    cells = [decoded("autoregressive"), decoded("ngram", 2), decoded("ngram", 8), decoded("eagle", 2)]
    costs = [sized("width", 1, 0.01), sized("width", 2, 0.02)]
    records = [*cells, *loads, *costs, audited("lossless")]
    runs = [write(folder / f"{name}.json", records, command="pytest " + "x" * 200) for name in ("before", "after")]
    (folder / "page.html").write_text(page.render(rendering.document(campaigns.read_all(runs))))
    return folder / "page.html"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a committed run, as it is made now."""
    path = tmp_path_factory.mktemp("page") / "engines-cpu.html"
    path.write_text(page.render(rendering.document(campaigns.read_all([BASELINES / "engines-cpu.json"]))))
    return path


@pytest.mark.parametrize("width", [1400, 400])
def test_a_real_run_is_seen_whole(width: int, engines: Path, window: Browser) -> None:
    path = engines
    window.open(path, width)
    assert window.errors() == []
    assert window.requests() == [path.as_uri()]
    assert window.evaluate(WIDTH) <= width
    tables, figures = path.read_text().count("<table"), path.read_text().count("<figure")
    assert figures >= 20
    assert window.evaluate(f"{SEEN}('figure svg.chart')") == figures
    assert window.evaluate(f"{SEEN}('table')") == tables - figures  # those of the figures are folded
    assert window.evaluate("document.querySelectorAll('svg.chart path.point').length") > 100


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("script", [True, False])
def test_all_kinds_of_cells_are_seen_with_and_without_script(
    width: int, script: bool, everything: Path, window: Browser
) -> None:
    window.open(everything, width, script=script)
    assert (window.errors(), window.requests()) == ([], [everything.as_uri()])
    shown = window.html()
    for title in (
        "What changed: after against before",
        "Under load",
        "Is it lossless",
        "What a step costs",
        "Glossary",
    ):
        assert title in shown
    window.call("Emulation.setScriptExecutionDisabled", value=False)  # the page was loaded without; now it is looked at
    assert window.evaluate(WIDTH) <= width
    assert window.evaluate(f"{SEEN}('figure svg.chart')") == everything.read_text().count("<figure")
    assert window.evaluate(f"{ROWS}.length") == 10 + 4 + 4  # of the differences, and of each run's cells
    assert window.evaluate("document.querySelectorAll('input').length") == (3 if script else 0)


def test_figures_are_as_wide_as_their_frame_and_labels_within(everything: Path, engines: Path, window: Browser) -> None:
    for path in (everything, engines):
        for width in (1400, 400):
            window.open(path, width)
            outside = """[...document.querySelectorAll('svg.chart')].flatMap(image => {
                const frame = image.getBoundingClientRect();
                return [...image.querySelectorAll('text')].filter(text => {
                    const place = text.getBoundingClientRect();
                    return place.left < frame.left - 1 || place.right > frame.right + 1
                        || place.top < frame.top - 1 || place.bottom > frame.bottom + 1;
                }).map(text => text.textContent);
            })"""
            assert window.evaluate(outside) == []
            sizes = "[...document.querySelectorAll('svg.chart')].map(each => each.getBoundingClientRect().width)"
            assert min(window.evaluate(sizes)) > 330  # 11 px letters are 8 px there at the least


def test_labels_do_not_lie_upon_each_other(everything: Path, engines: Path, window: Browser) -> None:
    for path in (everything, engines):
        window.open(path)
        overlapping = """[...document.querySelectorAll('svg.chart')].flatMap(image => {
            const places = [...image.querySelectorAll('text')].map(text => [text, text.getBoundingClientRect()]);
            return places.flatMap(([one, a], index) => places.slice(index + 1).filter(([other, b]) =>
                a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3
            ).map(([other]) => one.textContent + ' / ' + other.textContent));
        })"""
        assert window.evaluate(overlapping) == []


def test_rows_are_sorted_and_filtered(engines: Path, window: Browser) -> None:
    window.open(engines)
    column = f"{ROWS}.map(row => row.cells[3].textContent)"
    heading = "document.querySelectorAll('.sortable th')[3]"
    assert window.evaluate(f"{heading}.textContent") == "tokens/s"
    before = window.evaluate(column)
    assert window.evaluate(f"{heading}.click(); {column}") == sorted(before, key=float, reverse=True)
    assert window.evaluate(f"{heading}.click(); {column}") == sorted(before, key=float)
    speedups = f"{ROWS}.map(row => row.cells[7].textContent)"
    window.evaluate("document.querySelectorAll('.sortable th')[7].click()")
    assert window.evaluate(speedups)[-3:] == ["-", "-", "-"]  # plain decoding has none, and comes last
    window.evaluate(
        "filter = document.querySelector('.filter'); filter.value = 'vllm eagle';"
        "filter.dispatchEvent(new Event('input'))"
    )
    names = window.evaluate(f"{ROWS}.map(row => row.cells[0].textContent + ' ' + row.cells[1].textContent)")
    assert names == ["vllm eagle"] * 3


def test_what_is_written_can_be_read_in_light_and_dark(engines: Path, window: Browser) -> None:
    """Contrast as WCAG 2.1 has it: 4.5 of text, 3 of lines and points."""
    measured = """(() => {
        const parts = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const light = text => {
            const [r, g, b] = parts(text).map(each => each / 255)
                .map(each => each <= 0.03928 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const colour = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
        const page = light(colour('body', 'backgroundColor')), raised = light(colour('figure', 'backgroundColor'));
        const points = [...document.querySelectorAll('svg.chart path.point')];
        return {
            page: page,
            text: Math.min(
                ...['body', '.about', 'a'].map(each => contrast(light(colour(each, 'color')), page)),
                contrast(light(colour('svg.chart text', 'fill')), raised)),
            points: Math.min(...points.map(each => contrast(light(getComputedStyle(each).fill), raised))),
        };
    })()"""
    grounds = []
    for dark in (False, True):
        window.open(engines, dark=dark)
        found = window.evaluate(measured)
        assert found["text"] >= 4.5
        assert found["points"] >= 3
        grounds.append(found["page"])
    assert grounds[0] > 0.9 > 0.05 > grounds[1]


def test_a_script_error_would_be_seen(tmp_path: Path, window: Browser) -> None:
    (tmp_path / "broken.html").write_text("<script>undefined.name</script><img src='http://127.0.0.1:9/x'>")
    window.open(tmp_path / "broken.html", 400)
    assert any("TypeError" in error for error in window.errors())
    assert len(window.requests()) == 2
