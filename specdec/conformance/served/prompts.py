"""Prompts of an audit: those of a file, or a few that every method drafts for, because they make text repeat itself."""

from __future__ import annotations

import json
from pathlib import Path

from specdec.prompts import text_lines

PROMPTS = (
    "def mean(values):\n    return sum(values) / len(values)\n\n\ndef middle(values):\n    return",
    "Monday: soup. Tuesday: rice. Wednesday: soup. Thursday: rice. Friday: soup. Saturday: rice. Sunday:",
    "The cat sat on the mat. The dog sat on the log. The frog sat on the",
    '{"name": "Ada", "age": 36}\n{"name": "Alan", "age": 41}\n{"name": "Grace", "age":',
    "one two three one two three one two three one two",
    "Question: What is the capital of France?\nAnswer: Paris.\n\nQuestion: What is the capital of Italy?\nAnswer:",
    "for i in range(10):\n    print(i)\n\nfor j in range(10):\n    print(j)\n\nfor k in range(10):\n",
    "Once upon a time there was a king who had three daughters. The first daughter was tall. The second daughter",
    "<ul>\n<li>apples</li>\n<li>pears</li>\n<li>plums</li>\n<li>",
    "The weather report: in the north it is cold, in the south it is warm, in the east it is",
    "SELECT name FROM users WHERE age > 30;\nSELECT name FROM users WHERE age > 40;\nSELECT name FROM",
    "Water boils at one hundred degrees. Water freezes at zero degrees. Iron melts at",
)


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """The field `prompt` of each line of a JSON lines file; without a file PROMPTS.

    Raises ValueError for a file without prompts or with a malformed line, and OSError if it cannot be read.
    """
    if path is None:
        return PROMPTS
    prompts = tuple(_prompt(line, f"{path}, line {number}") for number, line in enumerate(text_lines(path), 1))
    if not prompts:
        raise ValueError(f"prompts={path} must have at least one line; write one JSON object with a prompt on each")
    return prompts


def _prompt(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f'{place} must be a JSON object with a text, as {{"prompt": "Once"}}; correct the file')
    return prompt
