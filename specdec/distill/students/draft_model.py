"""A small language model in training, which predicts the next-token distribution at every token of a text at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import LlamaConfig, LlamaModel

from specdec.distill.dataset import TextBatch
from specdec.distill.loss import distillation_loss
from specdec.distill.students.base import Loss, loss_tokens, scored_positions
from specdec.distill.students.scaling import root_mean_square, scale


class DraftStudent:
    """A small Llama model with the target's input and output embeddings, projected to its width.

    config: of the small model. target: a transformers model; its embeddings [vocab, hidden] are not trained.
    frequent: int64, ascending tokens that are in the loss at every step; others are sampled.
    """

    one_pass = False

    def __init__(self, config: LlamaConfig, target: Any, frequent: Tensor) -> None:
        self.embedding = target.get_input_embeddings().weight.detach()
        self.target_output = target.get_output_embeddings().weight.detach()
        self.frequent = frequent.to(self.embedding.device)
        body = LlamaModel(config)
        body.embed_tokens = nn.Identity()
        width, hidden_size = config.hidden_size, self.embedding.shape[1]
        project_in, project_out = (nn.Linear(hidden_size, width, bias=False) for _ in range(2))
        scale(project_in, 1.0, 1 / root_mean_square(self.embedding))
        scale(project_out, 1.0, 1 / root_mean_square(self.target_output))
        self.module = nn.ModuleDict({"body": body, "project_in": project_in, "project_out": project_out})
        self.module.to(self.embedding.device)

    def hidden(self, tokens: Tensor) -> Tensor:
        inputs = self.module["project_in"](embedding(tokens, self.embedding).float())
        states: Tensor = self.module["body"](inputs_embeds=inputs, use_cache=False).last_hidden_state
        return states

    def loss(self, batch: TextBatch, random: torch.Generator) -> Loss:
        positions = scored_positions(batch, 0)
        tokens = loss_tokens(len(self.target_output), self.frequent, random)
        output = self.target_output[tokens]
        hidden = self.hidden(batch.tokens)[positions].unsqueeze(0)
        mean = distillation_loss(
            hidden, self.module["project_out"](output.float()), batch.features[positions], output, (1.0,)
        )
        return Loss(mean, hidden.shape[1])

    def logits(self, batch: TextBatch, depth: int) -> list[Tensor]:
        logits = self.hidden(batch.tokens) @ self.module["project_out"](self.target_output.float()).T
        return [logits] * depth
