"""The server's own prompt log-probabilities as the reference, where the target does not fit into this machine.

That is weaker than the target in float32: an error of the server's weights or arithmetic is in the reference, too. A
fault of speculation still shows, because a prompt is read without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.conformance.reference import Positions, Reference, Tokens
from specdec.conformance.served.engine import Place
from specdec.sampling_params import SamplingParams
from specdec.servers.errors import EngineError
from specdec.servers.replies import items, mapping, shown

WEAKER = "the reference is the server's own prompt log-probabilities: errors of its weights and arithmetic are not seen"
ROUNDING = 0.01  # by which a log-probability may exceed 0
MAX_LOGPROBS = 20  # that vLLM reports by default; the reference needs those of all tokens that sampling keeps


@dataclass(frozen=True, slots=True)
class _Served:
    """What a reference must know of a model that is elsewhere."""

    vocab_size: int
    eos_token_ids: frozenset[int]
    device: torch.device


class PromptLogprobs(Reference):
    """The distributions that a vLLM server reports for the tokens of a prompt.

    place: of a server that does not speculate. eos_token_ids: the model's. concurrency: requests at once.
    Raises ValueError for sampling that may keep more than MAX_LOGPROBS tokens, and for a server of another kind.
    """

    def __init__(
        self,
        place: Place,
        sampling: SamplingParams,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        concurrency: int,
    ) -> None:
        if sampling.temperature > 0 and not 0 < sampling.top_k <= MAX_LOGPROBS:
            raise ValueError(
                f"top_k={sampling.top_k} must lie between 1 and {MAX_LOGPROBS}, as servers report the probabilities of "
                "so many tokens; or load the target as the reference"
            )
        if place.dialect.name != "vllm":
            raise ValueError(
                f"server={place.dialect.name} must be vllm, which reports log-probabilities of prompts; load the "
                "target as the reference"
            )
        served: Any = _Served(vocab_size, eos_token_ids, torch.device("cpu"))
        super().__init__(served, sampling)
        self._place, self._concurrency = place, concurrency

    @torch.inference_mode()
    def distributions(self, prompts: Sequence[Tokens], outputs: Sequence[Tokens]) -> Iterator[Positions]:
        """As `Reference.distributions`; raises EngineError if the server does not report them."""
        with ThreadPoolExecutor(self._concurrency) as threads:
            rows = list(threads.map(self._logits, prompts, outputs))
        for index, (prompt, output, logits) in enumerate(zip(prompts, outputs, rows, strict=True)):
            tokens = torch.tensor(output)
            fed = torch.tensor([[prompt[-1], *output[:-1]]])
            distribution = self._distribution(logits[None], fed, [prompt], [()])
            places = torch.arange(len(output))
            yield Positions(distribution[0], logits, tokens, torch.full_like(places, index), places)

    def _logits(self, prompt: Tokens, output: Tokens) -> Tensor:
        """Log-probabilities at each token of an output, float32 [tokens, vocab]; -inf where none is reported."""
        body = {
            "model": self._place.model,
            "prompt": [*prompt, *output],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": MAX_LOGPROBS,
        }
        answer = self._place.client.post(self._place.dialect.path, body | dict(self._place.fields))
        choices = items(answer, "choices")
        reported = items(mapping(choices[0] if choices else None, "choices"), "prompt_logprobs")
        if len(reported) != len(prompt) + len(output):
            raise EngineError(
                f"the server must report log-probabilities of {len(prompt) + len(output)} prompt tokens, but reported "
                f"{len(reported)}; see its log"
            )
        logits = torch.full((len(output), self.vocab_size), -math.inf)
        for place, row in enumerate(reported[len(prompt) :]):
            for token, log_prob in _log_probs(mapping(row, "prompt_logprobs"), self.vocab_size):
                logits[place, token] = log_prob
        return logits


def _log_probs(row: Mapping[str, Any], vocab_size: int) -> Iterator[tuple[int, float]]:
    """Token ids and their log-probabilities."""
    for token, entry in row.items():
        log_prob = mapping(entry, "prompt_logprobs").get("logprob")
        if (
            not token.isdecimal()
            or int(token) >= vocab_size
            or not isinstance(log_prob, int | float)
            or log_prob > 0.01
        ):
            raise EngineError(
                f"prompt_logprobs must be log-probabilities of tokens below {vocab_size}, but the server sent "
                f"{shown({token: entry})}; serve the model of --target"
            )
        yield int(token), float(log_prob)
