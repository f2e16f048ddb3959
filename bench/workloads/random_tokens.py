"""Prompts of random tokens, alone or behind shared prefixes: for the time of a prefill, not for acceptance.

Real prompts are needed for everything else: with random ones acceptance, the experts that are touched and the output
mean nothing (SPEED-Bench, arXiv:2604.09557), so reports say so and take no speed-up from them as the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any

from bench.workloads.base import Drawn, Malformed, Prompt
from bench.workloads.trace import BLOCK

LENGTHS = {"128": 128, "1k": 1024, "2k": 2048, "8k": 8192, "16k": 16_384, "32k": 32_768}
SHARED = "shared_prefix"
WORKLOADS = {f"{kind}_{name}": (kind, size) for kind in ("random", SHARED) for name, size in LENGTHS.items()}
NUM_PROMPTS = 1024
GROUP = 8  # prompts that share the first half of their tokens


def read(data_dir: Path | None, malformed: Malformed, *, workload: str) -> list[Prompt]:
    """The prompts of one of WORKLOADS, in the order of their groups; tokens are drawn once a vocabulary is known."""
    kind, num_tokens = WORKLOADS[workload]
    num_shared = num_tokens // 2 if kind == SHARED else 0
    return [
        Prompt(f"{workload} {number}", drawn=Drawn(number, num_tokens, number // GROUP, num_shared))
        for number in range(NUM_PROMPTS)
    ]


def draw(drawn: Drawn, vocabulary: Sequence[int]) -> tuple[int, ...]:
    """The tokens of a prompt, independent and uniform; the same for the same vocabulary."""
    if drawn.blocks:
        blocks = (Random(f"block {each}").choices(vocabulary, k=BLOCK) for each in drawn.blocks)
        return tuple(islice(chain.from_iterable(blocks), drawn.num_tokens))
    shared = Random(f"prefix {drawn.group}").choices(vocabulary, k=drawn.num_shared)
    return (*shared, *Random(f"prompt {drawn.number}").choices(vocabulary, k=drawn.num_tokens - drawn.num_shared))


def vocabulary(tokenizer: Any) -> Sequence[int]:
    """Token ids to draw from: all but the special ones, which may end a text; bytes without a tokenizer."""
    if tokenizer is None:
        return range(256)
    special = set(tokenizer.all_special_ids)
    return [token for token in range(len(tokenizer)) if token not in special]


READERS = {name: partial(read, workload=name) for name in WORKLOADS}
