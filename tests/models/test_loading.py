"""Loading: every kind of source, every way in which one can be broken, and the fetch of the bundled model."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import architectures
from helpers.tiny import PROMPTS

from specdec import Engine, SamplingParams
from specdec.models import loading
from specdec.models.files.bundled import SMOLLM2_135M
from specdec.models.loading import load_pretrained, resolve
from specdec.runtime.artifacts import LoadError

PROMPT = torch.tensor([[1, 5, 9, 2]])
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "abc"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a tiny random Llama and no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": len(WORDS)}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A tiny Llama with Q4_0 blocks and a byte-pair tokenizer, written by the gguf library."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def write_gguf(path):
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    generator = torch.Generator().manual_seed(1)
    for name, shape in gguf_shapes().items():
        weight = torch.randn(shape, generator=generator).numpy()
        packed = len(shape) == 2
        kind = gguf.GGMLQuantizationType.Q4_0 if packed else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_shapes():
    block = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    block |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {"token_embd.weight": (len(WORDS), 32), "output_norm.weight": (32,), "output.weight": (len(WORDS), 32)}
    return shapes | {f"blk.0.{name}.weight": shape for name, shape in block.items()}


@pytest.fixture
def copy(llama, tmp_path):
    """A copy of the tiny folder that a test may break."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def load(source, **options):
    return load_pretrained(str(source), **{"dtype": torch.float32, **options})


def logits(model):
    return model(PROMPT).logits


# ---- sources that work


def test_folder_has_the_stored_weights_ready_for_inference(llama):
    from transformers import LlamaForCausalLM

    model, tokenizer = load(llama)
    assert tokenizer is None
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert torch.equal(logits(model), logits(LlamaForCausalLM.from_pretrained(llama)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_attention_are_as_requested(llama, dtype, attention):
    model, _ = load(llama, dtype=dtype, attention=attention, device=torch.device("cpu"))
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert model.config._attn_implementation == attention


def test_home_folder_is_expanded(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    assert load("~/copy")[0].config.model_type == "llama"


def test_encoder_decoder_folder_gives_a_sequence_to_sequence_model(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    model, _ = load(tmp_path / "t5", attention="eager")
    assert isinstance(model, T5ForConditionalGeneration)


def test_gguf_is_dequantised_into_plain_linear_layers(gguf_file, tmp_path):
    import gguf

    model, tokenizer = load(gguf_file)
    assert {type(module) for name, module in model.named_modules() if name.endswith("_proj")} == {torch.nn.Linear}
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}["blk.0.ffn_up.weight"]
    expected = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)
    assert tokenizer.decode(tokenizer("abc a").input_ids) == "abc a"
    model.save_pretrained(tmp_path / "saved")  # refused by transformers for a model that still counts as quantised
    assert torch.equal(logits(load(tmp_path / "saved")[0]), logits(model))


def test_dummy_weights_are_reproducible_and_leave_the_random_stream_alone(llama, tmp_path):
    config_alone = Path(shutil.copy(llama / "config.json", tmp_path / "any-name.json"))
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, tokenizer = load(config_alone, load_format="dummy")
    assert torch.equal(torch.rand(1), expected)
    assert tokenizer is None
    second, _ = load(llama, load_format="dummy")
    assert torch.equal(logits(first), logits(second))
    assert not first.training
    assert not torch.equal(logits(first), logits(load(llama)[0]))


def test_dummy_takes_the_tokenizer_that_lies_beside_the_configuration(gguf_file, copy):
    _, tokenizer = load(gguf_file)
    tokenizer.save_pretrained(copy)
    (copy / "model.safetensors").unlink()
    for source in (copy, copy / "config.json"):
        assert load(source, load_format="dummy")[1].get_vocab() == tokenizer.get_vocab()
    assert load(gguf_file, load_format="dummy")[1].get_vocab() == tokenizer.get_vocab()


def test_empty_tokenizer_is_never_invented(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    assert load(tmp_path / "gpt2")[1] is None


# ---- arguments and sources that do not


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, r"dtype='bfloat16' must be one of these; use torch.float16 or torch.bfloat16"),
        ({"dtype": torch.int8}, r"dtype=torch.int8 must be one of these"),
        ({"attention": "flash"}, r"attention='flash' must be one of these; use eager or sdpa"),
        ({"load_format": "gguf"}, r"load_format='gguf' must be one of these; use auto or dummy"),
        ({"device": "quantum"}, r"device='quantum' must be usable here \(there is no such kind\); use cpu"),
        ({"device": "cuda:99"}, r"device='cuda:99' must be usable here \(.*\); use cpu"),
        ({"source": ""}, r"source='' must not be empty; name a bundled model \(smollm2-135m, "),
    ],
)
def test_bad_argument_is_named_with_the_rule(llama, options, message):
    with pytest.raises(ValueError, match=message):
        load(**{"source": llama, **options})


@pytest.mark.parametrize("source", ["/no/such/folder", "./missing", "a/b/c", "missing.gguf", "some/config.json", "a b"])
def test_missing_path(source):
    with pytest.raises(FileNotFoundError, match=rf"source='{source}' must exist; check the path, or name a bundled"):
        load(source)


def test_hub_id_that_cannot_be_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"source='smolm2-135m' must be a bundled name.*\(.+\); check the spelling .* HF_HUB_OFFLINE=1 .*smollm2"
    with pytest.raises(LoadError, match=message):
        load("smolm2-135m")
    with pytest.raises(LoadError, match=r"source='org/none' must be"):
        load("org/none", load_format="dummy")


def test_hub_id_in_the_hub_cache_needs_no_network(llama, tmp_path, monkeypatch):
    """A dummy model from a cached configuration alone; the weights themselves are then asked for in vain."""
    snapshot = tmp_path / "hub" / "models--org--cached" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(llama / "config.json", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model, tokenizer = load("org/cached", load_format="dummy")
    assert model.config.vocab_size == len(WORDS)
    assert tokenizer is None
    with pytest.raises(LoadError, match="source='org/cached' must be"):
        load("org/cached")


def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source='.*' must hold a config.json; name a folder"):
        load(tmp_path)


def test_folder_with_pickled_weights_only(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"must hold its weights as .safetensors; convert them"):
        load(copy)


def test_pickled_weights_beside_other_safetensors_are_not_read(copy):
    torch.save(load(copy)[0].state_dict(), copy / "pytorch_model.bin")
    (copy / "model.safetensors").rename(copy / "adapter.safetensors")
    with pytest.raises(LoadError, match=r"\(.*model.safetensors.*\); copy or save"):
        load(copy)


@pytest.mark.parametrize("other", ["pytorch_model.bin", "weights.pt", "model.safetensors.bin", 3])
def test_an_index_that_names_pickled_weights_is_refused(copy, other):
    """transformers reads whatever the index names, and only the index is called safetensors."""
    weights = load(copy)[0].state_dict()
    torch.save(weights, copy / str(other))
    (copy / "model.safetensors").rename(copy / "adapter.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, other)}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match=r"\(model.safetensors.index.json must name only .safetensors.*but names"):
        load(copy)


def test_a_configuration_that_names_pickled_weights_is_refused(copy):
    torch.save(load(copy)[0].state_dict(), copy / "adapter_model.bin")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    with pytest.raises(LoadError, match=r"\(transformers_weights=adapter_model.bin must be .safetensors"):
        load(copy)


def test_an_index_of_safetensors_is_read(copy):
    model, _ = load(copy)
    model.save_pretrained(copy, max_shard_size="20KB")
    (copy / "model.safetensors").unlink(missing_ok=True)
    assert (copy / "model.safetensors.index.json").exists()
    assert torch.equal(logits(load(copy)[0]), logits(model))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": int("9" * 400)},
        {"model_type": "gpt2", "n_layer": 10**9},
        {"model_type": "t5", "num_layers": 10**9},
        {"model_type": "mixtral", "num_local_experts": 10**9},
        {"text_config": {"num_hidden_layers": 10**9}},
    ],
)
def test_a_configuration_that_would_never_end_is_refused(copy, load_format, changes):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(LoadError, match=r"=\d+ must be at most 10000\)"):
        load(copy, load_format=load_format)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_configuration_with_fewer_layers_than_none_is_refused(copy, load_format):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": -1}))
    with pytest.raises(LoadError, match=r"num_hidden_layers=-1 must be at least 0\)"):
        load(copy, load_format=load_format)


def test_weights_file_given_instead_of_its_folder(copy):
    with pytest.raises(ValueError, match=r"must be a .gguf file if it is a file; name the folder that holds it"):
        load(copy / "model.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, -10])
def test_truncated_safetensors(copy, kept):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:kept])
    with pytest.raises(LoadError, match=r"source='.*' must hold an undamaged transformers model \(.+\); copy or"):
        load(copy)


def test_missing_weights_are_not_replaced_by_random_ones(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"\(1 weights are missing, the first is model.norm.weight\)"):
        load(copy)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model_type": "no-such-model"}'])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_damaged_configuration(copy, content, load_format):
    (copy / "config.json").write_text(content)
    with pytest.raises(LoadError, match=r"must hold an undamaged transformers model \(.+\)"):
        load(copy, load_format=load_format)


@pytest.mark.parametrize("content", ["", '{"eos_token_id": ', "[2]"])
def test_a_damaged_generation_config_is_not_ignored(copy, content):
    """transformers decodes without it, and so without its stop tokens."""
    (copy / "generation_config.json").write_text(content)
    with pytest.raises(LoadError, match="must hold an undamaged transformers model"):
        load(copy)


def test_damaged_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(LoadError, match=r"must hold an undamaged transformers model \(.+\)"):
        load(copy)


@pytest.mark.parametrize("kept", [0, 3, 100, 1000, -2000])
def test_truncated_gguf(gguf_file, tmp_path, kept):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file.read_bytes()[:kept])
    message = r"source='.*broken.gguf' must be an undamaged GGUF file .*\(.+\); fetch it again and compare its size"
    with pytest.raises(LoadError, match=message):
        load(broken)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(
    ("key", "stored", "replacement", "message"),
    [
        ("llama.block_count", "<II 4 1", "<II 4 1000000000", r"llama.block_count=1000000000 must be at most 10000"),
        ("tokenizer.ggml.tokens", "<IIQ 9 8 32", "<IIQ 9 8 1099511627776", "."),
        ("tokenizer.ggml.token_type", "<IIQ 9 5 32", "<IIQ 9 5 1099511627776", "."),
    ],
)
def test_gguf_metadata_that_would_never_end_is_refused(
    gguf_file, tmp_path, load_format, key, stored, replacement, message
):
    """Values and array lengths in a header that is otherwise valid."""

    def packed(text):
        layout, *numbers = text.split()
        return key.encode() + struct.pack(layout, *map(int, numbers))

    content, file = gguf_file.read_bytes(), tmp_path / "endless.gguf"
    assert content.count(packed(stored)) == 1
    file.write_bytes(content.replace(packed(stored), packed(replacement)))
    with pytest.raises(LoadError, match=rf"must be an undamaged GGUF file .*\(.*{message}.*\)"):
        load(file, load_format=load_format)


def test_file_that_is_not_gguf(tmp_path):
    (tmp_path / "page.gguf").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(LoadError, match=r"must be an undamaged GGUF file"):
        load(tmp_path / "page.gguf")


def test_resolve_leaves_other_sources_as_they_are(llama):
    assert [resolve(source) for source in ("org/model", str(llama))] == ["org/model", str(llama)]


def test_import_is_light():
    """Neither the module nor a bundled model that is there needs transformers."""
    code = "import sys, specdec.models.loading; sys.exit('transformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(loading.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


# ---- the real thing


def test_default_model():
    folder = Path(resolve("smollm2-135m"))
    start = time.perf_counter()
    assert resolve("smollm2-135m") == str(folder)
    assert time.perf_counter() - start < 0.1
    model, tokenizer = load("smollm2-135m", dtype=torch.bfloat16)
    assert model.num_parameters() == 134_515_008
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(reply, skip_special_tokens=True) == "The capital of France is Paris."
    text = "  Speculative décoding:\n\n1234 + 56 = 1290 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_default_folder_is_an_ordinary_transformers_folder():
    folder = Path(resolve("smollm2-135m"))
    texts = {path.name: path.read_text() for path in folder.glob("*.json")}
    assert texts.keys() >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert (folder / "chat_template.jinja").exists()
    config = json.loads(texts["config.json"])
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert "gguf" not in texts[name].lower()
        assert str(folder.parent) not in texts[name]
    record = json.loads(texts["specdec.json"])
    assert (record["licence"], record["wheel_sha256"]) == ("Apache-2.0", SMOLLM2_135M.wheel_sha256)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777


def test_a_draft_with_another_vocabulary_is_refused_before_any_weights_are_read(llama, tmp_path):
    from transformers import LlamaConfig

    from specdec import Engine

    small = LlamaConfig(vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    small.save_pretrained(tmp_path / "draft")
    (tmp_path / "draft" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="the draft's vocabulary of 7 tokens must be the target's"):
        Engine.load(str(llama), draft=str(tmp_path / "draft"), method="draft_model")


def test_sources_are_recognized_and_their_tokenizers_read_once(gguf_file, copy, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    from specdec import Engine, drafts, engine

    load(gguf_file)[1].save_pretrained(copy)
    draft = str(shutil.copytree(copy, tmp_path / "draft"))
    read, found = [], []
    from_pretrained, find = AutoTokenizer.from_pretrained, drafts.find
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda **options: read.append(1) or from_pretrained(**options)
    )
    for module in (drafts, engine):
        monkeypatch.setattr(
            module, "find", lambda source, *args, **options: found.append(source) or find(source, *args, **options)
        )
    loaded = Engine.load(str(copy), draft=draft, method="draft_model")
    assert loaded.tokenizer is not None
    assert (len(read), found) == (2, [draft]), "one tokenizer of the target and one of the draft"


# ---- what is asked of the hub, and which attention an architecture has


def test_an_unreachable_hub_is_probed_once(monkeypatch, tmp_path, llama) -> None:
    """Then its cache alone is looked at, and a name that is near a bundled one is a question."""
    import huggingface_hub

    asked = []

    def unreachable(url, **options):
        asked.append(url)
        raise ConnectionError("no network here")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    start = time.perf_counter()
    message = r"source='smolm2-135m' must be .*the hub does not answer: no network here.*name a bundled model \(smoll"
    with pytest.raises(LoadError, match=message + r".*did you mean 'smollm2-135m'\?"):
        load("smolm2-135m")
    assert time.perf_counter() - start < 5
    assert len(asked) == 1
    snapshot = tmp_path / "hub" / "models--org--cached" / "snapshots" / ("0" * 40)
    shutil.copytree(llama, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    assert load("org/cached", load_format="dummy")[0].config.vocab_size == len(WORDS)


def test_a_revision_is_requested(monkeypatch, tmp_path) -> None:
    import huggingface_hub

    asked = []

    def unreachable(url, **options):
        asked.append(url)
        raise ConnectionError("none")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LoadError, match="source='org/model@refs/pr/3' must be"):
        Engine.load("org/model", revision="refs/pr/3")
    assert "/org/model/resolve/refs%2Fpr%2F3/config.json" in asked[0]
    for source in ("smollm2-135m", str(tmp_path), "org/model@main"):
        with pytest.raises(ValueError, match="revision='main' must be left out"):
            Engine.load(source, revision="main")


GEMMA2 = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GEMMA2 |= {"max_position_embeddings": 64, "sliding_window": 16}  # the trial on loading reads texts beyond the window
ONLY_EAGER = {
    "gemma2": GEMMA2 | {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32},
    "gptj": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 64},
}


@pytest.mark.parametrize("kind", ONLY_EAGER)
def test_an_architecture_without_sdpa_is_not_called_damaged(kind, tmp_path, caplog) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **ONLY_EAGER[kind])
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(tmp_path)
    for load_format in ("auto", "dummy"):
        caplog.clear()
        engine = Engine.load(str(tmp_path), dtype="float32", device="cpu", load_format=load_format)
        assert engine.target.config._attn_implementation == "eager"
        assert "ForCausalLM does not support SDPA in transformers: using eager attention" in caplog.text
        with pytest.raises(ValueError, match=r"attention='sdpa' must be supported by \w+ in .* use attention='eager'"):
            load(tmp_path, attention="sdpa", load_format=load_format)


# ---- composites


def test_a_composite_with_images_is_decoded_as_a_model_of_text(tmp_path):
    case = next(case for case in architectures.OTHERS if case.kind == "qwen2_vl")
    model = architectures.make(case.config())
    model.save_pretrained(tmp_path)
    engine = Engine.load(str(tmp_path), method="ngram", dtype=torch.float32, max_batch_size=3)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for prompt, found in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        tokens = torch.tensor([prompt])
        output = model.generate(
            tokens, attention_mask=tokens > 0, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert list(found.token_ids) == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["whisper", "clip", "vit"])
def test_a_model_of_other_inputs_or_outputs_is_refused(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"model_type='{kind}' must be a model that reads token ids and writes token"):
        load_pretrained(str(tmp_path), dtype=torch.float32, load_format="dummy")
