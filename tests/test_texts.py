"""Incremental text: nothing is taken back, and a continuation yields only what it adds."""

from __future__ import annotations

import pytest
import torch
from helpers import tokens as tokenizers
from helpers.toys import MarkovModel
from hypothesis import given
from hypothesis import strategies as st

from specdec import Engine, SamplingParams
from specdec.texts import GrowingText, continuation, text_after

KINDS = {name: getattr(tokenizers, name)() for name in ("cleaning", "wordpiece", "sentencepiece")}
SMALL = KINDS | {"sentencepiece": tokenizers.sentencepiece("ab", (0xC3, 0xA9))}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_make_up_the_text_even_if_the_decoder_rewrites_it(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    cut = data.draw(st.integers(0, len(ids)))
    text, pieces = GrowingText(tokenizer, ids[:cut]), []
    for token in ids[cut:]:
        pieces.append(text.append(token))
        assert text.text == "".join(pieces)
    pieces.append(text.finish())
    assert "".join(pieces) == text.text == text_after(tokenizer, ids[:cut], ids[cut:])


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_standalone_text_equals_the_tokenizers_decoding(text: str) -> None:
    tokenizer = KINDS["sentencepiece"]
    ids = tokenizer(text).input_ids
    assert text_after(tokenizer, (), ids) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("head", "body"), [("def f():\n", "    return 1\n"), ("a", " b"), ("x = é", "é  y")])
def test_a_continuation_keeps_its_first_space(head: str, body: str) -> None:
    tokenizer = KINDS["sentencepiece"]
    before, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in (head, head + body))
    assert text_after(tokenizer, before, whole[len(before) :]) == body
    assert continuation(tokenizer, whole[len(before) :]) == body


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["autoregressive", "ngram"])
def test_streamed_text_is_the_completion_s(kind: str, method: str) -> None:
    tokenizer = SMALL[kind]
    size = len(tokenizer)
    target = MarkovModel(torch.ones(size, size, size) / size)
    target.tokenizer = tokenizer
    engine = Engine(target, method=method)
    for seed in range(12):
        params = SamplingParams(max_tokens=12, seed=seed)
        chunks = list(engine.stream([[3, 4]], params))
        completion = chunks[-1].completion
        assert completion is not None
        assert "".join(chunk.text for chunk in chunks) == completion.text == engine.generate([[3, 4]], params)[0].text
