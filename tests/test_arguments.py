"""What is given to an engine: forms of prompts, types of parameters, names, and calls at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny

from specdec import CausalLM, Engine, EngineBusyError, SamplingParams
from specdec.conformance.toys import grid_pair

TARGET, DRAFT = grid_pair(4)
GREEDY = SamplingParams(temperature=0, max_tokens=3)


# -- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts",
    [
        [1, 2, 0],
        (1, 2, 0),
        [[1, 2, 0]],
        np.array([1, 2, 0]),
        np.array([[1, 2, 0]]),
        [np.int64(1), np.int32(2), 0],
        [torch.tensor([1, 2, 0])],
        torch.tensor([1, 2, 0]),
        (token for token in (1, 2, 0)),
    ],
)
def test_token_ids_in_any_container_are_one_prompt(prompts) -> None:
    (completion,) = Engine(TARGET).generate(prompts, GREEDY)
    assert completion.prompt_token_ids == (1, 2, 0)
    assert all(type(token) is int for token in completion.prompt_token_ids)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([1.5, 2], r"prompt 0 has 1\.5 \(float\) among its token ids, which must be integers"),
        ([[1, 2.0]], r"prompt 0 has 2\.0 \(float\) among its token ids"),
        ([[1, "2"]], r"prompt 0 has '2' \(str\) among its token ids"),
        ([[1, None]], r"prompt 0 has None \(NoneType\) among its token ids"),
        ([[True]], r"prompt 0 has True \(bool\) among its token ids"),
        ([[[1, 2]]], r"prompt 0 has \[1, 2\] \(list\) among its token ids"),
        ([0, [1]], r"prompt 0 is 0 \(int\) and must be a string, a list of token ids, or a list of messages"),
        (7, r"prompts=7 \(int\) must be a string, a list of token ids"),
        (b"hello", r"prompts=b'hello' \(bytes\) must be a string"),
        ({"input_ids": [1]}, r"prompts=\{'input_ids': \[1\]\} \(dict\) must be a string"),
        ({1, 2}, r"prompts=\{1, 2\} \(set\) must be a string"),
        ([b"hello"], r"prompt 0 is b'hello' \(bytes\) and must be a string"),
        (None, r"prompts=None \(NoneType\) must be a string"),
        (bytearray(b"hello"), r"prompts=bytearray\(b'hello'\) \(bytearray\) must be a string"),
        (memoryview(b"hello"), r"prompts=<memory .* \(memoryview\) must be a string"),
        ([{"content": "Hi"}], r"message=.* must have the form \{\"role\": \"user\", \"content\": \"Hi\"\}"),
        ([{"role": "user", "content": "Hi"}], "messages need a model whose tokenizer has a chat template"),
    ],
)
def test_invalid_prompts_have_a_helpful_message(prompts, message: str) -> None:
    for call in (Engine(TARGET).generate, Engine(TARGET).stream, Engine(TARGET).as_completed):
        with pytest.raises(ValueError, match=message):
            call(prompts, GREEDY)


def test_a_text_is_one_prompt_and_messages_go_through_the_template(default_model) -> None:
    engine = Engine(default_model, method="ngram")
    text, messages = "The capital of France is", [{"role": "user", "content": "What is the capital of France?"}]
    (alone,), (listed,) = engine.generate(text, GREEDY), engine.generate([text], GREEDY)
    assert alone.token_ids == listed.token_ids
    rendered = default_model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answers = [engine.chat(messages, GREEDY), engine.generate(messages, GREEDY), engine.generate([messages], GREEDY)]
    for (answer,) in answers:
        assert answer.prompt_token_ids == tuple(rendered)
    both = engine.chat([messages, messages], GREEDY)
    assert [each.token_ids for each in both] == [answers[0][0].token_ids] * 2
    with pytest.raises(ValueError, match=r"messages='Hi' must be a list such as \[\{"):
        engine.chat("Hi")
    assert engine.tokenizer is default_model.tokenizer


# -- sampling parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": "0.5"}, r"temperature='0\.5' must be finite and >= 0"),
        ({"temperature": True}, "temperature=True must be finite"),
        ({"temperature": None}, "temperature=None must be finite"),
        ({"top_p": "x"}, "top_p='x' must be in"),
        ({"top_p": float("nan")}, "top_p=nan must be in"),
        ({"min_p": [0.1]}, r"min_p=\[0\.1\] must be in"),
        ({"top_k": 2.0}, r"top_k=2\.0 must be an integer"),
        ({"top_k": True}, "top_k=True must be an integer"),
        ({"max_tokens": "8"}, "max_tokens='8' must be an integer >= 1"),
        ({"max_tokens": 2.5}, r"max_tokens=2\.5 must be an integer >= 1"),
        ({"seed": None}, "seed=None must be an integer"),
        ({"n": 1.0}, r"n=1\.0 must be an integer"),
        ({"stop_token_ids": 3}, r"stop_token_ids=3 must be a list or tuple of token ids >= 0, such as \(2,\)"),
        ({"stop_token_ids": "ab"}, "stop_token_ids='ab' must be a list or tuple"),
        ({"stop_token_ids": [1.0]}, r"stop_token_ids=\[1\.0\] must be a list"),
        ({"stop": 3}, "stop=3 must be a non-empty string or a list of them"),
        ({"stop": [""]}, r"stop=\[''\] must be a non-empty string or a list of them"),
        ({"bad_words": [3]}, r"bad_words=\[3\] must be a non-empty string or a list of them"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 must be an integer from 0 to max_tokens=8"),
        ({"logit_bias": [1]}, r"logit_bias=\[1\] must be a mapping"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias=.* must be a mapping of token ids"),
        ({"logit_bias": {1: "2"}}, "logit_bias=.* must be a mapping of token ids"),
        ({"ignore_eos": 1}, "ignore_eos=1 must be True or False"),
        ({"logprobs": 5}, "logprobs=5 must be True or False"),
        ({"repetition_penalty": "1"}, "repetition_penalty='1' must be finite and > 0"),
        ({"presence_penalty": []}, r"presence_penalty=\[\] must be finite"),
        ({"temperature": 10**400}, "temperature=10+\\.\\.\\. must be finite"),
        ({"frequency_penalty": -(10**400)}, "frequency_penalty=-10+\\.\\.\\. must be finite"),
        ({"logit_bias": {1: 10**400}}, "logit_bias=.* must be a mapping of token ids >= 0 to floats"),
        ({"stop": ["a\ud800"]}, r"stop='a\\ud800' must not contain an unpaired surrogate"),
        ({"bad_words": "\udfff"}, r"bad_words='\\udfff' must not contain an unpaired surrogate"),
        ({"regex": "\ud800+"}, r"regex='\\ud800\+' must not contain an unpaired surrogate"),
    ],
)
def test_parameters_of_another_type_get_a_sentence(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        stop_token_ids=[np.int64(1)],
        logit_bias={np.int64(1): np.float64(2)},
    )
    assert params == SamplingParams(temperature=0.5, top_k=3, stop_token_ids=(1,), logit_bias={1: 2.0})
    assert type(params.top_k) is int


@pytest.mark.parametrize("sampling", [{"temperature": 0}, "greedy", [GREEDY, {"n": 1}], 3])
def test_invalid_sampling_parameters_have_a_helpful_message(sampling) -> None:
    with pytest.raises(ValueError, match=r"sampling=.* must be a SamplingParams, or a list of them"):
        Engine(TARGET).generate([[0], [1]], sampling)


@pytest.mark.parametrize("name", ["arrivals_s", "after"])
@pytest.mark.parametrize("value", [5, "ab", ["a", "b"], [0.5j, None], [{}, {}]])
def test_times_and_indices_of_another_type_get_a_sentence(name: str, value) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.* must be .*, one for each of the 2 prompts"):
        Engine(TARGET).as_completed([[0], [1]], GREEDY, **{name: value})


def test_a_text_with_half_a_character_is_refused(default_model) -> None:
    with pytest.raises(ValueError, match=r"prompt='a\\ud800' must not contain an unpaired surrogate"):
        Engine(default_model).generate("a\ud800", GREEDY)


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ngrams"}, "method='ngrams' must be one of .*; did you mean 'ngram'"),
        ({"method": "egale"}, "did you mean 'eagle'"),
        ({"verification": "blok"}, "verification='blok' must be one of token, block, coupled; did you mean 'block'"),
        ({"max_batch_size": "2"}, "max_batch_size='2' must be an integer of at least 1"),
        ({"max_batch_size": 1.0}, r"max_batch_size=1\.0 must be an integer of at least 1"),
        ({"method": "ngram", "num_speculative_tokens": 2.5}, r"num_speculative_tokens=2\.5 must be at least 1"),
        ({"method": "ngram", "num_speculative_tokens": True}, "num_speculative_tokens=True must be at least 1"),
        ({"method": "ngram", "num_speculative_tokens": "four"}, "num_speculative_tokens='four' must be at least 1"),
        ({"method": "suffix", "max_history_bytes": 1.5}, r"max_history_bytes=1\.5 must be an integer of at least 0"),
        ({"method": "early_exit", "exit_layer": "1"}, "exit_layer='1' must be an integer of at least 1"),
        ({"method": 3}, "method=3 must be a name, such as 'ngram'"),
        ({"verification": None}, "verification=None must be a name, such as 'token'"),
        ({"records": "yes"}, "records='yes' must be True, False or None"),
        ({"synthetic_acceptance_rates": 0.5}, r"synthetic_acceptance_rates=0\.5 must be a list of probabilities"),
        ({"synthetic_acceptance_rates": ["a"]}, r"synthetic_acceptance_rates=\['a'\] must be a list of probabilities"),
        ({"synthetic_acceptance_rates": [1.5]}, r"synthetic_acceptance_rates=\[1\.5\] must be probabilities"),
        ({"method": "tree", "tree": 5}, r"tree=5 must be a Tree, rank paths such as"),
        ({"method": "tree", "tree": [0, 1]}, r"tree=\[0, 1\] must be a Tree, rank paths such as"),
        ({"method": "ngram", "forced_acceptance": 3}, "forced_acceptance=3 must be 'all', 'none', 'alternating'"),
    ],
)
def test_bad_options_are_named_before_a_model_is_loaded(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(TARGET, **options)
    with pytest.raises(ValueError, match=message):
        Engine.load("no/such-model", **options)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"max_batchsize": 2},
            "max_batchsize= must be an argument .*; did you mean 'max_batch_size'",
        ),
        ({"devcie": "cpu"}, r"devcie= must be an argument of .*; did you mean 'device'\?"),
        ({"gamma": 2}, "gamma= must be an argument of Engine.load or of Engine"),
        ({"tokenizer": 2}, "tokenizer= must be an argument"),
    ],
)
def test_unknown_options_are_named_before_a_model_is_loaded(option: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Engine.load("no/such-model", **option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": 5}, "device=5 must be a name; use cpu, cuda or cuda:0"),
        ({"placement": 5}, 'placement=5 must be a string, such as "same"'),
        ({"allow_pickle": "yes"}, "allow_pickle='yes' must be True or False"),
    ],
)
def test_options_of_loading_of_another_type_get_a_sentence(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine.load("no/such-model", **option)


@pytest.mark.parametrize("tokenizer", ["gpt2", 5, b"gpt2", Path("gpt2")])
def test_a_name_is_no_tokenizer(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"tokenizer=.* must be a loaded tokenizer, such as AutoTokenizer"):
        Engine(tiny.make("llama", tiny.GQA), tokenizer=tokenizer)


def test_names_and_models_are_distinguished() -> None:
    rule = r"must be a loaded model; to load one by name use Engine.load\("
    for target in ("smollm2-135m", None, Path("folder")):
        with pytest.raises(ValueError, match=rf"target=.* {rule}"):
            Engine(target)
    with pytest.raises(ValueError, match=f"draft='smollm2-135m-draft' {rule}"):
        Engine(TARGET, method="draft_model", draft="smollm2-135m-draft")
    for draft in (5, b"smollm2-135m-draft"):
        with pytest.raises(ValueError, match=f"draft={draft!r} {rule}"):
            Engine(TARGET, method="draft_model", draft=draft)
    for options in ({"target": TARGET}, {"target": None}, {"target": "x", "method": "draft_model", "draft": DRAFT}):
        with pytest.raises(ValueError, match=r"(target|draft)=.* must be a name or a path; pass models to Engine\("):
            Engine.load(**options)


def test_a_path_is_a_name(tmp_path: Path) -> None:
    tiny.make("llama", tiny.GQA).save_pretrained(tmp_path)
    engine = Engine.load(tmp_path, method="draft_model", draft=tmp_path, device="cpu")
    assert engine.generate([1, 2, 3], GREEDY)[0].counts.acceptance_rate == 1


def test_none_is_empty_where_vllm_has_it() -> None:
    assert SamplingParams(stop=None, bad_words=None, stop_token_ids=None, logit_bias=None) == SamplingParams()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SamplingParams(temprature=0), "temprature= must be an argument of SamplingParams; did you mean 'temp"),
        (lambda: SamplingParams(max_token=3), "SamplingParams; did you mean 'max_tokens'"),
        (lambda: Engine(TARGET, metod="ngram"), "metod= must be an argument of Engine; did you mean 'method'"),
        (lambda: Engine(TARGET).generate([[1]], sampling_params=GREEDY), "Engine.generate; did you mean 'sampling'"),
        (lambda: Engine(TARGET).stream(prompt=[[1]]), "prompt= must be an argument of Engine.stream; did you mean 'pr"),
    ],
)
def test_unknown_arguments_are_named_with_the_nearest(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("name", ["bf16", "bfloat", torch.int8])
def test_unknown_number_formats_are_named(name) -> None:
    with pytest.raises(ValueError, match=r"dtype=.* must be one of"):
        Engine.load("smollm2-135m", dtype=name)


# -- loaded models ---------------------------------------------------------------------------------------------


def test_loaded_transformers_models_are_wrapped() -> None:
    model, draft = tiny.make("llama", tiny.GQA), tiny.make("qwen2", tiny.GQA)
    engine = Engine(model.train(), draft=draft, method="draft_model")
    assert not model.training
    assert [list(c.token_ids) for c in engine.generate(tiny.PROMPTS, tiny.GREEDY)] == [
        tiny.reference(model, prompt) for prompt in tiny.PROMPTS
    ]
    assert repr(engine).startswith(
        "Engine(LlamaForCausalLM, float32 on cpu, method='draft_model', draft=Qwen2ForCausalLM,"
    )
    assert "num_speculative_tokens=4, verification='token', max_batch_size=1)" in repr(engine)
    with pytest.raises(ValueError, match="tokenizer= is of a transformers model; CausalLM has its own"):
        Engine(CausalLM(model), tokenizer=object())


def test_a_loaded_model_has_the_tokenizer_that_is_given(default_model) -> None:
    engine = Engine(default_model.model, tokenizer=default_model.tokenizer, method="ngram")
    assert engine.generate("One two three one two", GREEDY)[0].text
    assert "LlamaForCausalLM '" in repr(engine)


def test_an_encoder_decoder_is_wrapped_as_such() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    engine = Engine(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)), method="ngram")
    assert type(engine.target).__name__ == "Seq2SeqLM"
    assert engine.generate([[3, 4, 5]], GREEDY)


# -- a model's own files -------------------------------------------------------------------------------------------


class Ends:
    """A tokenizer that alone knows how a text ends."""

    eos_token_id = 7

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


def test_an_end_that_only_the_tokenizer_knows_ends_a_text() -> None:
    model = tiny.make("llama", tiny.GQA)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    favoured = SamplingParams(temperature=0, max_tokens=5, logit_bias={7: 100.0})
    (completion,) = Engine(model, tokenizer=Ends()).generate([[3, 4]], favoured)
    assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == ((7,), "stop", 7)
    model.generation_config.eos_token_id = 9  # the model's own word comes first, as in transformers
    assert Engine(model, tokenizer=Ends()).generate([[3, 4]], favoured)[0].finish_reason == "length"


def test_ignored_generation_config_entries_are_named_and_offered(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.make("llama", tiny.GQA)
    Engine(model)
    assert not caplog.records
    model.generation_config.repetition_penalty = 1.7
    with caplog.at_level(logging.WARNING):
        engine = Engine(model, method="ngram")
    assert "generation_config has repetition_penalty=1.7, which transformers.generate applies" in caplog.text
    params = engine.default_sampling(max_tokens=12, ignore_eos=True)
    assert params == SamplingParams(temperature=0, repetition_penalty=1.7, max_tokens=12, ignore_eos=True)
    tokens = engine.generate([tiny.PROMPTS[2]], params)[0].token_ids
    inputs = torch.tensor([tiny.PROMPTS[2]])
    expected = model.generate(inputs, max_new_tokens=12, eos_token_id=None, do_sample=False)[0, inputs.shape[1] :]
    assert list(tokens) == expected.tolist()
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    assert engine.default_sampling() == SamplingParams(temperature=0.6, top_p=0.9, top_k=50, repetition_penalty=1.7)


def test_a_beginning_that_is_there_twice_is_named(default_model, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    from specdec.prompts import encode_raw

    class AddsBos:
        bos_token_id, bos_token = 1, "<s>"

        def __call__(self, text: str):
            ids = [1, *(1 if piece == "<s>" else 9 for piece in text.split())]
            return type("Encoded", (), {"input_ids": ids})

    with caplog.at_level(logging.WARNING):
        assert encode_raw("hi", AddsBos()) == (1, 9)
        assert not caplog.records
        assert encode_raw("<s> hi", AddsBos()) == (1, 1, 9)
    assert "prompt begins with <s> twice" in caplog.text


# -- two calls at once ---------------------------------------------------------------------------------------------


def test_a_second_call_is_refused_until_the_first_is_finished() -> None:
    engine = Engine(TARGET, method="draft_model", draft=DRAFT)
    plain = [c.token_ids for c in engine.generate([[0], [1]], SamplingParams(max_tokens=8))]
    stream = engine.stream([[0], [1]], SamplingParams(max_tokens=8))  # from the call on, not from the first chunk on
    for _ in range(2):
        for call in (engine.generate, engine.stream, engine.as_completed):
            with pytest.raises(
                EngineBusyError, match=r"this engine is decoding for another call.*close\(\) that one first"
            ):
                call([[0]], GREEDY)
        with pytest.raises(EngineBusyError):
            engine.forget()
        chunk = next(stream)
    rest = [chunk, *stream]
    assert [c.completion.token_ids for c in rest if c.completion] == plain
    assert [c.token_ids for c in engine.generate([[0], [1]], SamplingParams(max_tokens=8))] == plain


@pytest.mark.parametrize("end", ["closed", "dropped", "failed", "refused", "never begun"])
def test_an_engine_is_free_again_however_a_call_ends(end: str) -> None:
    engine = Engine(TARGET)
    if end == "refused":
        with pytest.raises(ValueError, match="must not be empty"):
            engine.generate([[]])
    else:
        stream = engine.stream([[0]], SamplingParams(max_tokens=8))
        if end != "never begun":
            next(stream)
        if end == "failed":
            with pytest.raises(RuntimeError, match="boom"):
                stream.throw(RuntimeError("boom"))
        elif end == "closed":
            stream.close()
        else:
            del stream
    assert engine.generate([[0]], GREEDY)


def test_of_two_threads_one_is_refused_and_the_other_is_right() -> None:
    engine, params = Engine(TARGET, method="draft_model", draft=DRAFT), SamplingParams(max_tokens=60)
    expected = engine.generate([[0]], params)[0].token_ids
    results: list = []

    def work() -> None:
        for _ in range(5):
            try:
                results.append(engine.generate([[0]], params)[0].token_ids)
            except EngineBusyError as error:
                results.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decoded = [each for each in results if not isinstance(each, EngineBusyError)]
    assert len(results) == 20
    assert decoded
    assert set(decoded) == {expected}
