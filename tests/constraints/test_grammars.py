"""Grammars compiled by llguidance: allowed tokens, errors, and constrained speculation with the real model."""

from __future__ import annotations

import importlib.util
import json
import random
import re

import pytest
import torch

from specdec import Completion, Engine, SamplingParams
from specdec.conformance.toys import grid_pair
from specdec.constraints.llguidance import GrammarCompiler
from specdec.constraints.progress import Progress
from specdec.models.loading import Vocabulary, read_vocabulary

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["old", "new"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
PLATE = r"[A-Z]{2}-[0-9]{3}(-[a-z]{1,3})?"
SUM = 'start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,2}/'
EOS = frozenset([2])


def is_person(text: str) -> bool:
    """Whether a text is JSON that conforms to PERSON."""
    person = json.loads(text)
    tags = person.pop("tags", [])
    return (
        person.keys() == {"name", "age"}
        and isinstance(person["name"], str)
        and len(person["name"]) <= 8
        and type(person["age"]) is int
        and 0 <= person["age"] <= 120
        and len(tags) <= 2
        and set(tags) <= {"old", "new"}
    )


FITS = {
    "json_schema": (PERSON, is_person),
    "regex": (PLATE, re.compile(PLATE).fullmatch),
    "grammar": (SUM, re.compile(r"[0-9]{1,2}(\+[0-9]{1,2})*").fullmatch),
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return read_vocabulary("smollm2-135m")


@pytest.fixture(scope="module")
def compiler(vocabulary: Vocabulary) -> GrammarCompiler:
    return GrammarCompiler(vocabulary.tokenizer, vocabulary.vocab_size)


# -- what is allowed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FITS)
def test_any_sequence_of_allowed_tokens_gives_a_valid_text(
    field: str, compiler: GrammarCompiler, vocabulary: Vocabulary
) -> None:
    """Any tokens, not just likely ones. Rejected drafts change nothing, and the end is allowed when it is complete."""
    value, fits = FITS[field]
    grammar = compiler.compile(SamplingParams(**{field: value}), EOS)
    choice, num_complete = random.Random(0), 0
    for _ in range(8):
        progress, output = Progress(grammar), []
        for _ in range(40):
            mask = progress.allowed_after()
            assert mask.tolist() == Progress(grammar, output).allowed_after().tolist()
            text = vocabulary.tokenizer.decode(output)
            if mask[2]:
                assert fits(text)
                num_complete += 1
            allowed = [token for token in mask.nonzero().squeeze(1).tolist() if token != 2]
            if not allowed:
                break
            progress.num_allowed(choice.choices(allowed, k=3))  # a draft, to be rejected
            output.append(choice.choice(allowed))
            progress.emit(output[-1:])
    assert num_complete >= 4


def test_the_end_is_allowed_only_where_the_text_is_complete(compiler: GrammarCompiler, vocabulary: Vocabulary) -> None:
    """For any stop token: also one whose text the grammar could use, and one that is not the model's own."""
    one, two = vocabulary.tokenizer("12").input_ids
    params = SamplingParams(regex="[0-9]{3}")
    own, other = (compiler.compile(params, stop) for stop in (EOS, frozenset([two])))
    for output, expected in (([], False), ([one] * 2, False), ([one] * 3, True)):
        assert Progress(own, output).allowed_after()[2] == expected
        mask = Progress(other, output).allowed_after()
        assert mask[two] == expected
        assert not mask[2]
    assert Progress(own, [one] * 3).allowed_after().nonzero().tolist() == [[2]]  # nothing but the end


def test_tokens_that_the_tokenizer_lacks_are_never_allowed(vocabulary: Vocabulary) -> None:
    padded = GrammarCompiler(vocabulary.tokenizer, vocabulary.vocab_size + 7)
    mask = Progress(padded.compile(SamplingParams(regex="(?s:.*)"), EOS)).allowed_after()
    assert len(mask) == vocabulary.vocab_size + 7
    assert not mask[-7:].any()
    assert mask.sum() > 40_000


@pytest.mark.parametrize("lacking", [1, 300])
def test_tokens_that_the_model_lacks_are_never_allowed(lacking: int, vocabulary: Vocabulary) -> None:
    """Some models have fewer rows than their tokenizer has tokens: Gemma 3 1B, 262,144 and 262,145."""
    params, size = SamplingParams(regex="(?s:.*)"), vocabulary.vocab_size - lacking
    sizes = (size, vocabulary.vocab_size)
    smaller, whole = (GrammarCompiler(vocabulary.tokenizer, each).compile(params, EOS) for each in sizes)
    assert torch.equal(Progress(smaller).allowed_after(), Progress(whole).allowed_after()[:size])


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"regex": "(a"}, r"regex='\(a' must compile with llguidance; correct it: .*unclosed group"),
        ({"grammar": "start: foo"}, "grammar='start: foo' must compile with llguidance.*unknown name"),
        ({"grammar": "root ::= foo"}, "grammar='root ::= foo' must compile with llguidance.*'foo' not found"),
        ({"json_schema": {"type": "foo"}}, r"""json_schema='{"type": "foo"}' must compile .*Invalid type: foo"""),
        ({"json_schema": "{bad"}, "json_schema='{bad' must compile with llguidance"),
        ({"json_schema": {"type": {1}}}, r"json_schema=\{'type': \{1\}\} must be JSON \(.*\); correct it"),
        ({"json_schema": {"minimum": 5, "maximum": 3, "type": "integer"}}, "minimum .5. is greater than maximum .3."),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "Unimplemented keys"),  # not ignored
        (
            {"json_schema": {"enum": ["x" * 90]}, "max_tokens": 1},
            r"including the stop token, for json_schema='.{50,60}\.\.\.'; raise it",
        ),
        ({"regex": r"[^\s\S]"}, "must match at least one text, but matches none; correct it"),
        ({"regex": "[0-9]{30}", "max_tokens": 3}, "max_tokens=3 must be at least 4, including the stop token, for"),
        ({"regex": "the cat sat", "max_tokens": 3}, "max_tokens=3 must be at least 4, including the stop token"),
        ({"grammar": 'start: "a" start', "max_tokens": 9}, "which cannot end within 509 tokens; raise"),
    ],
)
def test_unsatisfiable_constraints_are_rejected(params: dict, message: str, compiler: GrammarCompiler) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        compiler.compile(SamplingParams(**params), EOS)


def test_the_minimum_number_of_tokens_is_enough(compiler: GrammarCompiler, vocabulary: Vocabulary) -> None:
    text = vocabulary.tokenizer("the cat sat").input_ids
    grammar = compiler.compile(SamplingParams(regex="the cat sat", max_tokens=len(text) + 1), EOS)
    assert Progress(grammar).num_allowed([*text, 2]) == len(text) + 1
    assert compiler.compile(SamplingParams(regex="the cat sat", max_tokens=len(text) + 1), EOS) is grammar  # kept


def test_a_constraint_without_a_stop_token_is_rejected(compiler: GrammarCompiler) -> None:
    with pytest.raises(ValueError, match="must have a stop token; set stop_token_ids, or ignore_eos=False"):
        compiler.compile(SamplingParams(regex="a", ignore_eos=True), frozenset())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"regex": "a", "json_schema": {}}, "json_schema and regex must not be given together; choose one"),
        ({"regex": 3}, "regex=3 must be a string or None"),
        ({"grammar": b"x"}, "grammar=b'x' must be a string or None"),
        ({"json_schema": [1]}, r"json_schema=\[1\] must be a mapping, a JSON string or None"),
    ],
)
def test_invalid_parameters_are_rejected(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)


def test_missing_requirements_are_named(monkeypatch: pytest.MonkeyPatch, vocabulary: Vocabulary) -> None:
    target, draft = grid_pair(4)
    with pytest.raises(ValueError, match="regex needs a model with a tokenizer; load one with it"):
        Engine(target).generate([[0]], SamplingParams(regex="a"))
    with pytest.raises(ValueError, match="must be supported by llguidance: Only fast tokenizers are supported"):
        GrammarCompiler(object(), 3)
    target.tokenizer = draft.tokenizer = vocabulary.tokenizer
    synthetic = Engine(target, method="draft_model", draft=draft, synthetic_acceptance_rates=[0.5])
    with pytest.raises(ValueError, match="regex must be omitted with synthetic_acceptance_rates"):
        synthetic.generate([[0]], SamplingParams(regex="a"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need the package llguidance; pip install llguidance"):
        GrammarCompiler(vocabulary.tokenizer, vocabulary.vocab_size)


# -- the real model, in float32 --------------------------------------------------------------------------------

QUESTIONS = ["Describe Ada, who is 36, as JSON: ", "Ada is 36. Ada is 36. A licence plate: AB-123. Another one: "]
METHODS = ["ngram", "suffix", "eagle", "draft_model", "hybrid", "tree"]
REQUESTS = [
    (QUESTIONS[0], SamplingParams(temperature=0, json_schema=PERSON, max_tokens=30)),
    (QUESTIONS[0], SamplingParams(temperature=1, json_schema=PERSON, max_tokens=30)),
    (QUESTIONS[1], SamplingParams(temperature=0.7, regex=PLATE, max_tokens=15)),
    (QUESTIONS[1], SamplingParams(temperature=0, max_tokens=15)),  # no constraint
]


def generate(default_pair: tuple, method: str, verification: str, requests: list) -> list[Completion]:
    target, drafts = default_pair
    shape = {"tree": [(0,), (1,), (0, 0)]} if method == "tree" else {"num_speculative_tokens": 3}
    options = {"max_batch_size": 3, "verification": verification, **shape}
    engine = Engine(target, method=method, draft=drafts.get(method), **options)
    return engine.generate(*map(list, zip(*requests, strict=True)))


@pytest.fixture(scope="module")
def plainly(default_pair: tuple) -> list[Completion]:
    return generate(default_pair, "autoregressive", "coupled", REQUESTS)


@pytest.mark.parametrize("method", METHODS)
def test_constrained_output_is_the_same_with_any_draft(method: str, default_pair: tuple, plainly: list) -> None:
    """Greedy, and with coupled noise above temperature 0; in a batch with an unconstrained row."""
    outputs = generate(default_pair, method, "coupled", REQUESTS)
    assert [c.token_ids for c in outputs] == [c.token_ids for c in plainly]
    assert sum(c.counts.num_accepted for c in outputs) > 0
    greedy = generate(default_pair, method, "token", REQUESTS[:1])
    assert [c.token_ids for c in greedy] == [plainly[0].token_ids]


def test_constrained_samples_are_valid(default_pair: tuple) -> None:
    """With token verification at temperature 1; all end with their stop token."""
    requests = [
        (QUESTIONS[i % 2], SamplingParams(seed=i, max_tokens=40, **{field: FITS[field][0]}))
        for i, field in enumerate(["json_schema", "regex"] * 3)
    ]
    for completion, (_, params) in zip(generate(default_pair, "eagle", "token", requests), requests, strict=True):
        assert completion.finish_reason == "stop"
        assert FITS[params.constraint][1](completion.text)


def test_truncation_by_max_tokens_is_reported(default_pair: tuple) -> None:
    params = SamplingParams(temperature=0, regex="[0-9]{30}", max_tokens=6)
    (completion,) = generate(default_pair, "ngram", "token", [(QUESTIONS[1], params)])
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 6)
    assert re.fullmatch("[0-9]{6}", completion.text)
