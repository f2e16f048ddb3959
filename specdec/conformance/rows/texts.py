"""Real text for the comparison: prompts and the target's own greedy continuations."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from specdec.conformance.rows.arrangements import Text, Tokens
from specdec.distill.prompts import read_dialogues
from specdec.prompts import encode, encode_bytes
from specdec.runtime.devices import upload

TRIED_PER_TEXT = 8  # prompts tried for each text: a continuation that ends early is not used


@dataclass(frozen=True, slots=True)
class Choice:
    """Which texts to use.

    prompts: "sharegpt", or a JSON lines file with the field `prompt`. num_texts, num_tokens: how many texts, and tokens
    of each continuation. max_prompt: longer prompts are not used. context: shorter prompts are preceded by others until
    they have so many tokens; None leaves them as they are. seed: of the sample.
    """

    prompts: str
    num_texts: int
    num_tokens: int
    max_prompt: int
    context: int | None
    seed: int


def choose_texts(choice: Choice, model: Any, tokenizer: Any) -> list[Text]:
    """Texts with greedy continuations by a transformers model. Raises ValueError if there are too few."""
    texts: list[Text] = []
    for prompt in _prompts(choice, tokenizer):
        continuation = _greedy(model, prompt, choice.num_tokens)
        if len(continuation) == choice.num_tokens:
            texts.append(Text(prompt, continuation))
        if len(texts) == choice.num_texts:
            return texts
    raise ValueError(
        f"num_texts={choice.num_texts} must be at most the number of prompts of {choice.prompts} with up to "
        f"{choice.max_prompt} tokens whose continuation has {choice.num_tokens}, of which {len(texts)} were found; use "
        "fewer texts or tokens"
    )


def _prompts(choice: Choice, tokenizer: Any) -> Iterator[Tokens]:
    """Token ids of prompts of the requested lengths."""
    dialogues = read_dialogues(choice.prompts)
    random.Random(choice.seed).shuffle(dialogues)
    before: list[int] = []
    num_left = TRIED_PER_TEXT * choice.num_texts
    for dialogue in dialogues:
        tokens = encode(dialogue.prompt, tokenizer) if tokenizer else encode_bytes(dialogue.prompt)
        if not 2 <= len(tokens) <= choice.max_prompt or not num_left:
            continue
        if choice.context and len(before) + len(tokens) < choice.context:
            before += tokens
            continue
        yield [*before, *tokens][-(choice.context or len(tokens)) :]
        before, num_left = [], num_left - 1


@torch.inference_mode()
def _greedy(model: Any, prompt: Tokens, num_tokens: int) -> Tokens:
    """A greedy continuation of at most num_tokens tokens."""
    inputs = upload([list(prompt)], model.device)
    mask, options = torch.ones_like(inputs), {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    continuation: list[int] = model.generate(inputs, attention_mask=mask, **options)[0, len(prompt) :].tolist()
    return continuation
