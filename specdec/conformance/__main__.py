"""Instruments for engines and models, as commands.

python -m specdec.conformance audit --url http://localhost:8000 --control-url http://localhost:8001
python -m specdec.conformance rows --target smollm2-135m --dtype bfloat16 --require bit-equal
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from specdec.conformance.rows import command as rows
from specdec.conformance.served import command as audit
from specdec.runtime.command_line import Parser
from specdec.runtime.progress import replace_unencodable


class Command(Protocol):
    """A module with one command. It imports torch when it runs, so that argument errors are reported at once."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the command; returns the exit status. User errors are ValueError, OSError, ImportError or LoadError."""
        ...


COMMANDS: dict[str, Command] = {"audit": audit, "rows": rows}


def parser() -> Parser:
    """The command-line parser. A command's help is the first line of its module's docstring."""
    assert __doc__
    top = Parser("python -m specdec.conformance", description=__doc__.splitlines()[0])
    names = top.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        command.add_arguments(names.add_parser(name, help=summary, description=summary))
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. User errors are reported in one line, with exit status 2."""
    options = parser().parse_args(arguments)
    replace_unencodable(sys.stdout, sys.stderr)
    try:
        return COMMANDS[options.command].run(options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_load_error(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _is_load_error(error: RuntimeError) -> bool:
    from specdec.runtime.artifacts import LoadError  # imports torch

    return isinstance(error, LoadError)


if __name__ == "__main__":
    sys.exit(main())
