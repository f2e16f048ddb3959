"""The default model in a few small files, for machines without network access: its weights, still quantized.

`pack` writes them on a machine that can fetch the model. `unpack` recreates, without the package gguf, the folder that
`specdec.models.loading.resolve` would have made, with bit-identical weights.

`python -m bench.first_light.pieces` makes the model available, for scripts: from the cache, else from the pieces in the
folder SPECDEC_FIRST_LIGHT_WEIGHTS; it exits with 1 if it cannot.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.models.files.bundled import SMOLLM2_135M, bundled_gguf
from specdec.models.loading import resolve
from specdec.runtime.artifacts import LoadError, folder_of, is_complete, made_once

PIECE_BYTES = 36 << 20  # maximum size of a piece: uploads to a GPU machine may be limited
WEIGHTS = "SPECDEC_FIRST_LIGHT_WEIGHTS"
WEIGHTS_FILE = "model.safetensors"
_BLOCKS = {"Q4_1": 20, "Q8_0": 34}  # bytes per 32 weights
_LAYER = {  # names in a GGUF file -> in transformers' Llama
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_OTHERS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def pack(folder: Path, piece_bytes: int = PIECE_BYTES) -> list[Path]:
    """Write the default model to FOLDER/piece-1.safetensors and so on, each of at most `piece_bytes`.

    Fetches the model if necessary. Raises LoadError unless the pieces dequantize to the same weights.
    """
    made = Path(resolve(SMOLLM2_135M.name))
    entries = [*_packed_weights(bundled_gguf(SMOLLM2_135M), made), *_packed_files(made)]
    pieces = _split(entries, piece_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"piece-{number}.safetensors" for number in range(1, len(pieces) + 1)]
    for path, piece in zip(paths, pieces, strict=True):
        save_file(dict(piece), path, {"pieces": str(len(pieces)), "model": SMOLLM2_135M.name})
    return paths


def unpack(folder: Path) -> Path:
    """The folder of the default model in the cache, created from the pieces in `folder` unless it exists.

    Raises LoadError if pieces are missing or damaged.
    """

    def make(staging: Path) -> dict[str, Any]:
        _unpack(_pieces(folder), staging / "made")
        return dataclasses.asdict(SMOLLM2_135M)

    rule = f"folder={str(folder)!r} must hold the pieces of {SMOLLM2_135M.name}"
    what = f"assembling {SMOLLM2_135M.name}, once"
    return made_once(folder_of(SMOLLM2_135M), make, disk_bytes=SMOLLM2_135M.disk_bytes, rule=rule, what=what)


def why_unavailable() -> str | None:
    """Make the default model available in the cache, from its pieces if necessary; returns the reason if it cannot.

    Raises LoadError for missing or damaged pieces.
    """
    if is_complete(folder_of(SMOLLM2_135M)):
        return None
    if not (pieces := os.environ.get(WEIGHTS)):
        return f"its weights are not in the cache, and {WEIGHTS} names no folder with their pieces"
    unpack(Path(pieces))
    return None


def dequantized(stored: Tensor, kind: str) -> Tensor:
    """Dequantize stored weights to bfloat16 [rows, n]. stored: uint8 [rows, bytes] for Q4_1 and Q8_0, else F32.

    Computed in float32 and rounded once, as in transformers.
    """
    if kind == "F32":
        return stored.bfloat16()
    blocks = stored.view(-1, _BLOCKS[kind])
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    if kind == "Q8_0":
        values = scales * blocks[:, 2:].contiguous().view(torch.int8).float()
    else:
        minima = blocks[:, 2:4].contiguous().view(torch.float16).float()
        quants = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)  # low nibbles first
        values = scales * quants.float() + minima
    return values.view(len(stored), -1).bfloat16()


# ---- packing

Entry = tuple[str, Tensor]  # "KIND:name": KIND is a number format of GGUF, or "file" for a file's compressed bytes


def _packed_weights(gguf: Path, made: Path) -> Iterator[Entry]:
    from gguf import GGUFReader

    expected = load_file(made / WEIGHTS_FILE)
    for tensor in GGUFReader(gguf).tensors:
        kind, name = tensor.tensor_type.name, _name(tensor.name)
        orders = _orders(torch.from_numpy(tensor.data.copy()), name)
        stored = next((rows for rows in orders if _equal(rows, kind, expected[name])), None)
        if stored is None:
            raise LoadError(
                f"{name}, stored as {kind}, must dequantize to the weights in {made}; use transformers 5.17 or newer"
            )
        del expected[name]
        yield f"{kind}:{name}", stored
    if missing := sorted(set(expected) - {"lm_head.weight"}):
        raise LoadError(f"{gguf} must hold all weights of {made}, but {missing[0]} is missing")


def _name(name: str) -> str:
    if name in _OTHERS:
        return _OTHERS[name]
    _, layer, of_layer, suffix = name.split(".")
    return f"model.layers.{layer}.{_LAYER[of_layer]}.{suffix}"


def _orders(stored: Tensor, name: str) -> Iterator[Tensor]:
    """The rows in GGUF order and, for queries and keys, in the order of transformers: the two halves of each head."""
    yield stored
    if "q_proj" in name or "k_proj" in name:
        for head_dim in (32, 64, 128):
            if len(stored) % head_dim == 0:
                yield stored.view(-1, head_dim // 2, 2, stored.shape[1]).transpose(1, 2).reshape(stored.shape)


def _equal(stored: Tensor, kind: str, expected: Tensor) -> bool:
    return torch.equal(dequantized(stored, kind).view(torch.int16), expected.view(torch.int16))


def _packed_files(made: Path) -> Iterator[Entry]:
    for path in sorted(made.iterdir()):
        if path.name not in (WEIGHTS_FILE, "specdec.json"):
            yield (
                f"file:{path.name}",
                torch.frombuffer(bytearray(zlib.compress(path.read_bytes(), 9)), dtype=torch.uint8),
            )


def _split(entries: Sequence[Entry], piece_bytes: int) -> list[list[Entry]]:
    """First-fit decreasing: the largest entry first, each into the first piece with enough room, including metadata."""
    pieces: list[list[Entry]] = []
    room: list[int] = []
    for name, tensor in sorted(entries, key=lambda entry: -entry[1].nbytes):
        needed = tensor.nbytes + 256
        if needed > piece_bytes - 1024:
            raise ValueError(f"piece_bytes={piece_bytes} must hold {name}, which has {tensor.nbytes} bytes")
        number = next((number for number, left in enumerate(room) if left >= needed), len(pieces))
        if number == len(pieces):
            pieces.append([])
            room.append(piece_bytes - 1024)
        pieces[number].append((name, tensor))
        room[number] -= needed
    return pieces


# ---- unpacking


def _pieces(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("piece-*.safetensors"))
    if not paths:
        raise LoadError(f"folder={str(folder)!r} must hold piece-1.safetensors and so on; write them with --pack")
    with safe_open(paths[0], "pt") as first:
        wanted = {f"piece-{number}.safetensors" for number in range(1, int(first.metadata()["pieces"]) + 1)}
    if missing := sorted(wanted - {path.name for path in paths}):
        raise LoadError(f"folder={str(folder)!r} must also hold {', '.join(missing)}; copy all pieces there")
    return paths


def _unpack(paths: Sequence[Path], folder: Path) -> None:
    folder.mkdir()
    weights = {}
    for path in paths:
        for entry, stored in load_file(path).items():
            kind, _, name = entry.partition(":")
            if kind == "file":
                (folder / name).write_bytes(zlib.decompress(stored.numpy().tobytes()))
            else:
                weights[name] = dequantized(stored, kind)
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})


if __name__ == "__main__":
    if reason := why_unavailable():
        raise SystemExit(f"the default pair is left out: {reason}")
