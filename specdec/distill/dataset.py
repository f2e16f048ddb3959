"""The training data: tokens and the target's features on disk, read in batches of similar length.

A feature is the input of the target's output head, so distributions need not be stored: each is one matrix product
away.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from specdec.distill import corpus
from specdec.distill.corpus import Text
from specdec.runtime.progress import bar

WINDOW = 256  # texts with features in memory at once; an interrupted run loses at most this many


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts of similar length, right-padded.

    tokens: int64 [texts, width]. features: bfloat16 [texts, width, hidden], the target's after each token.
    lengths, starts: int64 [texts], number of tokens of each text and of its prompt.
    """

    tokens: Tensor
    features: Tensor
    lengths: Tensor
    starts: Tensor

    def is_output(self) -> Tensor:
        """Which tokens belong to a continuation: bool [texts, width]."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (positions >= self.starts[:, None]) & (positions < self.lengths[:, None])

    def to(self, device: torch.device) -> TextBatch:
        return TextBatch(*(x.to(device) for x in (self.tokens, self.features, self.lengths, self.starts)))


class Dataset:
    """Texts and features in a folder written by `score`.

    Args:
        folder: holds texts.json, tokens.bin (int32) and features.bin (bfloat16 [tokens, hidden]), which are
            memory-mapped.

    Raises:
        ValueError: if the files do not match.
    """

    def __init__(self, folder: Path) -> None:
        self.description: dict[str, Any] = json.loads((folder / "texts.json").read_text())
        self.ends = np.array(self.description["ends"], dtype=np.int64)
        self.starts = np.array(self.description["starts"], dtype=np.int64)
        self.temperatures: list[float | None] = self.description["temperatures"]
        self._held_out = set(self.description["held_out"])
        num_tokens, hidden_size = int(self.ends[-1]), self.description["hidden_size"]
        try:
            self.tokens = np.memmap(folder / "tokens.bin", np.int32, "r", shape=(num_tokens,))
            self.features = np.memmap(folder / "features.bin", np.uint16, "r", shape=(num_tokens, hidden_size))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"folder={str(folder)!r} must hold {num_tokens} tokens with features ({error}); run score again"
            ) from None

    def __len__(self) -> int:
        return len(self.ends)

    def length(self, index: int) -> int:
        """Number of tokens of a text."""
        return int(self.ends[index] - (self.ends[index - 1] if index else 0))

    def batch(self, indices: Sequence[int]) -> TextBatch:
        """These texts, padded to the longest."""
        lengths = [self.length(index) for index in indices]
        tokens = torch.zeros(len(indices), max(lengths), dtype=torch.int64)
        features = torch.zeros(len(indices), max(lengths), self.features.shape[1], dtype=torch.bfloat16)
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            span = slice(int(self.ends[index]) - length, int(self.ends[index]))
            tokens[row, :length] = torch.from_numpy(self.tokens[span].astype(np.int64))
            features[row, :length] = torch.from_numpy(self.features[span].view(np.int16).copy()).view(torch.bfloat16)
        starts = torch.from_numpy(self.starts[list(indices)])
        return TextBatch(tokens, features, torch.tensor(lengths), starts)

    def feature_sizes(self) -> Tensor:
        """Root mean square of each feature over the first hundred texts: float [hidden]."""
        some = torch.from_numpy(self.features[: self.ends[min(99, len(self) - 1)]].view(np.int16).copy())
        return some.view(torch.bfloat16).float().square().mean(0).sqrt()

    def held_out(self, temperature: float) -> list[int]:
        """Held-out texts that the target generated at a temperature."""
        return [index for index in sorted(self._held_out) if self.temperatures[index] == temperature]

    def training_batches(self, tokens_per_batch: int, seed: int, epoch: int) -> list[list[int]]:
        """All other texts, shuffled and then grouped by length, as lists of indices."""
        random = np.random.default_rng([seed, epoch])
        indices = random.permutation(sorted(set(range(len(self))) - self._held_out))
        windows = np.array_split(indices, max(1, len(indices) // 512))
        batches = [batch for window in windows for batch in self._fill(window.tolist(), tokens_per_batch)]
        return [batches[i] for i in random.permutation(len(batches))]

    def _fill(self, indices: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in sorted(indices, key=self.length):
            if batch and (len(batch) + 1) * self.length(index) > tokens_per_batch:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


def score(texts: Sequence[Text], model: Any, folder: Path, *, tokens_per_batch: int = 2048) -> None:
    """Run the target over the texts and append tokens and features to a `Dataset` folder, resuming where it stopped.

    model: a transformers causal language model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum([len(text.prompt + text.output) for text in texts])
    num_done = _num_scored(folder)
    with (folder / "tokens.bin").open("ab") as tokens, (folder / "features.bin").open("ab") as features:
        written = int(ends[num_done - 1]) if num_done else 0
        tokens.truncate(written * 4)  # drop what an interrupted run wrote after its last record
        features.truncate(written * 2 * model.config.hidden_size)
        with bar(len(texts), "text", initial=num_done) as done:
            for start in range(num_done, len(texts), WINDOW):
                window = texts[start : start + WINDOW]
                for text, states in zip(window, _features(window, model, tokens_per_batch, done), strict=True):
                    tokens.write(np.array(text.prompt + text.output, np.int32).tobytes())
                    features.write(states.view(torch.int16).numpy().tobytes())
                tokens.flush()
                features.flush()
                _record(texts, ends, start + len(window), model.config.hidden_size, folder)


def _num_scored(folder: Path) -> int:
    path = folder / "texts.json"
    return len(json.loads(path.read_text())["ends"]) if path.exists() else 0


@torch.inference_mode()
def _features(texts: Sequence[Text], model: Any, tokens_per_batch: int, done: tqdm) -> list[Tensor]:
    """The target's features of each text, bfloat16 [tokens, hidden], computed in batches of similar length."""
    rows = [text.prompt + text.output for text in texts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    features: list[Tensor] = [torch.empty(0)] * len(rows)
    while order:
        longest = len(rows[order[-1]])
        group = [order.pop() for _ in range(min(len(order), max(1, tokens_per_batch // longest)))]
        ids = torch.tensor([[*rows[i], *[0] * (longest - len(rows[i]))] for i in group], device=model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.bfloat16().cpu()
        for i, states in zip(group, hidden, strict=True):
            features[i] = states[: len(rows[i])].clone()
        done.update(len(group))
    return features


def _record(texts: Sequence[Text], ends: Any, num_done: int, hidden_size: int, folder: Path) -> None:
    """Record the folder's contents atomically."""
    description = {
        "hidden_size": hidden_size,
        "ends": ends[:num_done].tolist(),
        "starts": [len(text.prompt) for text in texts[:num_done]],
        "temperatures": [text.temperature for text in texts[:num_done]],
        "held_out": [index for index in corpus.held_out(texts) if index < num_done],
    }
    (folder / "texts.new").write_text(json.dumps(description))
    os.replace(folder / "texts.new", folder / "texts.json")
