"""Files of drafts are checked when they are loaded: what a docstring only states would else cost correctness."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny
from safetensors.numpy import save_file

from specdec.heads.eagle import EagleHead, load_head, new_head
from specdec.models.files.saving import fingerprint
from specdec.proposers.table import NgramTable
from specdec.runtime.artifacts import LoadError
from specdec.runtime.json_files import integers, read_json
from specdec.trees.optimal import Rates
from specdec.trees.shape import Tree

SHAPES = {
    "nothing": b"",
    "no text": b"\xff\xfe",
    "cut": b"[1, 2",
    "a number": b"7",
    "a text": b'"abc"',
    "null": b"null",
    "true": b"true",
    "an object": b'{"a": 1}',
    "not a number": b"[NaN]",
    "infinite": b"[1, Infinity]",
    "of 5000 digits": b"[" + b"9" * 5000 + b"]",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "floats": b"[0.5, 1.0]",
    "texts": b'["0", "1"]',
    "booleans": b"[true, false]",
    "lists": b"[[[0]]]",
    "empty": b"[]",
}


@pytest.fixture(scope="module")
def target():
    return tiny.make("llama", tiny.GQA)


@pytest.fixture
def head(target, tmp_path: Path) -> Path:
    """A folder with a head that drafts every other token."""
    new_head(target, torch.arange(0, 61, 2)).save(tmp_path / "head", fingerprint(target), {})
    return tmp_path / "head"


@pytest.mark.parametrize("shape", SHAPES)
def test_json_of_another_shape_gets_a_sentence(shape: str, target, head: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(SHAPES[shape])
    with pytest.raises(ValueError, match=r"^tree='.*file.json' must be a JSON file of rank paths such as .*: "):
        Tree.load(path)
    rule = r"^acceptance='.*file.json' must be a JSON object with acceptance and level_cost: "
    with pytest.raises(ValueError, match=rule):
        Rates.load(path)
    shutil.copy(path, head / "draft_vocabulary.json")
    with pytest.raises(LoadError, match=r"source='.*head' must be a folder with an undamaged head \(draft_vocabulary"):
        load_head(str(head), target)


@pytest.mark.parametrize(
    "content", [{"acceptance": [[0.5]]}, {"acceptance": [["0.5"]], "level_cost": 0}, {"acceptance": 1, "level_cost": 0}]
)
def test_rates_of_another_shape_get_a_sentence(content: dict, tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"^acceptance='.*' must be a JSON object with acceptance and level_cost: "):
        Rates.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tree='.*none.json' must be a JSON file .*: .*No such file"):
        Tree.load(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[1, 2]")
    assert read_json(tmp_path / "list.json", "it must be a list", lambda value: integers(value, "it")) == [1, 2]


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ([0, 4, 2, 6], r"draft_vocabulary has 2 after 4 and must ascend, each token once"),
        ([0, 2, 2, 4], r"draft_vocabulary has 2 after 2 and must ascend"),
        ([-1, 2, 4], r"token ids in \[0, 61\)"),
        ([0, 2, 61], r"token ids in \[0, 61\)"),
        ([0, 2, 10**12], r"token ids in \[0, 61\)"),
    ],
)
def test_a_head_with_an_invalid_vocabulary_is_refused(vocabulary, message: str, target, head: Path) -> None:
    (head / "draft_vocabulary.json").write_text(json.dumps(vocabulary))
    with pytest.raises(LoadError, match=message):
        load_head(str(head), target)
    fine = new_head(target, torch.arange(3))
    with pytest.raises(ValueError, match=message):
        EagleHead(fine.config, fine.embedding, fine.embedding, torch.tensor(vocabulary))


def test_a_token_id_beyond_all_integers_is_refused(target, head: Path) -> None:
    (head / "draft_vocabulary.json").write_text(f"[0, {10**30}]")
    with pytest.raises(LoadError, match="must be a folder with an undamaged head"):
        load_head(str(head), target)


TABLE = NgramTable.count([[1, 2, 3, 1, 2, 3, 1, 2, 4, 2, 3]], 61, max_ngram=2)
ARRAYS = {f"contexts.{n}": array for n, array in enumerate(TABLE._contexts, 1)} | {
    f"tokens.{n}": array for n, array in enumerate(TABLE._tokens, 1)
}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokens.1", lambda array: array[:-1], r"contexts.1 must be uint64, with a token for each"),
        ("tokens.2", lambda array: array * 0 + 61, r"tokens.2 must lie in \[0, 61\)"),
        ("tokens.1", lambda array: array * 0 - 1, r"tokens.1 must lie in \[0, 61\)"),
        ("tokens.1", lambda array: array.astype(np.float32), r"tokens.1 must lie in"),
        ("contexts.1", lambda array: array[::-1].copy(), r"contexts.1 must ascend, each once"),
        ("contexts.1", lambda array: array * 0, r"contexts.1 must ascend, each once"),
        ("contexts.1", lambda array: array + np.uint64(60), r"contexts.1 must be of tokens in \[0, 61\)"),
        ("contexts.2", lambda array: array + np.uint64(1 << 40), r"contexts.2 must be of tokens in \[0, 61\)"),
        ("contexts.1", lambda array: array.astype(np.int64), r"contexts.1 must be uint64"),
        ("contexts.2", lambda array: array.reshape(1, -1), r"contexts.2 must be uint64"),
    ],
)
def test_an_inconsistent_table_is_refused(name: str, change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    TABLE.save(path)
    assert NgramTable.load(path).continuation([1], 3) == TABLE.continuation([1], 3) != []
    save_file(ARRAYS | {name: change(ARRAYS[name])}, path, {"vocab_size": "61"})
    with pytest.raises(LoadError, match=rf"table='.*' must be an undamaged n-gram table \({message}"):
        NgramTable.load(path)


@pytest.mark.parametrize("lacking", ARRAYS)
def test_a_table_that_lacks_a_part_is_refused(lacking: str, tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    save_file({name: array for name, array in ARRAYS.items() if name != lacking}, path, {"vocab_size": "61"})
    with pytest.raises(LoadError, match="must be an undamaged n-gram table"):
        NgramTable.load(path)


@pytest.mark.parametrize("metadata", [None, {"vocab_size": "x"}, {"vocab_size": "-1"}, {"vocab_size": "9" * 30}])
def test_a_table_without_a_vocabulary_size_is_refused(metadata, tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    save_file(ARRAYS, path, metadata)
    with pytest.raises(LoadError, match="must be an undamaged n-gram table"):
        NgramTable.load(path)
