"""What lossy verification costs and gains: `python -m bench.tools.lossy_modes`.

For each rule of `specdec.lossy` and each setting: how far its output distribution is from the target's, per token; how
probable its output is under the target; and how much faster it is than lossless verification. Each prompt is decoded by
all rules in turn, so that times are compared prompt by prompt.

The distance of a token is exact: the target's and the draft's distributions given the tokens before it, in float32 by
teacher forcing, give the distribution by which the rule emits it there; a bonus token is the target's own and has
distance 0. FLy also looks at later draft tokens, so that its distance has no such formula: only its output's
log-probability is compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.catalogue.pairs import catalogue, folder
from bench.records.intervals import Interval, geometric_mean_interval, mean_difference_interval
from bench.workloads import registry
from specdec import Engine, SamplingParams
from specdec.conformance.reference import Reference
from specdec.conformance.statistics.lossy_sizes import first_token, kl_divergence
from specdec.conformance.statistics.sizes import total_variation
from specdec.drafts import load_with_drafts
from specdec.lossy import Fly, is_lossy, lossy_rule
from specdec.prompts import encode
from specdec.requests import Completion
from specdec.runtime.command_line import Parser
from specdec.runtime.progress import bar

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
    speedup: time per token of lossless verification over the rule's. acceptance_rate: accepted / drafted.
    """

    verification: str
    num_prompts: int
    num_tokens: int
    acceptance_rate: float
    tv: Interval | None
    kl: Interval | None
    logprob_change: Interval
    speedup: Interval


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


def cost(
    verification: str, references: Sequence[Reference], found: Sequence[Completion], lossless: Sequence[Completion]
) -> Cost:
    """The measurements of a rule by its outputs and by those of lossless verification for the same prompts."""
    nothing = [0.0] * len(found)
    of = distances(verification, references, found) if is_lossy(verification) else (nothing, nothing)
    counts = [each.counts for each in found]
    return Cost(
        verification=verification,
        num_prompts=len(found),
        num_tokens=sum(len(each.token_ids) for each in found),
        acceptance_rate=sum(each.num_accepted for each in counts) / max(1, sum(each.num_drafted for each in counts)),
        tv=mean_difference_interval(of[0], nothing) if of else None,
        kl=mean_difference_interval(of[1], nothing) if of else None,
        logprob_change=mean_difference_interval([*map(logprobs, found)], [*map(logprobs, lossless)]),
        speedup=geometric_mean_interval(
            [_seconds_per_token(b) / _seconds_per_token(a) for a, b in zip(found, lossless, strict=True)]
        ),
    )


def _seconds_per_token(completion: Completion) -> float:
    """Of decoding, without the prefill and its token."""
    return (completion.latency_s - completion.ttft_s) / max(1, len(completion.token_ids) - 1)


def measure(
    target: Any, draft: Any, references: Sequence[Reference], prompts: Sequence[Any], names: Sequence[str]
) -> list[Cost]:
    """Decode each prompt by lossless verification and by all rules in turn, and compare them."""
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
    return [cost(name, references, found[name], found[LOSSLESS]) for name in engines]


def line(cost: Cost) -> str:
    """A row of the table, in Markdown."""
    distances = (_interval(cost.tv, "no formula"), _interval(cost.kl, "no formula"))
    rest = (_interval(cost.logprob_change), f"{cost.acceptance_rate:.2f}", _interval(cost.speedup))
    return f"| {' | '.join((cost.verification, *distances, *rest))} |"


def _interval(interval: Interval | None, otherwise: str = "") -> str:
    return otherwise if interval is None else f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def parser() -> Parser:
    """The command-line parser."""
    parser = Parser(prog="python -m bench.tools.lossy_modes", description=__doc__)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", action="append", metavar="RULE", help="this rule and setting; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements here, too")
    return parser


def main() -> None:
    given = parser().parse_args()
    source = folder(str(PAIR.draft))

    def load(dtype: torch.dtype) -> tuple[Any, Any]:
        target, drafts = load_with_drafts(
            folder(PAIR.target), [source], dtype=dtype, device="cpu", attention="sdpa", load_format="auto"
        )
        return target, drafts[source]

    exact = load(torch.float32)
    sampling = SamplingParams(max_tokens=given.max_tokens, temperature=given.temperature)
    references = [Reference(model, sampling) for model in exact]
    texts = (encode(text.text, exact[0].tokenizer) for text in registry.read("humaneval", None))
    prompts = sorted(texts, key=len)[: given.num_prompts]
    costs = measure(*load(getattr(torch, given.dtype)), references, prompts, given.only or SETTINGS)
    print("| verification | TV per token | KL per token, nats | log-probability change, nats | acceptance | speed-up |")
    print("|---|---|---|---|---|---|")
    for each in costs:
        print(line(each))
    if given.json:
        given.json.write_text(json.dumps([asdict(each) for each in costs], indent=1) + "\n")


if __name__ == "__main__":
    main()
