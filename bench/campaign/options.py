"""The options of `BenchConfig` as pytest's options, environment variables, ini keys and a page of the documentation.

The command line takes precedence over the environment, the environment over the ini file, and that over the default.
`python -m bench.campaign.options` prints the page.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pytest

from bench.campaign.config import LOAD, BenchConfig, Option, options_of
from specdec.runtime.checks import nearest

PAGE_HEAD = """\
# Benchmark options

`pytest bench/` takes each option from the command line, else from its environment variable, else from its key in the
ini file, else its default; `--smoke` changes some defaults. Lists are separated by commas.

| Option | Default | Environment variable | Ini key | Meaning |
|---|---|---|---|---|
"""


PREFIX = "SPECDEC_"  # of environment variables
OTHER_VARIABLES = ("SPECDEC_CACHE", "SPECDEC_STRICT", "SPECDEC_SERVER_API_KEY", "SPECDEC_FIRST_LIGHT_WEIGHTS")


def add_options(parser: pytest.Parser, config_class: type[BenchConfig] = BenchConfig) -> None:
    """Declare the options and their ini keys to pytest."""
    group = parser.getgroup("specdec", "speculative decoding benchmarks")
    for option in options_of(config_class):
        old = option.old
        kind: dict[str, Any] = {"action": "store_const", "const": "1"}
        if option.metavar:
            kind = {"metavar": option.metavar}
        text = f"{_meaning(option)} (default {_default(option)}; env {option.variable})"
        group.addoption(option.flag, dest=option.key, default=None, help=text.replace("%", "%%"), **kind)
        if old:
            group.addoption(old.flag, dest=option.key, default=None, help=argparse.SUPPRESS, **kind)
        aliases = [old.key] if old else []
        parser.addini(option.key, f"default of {option.flag}", default=None, aliases=aliases)
    if hint := _nearest_flags(sys.argv[1:], [option.flag for option in options_of(config_class)]):
        parser.extra_info["did you mean"] = hint  # which pytest shows only if it does not know an option


def _nearest_flags(arguments: Sequence[str], flags: Sequence[str]) -> str:
    """The flags that options on the command line resemble without being one; pytest checks options itself."""
    given = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    found = [get_close_matches(each, flags, n=1, cutoff=0.75) for each in given if each not in flags]
    return ", ".join(dict.fromkeys(flag for matches in found for flag in matches))


def parse_config(
    config: pytest.Config, environment: Mapping[str, str] = os.environ, config_class: type[BenchConfig] = BenchConfig
) -> BenchConfig:
    """The options of this run. Raises ValueError naming the option, its value, the rule and the remedy."""
    _check_variables(environment, config_class)
    texts = {option.name: _given(option, config, environment) for option in options_of(config_class)}
    given = {name: text for name, text in texts.items() if text is not None}
    return build(given, config_class, config.rootpath, shlex.join(["pytest", *config.invocation_params.args]))


def build(
    given: Mapping[str, str], config_class: type[BenchConfig] = BenchConfig, folder: Path = Path(), command: str = ""
) -> BenchConfig:
    """A configuration from the texts of the options that were given; the others have their defaults.

    folder: of paths that are defaults. Raises ValueError for a wrong text.
    """
    options = {option.name: option for option in options_of(config_class)}
    smoke = options["smoke"]
    is_smoke = smoke.parse("smoke", given.get("smoke", smoke.default))
    values: dict[str, Any] = {}
    for name, each in options.items():
        default = each.smoke if is_smoke and each.smoke is not None else each.default
        value = each.parse(name, given.get(name, default))
        values[name] = folder / value if isinstance(value, Path) and name not in given else value
    return config_class(**values, command=command, named=frozenset(given))


def _check_variables(environment: Mapping[str, str], config_class: type[BenchConfig]) -> None:
    """Raise ValueError for a variable that is almost an option's: it would be ignored."""
    options = [each for option in options_of(config_class) for each in (option, option.old) if each]
    known = [name.removeprefix(PREFIX) for name in (*(option.variable for option in options), *OTHER_VARIABLES)]
    for name in sorted(name.removeprefix(PREFIX) for name in environment if name.startswith(PREFIX)):
        if name not in known and (question := nearest(name, known)):
            raise ValueError(f"environment variable {PREFIX}{name} must be one that is known{question}")


def _given(option: Option, config: pytest.Config, environment: Mapping[str, str]) -> str | None:
    """The text of an option, or None if it was not given."""
    text: str | None = config.getoption(option.key, default=None)
    for known in (option, option.old):
        text = environment.get(known.variable) if text is None and known else text
    return text if text is not None else config.getini(option.key) or None


def without_effect(config: BenchConfig) -> list[str]:
    """The options that were given but need a load, which was not."""
    needing = {option.name for option in options_of(type(config)) if option.only_with == LOAD}
    return [] if config.is_load else sorted(config.named & needing)


def result_options(config: BenchConfig) -> dict[str, Any]:
    """The values of the options that change results."""
    names = {option.name for option in options_of(type(config)) if option.changes_results}
    return {name: value for name, value in asdict(config).items() if name in names}


def page(config_class: type[BenchConfig] = BenchConfig) -> str:
    """The options as a page in Markdown."""
    return PAGE_HEAD + "".join(map(_row, options_of(config_class)))


def _row(option: Option) -> str:
    metavar, default = option.metavar, _default(option)
    names = f"`{option.flag}{f' {metavar}' if metavar else ''}` | `{default}` | `{option.variable}` | `{option.key}`"
    return f"| {names} | {_meaning(option).replace('|', chr(92) + '|')} |\n"


def _default(option: Option) -> str:
    if option.metavar is None:
        return "off"
    return option.default or "none"


def _meaning(option: Option) -> str:
    text = f"with {option.only_with}: {option.help}" if option.only_with else option.help
    return text if option.smoke is None else f"{text}; with --smoke {option.smoke}"


if __name__ == "__main__":
    print(page(), end="")
