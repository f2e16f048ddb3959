"""Trained heads written for others: recognized as such, and the same heads when they are loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints
from safetensors import safe_open

from specdec import Engine, SamplingParams
from specdec.distill import untrained
from specdec.distill.exports import DIALECTS, export
from specdec.heads import formats
from specdec.heads.convention import Text, measure
from specdec.models.base import FINAL
from specdec.models.causal import CausalLM

LAYERS, MASK = (2, 4, 5), checkpoints.MASK
EXPORTS = [(name, dialect) for name, dialects in DIALECTS.items() for dialect in dialects]
SAMPLED = SamplingParams(temperature=1, max_tokens=24, seed=7, ignore_eos=True)


@pytest.fixture(scope="module")
def target() -> Any:
    model = checkpoints.target()
    for parameter in model.parameters():  # which bfloat16 can hold, as an export of the output head does
        parameter.data = parameter.data.bfloat16().float()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def new_head(name: str, target: Any) -> Any:
    """A head of random weights that bfloat16 can hold."""
    torch.manual_seed(1)
    vocabulary = torch.arange(0, checkpoints.VOCAB, 3)
    head = {
        "eagle3": lambda: untrained.new_eagle3(target, LAYERS, vocabulary, 2),
        "p_eagle": lambda: untrained.new_p_eagle(target, LAYERS, vocabulary, MASK),
        "mtp": lambda: untrained.new_mtp(target),
        "dflash": lambda: untrained.new_dflash(target, LAYERS, MASK),
    }[name]()
    for parameter in head.parameters():
        noise = torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.1)
        parameter.data = (noise + float(parameter.ndim == 1)).bfloat16().float()
    return head.eval().requires_grad_(False)


def written(head: Any, folder: Path, target: Any, dialect: str, **options: Any) -> formats.FoundHead:
    export(head, folder, target, dialect, {"date": "2026-11-28"}, **options)
    found = formats.recognized(folder)
    assert found
    return found


def accepted(head: Any, target: Any) -> list[Any]:
    """Expected accepted tokens of drafts, of two texts, under each reading of the head."""
    texts = [Text([5, 9, 8, 7, 5, 9, 8, 30, 2, 17, 44, 3], 3), Text([11, 4, 60, 4, 11, 90, 2, 2, 61], 2)]
    return [each.accepted.tolist() for each in measure(CausalLM(target), head, texts)]


@pytest.mark.parametrize(("name", "dialect"), EXPORTS)
def test_an_export_is_recognized_and_drafts_the_same(name: str, dialect: str, target: Any, tmp_path: Path) -> None:
    head = new_head(name, target)
    found = written(head, tmp_path, target, dialect)
    assert (found.format.name, found.dialect) == (name, dialect)
    loaded = found.load(target)
    assert loaded.feature_layers == head.feature_layers
    assert torch.equal(loaded.draft_vocabulary, head.draft_vocabulary)
    states = loaded.state_dict()
    assert states.keys() == head.state_dict().keys()
    assert all(torch.equal(weight, states[key]) for key, weight in head.state_dict().items())
    prompts = [[5, 9, 8, 7], [3, 3, 60]]
    outputs = []
    for each in (head, loaded):
        engine = Engine(CausalLM(target), method=name, draft=each, num_speculative_tokens=3)
        outputs.append([(done.token_ids, done.counts) for done in engine.generate(prompts, SAMPLED)])
    assert outputs[0] == outputs[1]
    if name != "p_eagle":
        assert accepted(head, target) == accepted(loaded, target)


@pytest.mark.parametrize("name", ["eagle3", "p_eagle"])
def test_an_output_head_of_the_targets_can_be_left_out(name: str, target: Any, tmp_path: Path) -> None:
    head = new_head(name, target)
    head.share(head.embedding, target.lm_head.weight[head.draft_vocabulary], head.draft_vocabulary, head.vocab_size)
    loaded = written(head, tmp_path, target, DIALECTS[name][0], shares_output=True).load(target)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in set(file.keys())
    assert torch.equal(loaded.output, head.output)


def test_a_trained_output_head_is_written_and_cannot_be_left_out(target: Any, tmp_path: Path) -> None:
    head = new_head("eagle3", target)
    untrained.train_output(head)
    head.output.data = (head.output.data * 1.5).bfloat16().float()
    loaded = written(head, tmp_path, target, "speculators").load(target)
    assert torch.equal(loaded.output, head.output)
    with pytest.raises(ValueError, match="shares_output=True must go with the target's output head"):
        export(head, tmp_path, target, "speculators", {}, shares_output=True)


def test_a_config_names_the_target_and_how_the_head_was_made(target: Any, tmp_path: Path) -> None:
    from specdec.models.files.saving import fingerprint

    written(new_head("eagle3", target), tmp_path, target, "SafeAILab")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["specdec"] == {"target": fingerprint(target), "date": "2026-11-28"}
    assert config["rope_theta"] == target.config.rope_parameters["rope_theta"]
    assert (config["draft_vocab_size"], config["eagle_aux_hidden_state_layer_ids"]) == (43, [2, 4, 5])


def test_a_head_that_a_dialect_cannot_express_is_refused(target: Any, tmp_path: Path) -> None:
    head = untrained.new_dflash(target, (2, FINAL), MASK)
    with pytest.raises(ValueError, match=r"feature_layers=\[2, -1\] must be without \[-1\], which the speculators"):
        export(head, tmp_path, target, "speculators", {})
    export(head, tmp_path, target, "z-lab", {})
    found = formats.recognized(tmp_path)
    assert found
    assert found.load(target).feature_layers == (2, FINAL)
    with pytest.raises(ValueError, match="dialect='Qwen' must be one of z-lab, speculators for format='dflash'"):
        export(head, tmp_path, target, "Qwen", {})
