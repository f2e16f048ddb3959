"""Tiny random models of many architectures, and their greedy outputs without any cache."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from specdec import SamplingParams

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
SUPPORTED = {
    "llama": GQA,
    "qwen2": GQA,
    "qwen3": GQA,
    "mistral": GQA | {"sliding_window": None},
    "gpt_neox": SMALL,
    "gpt2": SMALL | {"n_inner": 48},
    "phi": SMALL,
    "opt": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma": GQA,
    "mixtral": GQA | {"num_local_experts": 4, "sliding_window": None},
    "gpt_neo": SMALL | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 61, "max_seq_len": 64},
}
PROMPTS = [[5, 9, 8, 7, 5, 9, 8], [3], [11, 4, 11, 4, 11, 4, 11, 4, 11, 4, 11, 4], [7, 7, 30]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def make(kind: str, options: dict, dtype: torch.dtype = torch.float32, attention: str = "sdpa"):
    config = AutoConfig.for_model(kind, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    for parameter in model.parameters():  # the default initialisation is so small that every argmax is the same
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def reference(model, prompt: list[int]) -> list[int]:
    """Greedy continuation without any cache: a full forward for each token."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(GREEDY.max_tokens):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float().argmax()))
    return tokens[len(prompt) :]
