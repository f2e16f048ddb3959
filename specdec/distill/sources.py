"""Training prompts of kinds that short conversations lack: documents, long contexts, code and translation.

Each kind is made of texts whose licence allows it, of which only the prompt comes: the target writes the answer.
    documents, long: the language reference that CPython ships as `pydoc_data.topics` (PSF-2.0);
    code: functions of fifty modules of CPython's standard library (PSF-2.0);
    translation: messages of Django in English, German, French, Spanish and Italian (BSD-3-Clause).
Texts of CPython are those of the version that runs; the corpus records it.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from specdec.distill.prompts import Dialogue
from specdec.runtime.artifacts import WheelFile, fetch

LICENCES = {
    "documents": "PSF-2.0, pydoc_data.topics of CPython",
    "long": "PSF-2.0, pydoc_data.topics of CPython",
    "code": "PSF-2.0, CPython's standard library",
    "translation": "BSD-3-Clause, messages of Django 5.2.8",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of prompts. make: of a seed, all of them, in a reproducible order. max_tokens: the longest prompt."""

    make: Callable[[int], Iterator[Dialogue]]
    max_tokens: int


# ---- documents


ABOUT = (
    "Summarize the following text.\n\n{}",
    "{}\n\nWhat are the main points of this text?",
    "{}\n\nWrite a short abstract of the text above, in three sentences.",
    "Read this document and list its key terms, each with a one-line definition.\n\n{}",
)
ASKED = "Answer the question with the help of these documents.\n\n{}\n\nQuestion: {}"


def documents(seed: int) -> Iterator[Dialogue]:
    """Questions about one or several passages of up to 3,600 characters."""
    random = Random(seed)
    passages = list(_passages(3600))
    random.shuffle(passages)
    for index, (title, text) in enumerate(passages):
        if index % 2:
            yield Dialogue(ABOUT[index // 2 % len(ABOUT)].format(text))
        else:
            others = [each[:1100] for _, each in random.sample(passages, 2)]
            found = [text[:1100], *others]
            random.shuffle(found)
            yield Dialogue(ASKED.format("\n\n".join(found), f"What do the documents say about {title}?"))


def long_documents(seed: int) -> Iterator[Dialogue]:
    """Questions about passages of 6,000 to 14,000 characters."""
    random = Random(seed)
    for size in (6000, 9000, 14000):
        passages = [each for each in _passages(size) if len(each[1]) > size // 2]
        random.shuffle(passages)
        for index, (_, text) in enumerate(passages):
            yield Dialogue(ABOUT[index % len(ABOUT)].format(text))


def _passages(size: int) -> Iterator[tuple[str, str]]:
    """Title and text of passages of the language reference of up to `size` characters, cut between paragraphs."""
    from pydoc_data.topics import topics

    for title, text in sorted(topics.items()):
        start = 0
        while start < len(text):
            end = start + size
            if end < len(text):
                end = max(text.rfind("\n\n", start, end), start + size // 2)
            if (passage := text[start:end].strip()).count(" ") > 60:
                yield title.replace("-", " "), passage
            start = end


# ---- code


TASKS = (
    "Explain what this Python function does.\n\n```python\n{}\n```",
    "Write a docstring for this function.\n\n```python\n{}\n```",
    "Write unit tests for the following function with pytest.\n\n```python\n{}\n```",
    "Rewrite this function with type annotations.\n\n```python\n{}\n```",
    "Translate this Python function to JavaScript.\n\n```python\n{}\n```",
    "Is there a bug in this code? Review it step by step.\n\n```python\n{}\n```",
    "Complete this Python function.\n\n```python\n{}\n```",
)


MODULES = (
    *("ast", "base64", "bisect", "calendar", "colorsys", "configparser", "copy", "dataclasses", "difflib", "dis"),
    *("fractions", "functools", "genericpath", "glob", "heapq", "inspect", "locale", "mimetypes", "ntpath", "operator"),
    *("os", "pdb", "pickle", "pickletools", "platform", "posixpath", "pprint", "profile", "pydoc", "quopri", "random"),
    *("shlex", "shutil", "site", "socket", "statistics", "subprocess", "tarfile", "tempfile", "textwrap", "timeit"),
    *("tokenize", "traceback", "types", "typing", "uuid", "warnings", "webbrowser", "zipapp"),
)


def code(seed: int) -> Iterator[Dialogue]:
    """Tasks about functions of 6 to 60 lines; of those to complete, the beginning."""
    library = Path(sysconfig.get_path("stdlib"))
    functions = [function for name in MODULES for function in _functions(library / f"{name}.py")]
    Random(seed).shuffle(functions)
    for index, function in enumerate(functions):
        task = TASKS[index % len(TASKS)]
        lines = function.splitlines()
        is_cut = task.startswith("Complete")
        yield Dialogue(task.format("\n".join(lines[: len(lines) // 2]) if is_cut else function))


def _functions(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and 6 <= (node.end_lineno or 0) - node.lineno + 1 <= 60:
            yield "\n".join(lines[node.lineno - 1 : node.end_lineno])


# ---- translation


CHECKSUMS = {
    "German": ("de", "bee23320c466971b03e18d5ab9f5ce1d768adfab7c634d7096c871664fe51051"),
    "French": ("fr", "c5d2472789be6b426437600e4de3f5b7ffc3b928929e9ebeecd744d335c2f57e"),
    "Spanish": ("es", "0e4ee0f5427feb88412cba281f076a8523d278ad47cae3ff9bf80a20b185061d"),
    "Italian": ("it", "afe2c5b77e73b9c6a7b507bd80eeb696abc0d23d3939b0b34b356f0a214749a8"),
}
SENTENCES = 3  # in a prompt


def messages(language: str) -> WheelFile:
    """The file of Django's messages in a language."""
    name, checksum = CHECKSUMS[language]
    return WheelFile(
        name=f"django-messages-{name}",
        requirement="django==5.2.8",
        wheel_sha256="37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
        member=f"django/conf/locale/{name}/LC_MESSAGES/django.po",
        member_sha256=checksum,
        licence="BSD-3-Clause",
        source=f"Django's messages in {language}",
        disk_bytes=50_000_000,
    )


def translation(seed: int) -> Iterator[Dialogue]:
    """A few sentences to translate from a language into English, or the other way round."""
    random, prompts = Random(seed), []
    for language in CHECKSUMS:
        pairs = json.loads((fetch(messages(language), _convert_messages) / "pairs.json").read_text())
        random.shuffle(pairs)
        for start in range(0, len(pairs) - SENTENCES, SENTENCES):
            english, other = (" ".join(each) for each in zip(*pairs[start : start + SENTENCES], strict=True))
            prompts.append(Dialogue(f"Translate {language} to English: {other}"))
            prompts.append(Dialogue(f"Translate this text into {language}: {english}"))
    random.shuffle(prompts)
    yield from prompts


def _convert_messages(source: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "pairs.json").write_text(
        json.dumps(list(sentence_pairs(source.read_text(encoding="utf-8").splitlines())))
    )


def sentence_pairs(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """English messages of at least five words and their translations, of the lines of a gettext file."""
    entry: dict[str, str] = {}
    key = ""
    for line in [*lines, 'msgid ""']:
        if line.startswith("msgid ") and _is_sentence(entry):
            yield entry["msgid"], entry["msgstr"]
        if line.startswith("msgid "):
            entry = {}
        if found := re.match(r'(\w+(?:\[\d\])?) (?=")', line):
            key = found[1]
            line = line[found.end() :]
        if line.startswith('"'):
            entry[key] = entry.get(key, "") + ast.literal_eval(line)


def _is_sentence(entry: dict[str, str]) -> bool:
    return len(entry.get("msgid", "").split()) >= 5 and bool(entry.get("msgstr"))


KINDS = {
    "documents": Kind(documents, 1280),
    "long": Kind(long_documents, 4096),
    "code": Kind(code, 1024),
    "translation": Kind(translation, 512),
}


def parse_counts(counts: Sequence[str]) -> dict[str, int]:
    """Of "documents=200" and the like, the number of prompts of each kind. Raises ValueError for anything else."""
    parsed = {}
    for each in counts:
        name, _, number = each.partition("=")
        if name not in KINDS or not number.isdecimal():
            raise ValueError(f"kind={each!r} must be one of {', '.join(KINDS)}, = and a number, as in documents=200")
        parsed[name] = int(number)
    return parsed
