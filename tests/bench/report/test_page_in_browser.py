"""The page in a real browser: no errors, nothing fetched, everything visible, at any width, in light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import pytest

pytest.importorskip("playwright", reason="needs Playwright: pip install playwright")

from helpers import browser
from helpers.bench_runs import audited, decoded, loaded, sized, write
from helpers.browser import Opened, opened
from playwright.sync_api import Browser

from bench.records import campaigns
from bench.report import history, rendering
from bench.report.charts import files
from bench.report.charts import run as charts
from bench.report.html import page

PROGRAM = browser.executable()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs a browser: apt-get install chromium")

BASELINES = Path(__file__).parents[3] / "bench" / "baselines"
WIDTH = "document.documentElement.scrollWidth"  # innerWidth grows with it on telephones
# elements that take up space, of all that a selector finds
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
    """The page of a committed run, as it is rendered now."""
    path = tmp_path_factory.mktemp("page") / "engines-cpu.html"
    path.write_text(page.render(rendering.document(campaigns.read_all([BASELINES / "engines-cpu.json"]))))
    return path


@pytest.fixture(scope="module")
def trends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of thirty runs, of which a cell changes its level."""
    folder = tmp_path_factory.mktemp("nights")
    for night in range(1, 31):
        speed = (2.0 if night < 20 else 1.7) + 0.01 * (night % 3)
        records = [decoded("ngram", 2, speedup=speed, speedup_low=speed - 0.1, speedup_high=speed + 0.1)]
        write(folder / f"{night}.json", [*records, decoded("eagle", 2)], datetime=f"2026-03-{night:02}T04:00:00+00:00")
    (folder / "page.html").write_text(page.render(history.document(campaigns.read_folder(folder))))
    return folder / "page.html"


def check_is_clean(found: Opened, path: Path, width: int) -> None:
    assert (found.errors, found.requests) == ([], [path.as_uri()])
    assert found.page.evaluate(WIDTH) <= width


@pytest.mark.parametrize("width", [1280, 400])
def test_a_real_run_is_rendered_completely(width: int, engines: Path, window: Browser) -> None:
    tables, figures = engines.read_text().count("<table"), engines.read_text().count("<figure")
    assert figures >= 20
    with opened(window, engines, width) as found:
        check_is_clean(found, engines, width)
        assert found.page.evaluate(f"{SEEN}('figure svg.chart')") == figures
        assert found.page.evaluate(f"{SEEN}('table')") == tables - figures  # those of the figures are folded
        assert found.page.evaluate("document.querySelectorAll('svg.chart path.point').length") > 100


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("script", [True, False])
def test_all_kinds_of_cells_are_rendered_with_and_without_script(
    width: int, script: bool, everything: Path, window: Browser
) -> None:
    with opened(window, everything, width, script=script) as found:
        check_is_clean(found, everything, width)
        for title in ("What changed: after against before", "Under load", "Losslessness", "Step costs", "Glossary"):
            assert found.page.get_by_role("heading", name=title).first.is_visible()
        assert found.page.evaluate(f"{SEEN}('figure svg.chart')") == everything.read_text().count("<figure")
        assert found.page.evaluate(f"{ROWS}.length") == 10 + 4 + 4  # of the differences, and of each run's cells
        assert found.page.locator("input").count() == (3 if script else 0)


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_of_trends_is_rendered_with_its_changes(width: int, trends: Path, window: Browser) -> None:
    with opened(window, trends, width) as found:
        check_is_clean(found, trends, width)
        assert found.page.get_by_role("heading", name="Changes of level").is_visible()
        assert found.page.evaluate(f"{SEEN}('figure svg.chart')") == 4
        tips = "[...document.querySelectorAll('svg.chart g > title')].map(each => each.textContent)"
        assert [tip for tip in found.page.evaluate(tips) if tip.startswith("change")] == [
            "change at the run of 2026-03-20"
        ]


def test_charts_have_names_and_descriptions_for_screen_readers(engines: Path, window: Browser) -> None:
    with opened(window, engines) as found:
        charts = found.page.get_by_role("img", name=re.compile("^Speed-up over plain decoding, each method"))
        assert charts.count() == 1
        session = found.page.context.new_cdp_session(found.page)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        images = [each for each in nodes if each["role"]["value"] in ("image", "img", "graphics-document")]
        assert len(images) == engines.read_text().count("<figure")
        assert all(each["name"]["value"] for each in images)
        assert any("specdec ngram, gamma auto: 1.78 [1.34, 2.43]" in each["description"]["value"] for each in images)


@pytest.mark.parametrize("width", [1280, 400])
def test_figures_fill_their_frames_and_labels_are_inside(
    width: int, everything: Path, engines: Path, trends: Path, window: Browser
) -> None:
    outside = """[...document.querySelectorAll('svg.chart')].flatMap(image => {
        const frame = image.getBoundingClientRect();
        return [...image.querySelectorAll('text')].filter(text => {
            const place = text.getBoundingClientRect();
            return place.left < frame.left - 1 || place.right > frame.right + 1
                || place.top < frame.top - 1 || place.bottom > frame.bottom + 1;
        }).map(text => text.textContent);
    })"""
    sizes = "[...document.querySelectorAll('svg.chart')].map(each => each.getBoundingClientRect().width)"
    for path in (everything, engines, trends):
        with opened(window, path, width) as found:
            assert found.page.evaluate(outside) == []
            assert min(found.page.evaluate(sizes)) > 330  # letters of 11 are 8 pixels there


def test_labels_overlap_neither_each_other_nor_a_line(
    everything: Path, engines: Path, trends: Path, window: Browser
) -> None:
    overlapping = """[...document.querySelectorAll('svg.chart')].flatMap(image => {
        const box = each => [each, each.getBoundingClientRect()];
        const texts = [...image.querySelectorAll('text')].map(box);
        const lines = [...image.querySelectorAll('.reference, .grid, .predicted, .base, .track')].map(box);
        return texts.flatMap(([one, a], index) => [...texts.slice(index + 1), ...lines].filter(([other, b]) =>
            a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3
        ).map(([other]) => one.textContent + ' / ' + (other.textContent || other.getAttribute('class'))));
    })"""
    for path in (everything, engines, trends):
        with opened(window, path) as found:
            assert found.page.evaluate(overlapping) == []


def edges(found: Opened, region: str) -> list[float]:
    """How much each edge of an element differs from its middle, in the mean brightness of a column of pixels."""
    shot = found.page.locator(region).first.screenshot()
    brightness = matplotlib.image.imread(io.BytesIO(shot))[..., :3].mean((0, 2))
    middle = brightness[len(brightness) // 2 - 20 : len(brightness) // 2 + 20].max()
    return [abs(float(middle - brightness[index])) for index in (0, -2)]


def test_a_table_shows_on_which_side_it_scrolls(tmp_path: Path, window: Browser) -> None:
    cell = "".join(f"<td>{'&nbsp;' * 40}</td>" for _ in range(8))
    style = "".join(path.read_text() for path in page.STYLES)
    html = "<style>{}</style><div class=scroll><table><tr>{}</tr></table></div>"
    for dark in (False, True):
        for name, cells in (("wide", cell), ("narrow", "<td>a</td>")):
            (tmp_path / f"{name}.html").write_text(html.format(style, cells))
        with opened(window, tmp_path / "narrow.html", 400, dark=dark) as found:
            assert max(edges(found, ".scroll")) < 0.02
        with opened(window, tmp_path / "wide.html", 400, dark=dark) as found:
            left, right = edges(found, ".scroll")
            assert left < 0.02 < 0.05 < right
            found.page.evaluate("document.querySelector('.scroll').scrollLeft = 1e6")
            left, right = edges(found, ".scroll")
            assert right < 0.02 < 0.05 < left


def test_wide_tables_scroll_by_keyboard(engines: Path, window: Browser) -> None:
    with opened(window, engines, 400) as found:
        region = found.page.get_by_role("region", name="Every cell; --csv has all fields")
        assert region.evaluate("each => each.scrollWidth > each.clientWidth")
        region.focus()
        found.page.keyboard.press("ArrowRight")
        found.page.wait_for_function("document.activeElement.scrollLeft > 0")


def test_rows_are_sorted_and_filtered(engines: Path, window: Browser) -> None:
    with opened(window, engines) as found:
        column = f"{ROWS}.map(row => row.cells[3].textContent)"
        heading = found.page.locator(".sortable th").nth(3)
        assert heading.text_content() == "tokens/s"
        before = found.page.evaluate(column)
        heading.click()
        assert found.page.evaluate(column) == sorted(before, key=float, reverse=True)
        heading.click()
        assert found.page.evaluate(column) == sorted(before, key=float)
        found.page.locator(".sortable th").nth(5).click()
        # plain decoding has no speed-up, and comes last
        assert found.page.evaluate(f"{ROWS}.map(row => row.cells[5].textContent)")[-3:] == ["-", "-", "-"]
        found.page.locator(".filter").fill("vllm eagle")
        names = found.page.evaluate(f"{ROWS}.map(row => row.cells[0].textContent + ' ' + row.cells[1].textContent)")
        assert names == ["vllm eagle"] * 3


def test_text_and_points_have_contrast_in_light_and_dark(engines: Path, window: Browser) -> None:
    """The minimum of WCAG 2.1: 4.5 for text, 3 for points."""
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
        with opened(window, engines, dark=dark) as found:
            contrast = found.page.evaluate(measured)
        assert contrast["text"] >= 4.5
        assert contrast["points"] >= 3
        grounds.append(contrast["page"])
    assert grounds[0] > 0.9 > 0.05 > grounds[1]


def test_files_of_charts_are_shown_by_a_browser(tmp_path: Path, window: Browser) -> None:
    """As images, alone: in the size that they ask for, with all their text inside."""
    (run,) = campaigns.read_all([BASELINES / "engines-cpu.json"])
    for path in files.write(charts.pictures(run.pictured)[:2], tmp_path, "run", run.described()):
        (tmp_path / "image.html").write_text(f"<img src='{path.name}' alt=''>")
        with opened(window, tmp_path / "image.html") as found:
            assert found.page.evaluate("document.images[0].complete && document.images[0].naturalWidth") == 742
        with opened(window, path) as found:
            assert (found.errors, found.requests) == ([], [path.as_uri()])
            outside = """[...document.querySelectorAll('text')].filter(text => {
                const place = text.getBBox(), frame = document.documentElement.viewBox.baseVal;
                return text.parentNode === document.documentElement
                    && (place.x < 0 || place.x + place.width > frame.x + frame.width
                        || place.y < frame.y || place.y + place.height > frame.y + frame.height);
            }).length"""
            assert found.page.evaluate(outside) == 0


def test_a_script_error_is_detected(tmp_path: Path, window: Browser) -> None:
    (tmp_path / "broken.html").write_text("<script>undefined.name</script><img src='http://127.0.0.1:9/x'>")
    with opened(window, tmp_path / "broken.html", 400) as found:
        assert any("undefined" in error for error in found.errors)
        assert len(found.requests) == 2
