"""The header of a GGUF file: metadata and the table of tensors, without reading weights.

The reader of the package gguf creates objects for each token of the vocabulary, which takes half a minute for 262,144
tokens; only the places of such arrays are needed here.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STRING, _ARRAY = 8, 9  # types of values that have no fixed size
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
VERSIONS = (2, 3)  # version 1 counted in 32 bits
SHORT = 1_000  # longer arrays belong to the vocabulary


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in the file. shape: in the order of torch. kind: its type, such as "Q4_K". start: its first byte."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says of itself.

    metadata: by key; of an array longer than SHORT, its length. spans: the bytes of each entry of the metadata.
    tensors: in the order of the file. num_bytes: of the header, before the first tensor.
    """

    path: Path
    metadata: Mapping[str, Any]
    spans: Mapping[str, tuple[int, int]]
    tensors: tuple[StoredTensor, ...]
    num_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def content(self) -> NDArray[np.uint8]:
        """The file's bytes, mapped into memory. Writing to the array changes neither the file nor other mappings."""
        return np.memmap(self.path, np.uint8, "c")


def read_header(path: Path) -> Header:
    """The header of a file. Raises ValueError or struct.error if it is damaged, or tensors are missing at the end."""
    content: memoryview = np.memmap(path, np.uint8, "r").data
    if bytes(content[:4]) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, num_tensors, num_entries = struct.unpack_from("<IQQ", content, 4)
    if version not in VERSIONS:
        raise ValueError(f"GGUF version {version} must be one of {VERSIONS}")
    reader = _Reader(content, 24)
    metadata, spans = {}, {}
    for _ in range(num_entries):
        start = reader.position
        key = reader.string()
        metadata[key] = reader.value(reader.number("I"))
        spans[key] = start, reader.position
    table = [reader.tensor() for _ in range(num_tensors)]
    first = _aligned(reader.position, metadata.get("general.alignment", 32))
    tensors = tuple(_stored(entry, first) for entry in table)
    if (end := max((each.start + each.num_bytes for each in tensors), default=0)) > len(content):
        raise ValueError(f"{len(content)} bytes must be at least {end}, the end of its last tensor")
    return Header(path, metadata, spans, tensors, first)


def write_without_vocabulary(header: Header, path: Path) -> None:
    """Write a file with the same metadata and tensors, but without long arrays and with zeros for all weights.

    transformers reads it in no time, and makes the same configuration of it, except that `vocab_size` may be missing.
    The zeros take no space where files may have holes.
    """
    content = header.content()
    kept = [span for key, span in header.spans.items() if not _is_long(header, key)]
    end = max((end for _, end in header.spans.values()), default=24)
    entries = b"".join(content[start:stop].tobytes() for start, stop in kept)
    written = (
        content[:16].tobytes() + struct.pack("<Q", len(kept)) + entries + content[end : header.num_bytes].tobytes()
    )
    with path.open("wb") as stream:
        stream.write(written)
        stream.truncate(len(written) + content.size - header.num_bytes + _MOST_ALIGNMENT)


_MOST_ALIGNMENT = 1 << 16  # the tensors move, and their places are aligned again


def _is_long(header: Header, key: str) -> bool:
    start, end = header.spans[key]
    return key.startswith("tokenizer.ggml.") and isinstance(header.metadata[key], int) and end - start > SHORT


Entry = tuple[str, tuple[int, ...], int, int]  # of the table of tensors: name, shape, type, offset


class _Reader:
    """Reads values one after the other. All of it raises struct.error or ValueError at the end of the file."""

    def __init__(self, content: memoryview, position: int) -> None:
        self._content, self.position = content, position

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{kind}"
        found = struct.unpack_from(layout, self._content, self.position)
        self.position += struct.calcsize(layout)
        return found

    def string(self) -> str:
        length = self.number("Q")
        text = bytes(self._content[self.position : self.position + length])
        self.position += length
        return text.decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        return self._array() if kind == _ARRAY else self.number(_FORMATS[kind])

    def _array(self) -> list[Any] | int:
        kind, count = self.number("I"), self.number("Q")
        if count <= SHORT:
            return [self.value(kind) for _ in range(count)]
        if kind == _STRING:
            self._skip_strings(count)
        else:
            self._skip(count * struct.calcsize(_FORMATS[kind]))
        return int(count)

    def _skip_strings(self, count: int) -> None:
        unpack, content, position = struct.Struct("<Q").unpack_from, self._content, self.position
        for _ in range(count):
            position += 8 + unpack(content, position)[0]
        self.position = position

    def _skip(self, num_bytes: int) -> None:
        self.position += num_bytes
        if self.position > len(self._content):
            raise ValueError("it ends within an array")

    def tensor(self) -> Entry:
        name, num_dimensions = self.string(), self.number("I")
        shape = tuple(reversed(self.numbers("Q", num_dimensions)))  # the file has the fastest dimension first
        return name, shape, *self.numbers("I", 1), *self.numbers("Q", 1)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _stored(entry: Entry, first: int) -> StoredTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, shape, kind, offset = entry
    type_ = GGMLQuantizationType(kind)
    block_size, block_bytes = GGML_QUANT_SIZES[type_]
    if shape[-1] % block_size:
        raise ValueError(f"{name} has rows of {shape[-1]} weights, which must be a multiple of {block_size}")
    return StoredTensor(name, shape, type_.name, first + offset, prod(shape) // block_size * block_bytes)
