"""Acceptance by level and rank, counted in the real loop, and the tree that the command writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from specdec.conformance.toys import table
from specdec.distill.__main__ import main
from specdec.distill.evaluation.tree import MIN_TRIED, Counts, count
from specdec.models.markov import MarkovModel
from specdec.proposers.draft_model import DraftModelProposer
from specdec.trees.optimal import Rates
from specdec.trees.shape import MAX_LEVELS, Tree

FALLING = torch.tensor([[4, 2, 1], [1, 4, 2], [2, 1, 4], [4, 1, 2]]).double() / 7
TARGET, TREE = MarkovModel(table(3, FALLING)), Tree.balanced([3, 2])
PROMPTS = [(i % 3, i % 2) for i in range(12)]


def counted(draft: MarkovModel, temperature: float) -> Counts:
    proposer = DraftModelProposer(draft, tree=TREE)
    return count(TARGET, proposer, PROMPTS, TREE, [temperature], max_tokens=21, batch_size=5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_is_the_target_has_its_first_sibling_accepted(temperature: float) -> None:
    counts = counted(TARGET, temperature)
    assert counts.accepted[0] == [counts.tried[0][0], 0, 0]
    assert counts.accepted[1] == [counts.tried[1][0], 0]
    assert counts.tried[0][0] == counts.tried[0][2] > counts.tried[1][0] > MIN_TRIED


def test_the_rank_of_the_targets_token_is_counted() -> None:
    """A draft that swaps the first and the second choice: greedy, the second sibling is always the one."""
    order = TARGET.table.argsort(-1, descending=True)
    first, second = (order[..., i : i + 1] for i in (0, 1))
    swapped = TARGET.table.scatter(-1, first, TARGET.table.gather(-1, second))
    swapped = swapped.scatter(-1, second, TARGET.table.gather(-1, first))
    counts = counted(MarkovModel(swapped), 0.0)
    assert counts.accepted[0] == [0, counts.tried[0][1], 0]
    assert counts.accepted[1] == [0, counts.tried[1][1]]
    assert counts.acceptance() == [[0, 1, 0]] * MAX_LEVELS


def test_levels_and_ranks_that_were_not_measured_are_like_those_that_were() -> None:
    counts = Counts([[200, 200, 200], [100, 100], [9]], [[100, 40, 20], [40, 20], [9]])
    levels = counts.acceptance()
    assert levels[0] == [0.5, 0.2, 0.1]
    assert levels[1] == pytest.approx([0.4, 0.2, 0.1])
    assert levels[2:] == [levels[1]] * (MAX_LEVELS - 2)
    assert sum(Counts([[60, 60], [60]], [[30, 30], [50]]).acceptance()[1]) == pytest.approx(1)


def test_the_command_writes_a_tree_that_an_engine_loads(
    target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The target drafts for itself; a folder of a draft with `acceptance.json` needs no more than its name."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(3)))
    command = ["tree", "--target", str(target_folder), "--draft", str(target_folder), "--prompts", str(prompts)]
    command += ["--num-prompts", "2", "--max-tokens", "8", "--widths", "2", "1", "--nodes", "5", "--temperatures", "0"]
    assert main([*command, "--out", str(tmp_path / "made")]) == 0
    printed = capsys.readouterr().out
    assert "level 1, " in printed
    assert "requested: " in printed
    rates, tree = Rates.load(tmp_path / "made" / "acceptance.json"), Tree.load(tmp_path / "made" / "tree.json")
    assert rates.acceptance[0] == (1.0, 0.0)
    assert set(tree.paths) <= set(Tree.chain(5).paths)  # further siblings are of no use to it


@pytest.mark.parametrize(
    "content",
    ["{}", '{"acceptance": [[0.9, 0.9]], "level_cost": 0.1}', '{"acceptance": [[0.9]], "level_cost": -1}', "x"],
)
def test_invalid_rates_are_rejected(content: str, tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    path.write_text(content)
    with pytest.raises(
        ValueError, match=r"must be a JSON object|must be probabilities|level_cost=-1.0 must be at least 0"
    ):
        Rates.load(path)


def test_a_missing_draft_is_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["tree", "--target", "no-such-model", "--out", str(tmp_path)]) == 2
    assert "draft=None must be given: no draft is packaged with 'no-such-model'" in capsys.readouterr().err
