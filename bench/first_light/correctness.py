"""Does a device decode correctly? Tiny models against the CPU, recorded against not, speculation against plain.

The work is shared out over a few processes: one for each number format and rule of the Llama, two for other kinds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.first_light import tiny
from bench.first_light.nudges import LAST, Nudge, nudge, wins_nearby
from bench.first_light.report import Report
from specdec import Completion, Engine, SamplingParams
from specdec.drafts import load_with_drafts
from specdec.models.base import prefill
from specdec.sampling.randomness import Role
from specdec.sampling.state import SamplingState

METHODS = ("autoregressive", "draft_model", "eagle", "tree", "early_exit", "ngram", "suffix", "hybrid")
_PLAIN = "autoregressive"
_ROWS = 3
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # of two logits that may be taken for a tie
_DISTANCE = {torch.float32: 5e-5, torch.bfloat16: 0.05}  # in total variation, of two devices' distributions of a token
_REACH = 1e-4  # at least so far from a boundary a uniform may lie and count as being at it
_BASE = SamplingParams(ignore_eos=True, seed=7)
VARIATIONS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 40},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.05, "temperature": 0.8},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "bias": {"logit_bias": {5: 4.0, 77: -float("inf"), 301: 2.5}},
}


@dataclass(frozen=True, slots=True)
class Share:
    """What one process checks. kinds: of tiny models. temperatures and verifications: of each method."""

    kinds: tuple[str, ...]
    dtype: torch.dtype
    temperature: float
    verifications: tuple[str, ...]
    methods: tuple[str, ...] = METHODS
    varies: bool = False


def shares() -> dict[str, Share]:
    """By name, those of which most is expected first."""
    found: dict[str, Share] = {}
    others = ("qwen3", "qwen2", "mistral")
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        found |= {
            f"llama-{name}-greedy": Share(("llama",), dtype, 0.0, ("token",)),
            f"llama-{name}-token": Share(("llama",), dtype, 1.0, ("token", "block")),
            f"llama-{name}-coupled": Share(("llama",), dtype, 1.0, ("coupled",), varies=True),
            f"others-{name}": Share(others, dtype, 0.0, ("token",), METHODS[:4]),
        }
    return found


SMOKE = Share(("llama",), torch.float32, 1.0, ("coupled",), ("autoregressive", "draft_model", "tree"), varies=True)


def run(report: Report, device: torch.device, share: str = "") -> None:
    """One share, or all of them at a time in processes of their own; on a CPU a small one."""
    if share:
        torch.set_num_threads(2)
        _check_share(report, device, shares()[share])
    elif device.type == "cpu":
        _check_share(report, device, SMOKE)
    else:
        _all_shares(report, device)


def _all_shares(report: Report, device: torch.device) -> None:
    command = [sys.executable, "-m", "bench.first_light.part", report.part, str(report.path), device.type]
    processes = {name: subprocess.Popen([*command, name]) for name in shares()}
    statuses = {name: process.wait() for name, process in processes.items()}
    for name, status in statuses.items():
        report.check(f"share {name} ends by itself", status == 0, f"exit status {status}" if status else "")


def _check_share(report: Report, device: torch.device, share: Share) -> None:
    if device.type == "cuda" and share.dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        report.skip("bfloat16", "the card's compute capability is below 8.0, which has no bfloat16")
        return
    for kind in share.kinds:
        with tempfile.TemporaryDirectory() as folder, report.attempt(f"{kind} is loaded"):
            folders = tiny.save(tiny.SIZES[kind], Path(folder))
            cpu, there = (Models.load(folders, share.dtype, place) for place in (torch.device("cpu"), device))
            for _ in Checks(report, kind, share, cpu, there).all():
                pass


@dataclass(frozen=True, slots=True)
class Models:
    """A target and its drafts by method, on one device."""

    target: Any
    drafts: Mapping[str, Any]

    @classmethod
    def load(cls, folders: tiny.Folders, dtype: torch.dtype, device: torch.device) -> Models:
        places = {method: place for method in METHODS if (place := folders.draft_for(method))}
        options: dict[str, Any] = {"dtype": dtype, "device": str(device), "attention": "sdpa", "load_format": "auto"}
        target, drafts = load_with_drafts(folders.target, set(places.values()), **options)
        return cls(target, {method: drafts[place] for method, place in places.items()})

    def engine(self, method: Any, verification: str = "token", *, records: bool = True, **options: Any) -> Engine:
        """On a CPU recorded decoding goes through the same motions; without recording it is what CI tests."""
        if method == "early_exit":
            options["exit_layer"] = self.target.num_layers - 1
        return Engine(
            self.target,
            method=method,
            draft=self.drafts.get(method),
            max_batch_size=_ROWS,
            verification=verification,
            records=records,
            **options,
        )


Phase = list[Completion]  # of the requests that are decoded together


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token that two runs do not share, or log-probabilities that differ."""

    phase: int
    row: int
    position: int
    ours: int
    theirs: int
    gap: float | None = None

    def __str__(self) -> str:
        gap = "" if self.gap is None else f", whose logits differ by {self.gap:.2g}"
        place = f"phase {self.phase}, row {self.row}, token {self.position}"
        return f"first difference at {place}: {self.ours} for {self.theirs}{gap}"


class Checks:
    """All checks of a kind of model. cpu, there: the models on the CPU and on the device that is checked."""

    def __init__(self, report: Report, kind: str, share: Share, cpu: Models, there: Models) -> None:
        self.report, self.share, self.cpu, self.there = report, share, cpu, there
        distribution = "T=0" if share.temperature == 0 else f"T={share.temperature:g}"
        self.title = f"{kind} {str(share.dtype).removeprefix('torch.')} {distribution}"
        self.sampling = replace(_BASE, temperature=share.temperature)
        self.prompts = self._prompts()

    def all(self) -> Iterator[None]:
        """Run one check after the other; each yields when its facts are written."""
        for verification in self.share.verifications:
            plain = self._plain(verification)
            yield
            for method in self.share.methods[1:]:
                if verification in ("block",) and method == "tree":
                    continue
                self._method(method, verification, plain)
                yield
        if self.share.temperature == 0 and self.share.methods == METHODS:
            for verification in ("block", "coupled"):
                self._method("draft_model", verification, plain)
                yield
            self._method("draft_model", "token", plain, num_speculative_tokens="auto")
            yield
        for name, options in VARIATIONS.items() if self.share.varies else ():
            self._variation(name, options)
            yield

    # ---- what is compared

    def _plain(self, verification: str) -> list[Phase]:
        """Plain decoding with log-probabilities: against the CPU, and recorded against not."""
        name, sampling = f"{self.title} {_PLAIN} {verification}", replace(self.sampling, logprobs=True)
        ours = self._attempt(name, lambda: self._phases(self.there.engine(_PLAIN, verification), sampling))
        self._against_cpu(name, ours, _PLAIN, verification, sampling)
        self._against_unrecorded(name, ours, _PLAIN, verification, sampling)
        return ours

    def _method(self, method: str, verification: str, plain: list[Phase], **options: Any) -> None:
        """A method: it says what plain decoding says where it must, else what it says on the CPU."""
        name = " ".join([self.title, method, verification, *map(str, options.values())])
        logprobs = replace(self.sampling, logprobs=method == "ngram")
        ours = self._attempt(name, lambda: self._phases(self.there.engine(method, verification, **options), logprobs))
        accepted = self._acceptance(ours)
        if self.share.temperature == 0 or verification == "coupled":
            self._equal(f"{name} = plain", ours, plain, extra=accepted)
        if self.share.temperature > 0 and self.share.dtype == torch.float32:
            self._against_cpu(name, ours, method, verification, logprobs)
        if not options:
            self._against_unrecorded(name, ours, method, verification, logprobs)

    def _variation(self, name: str, options: Mapping[str, Any]) -> None:
        """A sampling parameter, drafted and not."""
        sampling, title = replace(self.sampling, **options), f"{self.title} {name}"
        plain = self._attempt(title, lambda: self._phases(self.there.engine(_PLAIN, "coupled"), sampling, 2))
        self._against_cpu(title, plain, _PLAIN, "coupled", sampling)
        for method in ("draft_model", "eagle"):
            if method in self.share.methods:
                run = lambda method=method: self._phases(self.there.engine(method, "coupled"), sampling, 2)  # noqa: E731
                self._equal(f"{title} {method} = plain", self._attempt(f"{title} {method}", run), plain)

    def _against_cpu(
        self, name: str, ours: list[Phase], method: str, verification: str, sampling: SamplingParams
    ) -> None:
        if not ours:
            return
        engine = self.cpu.engine(method, verification, records=False)
        theirs = self._attempt(f"{name} on the CPU", lambda: self._phases(engine, sampling, len(ours)))

        def explain(found: Difference) -> str:
            return self._explained(found, ours, method, verification, sampling)

        self._equal(f"{name} = CPU", ours, theirs, explain=explain)

    def _against_unrecorded(
        self, name: str, ours: list[Phase], method: str, verification: str, sampling: SamplingParams
    ) -> None:
        engine = self.there.engine(method, verification, records=False)
        theirs = self._attempt(f"{name} unrecorded", lambda: self._phases(engine, sampling, 2))
        self._equal(f"{name} recorded = unrecorded", ours, theirs)

    # ---- how

    def _prompts(self) -> list[list[list[int]]]:
        """Phases of up to three prompts: short; long ones; one that outgrows the first capacity; the long ones again.

        The longest begins to repeat what the model says, so that there is something to copy.
        """
        generator = torch.Generator().manual_seed(5)
        short, middle, long = (torch.randint(3, tiny.VOCAB, (n,), generator=generator).tolist() for n in (17, 90, 1100))
        said = self.cpu.engine(_PLAIN, records=False).generate([middle], replace(_BASE, temperature=0, max_tokens=120))
        repeating = [*middle, *said[0].token_ids, *middle[-30:]]
        long_ones = [repeating, short, middle]
        return [[short[:5], short, middle[:40]], long_ones, [long], long_ones]

    def _phases(self, engine: Engine, sampling: SamplingParams, num_phases: int = 4) -> list[Phase]:
        lengths = (12, 60, 60, 60)
        return [
            engine.generate(prompts, replace(sampling, max_tokens=max_tokens))
            for prompts, max_tokens in list(zip(self.prompts, lengths, strict=True))[:num_phases]
        ]

    def _attempt(self, name: str, run: Callable[[], list[Phase]]) -> list[Phase]:
        """What `run` returns; nothing if it raises, which is a failed check."""
        with self.report.attempt(name):
            return run()
        return []

    def _equal(
        self,
        name: str,
        ours: list[Phase],
        theirs: list[Phase],
        *,
        explain: Callable[[Difference], str] | None = None,
        extra: str = "",
    ) -> None:
        """Check that two runs are equal. explain: of runs on two devices, why rounding may make this difference."""
        if not (ours and theirs):
            return
        tolerance = _TOLERANCE[self.share.dtype] * (1 if explain else 0.25)  # on one device they are the same numbers
        found = self._difference(ours, theirs)
        why = explain(found) if found and explain else ""
        detail = ", ".join(filter(None, (str(found), why))) if found else self._logprobs(ours, theirs, tolerance)
        self.report.check(name, bool(why) if found else not detail, "; ".join(filter(None, (detail, extra))))

    def _explained(
        self, found: Difference, ours: list[Phase], method: str, verification: str, sampling: SamplingParams
    ) -> str:
        """Why two devices may say different tokens there; nothing if they may not.

        Their distributions behind the text up to there must be near each other. Then the uniform must be so near a
        boundary that the difference of the distributions can move it to the other side.
        """
        if sampling.temperature == 0:
            return "a tie" if found.gap is not None and found.gap <= _TOLERANCE[self.share.dtype] else ""
        said = ours[found.phase][found.row]
        here, there = (self._probs(models, said, found.position, sampling) for models in (self.cpu, self.there))
        distance = float((here - there).abs().sum() / 2)
        if not distance <= _DISTANCE[self.share.dtype]:
            return ""
        reach = max(
            _REACH, 2 * distance
        )  # the text is read in one piece here, which rounds otherwise than step by step
        place = len(said.prompt_token_ids) + found.position
        if verification == "coupled":  # what is drafted changes nothing
            is_both = (here > 0) & (there > 0)
            spread = float((here[is_both].log() - there[is_both].log()).abs().max()) + _REACH
            numbers = (sampling.seed, place, spread)
            is_near = spread <= _TOLERANCE[self.share.dtype] and wins_nearby(
                found.ours, found.theirs, here, there, *numbers
            )
        else:
            is_near = self._is_said_nearby(found, said, method, verification, sampling, reach)
        return f"explained by distributions {distance:.1g} apart and a boundary within {reach:.1g}" if is_near else ""

    def _is_said_nearby(
        self,
        found: Difference,
        said: Completion,
        method: str,
        verification: str,
        sampling: SamplingParams,
        reach: float,
    ) -> bool:
        """Whether the CPU says our token, too, when uniforms from its position on are moved a little.

        The last token of a step is drawn in the order of ids: it suffices that ours lies between those drawn at both
        ends. Of drafted tokens, and whether they pass, one end must make it ours.
        """

        def token(*nudged: Any) -> int | None:
            engine = self.cpu.engine(method, verification, records=False)
            nudge(engine, Nudge(len(said.prompt_token_ids) + found.position, *nudged))
            tokens = self._phases(engine, sampling, found.phase + 1)[found.phase][found.row].token_ids
            is_same = tokens[: found.position] == said.token_ids[: found.position]
            return tokens[found.position] if is_same else None

        low, high = token(LAST, -reach), token(LAST, reach)
        if low is not None and high is not None and low <= found.ours <= high:
            return True
        roles = () if method == _PLAIN else (Role.ACCEPT, Role.DRAFT)
        return any(token((role,), shift) == found.ours for role in roles for shift in (-reach, reach))

    def _probs(self, models: Models, said: Completion, position: int, sampling: SamplingParams) -> torch.Tensor:
        """A device's distribution of the token there, float32 [vocab], made of its logits by the CPU."""
        prompt, output = said.prompt_token_ids, said.token_ids[:position]
        logits = _logits_behind(models.target, [*prompt, *output])
        state = SamplingState([sampling], [prompt], [output], logits.shape[-1], logits.device)
        return state.distribution(logits.view(1, 1, -1))[0].dense()[0, 0]

    def _difference(self, ours: list[Phase], theirs: list[Phase]) -> Difference | None:
        for phase, (here, there) in enumerate(zip(ours, theirs, strict=False)):
            for row, (one, other) in enumerate(zip(here, there, strict=True)):
                pairs = zip(one.token_ids, other.token_ids, strict=True)
                if at := [i for i, (a, b) in enumerate(pairs) if a != b]:
                    first = at[0]
                    found = Difference(phase, row, first, one.token_ids[first], other.token_ids[first])
                    text = [*one.prompt_token_ids, *one.token_ids[:first]]
                    return found if self.share.temperature else replace(found, gap=self._gap(text, found))
        return None

    def _gap(self, text: Sequence[int], found: Difference) -> float:
        """By how much the logits of two tokens behind a text differ on the CPU."""
        logits = _logits_behind(self.cpu.target, text)
        return float((logits[found.ours] - logits[found.theirs]).abs())

    def _logprobs(self, ours: list[Phase], theirs: list[Phase], tolerance: float) -> str:
        """What is wrong with the log-probabilities, if something is."""
        pairs = [
            (a, b)
            for here, there in zip(ours, theirs, strict=False)
            for one, other in zip(here, there, strict=True)
            for a, b in zip(one.logprobs or (), other.logprobs or (), strict=False)
        ]
        worst = max((abs(a - b) for a, b in pairs), default=0.0)
        return "" if worst <= tolerance else f"log-probabilities differ by up to {worst:.2g}"

    def _acceptance(self, phases: list[Phase]) -> str:
        counts = [completion.counts for phase in phases for completion in phase]
        drafted, accepted = sum(each.num_drafted for each in counts), sum(each.num_accepted for each in counts)
        return f"{accepted} of {drafted} drafted were accepted" if phases else ""


@torch.inference_mode()
def _logits_behind(target: Any, text: Sequence[int]) -> torch.Tensor:
    """The logits behind a text, float32 [vocab] on the CPU."""
    return prefill(target, text, target.allocate(1, len(text)), 0)[0, -1].float().cpu()
