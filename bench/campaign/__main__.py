"""The cells of one command on several machines: `python -m bench.campaign --ray ADDRESS OPTIONS`.

OPTIONS are those of `pytest bench/`; --benchmark-json=FILE is needed and receives the merged run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.campaign import cluster
from bench.campaign.backups import rename_to_backup
from bench.campaign.cluster import Campaign, ClusterError, Command, Part
from bench.campaign.part import Outcome
from bench.records.campaigns import joined_files
from specdec.runtime.command_line import Parser


def main() -> None:
    parser = _parser()
    arguments, others = parser.parse_known_args()
    try:
        sys.exit(_run(arguments, others))
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: finished cells are kept; the same command with --resume continues\n")


def _parser() -> Parser:
    parser = Parser(prog="python -m bench.campaign", description=__doc__, allow_abbrev=False)
    parser.add_argument("--ray", required=True, metavar="ADDRESS", help="a running Ray cluster: auto, or HOST:PORT")
    parser.add_argument(
        "--retries", type=int, default=2, metavar="N", help="how often to run a part again if its node dies (default 2)"
    )
    parser.add_argument(
        "--resources",
        type=_resources,
        default={},
        metavar="JSON",
        help="custom resources of Ray that each part reserves, to choose nodes: '{\"h100\": 0.001}'",
    )
    return parser


def _resources(text: str) -> dict[str, float]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} must be a JSON object")
    return {str(name): float(number) for name, number in value.items()}


def _run(arguments: argparse.Namespace, others: Sequence[str]) -> int:
    """The exit status: 0 if every cell was measured or skipped, 1 if one failed or is missing."""
    cluster.load_ray()  # fail before anything else if it is missing
    command = cluster.read_command(_with_folder(others))
    ray = cluster.connect(arguments.ray)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    parts = cluster.parts_of(command.config, nodes)
    needs = {part: cluster.needs_of(part, nodes, arguments.resources) for part in parts}
    folder = _folder(command.config.journal, is_resumed=command.config.resume)
    outcomes = Campaign(ray, command.arguments, folder, arguments.retries).run(needs)
    return _finish(command, parts, outcomes, folder)


def _with_folder(options: Sequence[str]) -> list[str]:
    """The arguments of pytest: the benchmarks, unless a file of them is named."""
    return [*options] if any(each.startswith("bench/") for each in options) else ["bench/", *options]


def _folder(journal: Path, *, is_resumed: bool) -> Path:
    """The folder of the parts' journals; that of an earlier campaign is renamed unless it is resumed."""
    folder = journal.with_suffix("")
    if folder.exists() and not is_resumed:
        rename_to_backup(folder)
    return folder


def _finish(command: Command, parts: Sequence[Part], outcomes: Mapping[Part, Outcome], folder: Path) -> int:
    """Write the merged run, and report what failed."""
    for part, outcome in outcomes.items():
        if outcome.status:
            print(f"{part.name}: pytest ended with status {outcome.status}; see {folder / part.file_name}.txt")
    measured = [_written(folder / f"{part.file_name}.json", each) for part, each in outcomes.items() if each.results]
    if len(outcomes) < len(parts) or not measured:
        raise ClusterError(
            f"{len(parts) - len(outcomes)} of {len(parts)} parts are missing, and {len(measured)} have results; the "
            f"finished cells are in {folder}: use --resume to continue"
        )
    document = joined_files(measured, shlex.join(["python", "-m", "bench.campaign", *sys.argv[1:]]))
    command.results.write_text(json.dumps(document | {"commit_info": command.commit_info}, indent=4))
    print(f"written: {command.results}; `python -m bench.report {command.results}` prints the tables")
    return int(any(outcome.status for outcome in outcomes.values()))


def _written(path: Path, outcome: Outcome) -> Path:
    path.write_bytes(outcome.results)
    return path


if __name__ == "__main__":
    main()
