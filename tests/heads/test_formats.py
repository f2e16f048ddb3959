"""Recognizing heads, checking them against their target before weights are read, and describing them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers import checkpoints
from helpers.checkpoints import DRAFT_VOCAB, VOCAB, WIDTH, Checkpoint

from specdec import Engine, SamplingParams, drafts
from specdec.drafts import find, kind_in, load_with_drafts
from specdec.heads import formats
from specdec.heads.files import PickleError
from specdec.models import loading
from specdec.runtime.artifacts import LoadError

FLOAT = {"dtype": torch.float32, "device": "cpu", "load_format": "auto"}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
WHOLE, PRUNED = "1 layer, draft vocabulary 128 of 128", "1 layer, draft vocabulary 40 of 128"
BLOCKS = "2 layers, 3 draft positions, draft vocabulary 128 of 128"
KINDS = {
    "eagle": f"EAGLE head (SafeAILab), {WHOLE}, final features",
    "eagle3 SafeAILab": f"EAGLE-3 head (SafeAILab), {PRUNED}, features of layers 2, 4, 5",
    "eagle3 DeepSpec": f"EAGLE-3 head (DeepSpec), {WHOLE}, features of layers 1, 3, 4, 5, 7",
    "dflash z-lab": f"DFlash head (z-lab), {BLOCKS}, features of layers 2, 4, 6",
    "eagle3 speculators": f"EAGLE-3 head (speculators), {PRUNED}, features of layers 2, 4, 5",
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the target of the generated heads."""
    folder = tmp_path_factory.mktemp("target")
    checkpoints.target().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("layout", ["safetensors", "shards"])
@pytest.mark.parametrize("name", KINDS)
def test_a_head_is_recognized_described_and_drafts(
    name: str, layout: str, target: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(dict(checkpoints.everything())[name].write(tmp_path, layout))
    with caplog.at_level(logging.INFO, "specdec"):
        options = {"method": kind_in(folder), "num_speculative_tokens": 3, "dtype": "float32", "device": "cpu"}
        engine = Engine.load(target, draft=folder, **options)
    said = [record.getMessage() for record in caplog.records if folder in record.getMessage()]
    assert said == [f"{folder}: {KINDS[name]}"]
    assert f"draft={KINDS[name]}," in repr(engine)
    assert engine.draft.description == KINDS[name]
    plain = Engine(engine.target).generate([[5, 6, 7]], GREEDY)[0]
    assert engine.generate([[5, 6, 7]], GREEDY)[0].token_ids == plain.token_ids


def test_a_pickled_head_is_loaded_if_allowed(target: str, tmp_path: Path) -> None:
    folder = str(checkpoints.eagle().write(tmp_path, "pickled"))
    options = {"draft": folder, "method": "eagle", "dtype": "float32", "device": "cpu"}
    with pytest.raises(PickleError, match=r"allow_pickle=True \(--allow-pickle\)"):
        Engine.load(target, **options)
    engine = Engine.load(target, **options, allow_pickle=True)
    assert len(engine.generate([[5, 6, 7]], GREEDY)[0].token_ids) == 12


# ---- refusals, each before weights of the target are read


def _bad_offsets(value: int) -> torch.Tensor:
    d2t = checkpoints.offsets()[0]
    d2t[3] = value
    return d2t


EAGLE3 = checkpoints.eagle3()
TRAPS: dict[str, tuple[Checkpoint, str]] = {
    "features of a wider target": (
        EAGLE3.with_tensors(fc__weight=torch.zeros(WIDTH, 3 * 48)),
        r"144 of the head .* must be the target's, 32 for each of the layers \[2, 4, 5\]; give the model that",
    ),
    "another width without an embedding of its own": (
        EAGLE3.with_config(hidden_size=48),
        r"embed_tokens.weight is missing in the head .*, whose hidden_size=48 is not the target's, 32",
    ),
    "another shape than by the config": (
        EAGLE3.with_config(intermediate_size=64),
        r"'.*' of the head .* has the shape \[.*\], but by its config it must have \[.*\]; correct the config, or copy",
    ),
    "d2t beyond the vocabulary": (
        EAGLE3.with_tensors(d2t=_bad_offsets(VOCAB)),
        rf"d2t\[3\]={VOCAB} must be an offset to a token id in \[0, {VOCAB}\).*give the target",
    ),
    "token twice": (
        EAGLE3.with_tensors(d2t=torch.tensor([5, 4, *([5] * (DRAFT_VOCAB - 2))]), t2d=None),
        r"d2t must map to each token once, but token 5 has two draft ids.*convert the head again",
    ),
    "fewer rows than d2t": (
        EAGLE3.with_tensors(lm_head__weight=torch.zeros(DRAFT_VOCAB - 1, WIDTH)),
        rf"lm_head.weight of the head .* has {DRAFT_VOCAB - 1} rows, but must have one for each entry of d2t, 40; copy",
    ),
    "no d2t": (
        EAGLE3.with_tensors(d2t=None, t2d=None),
        r"lm_head.weight of the head .* has 40 rows, but without d2t it must have 128.*copy the head again, d2t with",
    ),
    "missing": (
        EAGLE3.with_tensors(norm__weight=None, midlayer__mlp__up_proj__weight=None),
        r"up_proj.*missing .*copy",
    ),
    "unknown": (
        EAGLE3.with_tensors(foo__weight=torch.zeros(2)),
        r"foo.weight of the head .* are tensors that .*remove",
    ),
    "layer ids out of range": (
        checkpoints.eagle3(layer_ids=(2, 5, 9)),
        r"layer 9 of \[2, 5, 9\], which the head .* reads, must be in \[0, 8\].*give the target",
    ),
    "too few layer ids": (checkpoints.eagle3(layer_ids=(2, 5)), r"96 of the head .* must be the target's, 32 for each"),
    "another vocabulary": (
        checkpoints.eagle().with_tensors(embed_tokens__weight=torch.zeros(64, WIDTH)),
        r"64 of the head .* must be the target's, 128; give the model that the head was trained for",
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_head_that_does_not_fit_is_refused_before_the_target_is_read(
    name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, message = TRAPS[name]
    folder = str(checkpoint.write(tmp_path))
    monkeypatch.setattr(drafts, "load_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises((LoadError, ValueError), match=message):
        load_with_drafts(target, [folder], **FLOAT)


def test_a_folder_with_neither_model_nor_head_is_refused_with_the_known_formats(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = Checkpoint(EAGLE3.config, {"projector.weight": torch.zeros(WIDTH, WIDTH)})
    monkeypatch.setattr(drafts, "load_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(LoadError) as refused:
        load_with_drafts(target, [str(unknown.write(tmp_path))], **FLOAT)
    assert "weights are missing" in str(refused.value)
    assert all(each.title in str(refused.value) and each.signs in str(refused.value) for each in formats.FORMATS)


def test_a_draft_model_is_still_a_model(target: str) -> None:
    assert find(target).kind == "model"
    _, loaded = load_with_drafts(target, [target], **FLOAT)
    assert loaded[target].vocab_size == VOCAB


# ---- warnings


def _warnings(checkpoint: Checkpoint, target: str, folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.WARNING, "specdec"):
        load_with_drafts(target, [str(checkpoint.write(folder))], **FLOAT)
    return [record.getMessage() for record in caplog.records]


def test_an_embedding_that_is_not_the_targets_is_warned_of(
    target: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = checkpoints.eagle()
    assert _warnings(head, target, tmp_path / "own", caplog) == []
    near = head.tensors["embed_tokens.weight"] + 0.1 * torch.randn(VOCAB, WIDTH, generator=torch.manual_seed(0))
    assert _warnings(head.with_tensors(embed_tokens__weight=near), target, tmp_path / "near", caplog) == []
    other = torch.randn(VOCAB, WIDTH, generator=torch.manual_seed(1))
    said = _warnings(head.with_tensors(embed_tokens__weight=other), target, tmp_path / "other", caplog)
    assert len(said) == 1
    assert "embed_tokens.weight" in said[0]
    assert "does not resemble the target's embedding" in said[0]


def test_a_shorter_context_is_warned_of(target: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = _warnings(checkpoints.eagle3().with_config(max_position_embeddings=128), target, tmp_path, caplog)
    assert len(said) == 1
    assert said[0].startswith("max_position_embeddings=128 of the head")
    assert "below the target's, 256" in said[0]


# ---- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache without a network; returns the folder of org/head in it."""
    snapshot = tmp_path / "hub" / "models--org--head" / "snapshots" / ("0" * 40)
    (tmp_path / "hub" / "models--org--head" / "refs").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--head" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.mark.parametrize("source", ["org/head", "org/head@main"])
def test_a_head_on_the_hub(source: str, target: str, hub: Path) -> None:
    checkpoints.eagle3("SpecForge").write(hub)
    found = find(source)
    assert (found.kind, found.place) == ("eagle3", str(hub))
    _, loaded = load_with_drafts(target, [source], **FLOAT)
    assert loaded[source].format == "eagle3"


def test_the_files_that_are_requested_from_the_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations and safetensors at the top of the repository; pickles only if allowed."""
    asked = []

    def download(name: str, **options) -> str:
        asked.append((name, options["allow_patterns"], options["ignore_patterns"]))
        return str(hub)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loading.hub_folder("org/head")
    loading.hub_folder("org/head", allow_pickle=True)
    safe = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    assert asked == [("org/head", safe, ["*/*"]), ("org/head", [*safe, "*.bin", "*.pt"], ["*/*"])]
    for source in ("smollm2-135m", "smollm2-135m-eagle", str(hub.parent.parent), "model.gguf"):
        assert loading.hub_folder(source) is None


def test_a_head_that_the_hub_does_not_have(target: str, hub: Path) -> None:
    with pytest.raises(
        LoadError, match=r"source='org/none' must be a bundled name.*check the spelling and the network"
    ):
        find("org/none")
