"""Encoder-decoders through the ragged cache: equal to `generate`, lossless, or refused; most tests with T5."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import architectures
from helpers.tiny import GQA
from helpers.tiny import make as make_causal
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from specdec import Engine, SamplingParams
from specdec.conformance.divergence import last_logits
from specdec.conformance.enumeration import exact_distribution, pieces_between
from specdec.conformance.gates import distance
from specdec.conformance.mutants import maker
from specdec.conformance.reference import Reference
from specdec.models import seq2seq as module
from specdec.models.base import FINAL, prefill
from specdec.models.causal import CausalLM, UnsupportedModelError
from specdec.models.decoders import t5
from specdec.models.decoders.t5 import distance_buckets
from specdec.models.elsewhere import Elsewhere, seen_from
from specdec.models.placement import PlacementError
from specdec.models.seq2seq import Seq2SeqCache, Seq2SeqLM
from specdec.models.state.ragged import RaggedCache
from specdec.runtime.artifacts import LoadError
from specdec.sampling.distributions import Dense
from specdec.verification import residual

SMALL = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 61,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,  # less than the outputs' length
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SUPPORTED = {
    "t5": SMALL,
    "t5-1.1": SMALL | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": SMALL,
    "umt5": SMALL,
}
# in two slots or three: a long prompt, then short ones where it was
PROMPTS = [[11, 4, 11, 4, 11, 4, 11, 4, 11, 4, 11, 4, 1], [5, 9, 8, 7, 5, 9, 8, 1], [3], [7, 7, 30, 1]]
TREE = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


def make(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **changes: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind.split("-")[0], **SUPPORTED[kind] | changes)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def generated(model: Any, prompt: list[int], num_tokens: int = GREEDY.max_tokens) -> list[int]:
    """Greedy output by transformers, the token that it starts from left out."""
    tokens = torch.tensor([prompt])
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    return output[0, 1:].tolist()


@pytest.mark.parametrize(("kind", "attention"), [*((kind, "sdpa") for kind in SUPPORTED), ("t5", "eager")])
def test_greedy_output_equals_generate(kind: str, attention: str) -> None:
    """Token for token in float32, plain and with every kind of draft, in ragged batches whose slots change hands."""
    model = make(kind, attention=attention)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) > 1
    target, draft = Seq2SeqLM(model), Seq2SeqLM(make(kind, 1, num_layers=1, d_model=16, num_heads=2))
    for method, size in (("autoregressive", 3), ("ngram", 1), ("draft_model", 3), ("hybrid", 2)):
        drafts = {"draft": draft} if method in ("draft_model", "hybrid") else {}
        engine = Engine(target, method=method, max_batch_size=size, **drafts)
        assert [list(c.token_ids) for c in engine.generate(PROMPTS, GREEDY)] == expected, (method, size)


@pytest.mark.parametrize("records", [False, True])
def test_tree_output_equals_generate(records: bool) -> None:
    """Siblings have the same distance to what is before them; the paths of rows that accept much are moved together."""
    model = make("t5")
    expected, target = [generated(model, prompt) for prompt in PROMPTS], Seq2SeqLM(model)
    accepted = []
    for draft in (target, Seq2SeqLM(make("t5", 1))):
        engine = Engine(target, method="tree", draft=draft, tree=TREE, max_batch_size=3, records=records)
        completions = engine.generate(PROMPTS, GREEDY)
        assert [list(c.token_ids) for c in completions] == expected
        accepted.append(sum(c.counts.num_accepted for c in completions))
    assert accepted[0] > accepted[1]


def test_a_model_that_positions_siblings_sequentially_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases by place instead of by position."""
    target = Seq2SeqLM(make("t5"))
    monkeypatch.setattr(RaggedCache, "seen_positions", lambda self: torch.arange(self.window.extent))
    with pytest.raises(UnsupportedModelError, match="logits of T5ForConditionalGeneration for a token tree differ"):
        Engine(target, method="tree", draft=target, tree=TREE)


@pytest.mark.parametrize("method", ["autoregressive", "ngram", "draft_model"])
@pytest.mark.parametrize("kind", ["t5", "bart", "m2m_100"])
def test_recorded_steps_emit_the_same_tokens(kind: str, method: str) -> None:
    """The motions that a GPU goes through: fixed shapes, inputs and outputs."""
    model = make("t5") if kind == "t5" else architectures.make(architectures.config(kind))
    drafts = {"draft": Seq2SeqLM(architectures.draft_of(model))} if method == "draft_model" else {}
    engine = Engine(Seq2SeqLM(model), method=method, max_batch_size=3, records=True, **drafts)
    for _ in range(2):
        completions = engine.generate(PROMPTS, GREEDY)
        assert [list(c.token_ids) for c in completions] == [generated(model, prompt) for prompt in PROMPTS]


def scored(model: Any, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """Logits of the token after an output, by one plain call without a cache, [vocab]."""
    fed = torch.tensor([[0, *output]])
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=fed, use_cache=False).logits[0, -1]


def test_a_decoder_of_another_depth_than_the_encoder() -> None:
    """transformers 5.23 itself cannot generate with one that is deeper; it can score."""
    model, output = make("t5", num_decoder_layers=3), []
    for _ in range(10):
        output.append(int(scored(model, PROMPTS[1], output).argmax()))
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    assert list(Engine(Seq2SeqLM(model), method="ngram").generate([PROMPTS[1]], params)[0].token_ids) == output


def test_the_continuation_of_a_prompt_is_prefilled_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is read as a whole, however long; the rest of a row that a draft model has not seen is not."""
    model = make("t5")
    target, row = Seq2SeqLM(model), [*PROMPTS[0], *[8, 7, 6, 5, 4, 3, 9, 2]]
    monkeypatch.setattr("specdec.models.base.PREFILL_CHUNK", 3)
    cache = target.allocate(2, 32)
    logits = prefill(target, row, cache, 1, num_prompt=len(PROMPTS[0]))
    assert cache.num_cached == [0, len(row)]
    torch.testing.assert_close(logits[0, 0], scored(model, PROMPTS[0], row[len(PROMPTS[0]) :]), rtol=1e-4, atol=1e-4)


def test_copies_come_from_the_prompt_too() -> None:
    """A bias makes the output repeat one token: after two of it, a prompt that has two of it is copied."""
    engine = Engine(Seq2SeqLM(make("t5")), method="ngram", num_speculative_tokens=3)
    params = SamplingParams(temperature=0, max_tokens=6, logit_bias={8: 1e4})
    with_copy, without = engine.generate([[8, 8, 7, 4], [7, 4]], params)
    assert with_copy.token_ids == without.token_ids == (8,) * 6
    assert [each.steps[1].num_drafted for each in (with_copy, without)] == [3, 0]


def test_a_sampled_row_does_not_depend_on_its_batch() -> None:
    target, draft = Seq2SeqLM(make("t5")), Seq2SeqLM(make("t5", 1, num_layers=1))
    params = [
        SamplingParams(temperature=0.5 + 0.3 * i, top_p=0.95, frequency_penalty=0.1 * i, max_tokens=9 + 4 * i, seed=i)
        for i in range(4)
    ]

    def outputs(rows: Sequence[int], size: int) -> list[tuple[int, ...]]:
        engine = Engine(target, method="draft_model", draft=draft, max_batch_size=size)
        return [c.token_ids for c in engine.generate([PROMPTS[i] for i in rows], [params[i] for i in rows])]

    assert outputs(range(4), 3) == [outputs([i], 1)[0] for i in range(4)]


def test_coupled_sampling_is_the_same_with_any_draft() -> None:
    """Equality above temperature 0, and at any num_speculative_tokens, "auto" included."""
    target, draft = Seq2SeqLM(make("t5")), Seq2SeqLM(make("t5", 1, num_layers=1))
    params = [SamplingParams(temperature=0.7, max_tokens=20, ignore_eos=True, seed=i) for i in range(4)]
    plain = Engine(target, verification="coupled").generate(PROMPTS, params)
    for method, gamma in [("ngram", 3), ("draft_model", 3), ("hybrid", 2), ("draft_model", "auto")]:
        options = {"draft": draft} if method != "ngram" else {}
        engine = Engine(
            target, method=method, num_speculative_tokens=gamma, verification="coupled", max_batch_size=2, **options
        )
        assert [c.token_ids for c in engine.generate(PROMPTS, params)] == [c.token_ids for c in plain]


# ---- the exact distribution


@cache
def distributions(seed: int) -> Callable[[tuple[int, ...]], Tensor]:
    """The distributions of a tiny model over three tokens in float64, by scoring: after an output -> [3]."""
    model = three_tokens(seed).model

    @cache
    def distribution(output: tuple[int, ...]) -> Tensor:
        return scored(model, PROMPT, output).softmax(-1)

    return distribution


@cache
def three_tokens(seed: int) -> Seq2SeqLM:
    return Seq2SeqLM(make("t5", seed, torch.float64, vocab_size=3, d_model=8, d_ff=8, num_layers=1, num_heads=2))


PROMPT = (2, 1, 2, 0)


def thresholds(output: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Pieces of the uniforms of a step of one drafted token: between all thresholds that they may meet."""
    target, draft = distributions(0)(output), distributions(1)(output)
    behind = [distributions(0)((*output, token)) for token in range(3)]
    lasts = [target, residual(target, Dense(draft)), *behind]
    return (
        pieces_between(draft.cumsum(-1).tolist()),
        pieces_between((target / draft).tolist()),
        pieces_between(edge for distribution in lasts for edge in distribution.cumsum(-1).tolist()),
    )


def joint(num_tokens: int) -> dict[tuple[int, ...], float]:
    distribution = {}
    for tokens in itertools.product(range(3), repeat=num_tokens):
        distribution[tokens] = float(
            torch.stack([distributions(0)(tokens[:i])[tokens[i]] for i in range(num_tokens)]).prod()
        )
    return distribution


def test_joint_distribution_of_a_draft_model() -> None:
    """Through the real loop, across step boundaries. 1e-6: T5's norms take a variance in float32."""
    distribution = exact_distribution(maker(three_tokens(0), three_tokens(1), 1), PROMPT, 3, thresholds)
    assert distance(distribution, joint(3)) < 1e-6


@pytest.mark.parametrize("prompt", [PROMPTS[1], PROMPTS[2]])
def test_audits_score_after_the_whole_prompt(prompt: list[int]) -> None:
    """The distributions of teacher forcing, and the logits that a divergence is explained by, in steps of any width."""
    model, output = make("t5"), [8, 7, 6, 5, 3]
    expected = torch.stack([scored(model, prompt, output[:i]) for i in range(len(output))])
    target = Seq2SeqLM(model)
    (found,) = Reference(target, SamplingParams()).distributions([prompt, PROMPTS[0]], [output, output[:2]])
    torch.testing.assert_close(found.distribution.dense()[:5], expected.softmax(-1), rtol=1e-4, atol=1e-5)
    for width in (None, 1, 2, 8):
        logits = last_logits(target, [*prompt, *output[:4]], width, len(prompt))
        torch.testing.assert_close(logits, expected[4], rtol=1e-4, atol=1e-4)


class StalePrompt(Seq2SeqLM):
    """A slot keeps the keys of the first prompt that it was given."""

    def read(self, prompt: Sequence[int], cache: Seq2SeqCache, slot: int) -> None:
        if cache.num_prompt[slot] == 1:
            super().read(prompt, cache, slot)
        cache.num_prompt[slot] = cache.prompt_lengths[slot] = len(prompt)
        cache.num_cached[slot] = len(prompt) - 1


class OthersPrompt(Seq2SeqLM):
    """Every row attends to the first row's prompt."""

    def _prompts(self, cache, slots, longest):
        return [tuple(block[:1].expand_as(block) for block in pair) for pair in super()._prompts(cache, slots, longest)]


@pytest.mark.parametrize("broken", [StalePrompt, OthersPrompt])
def test_a_prompt_that_is_mixed_up_is_caught(broken: type[Seq2SeqLM], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("t5")
    monkeypatch.setattr(module, "_check_ragged_equals_plain", lambda lm: None)
    completions = Engine(broken(model), max_batch_size=2).generate(PROMPTS, GREEDY)
    assert [list(c.token_ids) for c in completions] != [generated(model, prompt) for prompt in PROMPTS]


# ---- positions


@pytest.mark.parametrize(("num_buckets", "most"), [(32, 128), (8, 20), (16, 100)])
def test_buckets_are_transformers_own(num_buckets: int, most: int) -> None:
    """Every distance, and all that is further back as the last."""
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(3 * most)
    expected = T5Attention._relative_position_bucket(-distances, False, num_buckets, most)
    assert distance_buckets(num_buckets, most)[distances.clamp(max=most)].tolist() == expected.tolist()


def test_wrong_positions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at construction sees a bias that is one distance off."""
    monkeypatch.setattr(t5, "distance_buckets", lambda *args: distance_buckets(*args).roll(1))
    with pytest.raises(UnsupportedModelError, match="the logits of T5ForConditionalGeneration differ between calls"):
        Seq2SeqLM(make("t5"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_take_the_same_path(dtype: torch.dtype) -> None:
    """Rounding may flip near ties, so equality is asked of one step's distribution, within the format's precision."""
    model = make("t5", dtype=dtype)
    target = Seq2SeqLM(model)
    row = [*PROMPTS[1], 8, 7, 6]
    cache = target.allocate(2, 32)
    prefill(target, PROMPTS[0], cache, 0)
    logits = prefill(target, row, cache, 1, num_prompt=len(PROMPTS[1]))[0, 0].float()
    expected = scored(model, PROMPTS[1], row[len(PROMPTS[1]) :]).float()
    assert (logits - expected).norm() / expected.norm() < 0.02


class Far(Seq2SeqLM):
    """A model that claims to be on another device than the tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.device = torch.device("cpu:0")


def test_a_draft_elsewhere_changes_nothing() -> None:
    target, draft = Seq2SeqLM(make("t5")), make("t5", 1)
    far = Far(draft)
    assert isinstance(seen_from(far, target.device), Elsewhere)
    here, there = (
        Engine(target, draft=each, method="draft_model", max_batch_size=2).generate(PROMPTS, GREEDY)
        for each in (Seq2SeqLM(draft), far)
    )
    assert [(c.token_ids, c.steps) for c in here] == [(c.token_ids, c.steps) for c in there]


# ---- folders and text


@cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Single letters, and an end-of-text token after each text, as T5's tokenizer adds."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "▁": 3} | {chr(97 + i): 4 + i for i in range(26)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def saved(folder: Path, model: Any, *, damaged: bool = False) -> str:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if damaged:
        (folder / "model.safetensors").write_bytes(b"not weights")
    return str(folder)


def test_folders_in_text_out(tmp_path: Path) -> None:
    model = make("t5")
    target, draft = saved(tmp_path / "target", model), saved(tmp_path / "draft", make("t5", 1, num_layers=1))
    engine = Engine.load(target, draft=draft, method="draft_model", dtype=torch.float32)
    completion = engine.generate(["translate this"], SamplingParams(temperature=0, max_tokens=12))[0]
    assert completion.prompt_token_ids[-1] == 1
    output = generated(model, list(completion.prompt_token_ids), 12)
    assert list(completion.token_ids) == output[: len(completion.token_ids)]
    assert completion.text == tokenizer().decode(completion.token_ids, skip_special_tokens=True)
    assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 1 else "length")


def test_kinds_are_compared_before_weights_are_read(tmp_path: Path) -> None:
    seq2seq = saved(tmp_path / "t5", make("t5"), damaged=True)
    causal = saved(tmp_path / "llama", make_causal("llama", GQA), damaged=True)
    for target, draft, message in [
        (seq2seq, causal, "the draft model, a decoder-only model, must be an encoder-decoder as the target is"),
        (causal, seq2seq, "the draft model, an encoder-decoder, must be a decoder-only model as the target is"),
    ]:
        with pytest.raises(ValueError, match=message):
            Engine.load(target, draft=draft, method="draft_model")
    with pytest.raises(LoadError, match="must hold an undamaged transformers model"):
        Engine.load(seq2seq, draft=seq2seq, method="draft_model")
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "draft_vocabulary.json").write_text("[]")
    with pytest.raises(ValueError, match="a head needs the features of a decoder-only target, but this one is an enc"):
        Engine.load(seq2seq, draft=str(tmp_path / "head"), method="eagle")


# ---- bad input


def test_placements_over_devices_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "t5", make("t5"), damaged=True)
    with pytest.raises(PlacementError, match="placement='separate' must be \"same\" for an encoder-decoder"):
        Engine.load(folder, placement="separate")


def test_models_of_different_kinds_are_refused() -> None:
    seq2seq, causal = Seq2SeqLM(make("t5")), CausalLM(make_causal("llama", GQA))
    with pytest.raises(ValueError, match="the draft model, a decoder-only model, must be an encoder-decoder as the ta"):
        Engine(seq2seq, method="draft_model", draft=causal)
    with pytest.raises(ValueError, match="the draft model, an encoder-decoder, must be a decoder-only model as the ta"):
        Engine(causal, method="hybrid", draft=seq2seq)
    with pytest.raises(ValueError, match="the draft's vocabulary of 60 tokens must be the target's, 61"):
        Engine(seq2seq, method="draft_model", draft=Seq2SeqLM(make("t5", vocab_size=60)))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("whisper", {}, "WhisperForConditionalGeneration encodes input_features, but a prompt has token ids"),
        (
            "prophetnet",
            {},
            "the decoder of ProphetNet.* does not support .* \\(its ProphetNet.* raised",
        ),
        ("led", {}, "the logits of LEDForConditionalGeneration differ"),  # it ignores the mask of a single token
        ("m2m_100", {"decoder_start_token_id": 0}, "the logits of M2M100.* differ"),  # padding has no position there
    ],
)
def test_other_encoder_decoders_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        Seq2SeqLM(architectures.make(architectures.config(kind, **options)))


def test_a_model_without_a_start_token_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"decoder_start_token_id=None .* must be a token id"):
        Seq2SeqLM(make("t5", decoder_start_token_id=None))


def test_features_and_too_long_prompts_are_refused() -> None:
    target = Seq2SeqLM(make("t5"))
    with pytest.raises(ValueError, match=r"features=\(-1,\) must be \(\) for an encoder-decoder"):
        target.allocate(1, 8, features=(FINAL,))
    with pytest.raises(ValueError, match="a prompt of 13 tokens exceeds the cache's capacity of 8"):
        prefill(target, PROMPTS[0], target.allocate(1, 8), 0)
    with pytest.raises(ValueError, match=r"prompt 0 must have token ids in \[0, 61\)"):
        Engine(target).generate([[61]])
