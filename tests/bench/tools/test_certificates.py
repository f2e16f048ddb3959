"""The committed verdicts, the gallery that shows every one of them, and the pages about them."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from bench.catalogue.methods import SMOKE_METHODS
from bench.measure.cells import audit
from bench.tools import detection_power, divergences, gallery
from specdec.conformance.certificate import Certificate
from specdec.conformance.divergence import Divergence
from specdec.methods import VERIFICATION_NAMES

ROOT = Path(__file__).parents[3]
BASELINES = ROOT / "bench" / "baselines"
FOLDER = BASELINES / "certificates"
PAGE = (FOLDER / "README.md").read_text()
GALLERY = (ROOT / "docs" / "gallery.md").read_text()
PATHS = sorted(FOLDER.glob("*.json"))
FOUR = {"draft_model", "eagle", "hybrid", "ngram"}
SERVED = sorted((BASELINES / "audits" / "served").glob("*.json"))


def found_mutants() -> list[detection_power.Finding]:
    return [
        detection_power.Finding(**record) for record in json.loads((BASELINES / "audits" / "power.json").read_text())
    ]


def test_the_committed_gallery_is_the_generated_one() -> None:
    assert gallery.page() == GALLERY, "run python -m bench.tools.gallery > docs/gallery.md"


@pytest.mark.parametrize("path", [*PATHS, *SERVED], ids=lambda path: path.stem)
def test_a_certificate_is_in_the_gallery_and_has_its_page(path: Path) -> None:
    certificate = Certificate.load(path)
    subject, name = certificate.subject, path.name.removesuffix(".json")
    assert f"{name}.md)" in GALLERY
    assert f"\n{subject.command}\n```" in GALLERY
    assert path.with_name(f"{name}.md").read_text() == certificate.markdown()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", certificate.date or "")
    assert not re.search(r"(^|[\s='\"])/\w", subject.command), "a path of one machine"
    if path in PATHS:
        assert audit.file_name(certificate) == name
        assert subject.command.startswith("pytest bench/ -m equivalence")


def test_the_gallery_has_no_others() -> None:
    assert len(PATHS) >= 30
    rows = [row for row in GALLERY.splitlines() if re.search(r"\| \[.*\]\(.*\.md\) \|", row)]
    assert len(rows) == len(PATHS) + len(SERVED)


def test_an_audit_over_http_says_how_its_servers_were_started() -> None:
    served = [entry for entry in gallery.entries() if entry.path in SERVED]
    assert len(served) == len(SERVED)
    assert [entry.path.stem for entry in served if not entry.servers] == []


def test_each_lossy_verdict_is_a_fault_with_a_reproduction() -> None:
    """By a script without an audit, and nothing lossless is named as one."""
    faults = tomllib.loads(gallery.GALLERY.read_text())["faults"]
    shown = {name for fault in faults for name in fault["certificates"]}
    records = {path: Certificate.load(path).record() for path in (*PATHS, *SERVED)}
    lossy = {path.relative_to(BASELINES).as_posix() for path, record in records.items() if record["verdict"] == "lossy"}
    assert lossy == {f"{name}.json" for name in shown}
    for fault in faults:
        compile((BASELINES / fault["script"]).read_text(), fault["script"], "exec")
        assert Path(fault["script"]).name in fault["command"]
        assert f"### {fault['title']}\n" in GALLERY


def test_no_verdict_stands_without_its_bound() -> None:
    texts = [GALLERY, *(path.with_name(f"{path.name[:-5]}.md").read_text() for path in (*PATHS, *SERVED))]
    for text in texts:
        assert not re.search(r"(\[|# )lossless(?! \(TV < 0\.\d)", text)


def test_specdec_is_lossless_by_every_method_and_rule() -> None:
    """Each method that has a draft for the pair, sampled and greedy; each rule with four of them."""
    records = [Certificate.load(path).record() for path in PATHS]
    own = [each for each in records if each["engine"] == "specdec"]
    assert {each["verdict"] for each in own} == {"lossless"}
    drafting = set(SMOKE_METHODS) - {"autoregressive"}
    assert {each["method"] for each in own if each["sampling"]["temperature"] == 0} == drafting
    assert {each["method"] for each in own if each["sampling"]["temperature"] == 1} >= FOUR
    for rule in VERIFICATION_NAMES:
        assert {each["method"] for each in own if each["verification"] == rule} >= FOUR


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
