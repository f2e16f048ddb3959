"""Tables for a terminal, as they are printed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bench.report.document import Table, table
from bench.report.terminal import grid


def test_numbers_are_right_aligned_and_texts_left() -> None:
    shown = table(
        ["name", "tokens per second", "verdict", "none"], [["a", "9.5", "faster", "-"], ["bc", "10.0", "-", "-"]]
    )
    assert grid.lines(shown) == [
        "     tokens",
        "        per",
        "name second verdict",
        "a       9.5 faster",
        "bc     10.0 -",
    ]


def wide(*labels: str) -> Table:
    headings = [*labels, *(f"number{index}" for index in range(9))]
    rows = [[*(f"{label}{row // 2**place}" for place, label in enumerate(labels)), *["1"] * 9] for row in range(4)]
    return table(headings, rows, num_labels=len(labels))


def test_a_wide_table_continues_below_with_its_labels() -> None:
    lines = grid.lines(wide("name"))
    assert lines[0] == "name  " + " ".join(f"number{index}" for index in range(9))
    lines = grid.lines(wide("a-much-longer-name"))
    assert lines[0].split() == ["a-much-longer-name", *(f"number{index}" for index in range(7))]
    assert lines[5] == ""
    assert lines[6].split() == ["a-much-longer-name", "number7", "number8"]
    assert [line.split()[0] for line in lines[1:5]] == [line.split()[0] for line in lines[7:]]


def test_constant_settings_are_in_the_title() -> None:
    rows = [["same-engine-name", f"method{row}", *["1"] * 9] for row in range(3)]
    lines = grid.lines(table(["engine", "method", *(f"number{index}" for index in range(9))], rows, num_labels=2))
    assert lines[0] == "engine same-engine-name:"
    assert lines[1].split()[0] == "method"
    assert lines[2].split() == ["method0", *["1"] * 9]


def test_a_long_text_stands_below_its_row() -> None:
    why = "because it is much longer than a column can be, it is wrapped to the width of the terminal, too"
    assert grid.lines(table(["cell", "verdict", "why"], [["a", "slower", why], ["b", "faster", "-"]])) == [
        "cell verdict",
        "a    slower",
        "    because it is much longer than a column can be, it is wrapped to the width",
        "    of the terminal, too",
        "b    faster",
    ]


words = st.text("ab c1,.", max_size=30).map(str.strip)


@given(st.data(), st.integers(1, 3), st.integers(1, 12), st.integers(1, 6))
def test_every_line_fits_and_no_cell_is_lost(
    data: st.DataObject, num_labels: int, num_values: int, num_rows: int
) -> None:
    """Labels of up to twenty letters each leave room for the values."""
    label = st.text("xyz", min_size=1, max_size=18)
    rows = [
        [data.draw(label) for _ in range(num_labels)] + [data.draw(words) or "-" for _ in range(num_values)]
        for _ in range(num_rows)
    ]
    headings = [f"h{index}" for index in range(num_labels + num_values)]
    lines = grid.lines(table(headings, rows, num_labels=num_labels))
    assert max(map(len, lines)) <= grid.WIDTH
    printed_text = " ".join(" ".join(lines).split())
    for row in rows:
        for cell in row:
            assert cell == "-" or " ".join(cell.split()) in printed_text
