"""Folders of heads: every layout is read alike, shapes before tensors, and what is unsafe or damaged is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers import checkpoints
from helpers.checkpoints import VOCAB, WIDTH
from safetensors.torch import save_file

from specdec.heads import files
from specdec.heads.files import HeadFolder, PickleError, flattened
from specdec.runtime.artifacts import LoadError

EVERYTHING = dict(checkpoints.everything())


@pytest.mark.parametrize("layout", ["safetensors", "shards", "pickled", "legacy"])
@pytest.mark.parametrize("name", ["eagle", "eagle3 SafeAILab", "eagle3 speculators", "dflash z-lab"])
def test_every_layout_holds_the_same_tensors(name: str, layout: str, tmp_path: Path) -> None:
    checkpoint = EVERYTHING[name]
    folder = HeadFolder.open(checkpoint.write(tmp_path, layout), allow_pickle=True)
    assert folder.shapes == {key: tuple(value.shape) for key, value in checkpoint.tensors.items()}
    tensors = folder.read()
    assert tensors.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(tensors[key], value) for key, value in checkpoint.tensors.items())
    assert [*folder.read(["fc.weight", "no such tensor"])] == ["fc.weight"]


@pytest.mark.parametrize("layout", ["safetensors", "pickled"])
def test_rows_are_those_of_the_tensor(layout: str, tmp_path: Path) -> None:
    checkpoint = checkpoints.eagle()
    folder = HeadFolder.open(checkpoint.write(tmp_path, layout), allow_pickle=True)
    rows = folder.read_rows("embed_tokens.weight", [3, 0, 90])
    assert torch.equal(rows, checkpoint.tensors["embed_tokens.weight"][[3, 0, 90]])


def test_only_shapes_still_reads_token_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoints.eagle3()
    opened = HeadFolder.open(checkpoint.write(tmp_path))
    read = []
    real = files._read
    monkeypatch.setattr(files, "_read", lambda file, names: read.extend(names) or real(file, names))
    tensors = HeadFolder(opened.path, opened.config, opened.files, only_shapes=True).read()
    assert sorted(read) == ["d2t", "t2d"]
    assert torch.equal(tensors["d2t"], checkpoint.tensors["d2t"])
    assert all(tensors[key].is_meta for key in tensors if key not in read)


# ---- pickles


def test_a_pickle_is_read_only_if_allowed(tmp_path: Path) -> None:
    folder = checkpoints.eagle().write(tmp_path, "pickled")
    with pytest.raises(PickleError, match=r"'pytorch_model.bin' .* must be .safetensors.*allow_pickle=True \(--allow-"):
        HeadFolder.open(folder)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "config.json").write_text("{}")
    for name, content in (("legacy", pickle.dumps({"fc.weight": Payload()})), ("torch", None)):
        if content is None:
            torch.save({"fc.weight": Payload()}, tmp_path / "pytorch_model.bin")
        else:
            (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(LoadError, match=r"must be an undamaged file of tensors"):
            HeadFolder.open(tmp_path, allow_pickle=True)
        assert not (tmp_path / "ran").exists(), name


def test_safetensors_go_before_a_pickle(tmp_path: Path) -> None:
    checkpoint = checkpoints.eagle()
    checkpoint.with_tensors(fc__weight=torch.zeros(1)).write(tmp_path, "pickled")
    assert HeadFolder.open(checkpoint.write(tmp_path)).shapes["fc.weight"] == (WIDTH, 2 * WIDTH)


def test_values_other_than_tensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"fc.weight": torch.zeros(2), "step": 3}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(LoadError, match=r"'step' in it is a int, not a tensor"):
        HeadFolder.open(tmp_path, allow_pickle=True)
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}, "step": 3}, tmp_path / "medusa_lm_head.pt")
    assert HeadFolder.open(tmp_path, allow_pickle=True).shapes == {"fc.weight": (2,)}


# ---- indices, prefixes, damage


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "part.bin", "sub/a.safetensors"])
def test_an_index_names_safetensors_of_its_own_folder(name: str, tmp_path: Path) -> None:
    folder = checkpoints.eagle().write(tmp_path, "shards")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["fc.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match=rf"names '{name}', but must name .safetensors files in its own folder"):
        HeadFolder.open(folder)


def test_a_shard_that_is_missing_or_cut_is_named(tmp_path: Path) -> None:
    folder = checkpoints.eagle().write(tmp_path, "shards")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(LoadError, match=r"00002-of-00002.safetensors' must be an undamaged file of tensors"):
        HeadFolder.open(folder)
    shard.unlink()
    with pytest.raises(LoadError, match=r"00002-of-00002.safetensors' must be an undamaged file of tensors"):
        HeadFolder.open(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(LoadError, match=r"must hold model.safetensors, or shards of it"):
        HeadFolder.open(folder)


def test_a_tensor_that_is_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.eagle().write(tmp_path, "shards")
    save_file({"fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(LoadError, match=r"is twice in .*; remove one"):
        HeadFolder.open(folder)


@pytest.mark.parametrize("prefix", files.PREFIXES)
def test_prefixes_are_dropped(prefix: str, tmp_path: Path) -> None:
    checkpoint = checkpoints.eagle3()
    folder = HeadFolder.open(checkpoint.renamed("", prefix).write(tmp_path))
    assert folder.shapes.keys() == checkpoint.tensors.keys()
    assert torch.equal(folder.read(["norm.weight"])["norm.weight"], checkpoint.tensors["norm.weight"])


def test_a_prefix_stays_where_names_would_collide(tmp_path: Path) -> None:
    checkpoint = checkpoints.eagle()
    both = checkpoint.with_tensors(model__fc__weight=torch.zeros(1))
    assert HeadFolder.open(both.write(tmp_path)).shapes.keys() == both.tensors.keys()


def test_quantized_weights_are_refused_when_they_are_read(tmp_path: Path) -> None:
    checkpoint = checkpoints.eagle().with_tensors(fc__weight=torch.zeros(WIDTH, 2 * WIDTH, dtype=torch.float8_e4m3fn))
    folder = HeadFolder.open(checkpoint.write(tmp_path))
    with pytest.raises(LoadError, match=r"'fc.weight' of the head .* is stored as F8_E4M3, but must be one of F64"):
        folder.read()


# ---- configs


def test_a_speculators_config_is_merged_with_that_of_its_layers(tmp_path: Path) -> None:
    folder = HeadFolder.open(checkpoints.eagle3("speculators").write(tmp_path))
    assert "transformer_layer_config" not in folder.config
    assert (folder.config["hidden_size"], folder.config["model_type"]) == (WIDTH, "llama")
    assert folder.config["speculators_model_type"] == "eagle3"
    assert folder.target_name == "org/target"


def test_keys_of_the_wrapper_go_before_those_of_the_layers() -> None:
    inner = {"model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": 8}
    config = flattened({"model_type": "speculator_model", "hidden_size": 16, "transformer_layer_config": inner})
    assert config == {"model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": 16}


@pytest.mark.parametrize("content", ["[]", "{", '{"hidden_size": NaN}'])
def test_a_config_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    folder = checkpoints.eagle().write(tmp_path)
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config='.*' must be a JSON object"):
        HeadFolder.open(folder)


def test_the_target_is_named_by_any_dialect(tmp_path: Path) -> None:
    named = checkpoints.eagle().with_config(base_model_name_or_path="org/base")
    assert HeadFolder.open(named.write(tmp_path)).target_name == "org/base"
    assert HeadFolder.open(checkpoints.eagle().write(tmp_path)).target_name is None
