"""Results as text, tables, a page and pictures: `python -m bench.report RUN.json [OTHER.json ...]`.

The tables of each run are printed, and of several runs what the later ones changed against the first. Shards of one
campaign (--shard) are one run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.records import campaigns, results
from bench.records.results import Results
from bench.report import changes, chapters, csv_text, markdown
from bench.report.charts import cost as cost_charts
from bench.report.document import Document
from bench.report.html import page
from bench.report.terminal import audits, cost, decoding, load


def render(run: Path) -> str:
    """The table of a pytest-benchmark JSON file written by these benchmarks.

    Raises ValueError if the file holds no such run.
    """
    return text(results.read(run))


def text(run: Results) -> str:
    """The tables of a run, for a terminal."""
    return "\n".join([run.described(), "", *_tables(run)])


def _tables(run: Results) -> Iterator[str]:
    if run.shortage:
        yield from (run.shortage, "")
    yield from decoding.render(run.cells) if run.cells else ()
    yield from load.lines(run.loads) if run.loads else ()
    if run.certificates:
        yield from audits.lines(run.certificates)
    yield from cost.lines(run.costs) if run.costs else ()


def document(runs: Sequence[Results]) -> Document:
    """What the reports say: of several runs first what the later ones changed against the first."""
    first = [changes.chapter(runs[0], after, f"changes{index}") for index, after in enumerate(runs[1:], 1)]
    return chapters.document(runs, first)


def draw(run: Results, folder: Path) -> list[Path]:
    """Draw a run's pictures into FOLDER/RUN-*.png; returns their files.

    Raises ValueError if matplotlib is missing, or the folder cannot be written.
    """
    try:
        from bench.report.charts import drawing
    except ImportError as error:
        raise ValueError(f"plots={folder} needs matplotlib ({error}); pip install matplotlib") from error
    try:
        return drawing.write(cost_charts.pictures(run.pictured), folder, run.file_name, run.described())
    except OSError as error:
        raise ValueError(f"plots={folder} must be a folder that can be written ({error.strerror}); {REMEDY}") from error


REMEDY = "free space there, or name another"


def write(option: str, path: Path, content: str) -> None:
    """Write a file whole or not at all: where it cannot be, what was there before is kept.

    Raises ValueError naming the option.
    """
    try:
        if path.exists() and not path.is_file():  # a device or a pipe
            path.write_text(content, encoding="utf-8")
        else:
            _replace(path, content)
    except OSError as error:
        raise ValueError(f"{option}={path} must be a file that can be written ({error.strerror}); {REMEDY}") from error


def _replace(path: Path, content: str) -> None:
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)  # as any other file; a temporary one is its owner's alone
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json", help="of `pytest bench/ --benchmark-json`")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page with tables and pictures; needs nothing else")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the same without pictures")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row for each cell, with all fields, in SI units")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw pictures into this folder; needs matplotlib")
    arguments = parser.parse_args()
    try:
        _report(arguments)
    except ValueError as error:
        parser.error(str(error))
    except BrokenPipeError:  # `| head` has read enough; files have been written before
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(arguments: argparse.Namespace) -> None:
    runs = campaigns.read_all(arguments.runs)
    try:
        texts = [text(run) for run in runs]
        differences = [line for after in runs[1:] for line in ("", *changes.lines(runs[0], after))]
        told = document(runs)
        pages = page.render(told) if arguments.html else ""
    except (KeyError, TypeError, AttributeError, ArithmeticError, IndexError) as error:
        names = ", ".join(map(str, arguments.runs))
        message = f"{names} must be written by `pytest bench/ --benchmark-json`; {error!r} is invalid"
        raise ValueError(message) from error
    contents = {"html": pages, "markdown": markdown.render(told), "csv": csv_text.render(runs)}
    written = [path for option in contents if (path := getattr(arguments, option))]
    for option, content in contents.items():
        if path := getattr(arguments, option):
            write(option, path, content)
    drawn = [path for run in runs if arguments.plots for path in draw(run, arguments.plots)]
    lines = ["\n\n".join(texts), *differences, *(f"written: {path}" for path in written)]
    print(*lines, *(f"drawn: {path}" for path in drawn), sep="\n", flush=True)


if __name__ == "__main__":
    main()
