"""Recorded steps: the same distribution, exactly, and the same tokens, through inputs and outputs at fixed places.

On a CPU the recorder goes through all motions but the graph itself; on a GPU the same tests run graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from helpers import tiny
from test_lossless import GRID, NUM_DRAWS, PROMPT, TARGET, pairs_passing, truth
from torch import Tensor

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.mutants import maker
from specdec.conformance.toys import FeatureTarget, ToyHead, grid_pair, joint_distribution
from specdec.decoding import Decoder
from specdec.heads.eagle import new_head
from specdec.models.causal import CausalLM
from specdec.models.costs import target_costs
from specdec.models.fusion import fuse
from specdec.models.state.ragged import RaggedCache
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.heads.eagle import EagleProposer
from specdec.proposers.hybrid import HybridProposer
from specdec.proposers.ngram import LookupIndex, NgramProposer
from specdec.runtime.recording import Recorder, Recording, Repetition
from specdec.synthetic import SyntheticAcceptance
from specdec.verification import verify_block

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
CPU = torch.device("cpu")


# -- the recorder ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    numbers: Tensor
    factor: int
    more: Tensor | None = None


def scaled(pair: Pair, shift: Tensor) -> tuple[Pair, Tensor]:
    return replace(pair, numbers=pair.numbers * pair.factor), pair.numbers + shift


@pytest.mark.parametrize("device", DEVICES)
def test_a_recorded_function_equals_the_function(device: str) -> None:
    recorder = Recorder(torch.device(device), records=True)
    for i in range(5):
        numbers = torch.arange(3.0, device=device) + i
        for factor in (2, 3):
            pair, total = recorder(scaled, Pair(numbers, factor), numbers[:1])
            assert pair.numbers.tolist() == [factor * (n + i) for n in range(3)]
            assert total.tolist() == [n + i + i for n in range(3)]
    assert recorder.seconds > 0


def test_a_recorded_function_is_run_once_for_each_call() -> None:
    """Also where it is recorded: some work, such as moving a tree's accepted nodes, is not to be done twice."""
    recorder, numbers = Recorder(CPU, records=True), torch.zeros(1)
    for call in range(1, 5):
        recorder(numbers.add_, torch.ones(1))
        assert numbers.item() == call


def test_outputs_stand_at_fixed_places_from_the_second_call_on() -> None:
    recorder = Recorder(CPU, records=True)
    outputs = [recorder(scaled, Pair(torch.ones(2), 1), torch.ones(1))[1] for _ in range(4)]
    assert outputs[0] is not outputs[1]
    assert outputs[1] is outputs[2] is outputs[3]
    assert recorder(scaled, Pair(torch.ones(3), 1), torch.ones(1))[1] is not outputs[3]


def test_a_gpu_is_the_current_device_while_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a graph of another GPU's stream is captured, which is empty, and replayed on the wrong one."""
    current = [0]

    @contextmanager
    def device(other: torch.device) -> Iterator[None]:
        current.append(other.index)
        yield
        current.pop()

    class Graphs(Repetition):
        def prepare(self, run):
            assert current == [0, 1]
            return run()

        def capture(self, run):
            return lambda: self.prepare(run)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr("specdec.runtime.recording.synchronize", lambda device: None)
    monkeypatch.setattr("specdec.runtime.recording.CudaGraphs", lambda device: Graphs())
    recorder = Recorder(torch.device("cuda", 1))
    for i in range(4):
        _, total = recorder(scaled, Pair(torch.ones(2), 1), torch.ones(1) * i)
        assert total.tolist() == [1 + i] * 2
    assert current == [0]


def test_capacities_are_large_and_even_where_calls_are_recorded() -> None:
    assert [Recorder(CPU, records=True).capacity(size) for size in (1, 1024, 1025)] == [1024, 1024, 2048]
    assert Recorder(CPU).capacity(1025) == 1025


def test_every_recorded_cache_has_such_a_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the target and of the draft, and while costs are measured."""
    capacities = []

    class Watched(RaggedCache):
        def extent_for(self, length: int) -> int:
            capacities.append(self.capacity)
            return super().extent_for(length)

    monkeypatch.setattr("specdec.models.causal.RaggedCache", Watched)
    target, draft = (CausalLM(tiny.make("llama", tiny.GQA | {"max_position_embeddings": 4096})) for _ in range(2))
    engine = Engine(target, method="draft_model", draft=draft, records=True, num_speculative_tokens="auto")
    engine.generate([[5, 9, 8, 7]], SamplingParams(max_tokens=4))
    target_costs(target, 1, records=True, widths=(1, 3))
    assert capacities
    assert not any(capacity % 1024 for capacity in capacities)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_longest_position_are_not_recorded(kind: str) -> None:
    """The device must be read to know it, and whatever follows a row's tokens would count as well."""
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = CausalLM(tiny.make("llama", tiny.GQA | {"rope_parameters": rope, "max_position_embeddings": 128}))
    plain = CausalLM(tiny.make("llama", tiny.GQA))
    assert plain.is_recordable
    assert not model.is_recordable
    with pytest.raises(ValueError, match=r"records=True must be left out: .*dynamic or longrope"):
        Engine(model, records=True)
    with pytest.raises(ValueError, match="records=True must be left out"):
        Engine(plain, method="draft_model", draft=model, records=True)
    for engine in (Engine(model), Engine(plain, method="draft_model", draft=model)):
        assert not engine._decoder.recorder.records


def test_nothing_is_recorded_where_it_does_not_pay() -> None:
    recorder = Recorder(CPU)
    outputs = [recorder(scaled, Pair(torch.ones(2), 1), torch.ones(1))[1] for _ in range(3)]
    assert outputs[1] is not outputs[2]
    assert recorder.seconds == 0


# -- distributions --------------------------------------------------------------------------------------------------


def plain(target, draft, source):
    return None


def ngram(target, draft, source):
    return NgramProposer(3, target.device, partial(LookupIndex, 1, 2))


def draft_model(target, draft, source):
    return DraftModelProposer(draft, source)


def head(target, draft, source):
    return EagleProposer(ToyHead(draft), source)


def hybrid(target, draft, source):
    return HybridProposer(ngram(target, draft, source), head(target, draft, source))


@pytest.mark.parametrize(
    ("propose", "gamma", "grid", "prompt"),
    [
        (plain, 0, (1, 1, 4), PROMPT),
        (ngram, 2, (1, 4, 12), (0, 1, 2, 0, 1, 2, 0)),
        (draft_model, 1, GRID, PROMPT),
        (head, 1, GRID, PROMPT),
        (hybrid, 1, (4, 4, 12), (0, 1, 2, 0)),
    ],
)
def test_joint_distribution_of_recorded_steps(
    propose, gamma: int, grid: tuple[int, int, int], prompt: tuple[int, ...]
) -> None:
    target, draft = grid_pair(1)
    target = FeatureTarget(target.table)

    def make(source, rule, max_batch_size):
        proposer = propose(target, draft, source)
        options = {"max_batch_size": max_batch_size, "rule": rule, "uniforms": source, "records": True}
        return Decoder(target, proposer, gamma, **options)

    num_tokens = 3 if propose is hybrid else 4
    assert (
        distance(exact_distribution(make, prompt, num_tokens, grid), joint_distribution(target, prompt, num_tokens))
        < 1e-12
    )


@pytest.mark.parametrize("params", [None, SamplingParams(top_k=1), SamplingParams(top_k=2)])
def test_the_gate_passes_recorded_steps(params: SamplingParams | None) -> None:
    make = maker(TARGET, grid_pair(12)[1], 2, records=True)
    assert pairs_passing(make, params, truth(params)) == [True] * 3


class Forgetful(Recording):
    """A recording that keeps the inputs of its first call."""

    def __call__(self, tensors):
        return super().__call__(self._inputs)


def test_the_gate_sees_a_recording_with_stale_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.runtime.recording.Recording", Forgetful)
    make = maker(TARGET, grid_pair(12)[1], 1, records=True)
    assert NUM_DRAWS == 4000
    assert False in pairs_passing(make, None, truth(None))


# -- real models -------------------------------------------------------------------------------------------

SAMPLED = [
    SamplingParams(temperature=0, max_tokens=14, ignore_eos=True),
    SamplingParams(seed=1, max_tokens=17, ignore_eos=True),
    SamplingParams(seed=2, top_k=5, temperature=0.7, max_tokens=9, ignore_eos=True),
    SamplingParams(seed=3, top_p=0.8, min_p=0.01, max_tokens=12, ignore_eos=True),
    SamplingParams(seed=4, frequency_penalty=0.5, logit_bias={3: 1.0}, max_tokens=12, ignore_eos=True),
]


def completions(method: str, device: str, gamma: int, records: bool, batch: int, verification: str, fused: bool):
    torch.manual_seed(0)
    model = tiny.make("llama", tiny.GQA | {"max_position_embeddings": 128}).to(device)
    draft = None
    if method in ("eagle", "hybrid", "head_tree"):
        draft = new_head(model, torch.arange(0, 61, 2, device=device)).placed(model.device, model.dtype).eval()
    if method in ("draft_model", "model_tree"):
        draft = CausalLM(tiny.make("gpt2", tiny.SMALL).to(device))
    if fused:
        fuse(model)
    options = {"num_speculative_tokens": gamma} if method != "autoregressive" else {}
    options |= {"max_batch_size": batch, "verification": verification}
    if method.endswith("_tree"):
        method, options["tree"] = "tree", [(0,), (1,), (0, 0), (0, 1), (1, 0)]
        del options["num_speculative_tokens"]
    engine = Engine(CausalLM(model), method=method, draft=draft, records=records, **options)
    prompts = [*tiny.PROMPTS, [9, 4] * 10]
    return engine.generate(prompts, SAMPLED) + engine.generate(prompts[::-1], SAMPLED)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("method", "gamma", "verification", "fused"),
    [
        ("autoregressive", 0, "token", False),
        ("ngram", 3, "token", True),
        ("suffix", 3, "token", True),
        ("hybrid", 2, "token", True),
        ("head_tree", None, "token", True),
        ("head_tree", None, "coupled", True),
        ("model_tree", None, "token", False),
        ("draft_model", 3, "block", False),
        ("eagle", 2, "token", True),
        ("eagle", 3, "coupled", True),
        ("eagle", "auto", "token", False),
    ],
)
def test_recorded_steps_emit_the_same_tokens(
    method: str, gamma: int | str, verification: str, fused: bool, batch: int, device: str
) -> None:
    """With every sampling parameter, slots that change hands, and a second run over the same recordings."""
    runs = [completions(method, device, gamma, records, batch, verification, fused) for records in (False, True)]
    if gamma == "auto":  # where drafts end depends on the clock, and which sample a seed gives on that
        runs = [[run[0], run[len(SAMPLED)]] for run in runs]
    else:
        eager, recorded = ([[step.num_drafted for step in c.steps] for c in run] for run in runs)
        assert eager == recorded
    assert [c.token_ids for c in runs[0]] == [c.token_ids for c in runs[1]]


def test_synthetic_acceptance_is_a_function_of_tensors() -> None:
    """Its rates are not uploaded while a step is recorded."""
    rule = SyntheticAcceptance((0.5, 0.25))
    assert rule.rates == (0.5, 0.25)
    engines = [
        Engine(
            TARGET, method="ngram", num_speculative_tokens=2, synthetic_acceptance_rates=[0.5, 0.25], records=records
        )
        for records in (False, True)
    ]
    eager, recorded = (engine.generate([[0, 1, 2, 0, 1]], SamplingParams(max_tokens=30)) for engine in engines)
    assert [c.token_ids for c in eager] == [c.token_ids for c in recorded]


def test_block_verification_is_recorded_too() -> None:
    target, draft = grid_pair(3)
    make = maker(target, draft, 2, break_rule=lambda rule: verify_block, records=True)
    assert pairs_passing(make, None, joint_distribution(target, PROMPT, 4)) == [True] * 3
