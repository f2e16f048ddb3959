"""The one path from logits to a token: logits processors, temperature, truncation, distribution, draw.

Drafting, verification and plain decoding all go through `SamplingState.distribution`, so the distribution a draft was
sampled from and the one it is verified against come from the same code, in float32 or wider.

The result takes the cheapest of three forms: `Dense` holds probabilities, `Partial` those of a draft vocabulary, and
`OneHot` a single token (greedy decoding and every deterministic proposer), so that no vocabulary-sized tensor is built
without need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.constraints.progress import Progress, masks
from specdec.kernels import gpu
from specdec.runtime.devices import upload
from specdec.sampling.distributions import (
    Dense,
    Distribution,
    OneHot,
    Partial,
    as_int64,
    at_least_float32,
    largest,
    normalize,
    softmax,
    spread,
)
from specdec.sampling_params import SamplingParams

_USUAL_NUCLEUS = 256
_BARRED = -1e9  # gives probability 0, but stays finite in case all other logits are -inf


class NonFiniteLogitsError(FloatingPointError):
    """A row of logits with a NaN, with +inf, or all -inf. row, position: within the step; of: whose logits."""

    def __init__(self, row: int, position: int, of: str) -> None:
        super().__init__(f"logits of {of} are NaN, +inf or all -inf, so there is no distribution to sample from")
        self.row, self.position = row, position


@dataclass(frozen=True, slots=True)
class RowParams:
    """The sampling parameters of a batch as tensors, so that a distribution is a function of tensors alone.

    A parameter that no row uses is None.
    seeds: int64 [rows]. greedy: bool [rows, 1, 1]. temperature: float32 [rows, 1], 1 in greedy rows.
    max_k: the largest top-k in use. top_k: int64 [rows, 1, 1]. keeps_all: bool [rows, 1, 1], True for rows without
    top-k, whose entry in top_k is max_k. top_p, min_p: float64 [rows, 1, 1].
    coupled: whether all draws at a position, by draft or target, share their noise.
    greedy_drafts: whether draft models and heads propose their most probable token instead of sampling one.
    """

    vocab_size: int
    seeds: Tensor
    temperature: Tensor
    all_greedy: bool = False
    greedy: Tensor | None = None
    max_k: int = 0
    top_k: Tensor | None = None
    keeps_all: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    coupled: bool = False
    greedy_drafts: bool = False

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        vocab_size: int,
        device: torch.device,
        *,
        coupled: bool = False,
        greedy_drafts: bool = False,
    ) -> RowParams:
        """From one SamplingParams per row."""

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return upload(values, device, dtype).view(-1, 1, 1)

        greedy = [p.temperature == 0 for p in params]
        top_k = [min(p.top_k or vocab_size, vocab_size) for p in params]
        max_k = max((k for k in top_k if k < vocab_size), default=0)
        return cls(
            vocab_size,
            upload([as_int64(p.seed) for p in params], device, torch.int64),
            upload([p.temperature or 1.0 for p in params], device, torch.float32).view(-1, 1),
            all(greedy),
            column(greedy, torch.bool) if any(greedy) else None,
            max_k,
            column([min(k, max_k) for k in top_k], torch.int64) if max_k else None,
            column([k == vocab_size for k in top_k], torch.bool) if max_k else None,
            column([p.top_p for p in params], torch.float64) if any(p.top_p < 1 for p in params) else None,
            column([p.min_p for p in params], torch.float64) if any(p.min_p for p in params) else None,
            coupled,
            greedy_drafts,
        )

    def distribution(
        self, logits: Tensor, tokens: Tensor | None = None, *, of_draft: bool = False
    ) -> tuple[Distribution, Tensor]:
        """Distributions [rows, n] of logits [rows, n, vocab], and whether each is valid, bool [rows, n].

        A row of logits with a NaN, with +inf or all -inf is invalid, and its distribution arbitrary.
        tokens: int64, ascending, the ids of these logits, or None for the whole vocabulary; others get probability 0.
        of_draft: whether a draft is sampled from them.
        """
        if self.all_greedy or (of_draft and self.greedy_drafts):
            peak, argmax = largest(logits)
            return OneHot(argmax if tokens is None else tokens[argmax], self.vocab_size), peak.isfinite()
        if fast := gpu.for_gpu(logits):
            truncation = (self.top_k, self.keeps_all, self.top_p, self.min_p)
            probs, finite = fast.probabilities(logits, self.temperature, self.greedy, *truncation)
        else:
            probs, finite = self._probabilities(logits)
        return Dense(probs) if tokens is None else Partial(Dense(probs), tokens, self.vocab_size), finite

    def _probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        probs = self._soften(logits)
        finite = probs[..., 0].isfinite()  # one bad logit makes its whole row NaN
        if self.greedy is not None:
            one_hot = torch.zeros_like(probs).scatter_(-1, largest(logits)[1].unsqueeze(-1), 1.0)
            probs = torch.where(self.greedy, one_hot, probs)
        return probs, finite

    def _soften(self, logits: Tensor) -> Tensor:
        """Top-k (unaffected by temperature), temperature, top-p, min-p. The result is unused for greedy rows."""
        if self.top_k is not None:
            logits = self._keep_top_k(logits)
        probs = softmax(logits, self.temperature)
        if self.top_p is not None:
            probs = self._keep_top_p(probs)
        if self.min_p is not None:
            min_p = self.min_p.to(probs.dtype)
            floor = min_p * probs.amax(-1, keepdim=True)
            probs = normalize(probs.masked_fill(probs < floor, 0), min_p > 0)
        return probs

    def _keep_top_k(self, logits: Tensor) -> Tensor:
        assert self.top_k is not None
        assert self.keeps_all is not None
        max_k = min(self.max_k, logits.shape[-1])
        index = (self.top_k - 1).clamp(max=max_k - 1).expand(*logits.shape[:-1], 1)
        floor = logits.topk(max_k, -1).values.gather(-1, index)
        return logits.masked_fill((logits < floor) & ~self.keeps_all, -math.inf)

    def _keep_top_p(self, probs: Tensor) -> Tensor:
        assert self.top_p is not None
        top_p = self.top_p.to(probs.dtype)
        highest, reached = _nucleus(probs, top_p)
        before = torch.nn.functional.pad(reached[..., :-1], (1, 0))
        last = ((before < top_p).sum(-1, keepdim=True) - 1).clamp(min=0)  # -1 for NaN rows, reported elsewhere
        is_cut = top_p < 1
        return normalize(probs.masked_fill((probs < highest.gather(-1, last)) & is_cut, 0), is_cut)


class SamplingState:
    """Sampling parameters, token counts and constraints of the running requests, one row each.

    params: one SamplingParams per row.
    prompts, outputs: the token ids of each row so far.
    vocab_size: int. device: where the logits are. coupled, greedy_drafts: see `RowParams`.
    constrained: each row's progress in its constraint, None for a row without one; () if no row has one.
    `rows` holds the parameters as tensors. `is_stateless` is True if distributions depend only on them and on the
    logits: no penalties, biases or constraints.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        outputs: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
        *,
        coupled: bool = False,
        greedy_drafts: bool = False,
        constrained: Sequence[Progress | None] = (),
    ) -> None:
        self.params, self.vocab_size, self.device = list(params), vocab_size, device
        self._constrained = constrained if any(constrained) else ()
        self.rows = RowParams.of(params, vocab_size, device, coupled=coupled, greedy_drafts=greedy_drafts)
        self._bias = self._stack_bias()
        self._counts = None
        if any(p.has_penalties for p in params):
            self._counts = _TokenCounts(prompts, outputs, vocab_size, device)
            self._repetition = self._column([p.repetition_penalty for p in params])
            self._frequency = self._column([p.frequency_penalty for p in params])
            self._presence = self._column([p.presence_penalty for p in params])
        self.is_stateless = self._bias is None and self._counts is None and not self._constrained

    @property
    def seeds(self) -> Tensor:
        return self.rows.seeds

    def observe(self, row: int, tokens: Sequence[int]) -> None:
        """Record tokens emitted by a row: count them and advance its constraint."""
        if self._counts is not None:
            self._counts.add(row, tokens)
        if self._constrained and (progress := self._constrained[row]):
            progress.emit(tokens)

    def num_allowed(self, row: int, tokens: Sequence[int]) -> int:
        """The number of leading tokens that the row's constraint, if any, allows next."""
        progress = self._constrained[row] if self._constrained else None
        return progress.num_allowed(tokens) if progress else len(tokens)

    def distribution(
        self,
        logits: Tensor,
        drafted: Tensor | None = None,
        tokens: Tensor | None = None,
        lineage: Sequence[Sequence[int]] | None = None,
        *,
        of_draft: bool = False,
    ) -> tuple[Distribution, Tensor]:
        """Next-token distributions, each given the tokens emitted so far and the draft tokens before its position.

        Invalid logits raise nothing here, as that would wait for the device.

        Args:
            logits: float [rows, n, vocab] at the last n of the positions after 0, 1, ..., m draft tokens.
            drafted: int64 [rows, m] with m >= n - 1, or None for m = 0.
            tokens: int64, ascending, the ids of these logits, or None for the whole vocabulary; others get
                probability 0.
            lineage: for a tree, the indices of the draft tokens before each of the n positions.
            of_draft: whether a draft is sampled from them.

        Returns:
            Distributions of shape [rows, n], and whether each is valid, bool [rows, n].
        """
        if not self.is_stateless:
            if tokens is not None:
                logits, tokens = spread(logits, tokens, self.vocab_size, _BARRED), None
            logits = self._shift(logits.to(at_least_float32(logits), copy=True), drafted, lineage)
        return self.rows.distribution(logits, tokens, of_draft=of_draft)

    def _shift(self, logits: Tensor, drafted: Tensor | None, lineage: Sequence[Sequence[int]] | None) -> Tensor:
        if self._bias is not None:
            rows, tokens, values = self._bias
            logits[rows, :, tokens] += values.unsqueeze(1).to(logits.dtype)
        if self._counts is not None:
            seen, counts = self._counts.before(drafted, logits.shape[1], lineage)
            repetition = self._repetition.to(logits.dtype)
            penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
            logits = torch.where(seen, penalised, logits)
            logits = logits - self._frequency.to(logits.dtype) * counts - self._presence.to(logits.dtype) * (counts > 0)
        if self._constrained:
            allowed = masks(self._constrained, drafted, logits.shape[1], self.vocab_size, lineage)
            logits = logits.masked_fill(~allowed.to(logits.device), -math.inf)
        return logits

    def _column(self, values: Sequence[float]) -> Tensor:
        return upload(values, self.device, torch.float64).view(-1, 1, 1)

    def _stack_bias(self) -> tuple[Tensor, Tensor, Tensor] | None:
        entries = [(row, token, value) for row, p in enumerate(self.params) for token, value in p.logit_bias.items()]
        if not entries:
            return None
        rows, tokens, values = zip(*entries, strict=True)
        return (
            upload(rows, self.device, torch.int64),
            upload(tokens, self.device, torch.int64),
            upload(values, self.device, torch.float64),
        )


class _TokenCounts:
    """Per row, which tokens occur in the prompt (bool [rows, vocab]) and how often each was emitted (int32)."""

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

    def before(
        self, drafted: Tensor | None, num_positions: int, lineage: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(seen, emitted) before each of the last `num_positions` positions: bool and int32 [rows, n, vocab]."""
        num_drafted = 0 if drafted is None else drafted.shape[1]
        lineage = lineage or [range(i) for i in range(num_drafted + 1)][-num_positions:]
        counts = self._emitted.unsqueeze(1).repeat(1, num_positions, 1)
        for position, ancestors in enumerate(lineage):
            if drafted is not None and len(ancestors):
                token = drafted[:, list(ancestors)]
                counts[:, position].scatter_add_(1, token, torch.ones_like(token, dtype=torch.int32))
        return self._in_prompt.unsqueeze(1) | (counts > 0), counts


def _nucleus(probs: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest probabilities in order, at least as many as top-p keeps, and their cumulative sums."""
    if probs.device.type == "cpu":  # a full sort is thirty times as expensive, and rarely needed
        highest = probs.topk(min(_USUAL_NUCLEUS, probs.shape[-1]), -1).values
        reached = highest.cumsum(-1)
        # decided by the sums that `_keep_top_p` uses, so a row keeps the same tokens whether or not a batch mate sorts
        if not ((reached[..., -1:] < top_p) & (top_p < 1)).any():
            return highest, reached
    highest = probs.sort(dim=-1, descending=True).values
    return highest, highest.cumsum(-1)
