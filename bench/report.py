"""Results as text: `python -m bench.report RUN.json [OTHER.json ...]` prints the table of each run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench import cost, table


def render(run: Path) -> str:
    """The table of a pytest-benchmark JSON file written by these benchmarks.

    Raises ValueError if the file holds no such run.
    """
    try:
        results = json.loads(run.read_text())
        records = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
        decoding = [record for record in records if "axis" not in record]
        costs = [record for record in records if "axis" in record]
        tables = [*(table.render(decoding) if decoding else []), *(cost.lines(costs) if costs else [])]
        return "\n".join([_machine(results), "", *tables])
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"{run} must be written by `pytest bench/ --benchmark-json`; {error!r} is amiss") from error


def _machine(results: dict) -> str:
    machine = results["machine_info"]
    hardware = ", ".join(machine["gpus"]) or f"{machine['cpu_count']} cores of {machine['cpu_model']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return f"{results['datetime'][:10]}, {hardware}, Python {machine['python_version']}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json")
    for run in parser.parse_args().runs:
        print(render(run))


if __name__ == "__main__":
    main()
