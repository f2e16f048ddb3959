"""MTP heads: a further layer of the target, trained with it to predict one token more (multi-token prediction).

The embedding of a token and the target's state before it are normalized, joined and projected, and go through a block
of the target's own kind. All steps of a draft use the first layer, as vLLM does for checkpoints with several: a later
one was trained to read the state of the one before it.

The layer is among the target's own weights, where transformers does not load it, or in a folder of its own. Sources:
DeepSeek-AI 2024 (arXiv:2412.19437) and vLLM `deepseek_mtp.py`, `glm4_moe_mtp.py`, `qwen3_next_mtp.py`, `mimo_mtp.py`;
transformers `modeling_layers.py` (MtpLayer); vllm-project/speculators `convert/mtp/converter.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from specdec.heads.base import Choice
from specdec.heads.checkpoints import SHARED, Lender, SharedParts, Tensors, check_shapes
from specdec.heads.convention import feature_layer_choice
from specdec.heads.files import HeadFolder
from specdec.heads.sequential import SequentialModule, own_first
from specdec.models.base import FINAL, FeatureLayers
from specdec.models.fusion import FUSABLE, FusedLayer, GpuStack, Projection, Shared, Stack, layer_by_layer, stack_of
from specdec.models.state.ragged import RaggedCache
from specdec.runtime.artifacts import LoadError

_BLOCK = "layers.0."


@dataclass(frozen=True, slots=True)
class Wiring:
    """How the parts of a head are connected, which its tensors do not show.

    feature_layers: one, the state of the target that is read. embedding_first: of the two inputs of the projection.
    feeds_normed: whether the next state is the one after the head's norm. zeroes_first: whether the embedding at the
    first position is zero.
    """

    feature_layers: FeatureLayers = (FINAL,)
    embedding_first: bool = True
    feeds_normed: bool = True
    zeroes_first: bool = False


@dataclass(frozen=True, slots=True)
class _Dialect:
    """A family of checkpoints.

    name: for people. prefix: a pattern of what its tensors' names begin with. names: {as stored: canonical}, of
    beginnings after the prefix; what has none of them is the block's. wiring: how its parts are connected.
    """

    name: str
    prefix: str
    names: Mapping[str, str]
    wiring: Wiring = Wiring()

    def canonical(self, name: str, index: int) -> str | None:
        """The name of a tensor of layer `index`, None for another's."""
        if (found := re.match(self.prefix.replace("#", str(index)), name)) is None:
            return None
        rest = name[found.end() :]
        return next((new + rest.removeprefix(old) for old, new in self.names.items() if rest.startswith(old)), None)


_INPUTS = {"enorm.": "enorm.", "hnorm.": "hnorm.", "eh_proj.": "eh_proj."}
_LAYERNORMS = {
    **{"token_layernorm.": "enorm.", "hidden_layernorm.": "hnorm.", "input_proj.": "eh_proj."},
    **{"final_layernorm.": "norm.", "": _BLOCK},
}
_DIALECTS = (
    _Dialect(
        "Qwen",
        r"mtp\.",
        {
            **{"fc.": "eh_proj.", "pre_fc_norm_embedding.": "enorm.", "pre_fc_norm_hidden.": "hnorm."},
            **{"norm.": "norm.", "layers.0.": _BLOCK},
        },
    ),
    _Dialect("speculators", r"mtp_layers\.#\.", _LAYERNORMS),
    _Dialect("MiMo", r"mtp_layers\.#\.", _LAYERNORMS, Wiring(embedding_first=False, zeroes_first=True)),
    _Dialect("transformers", r"layers\.#\.", _INPUTS | {"post_norm.": "norm.", "mtp_block.": _BLOCK}),
    _Dialect(
        "DeepSeek",
        r"layers\.#\.",
        {
            **_INPUTS,
            **{"shared_head.norm.": "norm.", "shared_head.head.": "lm_head.", "embed_tokens.": "embed_tokens."},
            "": _BLOCK,
        },
        Wiring(feeds_normed=False, zeroes_first=True),
    ),
)
_PROJECTION = re.compile(r"mtp\.fc\.weight|mtp_layers\.(\d+)\.input_proj\.weight|layers\.(\d+)\.eh_proj\.weight")


class MtpHead(SequentialModule):
    """An MTP layer of a target on the meta device; `load` fills it. See `Wiring`.

    model: the transformers target, whose classes of layers, norms and rotary angles it has.
    """

    format = "mtp"

    def __init__(self, wiring: Wiring, model: Any, lender: Lender) -> None:
        super().__init__()
        self.wiring, self.feature_layers, self.num_target_layers = wiring, wiring.feature_layers, lender.num_layers
        body, width = model.get_decoder(), lender.hidden_size
        self.config = _config(lender.config)
        epsilon = self.config.rms_norm_eps
        with torch.device("meta"):
            self.enorm, self.hnorm, self.norm = (type(body.norm)(width, eps=epsilon) for _ in range(3))
            self.eh_proj: Any = nn.Linear(2 * width, width, bias=False)
            self.layers = nn.ModuleList([type(body.layers[-1])(self.config, 0)])
        self.rotary = type(body.rotary_emb)(self.config)
        # some have other angles for each kind of layer, which the block's kind does not determine
        self.rotary(torch.zeros(1, 1, width), torch.zeros(1, 1, dtype=torch.int64))
        self._stack: Stack | GpuStack | None = None

    def run(self, states: Tensor, tokens: Tensor, cache: RaggedCache) -> Tensor:
        """States after the block; normalized if the head feeds them so."""
        embedded = embedding(tokens, self.embedding).to(states.dtype)
        if self.wiring.zeroes_first:
            embedded = embedded * (cache.window.positions > 0).unsqueeze(-1)
        parts = [self.enorm(embedded), self.hnorm(states)]
        hidden = self.eh_proj(torch.cat(parts if self.wiring.embedding_first else parts[::-1], -1))
        if self._stack and self._stack.supports(hidden.shape[1]):
            mixed = self._stack(hidden, cache)
        else:
            mixed = layer_by_layer(self.layers, self.rotary, hidden, cache, [1])[0]
        return self.norm(mixed) if self.wiring.feeds_normed else mixed

    def normed(self, states: Tensor) -> Tensor:
        """What the output head reads: states after the norm."""
        return states if self.wiring.feeds_normed else self.norm(states)

    def choices(self) -> tuple[Choice, ...]:
        """The target's state that is read, the order of inputs, and which state is fed back."""
        orders = {"embedding first": {"embedding_first": True}, "hidden state first": {"embedding_first": False}}
        feeds = {"after the norm": {"feeds_normed": True}, "before the norm": {"feeds_normed": False}}
        return (
            feature_layer_choice(self.feature_layers, self.num_target_layers),
            Choice("concatenation", own_first(orders, {"embedding_first": self.wiring.embedding_first})),
            Choice("state fed back", own_first(feeds, {"feeds_normed": self.wiring.feeds_normed})),
        )

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """A head with the same weights and other `Wiring`."""
        known = sorted(each.name for each in fields(Wiring))
        if not set(options) <= set(known):
            raise ValueError(f"options={sorted(options)} must be of {', '.join(known)}; measure the convention again")
        layers = tuple(options.get("feature_layers", self.feature_layers))
        if len(layers) != 1:
            raise ValueError(f"feature_layers={list(layers)} must be 1 layer; measure the convention again")
        other = copy(self)
        other.wiring, other.feature_layers = replace(self.wiring, **{**options, "feature_layers": layers}), layers
        return other

    def fuse(self) -> None:
        """Fuse operations, see `specdec.models.fusion`. A fused head can no longer be saved."""
        self.eh_proj = Projection(self.eh_proj)
        self.fuse_output()
        if type(self.layers[0]).__name__ in FUSABLE:
            layer = FusedLayer(self.layers[0], Shared())
            self.layers[0], self._stack = layer, stack_of([layer], self.rotary) if layer.kernel else None


def recognize(folder: HeadFolder) -> str | None:
    """The dialect of an MTP layer in a folder, the target's own or one of its own; None if there is none."""
    index = _first_layer(folder)
    return None if index is None else _dialect(folder, index).name


def is_whole_model(folder: HeadFolder) -> bool:
    """Whether a folder with an MTP layer has the model that the layer belongs to, and not the layer alone."""
    names = {"embed_tokens.weight", "layers.0.input_layernorm.weight"}
    return names <= folder.shapes.keys()


def load(folder: HeadFolder, model: Any, load_format: str) -> MtpHead:
    """Load an MTP layer for a transformers model, in its dtype and on its device.

    Raises LoadError for a folder that is damaged, or whose block the target's classes do not compute, and ValueError
    for a layer of another target.
    """
    index = _first_layer(folder)
    assert index is not None, "recognized"
    dialect, lender = _dialect(folder, index), Lender.of(model)
    tensors = Tensors.of(folder, lambda name: _canonical(dialect, index, name), load_format)
    parts = SharedParts(tensors, lender, lender.hidden_size, is_tied=False)
    parts.check()
    weights = _with_fused_experts(tensors.without(SHARED).read(set(tensors.names) - set(SHARED)))
    head = _new_head(dialect, model, lender, folder)
    check_shapes(head, {name: tuple(weight.shape) for name, weight in weights.items()}, folder.path)
    head.load_state_dict(weights, assign=True)
    head.share(*parts.load(), lender.vocab_size)
    return head.placed(model.device, model.dtype).eval().requires_grad_(False)


def _new_head(dialect: _Dialect, model: Any, lender: Lender, folder: HeadFolder) -> MtpHead:
    try:
        return MtpHead(dialect.wiring, model, lender)
    except Exception as error:  # whatever an architecture raises
        raise LoadError(
            f"the MTP layer in {str(folder.path)!r} needs a block of {type(model).__name__}'s kind, which cannot be "
            f'built alone ({type(error).__name__}: {error}); use another method, such as "ngram"'
        ) from error


def _config(config: Any) -> Any:
    """The target's config for a model of one layer, with full attention, and experts if the target's last layer has."""
    own = deepcopy(config)
    own.num_hidden_layers = 1
    for name, kind in (("layer_types", "full_attention"), ("mlp_layer_types", None)):
        if types := getattr(own, name, None):
            setattr(own, name, [kind or types[-1]])
    if hasattr(own, "first_k_dense_replace"):
        own.first_k_dense_replace = 0
    return own


def _first_layer(folder: HeadFolder) -> int | None:
    """The number of the first MTP layer, as its tensors are named; None if there is none."""
    found = [match for name in folder.files if (match := _PROJECTION.fullmatch(name))]
    return min((int(match[1] or match[2] or 0) for match in found), default=None)


def _dialect(folder: HeadFolder, index: int) -> _Dialect:
    named = {each.name: each for each in _DIALECTS}
    if "mtp.fc.weight" in folder.files:
        return named["Qwen"]
    if f"mtp_layers.{index}.input_proj.weight" in folder.files:
        return named["speculators" if "speculators_model_type" in folder.config else "MiMo"]
    is_own = any(name.startswith(f"layers.{index}.mtp_block.") for name in folder.files)
    return named["transformers" if is_own else "DeepSeek"]


def _canonical(dialect: _Dialect, index: int, name: str) -> str | None:
    if dialect.name == "speculators" and name in ("embed_tokens.weight", "lm_head.weight"):
        return name
    return None if name.endswith("rotary_emb.inv_freq") else dialect.canonical(name, index)


_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def _with_fused_experts(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with those of single experts stacked as transformers has them: gate_up_proj and down_proj."""
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    others = {}
    for name, weight in weights.items():
        if found := _EXPERT.fullmatch(name):
            experts.setdefault(found[1], {})[int(found[2]), found[3]] = weight
        else:
            others[name] = weight
    for prefix, parts in experts.items():
        numbers = range(1 + max(number for number, _ in parts))
        if missing := [
            (n, part) for n in numbers for part in ("gate_proj", "up_proj", "down_proj") if (n, part) not in parts
        ]:
            raise LoadError(f"{prefix}.{missing[0][0]}.{missing[0][1]}.weight is missing; copy the checkpoint again")
        joined = [torch.cat([parts[number, "gate_proj"], parts[number, "up_proj"]]) for number in numbers]
        others[f"{prefix}.gate_up_proj"] = torch.stack(joined)
        others[f"{prefix}.down_proj"] = torch.stack([parts[number, "down_proj"] for number in numbers])
    return others
