"""The text that drafts learn from: what the target itself says to many prompts, at several temperatures.

A draft is asked to go on where the target left off, so the target's own text is what it should know best.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specdec.distill.prompts import Dialogue, EvaluationText, about_texts
from specdec.engine import Engine
from specdec.prompts import decode, encode, rows
from specdec.runtime.progress import bar
from specdec.sampling_params import SamplingParams

HELD_OUT = 40
MAX_PROMPT_TOKENS, MAX_TEXT_TOKENS = 256, 1280  # of questions, and of questions about a text
WINDOW = 1024  # texts that are sorted by length among each other
GROUP = 256  # prompts handed to the engine at once; what a kill may lose


@dataclass(frozen=True, slots=True)
class Text:
    """One text: prompt and continuation as token ids; the continuation is empty until the target has spoken.

    temperature: at which the target says it; None for somebody else's answer. seed: of the sampling.
    """

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    temperature: float | None
    seed: int

    @property
    def is_missing(self) -> bool:
        """Whether the target has still to be asked."""
        return self.temperature is not None and not self.output


def plan(
    dialogues: Sequence[Dialogue],
    tokenizer: Any,
    *,
    num_prompts: int,
    num_replies: int = 0,
    num_about_texts: int = 0,
    temperatures: Sequence[float] = (0.0, 0.7, 1.0),
    max_tokens: int = 256,
    seed: int = 0,
    excluded: EvaluationText | None = None,
) -> tuple[list[Text], dict[str, int]]:
    """The texts to make, in an order that is the same every time, and how many dialogues were left out and why.

    num_prompts: prompts that the target answers, with the temperatures in turn. num_replies: further dialogues whose
    own answer is taken, cut to max_tokens. num_about_texts: questions about a text, which the target answers.
    Raises ValueError if there are not enough dialogues.
    """
    left_out = dict.fromkeys(("overlapping", "not_ascii", "too_long"), 0)
    texts: list[Text] = []

    def prompt_of(dialogue: Dialogue, most: int) -> tuple[int, ...] | None:
        prompt = encode(dialogue.prompt, tokenizer)
        reason = _why_not(dialogue, len(prompt) > most, excluded)
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
            f"num_prompts={num_prompts}, num_replies={num_replies} and num_about_texts={num_about_texts} must be at "
            f"most the {len(texts)} usable dialogues together (left out: {left_out}); ask for fewer, or give more"
        )
    windows = [texts[start : start + WINDOW] for start in range(0, len(texts), WINDOW)]
    return [text for window in windows for text in sorted(window, key=lambda text: len(text.prompt))], left_out


def _why_not(dialogue: Dialogue, is_too_long: bool, excluded: EvaluationText | None) -> str | None:
    if excluded and excluded.overlaps(dialogue):
        return "overlapping"
    if sum(map(str.isascii, dialogue.prompt)) < 0.9 * len(dialogue.prompt):
        return "not_ascii"
    return "too_long" if is_too_long else None


def held_out(texts: Sequence[Text]) -> list[int]:
    """Which texts are kept for evaluation: every so manieth, unless its prompt occurs again and would be learnt."""
    counts = Counter(text.prompt for text in texts)
    return [index for index in range(0, len(texts), HELD_OUT) if counts[texts[index].prompt] == 1]


def write_held_out(texts: Sequence[Text], tokenizer: Any, path: Path) -> None:
    """Write the questions that are kept for evaluation, as a file of prompts that the benchmark reads."""
    questions = (decode(texts[index].prompt, tokenizer) for index in held_out(texts))
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions if question))


def write(texts: Sequence[Text], engine: Engine, path: Path, *, max_tokens: int) -> None:
    """Let the target complete the texts and write them as JSON lines, behind those that the file already holds."""
    num_done = _drop_broken_end(path)
    with path.open("a", encoding="utf-8") as out, bar(len(texts), "text", initial=num_done) as done:
        for start in range(num_done, len(texts), GROUP):
            group = texts[start : start + GROUP]
            for text in _completed(group, engine, max_tokens):
                out.write(json.dumps(asdict(text)) + "\n")
            out.flush()
            done.update(len(group))


def read(path: Path) -> Iterator[Text]:
    """The texts of a corpus. Raises ValueError naming file and line for a broken one."""
    for place, row in rows(path):
        try:
            yield Text(tuple(row["prompt"]), tuple(row["output"]), row["temperature"], row["seed"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{place}: must be a text of a corpus, it lacks {error}; make the corpus again") from None


def _completed(texts: Sequence[Text], engine: Engine, max_tokens: int) -> Iterator[Text]:
    missing = [text for text in texts if text.is_missing]
    sampling = [
        SamplingParams(temperature=text.temperature or 0, max_tokens=max_tokens, seed=text.seed) for text in missing
    ]
    answers = iter(engine.generate([text.prompt for text in missing], sampling))
    for text in texts:
        yield replace(text, output=next(answers).token_ids) if text.is_missing else text


def _drop_broken_end(path: Path) -> int:
    """Cut off a line that a killed run left unfinished; returns how many whole ones there are."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return whole.count(b"\n")
