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

from specdec import __version__
from specdec.conformance.betting import Interval

Verdict = Literal["lossless", "lossy", "inconclusive"]
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Subject:
    """What was audited, and how to do it again. Any of these may be unknown: None.

    options: what the engine was told beside, as JSON.
    """

    engine: str | None = None
    engine_version: str | None = None
    pair: str | None = None
    method: str | None = None
    gamma: int | str | None = None
    verification: str | None = None
    command: str | None = None
    options: str | None = None


@dataclass(frozen=True, slots=True)
class ArmFindings:
    """One arm against the reference.

    p_values: by instrument, each before the correction for many. p_value: the least of them, corrected.
    found_after: by instrument, the tokens after which it alone would have sufficed to reject; None if it never did.
    shifts: by instrument, what its statistic differs by from its exact mean.
    surprise_z: sum of log p(x) + entropy over its exact standard deviation; for reading, no verdict rests on it.
    num_outside: tokens outside the distribution's support, by no more than rounding explains, or by more.
    largest_gap: by how much the former missed it at the most, in logits.
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
    largest_gap: float
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Speculation:
    """What the speculative arm drafted for its outputs, in tokens, and how many of them it accepted."""

    num_drafted: int
    num_accepted: int


def bounded(verdict: Verdict, max_tv: float, tv_lower_bound: float) -> str:
    """A verdict with the distance in total variation that it rests on: "lossless (TV < 0.1)"."""
    if verdict == "lossless":
        return f"lossless (TV < {max_tv:g})"
    if verdict == "lossy" and tv_lower_bound > 0:
        return f"lossy (TV > {tv_lower_bound:.2g})"
    return verdict


@dataclass(frozen=True, slots=True)
class Findings:
    """What an audit found, without whom.

    reasons: why the verdict is what it is. arms_p_value: whether the two arms have one distribution, without any
    reference.
    tv_lower_bound: of the distance in total variation, the mean over the tokens of the speculative arm.
    tv_upper_bound: along the direction `direction` only; another direction may hide more.
    min_detectable_tv: the least distance along the direction that would have been found but with probability beta.
    num_drafted, num_accepted: of the speculative arm, in tokens; None if the engine does not count them, or did not
    when the certificate was made.
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
    num_drafted: int | None = None
    num_accepted: int | None = None

    @property
    def headline(self) -> str:
        """The verdict with its bound, or with the first reason why there is none."""
        if self.verdict == "inconclusive":
            return f"inconclusive: {self.reasons[0]}"
        return bounded(self.verdict, self.max_tv, self.tv_lower_bound)

    def __str__(self) -> str:
        """The certificate's text, without whom it is about."""
        return "\n".join([self.headline, "", *self.lines()])

    def lines(self) -> list[str]:
        """The reasons and the numbers, as lines of Markdown."""
        return [
            *(f"- {reason}" for reason in self.reasons),
            "",
            *_distances(self),
            *_speculation(self),
            "",
            *_table(self),
            "",
            *_arm_lines("With speculation", self.speculative, self.logit_noise),
            *_arm_lines("Without speculation (the control arm)", self.control, self.logit_noise),
            "",
            f"Sampling: {_told(self.sampling)}.",
        ]


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
        """Flat, as JSON takes it; what the control arm gave stands under names with `control_` before them."""
        findings = {f.name: getattr(self.findings, f.name) for f in fields(Findings)}
        arms = {"": findings.pop("speculative"), "control_": findings.pop("control")}
        by_arm = {prefix + name: value for prefix, arm in arms.items() for name, value in asdict(arm).items()}
        subject = {"schema_version": SCHEMA_VERSION, **asdict(self.subject)}
        record: dict[str, Any] = _plain({**subject, **findings, **by_arm, "versions": self.versions})
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Certificate:
        """Raises ValueError for a record of another schema."""
        if record.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version={record.get('schema_version')} must be {SCHEMA_VERSION}; make the certificate again"
            )
        subject = Subject(**{f.name: record.get(f.name) for f in fields(Subject)})
        values: dict[str, Any] = {f.name: record.get(f.name) for f in fields(Findings)}
        values |= {"speculative": _arm(record, ""), "control": _arm(record, "control_")}
        values["reasons"] = tuple(values["reasons"])
        return cls(subject, Findings(**values), dict(record["versions"]))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.record(), indent=2, allow_nan=False) + "\n")

    def markdown(self) -> str:
        """A page to read."""
        subject, found = self.subject, self.findings
        names = ("engine", "engine_version", "pair", "method", "gamma", "verification")
        told = [f"{name} {getattr(subject, name)}" for name in names if getattr(subject, name) is not None]
        lines = [
            f"# {bounded(found.verdict, found.max_tv, found.tv_lower_bound)}: {', '.join(told) or 'an engine'}",
            "",
            *found.lines(),
            "",
            f"Versions: {_told(self.versions)}.",
        ]
        if subject.options:
            lines += ["", f"The engine was told: `{subject.options}`."]
        if subject.command:
            lines += ["", "To repeat it:", "", f"    {subject.command}"]
        return "\n".join(lines) + "\n"

    @classmethod
    def load(cls, path: Path) -> Certificate:
        return cls.from_record(json.loads(path.read_text()))


def installed_versions() -> dict[str, str]:
    """Of Python and of what an engine may be made of."""
    found = {"python": platform.python_version(), "specdec": __version__}
    for name in ("torch", "transformers", "vllm", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _distances(found: Findings) -> list[str]:
    direction = {
        "equality": "Of 100 tokens, at most {high:.3g} are not the one that the target decides for",
        "draft": "Towards or away from the draft it differs from the target's by at most {high:.3g} of 100",
        "lookup": "Towards or away from what the text so far suggests it differs by at most {high:.3g} of 100",
    }[found.direction]
    return [
        direction.format(high=100 * found.tv_upper_bound)
        + f" (and in total by at least {100 * found.tv_lower_bound:.3g} of 100), except with probability "
        f"{found.alpha:g}.",
        f"{found.speculative.num_draws} tokens were judged; a difference of {100 * found.min_detectable_tv:.3g} of 100 "
        f"in that direction would have been found but with probability {found.beta:g}. Asked for were "
        f"{100 * found.max_tv:g}, which takes {found.num_draws_needed} tokens.",
    ]


def _speculation(found: Findings) -> list[str]:
    if found.num_drafted is None:
        return ["", "How many tokens were drafted and accepted was not counted."]
    return ["", f"{found.num_drafted} tokens were drafted, {found.num_accepted} of them accepted."]


def _table(found: Findings) -> list[str]:
    """One line for each instrument; p-values are those of the single instrument."""
    lines = [
        "| instrument | p with speculation | p without | found after | difference with speculation | without |",
        "|---|---|---|---|---|---|",
    ]
    for name, p_value in found.speculative.p_values.items():
        after = found.speculative.found_after.get(name)
        shifts = [_interval(arm.shifts.get(name)) for arm in (found.speculative, found.control)]
        after_words = "-" if after is None else f"{after} tokens"
        control = found.control.p_values[name]
        lines.append(f"| {name} | {p_value:.2g} | {control:.2g} | {after_words} | {' | '.join(shifts)} |")
    combined = f"| all, corrected | {found.speculative.p_value:.2g} | {found.control.p_value:.2g} | | | |"
    return [
        *lines,
        combined,
        "",
        f"That the two arms have one distribution: p = {found.arms_p_value:.2g}, without a reference.",
    ]


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{interval.estimate:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"


def _arm_lines(title: str, arm: ArmFindings, logit_noise: float) -> list[str]:
    surprise = "" if arm.surprise_z is None else f" Surprise: {arm.surprise_z:+.2f} standard deviations."
    return [
        f"{title}: {arm.num_outputs} outputs, {arm.num_draws} tokens judged, seeds {arm.seeds[0]} to {arm.seeds[1]}; "
        f"{arm.num_outside['by rounding']} tokens that the reference does not allow, by up to {arm.largest_gap:.3g} "
        f"logits, and {arm.num_outside['by more']} by more than rounding explains ({logit_noise:g}).{surprise}",
        "",
        *(f"- {error}" for error in arm.errors),
        *([""] if arm.errors else []),
    ]


def _told(values: Mapping[str, Any]) -> str:
    plain: dict[str, Any] = _plain(values)  # as a certificate that was read back tells it
    return ", ".join(f"{name} {value}" for name, value in plain.items() if value is not None)


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
