"""The data set holds the results of a forward pass, and keeps evaluation data apart."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from specdec.distill import corpus, dataset
from specdec.distill.dataset import Dataset


@pytest.fixture
def data(target, texts, tmp_path: Path) -> Dataset:
    dataset.score(texts, target, tmp_path, tokens_per_batch=64)
    return Dataset(tmp_path)


def test_features_are_those_of_a_forward_pass(data: Dataset, target, texts) -> None:
    batch = data.batch([5, 0, 17])
    for row, index in enumerate([5, 0, 17]):
        tokens = [*texts[index].prompt, *texts[index].output]
        assert batch.tokens[row, : len(tokens)].tolist() == tokens
        assert batch.lengths[row] == len(tokens)
        with torch.no_grad():
            expected = target.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        torch.testing.assert_close(batch.features[row, : len(tokens)].float(), expected, rtol=0.01, atol=0.01)
        is_output = batch.is_output()[row].tolist()
        assert is_output == [len(texts[index].prompt) <= i < len(tokens) for i in range(len(is_output))]


def test_an_epoch_has_every_text_once_but_those_held_out(data: Dataset, texts) -> None:
    first, again, second = (data.training_batches(100, seed, epoch) for seed, epoch in ((1, 0), (1, 0), (1, 1)))
    assert first == again != second
    for batches in (first, second):
        assert sorted(index for batch in batches for index in batch) == [i for i in range(240) if i % corpus.HELD_OUT]
        assert all(len(batch) * max(map(data.length, batch)) <= 100 for batch in batches)
    for temperature in (0.0, 1.0):
        held_out = data.held_out(temperature)
        assert held_out
        assert all(i % corpus.HELD_OUT == 0 and texts[i].temperature == temperature for i in held_out)


def test_files_that_do_not_belong_together_are_refused(data: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "features.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"must hold \d+ tokens with features .* run score again"):
        Dataset(tmp_path)


def test_a_killed_run_resumes_where_it_stopped(data: Dataset, target, texts, tmp_path: Path, monkeypatch) -> None:
    """Half a window was written and not noted when it was killed; more texts have come since."""
    killed = tmp_path / "killed"
    monkeypatch.setattr(dataset, "WINDOW", 64)
    dataset.score(texts[:100], target, killed, tokens_per_batch=64)
    for name in ("tokens.bin", "features.bin"):
        with (killed / name).open("ab") as file:
            file.write(b"broken off")
    dataset.score(texts, target, killed, tokens_per_batch=64)
    for name in ("texts.json", "tokens.bin"):
        assert (killed / name).read_bytes() == (tmp_path / name).read_bytes()
    resumed, uninterrupted = Dataset(killed).batch(range(0, 240, 7)).features, data.batch(range(0, 240, 7)).features
    torch.testing.assert_close(resumed, uninterrupted, rtol=0.02, atol=0.02)  # batched with others


def test_a_prompt_that_is_learnt_is_not_held_out(texts) -> None:
    assert corpus.held_out(texts) == list(range(0, 240, corpus.HELD_OUT))
    again = [*texts[:50], dataclasses.replace(texts[40], seed=99), *texts[51:]]
    assert 40 not in corpus.held_out(again)
    assert 80 in corpus.held_out(again)
