"""One road from logits to a token: processors -> temperature -> truncation -> law -> draw.

Drafting, verifying and plain decoding all come through `SamplingState.law`, so the law that a draft was drawn
from and the law that it is verified against are made by the same lines, in float32 or wider.

A *law* is the distribution of the next token. It has three forms with one interface:
`Dense` holds probabilities; `Partial` holds those of some tokens, the others having none (a head with a draft
vocabulary); `OneHot` holds only the token that has all the mass (greedy decoding and every deterministic proposer).
So no vocabulary-sized tensor exists where none is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec import kernels

_USUAL_NUCLEUS = 256
_BARRED = -1e9  # a logit without probability, yet a law remains if all else has -inf


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. Defaults follow vLLM: temperature 1, no truncation, no penalty.

    temperature: float >= 0; 0 is greedy decoding (the argmax; the lowest id wins a tie).
    top_k: keep the k largest logits, ties with the k-th included; 0 keeps all.
    top_p: keep the fewest largest probabilities whose sum reaches top_p, in (0, 1], ties with the last included.
    min_p: drop tokens less probable than min_p times the most probable one, in [0, 1].
    presence_penalty, frequency_penalty: subtracted from the logits of emitted tokens, once or per occurrence.
    repetition_penalty: > 0; logits of prompt and emitted tokens are divided (positive) or multiplied (negative).
    logit_bias: token id -> float added to its logit; -inf forbids the token.
    max_tokens: tokens to emit at the most, the stop token included.
    stop_token_ids: token ids that end the request; the stop token is emitted.
    ignore_eos: do not end at the model's own end-of-sequence tokens.
    seed: selects the request's random stream, 0 <= seed < 2**64. Requests with equal seeds share uniforms.
    logprobs: also return the log-probability of each emitted token under the target's unprocessed logits.

    The order is: logit bias, repetition, frequency and presence penalties, temperature, top-k, top-p, min-p.
    Raises ValueError naming the field, its value and the rule.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: bool = False

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, rule: str) -> None:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")

        finite = math.isfinite
        require("temperature", finite(self.temperature) and self.temperature >= 0, "finite and >= 0; 0 is greedy")
        require("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "an integer >= 0; 0 keeps all tokens")
        require("top_p", 0 < self.top_p <= 1, "in (0, 1]; 1 keeps all tokens")
        require("min_p", 0 <= self.min_p <= 1, "in [0, 1]; 0 keeps all tokens")
        require("presence_penalty", finite(self.presence_penalty), "finite; 0 is off")
        require("frequency_penalty", finite(self.frequency_penalty), "finite; 0 is off")
        require(
            "repetition_penalty",
            finite(self.repetition_penalty) and self.repetition_penalty > 0,
            "finite and > 0; 1 is off",
        )
        require("max_tokens", isinstance(self.max_tokens, int) and self.max_tokens >= 1, "an integer >= 1")
        require("seed", isinstance(self.seed, int) and 0 <= self.seed < 2**64, "an integer in [0, 2**64)")
        require(
            "logit_bias",
            all(isinstance(t, int) and t >= 0 and v < math.inf for t, v in self.logit_bias.items()),
            "a mapping of token ids >= 0 to floats below +inf",
        )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        require("stop_token_ids", all(isinstance(t, int) and t >= 0 for t in self.stop_token_ids), "token ids >= 0")

    @property
    def has_penalties(self) -> bool:
        """Whether the law depends on which tokens came before, beyond what the model sees."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Dense:
    """Laws given by their probabilities: float32 or float64 [..., vocab], rows summing to 1 up to rounding."""

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
        """How much of other laws, float [..., vocab], is beyond these: max(other - own, 0)."""
        return (probs - self.probs).clamp(min=0)

    def __getitem__(self, index: Any) -> Dense:
        """Laws by the usual indexing of the batch and position axes."""
        return Dense(self.probs[index])

    def at(self, columns: Tensor) -> Dense:
        """Row b's law at position columns[b]: [batch, n] laws and int64 [batch] -> [batch] laws."""
        places = torch.arange(len(columns), device=columns.device) * self.probs.shape[1] + columns
        return Dense(self.probs.flatten(0, 1).index_select(0, places))

    def draw(self, uniforms: Tensor) -> Tensor:
        """The token where the cumulative law first exceeds the uniform: float64 [...] in [0, 1) -> int64 [...].

        A token of probability 0 is never drawn. The sum is taken in float64 and rows need not be normalised.
        """
        if self.probs.dtype == torch.float32 and kernels.take(self.probs):
            return kernels.draw(self.probs, uniforms)
        cumulative = self.probs.double().cumsum(-1)
        total = cumulative[..., -1:]
        threshold = torch.minimum(uniforms.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
        # right=True: the first entry > threshold, so that at u = 0 leading zeros are passed over
        return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


@dataclass(frozen=True, slots=True)
class OneHot:
    """Laws with all their mass on one token: tokens int64 [...]."""

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
    """Laws over some of the tokens; all others have probability 0.

    inner: laws over the places in `tokens`. tokens: int64 [inner.vocab_size], ascending.
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
        return self.tokens[self.inner.draw(uniforms)]


Law = Dense | OneHot | Partial


def stack_laws(laws: Sequence[Law]) -> Law:
    """Laws [batch] of consecutive positions -> laws [batch, n]; of a kind only if all of them are of that kind."""
    first = laws[0]
    if isinstance(first, OneHot) and all(isinstance(law, OneHot) for law in laws):
        return OneHot(torch.stack([law.tokens for law in laws], 1), first.vocab_size)  # type: ignore[union-attr]
    if isinstance(first, Partial) and all(isinstance(law, Partial) and law.tokens is first.tokens for law in laws):
        probs = torch.stack([law.inner.probs for law in laws], 1)  # type: ignore[union-attr]
        return Partial(Dense(probs), first.tokens, first.vocab_size)
    return Dense(torch.stack([law.dense() for law in laws], 1))


def spread(values: Tensor, tokens: Tensor, vocab_size: int, otherwise: float) -> Tensor:
    """Values of some tokens, [..., n] and int64 [n] -> [..., vocab], another value at all other tokens."""
    everything = values.new_full((*values.shape[:-1], vocab_size), otherwise)
    return everything.index_copy_(-1, tokens, values)


class NonFiniteLogitsError(FloatingPointError):
    """A row of logits with a NaN, a +inf or nothing but -inf. `row` and `position` index the logits given."""

    def __init__(self, row: int, position: int, of: str = "") -> None:
        super().__init__(
            f"logits of {of or f'row {row}, position {position}'} are NaN, +inf or all -inf, "
            "so there is no law to draw from"
        )
        self.row, self.position = row, position


class SamplingState:
    """The sampling parameters of the rows in flight, and the token counts that penalties need.

    params: one SamplingParams per row.
    prompts, outputs: the token ids of each row so far.
    vocab_size: int. device: where the logits live.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        outputs: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.params, self.vocab_size, self.device = list(params), vocab_size, device
        self.greedy = [p.temperature == 0 for p in params]
        self.seeds = torch.tensor([_signed(p.seed) for p in params], device=device)
        self._bias = self._stack_bias()
        self._counts = None
        if any(p.has_penalties for p in params):
            self._counts = _TokenCounts(prompts, outputs, vocab_size, device)

    @property
    def all_greedy(self) -> bool:
        return all(self.greedy)

    def observe(self, row: int, tokens: Sequence[int]) -> None:
        """Count tokens that row `row` has emitted."""
        if self._counts is not None:
            self._counts.add(row, tokens)

    def law(self, logits: Tensor, drafted: Tensor | None = None, tokens: Tensor | None = None) -> Law:
        """Laws of the next tokens, each given the tokens emitted so far and the drafted ones before its position.

        logits: float [rows, n, vocab]; the n positions are the last n of those after 0, 1, ..., m drafted tokens.
        drafted: int64 [rows, m] with m >= n - 1, or None for m = 0.
        tokens: int64, ascending, whose logits these are, or None for all; others get probability 0.
        Returns laws [rows, n].
        Raises NonFiniteLogitsError.
        """
        if self._bias is not None or self._counts is not None:
            if tokens is not None:
                logits, tokens = spread(logits, tokens, self.vocab_size, _BARRED), None
            logits = self._shift(logits.to(_at_least_float32(logits), copy=True), drafted)
        if self.all_greedy:
            peak, argmax = largest(logits)
            _check_finite(peak)
            return OneHot(argmax if tokens is None else tokens[argmax], self.vocab_size)
        probs = self._soften(logits)
        _check_finite(probs[..., 0])  # one bad logit spoils all probabilities of its row
        if any(self.greedy):
            rows, certain = self._column(self.greedy, torch.bool), torch.zeros_like(probs)
            probs = torch.where(rows, certain.scatter_(-1, largest(logits)[1].unsqueeze(-1), 1.0), probs)
        return Dense(probs) if tokens is None else Partial(Dense(probs), tokens, self.vocab_size)

    def _shift(self, logits: Tensor, drafted: Tensor | None) -> Tensor:
        if self._bias is not None:
            rows, tokens, values = self._bias
            logits[rows, :, tokens] += values.unsqueeze(1).to(logits.dtype)
        if self._counts is not None:
            seen, counts = self._counts.before(drafted, logits.shape[1])
            repetition = self._column([p.repetition_penalty for p in self.params], logits.dtype)
            frequency = self._column([p.frequency_penalty for p in self.params], logits.dtype)
            presence = self._column([p.presence_penalty for p in self.params], logits.dtype)
            penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
            logits = torch.where(seen, penalised, logits)
            logits = logits - frequency * counts - presence * (counts > 0)
        return logits

    def _soften(self, logits: Tensor) -> Tensor:
        """Top-k, which temperature does not change, temperature, top-p and min-p; greedy rows come out unused."""
        if any(p.top_k for p in self.params):
            logits = self._keep_top_k(logits)
        probs = _softmax(logits, [p.temperature or 1.0 for p in self.params])
        if any(p.top_p < 1 for p in self.params):
            probs = self._keep_top_p(probs)
        if any(p.min_p for p in self.params):
            floor = self._column([p.min_p for p in self.params], probs.dtype) * probs.amax(-1, keepdim=True)
            probs = _normalise(probs.masked_fill(probs < floor, 0))
        return probs

    def _keep_top_k(self, logits: Tensor) -> Tensor:
        size = logits.shape[-1]
        top_k = [min(p.top_k or size, size) for p in self.params]
        most = max((k for k in top_k if k < size), default=1)
        index = self._column([min(k, most) - 1 for k in top_k], torch.int64).expand(*logits.shape[:-1], 1)
        floor = logits.topk(most, -1).values.gather(-1, index)
        unlimited = self._column([k == size for k in top_k], torch.bool)
        return logits.masked_fill((logits < floor) & ~unlimited, -math.inf)

    def _keep_top_p(self, probs: Tensor) -> Tensor:
        top_p = self._column([p.top_p for p in self.params], probs.dtype)
        # the set is mostly small, and a sort of the vocabulary costs thirty times as much as its largest entries
        highest = probs.topk(min(_USUAL_NUCLEUS, probs.shape[-1]), -1).values
        if ((highest.sum(-1, keepdim=True) < top_p) & (top_p < 1)).any():
            highest = probs.sort(dim=-1, descending=True).values
        before = highest.cumsum(-1) - highest
        floor = highest.gather(-1, (before < top_p).sum(-1, keepdim=True) - 1)
        return _normalise(probs.masked_fill((probs < floor) & (top_p < 1), 0))

    def _column(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device).view(-1, 1, 1)

    def _stack_bias(self) -> tuple[Tensor, Tensor, Tensor] | None:
        entries = [(row, token, value) for row, p in enumerate(self.params) for token, value in p.logit_bias.items()]
        if not entries:
            return None
        rows, tokens, values = zip(*entries, strict=True)
        return (
            torch.tensor(rows, device=self.device),
            torch.tensor(tokens, device=self.device),
            torch.tensor(values, dtype=torch.float64, device=self.device),
        )


class _TokenCounts:
    """Which tokens each row's prompt has, and how often each was emitted: bool and int32 [rows, vocab]."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], vocab_size: int, device: torch.device
    ) -> None:
        self._in_prompt = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        self._emitted = torch.zeros(len(prompts), vocab_size, dtype=torch.int32, device=device)
        for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            self._in_prompt[row, torch.tensor(prompt, dtype=torch.int64, device=device)] = True
            self.add(row, output)

    def add(self, row: int, tokens: Sequence[int]) -> None:
        index = torch.tensor(tokens, dtype=torch.int64, device=self._emitted.device)
        self._emitted[row].index_add_(0, index, torch.ones_like(index, dtype=torch.int32))

    def before(self, drafted: Tensor | None, num_positions: int) -> tuple[Tensor, Tensor]:
        """(seen, emitted) before each of the last `num_positions` positions: bool and int32 [rows, n, vocab]."""
        num_drafted = 0 if drafted is None else drafted.shape[1]
        counts = self._emitted.unsqueeze(1).repeat(1, num_drafted + 1, 1)
        for i in range(num_drafted):
            assert drafted is not None
            token = drafted[:, i, None, None].expand(-1, num_drafted - i, 1)
            counts[:, i + 1 :].scatter_add_(2, token, torch.ones_like(token, dtype=torch.int32))
        counts = counts[:, -num_positions:]
        return self._in_prompt.unsqueeze(1) | (counts > 0), counts


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of logits [..., n], NaN where any is, and where the first of them stands, int64 [...]."""
    if kernels.take(logits):
        return kernels.largest(logits)
    if logits.device.type == "cuda":
        peak, argmax = logits.max(-1)
        return peak, argmax
    logits = logits.to(_at_least_float32(logits))
    argmax = torch.from_numpy(logits.numpy().argmax(-1))  # ten times as fast as torch's
    return logits.gather(-1, argmax.unsqueeze(-1)).squeeze(-1), argmax


def _softmax(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Laws of logits [rows, n, vocab] at each row's temperature, in float32 or wider."""
    temperature = torch.tensor(temperatures, device=logits.device).unsqueeze(1)
    if kernels.take(logits):
        return kernels.softmax(logits, temperature.expand(logits.shape[:-1]))
    return (logits.to(_at_least_float32(logits)) / temperature.unsqueeze(-1)).softmax(-1)


def _check_finite(peak: Tensor) -> None:
    for row, values in enumerate(peak.tolist()):
        for position, value in enumerate(values):
            if not math.isfinite(value):
                raise NonFiniteLogitsError(row, position)


def _at_least_float32(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _normalise(probs: Tensor) -> Tensor:
    return probs / probs.sum(-1, keepdim=True)


def _signed(seed: int) -> int:
    """The same 64 bits as a signed integer, which is what torch.int64 holds."""
    return seed - 2**64 if seed >= 2**63 else seed
