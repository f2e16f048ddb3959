"""Results as text, tables, a page and charts: `python -m bench.report RUN.json [OTHER.json ...]`.

Prints the tables of each run and, given several runs, what changed in the later ones against the first. Shards of one
campaign (--shard) count as one run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.records import campaigns, results
from bench.records.results import Results
from bench.report import changes, chapters, csv_text, markdown
from bench.report.charts import files
from bench.report.charts.model import Picture
from bench.report.document import Chapter, Document
from bench.report.terminal import chapter as terminal
from specdec.runtime.command_line import Parser

REMEDY = "free space there or name another"


def render(run: Path) -> str:
    """The table of a pytest-benchmark JSON file written by these benchmarks.

    Raises ValueError if the file holds no such run.
    """
    return text(results.read(run))


def text(run: Results) -> str:
    """The tables of a run, for a terminal."""
    return "\n".join(terminal.render(chapters.chapter(run, "run")))


def document(runs: Sequence[Results]) -> Document:
    """The report: the changes of the later runs relative to the first, then each run."""
    compared = [changes.chapter(runs[0], after, f"changes{index}") for index, after in enumerate(runs[1:], 1)]
    return chapters.document(runs, compared)


def _changes_last(document: Document) -> list[Chapter]:
    """The report for a terminal, where the changes come last, just above the prompt."""
    return sorted(document.chapters, key=lambda chapter: chapter.name.startswith("changes"))


def draw(report: Document, runs: Sequence[Results], folder: Path) -> list[Path]:
    """Write the charts of `document(runs)` to FOLDER/RUN-*.svg and return the paths.

    Raises ValueError if the folder cannot be written.
    """
    paths = []
    for chapter, run in zip(report.chapters, [*runs[1:], *runs], strict=True):
        pictures = [part for section in chapter.sections for part in section.parts if isinstance(part, Picture)]
        try:
            paths += files.write(pictures, folder, run.file_name, run.described())
        except OSError as error:
            raise ValueError(f"plots={folder} must be a writable folder ({error.strerror}); {REMEDY}") from error
    return paths


def _page(report: Document, path: Path) -> str:
    try:
        from bench.report.html import page
    except ImportError as error:  # the other outputs need no template engine
        raise ValueError(f"html={path} needs Jinja2 ({error}); pip install jinja2") from error
    return page.render(report)


def write(option: str, path: Path, content: str) -> None:
    """Write a file atomically: on failure its former content is kept.

    Raises ValueError, which names the option.
    """
    try:
        if path.exists() and not path.is_file():  # a device or a pipe
            path.write_text(content, encoding="utf-8")
        else:
            _replace(path, content)
    except OSError as error:
        raise ValueError(f"{option}={path} must be a writable file ({error.strerror}); {REMEDY}") from error


def _replace(path: Path, content: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def main() -> None:
    parser = Parser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json", help="from `pytest bench/ --benchmark-json`")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a self-contained page with tables and charts; needs Jinja2"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the same without charts")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write one row per cell with all fields, in SI units")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the charts as SVG files to this folder")
    arguments = parser.parse_args()
    try:
        _report(arguments)
    except ValueError as error:
        parser.error(str(error))
    except BrokenPipeError:  # as with `| head`: all files have been written by now
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(arguments: argparse.Namespace) -> None:
    runs = campaigns.read_all(arguments.runs)
    try:
        report = document(runs)
        texts = ["\n".join(terminal.render(each)) for each in _changes_last(report)]
        page = _page(report, arguments.html) if arguments.html else ""
    except (KeyError, TypeError, AttributeError, ArithmeticError, IndexError) as error:
        names = ", ".join(map(str, arguments.runs))
        raise ValueError(f"{names} must be written by `pytest bench/ --benchmark-json`; it raised {error!r}") from error
    contents = {"html": page, "markdown": markdown.render(report), "csv": csv_text.render(runs)}
    written = [(option, path) for option in contents if (path := getattr(arguments, option))]
    for option, path in written:
        write(option, path, contents[option])
    drawn = draw(report, runs, arguments.plots) if arguments.plots else []
    lines = ["\n\n\n".join(texts), *(f"written: {path}" for _, path in written)]
    print(*lines, *(f"drawn: {path}" for path in drawn), sep="\n", flush=True)
