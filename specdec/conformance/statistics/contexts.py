"""Which tokens followed the same context before.

An engine may emit the wrong tokens at each context and still be right on average over contexts, as if each context had
a few tokens of its own that it draws too often. Only tokens of the same context show that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Node = dict[int, "Node"]

RARITIES = (1.0, 2.0**-4, 2.0**-8, 2.0**-12)
"""Largest probability of the tokens in each set: the less likely they were, the more a repetition says."""


class Contexts:
    """A trie of the outputs of each prompt. A context is a prompt and the tokens emitted after it."""

    def __init__(self) -> None:
        self._roots: dict[tuple[int, ...], Node] = {}

    def add(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> None:
        for prompt, output in zip(prompts, outputs, strict=True):
            node = self._roots.setdefault(tuple(prompt), {})
            for token in output:
                node = node.setdefault(token, {})

    def followers(self, prompt: Sequence[int], output: Sequence[int]) -> Iterator[Collection[int]]:
        """For each token of an output, the tokens that followed its context in the outputs added so far."""
        node = self._roots.get(tuple(prompt), {})
        for token in output:
            yield node.keys()
            node = node.get(token, {})


def seen_before(probs: Tensor, tokens: Tensor, followers: Sequence[Collection[int]]) -> tuple[Array, Array]:
    """Total probability of each row's followers up to each of RARITIES, and whether the token is one of them.

    Tokens of probability 0 do not count: emitting one is an error of its own, or rounding.

    Args:
        probs: float [n, vocab], the exact distributions.
        tokens: int64 [n], the emitted tokens.
        followers: n sets of tokens.

    Returns:
        Two arrays, float64 [n, rarities].
    """
    counts = [len(each) for each in followers]
    rows = np.repeat(np.arange(len(counts)), counts)
    columns = np.fromiter((token for each in followers for token in each), np.int64, len(rows))
    found = probs[torch.from_numpy(rows).to(probs.device), torch.from_numpy(columns).to(probs.device)]
    found_probs = found.double().clamp(max=1).numpy(force=True)
    is_token = columns == tokens.numpy(force=True)[rows]
    prob, hit = np.zeros((len(counts), len(RARITIES))), np.zeros((len(counts), len(RARITIES)))
    for index, rarity in enumerate(RARITIES):
        is_rare = (found_probs > 0) & (found_probs <= rarity)
        prob[:, index] = np.bincount(rows, found_probs * is_rare, len(counts))
        hit[:, index] = np.bincount(rows, is_token & is_rare, len(counts))
    return prob.clip(max=1), hit
