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

from tqdm import tqdm

from specdec.distill.prompts import Dialogue, EvaluationText, json_lines
from specdec.engine import Engine
from specdec.sampling import SamplingParams

HELD_OUT = 40
GROUP = 1024  # prompts handed to the engine at once, alike in length; what a kill may lose


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
    temperatures: Sequence[float] = (0.0, 0.7, 1.0),
    max_prompt_tokens: int = 256,
    max_tokens: int = 256,
    seed: int = 0,
    excluded: EvaluationText | None = None,
) -> tuple[list[Text], dict[str, int]]:
    """The texts to make, in an order that is the same every time, and how many dialogues were left out and why.

    num_prompts: prompts that the target answers, with the temperatures in turn. num_replies: further dialogues whose
    own answer is taken, cut to max_tokens. Raises ValueError if there are not enough dialogues.
    """
    left_out = {"overlapping": 0, "not_ascii": 0, "too_long": 0}
    texts: list[Text] = []
    for index in random.Random(seed).sample(range(len(dialogues)), len(dialogues)):
        if len(texts) == num_prompts + num_replies:
            break
        dialogue = dialogues[index]
        chat = encode(dialogue.prompt, tokenizer)
        if excluded and excluded.overlaps(dialogue):
            left_out["overlapping"] += 1
        elif sum(map(str.isascii, dialogue.prompt)) < 0.9 * len(dialogue.prompt):
            left_out["not_ascii"] += 1
        elif len(chat) > max_prompt_tokens:
            left_out["too_long"] += 1
        elif len(texts) < num_prompts:
            texts.append(Text(chat, (), temperatures[len(texts) % len(temperatures)], seed + index))
        elif dialogue.reply:
            texts.append(Text(chat, tuple(tokenizer(dialogue.reply).input_ids[:max_tokens]), None, seed + index))
    if len(texts) < num_prompts + num_replies:
        raise ValueError(
            f"num_prompts={num_prompts} and num_replies={num_replies} must be at most the {len(texts)} usable "
            f"dialogues together (left out: {left_out}); ask for fewer, or give more prompts"
        )
    groups = [texts[start : start + GROUP] for start in range(0, len(texts), GROUP)]
    return [text for group in groups for text in sorted(group, key=lambda text: len(text.prompt))], left_out


def held_out(texts: Sequence[Text]) -> list[int]:
    """Which texts are kept for evaluation: every so manieth, unless its prompt occurs again and would be learnt."""
    counts = Counter(text.prompt for text in texts)
    return [index for index in range(0, len(texts), HELD_OUT) if counts[texts[index].prompt] == 1]


def encode(prompt: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a question, through the tokenizer's chat template if it has one."""
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        return tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    return tuple(tokenizer(prompt).input_ids)


def write(texts: Sequence[Text], engine: Engine, path: Path, *, max_tokens: int) -> None:
    """Let the target complete the texts and write them as JSON lines, behind those that the file already holds."""
    num_done = _drop_broken_end(path)
    with path.open("a", encoding="utf-8") as out, tqdm(total=len(texts), initial=num_done, unit="text") as bar:
        for start in range(num_done, len(texts), GROUP):
            group = texts[start : start + GROUP]
            for text in _completed(group, engine, max_tokens):
                out.write(json.dumps(asdict(text)) + "\n")
            out.flush()
            bar.update(len(group))


def read(path: Path) -> Iterator[Text]:
    """The texts of a corpus. Raises ValueError naming file and line for a broken one."""
    for place, row in json_lines(path):
        try:
            yield Text(tuple(row["prompt"]), tuple(row["output"]), row["temperature"], row["seed"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{place} must be a text of a corpus, it lacks {error}; make the corpus again") from None


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
