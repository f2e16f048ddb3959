"""The distributions that an engine's tokens should have been drawn from: the target's own, by teacher forcing.

An emitted token is judged given the tokens before it, whatever those are: so nothing of the engine is needed but its
output, and one wrong token does not spoil the judgement of the next.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.models.base import Cache, LanguageModel, hold
from specdec.runtime.devices import upload
from specdec.sampling.distributions import Dense, Distribution
from specdec.sampling.state import SamplingState
from specdec.sampling_params import SamplingParams

_CHUNK = 1 << 22  # probabilities held at a time: as few as keep a step wide, for fresh memory costs more than a sum
_REMEMBERED = 1 << 14  # positions of prompts whose keys and values are kept for the next outputs
_LEAST = -87.0  # log-probability below which float32 has no number

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """Some positions of several outputs, row by row, each with its distribution.

    distribution: distributions [n]. logits: float [n, vocab], the model's own. tokens: int64 [n], what was emitted.
    requests, places: int64 [n], which output and where in it.
    """

    distribution: Distribution
    logits: Tensor
    tokens: Tensor
    requests: Tensor
    places: Tensor


class Reference:
    """A model's distributions at every position of given outputs, in float32 or wider.

    model: the target, or a draft whose distributions are wanted. sampling: processors and truncation, by the road that
    decoding takes. batch_size: outputs scored together.
    Raises ValueError for a model in half precision, whose distributions would be another engine's opinion, and for a
    constraint.
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
    def load(cls, target: str, sampling: SamplingParams, *, device: str = "auto", batch_size: int = 8) -> Reference:
        """The reference of a model by its name, in float32; names and errors as for `Engine.load`."""
        from specdec.models.causal import CausalLM
        from specdec.models.loading import as_device, load_pretrained
        from specdec.models.seq2seq import Seq2SeqLM

        model, tokenizer = load_pretrained(target, dtype=torch.float32, device=as_device(device))
        wrapped = (Seq2SeqLM if model.config.is_encoder_decoder else CausalLM)(model, tokenizer)
        return cls(wrapped, sampling, batch_size)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end an output: those asked for, and the model's own unless they are ignored."""
        stop = frozenset(self.sampling.stop_token_ids)
        eos = self.model.eos_token_ids
        return stop if self.sampling.ignore_eos else stop | eos

    @torch.inference_mode()
    def distributions(self, prompts: Sequence[Tokens], outputs: Sequence[Tokens]) -> Iterator[Positions]:
        """The distributions of all tokens of outputs that continue prompts; both hold token ids, none may be empty.

        Chunks of two references with the same vocabulary and batch size have the same positions.
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
            raise FloatingPointError("logits of the reference are NaN, +inf or all -inf, so there is no distribution")
        return distribution

    def _state(self, sampling: SamplingParams, prompts: Sequence[Tokens], before: Sequence[Tokens]) -> SamplingState:
        return SamplingState([sampling] * len(prompts), prompts, before, self.vocab_size, self.model.device)

    def _pad(self, rows: Sequence[Tokens], width: int) -> Tensor:
        return upload([[*row, *[0] * (width - len(row))] for row in rows], self.model.device)

    def _prefilled(self, prompts: Sequence[Tokens], room: int) -> Cache:
        """A cache that holds all but the last token of each prompt: an earlier call's, if its prompts were the same."""
        keys = tuple(map(tuple, prompts))
        capacity = max(map(len, prompts)) + room
        cache = self._caches.pop(keys, None)
        if cache is None or cache.capacity < capacity:
            self._forget(len(prompts) * capacity)
            cache = self.model.allocate(len(prompts), capacity)
            for slot, prompt in enumerate(keys):
                hold(self.model, prompt, cache, slot)
        self._caches[keys] = cache
        cache.num_cached[:] = [len(prompt) - 1 for prompt in keys]
        return cache

    def _forget(self, room: int) -> None:
        """Drop caches, the least recently used first, until there is room for so many positions more."""
        kept = sum(len(cache.num_cached) * cache.capacity for cache in self._caches.values())
        while self._caches and kept + room > _REMEMBERED:
            cache = self._caches.popitem(last=False)[1]
            kept -= len(cache.num_cached) * cache.capacity

    @torch.inference_mode()
    def gap(self, prompt: Tokens, output: Tokens, logits: Tensor) -> float:
        """By how much the last token of an output misses its distribution's support, in logits; 0 if it does not miss
        it.

        logits: float [vocab], the model's own where that token was drawn.
        Rounding may move a token over the edge of a top-k, a nucleus or an argmax: then the gap is small. It is inf for
        a token that no rounding makes possible.
        """
        whole = replace(self.sampling, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
        distribution, _ = self._state(whole, [prompt], [output[:-1]]).distribution(logits[None, None])
        return boundary_gap(distribution.dense()[0, 0].double().log(), output[-1], self.sampling)


def _chosen(rows: Tensor, real: Tensor) -> Tensor:
    """Those of rows [batch, width, ...] that are real, bool [batch, width]: without a copy if all of them are."""
    return rows.flatten(0, 1) if real.all() else rows[real]


def _chosen_distributions(distribution: Distribution, real: Tensor) -> Distribution:
    return Dense(_chosen(distribution.probs, real)) if isinstance(distribution, Dense) else distribution[real]


def boundary_gap(log_probs: Tensor, token: int, sampling: SamplingParams) -> float:
    """How far a token is outside what sampling keeps, in logits: 0 inside, inf if it is impossible anyhow.

    log_probs: float64 [vocab], at temperature 1 and before truncation; -inf is forbidden.
    Under top-p it is the mass in front of the token that is too large, as a logarithm; else a distance of logits.
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
