"""Drafts of blocks through the real loop: exact joint distributions, caches in step with the text, recorded steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints, tiny
from helpers.block_heads import OnGrid, load, toy_target

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.toys import FeatureTarget, joint_distribution, table
from specdec.decoding import Decoder
from specdec.models.causal import CausalLM
from specdec.models.costs import StepCosts
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.heads.block import BlockProposer
from specdec.proposers.hybrid import HybridProposer
from specdec.proposers.ngram import LookupIndex, NgramProposer
from specdec.requests import Request
from specdec.sampling.randomness import uniforms
from specdec.verification import verify_block, verify_coupled, verify_tokens

MARKOV, PROMPT = FeatureTarget(table(0)), (0, 1, 2, 0)
FORMATS = ("dflash", "dflash2", "vanilla", "gated", "rnn", "domino")


def on_grid(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> OnGrid:
    """A head over three tokens."""
    monkeypatch.setattr(checkpoints, "VOCAB", 3)
    monkeypatch.setattr(checkpoints, "MASK", 3)
    makers: dict[str, Any] = {"dflash": checkpoints.dflash, "domino": checkpoints.domino}
    makers["dflash2"] = lambda: checkpoints.dflash2(top_k=2)
    made = makers[name]() if name in makers else checkpoints.dspark(markov=name)
    if "embed_tokens.weight" in made.tensors:
        made = made.with_tensors(embed_tokens__weight=made.tensors["embed_tokens.weight"][:4])
    return OnGrid(load(made, folder, toy_target()), 9)


def maker(head: Any, gamma: int, *, records: bool = False, hybrid: bool = False, adaptive: bool = False):
    def make(source, rule, max_batch_size):
        costs = AdaptiveLength(StepCosts((1.0,) * 12, 0.0)) if adaptive else None
        proposer: Any = BlockProposer(head, source, costs)
        if hybrid:
            proposer = HybridProposer(NgramProposer(3, MARKOV.device, lambda: LookupIndex(1, 2)), proposer)
        return Decoder(
            *(MARKOV, proposer, gamma),
            max_batch_size=max_batch_size,
            rule=rule,
            uniforms=source,
            records=records,
            adaptive=costs,
        )

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_joint_distribution(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each outcome of a step is decoded in a row of its own, beside all the others."""
    found = exact_distribution(maker(on_grid(name, tmp_path, monkeypatch), 2), PROMPT, 4, (4, 2, 4))
    assert distance(found, joint_distribution(MARKOV, PROMPT, 4)) < 1e-12


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("rule", [verify_tokens, verify_block])
def test_joint_distribution_by_rule(rule: Any, records: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = (4, 8, 24) if rule is verify_block else (4, 2, 4)
    make = maker(on_grid("rnn", tmp_path, monkeypatch), 1, records=records)
    found = exact_distribution(make, PROMPT, 3, grid, rule=rule)
    assert distance(found, joint_distribution(MARKOV, PROMPT, 3)) < 1e-12


def test_joint_distribution_after_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = maker(on_grid("dflash", tmp_path, monkeypatch), 1, hybrid=True)
    found = exact_distribution(make, PROMPT, 3, (4, 4, 12))
    assert distance(found, joint_distribution(MARKOV, PROMPT, 3)) < 1e-12


@pytest.mark.parametrize("name", FORMATS)
def test_coupled_output_is_that_of_plain_decoding(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(seed, PROMPT, SamplingParams(max_tokens=20, seed=seed)) for seed in range(12)]
    plain = list(Decoder(MARKOV, max_batch_size=3, rule=verify_coupled).run(requests))
    rows = list(maker(on_grid(name, tmp_path, monkeypatch), 2)(uniforms, verify_coupled, 3).run(requests))
    assert {row.request.index: row.output for row in rows} == {row.request.index: row.output for row in plain}
    assert sum(step.num_accepted for row in rows for step in row.steps) > 0


@pytest.mark.parametrize("name", FORMATS)
def test_a_rows_output_does_not_depend_on_its_neighbors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on steps being recorded. Rows end at different times, so that limits differ within a step."""
    head = on_grid(name, tmp_path, monkeypatch)
    requests = [
        Request(seed, PROMPT[: 1 + seed % 4], SamplingParams(max_tokens=5 + 3 * seed, seed=seed)) for seed in range(8)
    ]

    def outputs(rows: int, *, records: bool = False) -> dict[int, list[int]]:
        decoder = maker(head, 3, records=records)(uniforms, verify_tokens, rows)
        return {row.request.index: row.output for row in decoder.run(requests)}

    assert outputs(1) == outputs(3) == outputs(3, records=True)


class Watched:
    """A head that notes what is in its cache when a block is drafted: the context's keys of each row."""

    def __init__(self, head: Any) -> None:
        self.head, self.contexts = head, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)

    def block(self, newest, num_tokens, cache):
        self.contexts.append([layer.keys.clone() for layer in cache.layers] + [list(cache.num_cached)])
        return self.head.block(newest, num_tokens, cache)


def test_the_cache_holds_what_a_fresh_head_makes_of_the_text(tmp_path: Path) -> None:
    """After rejections, in chunks of a long prompt, in a slot used again."""
    model = checkpoints.target(max_position_embeddings=1024)
    head = load(checkpoints.dflash().with_config(max_position_embeddings=1024), tmp_path, model)
    prompt = [int(token) for token in torch.randint(3, 97, (600,), generator=torch.Generator().manual_seed(0))]
    watched = Watched(head)
    engine = Engine(CausalLM(model), draft=watched, method="dflash", num_speculative_tokens=3)
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=40, ignore_eos=True)
    [_, completion] = engine.generate([prompt[:7], prompt], params)
    text = [*prompt, *completion.token_ids]
    target_cache = CausalLM(model).allocate(1, 700, features=head.feature_layers)
    CausalLM(model).forward(torch.tensor([text]), target_cache)
    fresh = head.allocate(1, 700)
    head.extend(target_cache.features[:, : len(text)], torch.tensor([text]), fresh)
    *keys, [length, *_] = watched.contexts[-1]
    assert len(prompt) < length < len(text)
    for made, kept in zip(fresh.layers, keys, strict=True):
        torch.testing.assert_close(kept[0, :, :length], made.keys[0, :, :length], rtol=1e-3, atol=1e-3)


def test_drafts_end_by_the_confidence_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = on_grid("vanilla", tmp_path, monkeypatch)

    def drafted(confidence: float) -> set[int]:
        head.confidence = lambda block, newest, tokens: torch.full((len(newest),), confidence)
        decoder = maker(head, 4, adaptive=True)(uniforms, verify_tokens, 1)
        [row] = decoder.run([Request(0, PROMPT, SamplingParams(max_tokens=30, seed=1))])
        return {step.num_drafted for step in row.steps[:-5]}

    assert drafted(1.0) == {4}
    assert drafted(0.0) == {1}


def test_output_with_every_sampling_parameter_is_finite_and_whole(tmp_path: Path) -> None:
    """Penalties, bias, truncation and a constraint apply to the draft as to the target, so greedy rows stay equal."""
    model = checkpoints.target()
    for checkpoint in (checkpoints.dflash2(), checkpoints.dspark(markov="rnn")):
        head = load(checkpoint, tmp_path / checkpoint.config["architectures"][0], model)
        engine = Engine(CausalLM(model), draft=head, method=head.format, num_speculative_tokens=3, max_batch_size=3)
        greedy = SamplingParams(
            *(0.0,), max_tokens=30, ignore_eos=True, repetition_penalty=1.3, presence_penalty=0.2, logit_bias={5: 4.0}
        )
        plain = Engine(CausalLM(model), max_batch_size=3).generate(tiny.PROMPTS, greedy)
        assert [each.token_ids for each in engine.generate(tiny.PROMPTS, greedy)] == [each.token_ids for each in plain]
        drawn = SamplingParams(temperature=0.8, top_k=9, top_p=0.9, min_p=0.02, max_tokens=30, ignore_eos=True, seed=2)
        assert all(len(each.token_ids) == 30 for each in engine.generate(tiny.PROMPTS, drawn))
