"""The corpus: the same every time, also after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specdec import Engine, SamplingParams
from specdec.conformance.toys import grid_pair
from specdec.distill import corpus
from specdec.distill.corpus import Text
from specdec.distill.prompts import Dialogue, EvaluationText

DIALOGUES = [Dialogue(f"What is {n} plus {n}? Think of it step by step, then say it.", f"{2 * n}") for n in range(40)]


def test_a_corpus_cycles_through_temperatures_and_excludes_evaluation_text(default_vocabulary, tmp_path) -> None:
    tokenizer = default_vocabulary.tokenizer
    forbidden = tmp_path / "e.jsonl"
    forbidden.write_text(json.dumps({"q": DIALOGUES[7].prompt}) + "\n")
    odd = [Dialogue("Привет, как дела?"), Dialogue("long " * 300), *DIALOGUES]
    options = {"num_prompts": 30, "num_replies": 9, "excluded": EvaluationText([forbidden])}
    texts, left_out = corpus.plan_texts(odd, tokenizer, **options)
    assert (texts, left_out) == corpus.plan_texts(odd, tokenizer, **options)
    assert left_out == {"overlapping": 1, "not_ascii": 1, "too_long": 1}
    assert sorted(str(text.temperature) for text in texts) == ["0.0"] * 10 + ["0.7"] * 10 + ["1.0"] * 10 + ["None"] * 9
    assert all(text.is_missing == (text.temperature is not None) for text in texts)
    assert len({text.prompt for text in texts}) == 39
    assert tokenizer.decode(texts[0].prompt).endswith("<|im_start|>assistant\n")
    with pytest.raises(ValueError, match=r"num_prompts=40, .* must add up to at most the 39 usable dialogues"):
        corpus.plan_texts(odd, tokenizer, num_prompts=40, excluded=options["excluded"])


def test_questions_about_texts_come_last(default_vocabulary) -> None:
    """They are made of replies, long ones, and the target is to answer them."""
    long = [Dialogue(f"What is topic {n}?", f"Topic {n} is this. " * 100) for n in range(12)]
    texts, _ = corpus.plan_texts(long, default_vocabulary.tokenizer, num_prompts=4, num_replies=2, num_about_texts=5)
    assert [text.is_missing for text in texts].count(True) == 9
    about = [default_vocabulary.tokenizer.decode(text.prompt) for text in texts if len(text.prompt) > 256]
    assert len(about) >= 3
    assert all("This" in prompt or "Topic" in prompt for prompt in about)
    assert (
        texts
        == corpus.plan_texts(long, default_vocabulary.tokenizer, num_prompts=4, num_replies=2, num_about_texts=5)[0]
    )


@pytest.fixture
def engine() -> Engine:
    return Engine(grid_pair(0)[0], max_batch_size=4)


@pytest.fixture
def planned() -> list[Text]:
    texts = [Text((index % 3, 1), (), (0.0, 1.0)[index % 2], index) for index in range(10)]
    return [*texts, Text((0, 1), (2, 2), None, 3)]


def test_a_killed_run_resumes_where_it_stopped(engine, planned, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "GROUP", 4)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    corpus.write_texts(planned, corpus.EngineAnswers(engine), whole, max_tokens=5)
    lines = whole.read_text().splitlines(keepends=True)
    assert len(lines) == 11
    killed.write_text("".join(lines[:6]) + lines[6][:10])
    corpus.write_texts(planned, corpus.EngineAnswers(engine), killed, max_tokens=5)
    assert killed.read_text() == whole.read_text()
    texts = list(corpus.read_texts(whole))
    assert texts[-1] == planned[-1]
    expected = engine.generate([planned[3].prompt], SamplingParams(temperature=1, max_tokens=5, seed=3))
    assert texts[3].output == expected[0].token_ids


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"prompt": [1]}', '{"prompt": 1, "output": [], "temperature": 0, "seed": 0}']
)
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"prompt": [1], "output": [2], "temperature": 0, "seed": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"texts\.jsonl:2: .*must be"):
        list(corpus.read_texts(path))
