"""Models with weights in 8 or 4 bits: those of GGUF files as they are, and our own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from specdec import Engine
from specdec.drafts import load_with_drafts
from specdec.kernels import cpp
from specdec.kernels.quantized import GROUP, KINDS, dequantize
from specdec.models.causal import CausalLM
from specdec.models.files.bundled import SMOLLM2_135M, bundled_gguf
from specdec.models.files.formats import OWN_QUANTIZATIONS
from specdec.models.files.saving import fingerprint
from specdec.models.fusion import Projection, QuantizedLinear, fuse
from specdec.models.gguf import blocks, checkpoint
from specdec.models.gguf.codes import BLOCK_BYTES, as_quantized
from specdec.models.loading import load_pretrained
from specdec.models.quantization.model import Quantization
from specdec.models.quantization.quantizers import OF_HEAD
from specdec.models.quantization.quantizers import quantize as quantize_weights
from specdec.models.vocabularies import SAMPLE
from tests.helpers import tiny
from tests.helpers.tiny import GREEDY, PROMPTS

Quant = gguf.GGMLQuantizationType
WIDE = tiny.GQA | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
OWN_TYPES = [name for name in OWN_QUANTIZATIONS if name != "auto"]
pytestmark = pytest.mark.skipif(
    not cpp.available(torch.bfloat16), reason="kernels need Linux, a C++ compiler and AVX512-BF16"
)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_the_weights_that_gguf_dequantizes(kind: str) -> None:
    generator = np.random.default_rng(0)
    stored = generator.integers(0, 256, (24, BLOCK_BYTES[kind]), dtype=np.uint8)
    starts = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for start in starts:
        stored[:, start : start + 2] = generator.standard_normal((24, 1)).astype(np.float16).view(np.uint8)
    expected = torch.from_numpy(gguf.dequantize(stored.reshape(1, -1), Quant[kind])).view(6, -1)
    assert torch.equal(dequantize(as_quantized(torch.from_numpy(stored), kind, 6)), expected)


@pytest.mark.parametrize("name", ["q8_0", "q4_1", "q4_0"])
def test_weights_are_quantized_as_gguf_does_it(name: str) -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    blocks = gguf.quants.quantize(weight.numpy(), Quant[name.upper()])
    expected = torch.from_numpy(gguf.dequantize(blocks, Quant[name.upper()]))
    found = dequantize(quantize_weights(weight, name))
    assert torch.equal(found, expected)
    assert (found - weight).abs().max() < weight.abs().max() / (100 if name == "q8_0" else 6)


@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([1e-4, 0.02, 30.0]))
def test_int8_has_one_scale_for_each_row(seed: int, num_rows: int, size: float) -> None:
    """The nearest of 255 multiples of the row's scale, which is its largest weight / 127 in float16."""
    weight = torch.randn(num_rows, 96, generator=torch.Generator().manual_seed(seed)) * size
    weight[0] *= seed % 2  # a row of zeros
    quantized = quantize_weights(weight, "int8")
    for row, codes, scales in zip(weight.tolist(), quantized.codes.tolist(), quantized.scales[0].tolist(), strict=True):
        scale = float(np.float16(np.float32(max(map(abs, row))) / np.float32(127)))
        assert scales == [scale] * 3
        distances = [[abs(weight - scale * code) for code in range(-127, 128)] for weight in row]
        chosen = [abs(weight - scale * (code - 128)) for weight, code in zip(row, codes, strict=True)]
        assert chosen == pytest.approx([min(each) for each in distances], rel=1e-5, abs=1e-9)


@given(st.integers(0, 10**6), st.sampled_from([1e-4, 0.02, 30.0]))
def test_int4_has_at_most_the_squared_error_of_extremes(seed: int, size: float) -> None:
    """Never more than with the scale from a group's extremes, codes are the nearest, and on average much less."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) * size
    weight[0], weight[1, :32] = 0.0, 0.25 * size  # groups of one value
    quantized = quantize_weights(weight, "int4")
    found, extremes = dequantize(quantized), dequantize(quantize_weights(weight, "q4_1"))

    def errors(values: Tensor) -> Tensor:
        return (values - weight).double().square().unflatten(1, (-1, GROUP)).sum(-1)

    assert (errors(found) <= errors(extremes) * (1 + 1e-5) + 1e-12 * size).all()
    assert errors(found).sum() < 0.9 * errors(extremes).sum()
    scales, minima = (each.float().repeat_interleave(GROUP, 1) for each in quantized.scales)
    for code in range(16):
        assert ((found - weight).abs() <= (minima + scales * code - weight).abs() * (1 + 1e-5) + 1e-6 * size).all()


def quantized_model(name: str, dtype: torch.dtype, options: dict[str, Any] = WIDE, kind: str = "llama") -> Any:
    model = tiny.make(kind, options, dtype)
    Quantization(model, name, None, model.device).quantize(model)
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
            of_type = OF_HEAD.get(name, name) if "." not in path else name
            module.weight = nn.Parameter(dequantize(quantize_weights(module.weight, of_type)), requires_grad=False)
    fuse(dense)
    quantized, tokens = (
        CausalLM(quantized_model(name, torch.float32, options, kind)),
        torch.tensor([[5, 9, 8, 7, 3, 1]]),
    )
    expected = CausalLM(dense).forward(tokens, CausalLM(dense).allocate(1, 6)).log_softmax(-1)
    found = quantized.forward(tokens, quantized.allocate(1, 6)).log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-2)
    bits = 8 * quantized.model.base_model.layers[0].down.weight.numel() / (64 * 96)
    assert bits == {"int8": 8.5, "int4": 5, "q8_0": 8.5, "q4_1": 5, "q4_0": 4.5}[name]


def test_speculation_with_quantized_weights_is_bit_identical_to_plain_decoding() -> None:
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
    model = tiny.make(kind, options)
    with pytest.raises(ValueError, match=message):
        Quantization(model, "q8_0", None, model.device).quantize(model)


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
    """The rows of queries and keys are reordered; a part in 16 bits leaves its projection in the model's dtype."""
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


def test_a_projection_in_the_models_dtype_is_not_counted(mixed_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "specdec"):
        load_pretrained(str(mixed_file), dtype=torch.float32, quantization="auto")
    assert "quantization=auto: 6 of 8 linear layers are quantized" in caplog.text


@pytest.mark.parametrize("name", OWN_QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_weights_are_those_of_the_quantized_model(mixed_file: Path, name: str, dtype: torch.dtype) -> None:
    """In float32, weight by weight; "auto" has those of the file, whose head is its embedding in Q8_0."""
    options = {"dtype": dtype, "quantization": name}
    reference, _ = load_pretrained(str(mixed_file), **options, dequantize=True)
    plain, _ = load_pretrained(str(mixed_file), dtype=torch.float32)
    rounded, _ = load_pretrained(str(mixed_file), dtype=dtype)
    assert {weight.dtype for weight in reference.parameters()} == {torch.float32}
    kinds = dict(zip(("self_attn.q_proj", "self_attn.k_proj", "lm_head"), ("Q4_0", "Q5_1", "Q8_0"), strict=True))
    for path, module in reference.named_modules():
        if type(module) is not nn.Linear:
            continue
        exact, given = plain.get_submodule(path).weight, rounded.get_submodule(path).weight
        kind = next((kind for end, kind in kinds.items() if path.endswith(end)), "other")
        own = OF_HEAD.get(name, name) if path == "lm_head" else name
        if name == "auto":
            expected = given.float() if path.endswith(("gate_proj", "up_proj")) else exact
        elif kind.lower() == name:
            expected = exact if path != "lm_head" or own == name else dequantize(quantize_weights(given, own))
        elif kind == "other":
            continue
        elif path == "lm_head" and own == "q8_0":
            expected = dequantize(quantize_weights(given, own))
        else:
            expected = dequantize(quantize_weights(given.float(), own))
        assert torch.equal(module.weight, expected), path
    assert torch.equal(reference.model.embed_tokens.weight, rounded.model.embed_tokens.weight.float())


@pytest.mark.parametrize("name", OWN_QUANTIZATIONS)
def test_quantization_leaves_the_fingerprint(mixed_file: Path, name: str) -> None:
    """Heads recognize their target by it."""
    plain, _ = load_pretrained(str(mixed_file), dtype=torch.bfloat16)
    quantized, _ = load_pretrained(str(mixed_file), dtype=torch.bfloat16, quantization=name)
    assert fingerprint(quantized) == fingerprint(plain)
    assert torch.equal(quantized.lm_head.weight, plain.lm_head.weight)  # heads borrow it


def test_blocks_are_read_without_their_dense_weights(mixed_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights that stay in blocks, no more than the sampled blocks are dequantized."""
    sizes: list[int] = []

    def recorded(stored: Any, kind: str, dtype: torch.dtype) -> Tensor:
        weights = blocks.dequantize(stored, kind, dtype)
        sizes.append(weights.numel())
        return weights

    monkeypatch.setattr(checkpoint, "dequantize", recorded)
    load_pretrained(str(mixed_file), dtype=torch.bfloat16, quantization="auto")
    norms, embedding, gate_up = [64] * 3, 61 * 64, [96 * 64] * 2
    assert sorted(sizes) == sorted([*norms, embedding, *gate_up])


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
