"""GGUF files: weights are bit-identical to those of gguf and transformers, whatever the type and the architecture."""

from __future__ import annotations

import json
import os
import struct

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GgufConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3MoeConfig,
)

from specdec.models.gguf import blocks
from specdec.models.gguf.blocks import dequantize
from specdec.models.gguf.checkpoint import PLAN_FILE
from specdec.models.gguf.header import read_header, write_without_vocabulary
from specdec.models.loading import load_pretrained, read_vocabulary

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "F16", "BF16", "F32")
Quant = gguf.GGMLQuantizationType


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_dequantized_as_gguf_does_it(kind, dtype, monkeypatch):
    """Any bytes are blocks; with pieces smaller than the tensor, and a last one that is shorter."""
    monkeypatch.setattr(blocks, "PIECE", 1024)
    block_bytes = gguf.GGML_QUANT_SIZES[Quant[kind]][1]
    stored = np.random.default_rng(0).integers(0, 256, (5 * 1024 // 32) * block_bytes, dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(np.copy(gguf.dequantize(stored[None], Quant[kind]))).flatten().to(dtype)
        found = dequantize(stored, kind, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_a_type_that_gguf_cannot_dequantize_is_refused():
    with pytest.raises(NotImplementedError, match="I32"):
        dequantize(np.zeros(64, np.uint8), "I32", torch.float32)


# ---- whole models of four architectures


def write(path, arch, metadata, weights, vocab_size):
    """A file with random weights. weights: shapes by name."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcdefghi", "ab", *(f"<{number}>" for number in range(10, vocab_size))])
    writer.add_token_types([1] * 10 + [3] * (vocab_size - 10))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(10)
    writer.add_eos_token_id(11)
    random = np.random.default_rng(0)
    for name, shape in weights.items():
        kind = Quant.Q8_0 if len(shape) > 1 and shape[-1] % 32 == 0 else Quant.F32
        weight = random.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    for part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        part()
    return path


VOCAB = 2_000  # more than what is read of a header
COMMON = {"block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96}
HEADS = {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}
ROPE = {"rope.freq_base": 10000.0, "rope.dimension_count": 16}
KEYS = {"attention.key_length": 16, "attention.value_length": 16}
ENDS = {"token_embd.weight": (VOCAB, 64), "output_norm.weight": (64,)}
ATTENTION = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "attn_norm": (64,)}
MLP = {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96), "ffn_norm": (64,)}
QK_NORMS = {"attn_q_norm": (16,), "attn_k_norm": (16,)}
EXPERTS = {  # of 768, the only width for which transformers reads such a file
    **{"ffn_gate_exps": (4, 768, 64), "ffn_up_exps": (4, 768, 64), "ffn_down_exps": (4, 64, 768)},
    **{"ffn_gate_inp": (4, 64), "ffn_norm": (64,)},
}


def blocks_of(**shapes):
    return {f"blk.{layer}.{name}.weight": shape for layer in range(2) for name, shape in shapes.items()}


def gpt2_weights():
    shapes = {"attn_qkv": (192, 64), "attn_output": (64, 64), "ffn_up": (256, 64), "ffn_down": (64, 256)}
    biases = {name: (shape[0],) for name, shape in shapes.items()} | {"attn_norm": (64,), "ffn_norm": (64,)}
    layers = blocks_of(**shapes, attn_norm=(64,), ffn_norm=(64,))
    layers |= {f"blk.{layer}.{name}.bias": shape for layer in range(2) for name, shape in biases.items()}
    return {"position_embd.weight": (1024, 64), "output_norm.bias": (64,), **ENDS, **layers}


NORMS = {"post_attention_norm": (64,), "post_ffw_norm": (64,)}
MODELS = {
    "llama": (COMMON | HEADS | ROPE, ENDS | blocks_of(**ATTENTION, **MLP), LlamaConfig),
    "gemma3": (
        COMMON | HEADS | KEYS | {"attention.sliding_window": 8, "rope.freq_base": 10000.0},
        ENDS | blocks_of(**ATTENTION, **MLP, **QK_NORMS, **NORMS),
        Gemma3TextConfig,
    ),
    "qwen3moe": (
        {
            **COMMON,
            **HEADS,
            **KEYS,
            **ROPE,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 768,
        },
        ENDS | {"output.weight": (VOCAB, 64)} | blocks_of(**ATTENTION, **EXPERTS, **QK_NORMS),
        Qwen3MoeConfig,
    ),
    "gpt2": (
        {**COMMON, "feed_forward_length": 256, "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5},
        gpt2_weights(),
        GPT2Config,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", MODELS)
def test_a_model_has_the_weights_and_the_tokenizer_that_transformers_reads(arch, dtype, tmp_path):
    """Shifted norms, reordered rows of queries and keys, transposed weights, merged experts, no vocab_size."""
    metadata, weights, config_class = MODELS[arch]
    path = write(tmp_path / "model.gguf", arch, metadata, weights, VOCAB)
    model, tokenizer = load_pretrained(str(path), dtype=dtype)
    file = {"gguf_file": path.name, "dtype": dtype, "quantization_config": GgufConfig(dequantize=True)}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, **file)
    assert type(model) is type(expected)
    assert isinstance(model.config, config_class)
    assert model.config.vocab_size == VOCAB
    configs = [each.config.to_dict() | {"_name_or_path": ""} for each in (model, expected)]
    assert configs[0] == configs[1]
    weights, expected_weights = model.state_dict(), expected.state_dict()
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), expected.buffers(), strict=True))
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert tokenizer.backend_tokenizer.to_str() == reference.backend_tokenizer.to_str()
    assert tokenizer.special_tokens_map == reference.special_tokens_map


# ---- what is kept


@pytest.fixture
def llama(tmp_path):
    return write(tmp_path / "llama.gguf", "llama", *MODELS["llama"][:2], VOCAB)


def test_a_header_is_converted_once(llama, cache, monkeypatch):
    load_pretrained(str(llama), dtype=torch.float32)
    monkeypatch.setattr("specdec.models.loading.describe", None)
    load_pretrained(str(llama), dtype=torch.bfloat16)
    assert read_vocabulary(str(llama)).vocab_size == VOCAB
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_weights_are_read_from_the_file_each_time(llama):
    """What is kept is of the header: the same header with other weights is another model."""
    first, _ = load_pretrained(str(llama), dtype=torch.float32)
    norm = read_header(llama).tensors[1]
    assert norm.name == "output_norm.weight"
    content = bytearray(llama.read_bytes())
    content[norm.start : norm.start + 4] = struct.pack("<f", 7.0)
    llama.write_bytes(content)
    second, _ = load_pretrained(str(llama), dtype=torch.float32)
    assert first.model.norm.weight[0] != 7
    assert second.model.norm.weight[0] == 7
    assert torch.equal(first.model.norm.weight[1:], second.model.norm.weight[1:])


def test_a_plan_that_was_tampered_with_is_written_again(llama, cache):
    load_pretrained(str(llama), dtype=torch.float32)
    plan = next(cache.glob(f"gguf-*/{PLAN_FILE}"))
    plan.write_text(json.dumps({"names": {}, "altered": []}))
    model, _ = load_pretrained(str(llama), dtype=torch.float32)
    assert json.loads(plan.read_text())["names"]
    assert model.model.norm.weight.shape == (64,)


def test_a_copy_without_vocabulary_takes_no_space_for_weights(llama, tmp_path):
    header, copy = read_header(llama), tmp_path / "copy.gguf"
    write_without_vocabulary(header, copy)
    small = read_header(copy)
    assert header.metadata["tokenizer.ggml.tokens"] == VOCAB
    assert "tokenizer.ggml.tokens" not in small.metadata
    assert small.metadata["llama.embedding_length"] == 64
    assert [each.shape for each in small.tensors] == [each.shape for each in header.tensors]
    assert os.stat(copy).st_blocks * 512 < llama.stat().st_size / 4


def test_a_file_without_tokenizer_has_none(tmp_path):
    path = tmp_path / "bare.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    metadata, weights, _ = MODELS["llama"]
    for key, value in metadata.items():
        {int: writer.add_uint32, float: writer.add_float32}[type(value)](f"llama.{key}", value)
    for name, shape in weights.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    for part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        part()
    model, tokenizer = load_pretrained(str(path), dtype=torch.float32)
    assert tokenizer is None
    assert model.config.vocab_size == VOCAB
