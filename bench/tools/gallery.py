"""Print the gallery, docs/gallery.md: `python -m bench.tools.gallery > docs/gallery.md`.

It shows every committed certificate: engine, method, sampling, verdict with its bound, tokens, date and command, and a
reproduction of each fault. What certificates do not contain is in GALLERY: how servers were started, and the faults.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.records.schema import PLAIN, Record
from bench.report.format import verdict
from specdec.conformance.certificate import Certificate

BASELINES = Path(__file__).parents[1] / "baselines"
FOLDERS = (BASELINES / "certificates", BASELINES / "audits" / "served")  # audits in process, and over HTTP
GALLERY = BASELINES / "audits" / "gallery.toml"
FROM_PAGE = "../bench/baselines"  # of links

INTRODUCTION = """\
# Gallery of audits

<!-- written by: python -m bench.tools.gallery > docs/gallery.md -->

Every committed audit, {counts}. [Auditing an engine](auditing.md) describes the method, and what each verdict means.
Each verdict links to a page with all p-values and seeds. SmolLM2-135M-Instruct on 2 cores of an AMD EPYC without a GPU,
while other processes ran; verdicts do not depend on that.

- *p*: with speculation, and of the same engine without it; corrected for the number of tests.
- *tokens*: tested in each arm. *drafted*, *accepted*: of the speculative arm; "?" if they were not counted.
- *would have been found*: total variation distance per token, in hundredths, towards or away from the draft, that would
  have been missed with probability 1e-6 at most. *at most*: upper bound on that distance, with the same confidence.
  Smaller differences, and other directions, may go unseen.
- Greedy decoding is judged by equality: a token must be the reference's argmax but for ties that rounding decides."""

HEAD = (
    "| method | verification | sampling | verdict | p with | p without | tokens | drafted | accepted | "
    "would have been found | at most | date | command |\n" + "|---" * 13 + "|"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A certificate's record, where it is, and how its servers were started (for an audit in process: nothing)."""

    path: Path
    record: Record
    servers: str | None

    @property
    def section(self) -> tuple[str, str, bool]:
        """Engine, version, and whether it was audited over HTTP: what a table of the page has in common."""
        return self.record["engine"], self.record["engine_version"] or "", self.path.parent == FOLDERS[1]

    @property
    def command(self) -> str:
        """What repeats the audit."""
        return "\n".join(filter(None, (self.servers, self.record["command"])))


def entries() -> list[Entry]:
    """All committed certificates, by section and name."""
    servers = tomllib.loads(GALLERY.read_text())["servers"]
    paths = [path for folder in FOLDERS for path in folder.glob("*.json")]
    found = [Entry(path, Certificate.load(path).record(), _servers(path.stem, servers)) for path in paths]
    return sorted(found, key=lambda entry: (entry.section, entry.path.stem))


def _servers(name: str, known: dict[str, str]) -> str | None:
    """By the longest known beginning of a certificate's name."""
    return next((known[start] for start in sorted(known, key=len, reverse=True) if name.startswith(start)), None)


def page() -> str:
    """The whole page, in Markdown."""
    shown = entries()
    faults = tomllib.loads(GALLERY.read_text())["faults"]
    parts = [INTRODUCTION.format(counts=_counts(shown)), "## Faults", *(fault(each) for each in faults)]
    for key, of_section in groupby(shown, lambda entry: entry.section):
        parts += section(key, list(of_section))
    return "\n\n".join(parts) + "\n"


def _counts(shown: Sequence[Entry]) -> str:
    by_verdict = Counter(entry.record["verdict"] for entry in shown)
    listed = ", ".join(f"{by_verdict[name]} {name}" for name in ("lossless", "lossy", "inconclusive"))
    return f"{len(shown)} in all: {listed}"


def fault(given: dict[str, Any]) -> str:
    """A fault: what it is, which certificates show it, and the script that reproduces it without an audit."""
    shown_by = [f"[{name.rpartition('/')[2]}]({FROM_PAGE}/{name}.md)" for name in given["certificates"]]
    script = given["script"]
    return "\n\n".join(
        filter(
            None,
            (
                f"### {given['title']}",
                given["text"].strip(),
                f"Shown by {', '.join(shown_by)}." if shown_by else "",
                f"To reproduce, [{script.rpartition('/')[2]}]({FROM_PAGE}/{script}): `{given['command']}` prints",
                f"```text\n{given['output'].strip()}\n```",
            ),
        )
    )


def section(key: tuple[str, str, bool], shown: Sequence[Entry]) -> Iterator[str]:
    """A table of the certificates of one engine and version, and the commands that repeat them."""
    engine, version, is_served = key
    commands = list(dict.fromkeys(entry.command for entry in shown))
    yield f"## {' '.join(filter(None, (engine, version)))}{', over HTTP' if is_served else ''}"
    yield "\n".join([HEAD, *(row(entry, 1 + commands.index(entry.command)) for entry in shown)])
    for number, command in enumerate(commands, 1):
        yield f"Command {number}:\n\n```text\n{command}\n```"


def row(entry: Entry, command: int) -> str:
    """A certificate in the table of its section. command: the number of its command."""
    record = entry.record
    link = (FROM_PAGE / entry.path.relative_to(BASELINES)).as_posix().removesuffix(".json")
    cells = (
        _method(record),
        record["verification"] or "",
        _sampling(record["sampling"]),
        f"[{verdict(record)}]({link}.md)",
        f"{record['p_value']:.2g}",
        f"{record['control_p_value']:.2g}",
        record["num_draws"],
        *("?" if record[name] is None else record[name] for name in ("num_drafted", "num_accepted")),
        f"{100 * record['min_detectable_tv']:.3g}",
        f"{100 * record['tv_upper_bound']:.3g}",
        record["date"] or "",
        command,
    )
    return f"| {' | '.join(map(str, cells))} |"


def _method(record: Record) -> str:
    draft = json.loads(record["options"] or "{}").get("speculative_config", {}).values()
    return " ".join(map(str, filter(None, (record["method"], record["gamma"], *draft))))


def _sampling(sampling: Record) -> str:
    if sampling["temperature"] == 0:
        return "greedy"
    others = [f"{name} {sampling[name]:g}" for name in ("top_k", "top_p") if sampling[name] != PLAIN[name]]
    return ", ".join([f"T = {sampling['temperature']:g}", *others])


def main() -> None:
    print(page(), end="")


if __name__ == "__main__":
    main()
