"""Recorded steps over an emulated pool of graph memory: every method emits the tokens that it emits unrecorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.graph_pool import EmulatedGraphs, compute_as_on_a_gpu

from specdec import Engine, SamplingParams
from specdec.heads.eagle import new_head
from specdec.models.base import FINAL
from specdec.models.causal import CausalLM
from specdec.requests import Completion
from specdec.runtime.recording import Recorder, Recording

SHAPE = tiny.GQA | {"vocab_size": 97, "max_position_embeddings": 512}
NUM_PROMPT, NUM_TOKENS = (
    240,
    60,
)  # the visible extent grows from 256 to 512, and everything is recorded again
TREE = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
METHODS = ("autoregressive", "ngram", "suffix", "draft_model", "eagle", "hybrid", "early_exit", "tree")


class OutputsInThePool(Recording):
    """A recording that leaves its outputs where the graph computes them."""

    _is_captured = False

    def _leave_outputs(self) -> None:
        if self._is_captured:
            super()._leave_outputs()
        else:
            self.outputs, self._is_captured = self._run(), True


def engine(method: str, records: bool) -> Engine:
    torch.manual_seed(0)
    model = tiny.make("llama", SHAPE).requires_grad_(False)
    options: dict[str, Any] = {} if method == "autoregressive" else {"num_speculative_tokens": 3}
    if method in ("eagle", "hybrid", "tree"):
        options["draft"] = new_head(model, torch.arange(0, 97, 2)).eval().requires_grad_(False)
    if method == "draft_model":
        options["draft"] = CausalLM(tiny.make("llama", SHAPE))  # the target's weights
    if method == "tree":
        options["tree"] = TREE
    return Engine(CausalLM(model), method=method, records=records, **options)


def completion(method: str, temperature: float, records: bool, logprobs: bool = True) -> Completion:
    prompt = torch.randint(3, 97, (NUM_PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt[120:] = prompt[:120]  # something to copy
    params = SamplingParams(
        temperature=temperature,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        seed=5,
        logprobs=logprobs,
        top_logprobs=2 if logprobs else 0,
    )
    return engine(method, records).generate([prompt], params)[0]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> EmulatedGraphs:
    graphs = EmulatedGraphs()
    monkeypatch.setattr("specdec.runtime.recording.Repetition", lambda: graphs)
    compute_as_on_a_gpu(monkeypatch)
    return graphs


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_no_replay_overwrites_values_that_are_read_later(
    method: str, temperature: float, graphs: EmulatedGraphs
) -> None:
    recorded, plain = (completion(method, temperature, records) for records in (True, False))
    assert recorded.token_ids == plain.token_ids
    assert recorded.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    assert [list(each) for each in recorded.top_logprobs] == [list(each) for each in plain.top_logprobs]
    assert graphs.num_captured >= 3
    assert graphs.host == []


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("method", ["autoregressive", "draft_model", "eagle", "early_exit", "tree"])
def test_no_replay_overwrites_the_state_of_rows(method: str, temperature: float, graphs: EmulatedGraphs) -> None:
    """Steps that are recorded as a whole, which they are without log-probabilities."""
    recorded, plain = (completion(method, temperature, records, logprobs=False) for records in (True, False))
    assert (recorded.token_ids, recorded.steps) == (plain.token_ids, plain.steps)
    assert graphs.num_captured == 2  # the whole step, at two extents
    assert graphs.host == []


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("method", ["ngram", "suffix", "hybrid"])
def test_no_replay_overwrites_what_the_host_uploaded(method: str, temperature: float, graphs: EmulatedGraphs) -> None:
    """Steps whose scoring and verification are recorded as one."""
    recorded, plain = (completion(method, temperature, records, logprobs=False) for records in (True, False))
    assert (recorded.token_ids, recorded.steps) == (plain.token_ids, plain.steps)
    assert graphs.num_captured >= 2
    assert graphs.host == []


def test_overwritten_tokens_are_detected(graphs: EmulatedGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the pool places outputs decides what is overwritten, so not every method need go wrong in every process."""
    monkeypatch.setattr("specdec.runtime.recording.Recording", OutputsInThePool)
    wrong = []
    for method, temperature in [("early_exit", 0), ("eagle", 0), ("eagle", 1), ("hybrid", 1)]:
        recorded, plain = (completion(method, temperature, records) for records in (True, False))
        wrong.append(recorded.token_ids != plain.token_ids)
    assert graphs.num_poisoned > 0
    assert any(wrong)


@pytest.mark.parametrize("method", ["autoregressive", "ngram", "draft_model"])
def test_overwritten_logits_are_detected(method: str, graphs: EmulatedGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.runtime.recording.Recording", OutputsInThePool)
    recorded, plain = (completion(method, 1, records) for records in (True, False))
    assert recorded.logprobs != pytest.approx(plain.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "work",
    [
        lambda numbers: numbers[[0, 2]],
        lambda numbers: numbers + torch.tensor([1, 2, 3]),
        lambda numbers: numbers[numbers > 0],
        lambda numbers: numbers.sum().item(),
    ],
)
def test_host_synchronization_is_detected(work: Callable[[torch.Tensor], object], graphs: EmulatedGraphs) -> None:
    graphs.capture(lambda: work(torch.zeros(3)))
    assert graphs.host != []


def test_no_replay_overwrites_features(graphs: EmulatedGraphs) -> None:
    """Of several layers, from steps of several widths that take turns, and so are captured in one pool."""
    model = tiny.make("llama", SHAPE)
    target, recorder = CausalLM(model), Recorder(torch.device("cpu"), records=True)
    text = torch.randint(3, 97, (60,), generator=torch.Generator().manual_seed(0))
    cache, start = target.allocate(2, 64, features=(1, FINAL, 0)), 0
    for width in (5, 1, 2, 4) * 5:
        tokens = torch.stack([text[start : start + width], torch.full((width,), 7)])
        recorder(target.forward_at, tokens, torch.tensor([start, 0]), cache, 64)
        start += width
    with torch.inference_mode():
        states = model(text[None], use_cache=False, output_hidden_states=True).hidden_states
    wanted = torch.cat([states[1], states[-1], states[0]], -1)[0]
    torch.testing.assert_close(cache.features[0, :60], wanted, rtol=1e-3, atol=1e-3)
    assert graphs.num_captured == 4
    assert graphs.host == []


def test_a_capture_does_nothing(graphs: EmulatedGraphs) -> None:
    """What is done once for each call, such as moving a tree's accepted nodes, is not done once more."""
    numbers = torch.zeros(3)
    replay = graphs.capture(lambda: numbers.add_(1))
    assert numbers.tolist() == [0, 0, 0]
    replay()
    assert numbers.tolist() == [1, 1, 1]
