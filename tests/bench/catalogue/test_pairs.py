"""The catalogue of pairs: complete, of the right sizes, and refused before anything is fetched if it cannot run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers.bench_runs import printed
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from bench.campaign.config import BenchConfig
from bench.campaign.plan import plan
from bench.catalogue.pairs import KINDS, Pair, catalogue, parse_pairs
from bench.engines.base import LoadOptions, PromptResult, Run, Setup, Urls
from bench.engines.registry import ENGINES, check_vocabulary, load, why_not_pair
from bench.measure import machine, records
from bench.measure import models as models_module
from bench.measure.models import Models
from bench.measure.paired import CANDIDATE, Measurement
from bench.records.schema import Cell
from specdec import SamplingParams
from specdec.runtime.artifacts import LoadError

MakeConfig = Callable[..., BenchConfig]
OWN = ("smollm2-135m", "gemma3-270m", "tiny-random", "tiny-t5-random", "llama-8b-1b-shape", "smollm2-135m-shape")
LITERATURE = [name for name in catalogue() if name not in OWN]


def test_the_pairs_of_the_literature_are_there() -> None:
    models = {
        (pair.target.split("/")[-1], draft.split("/")[-1])
        for pair in pairs()
        for draft in (pair.draft, *pair.heads.values())
        if draft
    }
    assert models == {
        ("Llama-3.1-70B-Instruct", "Llama-3.2-1B-Instruct"),
        ("Llama-3.1-70B-Instruct", "Llama-3.2-1B"),
        ("Meta-Llama-3-8B-Instruct", "llama3-8b-accelerator"),
        ("Llama-3.3-70B-Instruct", "Llama-3.1-8B-Instruct"),
        ("Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct-speculator.eagle3"),
        ("Qwen3-8B", "Qwen3-8B-speculator.eagle3"),
        ("Qwen3-8B", "Qwen3-8B-DFlash-b16"),
        ("Qwen3-8B", "dspark_qwen3_8b_block7"),
        ("Qwen3-8B", "Qwen3-1.7B"),
        ("Qwen3-1.7B", "Qwen3-0.6B"),
        ("gpt-neo-1.3B-xsum-roya", "gpt-neo-125m-xsum-roya"),
        ("deepseek-coder-6.7b-instruct", "deepseek-coder-1.3b-instruct"),
        ("deepseek-coder-6.7b-base", "deepseek-coder-1.3b-base"),
        *(("t5-11b", f"t5-{size}") for size in ("small", "base", "large")),
        ("t5-3b", "t5-small"),
        ("t5-large", "t5-small"),
    }
    for pair in pairs():
        assert pair.context, pair.name
        assert pair.licence, pair.name
        assert pair.kind in KINDS, pair.name
        assert pair.gated == pair.target.startswith("meta-llama/"), pair.name
        for published in pair.published:
            assert any(word in published.source for word in ("arXiv:", "blog", "vLLM")), pair.name
            assert published.speedup or published.acceptance_rate or published.mean_acceptance_length, pair.name


def pairs() -> list[Pair]:
    return [catalogue()[name] for name in LITERATURE]


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool = False) -> Any:
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


def qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> Any:
    return transformers.Qwen3Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=tied,
    )


def gpt_neo(hidden: int, layers: int, heads: int, **more: Any) -> Any:
    kinds = [[["global", "local"], layers // 2]]
    return transformers.GPTNeoConfig(
        hidden_size=hidden, num_layers=layers, num_heads=heads, attention_types=kinds, **more
    )


def t5(hidden: int, head_dim: int, inner: int, layers: int, heads: int) -> Any:
    return transformers.T5Config(
        d_model=hidden, d_kv=head_dim, d_ff=inner, num_layers=layers, num_heads=heads, vocab_size=32128
    )


LLAMA_8B, LLAMA_70B = llama(4096, 14336, 32, 32, 8, 128256), llama(8192, 28672, 80, 64, 8, 128256)
LLAMA_1B = llama(2048, 8192, 16, 32, 8, 128256, tied=True)
DEEPSEEK = (llama(4096, 11008, 32, 32, 32, 32256), llama(2048, 5504, 24, 16, 16, 32256))
QWEN3_8B, QWEN3_1_7B = qwen3(4096, 12288, 36, 32, tied=False), qwen3(2048, 6144, 28, 16, tied=True)
T5_11B, T5_LARGE = t5(1024, 128, 65536, 24, 128), t5(1024, 64, 4096, 24, 16)
T5_SMALL = t5(512, 64, 2048, 6, 8)
DIMENSIONS = {  # as their configurations on the hub have them
    "llama-3.1-70b-1b": (LLAMA_70B, LLAMA_1B),
    "llama-3.1-70b-1b-misaligned": (LLAMA_70B, LLAMA_1B),
    "llama-3-8b-accelerator": (LLAMA_8B, None),
    "llama-3.3-70b-8b": (LLAMA_70B, LLAMA_8B),
    "llama-3.1-8b-heads": (LLAMA_8B, None),
    "qwen3-8b-heads": (QWEN3_8B, None),
    "qwen3-8b-1.7b": (QWEN3_8B, QWEN3_1_7B),
    "qwen3-1.7b-0.6b": (QWEN3_1_7B, qwen3(1024, 3072, 28, 16, tied=True)),
    "gpt-neo-1.3b-125m-xsum": (gpt_neo(2048, 24, 16), gpt_neo(768, 12, 12)),
    "deepseek-coder-6.7b-1.3b": DEEPSEEK,
    "deepseek-coder-6.7b-1.3b-base": DEEPSEEK,
    "t5-11b-small": (T5_11B, T5_SMALL),
    "t5-11b-base": (T5_11B, t5(768, 64, 3072, 12, 12)),
    "t5-11b-large": (T5_11B, T5_LARGE),
    "t5-3b-small": (t5(1024, 128, 16384, 24, 32), T5_SMALL),
    "t5-large-small": (T5_LARGE, T5_SMALL),
}


def num_weights(config: Any) -> int:
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return sum(weight.numel() for weight in kind.from_config(config).parameters())


@pytest.mark.parametrize("name", LITERATURE)
def test_sizes_are_those_of_the_models_dimensions(name: str) -> None:
    pair, (target, draft) = catalogue()[name], DIMENSIONS[name]
    assert pair.target_params == num_weights(target)
    if draft is not None:
        assert pair.draft_params == num_weights(draft)


def test_the_accelerators_size_is_that_of_its_parts() -> None:
    """Of each of its 4 tokens an embedding and a head of 3,072 by the vocabulary, a projection and a normalisation."""
    inner, vocab, num_tokens = 3072, 128256, 4
    projections = 4096 * inner + (num_tokens - 1) * inner * inner
    expected = num_tokens * (2 * vocab * inner + 2 * inner) + projections
    assert catalogue()["llama-3-8b-accelerator"].draft_params == expected


def test_memory_needed_is_weights_times_their_width() -> None:
    pair = Pair("p", "t", target_params=1000, draft_params=10)
    formats = ("float32", "bfloat16", "float16", "torchao-int8", "bitsandbytes-4bit")
    assert [pair.weight_bytes(each) for each in formats] == [4040, 2020, 2020, 1010, 505]


def test_each_head_is_for_the_method_of_its_format() -> None:
    pair = catalogue()["qwen3-8b-heads"]
    assert pair.draft_for("dflash") == "z-lab/Qwen3-8B-DFlash-b16"
    assert pair.draft_for("eagle3") == "RedHatAI/Qwen3-8B-speculator.eagle3"
    assert pair.draft_for("draft_model") is pair.draft_for("medusa") is None
    assert catalogue()["smollm2-135m"].draft_for("hybrid") == "smollm2-135m-eagle"


def test_a_draft_that_a_user_names_is_for_the_methods_that_take_its_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"0.0.linear.weight": torch.zeros(4, 4), "0.1.weight": torch.zeros(9, 4)}, tmp_path / "model.safetensors")
    (pair,) = parse_pairs(f"target=smollm2-135m,draft={tmp_path}")
    assert pair.draft_for("medusa") == pair.draft_for("hybrid") == str(tmp_path)
    assert pair.draft_for("draft_model") is pair.draft_for("eagle") is None


# ---- pairs that this machine is too small for


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    memories = {torch.device("cuda", index): 80 * 10**9 for index in range(4)}
    monkeypatch.setattr(machine, "free_memories", lambda device: memories)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("engine", "name", "placement", "changes", "reason"),
    [
        ("specdec", "qwen3-8b-1.7b", "same", {}, None),
        ("specdec", "qwen3-8b-1.7b", "separate", {}, None),
        (
            "specdec",
            "llama-3.1-70b-1b",
            "same",
            {},
            "pair=llama-3.1-70b-1b needs 143.6 GB for its weights in bfloat16, but device=cuda has 80.0 GB free; use a",
        ),
        ("specdec", "llama-3.1-70b-1b", "ratio:3:1", {}, None),
        ("specdec", "llama-3.1-70b-1b", "auto", {"dtype": "float32"}, None),
        ("specdec", "llama-3.3-70b-8b", "auto", {"dtype": "float32"}, None),
        ("specdec", "llama-3.1-70b-1b", "same", {"quantization": "torchao-int8"}, None),
        ("specdec", "llama-3.1-70b-1b", "ratio:6:2", {}, "placement=ratio:6:2 needs 8 devices, but device=cuda has 4;"),
        ("vllm", "llama-3.1-70b-1b", "same", {}, None),  # by tensor_parallel_size
        ("vllm", "llama-3.1-70b-1b", "same", {"quantization": "torchao-int8"}, None),
    ],
)
def test_missing_memory_is_named(
    engine: str, name: str, placement: str, changes: dict[str, Any], reason: str | None, make_config: MakeConfig
) -> None:
    got = machine.why_no_room(engine, catalogue()[name], placement, make_config(**changes), "cuda")
    assert got is None if reason is None else reason in str(got)


def test_a_server_elsewhere_has_its_own_memory(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memories", lambda device: {torch.device("cpu"): 10**9})
    pair, quantised = catalogue()["llama-3.1-70b-1b"], '{"quantization": "fp8"}'
    assert machine.why_no_room("vllm-server", pair, "same", make_config(), "cpu")
    assert (
        machine.why_no_room("vllm-server", pair, "same", make_config(server_url=Urls((("", "http://far:1"),))), "cpu")
        is None
    )
    assert machine.why_no_room("vllm", pair, "same", make_config(vllm_options=quantised), "cpu") is None


def test_a_pair_without_room_is_skipped_and_an_error_if_it_was_named(make_config: MakeConfig) -> None:
    small, large = catalogue()["tiny-random"], catalogue()["llama-3.3-70b-8b"]

    def no_room(engine: str, pair: Pair, placement: str) -> str | None:
        return "it is too large; use a smaller one" if pair is large else None

    config = make_config(pairs=(small, large))
    skipped = {each.cell.pair: each.skip for each in plan(config, no_room) if each.skip}
    assert skipped == {large.name: "it is too large; use a smaller one"}
    message = "pairs=llama-3.3-70b-8b was requested and must be able to run, but it is too large; use a smaller one"
    with pytest.raises(ValueError, match=message):
        plan(dataclasses.replace(config, named=frozenset({"pairs"})), no_room)


def test_placements_without_devices_are_skipped_and_an_error_if_named(make_config: MakeConfig) -> None:
    config = make_config(placements=("same", "ratio:6:2"), engines=("specdec",))

    def why(*cell: Any) -> str | None:
        return machine.why_no_room(*cell, config, "cpu")

    skipped = {each.cell.placement for each in plan(config, why) if each.skip}
    assert skipped == {"ratio:6:2"}
    with pytest.raises(
        ValueError, match=r"placements=ratio:6:2 was requested .* needs 8 devices, but device=cpu has 1"
    ):
        plan(dataclasses.replace(config, named=frozenset({"placements"})), why)


def test_models_are_loaded_once_for_each_placement(make_config: MakeConfig) -> None:
    config = make_config(placements=("same", "auto"), workloads=("smoke", "gsm8k"), num_prompts=4)
    placements = [each.cell.placement for each in plan(config)]
    assert placements == sorted(placements, key=["same", "auto"].index)


@pytest.mark.parametrize(
    ("name", "engines", "message"),
    [
        (
            "t5-11b-small",
            ("vllm",),
            "engine=vllm does not support models of kind encoder-decoder, .*; use --engines specdec,transformers",
        ),
        (
            "gpt-neo-1.3b-125m-xsum",
            ("specdec",),
            "engine=specdec does not support models of kind local-attention, .*; use --engines transformers",
        ),
    ],
)
def test_unsupported_pairs_are_refused_by_name(
    name: str, engines: tuple[str, ...], message: str, make_config: MakeConfig
) -> None:
    config = make_config(pairs=(catalogue()[name],), engines=engines, named=frozenset({"pairs"}))
    with pytest.raises(ValueError, match=message):
        plan(config)


def test_engines_that_place_models_themselves_refuse_placements(make_config: MakeConfig) -> None:
    config = make_config(engines=("vllm",), placements=("separate",))
    with pytest.raises(ValueError, match="engine=vllm places models itself and does not support placement=separate"):
        plan(config)


def test_the_experiments_of_leviathan_et_al_are_there() -> None:
    """Translation and summarisation with each of three drafts, for the engines that take encoder-decoders."""
    for size in ("small", "base", "large"):
        pair = catalogue()[f"t5-11b-{size}"]
        assert [each.setting.split(",")[0] for each in pair.published] == ["WMT En-De", "CNN/DM"]
        assert all(each.gamma and each.speedup and each.acceptance_rate for each in pair.published)
        assert [name for name in ENGINES if why_not_pair(name, pair, "same") is None] == ["specdec", "transformers"]


def test_every_kind_of_the_engines_is_known() -> None:
    assert {kind for engine in ENGINES.values() for kind in engine.kinds} <= set(KINDS)


# ---- vocabularies, and models that are unavailable


def saved(folder: Path, config: Any) -> str:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def mismatched(tmp_path: Path) -> Pair:
    """Two folders whose models have vocabularies of 96 and 97 tokens, and no weights."""
    sources = []
    for vocab in (96, 97):
        sources.append(saved(tmp_path / str(vocab), llama(16, 32, 1, 2, 1, vocab)))
        (tmp_path / str(vocab) / "model.safetensors").write_bytes(b"not weights")
    return Pair("pair", sources[0], draft=sources[1], dtype="float32")


def test_vocabularies_are_compared_before_weights_are_read(mismatched: Pair) -> None:
    with pytest.raises(LoadError, match="pair=pair: the draft's vocabulary of 97 tokens must be the target's, 96; use"):
        check_vocabulary(mismatched, "specdec")
    check_vocabulary(dataclasses.replace(mismatched, draft=None), "specdec")
    check_vocabulary(catalogue()["tiny-random"], "vllm")


def test_another_tokenizer_is_for_specdec_alone(tmp_path: Path) -> None:
    """Two byte-level tokenizers that number the same characters in another order."""
    sources = []
    for name in ("target", "draft"):
        sources.append(saved(tmp_path / name, llama(16, 32, 1, 2, 1, 256)))
        alphabet = sorted(ByteLevel.alphabet(), reverse=name == "draft")
        tokenizer = Tokenizer(BPE({character: token for token, character in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(sources[-1])
    pair = Pair("pair", sources[0], draft=sources[1], dtype="float32")
    check_vocabulary(pair, "specdec")
    for engine in ("transformers", "vllm", "vllm-server"):
        with pytest.raises(LoadError, match="pair=pair: the draft's tokenizer must be the target's, but token '!' is"):
            check_vocabulary(pair, engine)


@pytest.mark.parametrize("engine", ["specdec", "transformers", "vllm"])
@pytest.mark.parametrize("named", [True, False])
def test_a_draft_with_another_vocabulary_fails_or_skips_only_the_cells_that_use_it(
    engine: str, named: bool, mismatched: Pair, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(models_module, "load_engine", lambda name, pair, options: loaded.append(pair))
    models = Models(make_config(named=frozenset({"pairs"} if named else ())), "cpu")
    outcome = pytest.fail.Exception if named else pytest.skip.Exception
    with pytest.raises(outcome, match="the draft's vocabulary of 97 tokens must be the target's"):
        models.check_draft(engine, "draft_model", mismatched)
    models.check_draft(engine, "ngram", mismatched)
    assert loaded == [dataclasses.replace(mismatched, draft=None)], "weights of the draft were asked for"


def test_a_refused_draft_is_accepted_again_with_another_pair(
    mismatched: Pair, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models_module, "load_engine", lambda *_: SimpleNamespace(close=lambda: None))
    models = Models(make_config(), "cpu")
    with pytest.raises(pytest.skip.Exception):
        models.check_draft("specdec", "draft_model", mismatched)
    models.check_draft("specdec", "draft_model", dataclasses.replace(mismatched, draft=mismatched.target))


@pytest.mark.parametrize("engine", ["specdec", "transformers", "vllm"])
def test_a_draft_that_no_method_uses_is_not_loaded(
    engine: str, mismatched: Pair, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(models_module, "load_engine", lambda name, pair, options: loaded.append(pair))
    models = Models(make_config(methods=("autoregressive", "ngram")), "cpu")
    models.engine(engine, mismatched)
    assert loaded == [dataclasses.replace(mismatched, draft=None)]


@pytest.mark.parametrize("refused", ["check_vocabulary", "load_engine"])
def test_a_gated_pair_names_the_remedy(refused: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise LoadError("source='meta-llama/...' must be within reach")

    for name in ("check_vocabulary", "load_engine"):
        monkeypatch.setattr(models_module, name, refuse if name == refused else lambda *_: None)
    models = Models(make_config(named=frozenset({"pairs"})), "cpu")
    with pytest.raises(pytest.fail.Exception, match=r"accept the licence at .*meta-llama/Llama-3\.3.* hf auth login"):
        models.check_draft("specdec", "draft_model", catalogue()["llama-3.3-70b-8b"])


def test_a_model_that_specdec_refuses_fails_its_cell_with_a_reason(tmp_path: Path, make_config: MakeConfig) -> None:
    config = transformers.RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, context_length=64)
    pair = Pair("recurrent", saved(tmp_path / "rwkv", config), dtype="float32", attention="eager")
    models = Models(make_config(named=frozenset({"pairs"})), "cpu")
    with pytest.raises(pytest.fail.Exception, match="of RwkvForCausalLM keeps a recurrent state outside of"):
        models.engine("specdec", pair)


def tiny_gpt_neo() -> Any:
    return gpt_neo(32, 2, 2, vocab_size=96, bos_token_id=0, eos_token_id=0, max_position_embeddings=600)


def test_transformers_decodes_local_attention(tmp_path: Path) -> None:
    source = saved(tmp_path / "neo", tiny_gpt_neo())
    pair = Pair("neo", source, draft=source, dtype="float32", kind="local-attention", attention="eager")
    engine = load("transformers", pair, LoadOptions("float32", "cpu"))
    greedy = [SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)]
    engine.prepare([Setup("draft_model", 3, 1)])
    plain, fast = (
        engine.generate([[5, 9, 2, 7]], method, gamma, greedy).results[0]
        for method, gamma in (("autoregressive", 0), ("draft_model", 3))
    )
    assert fast.token_ids == plain.token_ids
    assert fast.counts is not None
    assert fast.counts.acceptance_rate == 1


# ---- measured results beside published ones


def measured(pair: Pair, method: str, config: BenchConfig) -> dict[str, Any]:
    run = Run((PromptResult((1, 2, 3, 4), 0.5, 1.0, None, "length"),))
    cell = Cell("transformers", pair.name, method, 3, pair.placement, "smoke", 1)
    return records.build(cell, pair, config, "1", "cpu", Measurement({CANDIDATE: [run]}, [1.0]))


def test_published_results_stand_beside_measured_ones(make_config: MakeConfig) -> None:
    pair = catalogue()["gpt-neo-1.3b-125m-xsum"]
    record = measured(pair, "draft_model", make_config())
    assert (record["published_speedup"], record["published_acceptance_rate"]) == (1.84, 0.32)
    plain = measured(pair, "ngram", make_config())
    assert plain["published_speedup"] is plain["published_source"] is None
    lines = printed([record | {"speedup": 1.5}, plain | {"speedup": 1.25}])
    published = " ".join(" ".join(lines[lines.index("Published results") :]).split())
    assert "draft_model 3 1.50 1.84 32.0% XSum, greedy, 10 prompts, an RTX 3050" in published
    assert max(map(len, lines)) <= 80
    assert not [line for line in printed([plain | {"speedup": 1.25}]) if "published" in line]


def test_the_table_shows_placement_and_quantization(make_config: MakeConfig) -> None:
    record = measured(catalogue()["tiny-random"], "ngram", make_config())
    lines = printed([record | {"placement": "ratio:6:2", "quantisation": "torchao-int8"}])
    assert lines[0].startswith("tiny-random, float32, ratio:6:2, torchao-int8 on cpu; ")
    assert "Random weights: only times are meaningful, not outputs or acceptance." in lines
    assert max(map(len, lines)) <= 80
    assert printed([record])[0].startswith("tiny-random, float32 on cpu; ")
