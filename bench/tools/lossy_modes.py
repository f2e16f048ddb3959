"""What lossy verification costs and gains: `python -m bench.tools.lossy_modes`.

For each rule of `specdec.lossy` and each setting: how far its output distribution is from the target's, per token; how
probable its output is under the target; how its outputs score in the workload's task; and how much faster it is than
lossless verification. Each prompt is decoded by all rules in turn, so that times are compared prompt by prompt.

The distance of a token is exact: the target's and the draft's distributions given the tokens before it, in float32 by
teacher forcing, give the distribution by which the rule emits it there; a bonus token is the target's own and has
distance 0. FLy also looks at later draft tokens, so that its distance has no such formula: only its output's
log-probability is compared.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.catalogue.pairs import catalogue, folder
from bench.measure.machine import information
from bench.measure.quality.scores import metric_of, score
from bench.records.intervals import Interval, geometric_mean_interval, mean_difference_interval
from bench.report.charts import files
from bench.report.charts.model import Chart, Series
from bench.workloads import registry
from bench.workloads.base import Prompt
from specdec import AcceptanceCounts, Engine, SamplingParams
from specdec.conformance.reference import Reference
from specdec.conformance.statistics.lossy_sizes import first_token, kl_divergence
from specdec.conformance.statistics.sizes import total_variation
from specdec.drafts import load_with_drafts
from specdec.lossy import Fly, is_lossy, lossy_rule
from specdec.prompts import encode
from specdec.requests import Completion
from specdec.runtime.command_line import Parser
from specdec.runtime.progress import bar
from specdec.texts import continuation

PAIR, GAMMA, LOSSLESS = catalogue()["smollm2-135m"], 4, "token"
SETTINGS = (
    *(f"lossy:typical(epsilon={epsilon}, delta={delta})" for epsilon, delta in ((0.09, 0.3), (0.3, 0.09), (0.3, 0.3))),
    *(f"lossy:threshold(single={single}, acc=1)" for single in (0.9, 0.5, 0.2)),
    "lossy:threshold(single=1, acc=0.5)",
    *(f"lossy:top_k(k={k}, delta={delta})" for k, delta in ((2, 0.6), (10, 0.6), (10, 2))),
    *(f"lossy:fly(window={window}, entropy=0.3)" for window in (1, 2)),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """The measurements of one rule over the prompts; intervals are 95 % intervals over prompts.

    tv, kl: distance of the rule's distribution from the target's, mean over tokens; kl in nats; None without a formula.
    logprob_change: mean log-probability of its tokens under the target, less that of lossless verification, in nats.
    quality: mean score of its outputs in the workload's task; None if the workload has no score, or runs code for it.
    quality_change: that less the score of lossless verification.
    speedup: time per token of lossless verification over the rule's. acceptance_rate: accepted / drafted.
    mean_acceptance_length: tokens per target call, which does not depend on how busy the machine is.
    """

    verification: str
    num_prompts: int
    num_tokens: int
    acceptance_rate: float
    mean_acceptance_length: float
    tv: Interval | None
    kl: Interval | None
    logprob_change: Interval
    speedup: Interval
    quality: float | None = None
    quality_change: Interval | None = None


def distances(
    verification: str, references: Sequence[Reference], completions: Sequence[Completion]
) -> tuple[list[float], list[float]] | None:
    """Mean total variation and Kullback-Leibler divergence over the tokens of each output; None without a formula.

    references: of the target and of the draft, with the sampling parameters.
    """
    rule = lossy_rule(verification)
    if isinstance(rule, Fly):
        return None
    sums = torch.zeros(2, len(completions), dtype=torch.float64)
    texts = [each.prompt_token_ids for each in completions], [each.token_ids for each in completions]
    for both in zip(*(each.distributions(*texts) for each in references), strict=True):
        cells = zip(both[0].requests.tolist(), both[0].places.tolist(), strict=True)
        verified = torch.tensor([completions[i].sources[place] in ("accepted", "recovered") for i, place in cells])
        target_probs, draft_probs = (positions.distribution.dense()[verified].double() for positions in both)
        emitted = first_token(rule, target_probs, draft_probs)
        values = torch.stack([total_variation(emitted, target_probs), kl_divergence(emitted, target_probs)])
        sums.index_add_(1, both[0].requests[verified], values)
    tv, kl = (sums / torch.tensor([len(each.token_ids) for each in completions])).tolist()
    return tv, kl


def logprobs(completion: Completion) -> float:
    """Mean log-probability of the output's tokens under the target."""
    assert completion.logprobs is not None
    return sum(completion.logprobs) / len(completion.logprobs)


def scores(prompts: Sequence[Prompt], completions: Sequence[Completion], tokenizer: Any) -> list[float] | None:
    """The score of each output, from 0 to 1; None if the prompts have no score, or one for which code is run."""
    if metric_of(prompts) not in ("exact_match", "rouge_1"):
        return None
    texts = [continuation(tokenizer, each.token_ids) for each in completions]
    return [score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def cost(
    verification: str,
    references: Sequence[Reference],
    found: Sequence[Completion],
    lossless: Sequence[Completion],
    qualities: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Cost:
    """The measurements of a rule by its outputs and by those of lossless verification for the same prompts.

    qualities: scores of both.
    """
    nothing = [0.0] * len(found)
    of = distances(verification, references, found) if is_lossy(verification) else (nothing, nothing)
    counts = AcceptanceCounts.total(each.counts for each in found)
    return Cost(
        verification=verification,
        num_prompts=len(found),
        num_tokens=sum(len(each.token_ids) for each in found),
        acceptance_rate=counts.acceptance_rate or 0.0,
        mean_acceptance_length=counts.mean_acceptance_length or 0.0,
        tv=mean_difference_interval(of[0], nothing) if of else None,
        kl=mean_difference_interval(of[1], nothing) if of else None,
        logprob_change=mean_difference_interval([*map(logprobs, found)], [*map(logprobs, lossless)]),
        speedup=geometric_mean_interval(
            [_seconds_per_token(b) / _seconds_per_token(a) for a, b in zip(found, lossless, strict=True)]
        ),
        quality=fmean(qualities[0]) if qualities else None,
        quality_change=mean_difference_interval(*qualities) if qualities else None,
    )


def _seconds_per_token(completion: Completion) -> float:
    """Of decoding, without the prefill and its token."""
    return (completion.latency_s - completion.ttft_s) / max(1, len(completion.token_ids) - 1)


def measure(
    target: Any,
    draft: Any,
    references: Sequence[Reference],
    prompts: Sequence[Any],
    names: Sequence[str],
    asked: Sequence[Prompt] = (),
) -> list[Cost]:
    """Decode each prompt by lossless verification and by all rules in turn, and compare them.

    prompts: token ids. asked: the prompts with the truth that they are scored by; none is scored if it is empty.
    """
    engines = {
        name: Engine(target, method="draft_model", draft=draft, num_speculative_tokens=GAMMA, verification=name)
        for name in (LOSSLESS, *names)
    }
    found: dict[str, list[Completion]] = {name: [] for name in engines}
    sampling = replace(references[0].sampling, ignore_eos=True, logprobs=True)  # outputs of one length
    for engine in engines.values():  # warm-up
        engine.generate([prompts[0]], replace(sampling, max_tokens=8))
    with bar(len(prompts) * len(engines), "output", "lossy modes") as done:
        for index, prompt in enumerate(prompts):
            for name, engine in engines.items():
                found[name] += engine.generate([prompt], replace(sampling, seed=index))
                done.update(1)
    scored = {name: scores(asked, found[name], target.tokenizer) if asked else None for name in engines}
    plain = scored[LOSSLESS]
    pairs = {name: (each, plain) if each and plain else None for name, each in scored.items()}
    return [cost(name, references, found[name], found[LOSSLESS], pairs[name]) for name in engines]


HEAD = (
    "| verification | TV per token | KL per token, nats | log-probability change, nats | score | score change | "
    "acceptance | tokens per call | speed-up |\n" + "|---" * 9 + "|"
)


def table(costs: Sequence[Cost]) -> str:
    """All measurements, in Markdown."""
    return "\n".join([HEAD, *map(line, costs)])


def line(cost: Cost) -> str:
    """A row of the table, in Markdown."""
    cells = (
        cost.verification,
        _interval(cost.tv, "no formula"),
        _interval(cost.kl, "no formula"),
        _interval(cost.logprob_change),
        "none" if cost.quality is None else f"{cost.quality:.3f}",
        _interval(cost.quality_change, "none"),
        f"{cost.acceptance_rate:.2f}",
        f"{cost.mean_acceptance_length:.2f}",
        _interval(cost.speedup),
    )
    return f"| {' | '.join(cells)} |"


def _interval(interval: Interval | None, otherwise: str = "") -> str:
    return otherwise if interval is None else f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def curve(costs: Sequence[Cost], about: str) -> Chart:
    """Speed-up against distance from the target's distribution, a series for each rule. about: models and prompts."""
    families: dict[str, list[Cost]] = {}
    for each in costs:
        if each.tv is not None:
            families.setdefault(each.verification.removeprefix("lossy:").partition("(")[0], []).append(each)
    return Chart(
        name="tv-speedup",
        title=f"Speed-up of lossy verification, by its distance from the target\n{about}",
        x_label="total variation distance per token",
        y_label="speed-up over lossless verification",
        series=tuple(_series(kind - 1, *family) for kind, family in enumerate(families.items())),
    )


def _series(kind: int, label: str, costs: Sequence[Cost]) -> Series:
    ordered = sorted(costs, key=lambda each: each.tv.estimate if each.tv else 0.0)
    return Series(
        label="lossless" if label == LOSSLESS else label,
        x=tuple(each.tv.estimate for each in ordered if each.tv),
        y=tuple(each.speedup.estimate for each in ordered),
        low=tuple(each.speedup.low or each.speedup.estimate for each in ordered),
        high=tuple(each.speedup.high or each.speedup.estimate for each in ordered),
        kind=kind,
        names=tuple(each.verification.partition("(")[2].rstrip(")") or "lossless" for each in ordered),
    )


def read(path: Path) -> list[Cost]:
    """The measurements of a file that `--json` wrote."""
    return [
        Cost(**{name: _plain(value) for name, value in each.items()}) for each in json.loads(path.read_text())["costs"]
    ]


def _plain(value: Any) -> Any:
    return Interval(**value) if isinstance(value, dict) else value


def parser() -> Parser:
    """The command-line parser."""
    parser = Parser(prog="python -m bench.tools.lossy_modes", description=__doc__)
    parser.add_argument("--num-prompts", type=int, default=16, help="the shortest ones (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--workload", default="humaneval", help="as `pytest bench/` names them (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, help="folder with the data sets' files")
    parser.add_argument("--only", action="append", metavar="RULE", help="this rule and setting; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements here, too")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw speed-up against distance here, as SVG")
    return parser


def main() -> None:
    given, busy = parser().parse_args(), os.getloadavg()[0]
    target, draft = _load(getattr(torch, given.dtype))
    sampling = SamplingParams(max_tokens=given.max_tokens, temperature=given.temperature)
    references = [Reference(model, sampling) for model in _load(torch.float32)]
    asked = registry.read(given.workload, given.data_dir)
    by_length = sorted(((encode(each.text, target.tokenizer), each) for each in asked), key=lambda pair: len(pair[0]))
    prompts, asked = map(list, zip(*by_length[: given.num_prompts], strict=True))
    costs = measure(target, draft, references, prompts, given.only or SETTINGS, asked)
    print(table(costs))
    if given.json:
        given.json.write_text(json.dumps(_record(costs, busy), indent=1) + "\n")
    if given.plots:
        about = f"{PAIR.name}, {given.dtype} on cpu, {given.workload}, gamma {GAMMA}, temperature {given.temperature:g}"
        footer = f"{len(prompts)} prompts of {given.max_tokens} tokens; load {busy:.1f} on {os.cpu_count()} CPUs"
        files.write([curve(costs, about)], given.plots, "lossy-modes", footer)


def _load(dtype: torch.dtype) -> tuple[Any, Any]:
    """Target and draft model."""
    source = folder(str(PAIR.draft))
    target, drafts = load_with_drafts(
        folder(PAIR.target), [source], dtype=dtype, device="cpu", attention="sdpa", load_format="auto"
    )
    return target, drafts[source]


def _record(costs: Sequence[Cost], busy: float) -> dict[str, Any]:
    """What `--json` writes. load_averages: of the last minute, before and after, as times depend on it."""
    return {
        "command": shlex.join(["python", "-m", "bench.tools.lossy_modes", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": information(),
        "load_averages": [busy, os.getloadavg()[0]],
        "costs": [asdict(each) for each in costs],
    }


if __name__ == "__main__":
    main()
