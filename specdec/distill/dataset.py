"""The training data: tokens and the target's features on disk, read in batches of similar length.

A feature is the input of the target's output head, so distributions need not be stored: each is one matrix product
away.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from specdec.distill import corpus
from specdec.distill.corpus import Text
from specdec.models.base import FINAL, FeatureLayers
from specdec.models.features import HiddenStates
from specdec.runtime.progress import bar

WINDOW = 256  # texts with features in memory at once; an interrupted run loses at most this many


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts of similar length, right-padded.

    tokens: int64 [texts, width]. features: bfloat16 [texts, width, hidden], the target's after each token.
    lengths, starts: int64 [texts], number of tokens of each text and of its prompt.
    states: bfloat16 [texts, width, n], hidden states of the layers that a head reads, if these are not the features.
    uniforms: float32 [texts, n] in [0, 1), for what is drawn in a training step; None in evaluation.
    """

    tokens: Tensor
    features: Tensor
    lengths: Tensor
    starts: Tensor
    states: Tensor | None = None
    uniforms: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """What a head reads of the target."""
        return self.features if self.states is None else self.states

    def is_output(self) -> Tensor:
        """Which tokens belong to a continuation: bool [texts, width]."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (positions >= self.starts[:, None]) & (positions < self.lengths[:, None])

    def to(self, device: torch.device) -> TextBatch:
        return self._mapped(lambda tensor: tensor.to(device))

    def part(self, index: int, num_parts: int) -> TextBatch:
        """Every num_parts-th text from the index-th on, padded as before."""
        return self._mapped(lambda tensor: tensor[index::num_parts])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> TextBatch:
        tensors = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return dataclasses.replace(
            self, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None}
        )


class Dataset:
    """Texts and features in a folder written by `score`.

    Args:
        folder: holds texts.json, tokens.bin (int32), features.bin (bfloat16 [tokens, hidden]) and states.bin (bfloat16
            [tokens, layers * hidden]), which are memory-mapped.
        layers: hidden states that batches hold beside the features, in this order; FINAL stands for the features.

    Raises:
        ValueError: if the files do not match, or lack some of the layers.
    """

    def __init__(self, folder: Path, layers: FeatureLayers = (FINAL,)) -> None:
        self.description: dict[str, Any] = json.loads((folder / "texts.json").read_text())
        self.layers, self._stored_layers = layers, self.description.get("layers", [])
        if missing := sorted(set(layers) - {FINAL, *self._stored_layers}):
            raise ValueError(
                f"folder={str(folder)!r} must hold hidden states of layers {missing}, but has {self._stored_layers}; "
                "run score with --layers into a new folder, or train on those layers"
            )
        self.ends = np.array(self.description["ends"], dtype=np.int64)
        self.starts = np.array(self.description["starts"], dtype=np.int64)
        self.temperatures: list[float | None] = self.description["temperatures"]
        self._held_out = set(self.description["held_out"])
        num_tokens, hidden_size = int(self.ends[-1]), self.description["hidden_size"]
        try:
            self.tokens = np.memmap(folder / "tokens.bin", np.int32, "r", shape=(num_tokens,))
            self.features = np.memmap(folder / "features.bin", np.uint16, "r", shape=(num_tokens, hidden_size))
            if self._stored_layers:
                shape = (num_tokens, len(self._stored_layers), hidden_size)
                self._states = np.memmap(folder / "states.bin", np.uint16, "r", shape=shape)
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
        hidden_size = self.features.shape[1]
        features = torch.zeros(len(indices), max(lengths), hidden_size, dtype=torch.bfloat16)
        states = torch.zeros(len(indices), max(lengths), len(self.layers) * hidden_size, dtype=torch.bfloat16)
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            span = slice(int(self.ends[index]) - length, int(self.ends[index]))
            tokens[row, :length] = torch.from_numpy(self.tokens[span].astype(np.int64))
            features[row, :length] = _bfloat16(self.features[span])
            if self.layers != (FINAL,):
                states[row, :length] = self._read(span)
        starts = torch.from_numpy(self.starts[list(indices)])
        read = None if self.layers == (FINAL,) else states
        return TextBatch(tokens, features, torch.tensor(lengths), starts, read)

    def _read(self, span: slice) -> Tensor:
        """Hidden states of `layers` of these tokens, bfloat16 [tokens, layers * hidden]."""
        places = {layer: index for index, layer in enumerate(self._stored_layers)}
        parts = [self.features[span] if each == FINAL else self._states[span, places[each]] for each in self.layers]
        return torch.cat(list(map(_bfloat16, parts)), -1)

    def feature_sizes(self) -> Tensor:
        """Root mean square of each number of `layers` over the first hundred texts: float [layers * hidden]."""
        some = self._read(slice(0, int(self.ends[min(99, len(self) - 1)])))
        return some.float().square().mean(0).sqrt()

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


def stored_layers(folder: Path) -> list[int]:
    """Layers whose hidden states `score` stored beside the features."""
    layers: list[int] = json.loads((folder / "texts.json").read_text()).get("layers", [])
    return layers


def _bfloat16(stored: Any) -> Tensor:
    """A copy of stored bits."""
    return torch.from_numpy(stored.view(np.int16).copy()).view(torch.bfloat16)


def score(
    texts: Sequence[Text], model: Any, folder: Path, *, layers: Sequence[int] = (), tokens_per_batch: int = 2048
) -> None:
    """Run the target over the texts and append tokens and features to a `Dataset` folder, resuming where it stopped.

    model: a transformers causal language model. layers: further hidden states to store, ascending.
    Raises ValueError for layers that the model does not have, and if the folder was begun with others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_layers(layers, model, folder)
    ends = np.cumsum([len(text.prompt + text.output) for text in texts])
    num_done, hidden_size = _num_scored(folder), model.config.hidden_size
    names = {"tokens.bin": 4, "features.bin": 2 * hidden_size, "states.bin": 2 * hidden_size * len(layers)}
    with ExitStack() as stack, bar(len(texts), "text", initial=num_done) as done:
        files = [stack.enter_context((folder / name).open("ab")) for name in names]
        for file, size in zip(files, names.values(), strict=True):  # drop what an interrupted run wrote at the end
            file.truncate((int(ends[num_done - 1]) if num_done else 0) * size)
        for start in range(num_done, len(texts), WINDOW):
            window = texts[start : start + WINDOW]
            for text, states in zip(window, _features(window, model, layers, tokens_per_batch, done), strict=True):
                read, final = states.split([hidden_size * len(layers), hidden_size], -1)
                stored = (np.array(text.prompt + text.output, np.int32), *map(_bits, (final, read)))
                for file, numbers in zip(files, stored, strict=True):
                    file.write(numbers.tobytes())
            for file in files:
                file.flush()
            _record(texts, ends, start + len(window), hidden_size, layers, folder)


def _bits(states: Tensor) -> Any:
    return states.contiguous().view(torch.int16).numpy()


def _check_layers(layers: Sequence[int], model: Any, folder: Path) -> None:
    num_layers = model.config.num_hidden_layers
    if list(layers) != sorted(set(layers)) or not set(layers) <= set(range(num_layers + 1)):
        raise ValueError(
            f"layers={list(layers)} must ascend within [0, {num_layers}], the target's hidden states; choose others"
        )
    path = folder / "texts.json"
    stored = json.loads(path.read_text()).get("layers", []) if path.exists() else list(layers)
    if stored != list(layers):
        raise ValueError(
            f"layers={list(layers)} must be those of {str(path)!r}, {stored}; give them, or remove the file"
        )


def _num_scored(folder: Path) -> int:
    path = folder / "texts.json"
    return len(json.loads(path.read_text())["ends"]) if path.exists() else 0


@torch.inference_mode()
def _features(
    texts: Sequence[Text], model: Any, layers: Sequence[int], tokens_per_batch: int, done: tqdm
) -> list[Tensor]:
    """Hidden states of the layers and the features of each text, bfloat16 [tokens, (layers + 1) * hidden].

    Computed in batches of similar length.
    """
    rows = [text.prompt + text.output for text in texts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    features: list[Tensor] = [torch.empty(0)] * len(rows)
    hidden = HiddenStates(model, model.config.num_hidden_layers)
    while order:
        longest = len(rows[order[-1]])
        group = [order.pop() for _ in range(min(len(order), max(1, tokens_per_batch // longest)))]
        ids = torch.tensor([[*rows[i], *[0] * (longest - len(rows[i]))] for i in group], device=model.device)
        taken: dict[int, Tensor] = {}
        with hidden.reading((*layers, FINAL), lambda states, i, taken=taken: taken.update({i: states.bfloat16()})):  # type: ignore[misc]
            model.base_model(input_ids=ids, use_cache=False)
        joined = torch.cat([taken[index] for index in range(len(layers) + 1)], -1).cpu()
        for i, states in zip(group, joined, strict=True):
            features[i] = states[: len(rows[i])].clone()
        done.update(len(group))
    return features


def _record(
    texts: Sequence[Text], ends: Any, num_done: int, hidden_size: int, layers: Sequence[int], folder: Path
) -> None:
    """Record the folder's contents atomically."""
    description = {
        "hidden_size": hidden_size,
        "layers": list(layers),
        "ends": ends[:num_done].tolist(),
        "starts": [len(text.prompt) for text in texts[:num_done]],
        "temperatures": [text.temperature for text in texts[:num_done]],
        "held_out": [index for index in corpus.held_out(texts) if index < num_done],
    }
    (folder / "texts.new").write_text(json.dumps(description))
    os.replace(folder / "texts.new", folder / "texts.json")
