"""Toys that only the tests need; the others are in `specdec.conformance.toys`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from specdec.conformance.enumeration import RacePieces, race_pieces
from specdec.conformance.toys import (
    FeatureTarget,
    next_distribution,
)
from specdec.models.markov import MarkovModel
from specdec.sampling_params import SamplingParams

BATCH_MATES = [  # each kind of row, so that every step of the way from logits to a distribution is done for some row
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=0),
    SamplingParams(top_k=30),
    SamplingParams(top_p=0.9),
    SamplingParams(min_p=0.05),
    SamplingParams(top_p=0.8, min_p=0.02, temperature=1.3),
    SamplingParams(top_k=3, top_p=0.99),
]


class ExitTarget(FeatureTarget):
    """A Markov model of two layers, the first of which has a draft's table, over the same cache."""

    num_layers = 2

    def __init__(self, table: Tensor, first: Tensor) -> None:
        super().__init__(table)
        self.first = first

    def first_layers(self, number: int) -> MarkovModel:
        return MarkovModel(self.first)


def top_k_distribution(row: Tensor, k: int) -> Tensor:
    """A distribution cut to its k largest probabilities, ties with the k-th included; k = 0 keeps all."""
    kept = row * (row >= row.sort(descending=True).values[k - 1]) if k else row
    return kept / kept.sum()


class Automaton:
    """A constraint by a table: state -> {token: next state}, None being the end; it begins in state 0."""

    def __init__(self, table: Sequence[Mapping[int, int | None]], vocab_size: int = 3) -> None:
        self.table, self.vocab_size = table, vocab_size

    def start(self) -> int:
        return 0

    def allowed(self, state: int) -> Tensor:
        return torch.tensor([token in self.table[state] for token in range(self.vocab_size)])

    def advance(self, state: int, token: int) -> int | None:
        return self.table[state][token]

    def after(self, output: Sequence[int]) -> Mapping[int, int | None] | None:
        """What may come next, None if nothing may, walked from the start."""
        state: int | None = 0
        for token in output:
            state = None if state is None else self.table[state].get(token)
        return None if state is None else self.table[state]


def obvious_distribution(
    logits: list[float],
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    allowed: Collection[int] | None = None,
) -> list[float]:
    """The distribution after processors, by their definitions, token by token in plain Python."""
    x, vocab_size = list(logits), len(logits)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in range(vocab_size):
        if token in prompt or token in output:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        x[token] -= params.frequency_penalty * output.count(token)
        x[token] -= params.presence_penalty * (token in output)
        x[token] = x[token] if allowed is None or token in allowed else -math.inf
    if params.temperature == 0:
        return [float(token == x.index(max(x))) for token in range(vocab_size)]
    x = [value / params.temperature for value in x]
    if params.top_k:
        floor = sorted(x, reverse=True)[min(params.top_k, vocab_size) - 1]
        x = [value if value >= floor else -math.inf for value in x]
    weights = [math.exp(value - max(x)) for value in x]
    distribution = [weight / math.fsum(weights) for weight in weights]
    kept, mass = set(), 0.0
    for token in sorted(range(vocab_size), key=lambda t: -distribution[t]):
        if mass < params.top_p or params.top_p == 1:
            kept.add(token)
        mass += distribution[token]
    distribution = [p if p >= min(distribution[t] for t in kept) else 0.0 for p in distribution]
    distribution = [p if p >= params.min_p * max(distribution) else 0.0 for p in distribution]
    return [p / math.fsum(distribution) for p in distribution]


def distribution_after(
    model: MarkovModel,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    constraint: Automaton | None = None,
) -> list[float]:
    """The model's distribution after a prompt and an output under sampling parameters."""
    logits = next_distribution(model, (*prompt, *output)).log().tolist()
    return obvious_distribution(logits, params, list(prompt), list(output), constraint and constraint.after(output))


def coupled_pieces(
    models: Sequence[MarkovModel],
    prompt: Sequence[int],
    num_tokens: int,
    params: SamplingParams | None = None,
    constraint: Automaton | None = None,
) -> list[RacePieces]:
    """Pieces of noise of each position in turn, by the distributions that the models may have after any output."""
    vocabulary = range(models[0].vocab_size)
    return [
        race_pieces(
            distribution_after(model, params or SamplingParams(), prompt, output, constraint)
            for model in models
            for output in itertools.product(vocabulary, repeat=num_before)
        )
        for num_before in range(num_tokens)
    ]


def processed_distribution(
    model: MarkovModel,
    params: SamplingParams,
    prompt: Sequence[int],
    num_tokens: int,
    constraint: Automaton | None = None,
) -> dict[tuple[int, ...], float]:
    """As `joint_distribution` under all sampling parameters; a stop token ends an output."""
    distributions, unfinished = {}, {(): 1.0}
    for _ in range(num_tokens):
        longer = {
            (*output, token): probability * each
            for output, probability in unfinished.items()
            for token, each in enumerate(distribution_after(model, params, prompt, output, constraint))
            if each
        }
        distributions |= {output: p for output, p in longer.items() if output[-1] in params.stop_token_ids}
        unfinished = {output: p for output, p in longer.items() if output[-1] not in params.stop_token_ids}
    return distributions | unfinished
