"""Draft models whose embeddings are projections of the target's, so that they need not be stored.

A folder holds the layers and two projections; `materialize` combines it with the target into an ordinary transformers
folder that any engine can load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from specdec.models.files.saving import fingerprint, save_weights, write_config

WEIGHTS_FILE = "derived.safetensors"
BODY = "body."  # prefix of the layers' weights, which are named as in transformers' LlamaModel


def save_derived(folder: Path, config: Any, weights: dict[str, Tensor], target: Any, about: dict[str, Any]) -> None:
    """Write a draft. config: its LlamaConfig. weights: `body.*`, `project_in.weight` and `project_out.weight`,
    float [width, target's hidden]. target: the transformers model. about: further facts for its card.
    """
    record = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": False}
    write_config(folder, config.to_diff_dict() | record | {"specdec": {"target": fingerprint(target)} | about})
    save_weights(folder, WEIGHTS_FILE, weights)


@torch.inference_mode()
def materialize(folder: Path, target: Any, tokenizer: Any, out: Path) -> None:
    """Write a folder of `save_derived` as an ordinary LlamaForCausalLM with the target's tokenizer.

    Raises ValueError if the draft was trained for another target.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder)
    recorded = config.specdec.pop("target")
    if (own := fingerprint(target)) != recorded:
        raise ValueError(
            f"fingerprint={recorded} recorded in the draft {str(folder)!r} must match the target's weights, {own}; "
            "use the model that the draft was trained for, or train a draft for this one"
        )
    weights = load_file(folder / WEIGHTS_FILE)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    state = {name.replace(BODY, "model.", 1): value for name, value in weights.items() if name.startswith(BODY)}
    state["model.embed_tokens.weight"] = _projected(target.get_input_embeddings(), weights["project_in.weight"])
    state["lm_head.weight"] = _projected(target.get_output_embeddings(), weights["project_out.weight"])
    model.load_state_dict(state)
    model.generation_config = target.generation_config
    model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)


def _projected(embedding: Any, projection: Tensor) -> Tensor:
    projected: Tensor = (embedding.weight.float() @ projection.float().T).bfloat16()
    return projected
