"""The result of an audit, as data and as a Markdown page."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from specdec import __version__
from specdec.conformance.statistics.betting import ConfidenceInterval
from specdec.lossy import is_lossy

Verdict = Literal["lossless", "lossy", "inconclusive"]
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Subject:
    """The audited engine and how to repeat the audit. None: unknown. options: further engine options, as JSON."""

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
    """The findings on one arm.

    Attributes:
        p_values: by instrument, uncorrected.
        p_value: the smallest of them, corrected for multiple tests.
        found_after: by instrument, the number of tokens after which it alone rejects; None if it never does.
        shifts: by instrument, the deviation of its statistic from the exact mean.
        surprise_z: sum of log p(x) + entropy over its exact standard deviation; informative only, not used in verdicts.
        num_draws: tokens tested.
        num_outputs: outputs seen.
        seeds: the first and last request seed.
        num_outside: tokens outside the support of the distribution, "by rounding" or "by more" than rounding explains.
        largest_gap: the largest distance of the former from the support, in logits.
        errors: messages on what no lossless engine does.
    """

    p_values: dict[str, float]
    p_value: float
    found_after: dict[str, int | None]
    shifts: dict[str, ConfidenceInterval]
    surprise_z: float | None
    num_draws: int
    num_outputs: int
    seeds: tuple[int, int]
    num_outside: dict[str, int]
    largest_gap: float
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Speculation:
    """The number of tokens that the speculative arm drafted and accepted, by the engine's counters.

    problem: why the counters cannot be believed; None if they can.
    """

    num_drafted: int
    num_accepted: int
    problem: str | None = None


def bounded(verdict: Verdict, max_tv: float, tv_lower_bound: float, p_value: float, errors: Sequence[str]) -> str:
    """A verdict with its bound on the total variation distance: "lossless (TV < 0.1)".

    A lossy engine may be found out before the distance is bounded above 0. What found it then replaces the bound.
    p_value, errors: of the speculative arm.
    """
    if verdict == "lossless":
        return f"lossless (TV < {max_tv:g})"
    if verdict == "lossy" and tv_lower_bound > 0:
        return f"lossy (TV > {tv_lower_bound:.2g})"
    if verdict == "lossy":
        return "lossy (invalid output)" if errors else f"lossy (distribution differs, p = {p_value:.2g})"
    return verdict


@dataclass(frozen=True, slots=True)
class Findings:
    """The findings of an audit.

    Attributes:
        verdict: "lossless", "lossy" or "inconclusive".
        reasons: what the verdict rests on.
        speculative: findings on the speculative arm.
        control: findings on the plain arm.
        arms_p_value: p-value for both arms having the same distribution; needs no reference.
        direction: the instrument whose direction the bounds refer to.
        tv_lower_bound: of the total variation distance, averaged over the tokens of the speculative arm.
        tv_upper_bound: along `direction` only; other directions may hide more.
        min_detectable_tv: the smallest distance along `direction` that is missed with probability at most beta.
        max_tv: the distance to detect.
        num_draws_needed: tokens needed to detect it.
        alpha: false-alarm rate.
        beta: miss rate.
        logit_noise: logit differences attributed to rounding.
        sampling: the sampling parameters.
        num_drafted: draft tokens of the speculative arm; None if the engine does not count them.
        num_accepted: accepted tokens of the speculative arm; None if the engine does not count them.
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
        """The verdict with its bound; if inconclusive, with the first reason."""
        if self.verdict == "inconclusive":
            return f"inconclusive: {self.reasons[0]}"
        return self.bounded_verdict

    @property
    def bounded_verdict(self) -> str:
        """The verdict with its bound, see `bounded`."""
        arm = self.speculative
        return bounded(self.verdict, self.max_tv, self.tv_lower_bound, arm.p_value, arm.errors)

    def __str__(self) -> str:
        """The findings as text."""
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
            f"Sampling: {_listed(self.sampling)}.",
        ]


@dataclass(frozen=True, slots=True)
class Certificate:
    """The findings of an audit with their subject and the installed versions.

    date: UTC, as YYYY-MM-DD; None in certificates of before there was one.
    """

    subject: Subject
    findings: Findings
    versions: dict[str, str] = field(default_factory=dict)
    date: str | None = None

    @classmethod
    def of(cls, subject: Subject, findings: Findings) -> Certificate:
        """A certificate of today with the versions installed here. Raises ValueError for a lossy verification rule."""
        if is_lossy(subject.verification or ""):
            raise ValueError(
                f"verification={subject.verification!r} must be lossless for a certificate; python -m "
                "bench.tools.lossy_modes measures what it costs"
            )
        return cls(subject, findings, installed_versions(), datetime.now(UTC).date().isoformat())

    def record(self) -> dict[str, Any]:
        """A flat JSON object; the control arm's fields are prefixed with `control_`."""
        findings = {f.name: getattr(self.findings, f.name) for f in fields(Findings)}
        arms = {"": findings.pop("speculative"), "control_": findings.pop("control")}
        by_arm = {prefix + name: value for prefix, arm in arms.items() for name, value in asdict(arm).items()}
        subject = {"schema_version": SCHEMA_VERSION, **asdict(self.subject)}
        record: dict[str, Any] = _plain({**subject, **findings, **by_arm, "versions": self.versions, "date": self.date})
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Certificate:
        """The inverse of `record`. Raises ValueError for another schema version."""
        if record.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version={record.get('schema_version')} must be {SCHEMA_VERSION}; repeat the audit"
            )
        subject = Subject(**{f.name: record.get(f.name) for f in fields(Subject)})
        values: dict[str, Any] = {f.name: record.get(f.name) for f in fields(Findings)}
        values |= {"speculative": _arm(record, ""), "control": _arm(record, "control_")}
        values["reasons"] = tuple(values["reasons"])
        return cls(subject, Findings(**values), dict(record["versions"]), record.get("date"))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.record(), indent=2, allow_nan=False) + "\n")

    def markdown(self) -> str:
        """A Markdown page."""
        subject, found = self.subject, self.findings
        names = ("engine", "engine_version", "pair", "method", "gamma", "verification")
        known = [f"{name} {getattr(subject, name)}" for name in names if getattr(subject, name) is not None]
        lines = [
            f"# {found.bounded_verdict}: {', '.join(known) or 'an engine'}",
            "",
            *found.lines(),
            "",
            f"Versions: {_listed(self.versions)}.",
            *(["", f"Date: {self.date}."] if self.date else []),
        ]
        if subject.options:
            lines += ["", f"Engine options: `{subject.options}`."]
        if subject.command:
            lines += ["", "To reproduce:", "", f"    {subject.command}"]
        return "\n".join(lines) + "\n"

    @classmethod
    def load(cls, path: Path) -> Certificate:
        return cls.from_record(json.loads(path.read_text()))


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages an engine may depend on."""
    found = {"python": platform.python_version(), "specdec": __version__}
    for name in ("torch", "transformers", "vllm", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _distances(found: Findings) -> list[str]:
    direction = {
        "equality": "At most {high:.3g} % of tokens differ from the target's argmax",
        "draft": "Toward or away from the draft, the distance from the target is at most {high:.3g} %",
        "lookup": "Toward or away from prompt lookup's guesses, the distance from the target is at most {high:.3g} %",
    }[found.direction]
    low = (
        f" (and the total variation distance at least {100 * found.tv_lower_bound:.3g} %)"
        if found.tv_lower_bound > 0
        else ""
    )
    return [
        f"{direction.format(high=100 * found.tv_upper_bound)}{low}, except with probability {found.alpha:g}.",
        f"{found.speculative.num_draws} tokens were tested; a distance of {100 * found.min_detectable_tv:.3g} % "
        f"in that direction would have been detected except with probability {found.beta:g}. Detecting the requested "
        f"{100 * found.max_tv:g} % takes {found.num_draws_needed} tokens.",
    ]


def _speculation(found: Findings) -> list[str]:
    if found.num_drafted is None:
        return ["", "Draft and accepted tokens were not counted."]
    return ["", f"{found.num_drafted} tokens were drafted, {found.num_accepted} of them accepted."]


def _table(found: Findings) -> list[str]:
    """One row per instrument, with its uncorrected p-values."""
    lines = [
        "| instrument | p with speculation | p without | found after | deviation with speculation | without |",
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
        f"Both arms having the same distribution: p = {found.arms_p_value:.2g} (needs no reference).",
    ]


def _interval(interval: ConfidenceInterval | None) -> str:
    if interval is None:
        return "-"
    return f"{interval.estimate:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"


def _arm_lines(title: str, arm: ArmFindings, logit_noise: float) -> list[str]:
    surprise = "" if arm.surprise_z is None else f" Surprise: {arm.surprise_z:+.2f} standard deviations."
    return [
        f"{title}: {arm.num_outputs} outputs, {arm.num_draws} tokens tested, seeds {arm.seeds[0]} to {arm.seeds[1]}; "
        f"{arm.num_outside['by rounding']} tokens outside the reference's support by rounding (up to "
        f"{arm.largest_gap:.3g} logits), {arm.num_outside['by more']} by more (over {logit_noise:g}).{surprise}",
        "",
        *(f"- {error}" for error in arm.errors),
        *([""] if arm.errors else []),
    ]


def _listed(values: Mapping[str, Any]) -> str:
    plain: dict[str, Any] = _plain(values)  # as in a certificate that was loaded
    return ", ".join(f"{name} {value}" for name, value in plain.items() if value not in (None, "", [], {}))


def _arm(record: Mapping[str, Any], prefix: str) -> ArmFindings:
    values = {f.name: record[prefix + f.name] for f in fields(ArmFindings)}
    values["shifts"] = {name: ConfidenceInterval(**shift) for name, shift in values["shifts"].items()}
    return ArmFindings(**values | {"seeds": tuple(values["seeds"]), "errors": tuple(values["errors"])})


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON: string keys, lists, and infinities as strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, ConfidenceInterval):
        return asdict(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
