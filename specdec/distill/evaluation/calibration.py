"""How well a draft's confidence predicts acceptance: a reliability table and the expected calibration error.

A draft's confidence in a position, given that all earlier positions were accepted, is the output of its confidence head
if it has one (DSpark), else the largest probability of its distribution. Adaptive draft lengths trust it up to a common
factor, so what counts is that it ranks positions and is proportional to the rate of acceptance.

Source of the error: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 3.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from specdec.assembly import VERIFICATIONS
from specdec.decoding import Decoder
from specdec.distill import prompts
from specdec.drafts import check_draft, kind_of, load_with_drafts
from specdec.methods import METHODS, Parts
from specdec.models.base import LanguageModel
from specdec.models.costs import StepCosts
from specdec.models.loading import as_dtype
from specdec.prompts import encode
from specdec.proposers.adaptive import AdaptiveLength
from specdec.requests import Request
from specdec.sampling_params import SamplingParams

if TYPE_CHECKING:
    from specdec.drafts import AnyDraft

NUM_BINS = 10
_RESAMPLES = 1000


class ObservedConfidence(AdaptiveLength):
    """Never ends a draft, and records the confidence in each tested position, with whether it was accepted.

    For batches of one row. A draft's last token is not recorded, as no decision follows it.
    """

    def __init__(self) -> None:
        super().__init__(StepCosts((1.0,), 0.0))
        self.observed: list[tuple[float, bool]] = []
        self._reach: list[float] = []

    def pays(self, reach: Sequence[float], num_drafted: int) -> list[bool]:
        (reached,) = reach
        self._reach = [*self._reach[:num_drafted], reached]
        return [reached > 0]

    def observe(self, decided: Sequence[tuple[int, int]]) -> None:
        ((num_drafted, num_accepted),) = decided
        reach = self._reach[:num_drafted]
        confidences = [after / before for before, after in pairwise(reach)]
        tested = confidences[: num_accepted + 1]
        self.observed += [(confidence, place < num_accepted) for place, confidence in enumerate(tested)]
        self._reach = []


@dataclass(frozen=True, slots=True)
class Bin:
    """Positions whose confidence lies in one of NUM_BINS equal intervals: their number and two means."""

    number: int
    confidence: float
    accepted: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """error: the expected calibration error, with a 95 % interval. scale: accepted / sum of confidences."""

    bins: list[Bin]
    error: float
    interval: tuple[float, float]
    scale: float


def observe(
    target: LanguageModel, draft: AnyDraft, asked: Sequence[Sequence[int]], sampling: SamplingParams, num_tokens: int
) -> list[list[tuple[float, bool]]]:
    """For each prompt, (confidence, accepted) of the tested draft positions, for drafts of num_tokens >= 2.

    Raises ValueError if the draft's method does not end drafts early, so that there is no confidence to observe.
    """
    kind = kind_of(draft)
    spec = METHODS["draft_model" if kind == "model" else kind]
    if not spec.is_adaptive or spec.build is None:
        raise ValueError(f"draft: a {kind} has no confidence; use a head or a draft model")
    observed, shared = [], check_draft(target, draft)  # compares vocabularies
    for number, prompt in enumerate(asked):
        confidence = ObservedConfidence()
        proposer = spec.build(Parts(target, draft, shared, confidence))
        decoder = Decoder(target, proposer, num_tokens, rule=VERIFICATIONS["token"], adaptive=confidence, records=False)
        list(decoder.run([Request(number, tuple(prompt), sampling)]))
        observed.append(confidence.observed)
    return observed


def calibrate(observed: Sequence[Sequence[tuple[float, bool]]], seed: int = 0) -> Calibration:
    """The calibration of observations, by prompt; the interval resamples prompts.

    Raises ValueError if nothing was observed.
    """
    texts = [np.array(each, dtype=np.float64).reshape(-1, 2) for each in observed]
    together = np.concatenate(texts) if texts else np.empty((0, 2))
    if not len(together):
        raise ValueError("no draft position was tested; use more prompts, or drafts of at least 2 tokens")
    chosen = np.random.default_rng(seed).integers(len(texts), size=(_RESAMPLES, len(texts)))
    errors = [_error(_bins(np.concatenate([texts[index] for index in row]))) for row in chosen]
    low, high = np.quantile(errors, (0.025, 0.975)).tolist()
    bins, confidence = _bins(together), together[:, 0].sum()
    return Calibration(bins, _error(bins), (low, high), float(together[:, 1].sum() / confidence))


def table(found: Calibration) -> str:
    """The reliability table as text, and the error under it."""
    lines = ["confidence  accepted  positions"]
    for each in found.bins:
        bar = "#" * round(20 * each.accepted)
        lines.append(f"{each.confidence:10.3f}  {each.accepted:8.3f}  {each.number:9d}  {bar}")
    low, high = found.interval
    lines.append(f"expected calibration error {found.error:.3f} [{low:.3f}, {high:.3f}], 95 % over prompts")
    lines.append(f"accepted / confidence {found.scale:.3f}; adaptive lengths correct this factor by themselves")
    return "\n".join(lines)


def measure_calibration(options: Namespace) -> None:
    """Measure how well a draft's confidence predicts acceptance."""
    target, drafts = load_with_drafts(
        options.target,
        [options.draft],
        load_format="auto",
        dtype=as_dtype(options.dtype),
        device=options.device,
        allow_pickle=options.allow_pickle,
    )
    asked = [encode(each.prompt, target.tokenizer) for each in prompts.read_dialogues(options.prompts)]
    fitting = [each for each in asked if len(each) + options.max_tokens <= target.context_length]
    for temperature in options.temperatures:
        sampling = SamplingParams(temperature=temperature, max_tokens=options.max_tokens, seed=options.seed)
        observed = observe(
            target, drafts[options.draft], fitting[: options.num_prompts], sampling, options.num_speculative_tokens
        )
        print(f"temperature {temperature:g}, {options.draft}\n{table(calibrate(observed, options.seed))}")


def _bins(observed: np.ndarray) -> list[Bin]:
    """The bins that are not empty, of (confidence, accepted) [n, 2]."""
    places = np.clip((observed[:, 0] * NUM_BINS).astype(int), 0, NUM_BINS - 1)
    parts = [observed[places == place] for place in range(NUM_BINS)]
    return [Bin(len(part), *part.mean(0).tolist()) for part in parts if len(part)]


def _error(bins: Sequence[Bin]) -> float:
    """The mean distance between confidence and acceptance over all positions."""
    return sum(each.number * abs(each.confidence - each.accepted) for each in bins) / sum(each.number for each in bins)
