"""Next-token distributions in three forms with one interface: `Dense`, `Partial` and `OneHot`."""

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
    """Distributions stored as probabilities: float32 or float64 [..., vocab], rows summing to 1 up to rounding."""

    probs: Tensor

    @property
    def vocab_size(self) -> int:
        return self.probs.shape[-1]

    @property
    def shape(self) -> torch.Size:
        return self.probs.shape[:-1]

    def prob(self, tokens: Tensor) -> Tensor:
        """Probability of one token per row: int64 [...] -> float64 [...]."""
        return self.probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).double()

    def dense(self) -> Tensor:
        return self.probs

    def excess(self, probs: Tensor) -> Tensor:
        """The part of other probabilities, float [..., vocab], that exceeds these: max(probs - self.probs, 0)."""
        return (probs - self.probs).clamp(min=0)

    def __getitem__(self, index: Any) -> Dense:
        """Index the batch and position axes as usual."""
        return Dense(self.probs[index])

    def at(self, columns: Tensor) -> Dense:
        """Row b's distribution at position columns[b]: columns int64 [batch], shape [batch, n] -> [batch]."""
        places = torch.arange(len(columns), device=columns.device) * self.probs.shape[1] + columns
        return Dense(self.probs.flatten(0, 1).index_select(0, places))

    def draw(self, uniforms: Tensor) -> Tensor:
        """Sample one token per row: the first whose cumulative probability exceeds the row's uniform.

        A token of probability 0 is never drawn. Sums are taken in float64 and rows need not be normalized.

        Args:
            uniforms: float64 [...] in [0, 1), or float64 [..., vocab] to sample by `race`.

        Returns:
            int64 [...].
        """
        if uniforms.ndim == self.probs.ndim:
            return race(self.probs, uniforms)
        if fast := gpu.for_gpu(self.probs):
            drawn: Tensor = fast.draw(self.probs, uniforms)
            return drawn
        if self.probs.dtype == torch.float32 and cpp.supports(self.probs):
            return cpp.draw(self.probs, uniforms)
        cumulative = self.probs.double().cumsum(-1)
        total = cumulative[..., -1:]
        threshold = torch.minimum(uniforms.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
        # right=True: the first entry > threshold, so leading zeros are skipped at u = 0
        token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
        return token.clamp(max=self.vocab_size - 1)  # past the end for NaN rows, which are reported elsewhere


@dataclass(frozen=True, slots=True)
class OneHot:
    """Distributions with all mass on one token: tokens int64 [...]."""

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
    """Distributions over a subset of the vocabulary; all other tokens have probability 0.

    inner: distributions over indices into `tokens`. tokens: int64 [inner.vocab_size], ascending.
    """

    inner: Dense
    tokens: Tensor
    vocab_size: int

    @property
    def shape(self) -> torch.Size:
        return self.inner.shape

    def prob(self, tokens: Tensor) -> Tensor:
        index = torch.searchsorted(self.tokens, tokens).clamp(max=len(self.tokens) - 1)
        return self.inner.prob(index) * (self.tokens[index] == tokens)

    def dense(self) -> Tensor:
        return spread(self.inner.probs, self.tokens, self.vocab_size, 0.0)

    def excess(self, probs: Tensor) -> Tensor:
        return probs.index_copy(-1, self.tokens, self.inner.excess(probs[..., self.tokens]))

    def __getitem__(self, index: Any) -> Partial:
        return Partial(self.inner[index], self.tokens, self.vocab_size)

    def at(self, columns: Tensor) -> Partial:
        return Partial(self.inner.at(columns), self.tokens, self.vocab_size)

    def draw(self, uniforms: Tensor) -> Tensor:
        # noise is indexed by token id, so that the target sees the same noise for each token
        inner_uniforms = uniforms[..., self.tokens] if uniforms.ndim > len(self.shape) else uniforms
        return self.tokens[self.inner.draw(inner_uniforms)]


Distribution = Dense | OneHot | Partial


def race(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Sample by an exponential race: the token with the shortest waiting time -log(1 - uniform) / probability wins.

    This is the Gumbel-max trick: -log of a waiting time is log(probability) plus Gumbel noise. Two distributions at
    total variation distance d pick different tokens from the same uniforms with probability at most 2d / (1 + d).
    A token of probability 0 never wins; ties go to the lowest id.

    Args:
        probs: float32 or float64 [..., vocab].
        uniforms: float64 [..., vocab] in [0, 1).

    Returns:
        int64 [...].

    Source: Daliri, Musco and Suresh 2024 (arXiv:2408.07978), "Gumbel coupling".
    """
    if fast := gpu.for_gpu(probs):
        won: Tensor = fast.race(probs, uniforms)
        return won
    if probs.dtype == torch.float32 and cpp.supports(probs):
        return cpp.race(probs, uniforms)
    waits = -torch.log1p(-uniforms) / probs.double()
    return waits.masked_fill(probs <= 0, math.inf).argmin(-1)  # 0/0 at u = 0: an impossible token must lose


def stack_distributions(distributions: Sequence[Distribution]) -> Distribution:
    """Stack distributions [batch] of n consecutive positions into [batch, n]; sparse only if all of them are."""
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
    """Scatter values [..., n] of tokens int64 [n] into [..., vocab], filled with `otherwise`."""
    full = values.new_full((*values.shape[:-1], vocab_size), otherwise)
    return full.index_copy_(-1, tokens, values)


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row of logits [..., n], NaN if the row has one, and its first index, int64 [...]."""
    if fast := gpu.for_gpu(logits):
        peak, argmax = fast.largest(logits)
        return peak, argmax
    if cpp.supports(logits):
        return cpp.largest(logits)
    if logits.device.type == "cuda":
        peak, argmax = logits.max(-1)
        return peak, argmax
    logits = logits.to(at_least_float32(logits))
    argmax = torch.from_numpy(logits.numpy().argmax(-1))  # ten times as fast as torch's
    return logits.gather(-1, argmax.unsqueeze(-1)).squeeze(-1), argmax


def softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    """Softmax of logits [rows, n, vocab] at each row's temperature [rows, 1], in float32 or wider."""
    if cpp.supports(logits):
        return cpp.softmax(logits, temperature.expand(logits.shape[:-1]))
    return (logits.to(at_least_float32(logits)) / temperature.unsqueeze(-1)).softmax(-1)


def at_least_float32(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def normalize(probs: Tensor, is_cut: Tensor) -> Tensor:
    """Divide rows [..., vocab] by their sums where `is_cut`, bool [rows, 1, 1]; other rows are returned bit for bit.

    The sum of a softmax is rounded as well, so dividing an uncut row would make it depend on its batch mates.
    """
    return probs / torch.where(is_cut, row_sums(probs), 1.0)


def row_sums(values: Tensor) -> Tensor:
    """Row sums [..., n] -> [..., 1], added in order.

    `torch.sum` splits a single long row across threads, so its rounding depends on the number of rows.
    """
    return values.cumsum(-1)[..., -1:]


def as_int64(seed: int) -> int:
    """A seed in [0, 2**64) as the signed integer with the same 64 bits, for torch.int64."""
    return seed - 2**64 if seed >= 2**63 else seed
