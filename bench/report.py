"""Results as text and pictures: `python -m bench.report RUN.json [OTHER.json ...] [--plots FOLDER]`.

The tables of each run are printed; with --plots its pictures are drawn into FOLDER/RUN-*.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import cost, load_table, plots, table


def render(run: Path) -> str:
    """The table of a pytest-benchmark JSON file written by these benchmarks.

    Raises ValueError if the file holds no such run.
    """
    return _read(run)[0]


def draw(run: Path, folder: Path) -> list[Path]:
    """Draw a run's pictures; returns their files.

    Raises ValueError if the file holds no run of these benchmarks, or matplotlib is missing.
    """
    _, results, records = _read(run)
    try:
        from bench import drawing
    except ImportError as error:
        raise ValueError(f"plots={folder} needs matplotlib ({error}); pip install 'specdec[bench]'") from error
    return drawing.write(plots.pictures(records), folder, run.stem, _machine(results))


def _read(run: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """(table, results, records) of a run."""
    try:
        results = json.loads(run.read_text())
        records = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
        decoding = [record for record in records if "axis" not in record and record.get("rate") is None]
        loads = [record for record in records if record.get("rate") is not None]
        costs = [record for record in records if "axis" in record]
        tables = [
            *(table.render(decoding) if decoding else []),
            *(load_table.lines(loads) if loads else []),
            *(cost.lines(costs) if costs else []),
        ]
        return "\n".join([_machine(results), "", *tables]), results, records
    except OSError as error:
        raise ValueError(f"{run} must be a file that can be read ({error.strerror}); check the path") from error
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{run} must be written by `pytest bench/ --benchmark-json`; {error!r} is amiss") from error


def _machine(results: dict) -> str:
    machine = results["machine_info"]
    hardware = ", ".join(machine["gpus"]) or f"{machine['cpu_count']} cores of {machine['cpu_model']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return f"{results['datetime'][:10]}, {hardware}, Python {machine['python_version']}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw pictures into this folder; needs matplotlib")
    arguments = parser.parse_args()
    try:
        for run in arguments.runs:
            print(render(run))
            for path in draw(run, arguments.plots) if arguments.plots else ():
                print(f"drawn: {path}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
