"""Models with weights in 8 or 4 bits: those of GGUF files as they are, and our own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from specdec import Engine
from specdec.drafts import load_with_drafts
from specdec.kernels import cpp
from specdec.kernels.quantized import GROUP, KINDS, Quantized
from specdec.models.causal import CausalLM
from specdec.models.files.bundled import SMOLLM2_135M, bundled_gguf
from specdec.models.files.formats import OWN_QUANTIZATIONS
from specdec.models.fusion import Projection, QuantizedLinear, fuse
from specdec.models.gguf.codes import BLOCK_BYTES, as_quantized
from specdec.models.gguf.codes import quantize as quantize_weights
from specdec.models.loading import load_pretrained
from specdec.models.quantization import quantize_model
from specdec.models.vocabularies import SAMPLE
from tests.helpers import tiny
from tests.helpers.tiny import GREEDY, PROMPTS

Quant = gguf.GGMLQuantizationType
WIDE = tiny.GQA | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
OWN_TYPES = [name for name in OWN_QUANTIZATIONS if name != "auto"]
pytestmark = pytest.mark.skipif(
    not cpp.available(torch.bfloat16), reason="kernels need Linux, a C++ compiler and AVX512-BF16"
)


def values(quantized: Quantized) -> Tensor:
    """The weights that codes and scales stand for, in float64."""
    codes = quantized.codes.double() - KINDS[quantized.kind].zero
    first, *second = (each.double() for each in quantized.scales)
    of_supers = [each.double().repeat_interleave(8, 1) for each in quantized.of_supers]
    if quantized.kind == "Q6_K":
        scales = torch.stack([first, second[0]], -1).flatten(1) * of_supers[0].repeat_interleave(2, 1)
        return codes * scales.repeat_interleave(GROUP // 2, 1)
    if of_supers:
        first, second = first * of_supers[0], [-second[0] * of_supers[1]]
    weights = codes * first.repeat_interleave(GROUP, 1)
    return weights + second[0].repeat_interleave(GROUP, 1) if second else weights


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_the_weights_that_gguf_dequantizes(kind: str) -> None:
    generator = np.random.default_rng(0)
    stored = generator.integers(0, 256, (24, BLOCK_BYTES[kind]), dtype=np.uint8)
    starts = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for start in starts:
        stored[:, start : start + 2] = generator.standard_normal((24, 1)).astype(np.float16).view(np.uint8)
    expected = torch.from_numpy(gguf.dequantize(stored.reshape(1, -1), Quant[kind])).view(6, -1).double()
    # in float32, gguf rounds each weight; kinds with minima nearly cancel
    torch.testing.assert_close(values(as_quantized(torch.from_numpy(stored), kind, 6)), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", OWN_TYPES)
def test_weights_are_quantized_as_gguf_does_it(name: str) -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    blocks = gguf.quants.quantize(weight.numpy(), Quant[name.upper()])
    expected = torch.from_numpy(gguf.dequantize(blocks, Quant[name.upper()])).double()
    found = values(quantize_weights(weight, name.upper()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found - weight).abs().max() < weight.abs().max() / (100 if name == "q8_0" else 6)


def quantized_model(name: str, dtype: torch.dtype, options: dict[str, Any] = WIDE, kind: str = "llama") -> Any:
    model = tiny.make(kind, options, dtype)
    quantize_model(model, name, None)
    fuse(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OWN_TYPES)
def test_a_token_does_not_depend_on_its_neighbours(name: str, dtype: torch.dtype) -> None:
    """The same bits however many tokens a call has, whatever the rows beside it hold."""
    model = quantized_model(name, dtype)
    assert all(layer.kernel.qkv.num_parts == 3 for layer in model.base_model.layers)
    lm = CausalLM(model)
    tokens = torch.randint(3, 61, (3, 40), generator=torch.Generator().manual_seed(1))
    alone = lm.forward(tokens[:1], lm.allocate(1, 40))
    for width in (*range(1, 17), 29):
        cache, pieces = lm.allocate(3, 60), []
        cache.num_cached[:] = [0, 7, 11]
        for start in range(0, 40, width):
            pieces.append(lm.forward(tokens[:, start : start + width], cache))
            cache.num_cached[:] = [length + pieces[-1].shape[1] for length in cache.num_cached]
        assert torch.equal(torch.cat(pieces, 1)[:1], alone)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("name", OWN_TYPES)
def test_a_quantized_model_is_the_model_of_its_dequantized_weights(name: str, kind: str) -> None:
    options = WIDE | {"attention_bias": True, "mlp_bias": True} if kind == "llama" else WIDE
    dense = tiny.make(kind, options)
    for path, module in dense.named_modules():
        if type(module) is nn.Linear:
            of_type = "Q8_0" if "." not in path else name.upper()
            module.weight = nn.Parameter(values(quantize_weights(module.weight, of_type)).float(), requires_grad=False)
    fuse(dense)
    quantized, tokens = (
        CausalLM(quantized_model(name, torch.float32, options, kind)),
        torch.tensor([[5, 9, 8, 7, 3, 1]]),
    )
    expected = CausalLM(dense).forward(tokens, CausalLM(dense).allocate(1, 6)).log_softmax(-1)
    found = quantized.forward(tokens, quantized.allocate(1, 6)).log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-2)
    bits = 8 * quantized.model.base_model.layers[0].down.weight.numel() / (64 * 96)
    assert bits == {"q8_0": 8.5, "q4_1": 5, "q4_0": 4.5}[name]


def test_speculation_with_quantized_weights_has_the_bits_of_plain_decoding() -> None:
    model, longer = quantized_model("q4_1", torch.bfloat16), replace(GREEDY, max_tokens=40)
    plain = Engine(CausalLM(model)).generate(PROMPTS, longer)
    drafted = Engine(CausalLM(model), method="ngram", num_speculative_tokens=5, max_batch_size=3)
    completions = drafted.generate(PROMPTS, longer)
    assert [c.token_ids for c in completions] == [c.token_ids for c in plain]
    assert sum(c.counts.num_drafted for c in completions) > 5


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gpt2", tiny.SUPPORTED["gpt2"], "quantization='q8_0' requires layers that .* GPT2LMHeadModel has others"),
        ("llama", WIDE | {"intermediate_size": 80}, "multiple of 32 inputs, but model.layers.0.mlp.down_proj has 80"),
    ],
)
def test_models_that_cannot_be_quantized_are_named(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_model(tiny.make(kind, options), "q8_0", None)


# ---- GGUF files


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with several kinds of weights, as in a Q4_K_M file, and a head that is the embedding."""
    sizes: dict[str, Any] = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "head_count": 2,
        "head_count_kv": 1,
        "layer_norm_rms_eps": 1e-5,
        "rope_freq_base": 1e4,
        "rope_dimension_count": 32,
        "vocab_size": 61,
    }
    path = tmp_path_factory.mktemp("gguf") / "mixed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, size in sizes.items():
        getattr(writer, f"add_{name}")(size)
    for name, (shape, kind) in _stored().items():
        weight = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quantize(weight, Quant[kind]), raw_dtype=Quant[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored() -> dict[str, tuple[tuple[int, ...], str]]:
    block: dict[str, tuple[tuple[int, ...], str]] = {
        "attn_q": ((64, 64), "Q4_0"),
        "attn_k": ((32, 64), "Q5_1"),
        "attn_v": ((32, 64), "Q8_0"),
        "attn_output": ((64, 64), "Q5_0"),
        "ffn_gate": ((96, 64), "Q4_1"),
        "ffn_up": ((96, 64), "F16"),
        "ffn_down": ((64, 96), "Q4_1"),
        "attn_norm": ((64,), "F32"),
        "ffn_norm": ((64,), "F32"),
    }
    ends = {"token_embd.weight": ((61, 64), "Q8_0"), "output_norm.weight": ((64,), "F32")}
    return ends | {f"blk.0.{name}.weight": entry for name, entry in block.items()}


def test_a_file_is_decoded_in_its_own_types(mixed_file: Path) -> None:
    """The rows of queries and keys are reordered; a part in 16 bits leaves its projection as it was."""
    quantized, _ = load_pretrained(str(mixed_file), dtype=torch.float32, quantization="auto")
    kinds = {
        name.split(".")[-1]: module.packed.kind
        for name, module in quantized.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    assert kinds == {
        "q_proj": "Q4_0",
        "k_proj": "Q5_1",
        "v_proj": "Q8_0",
        "o_proj": "Q5_0",
        "gate_proj": "Q4_1",
        "down_proj": "Q4_1",
        "lm_head": "Q8_0",
    }
    dense, _ = load_pretrained(str(mixed_file), dtype=torch.float32)
    tokens = torch.tensor([[5, 9, 8, 7, 3, 1]])
    found, expected = (_log_probs(model, tokens) for model in (quantized, dense))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-2)
    layer = quantized.base_model.layers[0]
    assert [p.kernel.num_parts for p in (layer.qkv, layer.output, layer.gate_up, layer.down)] == [3, 1, 0, 1]
    assert isinstance(quantized.lm_head, Projection)


def _log_probs(model: Any, tokens: Tensor) -> Tensor:
    fuse(model)
    lm = CausalLM(model)
    return lm.forward(tokens, lm.allocate(1, tokens.shape[1])).log_softmax(-1)


def test_weights_that_are_not_those_of_the_file_are_noticed(mixed_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.models.gguf.stored import StoredWeights

    monkeypatch.setattr(StoredWeights, "_row_order", lambda self, stored: torch.arange(stored.shape[0]))
    with pytest.raises(RuntimeError, match=r"q_proj must have the weights blk\.0\.attn_q\.weight of its GGUF file"):
        load_pretrained(str(mixed_file), dtype=torch.float32, quantization="auto")


def test_the_bundled_file_has_the_distribution_of_its_dequantized_weights() -> None:
    """Total variation per token from float32; measured in float32: 0.0002 on average and 0.0009 at the most.

    In bfloat16, where rounded hidden states cause most of it, at most a tenth more than dequantized (measured: equal).
    """
    path = str(bundled_gguf(SMOLLM2_135M))
    ids = load_pretrained("smollm2-135m", dtype=torch.bfloat16)[1](SAMPLE).input_ids[:128]

    def probs(dtype: torch.dtype, quantization: str | None) -> Tensor:
        options = {"device": "cpu", "load_format": "auto", "dtype": dtype, "quantization": quantization}
        model: Any = load_with_drafts(path, [], **options)[0]
        return model.forward(torch.tensor([ids]), model.allocate(1, len(ids)))[0].double().softmax(-1)

    exact = probs(torch.float32, None)

    def away(dtype: torch.dtype, quantization: str | None) -> Tensor:
        return (probs(dtype, quantization) - exact).abs().sum(-1) / 2

    assert away(torch.float32, "auto").max() < 0.003
    dequantized, stored = (away(torch.bfloat16, each).mean() for each in (None, "auto"))
    assert stored < 1.1 * dequantized < 0.04
