"""Heads trained and exported here, loaded by vLLM: with the acceptance that they have here. `tox -e vllm-cpu` runs it.

Target and heads are tiny, trained within a minute; drafts are verified greedily and in float32, so that the two engines
can differ by near ties alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny

from bench.engines import vllm
from bench.engines.process import Worker
from specdec import Engine, SamplingParams
from specdec.distill import dataset, untrained
from specdec.distill.corpus import Text
from specdec.distill.dataset import Dataset
from specdec.distill.exports import export
from specdec.distill.students import BlockStudent, HeadStudent, ParallelStudent, unscale
from specdec.distill.training import Settings, train

PYTHON = os.environ.get("SPECDEC_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="SPECDEC_VLLM_PYTHON names no interpreter with vLLM; tox -e vllm-cpu"
)

VOCAB, LAYERS, GAMMA = 128, (1, 2, 4), 4
TARGET = tiny.SMALL | {
    **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128},
    **{"eos_token_id": None, "bos_token_id": None, "pad_token_id": None},
}
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
NUM_PROMPTS = 24
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("eagle3", "SafeAILab", {"method": "eagle3"}),
    ("eagle3", "speculators", {"method": "eagle3"}),
    ("p_eagle", "SafeAILab", {"method": "eagle3", "parallel_drafting": True}),
    ("dflash", "z-lab", {"method": "dflash"}),
]


def prompts(number: int, seed: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB - 1, (number, 6), generator=random).tolist()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The transformers model and its folder. Its layers change little, so that heads learn it within seconds."""
    folder, model = tmp_path_factory.mktemp("target"), tiny.make("llama", TARGET)
    for parameter in model.model.layers.parameters():
        parameter.data *= 0.2 if parameter.ndim > 1 else 1
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def data(target: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Greedy texts of the target."""
    folder, asked = tmp_path_factory.mktemp("data"), prompts(300, 1)
    done = Engine(target[0], max_batch_size=64).generate(asked, GREEDY)
    texts = [Text(tuple(one), each.token_ids, 0.0, 0) for one, each in zip(asked, done, strict=True)]
    dataset.score(texts, target[0], folder, layers=LAYERS)
    return Dataset(folder, LAYERS)


def trained(name: str, model: Any, data: Dataset, folder: Path) -> Any:
    torch.manual_seed(0)
    everything, frequent, sizes = torch.arange(VOCAB), torch.arange(VOCAB), data.feature_sizes()
    student: Any
    if name == "eagle3":
        student = HeadStudent(untrained.new_eagle3(model, LAYERS, everything[:100]), model, frequent[:100], sizes)
    elif name == "p_eagle":
        head = untrained.new_p_eagle(model, LAYERS, everything[:100], VOCAB - 1, num_layers=1)
        student = ParallelStudent(head, model, frequent[:100], sizes, GAMMA)
    else:
        student = BlockStudent(untrained.new_dflash(model, LAYERS, VOCAB - 1, GAMMA + 1, 1), model, frequent, sizes)
    settings = Settings(num_steps=100, tokens_per_batch=1500, evaluate_every=100, save_every=100)
    train(student, data, settings, folder, cost_ratio=0.1)
    unscale(student.module)
    return student.module.eval().requires_grad_(False)


def vllm_counts(folder: Path, head: Path, speculative: Mapping[str, Any], asked: list[list[int]]) -> Any:
    """vLLM's outputs and acceptance counts for each prompt."""
    python = PYTHON or ""
    engine = {"model": str(folder), "dtype": "float32", "skip_tokenizer_init": True, "generation_config": "vllm"}
    engine |= {"enforce_eager": True, "disable_log_stats": False, "seed": 0, "max_num_seqs": 1, "max_model_len": 128}
    engine["enable_prefix_caching"] = False
    drafting = {"model": str(head), "num_speculative_tokens": GAMMA, **speculative}
    worker = Worker("vllm", [python, str(vllm.SCRIPT)], vllm.worker_environment(python, "cpu"))
    with closing(worker):
        worker.ask({"engine": engine, "speculative": drafting, "optional": {}}, vllm.START_TIMEOUT_S)
        sampling = [vllm.sampling_arguments(GREEDY, ())]
        answers = [worker.ask({"prompts": [one], "sampling": sampling}, vllm.CALL_TIMEOUT_S) for one in asked]
    return [next(vllm.results(answer)) for answer in answers]


def accepted_per_step(results: list[Any]) -> np.ndarray:
    return np.array([each.counts.num_accepted / each.counts.num_steps for each in results])


@pytest.mark.parametrize(("name", "dialect", "speculative"), CASES, ids=[f"{name} {where}" for name, where, _ in CASES])
def test_vllm_accepts_as_many_drafts_as_specdec(
    name: str, dialect: str, speculative: dict[str, Any], target: tuple[Any, Path], data: Dataset, tmp_path: Path
) -> None:
    model, folder = target
    head = trained(name, model, data, tmp_path / "training")
    export(head, tmp_path / "head", model, dialect, {})
    asked = prompts(NUM_PROMPTS, 2)
    place = {"dtype": torch.float32, "method": name, "draft": str(tmp_path / "head"), "num_speculative_tokens": GAMMA}
    expected = Engine.load(str(folder), **place).generate(asked, GREEDY)
    results = vllm_counts(folder, tmp_path / "head", speculative, asked)
    own, other = accepted_per_step(expected), accepted_per_step(results)
    same = np.mean([a.token_ids == b.token_ids for a, b in zip(expected, results, strict=True)])
    print(f"{name} ({dialect}): accepted per step {own.mean():.3f} here, {other.mean():.3f} in vLLM; {same:.0%} equal")
    assert own.mean() > 0.3, "the head is worth comparing"
    assert same > 0.8
    margin = 2.58 * np.std(own - other, ddof=1) / len(own) ** 0.5
    assert abs(own.mean() - other.mean()) <= margin + 0.01 * own.mean()
