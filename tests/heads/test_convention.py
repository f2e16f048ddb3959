"""The convention that a head was trained with is found by measurement, on heads of which it is known.

An oracle computes exactly what its target does. Read as it was made, all its drafts are accepted with certainty; read
otherwise, some are not. Each oracle is written with a config that says otherwise, and must be found out.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import checkpoints
from helpers.checkpoints import DEFAULT_LAYERS, TARGET_LAYERS, Checkpoint

from specdec import CausalLM, Engine, SamplingParams
from specdec.drafts import load_with_drafts
from specdec.heads import convention, formats
from specdec.heads.base import Choice
from specdec.heads.convention import Measured, Reading, Text, feature_layer_choice, measure, readings, table, verdict
from specdec.models.base import FINAL

NUM_TOKENS = 3
IDS = "eagle_aux_hidden_state_layer_ids"
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def target() -> CausalLM:
    return CausalLM(checkpoints.oracle_target())


@pytest.fixture(scope="module")
def texts(target: CausalLM) -> list[Text]:
    sampling = SamplingParams(temperature=1, max_tokens=40, ignore_eos=True)
    answers = Engine(target, max_batch_size=8).generate([[first, first + 1] for first in range(3, 11)], sampling)
    return [Text([*each.prompt_token_ids, *each.token_ids], 2) for each in answers]


def measured(
    checkpoint: Checkpoint, target: CausalLM, texts: list[Text], folder: Path, num_tokens: int = NUM_TOKENS
) -> list[Measured]:
    found = formats.recognized(checkpoint.write(folder))
    assert found
    return measure(target, found.load(target.model), texts, num_tokens)


MADE: list[dict[str, Any]] = [
    {},
    {"norm_before_residual": True},
    {"feeds_normed": True},
    {"norm_before_residual": True, "feeds_normed": True},
]
SAID: list[dict[str, Any]] = [
    {IDS: [3, 5, 6]},
    {IDS: [1, 3, 4]},
    {"norm_before_residual": True},
    {"norm_before_residual": False},
    {"norm_output": True},
    {"norm_output": False},
    {IDS: [3, 5, 6], "norm_output": True, "norm_before_residual": True},
]


@pytest.mark.parametrize("made", MADE, ids=str)
def test_an_oracle_is_accepted_always_if_and_only_if_it_is_read_as_it_was_made(
    made: dict[str, Any], target: CausalLM, texts: list[Text], tmp_path: Path
) -> None:
    found = measured(checkpoints.oracle_eagle3(**made), target, texts, tmp_path)
    own, *others = found
    assert own.reading.options["feature_layers"] == [*DEFAULT_LAYERS]
    np.testing.assert_allclose(own.accepted, NUM_TOKENS, atol=1e-4)
    assert max(each.mean for each in others) < NUM_TOKENS - 0.005
    result = verdict(found)
    assert result.is_own
    assert result.is_certain


def is_wrong(made: dict[str, Any], said: dict[str, Any]) -> bool:
    right = checkpoints.oracle_eagle3(**made)
    return right.with_config(**said).config != right.config


@pytest.mark.parametrize(
    ("made", "said"), [(made, said) for made in MADE for said in SAID if is_wrong(made, said)], ids=str
)
def test_an_oracle_with_a_wrong_config_is_found_out(
    made: dict[str, Any], said: dict[str, Any], target: CausalLM, texts: list[Text], tmp_path: Path
) -> None:
    wrong = checkpoints.oracle_eagle3(**made).with_config(**said)
    result = verdict(measured(wrong, target, texts, tmp_path))
    assert not result.is_own
    assert result.is_certain
    assert result.best.mean == pytest.approx(NUM_TOKENS, abs=1e-4)
    options = result.best.reading.options
    assert options["feature_layers"] == [*DEFAULT_LAYERS]
    assert options["norm_before_residual"] == made.get("norm_before_residual", False)
    assert options["feeds_normed"] == made.get("feeds_normed", False)


def test_the_last_state_is_found_to_be_after_the_final_norm(
    target: CausalLM, texts: list[Text], tmp_path: Path
) -> None:
    """A config can only name the number of layers, by which some mean the state before the norm and some after."""
    made = checkpoints.oracle_eagle3((2, 4, FINAL))
    assert made.config[IDS] == [2, 4, TARGET_LAYERS]
    result = verdict(measured(made, target, texts, tmp_path))
    assert (result.is_own, result.is_certain) == (False, True)
    assert result.best.reading.labels["feature layers"] == "2, 4, final"
    assert result.best.mean == pytest.approx(NUM_TOKENS, abs=1e-4)


@pytest.mark.parametrize("said", [(1, 3, 4), (2, 4, 5), (0, 2, 3), (4, 3, 1)])
def test_the_layers_of_a_block_head_are_found(
    said: tuple[int, ...], target: CausalLM, texts: list[Text], tmp_path: Path
) -> None:
    """An id means the output of its layer, which is the state that enters the next; here it is one more or less."""
    settings = {**checkpoints.oracle_dflash().config["dflash_config"], "target_layer_ids": [*said]}
    head = checkpoints.oracle_dflash().with_config(dflash_config=settings)
    found = measured(head, target, texts, tmp_path, num_tokens=1)
    result = verdict(found)
    assert (result.is_own, result.is_certain) == (said == (1, 3, 4), True)
    assert result.best.reading.options == {"feature_layers": [2, 4, 5]}
    np.testing.assert_allclose(result.best.accepted, 1, atol=1e-4)
    assert sorted(each.mean for each in found)[-2] < 0.9


@pytest.mark.parametrize("order", [(5, 4, 2), (4, 2, 5)])
def test_states_in_another_order_are_not_taken_for_the_right_one(
    order: tuple[int, ...], target: CausalLM, texts: list[Text], tmp_path: Path
) -> None:
    """Reversed states are a reading and found; an order that no reading has leaves none that is accepted always."""
    found = measured(checkpoints.oracle_eagle3().with_config(**{IDS: [*order]}), target, texts, tmp_path)
    best = verdict(found).best
    assert (best.mean == pytest.approx(NUM_TOKENS, abs=1e-4)) == (order == (5, 4, 2))
    assert (best.reading.options["feature_layers"] == [2, 4, 5]) == (order == (5, 4, 2))


def test_the_found_convention_is_stored_and_used_by_the_next_load(
    target: CausalLM, texts: list[Text], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = checkpoints.oracle_target()
    model.save_pretrained(tmp_path / "target")
    head = tmp_path / "head"
    wrong = checkpoints.oracle_eagle3().with_config(**{IDS: [3, 5, 6]})
    result = verdict(measured(wrong, target, texts, head))
    options: dict[str, Any] = {"method": "eagle3", "dtype": "float32", "device": "cpu", "num_speculative_tokens": 3}

    def accepted(source: Path) -> float | None:
        engine = Engine.load(str(source), draft=str(head), **options)
        return engine.generate([[5, 6]], GREEDY)[0].counts.acceptance_rate

    assert (accepted(tmp_path / "target") or 0) < 0.9
    assert convention.store(head, target.model, result) == head / "convention.json"
    assert accepted(tmp_path / "target") == 1
    record = json.loads((head / "convention.json").read_text())
    assert record["readings"]["feature layers"] == "2, 4, 5"
    assert record["accepted_per_draft"] > record["accepted_per_draft_as_given"]
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    with caplog.at_level(logging.WARNING, "specdec"):
        accepted(tmp_path / "other")
    assert "was measured with another target and is not used" in caplog.text


def test_a_folder_that_cannot_be_written_is_remembered_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    head, model = checkpoints.eagle3().write(tmp_path / "head"), checkpoints.target()
    real = Path.write_text

    def write_text(self: Path, *arguments: Any, **options: Any) -> int:
        if self.parent == head:
            raise PermissionError(self)
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    own = Measured(Reading({"feature layers": "1"}, {"feature_layers": [1]}), np.ones(4))
    path = convention.store(head, model, verdict([own]))
    assert path.is_relative_to(tmp_path / "cache")
    assert convention.stored_options(head, model) == {"feature_layers": [1]}
    assert os.listdir(head).count("convention.json") == 0


@pytest.mark.parametrize("content", ["{", "[]", '{"target": "x"}', '{"target": "x", "options": []}'])
def test_a_damaged_convention_is_refused(content: str, tmp_path: Path) -> None:
    checkpoints.target().save_pretrained(tmp_path / "target")
    head = checkpoints.eagle3().write(tmp_path / "head")
    (head / "convention.json").write_text(content)
    with pytest.raises(ValueError, match=r"convention='.*convention.json' must be a JSON file with target and options"):
        load_with_drafts(str(tmp_path / "target"), [str(head)], dtype=torch.float32, device="cpu", load_format="auto")


# ---- readings and verdicts


def test_readings_of_feature_layers() -> None:
    choice = feature_layer_choice((2, 4, 5), TARGET_LAYERS)
    assert [*choice.readings] == ["2, 4, 5", "3, 5, 6", "1, 3, 4", "5, 4, 2", "6, 5, 3", "4, 3, 1"]
    choice = feature_layer_choice((1, TARGET_LAYERS), TARGET_LAYERS)  # one more is out of range
    assert [*choice.readings] == ["1, 8", "1, final", "0, 7", "8, 1", "final, 1", "7, 0"]
    choice = feature_layer_choice((FINAL,), TARGET_LAYERS)
    assert choice.readings == {"final": {"feature_layers": [FINAL]}, "8": {"feature_layers": [TARGET_LAYERS]}}


def test_readings_are_all_combinations() -> None:
    choices = [Choice("a", {"1": {"a": 1}, "2": {"a": 2}}), Choice("b", {"x": {"b": "x"}, "y": {"b": "y"}})]
    assert [each.options for each in readings(choices)] == [
        *({"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"})
    ]
    many = [Choice(str(index), {str(value): {} for value in range(10)}) for index in range(2)]
    with pytest.raises(ValueError, match=r"100 readings of 0, 1 are more than 96"):
        readings(many)


def _rows(*means: float, noise: float = 0.0, num_texts: int = 16) -> list[Measured]:
    random = np.random.default_rng(0)
    return [
        Measured(Reading({"x": str(index)}, {"x": index}), mean + noise * random.standard_normal(num_texts))
        for index, mean in enumerate(means)
    ]


def test_a_difference_within_noise_keeps_the_heads_own_reading() -> None:
    result = verdict(_rows(1.0, 1.02, noise=0.3))
    assert result.is_own
    assert not result.is_certain
    assert "not surely better than others: use more prompts" in table(_rows(1.0, 1.02, noise=0.3), result)


def test_a_difference_beyond_noise_is_reported_with_its_interval() -> None:
    rows = _rows(1.0, 1.5, 0.3, noise=0.05)
    result = verdict(rows)
    assert (result.is_own, result.is_certain) == (False, True)
    assert 0.4 < result.low < 0.5 < result.high < 0.6
    lines = table(rows, result).splitlines()
    assert lines[0].split() == ["x", "accepted", "per", "draft"]
    assert lines[1].endswith("trained with")
    assert lines[2].endswith("as the checkpoint says")
    assert lines[-1].startswith("The head was trained with x: 1: ")


def test_readings_that_make_no_difference_are_no_rivals() -> None:
    result = verdict(_rows(1.0, 1.0, 0.5))
    assert (result.is_own, result.is_certain) == (True, True)
    assert result.rival is not None
    assert result.rival.reading.options == {"x": 2}


def test_texts_that_are_too_short_are_refused(target: CausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"texts=1 must have outputs of more than 3 tokens"):
        measured(checkpoints.oracle_eagle3(), target, [Text([3, 4, 5], 2)], tmp_path)
