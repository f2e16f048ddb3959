"""The training corpus for drafts: the target's own answers to many prompts, at several temperatures.

A draft continues text written by the target, so the target's own text is what it should learn.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specdec.distill.prompts import Dialogue, EvaluationText, about_texts
from specdec.distill.sources import KINDS
from specdec.engine import Engine
from specdec.prompts import decode, encode, rows
from specdec.runtime.progress import bar
from specdec.sampling_params import SamplingParams

HELD_OUT = 40
MAX_PROMPT_TOKENS, MAX_TEXT_TOKENS = 256, 1280  # limits for questions, and for questions about a text
WINDOW = 1024  # texts sorted by length together
GROUP = 256  # prompts per engine call; an interrupted run loses at most this many


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and its continuation as token ids; the continuation is empty until the target has generated it.

    temperature: of the target's sampling; None for an answer from the data set. seed: of the sampling.
    """

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    temperature: float | None
    seed: int

    @property
    def is_missing(self) -> bool:
        """Whether the target still has to generate the continuation."""
        return self.temperature is not None and not self.output


def plan_texts(
    dialogues: Sequence[Dialogue],
    tokenizer: Any,
    *,
    num_prompts: int,
    num_replies: int = 0,
    num_about_texts: int = 0,
    kinds: Mapping[str, int] | None = None,
    temperatures: Sequence[float] = (0.0, 0.7, 1.0),
    max_tokens: int = 256,
    seed: int = 0,
    excluded: EvaluationText | None = None,
) -> tuple[list[Text], dict[str, int]]:
    """Choose the texts of a corpus, in a reproducible order.

    Args:
        dialogues: the available dialogues.
        tokenizer: the target's tokenizer.
        num_prompts: prompts for the target to answer, cycling through the temperatures.
        num_replies: further dialogues used with their own reply, truncated to max_tokens.
        num_about_texts: questions about a text for the target to answer.
        kinds: number of prompts of each of `sources.KINDS` for the target to answer.
        temperatures: of the target's sampling.
        max_tokens: maximum length of a reply.
        seed: of the random choice.
        excluded: evaluation text that must not overlap with the corpus.

    Returns:
        The texts, and how many dialogues were left out, by reason.

    Raises:
        ValueError: if there are not enough usable dialogues.
    """
    left_out = dict.fromkeys(("overlapping", "not_ascii", "too_long"), 0)
    texts: list[Text] = []

    def prompt_of(dialogue: Dialogue, max_tokens: int) -> tuple[int, ...] | None:
        prompt = encode(dialogue.prompt, tokenizer)
        reason = _why_not(dialogue, len(prompt) > max_tokens, excluded)
        if reason:
            left_out[reason] += 1
        return None if reason else prompt

    for index in random.Random(seed).sample(range(len(dialogues)), len(dialogues)):
        if len(texts) == num_prompts + num_replies:
            break
        prompt = prompt_of(dialogues[index], MAX_PROMPT_TOKENS)
        if prompt and len(texts) < num_prompts:
            texts.append(Text(prompt, (), temperatures[len(texts) % len(temperatures)], seed + index))
        elif prompt and (reply := dialogues[index].reply):
            texts.append(Text(prompt, tuple(tokenizer(reply).input_ids[:max_tokens]), None, seed + index))
    total = num_prompts + num_replies + num_about_texts
    for index, dialogue in enumerate(about_texts(dialogues, seed), len(dialogues)):
        if len(texts) >= total or len(texts) < num_prompts + num_replies:
            break
        if prompt := prompt_of(dialogue, MAX_TEXT_TOKENS):
            texts.append(Text(prompt, (), temperatures[len(texts) % len(temperatures)], seed + index))
    if len(texts) < total:
        raise ValueError(
            f"num_prompts={num_prompts}, num_replies={num_replies} and num_about_texts={num_about_texts} must add up "
            f"to at most the {len(texts)} usable dialogues (left out: {left_out}); request fewer, or provide more"
        )
    for kind, number in (kinds or {}).items():
        texts += _of_kind(kind, number, prompt_of, temperatures, seed)
    windows = [texts[start : start + WINDOW] for start in range(0, len(texts), WINDOW)]
    return [text for window in windows for text in sorted(window, key=lambda text: len(text.prompt))], left_out


def _of_kind(
    kind: str,
    number: int,
    prompt_of: Callable[[Dialogue, int], tuple[int, ...] | None],
    temperatures: Sequence[float],
    seed: int,
) -> list[Text]:
    """The first prompts of one of `sources.KINDS` that can be used. Raises ValueError if there are not enough."""
    chosen: list[Text] = []
    for index, dialogue in enumerate(KINDS[kind].make(seed)):
        if len(chosen) == number:
            break
        if prompt := prompt_of(dialogue, KINDS[kind].max_tokens):
            chosen.append(Text(prompt, (), temperatures[len(chosen) % len(temperatures)], seed + index))
    if len(chosen) < number:
        raise ValueError(f"kind={kind}={number} must be at most {kind}={len(chosen)}, the usable prompts; take fewer")
    return chosen


def _why_not(dialogue: Dialogue, is_too_long: bool, excluded: EvaluationText | None) -> str | None:
    if excluded and excluded.overlaps(dialogue):
        return "overlapping"
    if sum(map(str.isascii, dialogue.prompt)) < 0.9 * len(dialogue.prompt):
        return "not_ascii"
    return "too_long" if is_too_long else None


def held_out(texts: Sequence[Text]) -> list[int]:
    """Indices of the texts held out for evaluation: every HELD_OUT-th whose prompt occurs only once."""
    counts = Counter(text.prompt for text in texts)
    return [index for index in range(0, len(texts), HELD_OUT) if counts[texts[index].prompt] == 1]


def write_held_out(texts: Sequence[Text], tokenizer: Any, path: Path) -> None:
    """Write the held-out questions as a file of prompts for the benchmark."""
    questions = (decode(texts[index].prompt, tokenizer) for index in held_out(texts))
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions if question))


Answers = Callable[[Sequence["Text"], int], Sequence[tuple[int, ...]]]  # of texts and max_tokens: their continuations


class EngineAnswers:
    """Continuations that an engine generates, each with its text's temperature and seed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, texts: Sequence[Text], max_tokens: int) -> list[tuple[int, ...]]:
        sampling = [
            SamplingParams(temperature=text.temperature or 0, max_tokens=max_tokens, seed=text.seed) for text in texts
        ]
        return [each.token_ids for each in self._engine.generate([text.prompt for text in texts], sampling)]


def write_texts(texts: Sequence[Text], answers: Answers, path: Path, *, max_tokens: int) -> None:
    """Let the target complete the texts and append them to a JSON lines file, resuming after those already there."""
    num_done = _drop_broken_end(path)
    with path.open("a", encoding="utf-8") as out, bar(len(texts), "text", initial=num_done) as done:
        for start in range(num_done, len(texts), GROUP):
            group = texts[start : start + GROUP]
            for text in _completed(group, answers, max_tokens):
                out.write(json.dumps(asdict(text)) + "\n")
            out.flush()
            done.update(len(group))


def read_texts(path: Path) -> Iterator[Text]:
    """The texts of a corpus. Raises ValueError naming file and line for a malformed one."""
    for place, row in rows(path):
        try:
            yield Text(tuple(row["prompt"]), tuple(row["output"]), row["temperature"], row["seed"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{place}: must be a corpus text but lacks {error}; rebuild the corpus") from None


def _completed(texts: Sequence[Text], answers: Answers, max_tokens: int) -> Iterator[Text]:
    missing = [text for text in texts if text.is_missing]
    outputs = iter(answers(missing, max_tokens))
    for text in texts:
        yield replace(text, output=next(outputs)) if text.is_missing else text


def _drop_broken_end(path: Path) -> int:
    """Remove a line that an interrupted run left incomplete; returns the number of complete lines."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return whole.count(b"\n")
