"""Stop strings, min_tokens and bad_words on text, under speculation as without."""

from __future__ import annotations

import pytest
import torch
from helpers import tokens as tokenizers
from helpers.toys import MarkovModel

from specdec import Engine, SamplingParams
from specdec.constraints.bans import Without
from specdec.models.vocabularies import pieces_of
from specdec.texts import text_after

TOKENIZER = tokenizers.sentencepiece("abc", (0xC3, 0xA9))
SIZE = len(TOKENIZER)
LETTERS = {letter: TOKENIZER.convert_tokens_to_ids(letter) for letter in "abc"}
A, B, C = LETTERS.values()
EOS = TOKENIZER.eos_token_id


class EndingModel(MarkovModel):
    """A table with a stop token."""

    eos_token_ids = frozenset({EOS})


def model(seed: int) -> MarkovModel:
    """Emits a, b, c and two bytes that make up one character, depending on the context."""
    said = [A, B, C, *TOKENIZER.convert_tokens_to_ids(["<0xC3>", "<0xA9>"]), EOS]
    rows = torch.zeros(1, SIZE, SIZE)
    weights = torch.rand(SIZE, len(said), generator=torch.Generator().manual_seed(seed)) + 0.05
    weights[:, -1] = 0.05
    rows[0, :, said] = weights / weights.sum(-1, keepdim=True)
    target = EndingModel(rows.expand(SIZE, SIZE, SIZE))
    target.tokenizer = TOKENIZER
    return target


TARGET, DRAFT = model(0), model(1)
PLAIN = Engine(TARGET)
ENGINES = {
    "plain": PLAIN,
    "draft": Engine(TARGET, method="draft_model", draft=DRAFT, num_speculative_tokens=5),
    "self": Engine(TARGET, method="draft_model", draft=TARGET, num_speculative_tokens=5, max_batch_size=2),
    "ngram": Engine(TARGET, method="ngram", num_speculative_tokens=3),
    "tree": Engine(TARGET, method="tree", draft=DRAFT, tree=[(0,), (1,), (0, 0), (0, 0, 0)]),
}
PROMPT = [A, B, C, A]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    ("stop", "kept"), [(("ab",), False), (("cc", "aé"), True), ("é", False), (("cab", "abc", "bca"), True)]
)
def test_a_stop_string_ends_the_output_with_the_token_that_completes_it(name: str, stop, kept: bool) -> None:
    """Also within an accepted run and at the token limit: the same tokens as without it, and no more of them."""
    engine, found = ENGINES[name], 0
    for seed in range(12):
        free = SamplingParams(seed=seed, max_tokens=24)
        whole = engine.generate([PROMPT], free)[0]
        params = SamplingParams(seed=seed, max_tokens=24, stop=stop, include_stop_str_in_output=kept)
        completion = engine.generate([PROMPT], params)[0]
        ends = [whole.text.find(each) + len(each) for each in params.stop if each in whole.text]
        if not ends:
            assert (completion.token_ids, completion.text) == (whole.token_ids, whole.text)
            continue
        found += 1
        each = completion.stop_reason
        assert completion.finish_reason == "stop"
        assert each in params.stop
        assert completion.text == whole.text[: min(ends) - (0 if kept else len(each))]
        assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
        before = text_after(TOKENIZER, PROMPT, completion.token_ids[:-1])
        assert not any(each in before for each in params.stop)
        chunks = list(engine.stream([PROMPT], params))
        assert "".join(chunk.text for chunk in chunks) == completion.text
        at_the_limit = SamplingParams(seed=seed, max_tokens=len(completion.token_ids), stop=stop)
        assert PLAIN.generate([PROMPT], at_the_limit)[0].finish_reason == "stop" or engine is not PLAIN
    assert found


def test_streams_hold_back_a_possible_start_of_a_stop_string() -> None:
    """So that nothing which is cut was ever given."""
    held = 0
    for seed in range(20):
        params = SamplingParams(seed=seed, max_tokens=16, stop=("abab",))
        given = ""
        for chunk in ENGINES["draft"].stream([PROMPT], params):
            given += chunk.text
            held += chunk.text == "" and chunk.token_ids[-1] in (A, B)
        assert given == chunk.completion.text
        assert "abab" not in given
    assert held


@pytest.mark.parametrize("name", ENGINES)
def test_min_tokens_forbid_an_end_and_pass_over_stop_strings(name: str) -> None:
    lengths = set()
    for seed in range(12):
        params = SamplingParams(seed=seed, min_tokens=6, max_tokens=20, stop="a")
        completion = ENGINES[name].generate([PROMPT], params)[0]
        assert EOS not in completion.token_ids[:6]
        assert len(completion.token_ids) >= 6
        lengths.add(len(completion.token_ids))
    assert len(lengths) > 2


@pytest.mark.parametrize("name", ENGINES)
def test_bad_words_do_not_occur_however_tokens_spell_them(name: str) -> None:
    words = ("abc", "cé", "bb")
    for seed in range(12):
        text = ENGINES[name].generate([PROMPT], SamplingParams(seed=seed, max_tokens=24, bad_words=words))[0].text
        assert not any(word in text for word in words)
    free = [PLAIN.generate([PROMPT], SamplingParams(seed=seed, max_tokens=24))[0].text for seed in range(12)]
    assert any(word in text for text in free for word in words)


def test_coupled_seeds_give_the_same_with_any_draft() -> None:
    params = [SamplingParams(seed=seed, max_tokens=20, min_tokens=5, bad_words="ab", stop="cc") for seed in range(20)]
    plain = Engine(TARGET, verification="coupled").generate([PROMPT] * 20, params)
    drafted = Engine(TARGET, method="draft_model", draft=DRAFT, verification="coupled", max_batch_size=3)
    assert [(each.token_ids, each.text) for each in drafted.generate([PROMPT] * 20, params)] == [
        (each.token_ids, each.text) for each in plain
    ]


def test_bad_words_forbid_exactly_the_tokens_that_would_complete_one(default_vocabulary) -> None:
    """On a real vocabulary: every token after every beginning, against the text itself."""
    pieces = pieces_of(default_vocabulary.tokenizer, default_vocabulary.vocab_size)
    without = Without((" the", "é", "return x"), pieces, frozenset(), default_vocabulary.vocab_size)
    for text in ("", "in", "in th", " t", "retur", "return ", "\xc3", "caf"):
        raw = b"\xc3" if text == "\xc3" else text.encode()
        state, expected = raw[-7:], torch.ones(default_vocabulary.vocab_size, dtype=torch.bool)
        for token, piece in pieces.items():
            if isinstance(piece, bytes):
                expected[token] = not any(word.encode() in raw + piece for word in without.words)
        assert torch.equal(without.allowed(state), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "a"}, "stop needs a model with a tokenizer"),
        ({"bad_words": ["a"]}, "bad_words needs a model with a tokenizer"),
    ],
)
def test_textual_parameters_need_a_tokenizer(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(MarkovModel(torch.ones(2, 2, 2) / 2)).generate([[0]], SamplingParams(**options))
