"""Distributions of the next token: `Dense`, `Partial` and `OneHot`, with one interface."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import cpp, gpu


@dataclass(frozen=True, slots=True)
class Dense:
    """Distributions given by their probabilities: float32 or float64 [..., vocab], rows summing to 1 up to rounding."""

    probs: Tensor

    @property
    def vocab_size(self) -> int:
        return self.probs.shape[-1]

    @property
    def shape(self) -> torch.Size:
        return self.probs.shape[:-1]

    def prob(self, tokens: Tensor) -> Tensor:
        """Probability of each token under its row: tokens int64 [...] -> float64 [...]."""
        return self.probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).double()

    def dense(self) -> Tensor:
        return self.probs

    def excess(self, probs: Tensor) -> Tensor:
        """How much of other distributions, float [..., vocab], is beyond these: max(other - own, 0)."""
        return (probs - self.probs).clamp(min=0)

    def __getitem__(self, index: Any) -> Dense:
        """Distributions by the usual indexing of the batch and position axes."""
        return Dense(self.probs[index])

    def at(self, columns: Tensor) -> Dense:
        """Row b's distribution at position columns[b], int64 [batch]: [batch, n] distributions -> [batch]."""
        places = torch.arange(len(columns), device=columns.device) * self.probs.shape[1] + columns
        return Dense(self.probs.flatten(0, 1).index_select(0, places))

    def draw(self, uniforms: Tensor) -> Tensor:
        """The token where the cumulative distribution first exceeds the uniform: float64 [...] in [0, 1) -> int64
        [...].

        uniforms: or one for each token, float64 [..., vocab]: then a `race` decides.
        A token of probability 0 is never drawn. The sum is taken in float64 and rows need not be normalised.
        """
        if uniforms.ndim == self.probs.ndim:
            return race(self.probs, uniforms)
        if fast := gpu.for_gpu(self.probs):
            drawn: Tensor = fast.draw(self.probs, uniforms)
            return drawn
        if self.probs.dtype == torch.float32 and cpp.take(self.probs):
            return cpp.draw(self.probs, uniforms)
        cumulative = self.probs.double().cumsum(-1)
        total = cumulative[..., -1:]
        threshold = torch.minimum(uniforms.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
        # right=True: the first entry > threshold, so that at u = 0 leading zeros are passed over
        place = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
        return place.clamp(
            max=self.vocab_size - 1
        )  # beyond the end where there is no distribution, which is found elsewhere


@dataclass(frozen=True, slots=True)
class OneHot:
    """Distributions with all their mass on one token: tokens int64 [...]."""

    tokens: Tensor
    vocab_size: int

    @property
    def shape(self) -> torch.Size:
        return self.tokens.shape

    def prob(self, tokens: Tensor) -> Tensor:
        return (tokens == self.tokens).double()

    def dense(self) -> Tensor:
        return torch.nn.functional.one_hot(self.tokens, self.vocab_size).float()

    def excess(self, probs: Tensor) -> Tensor:
        return probs.scatter(-1, self.tokens.unsqueeze(-1), 0.0)

    def __getitem__(self, index: Any) -> OneHot:
        return OneHot(self.tokens[index], self.vocab_size)

    def at(self, columns: Tensor) -> OneHot:
        return OneHot(self.tokens.gather(1, columns.unsqueeze(1)).squeeze(1), self.vocab_size)

    def draw(self, uniforms: Tensor) -> Tensor:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Partial:
    """Distributions over some of the tokens; all others have probability 0.

    inner: distributions over the places in `tokens`. tokens: int64 [inner.vocab_size], ascending.
    """

    inner: Dense
    tokens: Tensor
    vocab_size: int

    @property
    def shape(self) -> torch.Size:
        return self.inner.shape

    def prob(self, tokens: Tensor) -> Tensor:
        places = torch.searchsorted(self.tokens, tokens).clamp(max=len(self.tokens) - 1)
        return self.inner.prob(places) * (self.tokens[places] == tokens)

    def dense(self) -> Tensor:
        return spread(self.inner.probs, self.tokens, self.vocab_size, 0.0)

    def excess(self, probs: Tensor) -> Tensor:
        return probs.index_copy(-1, self.tokens, self.inner.excess(probs[..., self.tokens]))

    def __getitem__(self, index: Any) -> Partial:
        return Partial(self.inner[index], self.tokens, self.vocab_size)

    def at(self, columns: Tensor) -> Partial:
        return Partial(self.inner.at(columns), self.tokens, self.vocab_size)

    def draw(self, uniforms: Tensor) -> Tensor:
        # noise is known by token: the target meets the same
        own = uniforms[..., self.tokens] if uniforms.ndim > len(self.shape) else uniforms
        return self.tokens[self.inner.draw(own)]


Distribution = Dense | OneHot | Partial


def race(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The token whose exponential waiting time, -log(1 - uniform) / probability, is the least; the lowest id in a tie.

    probs: float32 or float64 [..., vocab]. uniforms: float64 [..., vocab] in [0, 1). Returns int64 [...].
    Its distribution is `probs`, and a token of probability 0 never wins. Two distributions that are close mostly
    choose the same token by the same uniforms: the probability that they do not is at most 2 d / (1 + d), d being
    their total variation. This is the Gumbel-max trick: -log of a waiting time is log(probability) plus Gumbel noise.
    Source: Daliri, Musco and Suresh 2024 (arXiv:2408.07978), who call it Gumbel coupling.
    """
    if fast := gpu.for_gpu(probs):
        won: Tensor = fast.race(probs, uniforms)
        return won
    if probs.dtype == torch.float32 and cpp.take(probs):
        return cpp.race(probs, uniforms)
    waits = -torch.log1p(-uniforms) / probs.double()
    return waits.masked_fill(probs <= 0, math.inf).argmin(-1)  # 0/0 at u = 0: an impossible token must lose


def stack_distributions(distributions: Sequence[Distribution]) -> Distribution:
    """Distributions [batch] of consecutive positions as one of shape [batch, n]; sparse only if all of them are."""
    first = distributions[0]
    if isinstance(first, OneHot) and all(isinstance(distribution, OneHot) for distribution in distributions):
        return OneHot(torch.stack([distribution.tokens for distribution in distributions], 1), first.vocab_size)  # type: ignore[union-attr]
    if isinstance(first, Partial) and all(
        isinstance(distribution, Partial) and distribution.tokens is first.tokens for distribution in distributions
    ):
        probs = torch.stack([distribution.inner.probs for distribution in distributions], 1)  # type: ignore[union-attr]
        return Partial(Dense(probs), first.tokens, first.vocab_size)
    return Dense(torch.stack([distribution.dense() for distribution in distributions], 1))


def spread(values: Tensor, tokens: Tensor, vocab_size: int, otherwise: float) -> Tensor:
    """Values of some tokens, [..., n] and int64 [n] -> [..., vocab], another value at all other tokens."""
    everything = values.new_full((*values.shape[:-1], vocab_size), otherwise)
    return everything.index_copy_(-1, tokens, values)


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of logits [..., n], NaN where any is, and where the first of them stands, int64 [...]."""
    if fast := gpu.for_gpu(logits):
        peak, argmax = fast.largest(logits)
        return peak, argmax
    if cpp.take(logits):
        return cpp.largest(logits)
    if logits.device.type == "cuda":
        peak, argmax = logits.max(-1)
        return peak, argmax
    logits = logits.to(_at_least_float32(logits))
    argmax = torch.from_numpy(logits.numpy().argmax(-1))  # ten times as fast as torch's
    return logits.gather(-1, argmax.unsqueeze(-1)).squeeze(-1), argmax


def _softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    """Distributions of logits [rows, n, vocab] at each row's temperature [rows, 1], in float32 or wider."""
    if cpp.take(logits):
        return cpp.softmax(logits, temperature.expand(logits.shape[:-1]))
    return (logits.to(_at_least_float32(logits)) / temperature.unsqueeze(-1)).softmax(-1)


def _at_least_float32(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _normalise(probs: Tensor, is_cut: Tensor) -> Tensor:
    """Rows [..., vocab] divided by their sums where `is_cut`, bool [rows, 1, 1]; others come out bit for bit.

    Their softmax has rounded sums too, and they must not change because a batch mate is cut.
    """
    return probs / torch.where(is_cut, row_sums(probs), 1.0)


def row_sums(values: Tensor) -> Tensor:
    """Sums of rows [..., n] -> [..., 1], each in the order of its entries.

    torch's `sum` shares a long row that is alone among threads, so that it would depend on how many rows there are.
    """
    return values.cumsum(-1)[..., -1:]


def _signed(seed: int) -> int:
    """The same 64 bits as a signed integer, which is what torch.int64 holds."""
    return seed - 2**64 if seed >= 2**63 else seed
