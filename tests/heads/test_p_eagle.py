"""P-EAGLE heads: one pass fills in mask tokens, exactly lossless, and in step with the text."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import checkpoints, drafts, tiny
from torch import Tensor

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.toys import HALVES, QUARTERS, FeatureTarget, joint_distribution, table
from specdec.decoding import Decoder
from specdec.heads import formats
from specdec.models.base import FINAL
from specdec.models.markov import MarkovCache
from specdec.models.state.ragged import RaggedCache
from specdec.proposers.heads.parallel import ParallelHeadProposer
from specdec.runtime.artifacts import LoadError
from specdec.verification import verify_block, verify_tokens

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def load(checkpoint: checkpoints.Checkpoint, folder: Path, model):
    found = formats.recognized(checkpoint.write(folder))
    assert found
    assert found.format.name == "p_eagle"
    return found.load(model)


# ---- the pass


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("dialect", ["SafeAILab", "speculators"])
def test_a_pass_is_that_of_the_eagle3_head_over_mask_tokens(dialect: str, num_layers: int, tmp_path: Path) -> None:
    """The head without its mask is an EAGLE-3 head. Fed the text and then masks it must give the same logits."""
    model = checkpoints.target()
    checkpoint = checkpoints.p_eagle(dialect, num_layers=num_layers)
    head = load(checkpoint, tmp_path / "parallel", model)
    found = formats.recognized(checkpoint.with_tensors(mask_hidden=None).write(tmp_path / "plain"))
    assert found
    plain = found.load(model)
    assert (found.format.name, plain.format) == ("eagle3", "eagle3")
    torch.manual_seed(0)
    features, tokens = torch.randn(1, 5, 3 * checkpoints.WIDTH), torch.tensor([[4, 9, 2, 7, 11]])
    hidden = checkpoint.tensors["mask_hidden"].view(1, 1, -1).expand(1, 3, -1)
    states = plain.encode(torch.cat([features, hidden], 1))
    expected = plain.forward(
        states, torch.cat([tokens, torch.full((1, 3), checkpoints.MASK)], 1), RaggedCache(num_layers, 1, 16)
    )
    proposer = ParallelHeadProposer(head)
    rows = torch.nn.functional.pad(features, (0, 0, 0, 11))
    masked, known = proposer._masked(rows, tokens, torch.tensor([5]), torch.tensor([0]), 3)
    actual = head.forward(known, masked, RaggedCache(num_layers, 1, 16))
    torch.testing.assert_close(head.logits(actual), plain.logits(expected), atol=1e-5, rtol=1e-5)


def test_a_draft_is_one_pass_whose_masks_are_overwritten() -> None:
    """The cache at committed positions equals that of a fresh pass over the text."""
    head = drafts.head("p_eagle")
    engine = Engine(drafts.target(), method="p_eagle", draft=head, num_speculative_tokens=3)
    completion = engine.generate([[5, 9, 8, 7]], SamplingParams(temperature=1, max_tokens=30, seed=3, ignore_eos=True))[
        0
    ]
    proposer, features = engine._decoder.proposer, engine._decoder._cache.features
    text, valid = [5, 9, 8, 7, *completion.token_ids], proposer._cache.num_cached[0]
    assert valid > 20
    fresh = head.allocate(1, 64)
    with torch.inference_mode():
        head.forward(head.encode(features[:1, :valid]), torch.tensor([text[1 : valid + 1]]), fresh)
    for layer, other in zip(proposer._cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(layer.keys[0, :, :valid], other.keys[0, :, :valid], atol=1e-4, rtol=1e-4)


# ---- through the real loop


@cache
def plain_outputs() -> list[tuple[int, ...]]:
    return [each.token_ids for each in Engine(drafts.target()).generate(tiny.PROMPTS, GREEDY)]


@pytest.mark.parametrize("method", ["p_eagle", "hybrid"])
@pytest.mark.parametrize("gamma", [1, 5, "auto"])
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_greedy_equals_plain_decoding(max_batch_size: int, gamma: int | str, method: str) -> None:
    target, head = drafts.target(), drafts.head("p_eagle")
    engine = Engine(target, method=method, draft=head, num_speculative_tokens=gamma, max_batch_size=max_batch_size)
    assert [each.token_ids for each in engine.generate(tiny.PROMPTS, GREEDY)] == plain_outputs()


@pytest.mark.parametrize("records", [False, True])
def test_recorded_drafts_are_the_same(records: bool) -> None:
    params = [replace(GREEDY, temperature=1, seed=seed, max_tokens=12 + 5 * seed) for seed in range(4)]
    options = {"method": "p_eagle", "draft": drafts.head("p_eagle"), "num_speculative_tokens": 3, "max_batch_size": 2}
    engine = Engine(drafts.target(), records=records, **options)
    expected = Engine(drafts.target(), records=False, **options).generate(tiny.PROMPTS, params)
    for actual, wanted in zip(engine.generate(tiny.PROMPTS, params), expected, strict=True):
        assert (actual.token_ids, actual.steps) == (wanted.token_ids, wanted.steps)


class ToyParallelHead:
    """Of FeatureTarget: its distributions are on a grid, and decided by the text, or by the place among the masks."""

    format, drafting, feature_layers, max_tokens, rates = "p_eagle", "parallel", (FINAL,), None, None
    vocab_size = mask_token = 3
    device = torch.device("cpu")
    draft_vocabulary = torch.arange(3)

    def __init__(self, rows: Tensor) -> None:
        generator = torch.Generator().manual_seed(4)
        self.table = rows[torch.randint(len(rows), (3 * 3 + 3,), generator=generator)]

    def allocate(self, num_slots: int, capacity: int) -> MarkovCache:
        return MarkovCache(torch.zeros(num_slots, capacity, dtype=torch.int64))

    def encode(self, features: Tensor) -> Tensor:
        return features

    def mask_state(self) -> Tensor:
        return torch.tensor([-1.0])

    def forward(self, states: Tensor, tokens: Tensor, cache: MarkovCache, first_slot: int = 0) -> Tensor:
        is_mask = tokens.unsqueeze(-1) == self.mask_token
        assert ((states == -1) == is_mask).all()
        places = is_mask.cumsum(1) - 1
        return torch.where(is_mask, 9 + places, states % 3 * 3 + tokens.unsqueeze(-1))

    def logits(self, states: Tensor) -> Tensor:
        return self.table[states.squeeze(-1).long()].log()


@pytest.mark.parametrize("rule", [verify_tokens, verify_block])
def test_joint_distribution(rule) -> None:
    rows = QUARTERS if rule is verify_tokens else HALVES
    target = FeatureTarget(table(3, rows))

    def make(source, rule, max_batch_size):
        proposer = ParallelHeadProposer(ToyParallelHead(rows), source)
        return Decoder(target, proposer, 2, max_batch_size=max_batch_size, rule=rule, uniforms=source)

    grid = (4, 12, 12) if rule is verify_tokens else (2, 4, 4)
    distribution = exact_distribution(make, (0, 1, 2), 3, grid, rule=rule)
    assert distance(distribution, joint_distribution(target, (0, 1, 2), 3)) < 1e-12


# ---- refusals


@pytest.mark.parametrize("token", [None, -1, 128, "mask"])
def test_a_mask_token_that_is_none_of_the_targets_is_refused(token, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"mask_token_id or ptd_token_id or pard_token=.* must be a token of"):
        load(checkpoints.p_eagle().with_config(mask_token_id=token), tmp_path, checkpoints.target())


def test_trees_are_refused() -> None:
    with pytest.raises(ValueError, match="p_eagle"):
        Engine(drafts.target(), method="tree", draft=drafts.head("p_eagle"))


def test_another_width_of_the_mask_is_refused(tmp_path: Path) -> None:
    wrong = checkpoints.p_eagle().with_tensors(mask_hidden=torch.zeros(1, 1, 2 * checkpoints.WIDTH))
    with pytest.raises((LoadError, ValueError), match="mask_hidden"):
        load(wrong, tmp_path, checkpoints.target())
