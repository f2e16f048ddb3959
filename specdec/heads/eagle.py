"""An EAGLE-style head: one decoder layer that drafts from the target's own features.

A feature is the input of the target's output head: its last hidden state after the final norm. From the feature of one
token and the embedding of the next, the head predicts the feature of that next token; the target's output head,
restricted to a draft vocabulary, turns it into a distribution. Where the target has not computed features yet, the
head uses its own predictions. Source: Li et al. 2024 (arXiv:2401.15077).

A folder holds config.json and model.safetensors in the layout of vLLM's `eagle` method, which uses the full
vocabulary, and draft_vocabulary.json, the token ids that this library drafts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from specdec.heads.checkpoints import check_draft_vocabulary
from specdec.heads.files import VOCABULARY_FILE, HeadFolder
from specdec.heads.sequential import SequentialModule, as_linear
from specdec.models.base import FINAL, FeatureLayers
from specdec.models.cache import RaggedCache
from specdec.models.fusion import FusedLayer, GpuStack, Projection, Shared, Stack, layer_by_layer, stack_of
from specdec.models.saving import fingerprint, save_weights, write_config
from specdec.runtime.artifacts import explained
from specdec.runtime.json_files import integers, read_json


class EagleHead(SequentialModule):
    """The trained layer with the target's embedding and output head, which it shares.

    Args:
        config: of the layer; hidden_size and vocab_size are the target's.
        embedding: float [vocab, hidden], the target's.
        output: float [vocab, hidden], the target's.
        draft_vocabulary: int64 [draft vocab], ascending token ids.

    Attributes:
        rates: measured acceptance rates of siblings by level and rank, or None.

    Raises:
        ValueError: for a draft vocabulary that is not ascending or exceeds the target's.
    """

    format = "eagle"
    feature_layers: FeatureLayers = (FINAL,)

    def __init__(self, config: LlamaConfig, embedding: Tensor, output: Tensor, draft_vocabulary: Tensor) -> None:
        super().__init__()
        self.config = config
        check_draft_vocabulary(draft_vocabulary, len(output))
        self.share(embedding, output[draft_vocabulary], draft_vocabulary, len(embedding))
        self.fc: Any = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        layer = LlamaDecoderLayer(config, 0)
        layer.input_layernorm = nn.Identity()
        self.layers = nn.ModuleList([layer])
        self.rotary: nn.Module = LlamaRotaryEmbedding(config)
        self._stack: Stack | GpuStack | None = None

    def mix(self, features: Tensor, tokens: Tensor) -> Tensor:
        """The layer's input: features [..., hidden] and the tokens int64 [...] that follow them -> [..., hidden]."""
        mixed: Tensor = self.fc(torch.cat([embedding(tokens, self.embedding).to(features.dtype), features], -1))
        return mixed

    def run(self, states: Tensor, tokens: Tensor, cache: RaggedCache) -> Tensor:
        """Predicted features of the tokens, [rows, width, hidden]."""
        hidden = self.mix(states, tokens)
        if self._stack and self._stack.supports(hidden.shape[1]):
            return self._stack(hidden, cache)
        return layer_by_layer(self.layers, self.rotary, hidden, cache)

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., draft vocab] of the next token from features [..., hidden]."""
        return self.project(states)

    def fuse(self) -> None:
        """Fuse operations, see `specdec.models.fusion`. A fused head can no longer be trained or saved."""
        self.fc = Projection(as_linear(self.fc.weight))
        self.fuse_output()
        layer = FusedLayer(self.layers[0], Shared())
        self.layers[0], self._stack = layer, stack_of([layer], self.rotary) if layer.kernel else None

    def save(self, folder: Path, fingerprint: str, about: dict[str, Any]) -> None:
        """Write a folder for `load_head`. fingerprint: the target's. about: further entries of the config."""
        config = self.config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
        config["specdec"] = {"target": fingerprint} | about
        write_config(folder, config)
        (folder / VOCABULARY_FILE).write_text(json.dumps(self.draft_vocabulary.tolist()) + "\n")
        save_weights(folder, "model.safetensors", self.state_dict())


def new_head(model: Any, draft_vocabulary: Tensor) -> EagleHead:
    """An untrained head for a transformers model: one Llama layer with the model's dimensions."""
    theirs = model.config.get_text_config(decoder=True)
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
    names += ["max_position_embeddings", "rope_parameters", "rms_norm_eps"]
    known = {name: getattr(theirs, name) for name in names if getattr(theirs, name, None) is not None}
    config = LlamaConfig(num_hidden_layers=1, attn_implementation="sdpa", **known)
    return EagleHead(config, *_borrowed(model), draft_vocabulary)


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
    theirs = model.config.get_text_config(decoder=True)
    for name in ("hidden_size", "vocab_size"):
        if (ours := getattr(config, name)) != (wanted := getattr(theirs, name)):
            raise ValueError(f"{name}={ours} of the head {source!r} must be the target's, {wanted}; {_OTHER_TARGET}")
    is_known = recorded is None or model.device.type == "meta"
    if not is_known and (own := fingerprint(model)) != recorded:
        raise ValueError(
            f"fingerprint={recorded} recorded in the head {source!r} must be that of the target's weights, {own}; "
            f"{_OTHER_TARGET}"
        )
    with explained(f"source={source!r} must hold the weights of one layer", "train or copy it again"):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            head = EagleHead(config, *_borrowed(model), vocabulary)
        head.load_state_dict(weights or head.state_dict())
        return head.placed(model.device, model.dtype).eval().requires_grad_(False)


def recognize(folder: HeadFolder) -> str | None:
    """The dialect of an EAGLE head's folder, None if it is not one."""
    return "specdec" if (folder.path / VOCABULARY_FILE).is_file() else None


def load(folder: HeadFolder, model: Any, load_format: str) -> EagleHead:
    """See `load_head`."""
    return load_head(str(folder.path), model, load_format)


_VOCABULARY_RULE = "draft_vocabulary must be a JSON list of token ids"


_OTHER_TARGET = "give the model that the head was trained for, or train a head for this one"


def _borrowed(model: Any) -> tuple[Tensor, Tensor]:
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
