"""The default model in pieces: the same weights bit for bit, without the package that reads GGUF files."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.first_light import pieces
from bench.first_light.pieces import dequantized, pack, unpack
from specdec.models.files.bundled import SMOLLM2_135M
from specdec.models.loading import load_pretrained, resolve
from specdec.runtime.artifacts import LoadError, folder_of


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_blocks_are_dequantized_as_gguf_does_it(kind: str) -> None:
    """Random weights of very different sizes, quantised by the package itself."""
    weights = np.random.default_rng(0).standard_normal((7, 96), dtype=np.float32) * np.logspace(-4, 3, 7)[:, None]
    kind_of_gguf = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.quantize(weights.astype(np.float32), kind_of_gguf)
    expected = torch.from_numpy(gguf.quants.dequantize(stored, kind_of_gguf)).bfloat16()
    assert torch.equal(dequantized(torch.from_numpy(stored), kind), expected)


@pytest.mark.slow
def test_the_default_model_comes_out_of_its_pieces_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Path(resolve(SMOLLM2_135M.name))
    paths = pack(tmp_path / "pieces")
    assert [path.name for path in paths] == ["piece-1.safetensors", "piece-2.safetensors", "piece-3.safetensors"]
    assert max(path.stat().st_size for path in paths) <= pieces.PIECE_BYTES
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    paths[1].rename(tmp_path / "elsewhere")
    with pytest.raises(LoadError, match=r"must also hold piece-2\.safetensors; copy all pieces there"):
        unpack(tmp_path / "pieces")
    (tmp_path / "elsewhere").rename(paths[1])
    folder = unpack(tmp_path / "pieces")
    assert folder == folder_of(SMOLLM2_135M) == Path(resolve(SMOLLM2_135M.name))
    assert folder.parent == tmp_path / "cache"
    unpacked, original = (load_file(each / "model.safetensors") for each in (folder, made))
    assert unpacked.keys() == original.keys()
    assert all(torch.equal(unpacked[name].view(torch.int16), original[name].view(torch.int16)) for name in original)
    for path in made.iterdir():
        if path.name != "specdec.json":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    model, tokenizer = load_pretrained(SMOLLM2_135M.name, dtype=torch.bfloat16)
    assert model.config.num_hidden_layers == 30
    assert tokenizer.decode(tokenizer("The capital of France").input_ids) == "The capital of France"


def test_damaged_pieces_leave_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    save_file(
        {"file:config.json": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "piece-1.safetensors", {"pieces": "1"}
    )
    with pytest.raises(LoadError, match="must hold the pieces of smollm2-135m"):
        unpack(tmp_path)
    assert not folder_of(SMOLLM2_135M).exists()


def test_a_folder_without_pieces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"must hold piece-1\.safetensors and so on; write them with --pack"):
        pieces._pieces(tmp_path)
