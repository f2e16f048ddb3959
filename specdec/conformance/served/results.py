"""What an audit leaves behind: the certificate as JSON, as a page and as JUnit XML, and the exit status."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from specdec.conformance.certificate import Certificate, Verdict

EXIT_STATUS: dict[Verdict, int] = {"lossless": 0, "lossy": 1, "inconclusive": 3}  # 2 is an error of the command line
OUTCOME: dict[Verdict, str] = {"lossy": "failure", "inconclusive": "error"}  # elements of JUnit's format


def write(certificate: Certificate, folder: Path, name: str) -> None:
    """Write NAME.json, NAME.md and NAME.xml into a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    certificate.save(folder / f"{name}.json")
    (folder / f"{name}.md").write_text(certificate.markdown())
    (folder / f"{name}.xml").write_bytes(junit(certificate, name))


def junit(certificate: Certificate, name: str) -> bytes:
    """One test case, which fails if the engine is lossy and is an error if the audit is inconclusive."""
    findings = certificate.findings
    outcome = OUTCOME.get(findings.verdict)
    counts = {kind: str(int(outcome == kind[:-1])) for kind in ("failures", "errors")}
    suite = ElementTree.Element("testsuite", {"name": "specdec audit", "tests": "1", **counts})
    case = ElementTree.SubElement(suite, "testcase", {"classname": "specdec.audit", "name": name})
    if outcome:
        ElementTree.SubElement(case, outcome, {"message": findings.headline}).text = "\n".join(findings.reasons)
    ElementTree.SubElement(case, "system-out").text = str(findings)
    ElementTree.indent(suite)
    return bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))
