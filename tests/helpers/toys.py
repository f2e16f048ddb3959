"""Markov pairs whose every threshold lies on a small grid, so that a grid of uniforms gives the exact distribution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from specdec.models.markov import MarkovCache, MarkovModel
from specdec.sampling_params import SamplingParams

# Quarters, such that target/draft is 0, 1/2, 1 or more and every residual is made of halves.
QUARTERS = torch.tensor([[2, 1, 1], [1, 2, 1], [1, 1, 2], [2, 2, 0], [0, 2, 2], [2, 0, 2]]).double() / 4
HALVES = QUARTERS[3:]  # such that a grid of two points will do for accepting and for the last token

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


def table(seed: int, rows: Tensor = QUARTERS) -> Tensor:
    """A table [vocab, vocab, vocab] whose rows are chosen at random from the given distributions."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = rows.shape[1]
    return rows[torch.randint(len(rows), (vocab_size, vocab_size), generator=generator)]


def grid_pair(seed: int) -> tuple[MarkovModel, MarkovModel]:
    """(target, draft) over three tokens, both on the grid of quarters."""
    return MarkovModel(table(2 * seed)), MarkovModel(table(2 * seed + 1))


class FeatureTarget(MarkovModel):
    """A Markov model whose feature of a token is its code: previous token times vocabulary size, plus itself."""

    def allocate(self, num_slots: int, capacity: int, *, keep_features: bool = False) -> MarkovCache:
        cache = super().allocate(num_slots, capacity)
        cache.features = torch.full((num_slots, capacity, 1), -1.0) if keep_features else None
        return cache

    def forward_at(self, tokens, starts, cache, extent, first_slot=0, last=None, branches=None):
        logits = super().forward_at(tokens, starts, cache, extent, first_slot, last, branches)
        if cache.features is not None:
            slots, columns = slice(first_slot, first_slot + len(tokens)), torch.arange(tokens.shape[1])
            before = columns - 1 if branches is None else torch.tensor(branches.parents)
            places, before = ((starts.unsqueeze(1) + each).clamp(max=cache.capacity - 1) for each in (columns, before))
            previous = torch.where(before >= 0, cache.tokens[slots].gather(1, before.clamp(min=0)), 0)
            codes = (previous * self.vocab_size + tokens).float()
            cache.features[slots, :, 0] = cache.features[slots, :, 0].scatter(1, places, codes)
        return logits


class ToyHead:
    """A head for FeatureTarget: it reads the token before from the feature, and so is wrong if that is another's."""

    def __init__(self, model: MarkovModel) -> None:
        self.table, self.vocab_size, self.device = model.table, model.vocab_size, model.device
        self.draft_vocabulary, self.rates = torch.arange(self.vocab_size), None
        self.num_fed = 0

    def allocate(self, num_slots: int, capacity: int) -> MarkovCache:
        return MarkovCache(torch.zeros(num_slots, capacity, dtype=torch.int64))

    def __call__(self, features: Tensor, tokens: Tensor, cache: MarkovCache, first_slot: int = 0, branches=None):
        self.num_fed += tokens.numel()
        return features % self.vocab_size * self.vocab_size + tokens.unsqueeze(-1)

    def forward_at(self, features: Tensor, tokens: Tensor, starts: Tensor, cache: MarkovCache, extent: int) -> Tensor:
        return self(features, tokens, cache)

    def logits(self, features: Tensor) -> Tensor:
        code = features.squeeze(-1).long()
        return self.table[code // self.vocab_size, code % self.vocab_size].log()


class ExitTarget(FeatureTarget):
    """A Markov model of two layers, the first of which says what a draft's table says, over the same cache."""

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


def joint_distribution(
    model: MarkovModel, prompt: Sequence[int], num_tokens: int, transform=lambda distribution: distribution
) -> dict[tuple[int, ...], float]:
    """Exact distribution of the next num_tokens tokens: {tokens: probability}; `transform` is applied to each row."""
    distribution = {}
    for tokens in itertools.product(range(model.vocab_size), repeat=num_tokens):
        context, probability = [0, *prompt], 1.0
        for token in tokens:
            probability *= transform(model.table[context[-2], context[-1]])[token].item()
            context.append(token)
        if probability:
            distribution[tokens] = probability
    return distribution


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
    """What the model says after a prompt and an output under sampling parameters."""
    context = [0, *prompt, *output]
    logits = model.table[context[-2], context[-1]].log().tolist()
    return obvious_distribution(logits, params, list(prompt), list(output), constraint and constraint.after(output))


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
