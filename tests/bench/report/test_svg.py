"""How charts are drawn: what a reader sees is the data, in every color scheme and for screen readers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from bench.report.charts import files, scales, svg
from bench.report.charts.model import Bars, Chart, Line, Picture, Rows, Series

HOSTILE = "\"><script>alert(1)</script>\x00&amp;'"

CHART = Chart(
    "name",
    "what\nof which",
    "gamma: tokens",
    "speed-up",
    (
        Series("a", (1.0, 2.0, 4.0), (1.0, 1.5, 3.0), 0, (0.5, 1.0, 2.0), (2.0, 2.5, 3.5), num_detached=1),
        Series("b", (1.0, 4.0), (0.25, 2.0), 1),
        Series("b: predicted", (1.0, 4.0), (0.5, 1.75), 1, dashed=True),
    ),
)


ROWS = Rows("name", "what\nof which", "speed-up", (Line("a", 1.5, 1.25, 2.0, 0, 1.75), Line("b", 0.5, 0.5, 0.5, 1)))
BARS = Bars("name", "what\nof which", "share", ("draft", "scoring"), (("a", "1 ms", (0.25, 0.75)),))


def body(drawn: str) -> ET.Element:
    """A chart without its legend."""
    root = ET.fromstring(drawn)
    for key in [each for each in root if each.get("transform")]:
        root.remove(key)
    return root


def drawn_as(root: ET.Element, tag: str, class_: str) -> list[ET.Element]:
    return [each for each in root.iter(tag) if class_ in each.get("class", "").split()]


def scale_of(root: ET.Element, axis: str, class_: str) -> tuple[float, float]:
    """(coordinate of 0, length of 1) of an axis, by two of its labels: as a reader finds it."""
    labels = [each for each in drawn_as(root, "text", class_) if re.fullmatch(r"[\d.]+", each.text or "")]
    found = {float(each.text or ""): float(each.get(axis, "")) for each in labels}
    (first, start), (last, end) = min(found.items()), max(found.items())
    unit = (end - start) / (last - first)
    return start - first * unit, unit


def paths(root: ET.Element, pattern: str) -> list[tuple[float, ...]]:
    """The numbers that a pattern captures in the paths that it matches."""
    found = [re.match(pattern, each.get("d", "")) for each in root.iter("path")]
    return [tuple(map(float, match.groups())) for match in found if match]


def test_marks_are_at_the_positions_of_their_values() -> None:
    root = body(svg.draw(CHART))
    x0, x1 = scale_of(root, "x", "mid")
    y0, y1 = scale_of(root, "y", "end")
    y0 -= 4  # a label is that much lower than its line
    starts = [re.match(r"M([\d.]+) ([\d.]+)", each.get("d", "")) for each in drawn_as(root, "path", "point")]
    read = [((float(start[1]) - x0) / x1, (float(start[2]) - y0) / y1) for start in starts if start]
    expected = [point for series in CHART.series if not series.dashed for point in zip(series.x, series.y, strict=True)]
    assert [y for _, y in read] == pytest.approx([y for _, y in expected], abs=0.01)
    assert [x for x, _ in read] == pytest.approx([x for x, _ in expected], abs=0.04)  # moved apart
    ends = [tuple((y - y0) / y1 for y in pair) for pair in paths(root, r"M[\d.]+ ([\d.]+)V([\d.]+)M")]
    assert ends == [pytest.approx(pair, abs=0.01) for pair in ((0.5, 2.0), (1.0, 2.5), (2.0, 3.5))]
    lines = {kind: [each.get("d", "").count("L") for each in drawn_as(root, "path", kind)] for kind in ("dash", "line")}
    assert lines == {"dash": [1], "line": [1, 1]}


def test_one_long_interval_does_not_squeeze_everything_else() -> None:
    """It continues beyond the axis, without a cap; the tooltip has its end."""
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
    root = body(svg.draw(ROWS))
    x0, x1 = scale_of(root, "x", "mid")
    starts = [re.match(r"M([\d.]+)", each.get("d", "")) for each in drawn_as(root, "path", "point")]
    assert [(float(start[1]) - x0) / x1 for start in starts if start] == pytest.approx([1.5, 0.5], abs=0.01)
    whiskers = [tuple((x - x0) / x1 for x in pair) for pair in paths(root, r"M([\d.]+) [\d.]+H([\d.]+)M")]
    assert whiskers == [pytest.approx((1.25, 2.0), abs=0.01), pytest.approx((0.5, 0.5), abs=0.01)]
    (predicted,) = drawn_as(root, "line", "predicted")
    assert (float(predicted.get("x1", "")) - x0) / x1 == pytest.approx(1.75, abs=0.01)
    widths = [float(each.get("width", "")) for each in drawn_as(body(svg.draw(BARS)), "rect", "part")]
    assert widths[1] == pytest.approx(3 * widths[0], rel=1e-3)


def test_an_axis_of_rows_need_not_begin_at_0() -> None:
    rows = Rows("", "", "", (Line("a", 0.98, 0.96, 1.01),), x_min=0.96, x_max=1.07)
    labels = [each.text for each in drawn_as(body(svg.draw(rows)), "text", "mid") if each.text]
    assert labels == ["0.95", "0.975", "1", "1.025", "1.05", "1.075"]


@pytest.mark.parametrize(
    ("most", "labels"),
    [(1.0, "0 0.2 0.4 0.6 0.8 1"), (2.86, "0 1 2 3"), (0.29, "0 0.1 0.2 0.3"), (4000.0, "0 1,000 2,000 3,000 4,000")],
)
def test_ticks_are_round_and_hold_all(most: float, labels: str) -> None:
    assert " ".join(label for _, label in scales.ticks(most)) == labels
    assert scales.ticks(most)[-1][0] >= most


def test_labels_of_an_axis_do_not_overlap() -> None:
    sizes = tuple(float(2**power) for power in range(20))
    drawn = svg.draw(Chart("", "", "", "", (Series("", sizes, sizes),), log_x=True))
    labels = re.findall(r'<text x="([\d.]+)" y="256" class="mid">([\d,]+)</text>', drawn)
    ends = [(float(x) - 3 * len(text), float(x) + 3 * len(text)) for x, text in labels]
    assert len(labels) > 5
    assert all(right < left for (_, right), (left, _) in pairwise(ends))
    assert labels[-1][1] == "524,288"


def test_colors_and_markers_tell_methods_apart() -> None:
    style = svg.STYLE.read_text()
    assert len(set(svg.MARKERS)) == svg.NUM_KINDS
    for scheme in (style[: style.index("@media")], style[style.index("@media") :]):
        colors = re.findall(r"--k\d: (#\w+);", scheme)
        assert len(set(colors)) == len(colors) == svg.NUM_KINDS


@pytest.mark.parametrize(
    ("picture", "description", "keys"),
    [
        (
            CHART,
            "speed-up, by gamma: tokens. a: 1 [0.5, 2] at gamma 1 to 3 [2, 3.5] at gamma 4; "
            "b: 0.25 at gamma 1 to 2 at gamma 4; b: predicted: 0.5 at gamma 1 to 1.75 at gamma 4.",
            ["a", "b", "dashed: predicted"],
        ),
        (ROWS, "speed-up. a: 1.50 [1.25, 2.00]; b: 0.50.", ["plain decoding", "predicted, prefill excluded"]),
        (BARS, "share, divided into draft, scoring. a: 1 ms.", ["draft", "scoring"]),
    ],
)
def test_a_chart_has_a_title_a_description_and_a_legend(picture: Picture, description: str, keys: list[str]) -> None:
    root = ET.fromstring(svg.draw(picture))
    assert root.get("role") == "img"
    assert [(each.tag, each.text) for each in root[:2]] == [("title", "what"), ("desc", description)]
    assert [each.text for each in drawn_as(root, "text", "key")] == keys


def test_every_point_has_a_tooltip() -> None:
    groups = [each for each in body(svg.draw(CHART)).iter("g") if each.find("path[@class='point']") is not None]
    tips = [each.findtext("title") for each in groups]
    assert tips == [
        *("a, gamma 1: 1 [0.5, 2]", "a, gamma 2: 1.5 [1, 2.5]", "a, gamma 4: 3 [2, 3.5]"),
        *("b, gamma 1: 0.25", "b, gamma 4: 2"),
    ]


def test_a_file_has_the_chart_between_its_title_and_its_source() -> None:
    root = ET.fromstring(files.document(ROWS, "a machine, " * 20))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    lines = list(root.iter("{http://www.w3.org/2000/svg}text"))
    texts = [each.text for each in lines]
    assert texts[:4] == ["what", "of which", "a", "1.50 [1.25, 2.00]"]
    assert " ".join(str(each) for each in texts[-3:]) == ("a machine, " * 20).strip()
    _, y, _, height = map(float, root.get("viewBox", "").split())
    assert y + height > float(lines[-1].get("y", "")) > float(lines[-2].get("y", ""))
    assert root.find("{http://www.w3.org/2000/svg}style") is not None


@pytest.mark.parametrize(
    "picture",
    [
        Chart("name", HOSTILE, HOSTILE, HOSTILE, (Series(HOSTILE, (1.0,), (1.0,), names=(HOSTILE,)),)),
        Rows("name", HOSTILE, HOSTILE, (Line(HOSTILE, 1.0, 1.0, 1.0),), reference_label=HOSTILE),
        Bars("name", HOSTILE, HOSTILE, (HOSTILE,), ((HOSTILE, HOSTILE, (1.0,)),)),
    ],
)
def test_text_is_escaped_wherever_it_comes_from(picture: Picture) -> None:
    for drawn in (svg.draw(picture), files.document(picture, HOSTILE)):
        tags = {each.tag.rpartition("}")[2] for each in ET.fromstring(drawn).iter()}
        assert tags <= {"svg", "title", "desc", "style", "g", "rect", "text", "line", "path"}
        assert "<script" not in drawn
