"""Recovers the token ids of a reply and checks that they are those that the server sampled."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.conformance.served.dialects import Question, Reply
from specdec.servers.errors import EngineError
from specdec.servers.replies import shown

INCOMPLETE = "\ufffd"  # what bytes that are no character yet are decoded to
CONTEXT = 4  # prompt tokens before the completion that may change how its beginning is decoded


class UnclearTokensError(Exception):
    """It is not certain which tokens a reply consists of, so that it is no evidence."""


@dataclass(frozen=True, slots=True)
class TokenRecovery:
    """Token ids of replies. tokenizer, vocab_size, stop_token_ids: the target's; the last with its end of sequence."""

    tokenizer: Any
    vocab_size: int
    stop_token_ids: Collection[int]

    def tokens(self, question: Question, reply: Reply) -> tuple[int, ...]:
        """The tokens that the server sampled, including the one that ended the completion.

        Raises UnclearTokensError if they are not certain, and EngineError if the reply is wrong in any case.
        """
        self._check_prompt(question, reply)
        if reply.token_ids is None:
            tokens = self._encoded(reply)
        else:
            tokens = reply.token_ids
            self._check_vocabulary(tokens)
            self._check_text(question, tokens, reply.text)
        ended = self._ended(tokens, reply)
        self._check_end(ended, question.max_tokens, reply)
        self._check_count(ended, tokens, reply)
        return ended

    def _check_prompt(self, question: Question, reply: Reply) -> None:
        if reply.num_prompt_tokens not in (None, len(question.prompt)):
            raise EngineError(
                f"the server must read the prompt as {len(question.prompt)} tokens, but read "
                f"{reply.num_prompt_tokens}; serve the tokenizer of --target, with enough context"
            )

    def _check_vocabulary(self, tokens: Sequence[int]) -> None:
        if wrong := [token for token in tokens if token >= self.vocab_size]:
            raise EngineError(
                f"token ids must be below {self.vocab_size}, the target's vocabulary, but the server replied with "
                f"{wrong[0]}; serve the model of --target"
            )

    def _encoded(self, reply: Reply) -> tuple[int, ...]:
        """Token ids of a text, if it is decoded to the same text again."""
        if reply.text is None:
            raise EngineError("the server must reply with token ids or a text; is this an OpenAI-compatible server?")
        tokens = tuple(self.tokenizer(reply.text, add_special_tokens=False).input_ids)
        if (decoded := self._decoded(tokens)) != reply.text:
            raise UnclearTokensError(
                f"the text {shown(reply.text)} encodes to tokens of another text, {shown(decoded)}"
            )
        return tokens

    def _check_text(self, question: Question, tokens: Sequence[int], text: str | None) -> None:
        """Ids and text must agree: a server may decode in the context of the prompt or without."""
        if not text:
            return
        visible = [token for token in tokens if token not in self.stop_token_ids]
        context = list(question.prompt[-CONTEXT:])
        within = self._decoded([*context, *visible]).removeprefix(self._decoded(context))
        candidates = (within, self._decoded(visible), self._decoded(tokens))
        if text.rstrip(INCOMPLETE) not in [each.rstrip(INCOMPLETE) for each in candidates]:
            raise UnclearTokensError(f"the token ids are decoded to {shown(within)}, but the text is {shown(text)}")

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _ended(self, tokens: tuple[int, ...], reply: Reply) -> tuple[int, ...]:
        """With the stop token, which some servers leave out."""
        if reply.finish_reason != "stop" or (tokens and tokens[-1] in self.stop_token_ids):
            return tokens
        stop = reply.stop_token
        if stop is None and len(self.stop_token_ids) == 1:
            (stop,) = self.stop_token_ids
        if stop is None or stop not in self.stop_token_ids:
            raise EngineError(
                f"a completion must stop at one of the target's stop tokens, {sorted(self.stop_token_ids)}, but "
                f"stopped after {shown(tokens[-1:])}; name the server's with --stop-token-ids"
            )
        return (*tokens, stop)

    def _check_count(self, ended: Sequence[int], tokens: Sequence[int], reply: Reply) -> None:
        """The server's own count, which may leave out the stop token as its ids may."""
        if reply.num_tokens not in (None, len(ended), len(tokens)):
            raise UnclearTokensError(
                f"the completion has {len(ended)} tokens, but the server counts {reply.num_tokens}"
            )

    def _check_end(self, tokens: Sequence[int], max_tokens: int, reply: Reply) -> None:
        error = UnclearTokensError if reply.token_ids is None else EngineError  # a text may encode to more or fewer
        if len(tokens) > max_tokens:
            raise error(f"the server must stop at max_tokens={max_tokens}, but sent {len(tokens)} tokens")
        if reply.finish_reason == "length" and len(tokens) < max_tokens:
            raise error(
                f"the server must not truncate completions, but ended one after {len(tokens)} of {max_tokens} tokens; "
                "raise its context size"
            )
