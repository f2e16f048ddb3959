"""Command lines: an error is one line, with the nearest option or name that exists."""

from __future__ import annotations

import subprocess
import sys

import pytest

from specdec.distill.__main__ import parser as distill
from specdec.runtime.command_line import Parser


def parser() -> Parser:
    made = Parser(prog="made")
    made.add_argument("--length", type=int)
    made.add_argument("--kind", choices=("large", "small"))
    return made


@pytest.mark.parametrize(
    ("made", "arguments", "message"),
    [
        (parser(), ["--lenght", "1"], "unrecognized arguments: --lenght 1; did you mean '--length'?"),
        (parser(), ["--lenght=1"], "unrecognized arguments: --lenght=1; did you mean '--length'?"),
        (parser(), ["a", "--lenght=1"], "unrecognized arguments: a --lenght=1; did you mean '--length'?"),
        (parser(), ["--unlike=1"], "unrecognized arguments: --unlike=1; see --help"),
        (parser(), ["--kind", "smal"], "(choose from 'large', 'small'); did you mean 'small'?"),
        (parser(), ["--length", "long"], "argument --length: invalid int value: 'long'; see --help"),
        (distill(), ["heda"], "; did you mean 'head'?"),
        (distill(), ["table", "--target=t", "--folder=f", "--out=o", "--min-cuont=3"], "; did you mean '--min-count'?"),
    ],
)
def test_the_nearest_spelling_is_named(made, arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        made.parse_args(arguments)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in err.replace("from large, small", "from 'large', 'small'")  # as newer Pythons have it
    assert (err[:7], err.count("\n")) == ("error: ", 1)


@pytest.mark.parametrize("module", ["specdec", "specdec.distill", "bench.report", "bench.first_light"])
def test_each_command_reports_like_this(module: str) -> None:
    command = [sys.executable, "-m", module, "--no-such-option"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    assert ended.stderr.startswith("error: ")
