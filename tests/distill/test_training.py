"""Training: it learns, it can be killed at any time, and its estimates of acceptance are correct."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from helpers.training import check_killed_run_resumes
from transformers import LlamaConfig

from specdec.distill import dataset, training
from specdec.distill.dataset import Dataset, TextBatch
from specdec.distill.students import DraftStudent, HeadStudent
from specdec.distill.training import Settings, accepted_ahead, evaluate, train
from specdec.heads.eagle import new_head

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SETTINGS = Settings(num_steps=12, tokens_per_batch=400, evaluate_every=6, save_every=4, seed=3)


@pytest.fixture
def data(target, texts, tmp_path: Path) -> Dataset:
    dataset.score(texts, target, tmp_path / "data")
    return Dataset(tmp_path / "data")


@pytest.fixture(params=["head", "draft"])
def new_student(request, target, data):
    def make():
        torch.manual_seed(5)
        if request.param == "head":
            head = new_head(target, torch.arange(0, 61))
            return HeadStudent(head, target, torch.arange(0, 60, 2), data.feature_sizes())
        return DraftStudent(LlamaConfig(vocab_size=61, **SHAPE), target, torch.arange(0, 60, 2))

    return make


def test_a_killed_run_resumes_to_the_same_result(new_student, data, tmp_path: Path) -> None:
    students = [new_student() for _ in range(3)]
    check_killed_run_resumes(students, data, SETTINGS, tmp_path, step=6)
    lines = (tmp_path / "killed" / "progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [6, 12]
    best = torch.load(tmp_path / "whole" / "best.pt", weights_only=True)
    assert best["step"] in (6, 12)
    assert best["module"].keys() == students[0].module.state_dict().keys()


def test_acceptance_rises(new_student, data, tmp_path: Path) -> None:
    student = new_student()
    before = evaluate(student, data)
    train(student, data, Settings(num_steps=120, tokens_per_batch=800), tmp_path / "run", cost_ratio=0.1)
    after = evaluate(student, data)
    assert after.sampled[0] > before.sampled[0] + 0.05


def test_a_damaged_checkpoint_and_other_settings_are_refused(new_student, data, tmp_path: Path) -> None:
    train(new_student(), data, SETTINGS, tmp_path / "run", cost_ratio=0.1)
    with pytest.raises(ValueError, match=r"must have settings .*, but has .*; use those, or remove it"):
        train(new_student(), data, Settings(num_steps=12), tmp_path / "run", cost_ratio=0.1)
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint\.pt must be a complete checkpoint .* remove it to start over"):
        train(new_student(), data, SETTINGS, tmp_path / "run", cost_ratio=0.1)


def test_a_full_disk_is_reported_and_keeps_the_old_checkpoint(new_student, data, tmp_path: Path, monkeypatch) -> None:
    train(new_student(), data, SETTINGS, tmp_path / "run", cost_ratio=0.1)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    def full(content, path):
        path.write_bytes(b"some")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint\.pt must be written .* free space and rerun"):
        training._save(tmp_path / "run" / "checkpoint.pt", {})
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


class Table:
    """A student whose distributions are given: draft and target both order-0 over three tokens."""

    def __init__(self, draft: torch.Tensor, target: torch.Tensor) -> None:
        self.draft, self.target_output, self.module = draft, torch.eye(3), torch.nn.Linear(1, 1)
        self.target = target

    def logits(self, batch: TextBatch, depth: int) -> list[torch.Tensor]:
        return [self.draft.log().expand(1, batch.tokens.shape[1], 3)] * depth


def test_acceptance_along_the_target_s_text_is_that_of_drafts() -> None:
    """Averaged over every text by its probability, it equals the enumeration of drafts: here, powers of sum min."""
    draft, target = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    student = Table(draft, target)
    mean = torch.zeros(3)
    for text in itertools.product(range(3), repeat=4):
        tokens = torch.tensor([[0, *text]])
        batch = TextBatch(tokens, target.log().expand(1, 5, 3), torch.tensor([5]), torch.tensor([1]))
        probability = target[list(text)].prod()
        mean += probability * accepted_ahead(student, batch, 1.0, 3)[:, 0]
    alpha = torch.minimum(draft, target).sum()
    torch.testing.assert_close(mean, torch.stack([alpha, alpha**2, alpha**3]), rtol=0.02, atol=0)  # bfloat16


def test_greedy_acceptance_is_agreement_up_to_the_first_difference() -> None:
    student = Table(torch.tensor([0.1, 0.8, 0.1]), torch.tensor([0.1, 0.8, 0.1]))
    tokens = torch.tensor([[0, 1, 1, 2, 1, 1, 1]])
    batch = TextBatch(tokens, student.target.log().expand(1, 7, 3), torch.tensor([7]), torch.tensor([1]))
    assert accepted_ahead(student, batch, 0.0, 3).tolist() == [[1, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1]]
