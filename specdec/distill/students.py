"""The two trainable drafts: a small language model, and a head on the target's features.

Both predict the next-token distribution at every token of a text at once. The head also predicts it with its own
predictions in place of the last features, as when drafting several tokens.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specdec.distill.dataset import TextBatch
from specdec.distill.loss import distillation_loss
from specdec.heads.eagle import EagleHead
from specdec.sampling.distributions import spread

PLACE_WEIGHTS = (1.0, 0.7, 0.5)  # loss weight of the first, second, third token of a draft


class Scale(nn.Module):
    """A weight matrix [out, in], parametrized as a trained matrix times fixed scales of its rows and columns.

    An optimizer updates all entries by similar amounts, so inputs and outputs are scaled to unit size.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, rows: Tensor | float, columns: Tensor | float) -> None:
        super().__init__()
        self.register_buffer("rows", torch.as_tensor(rows).view(-1, 1), persistent=False)
        self.register_buffer("columns", torch.as_tensor(columns), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        scaled: Tensor = weight * self.rows * self.columns
        return scaled


def scale(layer: Any, rows: Tensor | float, columns: Tensor | float) -> None:
    """Parametrize a linear layer's weight by `Scale`, until `unscale`."""
    register_parametrization(layer, "weight", Scale(rows, columns))


def unscale(module: nn.Module) -> None:
    """Fold all scales into ordinary weights."""
    for part in module.modules():
        if is_parametrized(part):
            remove_parametrizations(part, "weight")


class Guesser(Protocol):
    """A draft that predicts along a text. target_output: the target's output matrix [vocab, hidden]."""

    target_output: Tensor

    def logits(self, batch: TextBatch, depth: int) -> list[Tensor]:
        """For each draft position d, logits [texts, width, vocab] of the token after j, with d draft tokens before."""
        ...


class Student(Guesser, Protocol):
    """A draft in training."""

    @property
    def module(self) -> nn.Module:
        """The module with the trained parameters."""
        ...

    def loss(self, batch: TextBatch, random: torch.Generator) -> Tensor:
        """The training loss."""
        ...


class HeadGuesser:
    """A trained head. target: the transformers model."""

    def __init__(self, head: EagleHead, target: Any) -> None:
        self.module = head
        self.target_output = target.get_output_embeddings().weight.detach()

    def logits(self, batch: TextBatch, depth: int) -> list[Tensor]:
        head = self.module
        reduced = [head.logits(hidden) for hidden in unroll(head, batch, depth)]
        return [spread(logits, head.draft_vocabulary, head.vocab_size, -torch.inf) for logits in reduced]


class DraftStudent:
    """A small Llama model with the target's input and output embeddings, projected to its width.

    config: of the small model. target: a transformers model; its embeddings [vocab, hidden] are not trained.
    frequent: int64, ascending tokens that are in the loss at every step; others are sampled.
    """

    def __init__(self, config: LlamaConfig, target: Any, frequent: Tensor) -> None:
        self.embedding = target.get_input_embeddings().weight.detach()
        self.target_output = target.get_output_embeddings().weight.detach()
        self.frequent = frequent.to(self.embedding.device)
        body = LlamaModel(config)
        body.embed_tokens = nn.Identity()
        width, hidden_size = config.hidden_size, self.embedding.shape[1]
        project_in, project_out = (nn.Linear(hidden_size, width, bias=False) for _ in range(2))
        scale(project_in, 1.0, 1 / _size(self.embedding))
        scale(project_out, 1.0, 1 / _size(self.target_output))
        self.module = nn.ModuleDict({"body": body, "project_in": project_in, "project_out": project_out})
        self.module.to(self.embedding.device)

    def hidden(self, tokens: Tensor) -> Tensor:
        inputs = self.module["project_in"](embedding(tokens, self.embedding).float())
        states: Tensor = self.module["body"](inputs_embeds=inputs, use_cache=False).last_hidden_state
        return states

    def loss(self, batch: TextBatch, random: torch.Generator) -> Tensor:
        positions = _positions(batch, 0)
        tokens = _loss_tokens(len(self.target_output), self.frequent, random)
        output = self.target_output[tokens]
        hidden = self.hidden(batch.tokens)[positions].unsqueeze(0)
        return distillation_loss(
            hidden, self.module["project_out"](output.float()), batch.features[positions], output, (1.0,)
        )

    def logits(self, batch: TextBatch, depth: int) -> list[Tensor]:
        logits = self.hidden(batch.tokens) @ self.module["project_out"](self.target_output.float()).T
        return [logits] * depth


class HeadStudent(HeadGuesser):
    """An EagleHead, unrolled over its own features for len(PLACE_WEIGHTS) tokens.

    target: the transformers model. frequent: int64 indices into the draft vocabulary, as for DraftStudent.
    sizes: float [hidden], the root mean square of each of the target's features.
    """

    def __init__(self, head: EagleHead, target: Any, frequent: Tensor, sizes: Tensor) -> None:
        super().__init__(head, target)
        self.frequent = frequent
        layer: Any = head.layers[0]
        embedding_size = _size(head.embedding).expand_as(sizes)
        scale(head.fc, sizes, 1 / torch.cat([embedding_size, sizes]))
        for reads in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            scale(reads, 1.0, 1 / sizes)
        for writes in (layer.self_attn.o_proj, layer.mlp.down_proj):
            scale(writes, sizes, 1.0)
        layer.post_attention_layernorm.weight.data = _size(sizes) / sizes

    def loss(self, batch: TextBatch, random: torch.Generator) -> Tensor:
        positions = _positions(batch, len(PLACE_WEIGHTS))
        output = self.module.output[_loss_tokens(len(self.module.output), self.frequent, random)]
        hidden = torch.stack([states[positions] for states in unroll(self.module, batch, len(PLACE_WEIGHTS))])
        return distillation_loss(hidden, output, batch.features[positions], output, PLACE_WEIGHTS)


def unroll(head: EagleHead, batch: TextBatch, depth: int) -> list[Tensor]:
    """The head's predicted features for each draft position: [texts, width, hidden], at j for token j.

    At draft position d (from 0), the features of the last d tokens before j are the head's own predictions at draft
    positions 0 to d - 1; earlier ones are the target's. The prediction at token 0 is meaningless.
    """
    tokens = batch.tokens
    width = tokens.shape[1]
    offsets = torch.arange(width, device=tokens.device)
    distance = offsets[:, None] - offsets  # from a key to a later query
    rotation = head.rotary(batch.features.float(), offsets[None])
    features, states = _shifted(batch.features.float()), []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for place in range(depth):
        hidden = head.mix(features, tokens)
        # keys from the target's features are those of place 0; keys from predicted features, of the later places
        masks = [distance >= place, *(distance == place - earlier for earlier in range(1, place + 1))]
        masks[0] = masks[0] & ((offsets > 0) | (distance == 0))  # token 0 has no previous feature
        states.append(_layer(head.layers[0], hidden, rotation, keys, values, torch.cat(masks, 1)))
        features = _shifted(states[-1])
    return states


def _layer(
    layer: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor], keys: list[Tensor], values: list[Tensor], mask: Tensor
) -> Tensor:
    """A Llama decoder layer that attends to the given keys and values and its own, which are appended to them."""
    attention = layer.self_attn
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    query, key, value = (
        project(hidden).view(shape).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotation)
    keys.append(key)
    values.append(value)
    attended = scaled_dot_product_attention(
        query, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=mask, enable_gqa=True
    )
    hidden = hidden + attention.o_proj(attended.transpose(1, 2).flatten(2))
    output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return output


def _shifted(features: Tensor) -> Tensor:
    """Features shifted by one token to the right, with zeros first."""
    return torch.cat([torch.zeros_like(features[:, :1]), features[:, :-1]], 1)


def _size(x: Tensor) -> Tensor:
    """Root mean square."""
    return x.float().square().mean().sqrt()


def _positions(batch: TextBatch, num_before: int) -> Tensor:
    """Positions with a next token and num_before earlier tokens: bool [texts, width].

    Includes positions in prompts: the target's distribution there is equally useful, and already computed.
    """
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return (positions >= num_before) & (positions < batch.lengths[:, None] - 1)


def _loss_tokens(size: int, frequent: Tensor, random: torch.Generator) -> Tensor:
    """The frequent tokens and half as many random ones of `size`, ascending."""
    others = torch.randint(size, (len(frequent) // 2,), generator=random)
    tokens: Tensor = torch.cat([frequent, others.to(frequent.device)]).unique()
    return tokens
