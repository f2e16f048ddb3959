"""Tiny random models of any architecture in transformers, made from the fields that its configuration has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, WINDOW = 32, 4, 2, 8, 61, 16

# sizes by the names that configurations have for them; those that a configuration lacks are left out
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "d_ff", "dim_ff", "dff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "block_ff_dim", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), KV_HEADS),
    **dict.fromkeys(("head_dim", "dim_head", "d_kv", "v_head_dim"), HEAD_DIM),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("sliding_window", "window_size"), WINDOW),
    **{"qk_nope_head_dim": HEAD_DIM, "qk_rope_head_dim": 4, "n_group": 1, "topk_group": 1, "query_pre_attn_scalar": 8},
    **{"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def config(kind: str, **options: Any) -> Any:
    """A tiny configuration of a model type. options: in place of the sizes above, or of fields that have none."""
    defaults = AutoConfig.for_model(kind)
    known = {*defaults.to_dict(), *getattr(defaults, "attribute_map", {})}
    sizes = {name: size for name, size in _SIZES.items() if name in known and not _is_off(defaults, name)}
    return AutoConfig.for_model(kind, **sizes | _OPTIONS.get(kind, {}) | options)


def _is_off(defaults: Any, name: str) -> bool:
    """Whether a window or a rank is None by default, which says that the model has none."""
    return name in ("sliding_window", "q_lora_rank") and getattr(defaults, name, None) is None


def make(made: Any, seed: int = 0, *, attention: str = "sdpa") -> Any:
    """A random float32 model of a configuration, in eval mode."""
    auto = AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(made, dtype=torch.float32, attn_implementation=attention).eval()
    for parameter in model.parameters():  # the default initialization is so small that every argmax is the same
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


_MLA = {"num_key_value_heads": HEADS, "head_dim": 4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), _MLA),
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    **dict.fromkeys(("gptj", "codegen"), {"rotary_dim": 4}),
    "longcat_flash": _MLA | {"n_routed_experts": 4, "zero_expert_num": 2},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), _LINEAR),
    "gemma4_text": _MIXED | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "per_layer_config": {"1": {"head_dim": 16}}},
    **dict.fromkeys(("gemma2", "gemma3_text", "gpt_oss", "cohere2", "olmo3"), _MIXED),
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"],
                    "linear_head_dim": 8, "linear_num_heads": 4, "num_key_value_heads": 4, "num_experts_per_token": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 8,
               "mamba_headdim": 8, "mamba_d_state": 8, "chunk_size": 8, "attention_head_dim": 16, "attention_hidden_size": 64,
               "num_key_value_heads": 4, "kv_channels": 8, "num_query_groups": 4, "use_mamba_kernels": False},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
                   "moe_shared_expert_intermediate_size": 16, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": HIDDEN, "attention_window_size": WINDOW},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": WINDOW, "floor_scale": 8},
}
