"""The committed verdicts: their page shows the contents of every file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench.measure.cells import audit
from bench.tools import certificates, detection_power, divergences
from specdec.conformance.certificate import Certificate
from specdec.conformance.divergence import Divergence

BASELINES = Path(__file__).parents[3] / "bench" / "baselines"
FOLDER = BASELINES / "certificates"
PAGE = (FOLDER / "README.md").read_text()
PATHS = sorted(FOLDER.glob("*.json"))


def found_mutants() -> list[detection_power.Finding]:
    return [
        detection_power.Finding(**record) for record in json.loads((BASELINES / "audits" / "power.json").read_text())
    ]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_certificate_is_in_the_table_and_has_its_page(path: Path) -> None:
    certificate = Certificate.load(path)
    assert certificates.row(path) in PAGE
    assert path.with_name(f"{path.name[: -len('.json')]}.md").read_text() == certificate.markdown()
    assert audit.file_name(certificate) == path.name[: -len(".json")]
    assert certificate.subject.command.startswith("pytest bench/ -m equivalence")
    assert not re.search(r"(^|[\s='\"])/\w", certificate.subject.command), "a path of one machine"


def test_the_table_has_no_others() -> None:
    assert len(PATHS) >= 30
    assert len(re.findall(r"\]\([\w=.-]+-4-[\w=.-]+\.md\)", PAGE)) == len(PATHS)


def test_no_verdict_stands_without_its_bound() -> None:
    texts = [PAGE.split("## Verdicts")[1].split("\n- **")[0], *(path.with_suffix(".md").read_text() for path in PATHS)]
    for text in texts:
        assert not re.search(r"(\[|# )lossless(?! \(TV < 0\.\d)", text)


def test_specdec_is_lossless_by_every_method_and_rule() -> None:
    records = [Certificate.load(path).record() for path in PATHS]
    own = {(each["method"], each["verification"]): each["verdict"] for each in records if each["engine"] == "specdec"}
    assert set(own.values()) == {"lossless"}
    assert len(own) == 12


def test_the_page_has_the_table_of_mutants() -> None:
    found = found_mutants()
    assert list(dict.fromkeys(each.mutant for each in found)) == list(detection_power.PLANTED)
    for each in found:
        assert detection_power.line(each) in PAGE


def test_mutants_of_a_twentieth_are_found_and_the_sound_engine_is_not() -> None:
    sound, *mutants = found_mutants()
    assert (sound.found_by, sound.errors, sound.num_draws) == ({}, [], 20_000)
    large = [each for each in mutants if each.size is not None and each.size >= 0.05]
    assert len(large) >= 5
    unseen = {each.mutant for each in large if not each.found_by}
    assert unseen == {"M15 draft drawn in low precision"}  # its errors cancel over contexts; the page says so
    assert all(min(each.found_by.values()) <= 20_000 for each in large if each.found_by)


def test_the_page_has_the_divergences() -> None:
    for record in json.loads((BASELINES / "audits" / "divergences.json").read_text()):
        parting = divergences.Parting(**record | {"divergence": Divergence(**record["divergence"])})
        assert divergences.line(parting) in PAGE
