"""An EAGLE-style head: one decoder layer that drafts from the target's own features.

A feature is the input of the target's output head: its last hidden state after the final norm. From the feature of one
token and the embedding of the next, the head predicts the feature of that next token; the target's output head,
restricted to a draft vocabulary, turns it into a distribution. Where the target has not computed features yet, the
head uses its own predictions. Source: Li et al. 2024 (arXiv:2401.15077).

A folder of our own holds config.json and model.safetensors in the layout of vLLM's `eagle` method, which uses the full
vocabulary, and draft_vocabulary.json, the token ids that this library drafts. Published heads draft all tokens and may
have biases, several layers, and norms: of the embedding and the feature before `fc` (HASS), or of `fc`'s output and
before the output head (old speculators). Sources: SafeAILab/EAGLE `eagle/model/cnets1.py`; vLLM `llama_eagle.py`;
vllm-project/speculators `convert/eagle/eagle_converter.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from specdec.heads.base import Choice
from specdec.heads.checkpoints import (
    OTHER_TARGET,
    SHARED,
    Lender,
    Shapes,
    SharedParts,
    Tensors,
    check_draft_vocabulary,
    load_into,
    other_target,
)
from specdec.heads.convention import feature_layer_choice
from specdec.heads.files import VOCABULARY_FILE, HeadFolder
from specdec.heads.sequential import (
    SequentialModule,
    config_like,
    layer_config,
    new_layer,
    new_rotary,
    num_layers_of,
    reading_layers,
)
from specdec.models.base import FINAL, FeatureLayers
from specdec.models.files.saving import fingerprint, save_weights, write_config
from specdec.models.fusion import FusedLayer, GpuStack, Projection, Shared, Stack, layer_by_layer, stack_of
from specdec.models.state.ragged import RaggedCache
from specdec.runtime.artifacts import explained
from specdec.runtime.json_files import integers, read_json


class EagleHead(SequentialModule):
    """The trained layers with the target's embedding and output head, which they share.

    Args:
        config: of the layers; hidden_size and vocab_size are the target's.
        embedding: float [vocab, hidden], the target's.
        output: float [vocab, hidden], the target's.
        draft_vocabulary: int64 [draft vocab], ascending token ids.
        shapes: of a published checkpoint, whose layers, biases and norms it has; else one layer without.

    Attributes:
        rates: measured acceptance rates of siblings by level and rank, or None.

    Raises:
        ValueError: for a draft vocabulary that is not ascending or exceeds the target's.
    """

    format = "eagle"
    feature_layers: FeatureLayers = (FINAL,)

    num_target_layers: int | None = None  # of a published head

    def __init__(
        self, config: Any, embedding: Tensor, output: Tensor, draft_vocabulary: Tensor, shapes: Shapes | None = None
    ) -> None:
        super().__init__()
        self.config = config
        check_draft_vocabulary(draft_vocabulary, len(output))
        self.share(embedding, output[draft_vocabulary], draft_vocabulary, len(embedding))
        width, known = config.hidden_size, shapes or {}
        self.fc: Any = nn.Linear(2 * width, width, bias="fc.bias" in known)
        self.embedding_layernorm, self.hidden_states_layernorm, self.pre_lm_head_layernorm = (
            LlamaRMSNorm(width, config.rms_norm_eps) if f"{name}.weight" in known else nn.Identity() for name in _NORMS
        )
        layers: list[Any] = [LlamaDecoderLayer(config, 0)]
        if shapes is not None:
            layers = [new_layer(config, i, shapes, f"layers.{i}.") for i in range(num_layers_of(shapes))]
        if f"{_FIRST}input_layernorm.weight" not in known:
            layers[0].input_layernorm = nn.Identity()
        self.layers = nn.ModuleList(layers)
        self.rotary: nn.Module = new_rotary(config)
        self._stack: Stack | GpuStack | None = None

    def mix(self, features: Tensor, tokens: Tensor) -> Tensor:
        """The layer's input: features [..., hidden] and the tokens int64 [...] that follow them -> [..., hidden]."""
        embedded = self.embedding_layernorm(embedding(tokens, self.embedding).to(features.dtype))
        mixed: Tensor = self.fc(torch.cat([embedded, self.hidden_states_layernorm(features)], -1))
        return mixed

    def run(self, states: Tensor, tokens: Tensor, cache: RaggedCache) -> Tensor:
        """Predicted features of the tokens, [rows, width, hidden]."""
        hidden = self.mix(states, tokens)
        if self._stack and self._stack.supports(hidden.shape[1]):
            return self._stack(hidden, cache)
        return layer_by_layer(self.layers, self.rotary, hidden, cache, [len(self.layers)])[0]

    def normed(self, states: Tensor) -> Tensor:
        """What the output head reads: the predicted features, normalized in old speculators checkpoints."""
        normed: Tensor = self.pre_lm_head_layernorm(states)
        return normed

    def choices(self) -> tuple[Choice, ...]:
        """Of a published head, whether it reads the target's state after its final norm, as EAGLE does, or before."""
        if self.num_target_layers is None:
            return ()
        return (feature_layer_choice(self.feature_layers, self.num_target_layers),)

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """A head with the same weights that reads other `feature_layers`, one."""
        if not options or self.num_target_layers is None:
            return super().with_options(options)
        return reading_layers(self, options)

    def fuse(self) -> None:
        """Fuse operations, see `specdec.models.fusion`. A fused head can no longer be trained or saved."""
        self.fc = Projection(self.fc)
        self.fuse_output()
        shared = Shared()
        layers = [FusedLayer(layer, shared) for layer in self.layers]
        self.layers = nn.ModuleList(layers)
        self._stack = stack_of(layers, self.rotary) if all(layer.kernel for layer in layers) else None

    def save(self, folder: Path, fingerprint: str, about: dict[str, Any]) -> None:
        """Write a folder for `load_head`. fingerprint: the target's. about: further entries of the config."""
        config = self.config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
        config["specdec"] = {"target": fingerprint} | about
        write_config(folder, config)
        (folder / VOCABULARY_FILE).write_text(json.dumps(self.draft_vocabulary.tolist()) + "\n")
        save_weights(folder, "model.safetensors", self.state_dict())


def new_head(model: Any, draft_vocabulary: Tensor) -> EagleHead:
    """An untrained head for a transformers model: one Llama layer with the model's dimensions."""
    config = config_like(model)
    lender = Lender.of(model)
    return EagleHead(config, lender.embedding, lender.output, draft_vocabulary)


def load_head(source: str, model: Any, load_format: str = "auto") -> EagleHead:
    """Load a head for the transformers model that it was trained for, in the model's dtype and on its device.

    load_format: "dummy" for random weights, with any model of the right shape.
    Raises LoadError for a damaged folder, and ValueError if the head belongs to another model.
    """
    folder, is_dummy = Path(source), load_format == "dummy"
    with explained(f"source={source!r} must be a folder with an undamaged head", "train or copy it again"):
        config = LlamaConfig.from_pretrained(folder, attn_implementation="sdpa")
        tokens = read_json(folder / VOCABULARY_FILE, _VOCABULARY_RULE, lambda value: integers(value, "it"))
        vocabulary = check_draft_vocabulary(torch.tensor(tokens, dtype=torch.int64), config.vocab_size)
        weights = {} if is_dummy else load_file(folder / "model.safetensors")
        recorded = None if is_dummy else config.specdec["target"]
    target_config = model.config.get_text_config(decoder=True)
    for name in ("hidden_size", "vocab_size"):
        if (value := getattr(config, name)) != (expected := getattr(target_config, name)):
            raise other_target(name, value, expected, source)
    is_known = recorded is None or model.device.type == "meta"
    if not is_known and (own := fingerprint(model)) != recorded:
        raise ValueError(
            f"fingerprint={recorded} recorded in the head {source!r} must be that of the target's weights, {own}; "
            f"{OTHER_TARGET}"
        )
    with explained(f"source={source!r} must hold the weights of one layer", "train or copy it again"):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            lender = Lender.of(model)
            head = EagleHead(config, lender.embedding, lender.output, vocabulary)
        head.load_state_dict(weights or head.state_dict())
        return head.placed(model.device, model.dtype).eval().requires_grad_(False)


def recognize(folder: HeadFolder) -> str | None:
    """The dialect of an EAGLE head's folder, None if it is not one.

    A published one has an `fc` of twice its width, and layers whose queries are made of its width.
    """
    if (folder.path / VOCABULARY_FILE).is_file():
        return "specdec"
    shapes = _tensors(folder).shapes
    width = shapes.get(f"{_FIRST}self_attn.o_proj.weight", (0,))[0]
    sizes = (shapes.get("fc.weight"), shapes.get(f"{_FIRST}self_attn.q_proj.weight", (0, 0))[1])
    if sizes != ((width, 2 * width), width) or "hidden_norm.weight" in shapes:
        return None
    if "fusion_fc.weight" in folder.shapes:
        return "speculators"
    return "HASS" if "hidden_states_layernorm.weight" in shapes else "SafeAILab"


def load(folder: HeadFolder, model: Any, load_format: str) -> EagleHead:
    """Load a head for a transformers model, in its dtype and on its device. Our own: see `load_head`.

    Raises LoadError for a damaged folder, and ValueError if the head belongs to another model.
    """
    if (folder.path / VOCABULARY_FILE).is_file():
        return load_head(str(folder.path), model, load_format)
    lender, tensors = Lender.of(model), _tensors(folder, load_format)
    shapes, config = tensors.shapes, layer_config(folder.config, tensors.shapes, _FIRST)
    if config.hidden_size != lender.hidden_size:
        raise other_target("hidden_size", config.hidden_size, lender.hidden_size, folder.path)
    parts = SharedParts(tensors, lender, config.hidden_size, is_tied=False)
    parts.check()
    embedding, output, vocabulary = parts.load()
    with torch.device("meta"):
        head = EagleHead(config, embedding, lender.output, vocabulary, shapes)
    load_into(head, tensors.without(SHARED))
    head.share(embedding, output, vocabulary, lender.vocab_size)
    head.num_target_layers = lender.num_layers
    return head.placed(model.device, model.dtype).eval().requires_grad_(False)


_FIRST = "layers.0."
_NORMS = ("embedding_layernorm", "hidden_states_layernorm", "pre_lm_head_layernorm")
_RENAMED = {  # beginnings of names in old speculators checkpoints, and in those that they were converted from
    "fusion_fc.": "fc.",
    "transformer.": _FIRST,
    "embed_layernorm.": "embedding_layernorm.",
    "hidden_layernorm.": f"{_FIRST}input_layernorm.",
    "lm_head_layernorm.": "pre_lm_head_layernorm.",
}


def _tensors(folder: HeadFolder, load_format: str = "auto") -> Tensors:
    def canonical(name: str) -> str | None:
        for old, new in _RENAMED.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return None if name.endswith("rotary_emb.inv_freq") else name

    return Tensors.of(folder, canonical, load_format)


_VOCABULARY_RULE = "draft_vocabulary must be a JSON list of token ids"
