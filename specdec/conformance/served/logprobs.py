"""Whether the log-probabilities that a server reports are the target's, tested apart from its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from specdec.conformance.certificate import Findings
from specdec.conformance.reference import Reference, Tokens

MAX_CHECKED = 64  # outputs of each arm: the reference reads them a second time


@dataclass(frozen=True, slots=True)
class Reported:
    """An output with the log-probabilities that the server reported, one per token or all but the stop token's."""

    prompt: Tokens
    tokens: Tokens
    logprobs: Sequence[float]


def check_logprobs(
    findings: Findings, reference: Reference, arms: tuple[Sequence[Reported], Sequence[Reported]]
) -> Findings:
    """The findings, lossy if log-probabilities are wrong with speculation and right without.

    arms: outputs with speculation and without. If those without are wrong as well, the audit is inconclusive.
    """
    wrong, plain_wrong = (_wrong(arm, reference, findings.logit_noise) for arm in arms)
    if plain_wrong:
        reason = f"without speculation, {plain_wrong}; the server must report the model's own at temperature 1"
        return replace(findings, verdict="inconclusive", reasons=(reason, *findings.reasons))
    if not wrong:
        return findings
    speculative = replace(findings.speculative, errors=(*findings.speculative.errors, wrong))
    reasons = (wrong, "the engine without speculation does not do this")
    kept = findings.reasons if findings.verdict == "lossy" else ()
    return replace(findings, verdict="lossy", reasons=(*reasons, *kept), speculative=speculative)


def _wrong(reported: Sequence[Reported], reference: Reference, tolerance: float) -> str | None:
    """A message about log-probabilities further than `tolerance` from the target's; None if there are none."""
    checked = reported[:MAX_CHECKED]
    expected = expected_logprobs(checked, reference)
    pairs = [
        (abs(found - exact), found, exact, place)
        for each, row in zip(checked, expected, strict=True)
        for place, (found, exact) in enumerate(zip(each.logprobs, row, strict=False))
    ]
    wrong = [pair for pair in pairs if not pair[0] <= tolerance]  # NaN is wrong
    if not wrong:
        return None
    _, found, exact, place = max(wrong)
    return (
        f"{len(wrong)} of {len(pairs)} reported log-probabilities are further than {tolerance:g} from the target's: "
        f"{found:.3g} at position {place} must be {exact:.3g}"
    )


def expected_logprobs(reported: Sequence[Reported], reference: Reference) -> list[list[float]]:
    """The target's log-probability of each token at temperature 1, without truncation."""
    rows: list[list[float]] = [[0.0] * len(each.tokens) for each in reported]
    if not reported:
        return rows
    texts = [each.prompt for each in reported], [each.tokens for each in reported]
    for positions in reference.distributions(*texts):
        logs = positions.logits.double().log_softmax(-1).gather(1, positions.tokens[:, None])[:, 0]
        cells = zip(positions.requests.tolist(), positions.places.tolist(), logs.tolist(), strict=True)
        for request, place, log in cells:
            rows[request][place] = log
    return rows
