"""Tables of a real pair's distributions: models that are as cheap as toys and as wide and sharp as language models.

Rows are the distributions of the default pair after the tokens of real prompts, and the last two tokens of a text
choose the row of the next. Of the vocabulary, the tokens with the largest total probability are kept, and the rows
renormalized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.catalogue.pairs import catalogue, folder
from bench.workloads import registry
from specdec import SamplingParams
from specdec.conformance.reference import Reference, Tokens
from specdec.drafts import load_with_drafts
from specdec.models.markov import MarkovModel
from specdec.prompts import encode

PAIR = catalogue()["smollm2-135m"]


class _Rows:
    """A table [vocab, vocab, vocab] of few different rows. rows: float64 [n, vocab]."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __getitem__(self, places: tuple[Tensor, Tensor]) -> Tensor:
        previous, last = places
        return self._rows[(31 * previous + last) % len(self._rows)]


class RowModel(MarkovModel):
    """A Markov model of a wide vocabulary, whose two last tokens choose one of the rows, float64 [n, vocab]."""

    def __init__(self, rows: Tensor) -> None:
        self.table = _Rows(rows)  # type: ignore[assignment]  # it is only indexed
        self.vocab_size, self.context_length, self.device = rows.shape[1], 1 << 20, rows.device


def real_rows(num_rows: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Distributions of the default pair after the same tokens of HumanEval's prompts, two float64 [rows, vocab]."""
    draft = folder(str(PAIR.draft))
    target, drafts = load_with_drafts(
        folder(PAIR.target), [draft], dtype=torch.float32, device="cpu", attention="sdpa", load_format="auto"
    )
    texts = [encode(text.text, target.tokenizer) for text in registry.read("humaneval", None)]
    kept: Tensor | None = None
    tables = []
    models: tuple[Any, Any] = (target, drafts[draft])
    for model in models:
        probs = _probs(Reference(model, SamplingParams()), texts, num_rows)
        kept = probs.sum(0).topk(vocab_size).indices.sort().values if kept is None else kept
        rows = probs[:, kept].double()
        tables.append(rows / rows.sum(-1, keepdim=True))
    return tables[0], tables[1]


def _probs(reference: Reference, texts: Sequence[Tokens], num_rows: int) -> Tensor:
    """After each token of the texts, until there are enough; float [num_rows, vocab]."""
    found: list[Tensor] = []
    for text in texts:
        found += [each.distribution.dense() for each in reference.distributions([text[:1]], [text[1:]])]
        if sum(map(len, found)) >= num_rows:
            break
    return torch.cat(found)[:num_rows]
