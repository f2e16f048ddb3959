"""Checkpoints of heads that draft a block: settings in the dialects in which they are published, and loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from specdec.heads.blocks.backbone import BlockModule, BlockSettings, Sight
from specdec.heads.checkpoints import (
    SHARED,
    Lender,
    Shapes,
    SharedParts,
    Tensors,
    check_feature_layers,
    load_into,
    other_target,
)
from specdec.heads.files import HeadFolder
from specdec.heads.sequential import layer_config, num_layers_of
from specdec.models.base import FINAL, FeatureLayers
from specdec.runtime.artifacts import LoadError

M = TypeVar("M", bound=BlockModule)

_UNUSED = ("verifier_norm.weight", "verifier_lm_head.weight")  # copies of the target's, for training
_SHORT = {"markov_w1.": "markov_head.", "markov_w2.": "markov_head."}  # ModelOpt drops these prefixes
_OTHERS = {  # tensors of kin that draft in another way
    "layers.0.self_attn.qkv_proj.weight": "Laguna",
    "layers.0.self_attn.g_proj.weight": "Laguna",
    "encoder.fc.weight": "Muse-Glimmer",
    "encoder.output_norm_enc.weight": "Muse-Glimmer",
}


def tensors_of(folder: HeadFolder, load_format: str = "auto") -> Tensors:
    """Tensors by canonical names."""

    def canonical(name: str) -> str | None:
        if name.endswith("rotary_emb.inv_freq"):
            return None
        name = name.replace("confidence_proj.", "confidence_head.proj.", name.startswith("confidence_proj."))
        return next((owner + name for start, owner in _SHORT.items() if name.startswith(start)), name)

    return Tensors.of(folder, canonical, load_format)


def is_block(folder: HeadFolder) -> bool:
    """Whether a folder holds a head with DFlash's backbone: context features of its own, and a size of blocks."""
    shapes = tensors_of(folder).shapes
    has_backbone = {"fc.weight", "hidden_norm.weight", "norm.weight"} <= set(shapes) or "encoder.fc.weight" in shapes
    return has_backbone and setting(folder, "block_size") is not None


def dialect_of(folder: HeadFolder) -> str:
    """Who published a head in this way."""
    if "speculators_model_type" in folder.config:
        return "speculators"
    if "dflash_config" not in folder.config:
        return "DeepSpec" if "Qwen3DSparkModel" in folder.config.get("architectures", ()) else "z-lab"
    return "SpecForge" if "projector_type" in folder.config["dflash_config"] else "z-lab"


def setting(folder: HeadFolder, key: str, default: Any = None) -> Any:
    """A key of `dflash_config`, or else of the config."""
    inner: Mapping[str, Any] = folder.config.get("dflash_config") or {}
    value = inner.get(key, folder.config.get(key))
    return default if value is None else value


def required(folder: HeadFolder, key: str, least: int) -> int:
    """An integer of the config. Raises LoadError if it is missing or less than `least`."""
    value = setting(folder, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise LoadError(
            f"{key}={value!r} in the config of the head {str(folder.path)!r} must be an integer of at least {least}; "
            "copy the head again"
        )
    return value


def load_block(folder: HeadFolder, model: Any, load_format: str, kind: type[M], *, drafts_at_anchor: bool = False) -> M:
    """Load a head of a kind for a transformers model, in its dtype and on its device.

    drafts_at_anchor: whether the newest token's place drafts, where the config does not tell.
    Raises LoadError for a folder that is damaged or of a kind that is not supported, and ValueError for a head of
    another target.
    """
    lender, tensors = Lender.of(model), tensors_of(folder, load_format)
    _refuse_kin(folder, tensors.shapes)
    config = layer_config(folder.config, tensors.shapes, "layers.0.")
    parts = SharedParts(tensors, lender, config.hidden_size, bool(folder.config.get("tie_word_embeddings")))
    parts.check()
    settings = _settings(folder, lender, tensors.shapes, drafts_at_anchor)
    head = kind(settings, config, tensors.shapes, lender)
    head.configure(folder)
    load_into(head, tensors.without((*SHARED, *_UNUSED)))
    head.share(*parts.load(), lender.vocab_size)
    if settings.mask_token >= len(head.embedding):
        raise other_target(
            "mask_token_id", settings.mask_token, f"a row of the embedding, below {len(head.embedding)}", folder.path
        )
    return head.placed(model.device, model.dtype).eval().requires_grad_(False)


def _refuse_kin(folder: HeadFolder, shapes: Shapes) -> None:
    for name, kin in _OTHERS.items():
        if name in shapes:
            raise LoadError(
                f"{name!r} of the head {str(folder.path)!r} is of a {kin} head, which is not supported; use a DFlash "
                'head, or another method, such as "ngram"'
            )
    if setting(folder, "attention_sink_bias"):
        raise LoadError(
            f"attention_sink_bias=true in the config of the head {str(folder.path)!r} is not supported; use a head "
            'without, or another method, such as "ngram"'
        )


def _settings(folder: HeadFolder, lender: Lender, shapes: Shapes, drafts_at_anchor: bool) -> BlockSettings:
    at_anchor = bool(setting(folder, "sample_from_anchor", setting(folder, "shift_label", drafts_at_anchor)))
    return BlockSettings(
        _feature_layers(folder, lender, shapes),
        required(folder, "mask_token_id", 0),
        required(folder, "block_size", 1 if at_anchor else 2),
        at_anchor,
        _sights(folder, num_layers_of(shapes)),
    )


def _feature_layers(folder: HeadFolder, lender: Lender, shapes: Shapes) -> FeatureLayers:
    """Hidden states that fc reads: speculators counts them as transformers does, others the layers that give them."""
    if (ids := setting(folder, "aux_hidden_state_layer_ids")) is not None:
        layers = tuple(ids)
    else:
        ids = setting(folder, "target_layer_ids", setting(folder, "dspark_target_layer_ids"))
        ids = _usual_ids(lender.num_layers, num_layers_of(shapes)) if ids is None else ids
        # z-lab reads the last entry of transformers' hidden states, which is the one after the final norm
        layers = tuple(FINAL if each + 1 == lender.num_layers else each + 1 for each in ids)
    check_feature_layers(layers, shapes["fc.weight"][1], lender, folder.path, also=(FINAL,))
    return layers


def _usual_ids(num_target_layers: int, num_layers: int) -> list[int]:
    """Layers whose output is read if the config names none: spread evenly from 1 to n - 3, rounded."""
    if num_layers == 1:
        return [num_target_layers // 2]
    span = num_target_layers - 4
    return [round(1 + index * span / (num_layers - 1)) for index in range(num_layers)]


def _sights(folder: HeadFolder, num_layers: int) -> tuple[Sight, ...]:
    """What each layer attends to. Sliding layers are causal unless the config says otherwise."""
    causal = setting(folder, "causal", setting(folder, "is_causal"))
    uses_windows, window = (
        setting(folder, "use_swa"),
        setting(folder, "swa_window_size", setting(folder, "sliding_window")),
    )
    kinds = setting(folder, "layer_types", ["sliding_attention" if uses_windows else "full_attention"] * num_layers)
    if len(kinds) != num_layers:
        raise LoadError(
            f"layer_types={kinds} in the config of the head {str(folder.path)!r} must name the kinds of {num_layers} "
            "layers, as many as it has; copy the head again"
        )
    if causal is None and setting(folder, "sliding_window_non_causal"):
        causal = False
    return tuple(_sight(folder, kind, causal, window if uses_windows is not False else None) for kind in kinds)


def _sight(folder: HeadFolder, kind: str, causal: bool | None, window: int | None) -> Sight:
    if kind == "full_attention":
        return Sight(bool(causal))
    if kind != "sliding_attention" or not isinstance(window, int):
        raise LoadError(
            f"{kind!r} in layer_types of the head {str(folder.path)!r} must be full_attention, or sliding_attention "
            f"with an integer window, but the window is {window!r}; copy the head again"
        )
    return Sight(causal is not False, window)
