"""A parser of command lines that reports an error in one line, with the nearest known spelling."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import NoReturn

from specdec.runtime.checks import nearest


class Parser(argparse.ArgumentParser):
    """argparse's parser with other error messages."""

    def error(self, message: str) -> NoReturn:
        """Report the error in one line. Exit status 2."""
        self.exit(2, f"error: {message}{self._nearest(message)}; see --help\n")

    def _nearest(self, message: str) -> str:
        if unknown := re.match(r"unrecognized arguments: .*?(--[\w-]+)", message):
            return nearest(unknown[1], self._all_options())
        if wrong := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            return nearest(wrong[1], re.findall(r"[\w.-]+", wrong[2]))
        return ""

    def _all_options(self) -> Iterator[str]:
        """The options of this parser and of its commands: argparse reports unknown ones of a command here."""
        yield from self._option_string_actions
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from command._option_string_actions
