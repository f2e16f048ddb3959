"""The quantized weights in a GGUF file, as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.kernels.quantized import KINDS, Quantized
from specdec.models.files.saving import sample_step
from specdec.models.gguf.blocks import dequantize
from specdec.models.gguf.checkpoint import processed, processor_of, read_plan
from specdec.models.gguf.codes import BLOCK_BYTES, as_quantized
from specdec.models.gguf.header import Header, StoredTensor


class StoredWeights:
    """The weights of a transformers model's modules in the GGUF file that it is from, read when they are asked for.

    folder: as written by `describe`. model: may be on the meta device.
    """

    def __init__(self, header: Header, folder: Path, model: Any) -> None:
        names, altered = read_plan(folder)
        self._content, self._names, self._altered = header.content(), names, altered
        self._processor = processor_of(header, model.config.to_dict())
        self._stored = {names[each.name]: each for each in header.tensors if each.name in names}
        self._stored |= _of_tied_output(model, self._stored)
        self._orders: dict[str, Tensor | None] = {}

    def readable_kind(self, module: str) -> str | None:
        """The type of a module's weights, such as "Q4_1"; None if the file has none in one of KINDS, or not by rows."""
        stored = self._stored.get(f"{module}.weight")
        if stored is None or stored.kind not in KINDS or self._row_order(stored) is None:
            return None
        return stored.kind

    def read(self, module: str) -> Quantized:
        """A module's weights, which have a `readable_kind`."""
        rows, stored, order = self._rows(module)
        return as_quantized(rows[order], stored.kind, len(rows))

    def sample(self, module: str) -> Tensor:
        """`files.saving.sample_of` of the weights in float32; only the blocks with sampled values are dequantized."""
        rows, stored, order = self._rows(module)
        outputs, inputs = stored.shape
        flat = torch.arange(0, outputs * inputs, sample_step(outputs * inputs))
        size = KINDS[stored.kind].inputs
        blocks = rows.view(outputs, -1, BLOCK_BYTES[stored.kind])[order[flat // inputs], flat % inputs // size]
        values = dequantize(blocks.flatten().numpy(), stored.kind, torch.float32).view(len(flat), size)
        return values.gather(1, (flat % size).unsqueeze(1)).squeeze(1)

    def _rows(self, module: str) -> tuple[Tensor, StoredTensor, Tensor]:
        """The rows as they are stored, uint8 [out, bytes], their description, and the row of each output."""
        stored = self._stored[f"{module}.weight"]
        order = self._row_order(stored)
        assert order is not None, "it has a readable kind"
        content = torch.from_numpy(self._content[stored.start : stored.start + stored.num_bytes])
        return content.view(stored.shape[0], -1), stored, order

    def _row_order(self, stored: StoredTensor) -> Tensor | None:
        """The row in the file of each row in the model; None if the model's weights are not reordered rows."""
        if stored.name not in self._orders:
            self._orders[stored.name] = self._found_order(stored)
        return self._orders[stored.name]

    def _found_order(self, stored: StoredTensor) -> Tensor | None:
        if len(stored.shape) != 2:
            return None
        if stored.name not in self._altered:
            return torch.arange(stored.shape[0])
        of_row, of_column = (np.arange(size, dtype=np.float32) for size in stored.shape)
        rows = self._processed(np.broadcast_to(of_row[:, None], stored.shape), stored)
        columns = self._processed(np.broadcast_to(of_column, stored.shape), stored)
        if rows is None or columns is None or rows.shape != stored.shape:
            return None
        if (rows != rows[:, :1]).any() or (columns != of_column).any():
            return None
        return torch.from_numpy(rows[:, 0].astype(np.int64))

    def _processed(self, probe: Any, stored: StoredTensor) -> Any:
        result = processed(self._processor, probe, stored.name, self._names, {})
        return result.weights if result.name == stored.name else None


def _of_tied_output(model: Any, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored embedding by the name of the output head's weight, if that is the embedding."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None or output.weight is not embedding.weight:
        return {}
    modules = {module: name for name, module in model.named_modules()}
    of_embedding = stored.get(f"{modules[embedding]}.weight")
    return {} if of_embedding is None else {f"{modules[output]}.weight": of_embedding}
