"""A prescribed acceptance length: one number, or InferenceX's file of golden lengths by model, mode and gamma.

Source of the files: https://github.com/SemiAnalysisAI/InferenceX, golden_al_distribution/README.md. Each is YAML: the
model's name, below it modes such as thinking_on, and below these the length for each number of speculative tokens; an
entry whose name begins with an underscore describes the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.records.schema import Gamma
from specdec.runtime.checks import nearest
from specdec.stats import least_variance_rates

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class AcceptanceLength:
    """Tokens per target call, including the recovered or bonus token.

    length: for every gamma; None if it depends on gamma. by_gamma: pairs of gamma and length. source: file and mode.
    """

    length: float | None
    by_gamma: tuple[tuple[int, float], ...] = ()
    source: str = ""

    def at(self, gamma: Gamma) -> float:
        """The length for a gamma. Raises ValueError if the file has none, or if no rates give it."""
        if not isinstance(gamma, int):
            raise ValueError(f"gammas={gamma} must be numbers with synthetic_acceptance_length: it depends on them")
        length = self.length if self.length is not None else dict(self.by_gamma).get(gamma)
        if length is None:
            known = ",".join(str(each) for each, _ in self.by_gamma)
            raise ValueError(f"gammas={gamma} must be among those of {self.source}; use --gammas with some of {known}")
        if not 1 <= length <= gamma + 1:
            raise ValueError(
                f"synthetic_acceptance_length={length:g} must lie in [1, gamma + 1] = [1, {gamma + 1}]; raise --gammas"
            )
        return length

    def rates(self, gamma: Gamma) -> tuple[float, ...]:
        """The acceptance rate of each position, as vLLM derives it; see `least_variance_rates`. None for gamma 0."""
        return least_variance_rates(self.at(gamma), gamma) if isinstance(gamma, int) and gamma else ()


def acceptance_length(name: str, text: str) -> AcceptanceLength:
    """A number, FILE or FILE:MODE. Raises ValueError for anything else."""
    path, _, mode = text.partition(":")
    if path.endswith(SUFFIXES):
        return _of_file(name, Path(path).expanduser(), mode)
    try:
        length = float(text)
    except ValueError:
        length = math.nan
    if not (math.isfinite(length) and length >= 1):
        raise ValueError(
            f"{name}={text} must be a number >= 1 of tokens per target call, or a file of InferenceX's such as "
            "dsv4_mtp.yaml:thinking_on"
        )
    return AcceptanceLength(length)


def _of_file(name: str, path: Path, mode: str) -> AcceptanceLength:
    modes = _modes(name, path)
    if mode not in modes and (mode or len(modes) > 1):
        rule = f"{name}={path}:{mode} must name a mode of the file, {' or '.join(modes)}"
        raise ValueError(f"{rule}{nearest(mode, modes)}; for example {path.name}:{next(iter(modes))}")
    chosen = mode or next(iter(modes))
    return AcceptanceLength(None, tuple(sorted(modes[chosen].items())), f"{path.name}:{chosen}")


def _modes(name: str, path: Path) -> dict[str, dict[int, float]]:
    """The lengths by gamma of each mode of a file's only model."""
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"{name}={path} must be a readable YAML file ({cause}); get it again") from error
    models = [value for key, value in document.items() if not str(key).startswith("_")] if _is_map(document) else []
    if len(models) != 1 or not _is_map(models[0]) or not all(map(_are_lengths, models[0].values())):
        raise ValueError(
            f"{name}={path} must hold one model, with modes and in each a length >= 1 by number of speculative tokens; "
            "use a file of InferenceX's golden_al_distribution folder"
        )
    return {str(key): {gamma: float(length) for gamma, length in value.items()} for key, value in models[0].items()}


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _are_lengths(value: Any) -> bool:
    return _is_map(value) and all(
        type(gamma) is int and gamma >= 1 and type(length) in (int, float) and 1 <= length < math.inf
        for gamma, length in value.items()
    )
