"""Print the certificates of a folder as a Markdown table: `python -m bench.tools.certificates FOLDER`."""

from __future__ import annotations

import json
from pathlib import Path

from bench.records.schema import PLAIN, Record
from bench.report.format import verdict
from specdec.conformance.certificate import Certificate
from specdec.runtime.command_line import Parser

HEAD = (
    "| engine | method | verification | sampling | verdict | p with speculation | p without | tokens | "
    "would have been found | differs by at most |\n|---|---|---|---|---|---|---|---|---|---|"
)


def row(path: Path) -> str:
    """A certificate in a table, with a link to its page. Distances are in hundredths of probability."""
    record = Certificate.load(path).record()
    draft = " ".join(json.loads(record["options"] or "{}").get("speculative_config", {}).values())
    method = " ".join(filter(None, (record["method"], str(record["gamma"]), draft)))
    cells = (
        " ".join(filter(None, (record["engine"], record["engine_version"]))),
        method,
        record["verification"] or "",
        _sampling(record["sampling"]),
        f"[{verdict(record)}]({path.name.removesuffix('.json')}.md)",
        f"{record['p_value']:.2g}",
        f"{record['control_p_value']:.2g}",
        record["num_draws"],
        f"{100 * record['min_detectable_tv']:.3g}",
        f"{100 * record['tv_upper_bound']:.3g}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _sampling(sampling: Record) -> str:
    if sampling["temperature"] == 0:
        return "greedy"
    others = [f"{name} {sampling[name]:g}" for name in ("top_k", "top_p") if sampling[name] != PLAIN[name]]
    return ", ".join([f"T = {sampling['temperature']:g}", *others])


def main() -> None:
    parser = Parser(prog="python -m bench.tools.certificates", description=__doc__)
    parser.add_argument("folder", type=Path, help="where certificates are, as JSON")
    print(HEAD)
    for path in sorted(parser.parse_args().folder.glob("*.json")):
        print(row(path))


if __name__ == "__main__":
    main()
