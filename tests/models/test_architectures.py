"""Every architecture is decoded as documented: equal to `transformers.generate`, or refused with a reason.

If not: PYTHONPATH=tests python -m helpers.architectures [NAME ...]
"""

from __future__ import annotations

import pytest
from helpers.architectures import LISTED, OTHERS, PAGE, Case, outcome, page

each = {"ids": lambda case: case.name, "argnames": "case"}


def rows() -> dict[str, str]:
    """The page's rows by name."""
    return {line.split("`")[1]: line for line in PAGE.read_text().splitlines(True) if line.startswith("| `")}


@pytest.mark.parametrize(argvalues=LISTED, **each)
def test_an_architecture_is_decoded_as_documented(case: Case) -> None:
    assert outcome(case).row() == rows()[case.name]


@pytest.mark.slow
@pytest.mark.parametrize(argvalues=OTHERS, **each)
def test_a_further_architecture_is_decoded_as_documented(case: Case) -> None:
    assert outcome(case).row() == rows()[case.name]


def test_the_page_has_these_rows_and_none_is_decoded_wrongly() -> None:
    assert PAGE.read_text() == page(rows())
    assert len(rows()) == len(LISTED) + len(OTHERS)
    assert "DIFFERS" not in PAGE.read_text()
