"""The quantized weights in a GGUF file, as they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.kernels.quantized import KINDS, Quantized
from specdec.models.gguf.blocks import dequantize
from specdec.models.gguf.checkpoint import processed, processor_of, weight_names
from specdec.models.gguf.codes import as_quantized
from specdec.models.gguf.header import Header, StoredTensor

_CHECKED_ROWS = 256  # of each weight, at least


class StoredWeights:
    """The weights of a transformers model's modules in the GGUF file that it was loaded from."""

    def __init__(self, header: Header, model: Any) -> None:
        self._content, self._names = header.content(), weight_names(header, model)
        self._processor = processor_of(header, model.config.to_dict())
        self._stored = {self._names[each.name]: each for each in header.tensors if each.name in self._names}
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        if output is not None and output.weight is embedding.weight:
            modules = {module: name for name, module in model.named_modules()}
            of_embedding = self._stored.get(f"{modules[embedding]}.weight")
            if of_embedding is not None:
                self._stored[f"{modules[output]}.weight"] = of_embedding

    def kind_of(self, module: str) -> str | None:
        """The type of a module's weights in the file, such as "Q4_1", or None if they are not there."""
        stored = self._stored.get(f"{module}.weight")
        return None if stored is None else stored.kind

    def read(self, module: str, weight: Tensor) -> Quantized | None:
        """A module's weights; None if the file has none of it in one of KINDS, or if they are not its rows.

        weight: [out, in], the same in the model. Raises ValueError if it has other values.
        """
        stored = self._stored.get(f"{module}.weight")
        if stored is None or stored.kind not in KINDS or (order := self._row_order(stored)) is None:
            return None
        content = torch.from_numpy(self._content[stored.start : stored.start + stored.num_bytes])
        rows = content.view(stored.shape[0], -1)
        _check_same(module, rows, stored, order, weight)
        return as_quantized(rows[order], stored.kind, len(rows))

    def _row_order(self, stored: StoredTensor) -> Tensor | None:
        """The row in the file of each row in the model; None if the model's weights are not reordered rows."""
        if len(stored.shape) != 2:
            return None
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


def _check_same(module: str, rows: Tensor, stored: StoredTensor, order: Tensor, weight: Tensor) -> None:
    """Compare some rows of the file with the model's, which may have been rounded to bfloat16 or float16."""
    some = torch.arange(0, len(order), max(1, len(order) // _CHECKED_ROWS))
    values = dequantize(rows[order[some]].flatten().numpy(), stored.kind, torch.float32).view(len(some), -1)
    if not torch.allclose(values, weight[some].float(), rtol=2**-7, atol=1e-7):
        raise ValueError(f"{module} must have the weights {stored.name} of its GGUF file, but has others")
