"""Checks that a device decodes correctly: against the CPU, with and without CUDA graphs, speculative against plain.

The work is distributed over a few processes: one per dtype and rule for Llama, one per dtype for other architectures.
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
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # logits that differ by at most this count as a tie
_DISTANCE = {torch.float32: 5e-5, torch.bfloat16: 0.05}  # maximum total variation between the two devices
_REACH = 1e-4  # a uniform within this distance of a boundary counts as being at it; more for distant distributions
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
    """The checks of one process. kinds: of tiny models. verifications: rules per method. varies: checks VARIATIONS."""

    kinds: tuple[str, ...]
    dtype: torch.dtype
    temperature: float
    verifications: tuple[str, ...]
    methods: tuple[str, ...] = METHODS
    varies: bool = False


def shares() -> dict[str, Share]:
    """The shares by name, the most important first."""
    by_name: dict[str, Share] = {}
    others = ("qwen3", "qwen2", "mistral")
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        by_name |= {
            f"llama-{name}-greedy": Share(("llama",), dtype, 0.0, ("token",)),
            f"llama-{name}-token": Share(("llama",), dtype, 1.0, ("token", "block")),
            f"llama-{name}-coupled": Share(("llama",), dtype, 1.0, ("coupled",), varies=True),
            f"others-{name}": Share(others, dtype, 0.0, ("token",), METHODS[:4]),
        }
    return by_name


SMOKE = Share(("llama",), torch.float32, 1.0, ("coupled",), ("autoregressive", "draft_model", "tree"), varies=True)


def run(report: Report, device: torch.device, share: str = "") -> None:
    """Check one share, or all of them in parallel processes; on a CPU, a small one."""
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
        report.skip("bfloat16", "it needs a compute capability of at least 8.0")
        return
    for kind in share.kinds:
        with tempfile.TemporaryDirectory() as folder, report.attempt(f"{kind} is loaded"):
            folders = tiny.save(tiny.SIZES[kind], Path(folder))
            cpu, on_device = (Models.load(folders, share.dtype, place) for place in (torch.device("cpu"), device))
            for _ in Checks(report, kind, share, cpu, on_device).all():
                pass


@dataclass(frozen=True, slots=True)
class Models:
    """A target and its drafts by method, on one device."""

    target: Any
    drafts: Mapping[str, Any]

    @classmethod
    def load(cls, folders: tiny.Folders, dtype: torch.dtype, device: torch.device) -> Models:
        sources = {method: source for method in METHODS if (source := folders.draft_for(method))}
        options: dict[str, Any] = {"dtype": dtype, "device": str(device), "attention": "sdpa", "load_format": "auto"}
        target, drafts = load_with_drafts(folders.target, set(sources.values()), **options)
        return cls(target, {method: drafts[source] for method, source in sources.items()})

    def engine(self, method: Any, verification: str = "token", *, records: bool = True, **options: Any) -> Engine:
        """An engine for a method. On a CPU, records=True runs the code path of CUDA graphs without capturing."""
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


Phase = list[Completion]  # of requests decoded together


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token in which two runs differ. gap: absolute difference of the two tokens' logits."""

    phase: int
    row: int
    position: int
    actual: int
    expected: int
    gap: float | None = None

    def __str__(self) -> str:
        gap = "" if self.gap is None else f" (logits differ by {self.gap:.2g})"
        place = f"phase {self.phase}, row {self.row}, token {self.position}"
        return f"first difference at {place}: {self.actual} instead of {self.expected}{gap}"


class Checks:
    """All checks of a kind of model. cpu, on_device: the models on the CPU and on the checked device."""

    def __init__(self, report: Report, kind: str, share: Share, cpu: Models, on_device: Models) -> None:
        self.report, self.share, self.cpu, self.on_device = report, share, cpu, on_device
        distribution = "T=0" if share.temperature == 0 else f"T={share.temperature:g}"
        self.title = f"{kind} {str(share.dtype).removeprefix('torch.')} {distribution}"
        self.sampling = replace(_BASE, temperature=share.temperature)
        self.prompts = self._prompts()

    def all(self) -> Iterator[None]:
        """Run the checks sequentially; yields after each, when its facts are written."""
        for verification in self.share.verifications:
            plain = self._plain(verification)
            yield
            for method in self.share.methods[1:]:
                if verification == "block" and method == "tree":
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

    # ---- comparisons

    def _plain(self, verification: str) -> list[Phase]:
        """Compare plain decoding, with log-probabilities, with the CPU and with decoding without graphs."""
        name, sampling = f"{self.title} {_PLAIN} {verification}", replace(self.sampling, logprobs=True)
        actual = self._attempt(name, lambda: self._phases(self.on_device.engine(_PLAIN, verification), sampling))
        self._against_cpu(name, actual, _PLAIN, verification, sampling)
        self._against_unrecorded(name, actual, _PLAIN, verification, sampling)
        return actual

    def _method(self, method: str, verification: str, plain: list[Phase], **options: Any) -> None:
        """Compare a method with plain decoding where the output must be equal, else with the method on the CPU."""
        name = " ".join([self.title, method, verification, *map(str, options.values())])
        logprobs = replace(self.sampling, logprobs=method == "ngram")
        actual = self._attempt(
            name, lambda: self._phases(self.on_device.engine(method, verification, **options), logprobs)
        )
        accepted = self._acceptance(actual)
        if self.share.temperature == 0 or verification == "coupled":
            self._equal(f"{name} = plain", actual, plain, extra=accepted)
        if self.share.temperature > 0 and self.share.dtype == torch.float32:
            self._against_cpu(name, actual, method, verification, logprobs)
        if not options:
            self._against_unrecorded(name, actual, method, verification, logprobs)

    def _variation(self, name: str, options: Mapping[str, Any]) -> None:
        """Check a sampling parameter, with plain decoding and with drafts."""
        sampling, title = replace(self.sampling, **options), f"{self.title} {name}"
        plain = self._attempt(title, lambda: self._phases(self.on_device.engine(_PLAIN, "coupled"), sampling, 2))
        self._against_cpu(title, plain, _PLAIN, "coupled", sampling)
        for method in ("draft_model", "eagle"):
            if method in self.share.methods:
                run = lambda method=method: self._phases(self.on_device.engine(method, "coupled"), sampling, 2)  # noqa: E731
                self._equal(f"{title} {method} = plain", self._attempt(f"{title} {method}", run), plain)

    def _against_cpu(
        self, name: str, actual: list[Phase], method: str, verification: str, sampling: SamplingParams
    ) -> None:
        if not actual:
            return
        engine = self.cpu.engine(method, verification, records=False)
        expected = self._attempt(f"{name} on the CPU", lambda: self._phases(engine, sampling, len(actual)))

        def explain(found: Difference) -> str:
            return self._explained(found, actual, method, verification, sampling)

        self._equal(f"{name} = CPU", actual, expected, explain=explain)

    def _against_unrecorded(
        self, name: str, actual: list[Phase], method: str, verification: str, sampling: SamplingParams
    ) -> None:
        engine = self.on_device.engine(method, verification, records=False)
        expected = self._attempt(f"{name} unrecorded", lambda: self._phases(engine, sampling, 2))
        self._equal(f"{name} recorded = unrecorded", actual, expected)

    # ---- helpers

    def _prompts(self) -> list[list[list[int]]]:
        """Prompts by phase, up to three each: short; long; one beyond the initial cache capacity; the long ones again.

        The longest of the long ones repeats part of the model's output, so that n-grams match.
        """
        generator = torch.Generator().manual_seed(5)
        short, middle, long = (torch.randint(3, tiny.VOCAB, (n,), generator=generator).tolist() for n in (17, 90, 1100))
        greedy = replace(_BASE, temperature=0, max_tokens=120)
        output = self.cpu.engine(_PLAIN, records=False).generate([middle], greedy)[0].token_ids
        repeating = [*middle, *output, *middle[-30:]]
        long_ones = [repeating, short, middle]
        return [[short[:5], short, middle[:40]], long_ones, [long], long_ones]

    def _phases(self, engine: Engine, sampling: SamplingParams, num_phases: int = 4) -> list[Phase]:
        lengths = (12, 60, 60, 60)
        return [
            engine.generate(prompts, replace(sampling, max_tokens=max_tokens))
            for prompts, max_tokens in list(zip(self.prompts, lengths, strict=True))[:num_phases]
        ]

    def _attempt(self, name: str, run: Callable[[], list[Phase]]) -> list[Phase]:
        """The result of `run`; an empty list and a failed check if it raises."""
        with self.report.attempt(name):
            return run()
        return []

    def _equal(
        self,
        name: str,
        actual: list[Phase],
        expected: list[Phase],
        *,
        explain: Callable[[Difference], str] | None = None,
        extra: str = "",
    ) -> None:
        """Check that two runs are equal. explain: for two devices, why rounding can cause a difference ("" if not)."""
        if not (actual and expected):
            return
        tolerance = _TOLERANCE[self.share.dtype] * (1 if explain else 0.25)  # stricter on a single device
        found = self._difference(actual, expected)
        why = explain(found) if found and explain else ""
        detail = ", ".join(filter(None, (str(found), why))) if found else self._logprobs(actual, expected, tolerance)
        self.report.check(name, bool(why) if found else not detail, "; ".join(filter(None, (detail, extra))))

    def _explained(
        self, found: Difference, actual: list[Phase], method: str, verification: str, sampling: SamplingParams
    ) -> str:
        """Why rounding can cause a difference between two devices; empty if it cannot.

        Their distributions of the differing token must be close, and the uniform must be so close to a boundary that
        the difference of the distributions can move it to the other side.
        """
        if sampling.temperature == 0:
            return "a tie" if found.gap is not None and found.gap <= _TOLERANCE[self.share.dtype] else ""
        completion = actual[found.phase][found.row]
        cpu_probs, probs = (self._probs(m, completion, found.position, sampling) for m in (self.cpu, self.on_device))
        distance = float((cpu_probs - probs).abs().sum() / 2)
        if not distance <= _DISTANCE[self.share.dtype]:
            return ""
        # the text is prefilled here, which rounds differently from decoding step by step
        reach = max(_REACH, 2 * distance)
        if verification == "coupled":  # drafts do not change the output
            is_both = (cpu_probs > 0) & (probs > 0)
            spread = float((cpu_probs[is_both].log() - probs[is_both].log()).abs().max()) + _REACH
            position = len(completion.prompt_token_ids) + found.position
            is_near = spread <= _TOLERANCE[self.share.dtype] and wins_nearby(
                found.actual, found.expected, cpu_probs, probs, sampling.seed, position, spread
            )
        else:
            is_near = self._is_cpu_token_nearby(found, completion, method, verification, sampling, reach)
        return f"explained by distributions {distance:.1g} apart and a boundary within {reach:.1g}" if is_near else ""

    def _is_cpu_token_nearby(
        self,
        found: Difference,
        completion: Completion,
        method: str,
        verification: str,
        sampling: SamplingParams,
        reach: float,
    ) -> bool:
        """Whether the CPU also emits the device's token after shifting the uniforms from its position on by `reach`.

        The last token of a step is drawn by inverting the cumulative distribution: it suffices that the token lies
        between those drawn with both shifts. For draft and acceptance uniforms, one of the shifts must produce it.
        """

        def token(*nudged: Any) -> int | None:
            engine = self.cpu.engine(method, verification, records=False)
            nudge(engine, Nudge(len(completion.prompt_token_ids) + found.position, *nudged))
            tokens = self._phases(engine, sampling, found.phase + 1)[found.phase][found.row].token_ids
            is_same = tokens[: found.position] == completion.token_ids[: found.position]
            return tokens[found.position] if is_same else None

        low, high = token(LAST, -reach), token(LAST, reach)
        if low is not None and high is not None and low <= found.actual <= high:
            return True
        roles = () if method == _PLAIN else (Role.ACCEPT, Role.DRAFT)
        return any(token((role,), shift) == found.actual for role in roles for shift in (-reach, reach))

    def _probs(self, models: Models, completion: Completion, position: int, sampling: SamplingParams) -> torch.Tensor:
        """The distribution of a token, float32 [vocab]: logits of the models' device, sampling state on the CPU."""
        prompt, output = completion.prompt_token_ids, completion.token_ids[:position]
        logits = _next_logits(models.target, [*prompt, *output])
        state = SamplingState([sampling], [prompt], [output], logits.shape[-1], logits.device)
        return state.distribution(logits.view(1, 1, -1))[0].dense()[0, 0]

    def _difference(self, actual: list[Phase], expected: list[Phase]) -> Difference | None:
        for phase, completions in enumerate(zip(actual, expected, strict=False)):
            for row, (one, other) in enumerate(zip(*completions, strict=True)):
                pairs = zip(one.token_ids, other.token_ids, strict=True)
                if at := [i for i, (a, b) in enumerate(pairs) if a != b]:
                    first = at[0]
                    found = Difference(phase, row, first, one.token_ids[first], other.token_ids[first])
                    text = [*one.prompt_token_ids, *one.token_ids[:first]]
                    return found if self.share.temperature else replace(found, gap=self._gap(text, found))
        return None

    def _gap(self, text: Sequence[int], found: Difference) -> float:
        """Absolute difference between the logits of the two tokens after a text, on the CPU."""
        logits = _next_logits(self.cpu.target, text)
        return float((logits[found.actual] - logits[found.expected]).abs())

    def _logprobs(self, actual: list[Phase], expected: list[Phase], tolerance: float) -> str:
        """Describe log-probabilities that differ by more than the tolerance; empty if none do."""
        pairs = [
            (a, b)
            for completions in zip(actual, expected, strict=False)
            for one, other in zip(*completions, strict=True)
            for a, b in zip(one.logprobs or (), other.logprobs or (), strict=False)
        ]
        worst = max((abs(a - b) for a, b in pairs), default=0.0)
        return "" if worst <= tolerance else f"log-probabilities differ by up to {worst:.2g}"

    def _acceptance(self, phases: list[Phase]) -> str:
        counts = [completion.counts for phase in phases for completion in phase]
        drafted, accepted = sum(c.num_drafted for c in counts), sum(c.num_accepted for c in counts)
        return f"{accepted} of {drafted} draft tokens accepted" if phases else ""


@torch.inference_mode()
def _next_logits(target: Any, text: Sequence[int]) -> torch.Tensor:
    """The logits after a text, float32 [vocab] on the CPU."""
    return prefill(target, text, target.allocate(1, len(text)), 0)[0, -1].float().cpu()
