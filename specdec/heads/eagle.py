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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from specdec.heads.base import Choice, Drafting
from specdec.heads.files import VOCABULARY_FILE, HeadFolder
from specdec.models.base import FINAL, FeatureLayers
from specdec.models.cache import RaggedCache
from specdec.models.fusion import FusedLayer, GpuStack, Projection, Shared, Stack, stack_of, weight_bytes
from specdec.models.saving import fingerprint, save_weights, write_config
from specdec.runtime.artifacts import explained
from specdec.runtime.json_files import integers, read_json
from specdec.trees.columns import Branches
from specdec.trees.optimal import Rates


class EagleHead(nn.Module):
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
    drafting: Drafting = "sequential"
    max_tokens: int | None = None
    feature_layers: FeatureLayers = (FINAL,)
    embedding: Tensor
    output: Tensor
    draft_vocabulary: Tensor

    def __init__(self, config: LlamaConfig, embedding: Tensor, output: Tensor, draft_vocabulary: Tensor) -> None:
        super().__init__()
        self.config = config
        check_draft_vocabulary(draft_vocabulary, len(output))
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("output", output[draft_vocabulary], persistent=False)
        self.register_buffer("draft_vocabulary", draft_vocabulary, persistent=False)
        self.fc: Any = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        layer = LlamaDecoderLayer(config, 0)
        layer.input_layernorm = nn.Identity()
        self.layers = nn.ModuleList([layer])
        self.rotary: nn.Module = LlamaRotaryEmbedding(config)
        self.rates: Rates | None = None
        self._stack: Stack | GpuStack | None = None
        self._project: Callable[[Tensor], Tensor] = lambda features: linear(features, self.output)

    @property
    def vocab_size(self) -> int:
        """Size of the target's vocabulary."""
        return len(self.embedding)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embedding.device

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads: the layer's, and the output head's rows of the draft vocabulary."""
        own = weight_bytes([*self.fc.modules(), *self.layers.modules()])
        return own + self.output.numel() * self.output.element_size()

    def allocate(self, num_slots: int, capacity: int) -> RaggedCache:
        """An empty cache. Slot position i belongs to token i + 1, as the first token has no feature before it."""
        return RaggedCache(1, num_slots, capacity)

    def encode(self, features: Tensor) -> Tensor:
        """The features as they are: [..., hidden]."""
        return features

    def mix(self, features: Tensor, tokens: Tensor) -> Tensor:
        """The layer's input: features [..., hidden] and the tokens int64 [...] that follow them -> [..., hidden]."""
        mixed: Tensor = self.fc(torch.cat([embedding(tokens, self.embedding).to(features.dtype), features], -1))
        return mixed

    def forward(
        self,
        features: Tensor,
        tokens: Tensor,
        cache: RaggedCache,
        first_slot: int = 0,
        branches: Branches | None = None,
    ) -> Tensor:
        """Predicted features of the tokens, [rows, width, hidden]. The caller updates the cache's lengths.

        features: float [rows, width, hidden], of the token before each. tokens: int64 [rows, width].
        Row r belongs to slot first_slot + r. branches: of a tree, as for a LanguageModel.
        """
        rows, width = tokens.shape
        cache.open(first_slot, rows, width, tokens.device, branches)
        return self._guess(self.mix(features, tokens), cache)

    def forward_at(self, features: Tensor, tokens: Tensor, starts: Tensor, cache: RaggedCache, extent: int) -> Tensor:
        """`forward` from the first slot on; row r begins at position starts[r] and attends to `extent` positions."""
        cache.open_at(0, starts, tokens.shape[1], extent)
        return self._guess(self.mix(features, tokens), cache)

    def _guess(self, hidden: Tensor, cache: RaggedCache) -> Tensor:
        if self._stack and self._stack.supports(hidden.shape[1]):
            return self._stack(hidden, cache)
        guessed: Tensor = self.layers[0](
            hidden,
            attention_mask=cache.mask(hidden.dtype),
            position_embeddings=self.rotary(hidden, cache.window.positions),
            past_key_values=cache,
        )
        return guessed

    def logits(self, features: Tensor) -> Tensor:
        """Logits [..., draft vocab] of the next token from features [..., hidden]."""
        return self._project(features)

    def placed(self, device: torch.device, dtype: torch.dtype) -> EagleHead:
        """Move the head to a device and dtype; rotary angles stay float32, which distant positions need."""
        self.to(device, dtype)
        self.rotary = LlamaRotaryEmbedding(self.config).to(device)
        return self

    def choices(self) -> tuple[Choice, ...]:
        """None: a head of this format is trained here."""
        return ()

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The head itself. Raises ValueError for any option."""
        if options:
            raise ValueError(
                f"options={dict(options)} must be empty, as this head has none; remove its convention.json"
            )
        return self

    def fuse(self) -> None:
        """Fuse operations, see `specdec.models.fusion`. A fused head can no longer be trained or saved."""
        self.fc, self._project = Projection(_linear(self.fc.weight)), Projection(_linear(self.output))
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


def check_draft_vocabulary(tokens: Tensor, vocab_size: int) -> Tensor:
    """The draft vocabulary, int64 [n], n >= 1, if it ascends within [0, vocab_size); else raises ValueError.

    `Partial` distributions are looked up by bisection. With unsorted or duplicate ids, the verified distribution would
    differ from the sampled one and the output would no longer be lossless.
    """
    if tokens.ndim != 1 or not len(tokens) or int(tokens[0]) < 0 or int(tokens[-1]) >= vocab_size:
        raise ValueError(f"draft_vocabulary must be a list of token ids in [0, {vocab_size}); write it anew")
    if bool((tokens[1:] <= tokens[:-1]).any()):
        place = int((tokens[1:] <= tokens[:-1]).nonzero()[0])
        raise ValueError(
            f"draft_vocabulary has {int(tokens[place + 1])} after {int(tokens[place])} and must ascend, each token "
            "once; write it anew, with the head that was trained for it"
        )
    return tokens


_OTHER_TARGET = "give the model that the head was trained for, or train a head for this one"


def _borrowed(model: Any) -> tuple[Tensor, Tensor]:
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
