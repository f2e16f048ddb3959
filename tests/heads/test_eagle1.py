"""EAGLE and EAGLE-2 heads in their published formats."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.heads import (
    attend,
    block_shapes,
    check_chain_is_lossless,
    check_greedy_is_lossless,
    feed_forward,
    plain_greedy,
    random_tensors,
    rms,
    write_folder,
)
from torch import Tensor

from specdec import Engine, SamplingParams
from specdec.heads import eagle, eagle3, formats
from specdec.heads.files import HeadFolder
from specdec.models.base import FINAL
from specdec.models.causal import CausalLM
from specdec.runtime.artifacts import LoadError

HIDDEN, VOCAB = 32, 61
LAYER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LAYER |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 64, "vocab_size": VOCAB, "rope_theta": 10_000.0}
LAYER |= {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
BIASES = {f"layers.0.self_attn.{name}_proj.bias": (n,) for name, n in (("q", 32), ("k", 16), ("v", 16))}


@dataclass(frozen=True)
class Dialect:
    """A kind of checkpoint. expected: what must be recognized. names: {beginning: as stored}."""

    expected: str
    further: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_layers: int = 1
    has_input_norm: bool = False
    has_embedding: bool = False
    names: dict[str, str] = field(default_factory=dict)

    def tensors(self, vocab: int = VOCAB) -> dict[str, Tensor]:
        """By canonical names."""
        shapes = {"fc.weight": (HIDDEN, 2 * HIDDEN)} | self.further
        for index in range(self.num_layers):
            shapes |= block_shapes(f"layers.{index}.", HIDDEN, HIDDEN)
        if not self.has_input_norm:
            del shapes["layers.0.input_layernorm.weight"]
        tensors = random_tensors(shapes)
        if self.has_embedding:
            tensors["embed_tokens.weight"] = target(vocab).get_input_embeddings().weight.detach().clone()
        return tensors

    def write(self, folder: Path, vocab: int = VOCAB, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
        def stored(name: str) -> str:
            return next((new + name.removeprefix(old) for old, new in self.names.items() if name.startswith(old)), name)

        named = {stored(name): tensor for name, tensor in (tensors or self.tensors(vocab)).items()}
        return write_folder(folder, LAYER | {"vocab_size": vocab} | config, named)


DIALECTS = {
    "original": Dialect("SafeAILab", {"fc.bias": (HIDDEN,)}, has_embedding=True),
    "without biases": Dialect("SafeAILab"),
    "qkv_bias": Dialect("SafeAILab", BIASES),
    "two layers": Dialect("SafeAILab", num_layers=2),
    "HASS": Dialect("HASS", {"embedding_layernorm.weight": (HIDDEN,), "hidden_states_layernorm.weight": (HIDDEN,)}),
    "speculators": Dialect(
        "speculators",
        {"fc.bias": (HIDDEN,), "embedding_layernorm.weight": (HIDDEN,), "pre_lm_head_layernorm.weight": (HIDDEN,)},
        has_input_norm=True,
        names={"fc.": "fusion_fc.", "layers.0.": "transformer."},
    ),
}
each_dialect = pytest.mark.parametrize("name", DIALECTS)


def target(vocab: int = VOCAB) -> Any:
    model = tiny.make("llama", tiny.GQA | {"vocab_size": vocab, "num_hidden_layers": 4, "max_position_embeddings": 128})
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def load(folder: Path, model: Any) -> eagle.EagleHead:
    return eagle.load(HeadFolder.open(folder), model, "auto")


def reference(dialect: Dialect, embedded: Tensor, features: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """By the format's description: (predicted features, logits) of embeddings and features [n, width]."""
    tensors = dialect.tensors()

    def normed(x: Tensor, name: str) -> Tensor:
        return rms(x, tensors[f"{name}.weight"]) if f"{name}.weight" in tensors else x

    inputs = [normed(embedded, "embedding_layernorm"), normed(features, "hidden_states_layernorm")]
    x = torch.cat(inputs, -1) @ tensors["fc.weight"].T + tensors.get("fc.bias", torch.zeros(()))
    for index in range(dialect.num_layers):
        layer = f"layers.{index}."
        x = x + attend(normed(x, f"{layer}input_layernorm"), tensors, f"{layer}self_attn.", 8)
        x = x + feed_forward(normed(x, f"{layer}post_attention_layernorm"), tensors, f"{layer}mlp.")
    return x, normed(x, "pre_lm_head_layernorm") @ output.T


@each_dialect
def test_a_dialect_is_recognized_and_computes_its_description(name: str, tmp_path: Path) -> None:
    """Committed features, then two drafted tokens after predicted ones."""
    dialect, model = DIALECTS[name], target()
    folder = dialect.write(tmp_path)
    assert eagle.recognize(HeadFolder.open(folder)) == dialect.expected
    assert eagle3.recognize(HeadFolder.open(folder)) is None
    head = load(folder, model)
    assert head.feature_layers == (FINAL,)
    embedding, output = (each.weight.detach() for each in (model.get_input_embeddings(), model.lm_head))
    assert head.embedding.data_ptr() == embedding.data_ptr(), "not a second time in memory"
    features, tokens, cache = torch.randn(7, HIDDEN), torch.randint(VOCAB, (9,)), head.allocate(1, 16)
    with torch.inference_mode():
        hidden = head(head.encode(features[None]), tokens[None, :7], cache)
        cache.num_cached[0] = 7
        for number in range(7, 10):
            guessed, logits = reference(dialect, embedding[tokens[:number]], features, output)
            torch.testing.assert_close(hidden[0, -1], guessed[-1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(head.logits(hidden)[0, -1], logits[-1], rtol=1e-4, atol=1e-4)
            if number < 9:
                features = torch.cat([features, guessed[-1:]])
                hidden = head(hidden[:, -1:], tokens[None, number : number + 1], cache)
                cache.num_cached[0] += 1


@each_dialect
def test_a_dialect_is_checked_by_shapes_alone(name: str, tmp_path: Path) -> None:
    found = formats.recognized(DIALECTS[name].write(tmp_path))
    assert found
    assert f"EAGLE head ({DIALECTS[name].expected}), {DIALECTS[name].num_layers} layer" in found.check(
        target().to("meta")
    )


@each_dialect
def test_joint_distribution_of_a_chain(name: str, tmp_path: Path) -> None:
    check_chain_is_lossless(load(DIALECTS[name].write(tmp_path, 3), target(3)), HIDDEN)


@cache
def plain_outputs() -> list[tuple[int, ...]]:
    return plain_greedy(target())


@each_dialect
@pytest.mark.parametrize("method", ["eagle", "hybrid", "tree"])
@pytest.mark.parametrize("fused", [False, True])
def test_greedy_equals_plain_decoding(name: str, method: str, fused: bool, tmp_path: Path) -> None:
    model = target()
    head = load(DIALECTS[name].write(tmp_path), model)
    if fused:
        head.fuse()
    check_greedy_is_lossless(model, head, method, plain_outputs())


SIGNS = torch.where(torch.arange(HIDDEN) % 2 == 0, 1.0, -1.0)
NEXT = torch.roll(torch.eye(HIDDEN), 1, 0)  # turns the one-hot vector of i into that of i + 1


def counting_target() -> Any:
    """A Llama that continues i with i + 1: its states are one-hot, and its final norm changes the signs of odd ones."""
    model = target(HIDDEN)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(HIDDEN))
        model.model.norm.weight.copy_(SIGNS)
        model.lm_head.weight.copy_(NEXT * SIGNS)
    return model


def oracle(folder: Path) -> Path:
    """A head that knows `counting_target` by its state after the final norm."""
    tensors = DIALECTS["without biases"].tensors()
    zeros = ("layers.0.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight")
    tensors |= {name: torch.zeros_like(tensors[name]) for name in zeros}
    tensors["fc.weight"] = torch.cat([torch.zeros(HIDDEN, HIDDEN), -NEXT], 1)
    return write_folder(folder, LAYER | {"vocab_size": HIDDEN}, tensors)


@pytest.mark.parametrize(("layer", "expected"), [(FINAL, 1.0), (4, 0.0)])
def test_an_oracle_is_accepted_if_and_only_if_it_reads_the_state_after_the_norm(
    layer: int, expected: float, tmp_path: Path
) -> None:
    model = counting_target()
    head = load(oracle(tmp_path), model).with_options({"feature_layers": [layer]})
    engine = Engine(CausalLM(model), method="eagle", draft=head, num_speculative_tokens=2)
    counts = engine.generate([[3, 4]], SamplingParams(temperature=0, max_tokens=31))[0].counts
    assert counts.num_accepted / counts.num_drafted == 1.0 if expected == 1.0 else counts.num_accepted < 20


def test_its_choice_is_the_state_before_or_after_the_norm(tmp_path: Path) -> None:
    head = load(DIALECTS["original"].write(tmp_path), target())
    (choice,) = head.choices()
    assert [reading["feature_layers"] for reading in choice.readings.values()] == [[FINAL], [4]]
    with pytest.raises(ValueError, match="must be feature_layers, 1 of them"):
        head.with_options({"feature_layers": [1, 2]})


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"layers.0.mlp.up_proj.weight": None}, {}, "'layers.0.mlp.up_proj.weight' is missing"),
        ({"res_connection.weight": torch.zeros(2)}, {}, "res_connection.weight .* are tensors that this format"),
        ({"embed_tokens.weight": torch.zeros(40, HIDDEN)}, {}, "embed_tokens.weight=40 .* must be the target's, 61"),
        ({}, {"hidden_size": 64}, "hidden_size=64 of the head .* must be the target's, 32"),
        ({}, {"intermediate_size": 40}, r"has the shape \[48, 32\], but by its config it must have \[40, 32\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    change: dict[str, Any], config: dict[str, Any], message: str, tmp_path: Path
):
    tensors = {name: each for name, each in (DIALECTS["original"].tensors() | change).items() if each is not None}
    with pytest.raises((LoadError, ValueError), match=message):
        load(DIALECTS["original"].write(tmp_path, tensors=tensors, **config), target())
