"""What a draft is trained on: tokens and the target's features for them, on disk, read in batches of like length.

A feature is what the target's output head reads, so the target's law at any position is one product away and need
not be stored.
"""

from __future__ import annotations

import json
import shutil
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


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts of like length, padded at their ends.

    tokens: int64 [texts, width]. features: bfloat16 [texts, width, hidden], the target's after each token.
    lengths, starts: int64 [texts], tokens of a text and of its prompt.
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

    folder: holds texts.json, tokens.bin (int32) and features.bin (bfloat16 [tokens, hidden]); read piecewise.
    Raises ValueError if the files do not belong together.
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
            raise ValueError(f"{folder} must hold {num_tokens} tokens and features ({error}); score it again") from None

    def __len__(self) -> int:
        return len(self.ends)

    def length(self, index: int) -> int:
        """Tokens of a text."""
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
        """Texts for evaluation that the target said at a temperature."""
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


@torch.inference_mode()
def score(texts: Sequence[Text], model: Any, folder: Path, *, tokens_per_batch: int = 2048) -> None:
    """Run the target over the texts and write a folder that `Dataset` reads.

    model: a transformers causal language model. Raises OSError if the disk is too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_disk(folder, sum(len(text.prompt + text.output) for text in texts) * (4 + 2 * model.config.hidden_size))
    body, order = model.base_model, sorted(range(len(texts)), key=lambda i: len(texts[i].prompt + texts[i].output))
    ends = np.cumsum([len(text.prompt + text.output) for text in texts])
    tokens = np.memmap(folder / "tokens.bin", np.int32, "w+", shape=(int(ends[-1]),))
    features = np.memmap(folder / "features.bin", np.uint16, "w+", shape=(int(ends[-1]), model.config.hidden_size))
    with tqdm(total=len(texts), unit="text") as bar:
        while order:
            longest = len(texts[order[-1]].prompt + texts[order[-1]].output)
            group = [order.pop() for _ in range(min(len(order), max(1, tokens_per_batch // longest)))]
            rows = [texts[i].prompt + texts[i].output for i in group]
            ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.device)
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state.bfloat16().cpu()
            for i, row, states in zip(group, rows, hidden, strict=True):
                tokens[ends[i] - len(row) : ends[i]] = row
                features[ends[i] - len(row) : ends[i]] = states[: len(row)].view(torch.int16).numpy().view(np.uint16)
            bar.update(len(group))
    tokens.flush()
    features.flush()
    description = {
        "hidden_size": model.config.hidden_size,
        "ends": ends.tolist(),
        "starts": [len(text.prompt) for text in texts],
        "temperatures": [text.temperature for text in texts],
        "held_out": corpus.held_out(texts),
    }
    (folder / "texts.json").write_text(json.dumps(description))


def _check_disk(folder: Path, needed: int) -> None:
    """A file that is mapped into memory kills the process where the disk ends."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(
            f"folder={folder} must have {needed // 10**6} MB free for features, it has {free // 10**6} MB; "
            "free space, use another folder, or make a smaller corpus"
        )
