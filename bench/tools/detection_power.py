"""Which instrument detects which mutant, after how many tokens: `python -m bench.tools.detection_power`.

Each mutant of `specdec.conformance.mutants` is planted in this library's own engine with a real pair, and its output is
judged as an audit judges one: against the target's distributions in float32, at the audit's own false-alarm rate. The
unmodified engine comes first: it must pass with the same tokens. A mutant's distance from the target is given if there
is a formula for the first token of a step, as a mean over tokens emitted by the unmodified engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bench.catalogue.pairs import folder
from bench.tools.real_rows import PAIR, RowModel, real_rows
from bench.workloads import registry
from specdec import SamplingParams
from specdec.conformance.arms import Answers, Arm
from specdec.conformance.certificate import Speculation
from specdec.conformance.mutants import MUTANTS, REPORT_MUTANTS, Maker, maker
from specdec.conformance.reference import Reference, Tokens
from specdec.conformance.statistics.contexts import Contexts
from specdec.conformance.statistics.sizes import BROKEN_DISTRIBUTIONS, total_variation
from specdec.conformance.verdicts import AuditLimits, bounds, unconfirmed
from specdec.decoding import Decoder
from specdec.drafts import load_with_drafts
from specdec.prompts import encode
from specdec.requests import Generation, Request
from specdec.runtime.command_line import Parser
from specdec.runtime.progress import bar
from specdec.sampling.randomness import uniforms
from specdec.verification import verify_tokens

GAMMA, ROWS = 4, 16
SAMPLED = SamplingParams(max_tokens=64)
HOT = replace(SAMPLED, temperature=2.0)  # more tokens may be proposed and recovered
LOGPROBS = replace(SAMPLED, logprobs=True)


@dataclass(frozen=True, slots=True)
class Setting:
    """Sampling parameters. shares_contexts: decode one prompt whose outputs begin alike, and not the usual ones."""

    sampling: SamplingParams = SAMPLED
    shares_contexts: bool = False


SHARED_TEXT = "Monday, Tuesday, Wednesday, Thursday, Friday"
SHARED_CONTEXTS = Setting(replace(HOT, max_tokens=4), shares_contexts=True)
SETTINGS = {  # of mutants that show only so, or more so
    "M4 accept uniform reused": (Setting(HOT),),
    "M8 top-k on one side": (Setting(replace(SAMPLED, top_k=20)),),
    "M11 soft greedy": (Setting(replace(SAMPLED, temperature=0.0)),),
    "M14 proposal noise reused": (Setting(), Setting(HOT)),
    "M15 draft drawn in low precision": (Setting(), Setting(HOT), SHARED_CONTEXTS),
    "M16 penalties once per step": (Setting(replace(SAMPLED, repetition_penalty=1.3)),),
    "M17 min-p and bias on the bonus only": (Setting(replace(SAMPLED, min_p=0.1)),),
    "M20 draft length peeks": (Setting(), Setting(replace(SAMPLED, temperature=0.7))),
    "M22 constant log-probability": (Setting(LOGPROBS),),
    "M22 log-probability of the draft": (Setting(LOGPROBS),),
}
STOPPING = ("M10 stop token ignored",)  # which need tokens to stop at that come often
NEVER = {"M5 accept at equality": "only a uniform of exactly 0 shows it, one draw in 2^53; the exact tests do"}
LOSSLESS = ("M13 speculation silently off",)  # nothing to find in outputs, only in the counts of drafts
PLANTED: dict[str, Callable[..., Maker]] = {"none": maker, **MUTANTS, **REPORT_MUTANTS}
FEW = 2048  # tokens are enough where outputs have nothing to find


@dataclass(frozen=True, slots=True)
class Finding:
    """The findings on a mutant, which acts in a share of the batches.

    found_by: instrument -> tokens after which it alone rejects. num_draws: tokens judged.

    sampling: parameters that differ from plain sampling. num_prompts: prompts, used in turn. on_tables:
    whether target and draft were `tables`. size: total variation between the distribution of a step's
    first token and the target's, averaged over all batches; None without a formula. tv_lower_bound: over all judged
    tokens. errors: definite errors. p_value: the smallest one, corrected for multiple tests. unconfirmed: why the
    counts of drafts do not confirm that the engine speculates, so that no audit calls it lossless; empty if they do.
    """

    mutant: str
    sampling: dict[str, Any]
    size: float | None
    tv_lower_bound: float
    found_by: dict[str, int]
    errors: tuple[str, ...]
    num_draws: int
    p_value: float
    share: float = 1.0
    unconfirmed: tuple[str, ...] = ()
    num_prompts: int | None = None
    on_tables: bool = False


def judge(
    name: str,
    decoder: Decoder,
    references: Sequence[Reference],
    prompts: Sequence[tuple[int, ...]],
    num_draws: int,
    size: float | None = None,
    sound: Decoder | None = None,
    share: float = 1.0,
) -> Finding:
    """Judge a decoder's output until an instrument finds it wrong, or `num_draws` tokens are used up.

    references: the target's and the draft's distributions, with the sampling parameters. sound, share: another decoder
    decodes all but this share of the batches, evenly spread. size: of the mutant if it acts in all batches.
    """
    target, draft = references
    limits, contexts, max_tokens = AuditLimits(), Contexts(), target.sampling.max_tokens
    arm = Arm(0, target, draft, num_draws, 0, limits, contexts)
    num_drafted = num_accepted = 0
    with bar(num_draws, "token", name) as done:
        for index, (numbers, seeds) in enumerate(_rounds(len(prompts), once=target.sampling.temperature == 0)):
            rows = [prompts[number] for number in numbers]
            acts = int((index + 1) * share) > int(index * share)
            generations = generate(decoder if acts else sound or decoder, rows, seeds, target)
            num_drafted += sum(step.num_drafted for row in generations for step in row.steps)
            num_accepted += sum(step.num_accepted for row in generations for step in row.steps)
            outputs = [row.output for row in generations]
            arm.observe(Answers(numbers, rows, seeds, outputs), max_tokens)
            contexts.add(rows, outputs)
            found = arm.findings()
            errors = (*found.errors, *_misreported(generations, target, limits.logit_noise))
            found_by = {instrument: after for instrument, after in found.found_after.items() if after is not None}
            done.update(arm.num_draws - done.n)
            if found_by or errors or arm.num_draws >= num_draws:
                break
    plain, given = (asdict(params) for params in (SAMPLED, target.sampling))
    return Finding(
        mutant=name,
        sampling={key: value for key, value in given.items() if value != plain[key]},
        size=None if size is None else size * share,
        num_prompts=len(prompts),
        share=share,
        tv_lower_bound=bounds(found, arm.level, limits).tv_lower_bound,
        found_by=found_by,
        errors=errors,
        num_draws=found.num_draws,
        p_value=found.p_value,
        unconfirmed=unconfirmed(Speculation(num_drafted, num_accepted)),
    )


def _rounds(num_prompts: int, *, once: bool) -> Iterator[tuple[list[int], list[int]]]:
    """Indices of prompts and seeds, batch by batch: endless, or each prompt once."""
    for first in range(0, num_prompts, ROWS) if once else count(0, ROWS):
        seeds = [*range(first, min(first + ROWS, num_prompts) if once else first + ROWS)]
        yield [seed % num_prompts for seed in seeds], seeds


def generate(
    decoder: Decoder, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], target: Reference
) -> list[Generation]:
    """Outputs in the order of the seeds. Equal prompts are samples of one, so that it is read once."""
    requests = []
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        sampling = replace(target.sampling, seed=seed, n=prompts.count(prompt))
        sample = prompts[:index].count(prompt)
        requests.append(Request(prompts.index(prompt), prompt, sampling, target.stop_token_ids, sample=sample))
    rows = {(row.request.index, row.request.sample): row for row in decoder.run(requests)}
    return [rows[request.index, request.sample] for request in requests]


def _misreported(generations: Sequence[Generation], target: Reference, noise: float) -> Iterator[str]:
    """What a decoder reports wrongly of its outputs: counts that do not add up to them, log-probabilities of others.

    noise: the largest difference of a log-probability that rounding explains.
    """
    for row in generations:
        num_counted = 1 + sum(step.num_accepted + (step.last is not None) for step in row.steps)
        if num_counted != len(row.output):
            yield f"prompt {row.request.index}: {num_counted} tokens were counted, but {len(row.output)} were emitted"
    if not target.sampling.logprobs:
        return
    prompts = [row.request.prompt for row in generations]
    for positions in target.distributions(prompts, [row.output for row in generations]):
        exact = positions.logits.double().log_softmax(-1).gather(1, positions.tokens.unsqueeze(1)).squeeze(1)
        cells = zip(positions.requests.tolist(), positions.places.tolist(), exact.tolist(), strict=True)
        for request, place, expected in cells:
            if abs(generations[request].logprobs[place] - expected) > noise:
                reported = generations[request].logprobs[place]
                yield f"prompt {request}: log-probability {reported:.3g} at position {place} must be {expected:.3g}"


def _settings(name: str, prompts: Sequence[tuple[int, ...]]) -> tuple[Setting, ...]:
    if name not in STOPPING:
        return SETTINGS.get(name, (Setting(),))
    tokens = [token for prompt in prompts for token in prompt]
    commonest = sorted(set(tokens), key=tokens.count, reverse=True)[:20]
    return (Setting(replace(SAMPLED, stop_token_ids=tuple(commonest))),)


def sizes(references: Sequence[Reference], prompts: Sequence[Tokens], outputs: Sequence[Tokens]) -> dict[str, float]:
    """Mean distance over the output tokens, by the name of each mutant with a formula."""
    sums, num_tokens = dict.fromkeys(BROKEN_DISTRIBUTIONS, 0.0), sum(map(len, outputs))
    for both in zip(*(each.distributions(prompts, outputs) for each in references), strict=True):
        target_probs, draft_probs = (positions.distribution.dense().double() for positions in both)
        for name, broken_distribution in BROKEN_DISTRIBUTIONS.items():
            sums[name] += float(total_variation(broken_distribution(target_probs, draft_probs), target_probs).sum())
    return {name: total / num_tokens for name, total in sums.items()}


@dataclass(frozen=True, slots=True)
class Subject:
    """The engine's target and draft, the same two for the reference, and prompts, as token ids.

    shared: the prompt of settings that share contexts.
    """

    engine: tuple[Any, Any]
    exact: tuple[Any, Any]
    prompts: Sequence[tuple[int, ...]]
    shared: tuple[int, ...]


def real_pair(num_prompts: int, dtype: torch.dtype) -> Subject:
    """The default pair in this dtype, judged in float32, on the shortest prompts of HumanEval."""
    draft = folder(str(PAIR.draft))

    def load(dtype: torch.dtype) -> tuple[Any, Any]:
        target, drafts = load_with_drafts(
            folder(PAIR.target), [draft], dtype=dtype, device="cpu", attention="sdpa", load_format="auto"
        )
        return target, drafts[draft]

    engine, exact = load(dtype), load(torch.float32)
    encoded = (tuple(encode(text.text, exact[0].tokenizer)) for text in registry.read("humaneval", None))
    prompts = sorted(encoded, key=len)[:num_prompts]  # reading prompts gives no evidence
    return Subject(engine, exact, prompts, tuple(exact[0].tokenizer(SHARED_TEXT).input_ids))


def tables(num_prompts: int, num_rows: int = 512, vocab_size: int = 4096) -> Subject:
    """Tables of the default pair's distributions, which decode some hundred times as many tokens per second."""
    target, draft = map(RowModel, real_rows(num_rows, vocab_size))
    return Subject((target, draft), (target, draft), [(number,) for number in range(num_prompts)], (0,))


def findings(
    subject: Subject, num_draws: int, names: Sequence[str] = (*PLANTED,), *, smallest: bool = False
) -> Iterator[Finding]:
    """Findings on the unmodified engine, "none", and on the mutants.

    smallest: a mutant that is found is judged again, acting in half as many batches, until it is not found.
    """
    known = dict[str, dict[str, float]]()
    for name, setting in ((each, setting) for each in names for setting in _settings(each, subject.prompts)):
        prompts = [subject.shared] if setting.shares_contexts else subject.prompts
        references = [Reference(model, setting.sampling) for model in subject.exact]
        sound, broken = (
            plant(*subject.engine, GAMMA)(uniforms, verify_tokens, ROWS) for plant in (maker, PLANTED[name])
        )
        if name in BROKEN_DISTRIBUTIONS and repr(setting) not in known:
            rows = [prompts[index % len(prompts)] for index in range(ROWS)]
            outputs = [row.output for row in generate(sound, rows, range(len(rows)), references[0])]
            known[repr(setting)] = sizes(references, rows, outputs)
        size = known[repr(setting)][name] if name in BROKEN_DISTRIBUTIONS else None
        most, share = FEW if name in (*NEVER, *LOSSLESS) else num_draws, 1.0
        while True:
            found = judge(name, broken, references, prompts, most, size, sound, share)
            yield replace(found, on_tables=isinstance(subject.engine[0], RowModel))
            if not smallest or not (found.found_by or found.errors):
                break
            share /= 2


def detected(found: Finding) -> str:
    """What found it, or that nothing did."""
    detections = [f"{name} after {after}" for name, after in sorted(found.found_by.items(), key=lambda item: item[1])]
    if found.errors:
        detections.append(f"by name: {found.errors[0]}")
    detections += [f"by counts: {reason}" for reason in found.unconfirmed]
    unseen = f"no (p = {found.p_value:.2g}){f'; {NEVER[found.mutant]}' if found.mutant in NEVER else ''}"
    return "; ".join(detections) or unseen


def line(found: Finding) -> str:
    """A row of the table, in Markdown."""
    size = "" if found.size is None else f"{found.size:.3f}"
    few = "" if found.num_prompts is None else f", {found.num_prompts} prompt{'s' * (found.num_prompts > 1)}"
    few += ", tables" if found.on_tables else ""
    where = _parameters(found.sampling) + few + ("" if found.share == 1 else f", in {found.share:.3g} of the batches")
    return f"| {found.mutant} | {where} | {size} | {detected(found)} | {found.num_draws} |"


def _parameters(sampling: dict[str, Any]) -> str:
    values = {name: len(value) if name == "stop_token_ids" else value for name, value in sampling.items()}
    return ", ".join(f"{name} {value:g}" for name, value in values.items()) or "T = 1"


def main() -> None:
    parser = Parser(prog="python -m bench.tools.detection_power", description=__doc__)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--num-draws", type=int, default=20_000, help="tokens of each mutant at the most")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings here, too")
    parser.add_argument("--tables", action="store_true", help="judge tables of the pair's distributions: much faster")
    parser.add_argument("--only", action="append", choices=PLANTED, help="this mutant; may be repeated")
    parser.add_argument("--smallest", action="store_true", help="plant each in ever fewer batches, until not found")
    given = parser.parse_args()
    print("| mutant | sampling | size | found by, tokens | tokens judged |\n|---|---|---|---|---|", flush=True)
    found = []
    names = given.only or (*PLANTED,)
    subject = tables(given.num_prompts) if given.tables else real_pair(given.num_prompts, getattr(torch, given.dtype))
    for each in findings(subject, given.num_draws, names, smallest=given.smallest):
        found.append(asdict(each))
        print(line(each), flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
