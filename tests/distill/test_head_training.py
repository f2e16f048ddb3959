"""Heads that read several layers: they learn, a killed run resumes, and measuring finds how they were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.training import check_killed_run_resumes

from specdec.distill import dataset, untrained
from specdec.distill.corpus import Text
from specdec.distill.dataset import Dataset
from specdec.distill.exports import export
from specdec.distill.students import BlockStudent, HeadStudent, unscale
from specdec.distill.training import Settings, evaluate, train
from specdec.heads import convention, formats
from specdec.models.causal import CausalLM

LAYERS = (1, 2, 3)
SETTINGS = Settings(num_steps=8, tokens_per_batch=400, evaluate_every=4, save_every=2, seed=3, anchors_per_text=4)


@pytest.fixture(scope="module")
def target() -> Any:
    """A random Llama of 4 layers, with layers that change little, so that heads learn it within seconds."""
    model = tiny.make("llama", tiny.GQA | {"num_hidden_layers": 4})
    for parameter in model.model.layers.parameters():
        parameter.data *= 0.4 if parameter.ndim > 1 else 1
    return model


@pytest.fixture(scope="module")
def data(target: Any, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Texts that the target samples."""
    folder, random = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 61, (240, 3), generator=random)
    with torch.inference_mode():
        while tokens.shape[1] < 16:
            probs = target(input_ids=tokens, use_cache=False).logits[:, -1].softmax(-1)
            tokens = torch.cat([tokens, probs.multinomial(1, generator=random)], 1)
    texts = [Text(tuple(row[:3]), tuple(row[3:]), 1.0, index) for index, row in enumerate(tokens.tolist())]
    dataset.score(texts, target, folder, layers=LAYERS)
    return Dataset(folder, LAYERS)


def new_student(name: str, target: Any, data: Dataset) -> Any:
    torch.manual_seed(5)
    tokens, sizes = torch.arange(61), data.feature_sizes()
    if name == "dflash":
        return BlockStudent(untrained.new_dflash(target, LAYERS, 60, 5, 1), target, tokens, sizes)
    return HeadStudent(untrained.new_eagle3(target, LAYERS, tokens), target, tokens, sizes)


def test_stored_states_are_those_of_the_layers(target: Any, data: Dataset) -> None:
    batch = data.batch([3, 7])
    with torch.inference_mode():
        states = target(input_ids=batch.tokens, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer] for layer in LAYERS], -1)
    torch.testing.assert_close(batch.inputs.float(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(batch.features.float(), states[-1], rtol=0.02, atol=0.02)
    assert torch.equal(data.feature_sizes(), data._read(slice(0, 1600)).float().square().mean(0).sqrt())


def test_layers_that_were_not_stored_are_refused(target: Any, data: Dataset, tmp_path: Path) -> None:
    folder = Path(data.tokens.filename).parent
    with pytest.raises(ValueError, match=r"must hold hidden states of layers \[4\], but has \[1, 2, 3\]; run score"):
        Dataset(folder, (1, 4))
    with pytest.raises(ValueError, match=r"layers=\[1\] must be those of .*, \[1, 2, 3\]"):
        dataset.score([], target, folder, layers=[1])
    with pytest.raises(ValueError, match=r"layers=\[3, 9\] must ascend within \[0, 4\]"):
        dataset.score([], target, tmp_path, layers=[3, 9])


@pytest.mark.parametrize("name", ["eagle3", "dflash"])
def test_a_killed_run_resumes_to_the_same_weights(name, target, data, tmp_path: Path) -> None:
    check_killed_run_resumes([new_student(name, target, data) for _ in range(3)], data, SETTINGS, tmp_path, step=5)


def test_a_trained_head_is_read_as_it_was_trained(target: Any, data: Dataset, tmp_path: Path) -> None:
    """It accepts more than before training, and read otherwise, an exported head accepts less."""
    student = new_student("eagle3", target, data)
    before = evaluate(student, data)
    settings = Settings(num_steps=60, tokens_per_batch=1500, evaluate_every=60, save_every=60)
    train(student, data, settings, tmp_path / "training", cost_ratio=0.1)
    assert evaluate(student, data).sampled[0] > before.sampled[0] + 0.05
    unscale(student.module)
    export(student.module, tmp_path / "head", target, "SafeAILab", {})
    found = formats.recognized(tmp_path / "head")
    assert found
    texts = [convention.Text(data.batch([index]).tokens[0].tolist(), 3) for index in range(0, 240, 6)]
    measured = convention.measure(CausalLM(target), found.load(target), texts)
    verdict = convention.verdict(measured)
    assert verdict.is_own
    assert verdict.best.reading.options["feature_layers"] == list(LAYERS)
    shifted = [each for each in measured if each.reading.options["feature_layers"] == [2, 3, 4]]
    assert shifted
    assert all(convention.difference(measured[0], each)[0] > 0 for each in shifted)
