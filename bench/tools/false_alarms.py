"""False alarms of the audit on a real model's distributions: `python -m bench.tools.false_alarms --json FILE`.

Many audits of this library's own engine, which is lossless, each with its own seeds. So that hundreds are affordable,
target and draft are tables whose rows are logits of the default pair, one after each token of real prompts: two tokens
of a text choose the row of the next. Everything else is real: the decode loop, drafts, verification, random numbers and
the audit. Of the vocabulary, the tokens with the largest total probability are kept, and the rows renormalized.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from bench.tools.real_rows import RowModel, real_rows
from specdec import SamplingParams
from specdec.conformance.audit import audit
from specdec.conformance.certificate import Findings
from specdec.conformance.reference import Reference, Tokens
from specdec.conformance.statistics.betting import min_detectable_tv
from specdec.conformance.statistics.instruments import INSTRUMENTS
from specdec.conformance.verdicts import AuditLimits
from specdec.decoding import Decoder
from specdec.proposers.draft_model import DraftModelProposer
from specdec.requests import Generation, Request
from specdec.runtime.command_line import Parser
from specdec.runtime.progress import bar
from specdec.sampling.randomness import uniforms

GAMMA, ROWS = 4, 16
SAMPLED = SamplingParams(max_tokens=16, ignore_eos=True)
PROMPTS = [[number] for number in range(8)]
LEVELS = (0.05, 0.01, 1e-6)


@dataclass(frozen=True, slots=True)
class Alarms:
    """What audits of a lossless engine found.

    num_audits, num_draws: audits, and tokens of each arm in each. num_rows, vocab_size: of the tables. verdicts: how
    often each came out. num_below: for each test and level of LEVELS, how many p-values were at most that; of both arms
    for the instruments, one per audit for "arms". num_errors: messages on what no lossless engine does.
    smallest: the smallest p-value of each test.
    """

    num_audits: int
    num_draws: int
    num_rows: int
    vocab_size: int
    verdicts: dict[str, int]
    num_below: dict[str, list[int]]
    num_errors: int
    smallest: dict[str, float]


class RowEngine:
    """An engine of two tables; its speculative arm drafts from the second."""

    def __init__(self, target: RowModel, draft: RowModel) -> None:
        self.target, self.draft, self.num_drafted, self.num_accepted = target, draft, 0, 0

    def speculative(self, prompts: Sequence[Tokens], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        decoder = Decoder(
            self.target, DraftModelProposer(self.draft, uniforms), GAMMA, max_batch_size=len(prompts), uniforms=uniforms
        )
        rows = _generate(decoder, prompts, seeds, max_tokens)
        self.num_drafted += sum(step.num_drafted for row in rows for step in row.steps)
        self.num_accepted += sum(step.num_accepted for row in rows for step in row.steps)
        return [row.output for row in rows]

    def plain(self, prompts: Sequence[Tokens], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        decoder = Decoder(self.target, max_batch_size=len(prompts), uniforms=uniforms)
        return [row.output for row in _generate(decoder, prompts, seeds, max_tokens)]


def _generate(decoder: Decoder, prompts: Sequence[Tokens], seeds: Sequence[int], max_tokens: int) -> list[Generation]:
    requests = [
        Request(index, tuple(prompt), replace(SAMPLED, seed=seed, max_tokens=max_tokens))
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    return sorted(decoder.run(requests), key=lambda row: row.request.index)


def run(target_rows: Tensor, draft_rows: Tensor, num_audits: int, num_draws: int) -> Alarms:
    """Audit the lossless engine with these tables again and again."""
    target, draft = RowModel(target_rows), RowModel(draft_rows)
    references = [Reference(model, SAMPLED, ROWS) for model in (target, draft)]
    limits, found = AuditLimits(max_tv=min_detectable(num_draws)), []
    with bar(num_audits, "audit") as done:
        for seed in range(num_audits):
            engine = RowEngine(target, draft)
            found.append(
                audit(
                    engine, references[0], PROMPTS, draft=references[1], num_draws=num_draws, batch_size=ROWS,
                    seed=seed, limits=limits, progress=False,
                )
            )  # fmt: skip
            done.update()
    p_values = _p_values(found)
    return Alarms(
        num_audits=num_audits,
        num_draws=num_draws,
        num_rows=len(target_rows),
        vocab_size=target.vocab_size,
        verdicts=dict(Counter(each.verdict for each in found)),
        num_below={name: [int((values <= level).sum()) for level in LEVELS] for name, values in p_values.items()},
        num_errors=sum(len(arm.errors) for each in found for arm in (each.speculative, each.control)),
        smallest={name: float(values.min()) for name, values in p_values.items()},
    )


def min_detectable(num_draws: int) -> float:
    """A bound that an audit of so few tokens can claim, so that its verdict is not inconclusive for want of tokens."""
    plain = AuditLimits()
    return min_detectable_tv(num_draws, plain.alpha / (len(INSTRUMENTS) + 1), plain.beta) + 1e-6


def _p_values(found: Sequence[Findings]) -> dict[str, np.ndarray]:
    arms = [arm for each in found for arm in (each.speculative, each.control)]
    values = {name: np.array([arm.p_values[name] for arm in arms]) for name in arms[0].shifts}
    return values | {"arms": np.array([each.arms_p_value for each in found])}


def main() -> None:
    parser = Parser(prog="python -m bench.tools.false_alarms", description=__doc__)
    parser.add_argument("--num-audits", type=int, default=200)
    parser.add_argument("--num-draws", type=int, default=1000, help="tokens of each arm in each audit")
    parser.add_argument("--num-rows", type=int, default=512, help="positions of the prompts that rows are taken from")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens that are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here, too")
    given = parser.parse_args()
    rows = real_rows(given.num_rows, given.vocab_size)
    found = run(*rows, given.num_audits, given.num_draws)
    text = json.dumps(asdict(found), indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
