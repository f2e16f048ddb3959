"""Answers of a served target: any OpenAI-compatible server of completions, such as vLLM's, by its URL.

vLLM gives the token ids that it sampled (`return_token_ids`). Of another server the text is encoded again, which gives
another row of tokens in the rare case that the target sampled an unusual one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from specdec.distill.corpus import Text
from specdec.servers.client import Client, api_key
from specdec.servers.errors import EngineError

TIMEOUT_S = 600.0  # of one answer
_MAX_SHOWN = 200  # characters of a server's message


class ServerAnswers:
    """An `Answers` of a served model.

    url: of the server, with or without /v1. model: its name there. tokenizer, vocab_size: the target's.
    num_concurrent: requests at once. The API key is that of the environment variable SPECDEC_SERVER_API_KEY, if there
    is one.
    """

    def __init__(self, url: str, model: str, tokenizer: Any, vocab_size: int, num_concurrent: int) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r} must begin with http:// or https://; give that of a running server")
        try:
            self._client = Client(url, api_key(), TIMEOUT_S, TIMEOUT_S)
        except EngineError as error:
            raise ValueError(str(error)) from None
        self._url = url
        self._model, self._tokenizer, self._vocab_size = model, tokenizer, vocab_size
        self._num_concurrent = num_concurrent

    def __call__(self, texts: Sequence[Text], max_tokens: int) -> list[tuple[int, ...]]:
        """Continuations, in order. Raises ValueError for an answer that is not one, OSError if there is none."""
        with ThreadPoolExecutor(self._num_concurrent) as threads:
            answers = list(threads.map(partial(self._answer, max_tokens=max_tokens), texts))
        changed = sum(is_changed for _, is_changed in answers)
        if changed:
            logging.getLogger("specdec").warning(
                "%d of %d answers of %s have another number of tokens when their text is encoded: the server gives no "
                "token ids",
                *(changed, len(answers), self._url),
            )
        return [tokens for tokens, _ in answers]

    def _answer(self, text: Text, max_tokens: int) -> tuple[tuple[int, ...], bool]:
        """Token ids of a continuation, and whether they are surely others than the server sampled."""
        request = {
            "model": self._model,
            "prompt": list(text.prompt),
            "max_tokens": max_tokens,
            "temperature": text.temperature or 0.0,
            "seed": text.seed,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        answer = self._post(request)
        try:
            choice = answer["choices"][0]
            tokens = choice.get("token_ids")
            if tokens is None:
                return self._encoded(str(choice["text"]), choice.get("finish_reason"), answer.get("usage") or {})
            return self._checked(tokens), False
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"url={self._url!r} must answer as OpenAI's completions do ({error!r} in {_shown(answer)}); use "
                "another server"
            ) from None

    def _checked(self, tokens: Sequence[Any]) -> tuple[int, ...]:
        if not tokens or not all(type(each) is int and 0 <= each < self._vocab_size for each in tokens):
            raise ValueError(
                f"url={self._url!r} must answer with tokens below {self._vocab_size}, the target's vocabulary, but "
                f"gave {_shown(tokens)}; serve the model of --target"
            )
        return tuple(tokens)

    def _encoded(self, text: str, reason: str | None, usage: dict[str, Any]) -> tuple[tuple[int, ...], bool]:
        """Token ids of a text that are decoded to it. Raises ValueError if the tokenizer has none."""
        tokens = list(self._tokenizer(text, add_special_tokens=False).input_ids)
        if (decoded := self._tokenizer.decode(tokens)) != text:
            raise ValueError(
                f"text={_shown(text)} of url={self._url!r} must be decoded from the token ids it is encoded to, but "
                f"gives {_shown(decoded)}; serve the model with vLLM, which gives token ids"
            )
        end = self._tokenizer.eos_token_id
        if reason == "stop" and end is not None and tokens[-1:] != [end]:
            tokens.append(end)
        return self._checked(tokens), abs(usage.get("completion_tokens", len(tokens)) - len(tokens)) > 1

    def _post(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._client.post("/v1/completions", request)
        except EngineError as error:
            raise OSError(f"{error}; to go on, check --url and --model, then rerun") from None


def _shown(value: Any) -> str:
    """The beginning of what a server sent, printable."""
    return repr(value)[:_MAX_SHOWN]
