"""MTP layers among a target's own weights and in folders of their own: each family against its description."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.heads import check_chain_is_lossless, check_greedy_is_lossless, plain_greedy, random_tensors, rms
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec import Engine, SamplingParams
from specdec.drafts import find, kind_in
from specdec.heads import formats, mtp
from specdec.heads.files import HeadFolder
from specdec.models.base import FINAL
from specdec.models.causal import CausalLM
from specdec.runtime.artifacts import LoadError

HIDDEN = 32
SIZES = tiny.GQA | {"num_hidden_layers": 3, "max_position_embeddings": 128, "tie_word_embeddings": False}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
EXPERTS |= {"n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"head_dim": 4, "num_key_value_heads": 4}
GATED = {"layer_types": ["linear_attention", "linear_attention", "full_attention"], "linear_key_head_dim": 8}
GATED |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 8}


@dataclass(frozen=True)
class Family:
    """Checkpoints of one kind. names: of the parts, as stored. block: beginning of the names of the block's tensors."""

    expected: str
    target: str
    names: dict[str, str]
    block: str
    options: dict[str, Any] = field(default_factory=dict)
    embedding_first: bool = True
    feeds_normed: bool = True
    zeroes_first: bool = False
    zero_centered: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def model(self, vocab: int = 61) -> Any:
        model = tiny.make(self.target, SIZES | self.options | {"vocab_size": vocab})
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        return model

    def parts(self, model: Any) -> dict[str, Tensor]:
        """Random weights by canonical names; those of the block are called block.*, as transformers names them."""
        norms = {f"{name}.weight": (HIDDEN,) for name in ("enorm", "hnorm", "norm")}
        shapes = norms | {"eh_proj.weight": (HIDDEN, 2 * HIDDEN)}
        shapes |= {f"block.{name}": tuple(weight.shape) for name, weight in self.layer(model).state_dict().items()}
        return random_tensors(shapes)

    def layer(self, model: Any) -> Any:
        return type(model.get_decoder().layers[-1])(mtp._config(model.config), 0)

    def stored(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {}
        for name, weight in unstacked(parts).items():
            part = name.split(".")[0]
            tensors[self.block + name.removeprefix("block.") if part == "block" else self.names[part] + ".weight"] = (
                weight
            )
        return tensors

    def write(self, folder: Path, model: Any, parts: dict[str, Tensor] | None = None, *, whole: bool = True) -> Path:
        """The layer's tensors among the target's own, or in a folder of their own."""
        tensors = self.stored(self.parts(model) if parts is None else parts)
        model.save_pretrained(folder)
        if whole:
            tensors |= load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | self.config))
        save_file({name: weight.contiguous() for name, weight in tensors.items()}, folder / "model.safetensors")
        return folder


def unstacked(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor per expert, as checkpoints have them."""
    found: dict[str, Tensor] = {}
    for name, weight in parts.items():
        if name.endswith("experts.gate_up_proj"):
            for number, both in enumerate(weight):
                for part, one in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    found[f"{name.removesuffix('gate_up_proj')}{number}.{part}.weight"] = one
        elif re.search(r"\.experts\.down_proj$", name):
            found |= {f"{name.removesuffix('down_proj')}{i}.down_proj.weight": one for i, one in enumerate(weight)}
        else:
            found[name] = weight
    return found


QWEN = {
    "enorm": "mtp.pre_fc_norm_embedding",
    "hnorm": "mtp.pre_fc_norm_hidden",
    "eh_proj": "mtp.fc",
    "norm": "mtp.norm",
}
DEEPSEEK = {name: f"model.layers.3.{name}" for name in ("enorm", "hnorm", "eh_proj")}
DEEPSEEK |= {"norm": "model.layers.3.shared_head.norm"}
LAYERNORMS = {
    "enorm": "token_layernorm",
    "hnorm": "hidden_layernorm",
    "eh_proj": "input_proj",
    "norm": "final_layernorm",
}
OWN = {name: f"layers.0.{name}" for name in ("enorm", "hnorm", "eh_proj")} | {"norm": "layers.0.post_norm"}
SPECULATORS = {key: f"mtp_layers.0.{name}" for key, name in LAYERNORMS.items()}
MIMO = {key: f"model.mtp_layers.0.{name}" for key, name in LAYERNORMS.items()}
EARLIER = {"feeds_normed": False, "zeroes_first": True}
FAMILIES = {
    "Qwen": Family("Qwen", "qwen3", QWEN, "mtp.layers.0."),
    "Qwen with zero-centered norms": Family("Qwen", "gemma", QWEN, "mtp.layers.0.", zero_centered=True),
    "Qwen 3.5": Family("Qwen", "qwen3_5_text", QWEN, "mtp.layers.0.", GATED, zero_centered=True),
    "DeepSeek": Family("DeepSeek", "deepseek_v3", DEEPSEEK, "model.layers.3.",
                       EXPERTS | LATENT, **EARLIER),
    "GLM": Family("DeepSeek", "glm4_moe", DEEPSEEK, "model.layers.3.", EXPERTS, **EARLIER),
    "MiMo": Family("MiMo", "qwen2", MIMO, "model.mtp_layers.0.", embedding_first=False, zeroes_first=True),
    "transformers": Family("transformers", "llama", OWN, "layers.0.mtp_block."),
    "speculators": Family("speculators", "qwen3", SPECULATORS, "mtp_layers.0.",
                          config={"speculators_model_type": "mtp"}),
}  # fmt: skip
each_family = pytest.mark.parametrize("name", FAMILIES)


def load(folder: Path, model: Any) -> mtp.MtpHead:
    return mtp.load(HeadFolder.open(folder), model, "auto")


def reference(
    family: Family, parts: dict[str, Tensor], model: Any
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """By the family's description: embeddings and states [n, width] -> (next states, what the output head reads).

    The block is transformers' own, run without a cache.
    """
    block = family.layer(model).eval()
    block.load_state_dict({k.removeprefix("block."): v for k, v in parts.items() if k.startswith("block.")})
    rotary = model.get_decoder().rotary_emb

    def norm(name: str, x: Tensor) -> Tensor:
        return rms(x, parts[f"{name}.weight"] + family.zero_centered)

    def run(embedded: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        if family.zeroes_first:
            embedded = torch.cat([torch.zeros_like(embedded[:1]), embedded[1:]])
        inputs = [norm("enorm", embedded), norm("hnorm", states)]
        x = torch.cat(inputs if family.embedding_first else inputs[::-1], -1) @ parts["eh_proj.weight"].T
        mask = torch.full((len(x), len(x)), torch.finfo().min).triu(1)[None, None]
        places = torch.arange(len(x))[None]
        x = block(x[None], attention_mask=mask, position_embeddings=rotary(x[None], places), position_ids=places)
        x = (x[0] if isinstance(x, tuple) else x)[0]
        return (norm("norm", x) if family.feeds_normed else x), norm("norm", x)

    return run


@each_family
@pytest.mark.parametrize("whole", [True, False])
def test_a_family_is_recognized_and_computes_its_description(name: str, whole: bool, tmp_path: Path) -> None:
    """Committed states, then two drafted tokens of which the layer's own states are read."""
    family = FAMILIES[name]
    model = family.model()
    parts = family.parts(model)
    folder = family.write(tmp_path, model, parts, whole=whole)
    found = formats.recognized(folder)
    assert found
    assert (found.format.name, found.dialect) == ("mtp", family.expected)
    description = found.check(family.model().to("meta"))
    assert description == f"MTP layer ({family.expected}), 1 layer, draft vocabulary 61 of 61, final features"
    head = load(folder, model)
    assert head.feature_layers == (FINAL,)
    step = reference(family, parts, model)
    embedding, output = (each.weight.detach() for each in (model.get_input_embeddings(), model.lm_head))
    states, tokens, cache = torch.randn(7, HIDDEN), torch.randint(61, (9,)), head.allocate(1, 16)
    with torch.inference_mode():
        head(states[None, :3], tokens[None, :3], cache)
        cache.num_cached[0] = 3
        hidden = head(states[None, 3:], tokens[None, 3:7], cache)
        cache.num_cached[0] = 7
        for number in range(7, 10):
            following, read = step(embedding[tokens[:number]], states)
            torch.testing.assert_close(hidden[0, -1], following[-1], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(head.logits(hidden)[0, -1], read[-1] @ output.T, rtol=1e-3, atol=1e-3)
            if number < 9:
                states = torch.cat([states, following[-1:]])
                hidden = head(hidden[:, -1:], tokens[None, number : number + 1], cache)
                cache.num_cached[0] += 1


@each_family
def test_joint_distribution_of_a_chain(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].model(3)
    check_chain_is_lossless(load(FAMILIES[name].write(tmp_path, model), model), HIDDEN)


@cache
def plain_outputs(name: str) -> list[tuple[int, ...]]:
    return plain_greedy(FAMILIES[name].model())


@each_family
@pytest.mark.parametrize("method", ["mtp", "hybrid", "tree"])
def test_greedy_equals_plain_decoding(name: str, method: str, tmp_path: Path) -> None:
    if (name, method) == ("Qwen 3.5", "tree"):
        pytest.skip("recurrent layers take no trees, see tests/models/test_recurrent.py")
    model = FAMILIES[name].model()
    head = load(FAMILIES[name].write(tmp_path, model), model)
    head.fuse()
    check_greedy_is_lossless(model, head, method, plain_outputs(name))


def test_the_target_and_its_layer_from_one_folder(tmp_path: Path) -> None:
    """transformers leaves the layer out; its folder is named once more, as the draft."""
    model = FAMILIES["Qwen"].model()
    folder = str(FAMILIES["Qwen"].write(tmp_path, model))
    assert kind_in(folder) == "mtp"
    engine = Engine.load(folder, method="mtp", draft=folder, num_speculative_tokens=2, dtype="float32")
    plain = Engine(CausalLM(model))
    params = SamplingParams(temperature=0, max_tokens=16)
    found = engine.generate([[5, 9, 8]], params)[0]
    assert found.token_ids == plain.generate([[5, 9, 8]], params)[0].token_ids
    assert found.counts.num_drafted > 10


def test_the_targets_own_layer_is_the_default_draft(tmp_path: Path) -> None:
    family = FAMILIES["Qwen"]
    folder = str(family.write(tmp_path / "with", family.model()))
    engine = Engine.load(folder, method="mtp", dtype=torch.float32)
    assert engine.generate([[5, 9, 8]], SamplingParams(max_tokens=16))[0].counts.num_drafted > 0
    family.model().save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match=r'method="mtp" needs a draft \(mtp\)'):
        Engine.load(str(tmp_path / "without"), method="mtp", dtype=torch.float32)


def test_a_smaller_model_with_a_layer_of_its_own_is_a_draft_model(tmp_path: Path) -> None:
    """It is an MTP head for itself only; the layer alone, in a folder without the model, stays a head."""
    family = FAMILIES["Qwen"]
    whole = str(family.write(tmp_path / "whole", family.model()))
    alone = str(family.write(tmp_path / "alone", family.model(), whole=False))
    assert find(whole, target=whole).kind == "mtp"
    assert find(whole, target="another").kind == "model"
    assert find(alone, target="another").kind == "mtp"


def test_its_choices_hold_what_a_checkpoint_does_not_record(tmp_path: Path) -> None:
    model = FAMILIES["MiMo"].model()
    head = load(FAMILIES["MiMo"].write(tmp_path, model), model)
    firsts = {key: value for choice in head.choices() for key, value in next(iter(choice.readings.values())).items()}
    assert firsts == {"feature_layers": [FINAL], "embedding_first": False, "feeds_normed": True}
    other = head.with_options({"embedding_first": True, "feature_layers": [3]})
    assert (other.feature_layers, other.wiring.embedding_first, head.wiring.embedding_first) == ((3,), True, False)
    with pytest.raises(ValueError, match="must be 1 layer"):
        head.with_options({"feature_layers": [1, 2]})
    with pytest.raises(ValueError, match="must be of embedding_first, feature_layers"):
        head.with_options({"order": 1})


# ---- an oracle

NEXT = torch.roll(torch.eye(HIDDEN), 1, 0)  # turns the one-hot vector of i into that of i + 1
SIGNS = torch.where(torch.arange(HIDDEN) % 2 == 0, 1.0, -1.0)


def counting_target() -> Any:
    """A Qwen3 that continues i with i + 1; its final norm changes the signs of odd states."""
    model = FAMILIES["Qwen"].model(HIDDEN)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(HIDDEN))
        model.model.norm.weight.copy_(SIGNS)
        model.lm_head.weight.copy_(NEXT * SIGNS)
    return model


def oracle(folder: Path, model: Any) -> Path:
    """It reads the state alone: the projection turns that of i into that of i + 1, whose sign is the other one."""
    parts = FAMILIES["Qwen"].parts(model)
    parts |= {f"{name}.weight": torch.ones(HIDDEN) for name in ("enorm", "hnorm", "norm")}
    parts |= {
        name: torch.zeros_like(parts[name]) for name in ("block.self_attn.o_proj.weight", "block.mlp.down_proj.weight")
    }
    parts["eh_proj.weight"] = torch.cat([torch.zeros(HIDDEN, HIDDEN), -NEXT], 1)
    return FAMILIES["Qwen"].write(folder, model, parts)


@pytest.mark.parametrize(
    ("options", "expected"), [({}, True), ({"feature_layers": [3]}, False), ({"embedding_first": False}, False)]
)
def test_an_oracle_is_accepted_if_and_only_if_it_is_read_rightly(options, expected: bool, tmp_path: Path) -> None:
    model = counting_target()
    head = load(oracle(tmp_path, model), model).with_options(options)
    engine = Engine(CausalLM(model), method="mtp", draft=head, num_speculative_tokens=2)
    counts = engine.generate([[3, 4]], SamplingParams(temperature=0, max_tokens=31))[0].counts
    assert (counts.num_accepted == counts.num_drafted) == expected
    assert expected or counts.num_accepted < 0.6 * counts.num_drafted


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, "'norm.weight' is missing in the head"),
        ({"layers.0.self_attn.k_norm.weight": torch.ones(4)}, r"'layers.0.self_attn.k_norm.weight' .* the shape \[4\]"),
        ({"layers.0.self_attn.sinks": torch.ones(4)}, "sinks of the head .* are tensors that this format does not"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = FAMILIES["Qwen"].model()
    folder = FAMILIES["Qwen"].write(tmp_path, model)
    tensors = load_file(folder / "model.safetensors") | {f"mtp.{name}": each for name, each in change.items()}
    save_file({name: each for name, each in tensors.items() if each is not None}, folder / "model.safetensors")
    with pytest.raises(LoadError, match=message):
        load(folder, model)


def test_a_layer_of_another_architecture_is_refused(tmp_path: Path) -> None:
    """A block with experts for a dense target."""
    model = FAMILIES["GLM"].model()
    folder = FAMILIES["GLM"].write(tmp_path, model)
    with pytest.raises(LoadError, match=r"'layers\.0\.mlp\.gate_proj.weight' is missing"):
        load(folder, FAMILIES["transformers"].model())


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    model = FAMILIES["GLM"].model()
    folder = FAMILIES["GLM"].write(tmp_path, model)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.experts.1.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LoadError, match=r"layers\.0\.mlp\.experts\.1\.up_proj.weight is missing"):
        load(folder, model)


def test_a_model_without_such_layers_is_no_head(tmp_path: Path) -> None:
    FAMILIES["Qwen"].model().save_pretrained(tmp_path)
    assert formats.recognized(tmp_path) is None
