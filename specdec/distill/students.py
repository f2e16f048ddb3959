"""The two drafts that are trained: a small language model of its own, and a head on the target's features.

Both guess, for every token of a text at once, the distribution of the token after it; the head also as it would guess
if the last one or more features were its own guesses.
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

PLACE_WEIGHTS = (1.0, 0.7, 0.5)  # of the first, second, third token of a draft


class Scale(nn.Module):
    """A weight matrix [out, in] as a trained matrix times fixed scales of its rows and columns.

    An optimiser moves all entries alike, so inputs and outputs of very different size are first brought to one.
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
    """Train a linear layer's weight under scales; `unscale` makes it an ordinary weight again."""
    register_parametrization(layer, "weight", Scale(rows, columns))


def unscale(module: nn.Module) -> None:
    """Fold all scales into the weights."""
    for part in module.modules():
        if is_parametrized(part):
            remove_parametrizations(part, "weight")


class Guesser(Protocol):
    """A draft and its distributions along a text. target_output: the target's output matrix [vocab, hidden]."""

    target_output: Tensor

    def logits(self, batch: TextBatch, depth: int) -> list[Tensor]:
        """For each place d in a draft: logits [texts, width, vocab], at j of the token after j, d tokens drafted."""
        ...


class Student(Guesser, Protocol):
    """A draft in training."""

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        ...

    def loss(self, batch: TextBatch, random: torch.Generator) -> Tensor:
        """What to make smaller."""
        ...


class HeadGuesser:
    """A trained head. target: the transformers model."""

    def __init__(self, head: EagleHead, target: Any) -> None:
        self.module = head
        self.target_output = target.get_output_embeddings().weight.detach()

    def logits(self, batch: TextBatch, depth: int) -> list[Tensor]:
        head = self.module
        known = [head.logits(hidden) for hidden in unroll(head, batch, depth)]
        return [spread(logits, head.draft_vocabulary, head.vocab_size, -torch.inf) for logits in known]


class DraftStudent:
    """A Llama of its own whose input and output embeddings are the target's, projected to its width.

    config: of the Llama. target: a transformers model, whose matrices [vocab, hidden] stay as they are.
    frequent: int64 tokens, ascending, whose probabilities count at every step; others take turns.
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
        wanted = _positions(batch, 0)
        tokens = _some(len(self.target_output), self.frequent, random)
        output = self.target_output[tokens]
        hidden = self.hidden(batch.tokens)[wanted].unsqueeze(0)
        return distillation_loss(
            hidden, self.module["project_out"](output.float()), batch.features[wanted], output, (1.0,)
        )

    def logits(self, batch: TextBatch, depth: int) -> list[Tensor]:
        logits = self.hidden(batch.tokens) @ self.module["project_out"](self.target_output.float()).T
        return [logits] * depth


class HeadStudent(HeadGuesser):
    """An EagleHead, unrolled over its own features for as many tokens as PLACE_WEIGHTS has.

    target: the transformers model. frequent: int64 places in the draft vocabulary, as for DraftStudent.
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
        wanted = _positions(batch, len(PLACE_WEIGHTS))
        output = self.module.output[_some(len(self.module.output), self.frequent, random)]
        hidden = torch.stack([states[wanted] for states in unroll(self.module, batch, len(PLACE_WEIGHTS))])
        return distillation_loss(hidden, output, batch.features[wanted], output, PLACE_WEIGHTS)


def unroll(head: EagleHead, batch: TextBatch, depth: int) -> list[Tensor]:
    """For each place in a draft the head's guessed features: [texts, width, hidden], at j of token j.

    At place d (from 0) the features of the d tokens before j are the head's guesses, at places 0 to d - 1, of tokens
    that were drafted; those before are the target's. The one at position 0 means nothing.
    """
    tokens = batch.tokens
    width = tokens.shape[1]
    offsets = torch.arange(width, device=tokens.device)
    behind = offsets[:, None] - offsets  # how far a key is behind a query
    rotation = head.rotary(batch.features.float(), offsets[None])
    features, states = _shifted(batch.features.float()), []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for place in range(depth):
        hidden = head.mix(features, tokens)
        # the target's features up to here are keys of place 0, the guessed ones in between of the places after
        masks = [behind >= place, *(behind == place - earlier for earlier in range(1, place + 1))]
        masks[0] = masks[0] & ((offsets > 0) | (behind == 0))  # position 0 has no feature before it
        states.append(_layer(head.layers[0], hidden, rotation, keys, values, torch.cat(masks, 1)))
        features = _shifted(states[-1])
    return states


def _layer(
    layer: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor], keys: list[Tensor], values: list[Tensor], mask: Tensor
) -> Tensor:
    """A Llama decoder layer whose keys and values are those given and its own, which are appended."""
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
    """Features of the token before each; zero before the first."""
    return torch.cat([torch.zeros_like(features[:, :1]), features[:, :-1]], 1)


def _size(x: Tensor) -> Tensor:
    """Root mean square."""
    return x.float().square().mean().sqrt()


def _positions(batch: TextBatch, num_before: int) -> Tensor:
    """Positions with a next token and num_before tokens before them: bool [texts, width].

    Those inside prompts count too: the target's distribution there is as good a lesson, and costs nothing more to know.
    """
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return (positions >= num_before) & (positions < batch.lengths[:, None] - 1)


def _some(size: int, frequent: Tensor, random: torch.Generator) -> Tensor:
    """The frequent ones of `size` tokens and half as many others, drawn anew; ascending."""
    others = torch.randint(size, (len(frequent) // 2,), generator=random)
    tokens: Tensor = torch.cat([frequent, others.to(frequent.device)]).unique()
    return tokens
