"""What an audit found, as data and as a page to read."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from specdec.conformance.betting import Interval

Verdict = Literal["lossless", "lossy", "undecided"]
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Subject:
    """What was audited, and how to do it again. Any of these may be unknown: None."""

    engine: str | None = None
    engine_version: str | None = None
    pair: str | None = None
    method: str | None = None
    gamma: int | str | None = None
    verification: str | None = None
    command: str | None = None


@dataclass(frozen=True, slots=True)
class ArmFindings:
    """One arm against the reference.

    p_values: by instrument, each before the correction for many. p_value: the least of them, corrected.
    found_after: by instrument, the tokens after which it alone would have sufficed to reject; None if it never did.
    shifts: by instrument, what its statistic differs by from its exact mean.
    surprise_z: sum of log p(x) + entropy over its exact standard deviation; for reading, no verdict rests on it.
    num_outside: tokens outside the law's support, by no more than rounding explains, or by more.
    errors: what no lossless engine does, in words.
    """

    p_values: dict[str, float]
    p_value: float
    found_after: dict[str, int | None]
    shifts: dict[str, Interval]
    surprise_z: float | None
    num_draws: int
    num_outputs: int
    seeds: tuple[int, int]
    num_outside: dict[str, int]
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """What an audit found, without whom.

    reasons: why the verdict is what it is. arms_p_value: whether the two arms have one law, without any reference.
    tv_lower_bound: of the distance in total variation, the mean over the tokens of the speculative arm.
    tv_upper_bound: along the direction `direction` only; another direction may hide more.
    min_detectable_tv: the least distance along the direction that would have been found but with probability beta.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    speculative: ArmFindings
    control: ArmFindings
    arms_p_value: float
    direction: str
    tv_lower_bound: float
    tv_upper_bound: float
    min_detectable_tv: float
    max_tv: float
    num_draws_needed: int
    alpha: float
    beta: float
    logit_noise: float
    sampling: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Certificate:
    """An audit's findings about somebody, made with these versions."""

    subject: Subject
    findings: Findings
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, subject: Subject, findings: Findings) -> Certificate:
        """With the versions of what is installed here."""
        return cls(subject, findings, installed_versions())

    def record(self) -> dict[str, Any]:
        """Flat, as JSON takes it; the speculative arm's findings stand by themselves, the control's under `control_`."""
        findings = {f.name: getattr(self.findings, f.name) for f in fields(Findings)}
        arms = {"": findings.pop("speculative"), "control_": findings.pop("control")}
        by_arm = {prefix + name: value for prefix, arm in arms.items() for name, value in asdict(arm).items()}
        return _plain(
            {"schema_version": SCHEMA_VERSION, **asdict(self.subject), **findings, **by_arm, "versions": self.versions}
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Certificate:
        """Raises ValueError for a record of another schema."""
        if record.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version={record.get('schema_version')} must be {SCHEMA_VERSION}; make the certificate again"
            )
        subject = Subject(**{f.name: record[f.name] for f in fields(Subject)})
        arms = {"speculative": _arm(record, ""), "control": _arm(record, "control_")}
        rest = {f.name: record[f.name] for f in fields(Findings) if f.name not in arms}
        rest["reasons"] = tuple(rest["reasons"])
        return cls(subject, Findings(**arms, **rest), dict(record["versions"]))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.record(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Certificate:
        return cls.from_record(json.loads(path.read_text()))


def installed_versions() -> dict[str, str]:
    """Of Python and of what an engine may be made of."""
    found = {"python": platform.python_version()}
    for name in ("specdec", "torch", "transformers", "vllm", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _arm(record: Mapping[str, Any], prefix: str) -> ArmFindings:
    values = {f.name: record[prefix + f.name] for f in fields(ArmFindings)}
    values["shifts"] = {name: Interval(**shift) for name, shift in values["shifts"].items()}
    return ArmFindings(**values | {"seeds": tuple(values["seeds"]), "errors": tuple(values["errors"])})


def _plain(value: Any) -> Any:
    """As JSON reads it back: string keys, lists, and no infinite numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, Interval):
        return asdict(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
