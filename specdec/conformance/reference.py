"""The target's own distributions at every position of given outputs, by teacher forcing.

Each emitted token is tested given the tokens before it, whatever they are. So only the engine's output is needed, and
a wrong token does not affect the tests of the following ones.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specdec.models.base import Cache, LanguageModel, hold
from specdec.runtime.devices import upload
from specdec.sampling.distributions import Dense, Distribution
from specdec.sampling.state import SamplingState
from specdec.sampling_params import SamplingParams

_CHUNK = 1 << 22  # probabilities held at a time: few, because allocating memory costs more than summing it
_REMEMBERED = 1 << 14  # prompt positions whose keys and values are cached
_LEAST = -87.0  # log-probability below which float32 underflows

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """n positions of several outputs, output by output.

    distribution: distributions [n]. logits: float [n, vocab], the model's. tokens: int64 [n], the emitted tokens.
    requests, places: int64 [n], index of the output and position in it.
    """

    distribution: Distribution
    logits: Tensor
    tokens: Tensor
    requests: Tensor
    places: Tensor


class Reference:
    """A model's distributions at every position of given outputs, in float32 or wider.

    Args:
        model: the target, or a draft model.
        sampling: logits processors and truncation, applied by the same code as in decoding.
        batch_size: outputs scored together.

    Raises:
        ValueError: for a model in half precision, which is no reference, and for constrained sampling.
    """

    def __init__(self, model: LanguageModel, sampling: SamplingParams, batch_size: int = 8) -> None:
        dtype = getattr(model, "dtype", torch.float32)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype} of the reference must be float32 or wider; load it with dtype=float32")
        limits = [name for name in (sampling.constraint, "bad_words", "min_tokens") if name and getattr(sampling, name)]
        if limits:
            raise ValueError(f"{limits[0]} must not be in the reference's sampling; audit without a constraint")
        self.model, self.sampling, self.batch_size = model, sampling, batch_size
        self._caches: OrderedDict[tuple[tuple[int, ...], ...], Cache] = OrderedDict()  # by prompts, the last used last

    @classmethod
    def load(
        cls,
        target: str,
        sampling: SamplingParams,
        *,
        device: str = "auto",
        batch_size: int = 8,
        quantization: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Reference:
        """Load a model by name as a float32 reference; names and errors as for `Engine.load`.

        quantization: of an engine with this dtype: the reference has the values of its quantized weights, in float32.
        """
        from specdec.models.causal import CausalLM
        from specdec.models.loading import as_device, load_pretrained
        from specdec.models.seq2seq import Seq2SeqLM

        exact: dict[str, Any] = {"dtype": torch.float32}
        if quantization is not None:
            exact = {"dtype": dtype, "quantization": quantization, "dequantize": True}
        model, tokenizer = load_pretrained(target, device=as_device(device), **exact)
        wrapped = (Seq2SeqLM if model.config.is_encoder_decoder else CausalLM)(model, tokenizer)
        return cls(wrapped, sampling, batch_size)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end an output: the requested stop tokens, and the model's EOS tokens unless ignored."""
        stop = frozenset(self.sampling.stop_token_ids)
        eos = self.model.eos_token_ids
        return stop if self.sampling.ignore_eos else stop | eos

    @torch.inference_mode()
    def distributions(self, prompts: Sequence[Tokens], outputs: Sequence[Tokens]) -> Iterator[Positions]:
        """Distributions of all tokens of the outputs, in chunks. No prompt or output may be empty.

        Two references with the same vocabulary and batch size yield chunks of the same positions.
        """
        for first in range(0, len(prompts), self.batch_size):
            rows = slice(first, first + self.batch_size)
            yield from self._batch(prompts[rows], outputs[rows], first)

    def _batch(self, prompts: Sequence[Tokens], outputs: Sequence[Tokens], first: int) -> Iterator[Positions]:
        longest = max(map(len, outputs))
        cache = self._prefilled(prompts, longest)
        width = max(1, _CHUNK // (len(prompts) * self.vocab_size))
        for start in range(0, longest, width):
            stop = min(start + width, longest)
            fed = [[prompt[-1], *output][start:stop] for prompt, output in zip(prompts, outputs, strict=True)]
            tokens = self._pad(fed, stop - start)
            logits = self.model.forward(tokens, cache)
            distribution = self._distribution(logits, tokens, prompts, [output[:start] for output in outputs])
            cache.num_cached[:] = [length + stop - start for length in cache.num_cached]
            lengths = upload([len(output) for output in outputs], self.model.device).unsqueeze(1)
            places = torch.arange(start, stop, device=self.model.device).expand(len(outputs), -1)
            requests = torch.arange(len(outputs), device=self.model.device).unsqueeze(1).expand_as(places) + first
            emitted = self._pad([output[start:stop] for output in outputs], stop - start)
            real = places < lengths
            chosen = [_chosen(each, real) for each in (logits, emitted, requests, places)]
            yield Positions(_chosen_distributions(distribution, real), *chosen)

    def _distribution(
        self, logits: Tensor, fed: Tensor, prompts: Sequence[Tokens], before: Sequence[Tokens]
    ) -> Distribution:
        state = self._state(self.sampling, prompts, before)
        distribution, finite = state.distribution(logits, fed[:, 1:])
        if not finite.all():
            raise FloatingPointError("logits of the reference must give a distribution but are NaN, +inf or all -inf")
        return distribution

    def _state(self, sampling: SamplingParams, prompts: Sequence[Tokens], before: Sequence[Tokens]) -> SamplingState:
        return SamplingState([sampling] * len(prompts), prompts, before, self.vocab_size, self.model.device)

    def _pad(self, rows: Sequence[Tokens], width: int) -> Tensor:
        return upload([[*row, *[0] * (width - len(row))] for row in rows], self.model.device)

    def _prefilled(self, prompts: Sequence[Tokens], room: int) -> Cache:
        """A cache with all but the last token of each prompt; reused from an earlier call with the same prompts."""
        keys = tuple(map(tuple, prompts))
        capacity = max(map(len, prompts)) + room
        cache = self._caches.pop(keys, None)
        if cache is None or cache.capacity < capacity or not _hold(cache, keys):
            self._forget(len(prompts) * capacity)
            cache = self.model.allocate(len(prompts), capacity)
            for slot, prompt in enumerate(keys):
                hold(self.model, prompt, cache, slot)
        self._caches[keys] = cache
        cache.num_cached[:] = [len(prompt) - 1 for prompt in keys]
        return cache

    def _forget(self, room: int) -> None:
        """Drop the least recently used caches until `room` more positions fit."""
        kept = sum(len(cache.num_cached) * cache.capacity for cache in self._caches.values())
        while self._caches and kept + room > _REMEMBERED:
            cache = self._caches.popitem(last=False)[1]
            kept -= len(cache.num_cached) * cache.capacity

    @torch.inference_mode()
    def gap(self, prompt: Tokens, output: Tokens, logits: Tensor) -> float:
        """Distance of an output's last token from the support of its distribution, in logits; 0 if it is inside.

        Rounding can move a token across the boundary of top-k, top-p or argmax; the gap is then small. It is inf for
        a token that no rounding can explain.
        logits: float [vocab], the model's at that position.
        """
        untruncated = replace(self.sampling, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
        distribution, _ = self._state(untruncated, [prompt], [output[:-1]]).distribution(logits[None, None])
        return boundary_gap(distribution.dense()[0, 0].double().log(), output[-1], self.sampling)


def _hold(cache: Cache, prompts: Sequence[Tokens]) -> bool:
    """Whether a cache can be rolled back to all but the last token of each prompt."""
    return all(cache.holds(slot, len(prompt) - 1) for slot, prompt in enumerate(prompts))


def _chosen(rows: Tensor, real: Tensor) -> Tensor:
    """The rows [batch, width, ...] selected by bool [batch, width], without a copy if all are."""
    return rows.flatten(0, 1) if real.all() else rows[real]


def _chosen_distributions(distribution: Distribution, real: Tensor) -> Distribution:
    return Dense(_chosen(distribution.probs, real)) if isinstance(distribution, Dense) else distribution[real]


def boundary_gap(log_probs: Tensor, token: int, sampling: SamplingParams) -> float:
    """Distance of a token from the set that truncation keeps, in logits: 0 inside, inf if it is forbidden anyway.

    log_probs: float64 [vocab], at temperature 1 and before truncation; -inf is forbidden.
    Under top-p it is the logarithm of the excess mass before the token, otherwise a difference of logits.
    """
    own = float(log_probs[token])
    if own == -math.inf:
        return math.inf
    if sampling.temperature == 0:
        return float(log_probs.max()) - own
    log_distributions = (log_probs / sampling.temperature).log_softmax(-1)
    if log_distributions[token] < _LEAST:
        return math.inf
    gaps = [0.0]
    if 0 < sampling.top_k < len(log_probs):
        floor = log_probs.topk(sampling.top_k).values[-1]
        gaps.append(float(floor) - own)
        log_distributions = log_distributions.masked_fill(log_probs < floor, -math.inf).log_softmax(-1)
    if sampling.top_p < 1:
        in_front = float(log_distributions.exp()[log_probs > own].sum())
        gaps.append(math.log(max(in_front, sampling.top_p) / sampling.top_p))
    if sampling.min_p:
        gaps.append(float(log_probs.max()) + sampling.temperature * math.log(sampling.min_p) - own)
    return max(gaps)
