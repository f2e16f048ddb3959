"""Tiny random checkpoints of drafting heads, in the layouts in which they are published.

Sizes: states of 32 numbers, 4 heads of 8 of which 2 have keys and values, features of 3 of the target's 8 layers, and
128 token ids, of which 97 stand for tokens and 40 can be drafted. Names and shapes of tensors, and keys of configs, are
those of the sources that each function names.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers import tiny

WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM = 32, 48, 4, 2, 8
TOKENS, VOCAB, DRAFT_VOCAB = 97, 128, 40
TARGET_LAYERS, STATES, BLOCK, RANK = 8, 3, 4, 6
MASK = TOKENS  # the first id that stands for no token
DEFAULT_LAYERS = (2, 4, 5)  # of 8, by the rule of EAGLE-3

TARGET = tiny.GQA | {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": TARGET_LAYERS,
    "max_position_embeddings": 256,
}
LAYER = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def target(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The transformers model that the heads here draft for."""
    return tiny.make("llama", TARGET | changes, dtype)


@dataclass(frozen=True)
class Checkpoint:
    """Config and tensors of a head. file: name of the pickled file of its format, where one is usual."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    pickled: str = "pytorch_model.bin"

    def write(self, folder: Path, files: str = "safetensors") -> Path:
        """Write it as one "safetensors" file, as "shards" with an index, or "pickled", also in the "legacy" way."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(dict(self.config)))
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        if files == "safetensors":
            save_file(tensors, folder / "model.safetensors")
        elif files == "shards":
            self._write_shards(folder, tensors)
        else:
            torch.save(tensors, folder / self.pickled, _use_new_zipfile_serialization=files == "pickled")
        return folder

    @staticmethod
    def _write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
        names, places = sorted(tensors), {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, folder / file)
            places |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    def with_config(self, **changes: Any) -> Checkpoint:
        """With other keys in its config; None removes one."""
        config = {**self.config, **changes}
        return replace(self, config={key: value for key, value in config.items() if value is not None})

    def with_tensors(self, **changes: Tensor | None) -> Checkpoint:
        """With other tensors, whose names have dots for double underscores; None removes one."""
        tensors = {**self.tensors, **{name.replace("__", "."): value for name, value in changes.items()}}
        return replace(self, tensors={name: value for name, value in tensors.items() if value is not None})

    def renamed(self, old: str, new: str) -> Checkpoint:
        """With another prefix of those tensors that have this one; an empty one is every tensor's."""
        names = {name: new + name.removeprefix(old) if name.startswith(old) else name for name in self.tensors}
        return replace(self, tensors={names[name]: tensor for name, tensor in self.tensors.items()})


@dataclass
class Weights:
    """Random tensors, each a function of its name: what else a checkpoint holds does not change them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def matrix(self, name: str, *shape: int, std: float = 0.3) -> None:
        """A weight; of a bias or a state likewise."""
        self.tensors[name] = torch.randn(shape, generator=_generator(name)) * std

    def norm(self, name: str, width: int = WIDTH) -> None:
        """The weight of a norm, near 1."""
        self.tensors[name] = 1 + 0.1 * torch.randn(width, generator=_generator(name))

    def block(self, prefix: str, *, inputs: int = WIDTH, has_input_norm: bool = True, has_bias: bool = False) -> None:
        """A decoder layer of Llama's. inputs: width of what its queries, keys and values are made of."""
        rows = {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
        for name, number in rows.items():
            self.matrix(f"{prefix}self_attn.{name}.weight", number, inputs)
            if has_bias:
                self.matrix(f"{prefix}self_attn.{name}.bias", number)
        self.matrix(f"{prefix}self_attn.o_proj.weight", WIDTH, HEADS * HEAD_DIM)
        for name in ("gate_proj", "up_proj"):
            self.matrix(f"{prefix}mlp.{name}.weight", MLP, WIDTH)
        self.matrix(f"{prefix}mlp.down_proj.weight", WIDTH, MLP)
        for name in ("input_layernorm",) * has_input_norm + ("post_attention_layernorm",):
            self.norm(f"{prefix}{name}.weight")

    def query_norms(self, prefix: str) -> None:
        """Norms of each head's queries and keys, as Qwen3 has them."""
        for name in ("q_norm", "k_norm"):
            self.norm(f"{prefix}self_attn.{name}.weight", HEAD_DIM)


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def offsets(num_tokens: int = DRAFT_VOCAB, seed: int = 0) -> tuple[Tensor, Tensor]:
    """d2t, int64 [draft vocab], of an ascending choice of token ids, and t2d, bool [vocab]."""
    chosen = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))[:num_tokens].sort().values
    return chosen - torch.arange(num_tokens), torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, chosen, True)


# ---- EAGLE and EAGLE-2


def eagle(*, has_bias: bool = True, has_embedding: bool = True, para_norm: bool = False) -> Checkpoint:
    """SafeAILab/EAGLE `eagle/model/cnets1.py`; vLLM `llama_eagle.py`. para_norm: HASS's norms of both inputs."""
    weights = Weights()
    weights.matrix("fc.weight", WIDTH, 2 * WIDTH)
    if has_bias:
        weights.matrix("fc.bias", WIDTH)
    weights.block("layers.0.", has_input_norm=False)
    if has_embedding:
        weights.tensors["embed_tokens.weight"] = _targets_embedding()
    if para_norm:
        weights.norm("embedding_layernorm.weight")
        weights.norm("hidden_states_layernorm.weight")
    config = LAYER | {"architectures": ["LlamaForCausalLM"], "bias": has_bias}
    return Checkpoint(config | ({"add_para_norm": True} if para_norm else {}), weights.tensors)


def _targets_embedding() -> Tensor:
    return target().get_input_embeddings().weight.detach().clone()


# ---- EAGLE-3

EAGLE3_DIALECTS = ("SafeAILab", "SpecForge", "AngelSlim", "ModelOpt", "DeepSpec", "speculators")


def eagle3(
    dialect: str = "SafeAILab", *, num_layers: int = 1, layer_ids: tuple[int, ...] | None = None, **options: Any
) -> Checkpoint:
    """An EAGLE-3 head in a dialect, one of EAGLE3_DIALECTS.

    layer_ids: as its config gives them, None for those of the dialect. options: keys of the config; `fc_norm` and
    `norm_before_fc` bring their tensors.
    Sources: SafeAILab/EAGLE `eagle/model/cnets.py`; SpecForge `llama3_eagle.py`; NVIDIA/Model-Optimizer
    `hf_spec_export.py`; Tencent/AngelSlim `configs/qwen3/eagle3`; DeepSpec `modeling/eagle3/qwen3`; vLLM speculators
    `models/eagle3/config.py`.
    """
    if dialect == "DeepSpec":
        return _deepspec_eagle3(num_layers, layer_ids or (0, 2, 3, 4, 6), options)
    weights = Weights()
    weights.matrix("fc.weight", WIDTH, STATES * WIDTH)
    first = "midlayer." if dialect in ("SafeAILab", "SpecForge", "AngelSlim") else "layers.0."
    weights.block(first, inputs=2 * WIDTH, has_bias=bool(options.get("attention_bias")))
    weights.norm(f"{first}hidden_norm.weight")
    for index in range(1, num_layers):
        weights.block(f"layers.{index}.")
    if options.get("fc_norm"):
        for index in range(STATES):
            weights.norm(f"fc_norm.{index}.weight")
    if options.get("norm_before_fc"):
        weights.norm("input_norm.weight", STATES * WIDTH)
    weights.norm("norm.weight")
    weights.matrix("lm_head.weight", DRAFT_VOCAB, WIDTH)
    weights.tensors["d2t"], t2d = offsets()
    if dialect != "ModelOpt":
        weights.tensors["t2d"] = t2d
    return Checkpoint(_eagle3_config(dialect, num_layers, layer_ids) | options, weights.tensors)


def p_eagle(dialect: str = "speculators", *, num_layers: int = 2, **options: Any) -> Checkpoint:
    """An EAGLE-3 head with the vector that stands for the features of mask tokens."""
    head, weights = eagle3(dialect, num_layers=num_layers, **options), Weights()
    weights.matrix("mask_hidden", 1, 1, STATES * WIDTH)
    return Checkpoint({**head.config, "mask_token_id": MASK}, {**head.tensors, **weights.tensors})


def _eagle3_config(dialect: str, num_layers: int, layer_ids: tuple[int, ...] | None) -> dict[str, Any]:
    config = LAYER | {"num_hidden_layers": num_layers, "draft_vocab_size": DRAFT_VOCAB}
    ids = {"eagle_aux_hidden_state_layer_ids": list(layer_ids)} if layer_ids else {}
    if dialect == "speculators":
        return (
            wrapped("eagle3", "Eagle3Speculator", LAYER | {"num_hidden_layers": num_layers})
            | {
                "draft_vocab_size": DRAFT_VOCAB,
                "norm_before_residual": False,
                "target_hidden_size": None,
            }
            | ids
        )
    names = {"SafeAILab": "LlamaForCausalLM", "AngelSlim": "Eagle3LlamaForCausalLM"}
    config["architectures"] = [names.get(dialect, "LlamaForCausalLMEagle3")]
    if dialect == "SpecForge":
        config["eagle_config"] = {"use_aux_hidden_state": True} | (ids or _default_ids())
    elif dialect == "ModelOpt":
        flags = {"use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False}
        lengths = {"next_layer_regular": True, "parallel_draft_step": 1, "parallel_draft_heads_num_layers": 1}
        config["eagle_config"] = {"use_aux_hidden_state": True} | (ids or _default_ids()) | flags | lengths
    return config | (ids if dialect in ("SafeAILab", "AngelSlim") else {})


def _default_ids() -> dict[str, Any]:
    return {"eagle_aux_hidden_state_layer_ids": list(DEFAULT_LAYERS)}


def _deepspec_eagle3(num_layers: int, layer_ids: tuple[int, ...], options: Mapping[str, Any]) -> Checkpoint:
    """Five states, the whole vocabulary, and layers each of which reads the embedding."""
    weights = Weights()
    weights.matrix("fc.weight", WIDTH, len(layer_ids) * WIDTH)
    for index in range(num_layers):
        weights.block(f"layers.{index}.", inputs=2 * WIDTH)
        weights.query_norms(f"layers.{index}.")
        weights.norm(f"layers.{index}.hidden_norm.weight")
    weights.norm("norm.weight")
    weights.tensors["embed_tokens.weight"] = _targets_embedding()
    weights.matrix("lm_head.weight", VOCAB, WIDTH)
    own = {"target_layer_ids": list(layer_ids), "num_target_layers": TARGET_LAYERS, "ttt_length": 7}
    own |= {"step_loss_decay": 0.8, "draft_num_hidden_layers": num_layers, "target_model_name_or_path": "org/target"}
    layers = {"model_type": "qwen3", "head_dim": HEAD_DIM, "num_hidden_layers": num_layers}
    config = LAYER | layers | {"architectures": ["Qwen3Eagle3Model"]} | own
    return Checkpoint(config | dict(options), weights.tensors)


def wrapped(algorithm: str, architecture: str, layer: Mapping[str, Any], *, num_tokens: int = 3) -> dict[str, Any]:
    """A speculators config without the keys of the algorithm. Source: vllm-project/speculators `config.py`."""
    proposal = {"proposal_type": "greedy", "speculative_tokens": num_tokens}
    return {
        "architectures": [architecture],
        "speculators_model_type": algorithm,
        "speculators_version": "0.5.0",
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": dict(layer),
        "torch_dtype": "float32",
    }


# ---- DFlash and its relatives

BLOCK_DIALECTS = ("z-lab", "z-lab nested", "speculators")


def dflash(
    dialect: str = "z-lab", *, num_layers: int = 2, layer_ids: tuple[int, ...] = (1, 3, 5), **options: Any
) -> Checkpoint:
    """z-lab/dflash `dflash/model.py`; vllm-project/speculators `models/dflash/config.py`.

    layer_ids: as z-lab counts them: of the layers whose output is read. options: further keys of `dflash_config`, or of
    the config in the speculators dialect.
    """
    config = _block_config("DFlashDraftModel", dialect, num_layers, layer_ids, options)
    return Checkpoint(config, _block_weights(num_layers, len(layer_ids)).tensors)


def _block_weights(num_layers: int, num_states: int) -> Weights:
    weights = Weights()
    weights.matrix("fc.weight", WIDTH, num_states * WIDTH)
    for name in ("hidden_norm", "norm"):
        weights.norm(f"{name}.weight")
    for index in range(num_layers):
        weights.block(f"layers.{index}.")
        weights.query_norms(f"layers.{index}.")
    return weights


def _block_config(
    architecture: str, dialect: str, num_layers: int, layer_ids: tuple[int, ...], options: Mapping[str, Any]
) -> dict[str, Any]:
    layers = {"model_type": "qwen3", "head_dim": HEAD_DIM, "num_hidden_layers": num_layers}
    layer = LAYER | layers | {"layer_types": ["full_attention"] * num_layers}
    if dialect == "speculators":
        states = {"aux_hidden_state_layer_ids": [index + 1 for index in layer_ids]}
        own = {"block_size": BLOCK, "mask_token_id": MASK, "draft_vocab_size": VOCAB, "sample_from_anchor": False}
        return wrapped("dflash", "DFlashSpeculator", layer, num_tokens=BLOCK - 1) | own | states | dict(options)
    inner = {"mask_token_id": MASK, "target_layer_ids": list(layer_ids)} | dict(options)
    outer: dict[str, Any] = {"architectures": [architecture], "num_target_layers": TARGET_LAYERS}
    if dialect == "z-lab nested":
        inner["block_size"] = BLOCK
    else:
        outer["block_size"] = BLOCK
    return layer | outer | {"dflash_config": inner}


def dflash2(*, num_layers: int = 2, group: int = 8, taps: int = 3, top_k: int = 5, **options: Any) -> Checkpoint:
    """DFlash with short convolutions and a selector of candidates. Source: vLLM `qwen3_dflash2.py`."""
    weights = _block_weights(num_layers, STATES)
    for index in range(num_layers):
        for name in ("attention_conv", "mlp_conv"):
            prefix = f"layers.{index}.{name}."
            weights.matrix(f"{prefix}base_kernel", 2, taps, WIDTH)
            weights.matrix(f"{prefix}kernel_projection.weight", 2 * taps * (WIDTH // group), WIDTH, std=0.1)
    for name in ("predecessor_codebook", "successor_codebook"):
        weights.matrix(f"candidate_selector.{name}", VOCAB, RANK)
    weights.matrix("candidate_selector.hidden_projection.weight", RANK, WIDTH)
    own = {"conv_kernel_size": taps, "conv_group_size": group, "selector_rank": RANK, "selector_top_k": top_k}
    own |= {"input_embedding_scale": 1.0, "output_multiplier": 1.0, "final_logit_softcapping": None}
    config = _block_config("DFlash2DraftModel", "z-lab nested", num_layers, (1, 3, 5), own | options)
    return Checkpoint(config, weights.tensors)


MARKOV_KINDS = ("vanilla", "gated", "rnn")


def dspark(
    dialect: str = "DeepSpec", *, markov: str = "vanilla", num_layers: int = 2, confidence_reads_markov: bool = False
) -> Checkpoint:
    """DFlash with own embedding and head, a Markov bias of one of MARKOV_KINDS and a confidence output.

    dialect: "DeepSpec" or "SpecForge". Sources: DeepSpec `modeling/dspark/qwen3`, `markov_head.py`; SpecForge.
    """
    weights = _block_weights(num_layers, STATES)
    weights.tensors["embed_tokens.weight"] = _targets_embedding()
    weights.matrix("lm_head.weight", VOCAB, WIDTH)
    for name in ("markov_w1", "markov_w2"):
        weights.matrix(f"markov_head.{name}.weight", VOCAB, RANK)
    shapes = {"gated": ("gate_proj", RANK, WIDTH + RANK), "rnn": ("joint_proj", 3 * RANK, 2 * RANK + WIDTH)}
    if markov in shapes:
        name, rows, columns = shapes[markov]
        weights.matrix(f"markov_head.{name}.weight", rows, columns)
        weights.matrix(f"markov_head.{name}.bias", rows)
    weights.matrix("confidence_head.proj.weight", 1, WIDTH + RANK * confidence_reads_markov)
    weights.matrix("confidence_head.proj.bias", 1)
    own = {"mask_token_id": MASK, "markov_rank": RANK, "markov_head_type": markov, "enable_confidence_head": True}
    own |= {"confidence_head_with_markov": confidence_reads_markov}
    layers = {"model_type": "qwen3", "head_dim": HEAD_DIM, "num_hidden_layers": num_layers}
    outer = LAYER | layers | {"layer_types": ["full_attention"] * num_layers, "num_target_layers": TARGET_LAYERS}
    outer |= {"block_size": BLOCK, "architectures": ["Qwen3DSparkModel"], "tie_word_embeddings": False}
    states = {"target_layer_ids": [1, 3, 5]}
    if dialect == "SpecForge":
        nested = own | states | {"projector_type": "dspark", "attention_mode": "full"}
        return Checkpoint(outer | {"architectures": ["DFlashDraftModel"], "dflash_config": nested}, weights.tensors)
    return Checkpoint(outer | own | states | {"num_anchors": 2}, weights.tensors)


def domino(*, num_layers: int = 2, gru: int = 10, emb: int = 12, prefix_len: int = 0) -> Checkpoint:
    """DFlash with a recurrent correction of its logits. Source: SpecForge (`projector_type: "domino"`)."""
    weights = _block_weights(num_layers, STATES)
    weights.matrix("prefix_gru.weight_ih_l0", 3 * gru, WIDTH)
    weights.matrix("prefix_gru.weight_hh_l0", 3 * gru, gru)
    weights.matrix("embed_proj.0.weight", emb, WIDTH + gru)
    weights.matrix("embed_proj.2.weight", VOCAB, emb)
    own = {"projector_type": "domino", "emb_dim": emb, "gru_hidden_dim": gru}
    own |= {"pure_draft_prefix_len": prefix_len, "shift_label": False}
    return Checkpoint(_block_config("DFlashDraftModel", "z-lab", num_layers, (1, 3, 5), own), weights.tensors)


def mtp() -> Checkpoint:
    """A multi-token-prediction layer as Qwen names its parts, of the target's own kind."""
    weights = Weights()
    weights.matrix("mtp.fc.weight", WIDTH, 2 * WIDTH)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        weights.norm(f"mtp.{name}.weight")
    weights.block("mtp.layers.0.")
    return Checkpoint(LAYER | {"mtp_num_hidden_layers": 1}, weights.tensors)


def medusa(num_heads: int = STATES) -> Checkpoint:
    """Medusa heads of one residual block each, as FasterDecoding publishes them."""
    weights = Weights()
    for place in range(num_heads):
        weights.matrix(f"{place}.0.linear.weight", WIDTH, WIDTH)
        weights.matrix(f"{place}.0.linear.bias", WIDTH)
        weights.matrix(f"{place}.1.weight", VOCAB, WIDTH)
    return Checkpoint({"medusa_num_heads": num_heads, "medusa_num_layers": 1}, weights.tensors, "medusa_lm_head.pt")


def hydra(num_heads: int = STATES) -> Checkpoint:
    """Grounded perceptrons of one block."""
    weights = Weights()
    for place in range(num_heads):
        for name in ("linear", "res_connection"):
            weights.matrix(f"hydra_mlp.{place}.0.{name}.weight", WIDTH, (place + 2) * WIDTH)
            weights.matrix(f"hydra_mlp.{place}.0.{name}.bias", WIDTH)
        weights.matrix(f"hydra_lm_head.{place}.weight", VOCAB, WIDTH)
    config = {"hydra_num_heads": num_heads, "hydra_num_layers": 1, "hydra_head_arch": "mlp", "grounded_heads": True}
    return Checkpoint(config, weights.tensors, "hydra_lm_head.pt")


def mlp_speculator(num_tokens: int = STATES, inner: int = 24) -> Checkpoint:
    """An accelerator of ibm-fms."""
    weights = Weights()
    for place in range(num_tokens):
        weights.matrix(f"speculator.emb.{place}.weight", VOCAB, inner)
        weights.matrix(f"speculator.proj.{place}.weight", inner, inner if place else WIDTH)
        weights.matrix(f"speculator.head.{place}.weight", VOCAB, inner)
        weights.norm(f"speculator.ln.{place}.weight", inner)
        weights.matrix(f"speculator.ln.{place}.bias", inner)
    config = {"n_predict": num_tokens, "inner_dim": inner, "emb_dim": WIDTH, "vocab_size": VOCAB}
    return Checkpoint(config, weights.tensors)


def everything() -> Iterator[tuple[str, Checkpoint]]:
    """A checkpoint of each format and dialect, with its name."""
    yield "eagle", eagle()
    yield "hass", eagle(para_norm=True)
    yield from ((f"eagle3 {dialect}", eagle3(dialect)) for dialect in EAGLE3_DIALECTS)
    yield "p_eagle", p_eagle()
    yield "mtp", mtp()
    yield from ((f"dflash {dialect}", dflash(dialect)) for dialect in BLOCK_DIALECTS)
    yield "dflash2", dflash2()
    yield from ((f"dspark {kind}", dspark(markov=kind)) for kind in MARKOV_KINDS)
    yield "domino", domino()
    yield "medusa", medusa()
    yield "hydra", hydra()
    yield "mlp_speculator", mlp_speculator()


# ---- oracles: heads that compute exactly what their target does

CODE = (WIDTH - 2) // 2  # numbers that stand for a token in a hidden state
_SHARPNESS = 21.0  # of attention to a single position: the others get less than 1e-20 of it
ORACLE_TARGET = TARGET | {"num_key_value_heads": HEADS, "tie_word_embeddings": False}


def oracle_target() -> Any:
    """A target whose next token depends on its last two, and whose hidden states differ from layer to layer.

    With c(t) the code of token t, 15 numbers that are 1 or -1: embeddings are [c(t), 0, 1, 1]; the first layer reads
    the position before and adds [0, c(t - 1), 0, 0]; each further layer rotates both codes by one place, and the last
    one rotates them back.
    """
    model = target(num_key_value_heads=HEADS, tie_word_embeddings=False)
    random, codes = _generator("oracle"), _codes()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(_embedded(codes))
        model.lm_head.weight.copy_(torch.randn(VOCAB, WIDTH, generator=random) * 0.5)
        model.model.norm.weight.copy_(_final_norm())
        for index, layer in enumerate(model.model.layers):
            changes = torch.zeros(WIDTH, WIDTH)
            if index == 0:
                changes[CODE : 2 * CODE, :CODE] = torch.eye(CODE) * _rms_of_embedding()
            else:
                changes = _rotated(1 if index < TARGET_LAYERS - 1 else -_num_rotations(index)) - torch.eye(WIDTH)
            tensors = _attention_to(1 if index == 0 else 0, changes, WIDTH)
            for name, tensor in tensors.items():
                layer.get_submodule(f"self_attn.{name}").weight.copy_(tensor)
            layer.mlp.down_proj.weight.zero_()
            layer.input_layernorm.weight.fill_(1)
    return model


def oracle_eagle3(
    layers: tuple[int, ...] = (2, 4, 5), *, norm_before_residual: bool = False, feeds_normed: bool = False
) -> Checkpoint:
    """An EAGLE-3 head of the speculators dialect that drafts as `oracle_target` does, if it is read as it is made for.

    layers: of the target, -1 for the state after the final norm. A state is scale * [c(t), c(t - 1), 1, 1].
    """
    scale = _final_norm() if feeds_normed else torch.full((WIDTH,), 2.0)
    weights = Weights()
    weights.block("layers.0.", inputs=2 * WIDTH)
    weights.tensors["fc.weight"] = torch.cat(
        [scale[:, None] * share * _codes_in(layer) for layer, share in zip(layers, (0.7, 0.5, -0.2), strict=True)], 1
    )
    rms = scale.square().mean().sqrt()
    state = rms / scale  # times the normalized state: the codes
    reads = torch.zeros(WIDTH, 2 * WIDTH)  # of [embedding, state], both normalized: 2 * [c(t + 1), c(t), 1, 1]
    reads[:CODE, :CODE] = 2 * torch.eye(CODE) * _rms_of_embedding()
    reads[CODE : 2 * CODE, WIDTH : WIDTH + CODE] = 2 * torch.diag(state[:CODE])
    reads[2 * CODE :, WIDTH + 2 * CODE :] = 2 * torch.diag(state[2 * CODE :])
    residual = torch.eye(WIDTH) * (1 if norm_before_residual else rms)
    reads[:, WIDTH:] -= residual
    attention = _attention_to(0, reads, 2 * WIDTH)
    weights.tensors |= {f"layers.0.self_attn.{name}.weight": tensor for name, tensor in attention.items()}
    weights.tensors["layers.0.mlp.down_proj.weight"] = torch.zeros(WIDTH, MLP)
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        weights.tensors[f"layers.0.{name}.weight"] = torch.ones(WIDTH)
    weights.tensors["norm.weight"] = _final_norm()
    config = wrapped("eagle3", "Eagle3Speculator", LAYER | {"num_key_value_heads": HEADS}) | {
        "draft_vocab_size": VOCAB,
        "norm_before_residual": norm_before_residual,
        "norm_output": feeds_normed,
        "eagle_aux_hidden_state_layer_ids": [TARGET_LAYERS if layer == -1 else layer for layer in layers],
    }
    return Checkpoint(config, weights.tensors)


def oracle_dflash(layer_ids: tuple[int, ...] = (1, 3, 4)) -> Checkpoint:
    """A DFlash head whose first draft is as `oracle_target` would draw it; those after it cannot know what it was.

    Two attention heads read the newest token's code, one position before the first mask; two read the code of the token
    before it from the context. layer_ids: of layers whose output is read.
    """
    weights = _block_weights(1, len(layer_ids))
    weights.tensors["fc.weight"] = torch.cat(
        [share * _codes_in(index + 1) for index, share in zip(layer_ids, (0.7, 0.5, -0.2), strict=True)], 1
    )
    half, constant = HEADS // 2 * HEAD_DIM, 2 * CODE
    reads, writes = torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH, WIDTH)
    reads[: CODE + 1, [*range(CODE), constant]] = torch.eye(CODE + 1) * _rms_of_embedding()
    reads[half : half + CODE, :CODE] = torch.eye(CODE)
    writes[:CODE, :CODE] = writes[CODE : 2 * CODE, half : half + CODE] = torch.eye(CODE)
    writes[:CODE, CODE] = -_codes()[MASK]  # which the residual has
    near, far = (_attention_to(distance, reads, WIDTH) for distance in (1, 2))
    attention = near | {"q_proj": torch.cat([near["q_proj"][:half], far["q_proj"][half:]]), "o_proj": writes}
    weights.tensors |= {f"layers.0.self_attn.{name}.weight": tensor for name, tensor in attention.items()}
    weights.tensors["layers.0.mlp.down_proj.weight"] = torch.zeros(WIDTH, MLP)
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "hidden_norm"):
        weights.tensors[f"{name}.weight"] = torch.ones(WIDTH)
    for name in ("q_norm", "k_norm"):
        weights.tensors[f"layers.0.self_attn.{name}.weight"] = torch.full((HEAD_DIM,), _SHARPNESS)
    weights.tensors["norm.weight"] = _final_norm()
    config = _block_config("DFlashDraftModel", "z-lab", 1, layer_ids, {})
    return Checkpoint(config | {"num_key_value_heads": HEADS}, weights.tensors)


def _codes() -> Tensor:
    return torch.randint(2, (VOCAB, CODE), generator=_generator("codes")) * 2.0 - 1


def _embedded(codes: Tensor) -> Tensor:
    return torch.cat([codes, torch.zeros(len(codes), CODE), torch.ones(len(codes), 2)], 1)


def _rms_of_embedding() -> float:
    """Root mean square of [c(t), 0, 1, 1]; what is read of the normalized embedding is multiplied by it."""
    return float(((CODE + 2) / WIDTH) ** 0.5)


def _final_norm() -> Tensor:
    return 0.5 + torch.rand(WIDTH, generator=_generator("final norm"))


def _num_rotations(layer: int) -> int:
    """How often the codes in the state that enters a layer are rotated."""
    return layer - 1 if 0 < layer < TARGET_LAYERS else 0


def _rotated(places: int) -> Tensor:
    """The matrix that rotates both codes by `places`."""
    matrix = torch.eye(WIDTH)
    for code in (slice(0, CODE), slice(CODE, 2 * CODE)):
        matrix[code, code] = torch.eye(CODE).roll(places, 0)
    return matrix


def _codes_in(layer: int) -> Tensor:
    """What makes [c(t), c(t - 1), 1, 1] of the state that enters a layer, or, for -1, of that after the final norm."""
    matrix = _rotated(-_num_rotations(layer))
    return matrix / _final_norm() if layer == -1 else matrix


def _attention_to(distance: int, reads: Tensor, inputs: int) -> dict[str, Tensor]:
    """Weights of an attention that reads one position, so many before its own, through a matrix.

    Queries and keys are made of a number that is the same in all embeddings, so that rotary angles alone tell positions
    apart.
    """
    angles = distance / 10000.0 ** (torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    key = torch.ones(HEAD_DIM)
    query = torch.cat([angles.cos() + angles.sin(), angles.cos() - angles.sin()])
    of_constant = torch.zeros(inputs)
    of_constant[2 * CODE] = _SHARPNESS
    return {
        "q_proj": torch.outer(query.repeat(HEADS), of_constant),
        "k_proj": torch.outer(key.repeat(HEADS), of_constant),
        "v_proj": reads,
        "o_proj": torch.eye(WIDTH),
    }
