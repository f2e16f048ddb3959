"""Results as text, tables, a page and charts: `python -m bench.report RUN.json [OTHER.json ...]`.

Prints the tables of each run and, given several runs, what changed in the later ones against the first. Shards of one
campaign (--shard) count as one run. With --trends FOLDER it reports how cells changed over the runs of a folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.analysis.regressions import FALSE_ALARM_RATE, TOLERANCE
from bench.records import campaigns, results
from bench.records.results import Results
from bench.report import changes, chapters, gate, history, markdown
from bench.report.charts import files
from bench.report.charts.model import Picture
from bench.report.document import Chapter, Document
from bench.report.exports import csv_text, frames, trackers
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
    chapters = zip(report.chapters, [*runs[1:], *runs], strict=True)
    return [path for chapter, run in chapters for path in _drawn(chapter, folder, run.file_name, run.described())]


def _drawn(chapter: Chapter, folder: Path, prefix: str, footer: str) -> list[Path]:
    pictures = [part for section in chapter.sections for part in section.parts if isinstance(part, Picture)]
    try:
        return files.write(pictures, folder, prefix, footer)
    except OSError as error:
        raise ValueError(f"plots={folder} must be a writable folder ({error.strerror}); {REMEDY}") from error


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
    options = parser()
    arguments = options.parse_args()
    if bool(arguments.runs) == bool(arguments.trends):
        options.error("RUN.json or --trends FOLDER must be given, and not both")
    try:
        has_failed = _report(arguments)
    except ValueError as error:
        options.error(str(error))
    except BrokenPipeError:  # as with `| head`: all files have been written by now
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if has_failed:
        sys.exit(1)


def parser() -> Parser:
    """The command's options."""
    options = Parser(prog="python -m bench.report", description=__doc__)
    options.add_argument("runs", nargs="*", type=Path, metavar="RUN.json", help="from `pytest bench/ --benchmark-json`")
    options.add_argument(
        "--trends", type=Path, metavar="FOLDER", help="report how cells changed over the runs of a folder instead"
    )
    options.add_argument(
        "--html", type=Path, metavar="FILE", help="write a self-contained page with tables and charts; needs Jinja2"
    )
    options.add_argument("--markdown", type=Path, metavar="FILE", help="write the same without charts")
    options.add_argument("--csv", type=Path, metavar="FILE", help="write one row per cell with all fields, in SI units")
    options.add_argument("--parquet", type=Path, metavar="FILE", help="write the same with types; needs pyarrow")
    options.add_argument("--mlflow", metavar="EXPERIMENT", help="log the runs to MLflow")
    options.add_argument("--wandb", metavar="PROJECT", help="log the runs to Weights & Biases")
    options.add_argument("--plots", type=Path, metavar="FOLDER", help="write the charts as SVG files to this folder")
    checks = options.add_argument_group("for continuous integration")
    checks.add_argument(
        "--fail-on",
        choices=("slower",),
        help="exit with status 1 if a cell of the second run is slower than in the first, by times paired inside each",
    )
    checks.add_argument(
        "--false-alarm-rate",
        type=_share,
        default=FALSE_ALARM_RATE,
        metavar="RATE",
        help="probability of status 1 without any change, over all cells (default %(default)s)",
    )
    checks.add_argument(
        "--tolerance",
        type=_share,
        default=TOLERANCE,
        metavar="SHARE",
        help="slowdown that passes (default %(default)s)",
    )
    return options


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 0.5:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and below 0.5")
    return value


def _report(arguments: argparse.Namespace) -> bool:
    """Print and write everything that was requested; whether --fail-on found a reason to fail."""
    names = ", ".join(map(str, arguments.runs or [arguments.trends]))
    runs = campaigns.read_folder(arguments.trends) if arguments.trends else campaigns.read_all(arguments.runs)
    try:
        report = history.document(runs) if arguments.trends else document(runs)
        texts = ["\n".join(terminal.render(each)) for each in _changes_last(report)]
        page = _page(report, arguments.html) if arguments.html else ""
        has_failed, reasons = _judged(runs, arguments)
    except (KeyError, TypeError, AttributeError, ArithmeticError, IndexError) as error:
        raise ValueError(f"{names} must be written by `pytest bench/ --benchmark-json`; it raised {error!r}") from error
    written = _written(report, runs, page, arguments)
    print("\n\n\n".join(texts), *written, *reasons, sep="\n", flush=True)
    return has_failed


def _judged(runs: Sequence[Results], arguments: argparse.Namespace) -> tuple[bool, list[str]]:
    """The verdict of --fail-on and its reasons."""
    if not arguments.fail_on:
        return False, []
    has_failed, reasons = gate.slower(runs, arguments.false_alarm_rate, arguments.tolerance)
    return has_failed, [line for reason in reasons for line in terminal.wrapped(reason)]


def _written(report: Document, runs: Sequence[Results], page: str, arguments: argparse.Namespace) -> list[str]:
    """Write the requested files, and log the runs; a line about each."""
    contents = {"html": page, "markdown": markdown.render(report), "csv": csv_text.render(runs)}
    written = [(option, path) for option in contents if (path := getattr(arguments, option))]
    for option, path in written:
        write(option, path, contents[option])
    lines = [f"written: {path}" for _, path in written]
    if arguments.parquet:
        frames.write_parquet(runs, arguments.parquet)
        lines.append(f"written: {arguments.parquet}")
    if arguments.plots:
        lines += [f"drawn: {path}" for path in _plots(report, runs, arguments)]
    if arguments.mlflow:
        trackers.log_to_mlflow(runs, arguments.mlflow)
        lines.append(f"logged: MLflow, experiment {arguments.mlflow}")
    if arguments.wandb:
        trackers.log_to_wandb(runs, arguments.wandb)
        lines.append(f"logged: Weights & Biases, project {arguments.wandb}")
    return lines


def _plots(report: Document, runs: Sequence[Results], arguments: argparse.Namespace) -> list[Path]:
    if not arguments.trends:
        return draw(report, runs, arguments.plots)
    latest = max(runs, key=lambda run: run.date)
    return _drawn(report.chapters[0], arguments.plots, "trends", latest.described())
