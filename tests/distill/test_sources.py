"""Prompts of further kinds: reproducible, of the promised sizes, and stated with their licences."""

from __future__ import annotations

import pytest

from specdec.distill import corpus, sources
from specdec.distill.prompts import Dialogue

GETTEXT = r"""
msgid ""
msgstr "Language: de\n"

msgid "Please enter a valid email address."
msgstr "Bitte eine gültige Adresse eingeben."

msgid "German"
msgstr "Deutsch"

msgid ""
"Ensure this value is "
"less than or equal."
msgstr ""
"Dieser Wert muss "
"kleiner oder gleich sein."

msgid "This has one %d form here."
msgid_plural "These have %d forms here."
msgstr[0] "Eine Form."
msgstr[1] "Formen."

msgid "This one has no translation yet."
msgstr ""
"""


@pytest.mark.parametrize(
    ("kind", "least", "longest"), [("documents", 100, 3800), ("long", 50, 14200), ("code", 200, 9000)]
)
def test_kinds_are_reproducible_and_differ_by_seed(kind: str, least: int, longest: int) -> None:
    make = sources.KINDS[kind].make
    prompts = list(make(0))
    assert prompts == list(make(0))
    assert prompts != list(make(1))
    assert len(prompts) >= least
    assert max(len(each.prompt) for each in prompts) <= longest
    assert len(set(prompts)) > 0.9 * len(prompts)


def test_long_documents_are_long() -> None:
    assert min(len(each.prompt) for each in sources.long_documents(0)) > 3000


def test_sentences_of_a_gettext_file_are_paired() -> None:
    assert list(sources.sentence_pairs(GETTEXT.splitlines())) == [
        ("Please enter a valid email address.", "Bitte eine gültige Adresse eingeben."),
        ("Ensure this value is less than or equal.", "Dieser Wert muss kleiner oder gleich sein."),
    ]


def test_a_corpus_has_the_requested_kinds(default_vocabulary) -> None:
    dialogues = [Dialogue(f"What is {n} plus {n}?") for n in range(6)]
    options = {"num_prompts": 4, "kinds": {"documents": 5, "long": 2, "code": 3}}
    texts, _ = corpus.plan_texts(dialogues, default_vocabulary.tokenizer, **options)
    assert len(texts) == 14
    assert all(text.is_missing for text in texts)
    assert sum(len(text.prompt) > 750 for text in texts) >= 2
    assert sum("```python" in default_vocabulary.tokenizer.decode(text.prompt) for text in texts) == 3
    with pytest.raises(ValueError, match=r"kind=long=9999 must be at most long=\d+, the usable prompts"):
        corpus.plan_texts(dialogues, default_vocabulary.tokenizer, num_prompts=1, kinds={"long": 9999})


def test_counts_of_kinds_are_parsed() -> None:
    assert sources.parse_counts(["documents=20", "code=0"]) == {"documents": 20, "code": 0}
    for wrong in ("documents", "films=3", "code=-1", "code=x"):
        with pytest.raises(ValueError, match=r"must be one of documents, long, code, translation, = and a number"):
            sources.parse_counts([wrong])


def test_every_kind_states_its_licence() -> None:
    assert sources.LICENCES.keys() == sources.KINDS.keys()
