"""DSpark: DFlash's backbone with an output head of its own, a Markov bias on the logits and a confidence head.

The newest token's place drafts the token after it, so that a block of n tokens drafts n. The bias of a place depends on
the token before it, so tokens are drawn one after the other, each from its exact distribution given the one before:
    vanilla: w2 w1[x];
    gated: w2 (sigmoid(gate [h; w1[x]]) * w1[x]), h being the hidden state of the place;
    rnn: z = joint [s; w1[x]; h] is split into g, c, o; s becomes sigmoid(g) * s + (1 - sigmoid(g)) * tanh(c), which is
    0 at first; w2 tanh(o).
The confidence head predicts, of h alone or of [h; w1[x]], whether the place's token will be accepted.
Sources: DeepSpec `modeling/dspark/qwen3`, `markov_head.py`; vLLM `qwen3_dspark.py`; SpecForge; vllm-project/speculators
`models/dspark`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from specdec.heads.blocks.backbone import Block, BlockModule
from specdec.heads.blocks.checkpoints import dialect_of, is_block, load_block, required, setting, tensors_of
from specdec.heads.checkpoints import vocabulary_by_offsets
from specdec.heads.files import HeadFolder
from specdec.models.fusion import Projection
from specdec.runtime.artifacts import LoadError

_FIRST = "markov_head.markov_w1.weight"


class MarkovHead(nn.Module):
    """The vanilla bias. num_outputs: size of the draft vocabulary. width: of hidden states."""

    def __init__(self, vocab_size: int, num_outputs: int, rank: int, width: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2: Any = nn.Linear(rank, num_outputs, bias=False)

    def first_memory(self, hidden: Tensor) -> Tensor:
        """Memory [rows, n] before any token, of hidden states [rows, width]."""
        return hidden[:, :0]

    def step(self, memory: Tensor, before: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What w2 reads at a place, [rows, rank], and the memory after it. before: w1 [rows, rank] of the token."""
        return before, memory


class GatedMarkovHead(MarkovHead):
    """The gated bias."""

    def __init__(self, vocab_size: int, num_outputs: int, rank: int, width: int) -> None:
        super().__init__(vocab_size, num_outputs, rank, width)
        self.gate_proj: Any = nn.Linear(width + rank, rank)

    def step(self, memory: Tensor, before: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate_proj(torch.cat([hidden, before], -1)).sigmoid() * before, memory


class RecurrentMarkovHead(MarkovHead):
    """The rnn bias."""

    def __init__(self, vocab_size: int, num_outputs: int, rank: int, width: int) -> None:
        super().__init__(vocab_size, num_outputs, rank, width)
        self.joint_proj: Any = nn.Linear(2 * rank + width, 3 * rank)

    def first_memory(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(len(hidden), self.markov_w1.embedding_dim)

    def step(self, memory: Tensor, before: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        gate, candidate, output = self.joint_proj(torch.cat([memory, before, hidden], -1)).chunk(3, -1)
        kept = gate.sigmoid()
        return output.tanh(), kept * memory + (1 - kept) * candidate.tanh()


KINDS = {"vanilla": MarkovHead, "gated": GatedMarkovHead, "rnn": RecurrentMarkovHead}


class ConfidenceHead(nn.Module):
    """Logit [..., 1] of the probability that a token is accepted."""

    def __init__(self, num_inputs: int, *, has_bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(num_inputs, 1, bias=has_bias)


class DSparkHead(BlockModule):
    """A DSpark head."""

    format = "dspark"
    markov_head: MarkovHead
    confidence_head: ConfidenceHead | None
    confidence_reads_markov: bool = False

    def configure(self, folder: HeadFolder) -> None:
        shapes, width, self.confidence_head = tensors_of(folder).shapes, self.config.hidden_size, None
        kind = setting(folder, "markov_head_type", "vanilla")
        if kind not in KINDS:
            raise LoadError(
                f"markov_head_type={kind!r} of the head {str(folder.path)!r} must be one of {', '.join(KINDS)}; use "
                "such a head"
            )
        vocab_size, rank = shapes[_FIRST][0], required(folder, "markov_rank", 1)
        num_outputs = shapes.get("lm_head.weight", shapes["markov_head.markov_w2.weight"])[0]
        with torch.device("meta"):
            self.markov_head = KINDS[kind](vocab_size, num_outputs, rank, width)
            if "confidence_head.proj.weight" in shapes:
                self.confidence_reads_markov = bool(setting(folder, "confidence_head_with_markov", False))
                self.confidence_head = ConfidenceHead(
                    width + rank * self.confidence_reads_markov, has_bias="confidence_head.proj.bias" in shapes
                )

    def logits(self, block: Block, newest: Tensor, drafted: Tensor) -> Tensor:
        """Logits [rows, 1, draft vocab] of the next draft token, with the bias by the token before it."""
        place, head = drafted.shape[1], self.markov_head
        if not block.memory:
            block.memory.append(head.first_memory(block.hidden[:, 0]))
        texts = torch.cat([newest.unsqueeze(1), drafted], 1)
        for index in range(len(block.memory) - 1, place + 1):
            block.memory.append(self._step(block, texts, index)[1])
        read, _ = self._step(block, texts, place)
        bias: Tensor = head.markov_w2(read)
        return block.logits[:, place : place + 1] + bias.unsqueeze(1)

    def _step(self, block: Block, texts: Tensor, place: int) -> tuple[Tensor, Tensor]:
        return self.markov_head.step(block.memory[place], self._before(texts[:, place]), block.hidden[:, place])

    def confidence(self, block: Block, newest: Tensor, drafted: Tensor) -> Tensor | None:
        if self.confidence_head is None:
            return None
        inputs = block.hidden[:, drafted.shape[1]]
        if self.confidence_reads_markov:
            before = self._before(torch.cat([newest.unsqueeze(1), drafted], 1)[:, -1])
            inputs = torch.cat([inputs, before], -1)
        confidence: Tensor = self.confidence_head.proj(inputs).float().sigmoid().squeeze(-1)
        return confidence

    def _before(self, tokens: Tensor) -> Tensor:
        """w1 [rows, rank] of tokens int64 [rows]."""
        return embedding(tokens, self.markov_head.markov_w1.weight)

    def fuse(self) -> None:
        super().fuse()
        self.markov_head.markov_w2 = Projection(self.markov_head.markov_w2)


def recognize(folder: HeadFolder) -> str | None:
    """The dialect of a DSpark head's folder, None if it is not one."""
    return dialect_of(folder) if is_block(folder) and _FIRST in tensors_of(folder).shapes else None


def load(folder: HeadFolder, model: Any, load_format: str) -> DSparkHead:
    """See `load_block`."""
    head = load_block(folder, model, load_format, DSparkHead, drafts_at_anchor=True)
    maps = tensors_of(folder).read(("d2t", "t2d"))
    if "d2t" in maps:  # the vocabulary ascends, whatever the order of the checkpoint's rows
        _, rows = vocabulary_by_offsets(maps["d2t"], maps.get("t2d"), head.vocab_size)
        weight = head.markov_head.markov_w2.weight
        head.markov_head.markov_w2.weight = nn.Parameter(weight[rows.to(weight.device)], requires_grad=False)
    return head
