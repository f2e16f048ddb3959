"""Parallel draft models: in step with the text, exact, and one pass for all tokens of a draft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.toys import QUARTERS, grid_pair, joint_distribution
from specdec.decoding import Decoder
from specdec.drafts import kind_in, kind_of
from specdec.models.causal import CausalLM
from specdec.models.markov import MarkovModel
from specdec.proposers.pard import PardProposer
from specdec.verification import verify_block, verify_tokens

MASK = 3


def parallel_draft(seed: int) -> MarkovModel:
    """Over three tokens and a mask, which is never drafted; after masks, too, its distributions are on the grid."""
    rows = torch.nn.functional.pad(QUARTERS, (0, 1))
    generator = torch.Generator().manual_seed(seed)
    return MarkovModel(rows[torch.randint(len(rows), (4, 4), generator=generator)])


def with_mask(target: MarkovModel) -> MarkovModel:
    """The same model over four tokens, of which it never emits the last."""
    wide = torch.zeros(4, 4, 4, dtype=torch.float64)
    wide[..., 0] = 1
    wide[:3, :3] = torch.nn.functional.pad(target.table, (0, 1))
    return MarkovModel(wide)


TARGET = with_mask(grid_pair(3)[0])


@pytest.mark.parametrize("rule", [verify_tokens, verify_block])
def test_joint_distribution(rule) -> None:
    def make(source, rule, max_batch_size):
        proposer = PardProposer(parallel_draft(5), MASK, source)
        return Decoder(TARGET, proposer, gamma, max_batch_size=max_batch_size, rule=rule, uniforms=source)

    gamma = 2 if rule is verify_tokens else 1
    distribution = exact_distribution(make, (0, 1, 2), 4, (4, 12, 12) if gamma == 1 else (4, 4, 12), rule=rule)
    assert distance(distribution, joint_distribution(TARGET, (0, 1, 2), 4)) < 1e-12


class Counted(CausalLM):
    """Counts its calls, and what it read in the last one."""

    calls = 0

    def forward(self, tokens, *args, **kwargs):
        self.calls, self.read = self.calls + 1, tokens
        return super().forward(tokens, *args, **kwargs)


def test_a_draft_is_one_pass_and_reads_masks_after_the_text() -> None:
    model = tiny.make("llama", tiny.GQA | {"pard_token": 60})
    draft = Counted(model)
    assert kind_of(draft) == "pard"
    engine = Engine(CausalLM(tiny.make("llama", tiny.GQA)), method="pard", draft=draft, num_speculative_tokens=4)
    draft.calls = 0
    steps = engine.generate([[5, 9, 8]], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))[0].steps
    drafted = [step for step in steps if step.num_drafted]
    assert draft.calls == len(drafted) + 1  # the prompt
    assert draft.read[0, -1] == 60 or drafted[-1].num_drafted == 1


@pytest.mark.parametrize("gamma", [1, 4, "auto"])
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_greedy_equals_plain_decoding(max_batch_size: int, gamma: int | str) -> None:
    model = tiny.make("llama", tiny.GQA | {"pard_token": 60})
    target = CausalLM(tiny.make("llama", tiny.GQA))
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    engine = Engine(
        target, method="pard", draft=CausalLM(model), num_speculative_tokens=gamma, max_batch_size=max_batch_size
    )
    expected = [each.token_ids for each in Engine(target).generate(tiny.PROMPTS, params)]
    assert [each.token_ids for each in engine.generate(tiny.PROMPTS, params)] == expected


@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_its_first_token_is_that_of_the_model_itself(max_batch_size: int) -> None:
    """The first place of a draft reads no mask. With the target as the draft it is accepted always."""
    model = tiny.make("llama", tiny.GQA | {"pard_token": 60})
    engine = Engine(
        CausalLM(model), method="pard", draft=CausalLM(model), num_speculative_tokens=3, max_batch_size=max_batch_size
    )
    for temperature in (0, 1):
        params = [
            SamplingParams(temperature=temperature, max_tokens=n, seed=n, ignore_eos=True) for n in (30, 9, 22, 14)
        ]
        for completion in engine.generate(tiny.PROMPTS, params):
            assert all(step.num_accepted >= 1 for step in completion.steps if step.num_drafted)


def test_a_folder_is_recognized_by_its_mask_token(tmp_path: Path) -> None:
    tiny.make("llama", tiny.GQA | {"pard_token": 60}).save_pretrained(tmp_path)
    assert kind_in(str(tmp_path)) == "pard"


def test_a_model_that_only_mentions_a_mask_token_is_an_ordinary_one(tmp_path: Path) -> None:
    tiny.make("llama", tiny.GQA | {"pard_token": None, "comment": "no pard_token"}).save_pretrained(tmp_path)
    assert kind_in(str(tmp_path)) == "model"
