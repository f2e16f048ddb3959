"""Which instrument finds which planted bug, after how many tokens: `python -m bench.power`.

Each mutant of `specdec.conformance.mutants` is planted in this library's own engine with a real pair, and its output is
judged as an audit judges one: against the target's laws in float32, at the audit's own false-alarm rate. The engine
without a bug comes first: it must be found innocent by the same tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bench import workloads
from bench.pairs import catalogue, folder
from specdec import SamplingParams
from specdec.conformance.arms import Answers, Arm
from specdec.conformance.mutants import MUTANTS, maker
from specdec.conformance.reference import Reference
from specdec.conformance.verdicts import Limits
from specdec.decoding import Decoder
from specdec.drafts import load_with_drafts
from specdec.progress import bar
from specdec.prompts import encode
from specdec.randomness import uniforms
from specdec.requests import Request
from specdec.verification import verify_tokens

PAIR = catalogue()["smollm2-135m"]
GAMMA, ROWS, MAX_TOKENS = 4, 16, 64
SAMPLED = SamplingParams(max_tokens=MAX_TOKENS)
SAMPLING = {  # of mutants that show only so
    "M8 top-k on one side": replace(SAMPLED, top_k=20),
    "M11 soft greedy": replace(SAMPLED, temperature=0.0),
}
STOPPING = ("M10 stop token ignored",)  # which need tokens to stop at that come often
NEVER = {"M5 accept at equality": "only a uniform of exactly 0 shows it, one draw in 2^53; the exact tests do"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a mutant. found_by: instrument -> tokens after which it alone rejects. num_draws: tokens judged.

    errors: what is wrong beyond doubt. p_value: the least, corrected for their number.
    """

    mutant: str
    found_by: dict[str, int]
    errors: tuple[str, ...]
    num_draws: int
    p_value: float


def judge(
    name: str, decoder: Decoder, references: Sequence[Reference], prompts: Sequence[tuple[int, ...]], num_draws: int
) -> Finding:
    """Judge a decoder's output until an instrument finds it wrong, or `num_draws` tokens are used up.

    references: the target's and the draft's laws, with the sampling parameters.
    """
    target, draft = references
    limits = Limits()
    arm = Arm(0, target, draft, num_draws, 0, limits)
    with bar(num_draws, "token", name) as done:
        for numbers, seeds in _rounds(len(prompts), once=target.sampling.temperature == 0):
            rows = [prompts[number] for number in numbers]
            outputs = _outputs(decoder, rows, seeds, target)
            arm.observe(Answers(numbers, rows, seeds, outputs), MAX_TOKENS)
            found = arm.findings()
            found_by = {instrument: after for instrument, after in found.found_after.items() if after is not None}
            done.update(arm.num_draws - done.n)
            if found_by or found.errors or arm.num_draws >= num_draws:
                break
    return Finding(name, found_by, found.errors, found.num_draws, found.p_value)


def _rounds(num_prompts: int, *, once: bool) -> Iterator[tuple[list[int], list[int]]]:
    """Numbers of prompts and seeds, batch by batch: for ever, or each prompt once."""
    for first in range(0, num_prompts, ROWS) if once else count(0, ROWS):
        seeds = [*range(first, min(first + ROWS, num_prompts) if once else first + ROWS)]
        yield [seed % num_prompts for seed in seeds], seeds


def _outputs(
    decoder: Decoder, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], target: Reference
) -> list[list[int]]:
    requests = [
        Request(index, prompt, replace(target.sampling, seed=seed), target.stop_token_ids)
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    rows = sorted(decoder.run(requests), key=lambda row: row.request.index)
    return [row.output for row in rows]


def _sampling(name: str, prompts: Sequence[tuple[int, ...]]) -> SamplingParams:
    if name not in STOPPING:
        return SAMPLING.get(name, SAMPLED)
    tokens = [token for prompt in prompts for token in prompt]
    commonest = sorted(set(tokens), key=tokens.count, reverse=True)[:20]
    return replace(SAMPLED, stop_token_ids=tuple(commonest))


def findings(num_prompts: int, num_draws: int, dtype: torch.dtype) -> Iterator[Finding]:
    """Of the engine as it is, then of each mutant."""
    draft = folder(str(PAIR.draft))

    def load(dtype: torch.dtype) -> tuple[Any, Any]:
        target, drafts = load_with_drafts(
            folder(PAIR.target), [draft], dtype=dtype, device="cpu", attention="sdpa", load_format="auto"
        )
        return target, drafts[draft]

    engine, exact = load(dtype), load(torch.float32)
    texts = workloads.sample(workloads.read("humaneval", None), num_prompts, 0)
    prompts = [tuple(encode(prompt.text, exact[0].tokenizer)) for prompt in texts]
    for name, plant in {"none": maker, **MUTANTS}.items():
        sampling = _sampling(name, prompts)
        references = [Reference(model, sampling) for model in exact]
        decoder = plant(*engine, GAMMA)(uniforms, verify_tokens, ROWS)
        yield judge(name, decoder, references, prompts, num_draws)


def line(found: Finding) -> str:
    """A row of the table, in Markdown."""
    told = [f"{name} after {after}" for name, after in sorted(found.found_by.items(), key=lambda item: item[1])]
    if found.errors:
        told.append(f"by name: {found.errors[0]}")
    unseen = f"no (p = {found.p_value:.2g}){f'; {NEVER[found.mutant]}' if found.mutant in NEVER else ''}"
    said = "; ".join(told) or unseen
    return f"| {found.mutant} | {said} | {found.num_draws} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.power", description=__doc__)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--num-draws", type=int, default=20_000, help="tokens of each mutant at the most")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings here, too")
    given = parser.parse_args()
    print("| mutant | found by, tokens | tokens judged |\n|---|---|---|", flush=True)
    found = []
    for each in findings(given.num_prompts, given.num_draws, getattr(torch, given.dtype)):
        found.append(asdict(each))
        print(line(each), flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
