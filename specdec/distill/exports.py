"""Trained heads as folders in the dialects in which such heads are published, which vLLM, SGLang and specdec load.

Sources: SafeAILab/EAGLE `eagle/model/cnets.py`; vllm-project/speculators `config.py` and `models/*/config.py`;
z-lab/dflash `dflash/model.py`; vLLM `qwen3_next_mtp.py`, `llama_eagle3.py` and
`transformers_utils/configs/speculators`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.heads.blocks.backbone import BlockModule
from specdec.heads.eagle3 import Eagle3Head
from specdec.heads.mtp import MtpHead
from specdec.heads.p_eagle import PEagleHead
from specdec.heads.sequential import HeadModule
from specdec.models.base import FINAL
from specdec.models.files.saving import fingerprint, save_weights, write_config

SPECULATORS = "speculators"
DIALECTS = {
    "eagle3": ("SafeAILab", SPECULATORS),
    "p_eagle": (SPECULATORS, "SafeAILab"),
    "mtp": ("Qwen", SPECULATORS),
    "dflash": ("z-lab", SPECULATORS),
}
_ALGORITHMS = {"eagle3": "eagle3", "p_eagle": "peagle", "mtp": "mtp", "dflash": "dflash"}
_SPECULATORS_VERSION = "0.5.0"  # whose keys these are
_ARCHITECTURES = {
    "eagle3": "Eagle3Speculator",
    "p_eagle": "PEagleSpeculator",
    "mtp": "MTPDraftModel",
    "dflash": "DFlashSpeculator",
}
_LAYERNORMS = {  # of an MTP layer in the speculators dialect
    **{"enorm.": "token_layernorm.", "hnorm.": "hidden_layernorm.", "eh_proj.": "input_proj."},
    **{"norm.": "final_layernorm.", "layers.0.": ""},
}
_QWEN = {"enorm.": "pre_fc_norm_embedding.", "hnorm.": "pre_fc_norm_hidden.", "eh_proj.": "fc."}


def export(
    head: Any, folder: Path, model: Any, dialect: str, about: Mapping[str, Any], *, shares_output: bool = False
) -> None:
    """Write a trained head that is not fused.

    model: its transformers target. dialect: one of DIALECTS of its format. about: further entries of the config's
    "specdec". shares_output: leave out an output head that is the target's; specdec takes it from the target, vLLM
    does not where the draft vocabulary is not the whole.
    Raises ValueError for an unknown dialect, and for a head whose own output head would be left out.
    """
    check_dialect(head.format, dialect)
    _check_layers(head, model, dialect)
    is_trained = isinstance(head.output, torch.nn.Parameter)
    if shares_output and is_trained:
        raise ValueError("shares_output=True must go with the target's output head, but the head's own was trained")
    config = _speculators(head, model) if dialect == SPECULATORS else _published(head, model)
    config["specdec"] = {"target": fingerprint(model), **about}
    write_config(folder, config)
    tensors = _named(head, dialect)
    if head.format in ("eagle3", "p_eagle"):
        tensors |= _vocabulary(head)
        tensors |= {} if shares_output else {"lm_head.weight": head.output}
    elif is_trained:
        tensors |= {"lm_head.weight": head.output}
    save_weights(folder, "model.safetensors", tensors)


def check_dialect(head_format: str, dialect: str) -> None:
    """Raise ValueError unless heads of a format can be written in a dialect."""
    if dialect not in (known := DIALECTS[head_format]):
        raise ValueError(f"dialect={dialect!r} must be one of {', '.join(known)} for format={head_format!r}")


def _check_layers(head: HeadModule, model: Any, dialect: str) -> None:
    """Raise ValueError for feature layers that the config of a dialect cannot name."""
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    unnamed = {
        "Qwen": (),
        SPECULATORS: (FINAL,) * (head.format != "mtp"),
        "z-lab": (num_layers,),
        "SafeAILab": (FINAL,),
    }
    if found := set(unnamed[dialect]) & set(head.feature_layers):
        raise ValueError(
            f"feature_layers={list(head.feature_layers)} must be without {sorted(found)}, which the {dialect} dialect "
            "cannot name; train on other layers, or export in another dialect"
        )


def _named(head: HeadModule, dialect: str) -> dict[str, Tensor]:
    """The head's weights by the names of a dialect, but its output head."""
    weights = {name: weight for name, weight in head.state_dict().items() if name != "output"}
    if isinstance(head, MtpHead):
        prefix, names = ("mtp.", _QWEN) if dialect == "Qwen" else ("mtp_layers.0.", _LAYERNORMS)
        return {prefix + _renamed(name, names): weight for name, weight in weights.items()}
    if dialect == "SafeAILab":
        return {_renamed(name, {"layers.0.": "midlayer."}): weight for name, weight in weights.items()}
    return weights


def _renamed(name: str, names: Mapping[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name)


def _vocabulary(head: HeadModule) -> dict[str, Tensor]:
    """d2t, int64 [draft vocab], offsets to token ids, and t2d, bool [vocab]."""
    tokens = head.draft_vocabulary.cpu()
    known = torch.zeros(head.vocab_size, dtype=torch.bool).index_fill(0, tokens, True)
    return {"d2t": tokens - torch.arange(len(tokens)), "t2d": known}


# ---- configs


def _layers(head: HeadModule) -> dict[str, Any]:
    """The config of the layers, with rotary settings as transformers 5 and as earlier versions name them."""
    config: dict[str, Any] = head.config.to_dict()
    unwanted = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "quantization_config")
    config = {name: value for name, value in config.items() if name not in unwanted and value is not None}
    rope = dict(config.get("rope_parameters") or {})
    kind, theta = rope.pop("rope_type", "default"), rope.pop("rope_theta", None)
    config |= {} if theta is None else {"rope_theta": theta}
    config |= {} if kind == "default" else {"rope_scaling": {"rope_type": kind, **rope}}
    return config | {"vocab_size": head.vocab_size, "torch_dtype": "bfloat16"}


def _published(head: Any, model: Any) -> dict[str, Any]:
    """The config of a head in the dialect of the program that its format comes from."""
    config = _layers(head)
    if isinstance(head, BlockModule):
        return config | _z_lab(head, model)
    if isinstance(head, MtpHead):
        return config | {"architectures": ["MTPDraftModel"], "mtp_num_hidden_layers": 1, "num_hidden_layers": 1}
    layers = {"eagle_aux_hidden_state_layer_ids": list(head.feature_layers)}
    own = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": len(head.draft_vocabulary)} | layers
    return config | own | ({"ptd_token_id": head.mask_token} if isinstance(head, PEagleHead) else {})


def _z_lab(head: BlockModule, model: Any) -> dict[str, Any]:
    """z-lab counts the layers whose output is read."""
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    ids = [num_layers - 1 if layer == FINAL else layer - 1 for layer in head.feature_layers]
    return {
        "architectures": ["DFlashDraftModel"],
        "block_size": head.settings.block_size,
        "num_target_layers": num_layers,
        "dflash_config": {"mask_token_id": head.settings.mask_token, "target_layer_ids": ids},
    }


def _speculators(head: Any, model: Any) -> dict[str, Any]:
    """A speculators config: the config of the layers, wrapped, and the algorithm's own keys."""
    algorithm, num_tokens = _ALGORITHMS[head.format], head.max_tokens or 3
    proposal = {"proposal_type": "greedy", "speculative_tokens": num_tokens}
    verifier = {"name_or_path": model.name_or_path, "architectures": [type(model).__name__]}
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[head.format]],
        "speculators_model_type": algorithm,
        "speculators_version": _SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
        "transformer_layer_config": _layers(head),
        "draft_vocab_size": len(head.draft_vocabulary),
        "torch_dtype": "bfloat16",
    }
    if isinstance(head, Eagle3Head):
        config |= {
            "norm_before_residual": head.wiring.norm_before_residual,
            "norm_output": head.wiring.feeds_normed,
            "target_hidden_size": model.config.get_text_config(decoder=True).hidden_size,
            "eagle_aux_hidden_state_layer_ids": list(head.feature_layers),
        }
    if isinstance(head, PEagleHead):
        config["mask_token_id"] = head.mask_token
    if isinstance(head, BlockModule):
        config |= {
            "block_size": head.settings.block_size,
            "mask_token_id": head.settings.mask_token,
            "aux_hidden_state_layer_ids": list(head.feature_layers),
            "sample_from_anchor": head.settings.drafts_at_anchor,
        }
    return config
