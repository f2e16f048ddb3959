"""The head's method: in step with the target's features, and lossless whatever the head predicts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import tiny

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance, passes, radius
from specdec.conformance.toys import FeatureTarget, ToyHead, grid_pair, joint_distribution
from specdec.decoding import Decoder
from specdec.heads.eagle import new_head
from specdec.models.base import PREFILL_CHUNK
from specdec.models.causal import CausalLM
from specdec.proposers.heads.eagle import EagleProposer
from specdec.proposers.hybrid import HybridProposer
from specdec.proposers.ngram import LookupIndex, NgramProposer
from specdec.trees.shape import Tree


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_joint_distribution_with_a_head(seed: int, hybrid: bool) -> None:
    """gamma = 1, alone and after prompt lookup, whose copies need a finer grid, exactly."""
    target, draft = grid_pair(seed)
    target = FeatureTarget(target.table)

    def make(source, rule, max_batch_size):
        proposer = EagleProposer(ToyHead(draft), source)
        if hybrid:
            lookup = NgramProposer(3, target.device, partial(LookupIndex, 1, 2))
            proposer = HybridProposer(lookup, proposer)
        return Decoder(target, proposer, 1, max_batch_size=max_batch_size, rule=rule, uniforms=source)

    prompt, num_tokens, grid = (0, 1, 2, 0), *((3, (4, 4, 12)) if hybrid else (4, (4, 2, 4)))
    assert (
        distance(exact_distribution(make, prompt, num_tokens, grid), joint_distribution(target, prompt, num_tokens))
        < 1e-12
    )


@pytest.mark.parametrize("max_batch_size", [1, 3])
@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_a_head_that_knows_the_target_is_always_accepted(max_batch_size: int, gamma: int) -> None:
    """Every feature is that of the right token, while ten requests pass through the slots, twice."""
    target = FeatureTarget(grid_pair(1)[0].table)
    engine = Engine(
        target, method="eagle", draft=ToyHead(target), num_speculative_tokens=gamma, max_batch_size=max_batch_size
    )
    prompts = [[1, 2, 0, 1][: 1 + i % 4] for i in range(10)]
    params = [SamplingParams(max_tokens=3 + 2 * i, seed=i) for i in range(10)]
    for completion in engine.generate(prompts, params) + engine.generate(prompts[::-1], params):
        assert completion.counts.num_accepted == completion.counts.num_drafted > 0


def test_a_head_catches_up_after_copied_drafts() -> None:
    """While lookup proposes, the head is not called; then it is fed what it missed, once."""
    target = FeatureTarget(grid_pair(1)[0].table)
    head = ToyHead(target)
    lookup = NgramProposer(3, target.device, partial(LookupIndex, 3, 3))
    decoder = Decoder(target, HybridProposer(lookup, EagleProposer(head)), 2)
    engine = Engine(target)
    engine._decoder = decoder
    completion = engine.generate([[0, 1, 2]], SamplingParams(max_tokens=40, seed=3))[0]
    lengths = {step.num_drafted for step in completion.steps}
    assert completion.counts.num_accepted > 0
    assert lengths <= {0, 1, 2}
    assert 0 < head.num_fed < 2 * 43


def test_a_long_prompt_is_fed_in_chunks() -> None:
    target = FeatureTarget(grid_pair(1)[0].table)
    prompt = [0, 1, 2] * PREFILL_CHUNK
    engine = Engine(target, method="eagle", draft=ToyHead(target), num_speculative_tokens=2)
    counts = engine.generate([prompt[: 2 * PREFILL_CHUNK + 5]], SamplingParams(max_tokens=9))[0].counts
    assert counts.num_accepted == counts.num_drafted > 0


def test_a_row_that_comes_late_does_not_widen_the_others() -> None:
    """One row is at the end of the cache while another brings a long prompt."""
    target = FeatureTarget(grid_pair(1)[0].table)
    engine = Engine(target, method="eagle", draft=ToyHead(target), num_speculative_tokens=2, max_batch_size=2)
    prompts = [[0, 1, 2] * 20, [1], [2, 1, 0] * 20]
    params = [SamplingParams(max_tokens=n, seed=n) for n in (20, 15, 20)]
    for completion in engine.generate(prompts, params):
        assert completion.counts.num_accepted == completion.counts.num_drafted > 0


@pytest.mark.parametrize("draft_vocabulary", [[0, 1, 2, 3], [1, 3]])
def test_a_real_head_passes_the_gate(draft_vocabulary: list[int]) -> None:
    """A random Llama over four tokens and a random head: 4000 draws of two tokens against the model's distribution."""
    model = tiny.make("llama", tiny.GQA | {"vocab_size": 4})
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    head = new_head(model, torch.tensor(draft_vocabulary)).eval()
    for parameter in head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    prompt, num_draws = [1, 2, 3], 4000
    engine = Engine(CausalLM(model), method="eagle", draft=head, num_speculative_tokens=2, max_batch_size=100)
    params = [SamplingParams(temperature=3, max_tokens=3, seed=seed) for seed in range(num_draws)]
    completions = engine.generate([prompt] * num_draws, params)
    distribution = {}
    with torch.inference_mode():
        for first in range(4):
            for second in range(4):
                text = torch.tensor([[*prompt, first, second]])
                probs = (model(input_ids=text, use_cache=False).logits[0].double() / 3).softmax(-1)
                for third in range(4):
                    distribution[first, second, third] = float(probs[2, first] * probs[3, second] * probs[4, third])
    assert sum(c.counts.num_accepted for c in completions) > 0
    assert sum(c.counts.num_accepted < c.counts.num_drafted for c in completions) > 0
    assert radius(num_draws, 64) < 0.11
    assert passes([c.token_ids for c in completions], distribution, 64)
    unconditional = dict.fromkeys(distribution, 1 / 64)
    assert distance(distribution, unconditional) > 2 * radius(num_draws, 64), (
        "the gate can see that the distribution is not uniform"
    )


@pytest.mark.parametrize("method", ["eagle", "hybrid"])
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_greedy_equals_a_full_forward_for_each_token(method: str, max_batch_size: int) -> None:
    model = tiny.make("llama", tiny.GQA)
    expected = [tiny.reference(model, prompt) for prompt in tiny.PROMPTS]
    head = new_head(model, torch.arange(0, 61, 3)).eval()
    engine = Engine(CausalLM(model), method=method, draft=head, num_speculative_tokens=3, max_batch_size=max_batch_size)
    completions = engine.generate(tiny.PROMPTS, tiny.GREEDY)
    assert [list(completion.token_ids) for completion in completions] == expected


def test_a_step_of_the_head_reads_its_layer_and_the_tokens_that_it_drafts() -> None:
    """The embedding is looked up, and of the target's output head a third is drafted."""
    model = tiny.make("llama", tiny.GQA | {"vocab_size": 96, "intermediate_size": 64}, torch.bfloat16)
    head = new_head(model, torch.arange(0, 96, 3)).to(torch.bfloat16).requires_grad_(False)
    trained = sum(weight.numel() for weight in head.parameters())
    assert head.step_bytes == 2 * (trained + 32 * 32)
    head.fuse()
    assert head.step_bytes == 2 * (trained + 32 * 32)


@pytest.mark.parametrize("tree", [None, Tree.balanced([2, 1])], ids=["chain", "tree"])
def test_the_cache_of_a_head_equals_a_fresh_computation(tree: Tree | None) -> None:
    """At accepted positions, too, where features were guessed while drafting: only acceptance would suffer."""
    model = tiny.make("llama", tiny.GQA)
    head = new_head(model, torch.arange(61)).eval()
    for parameter in head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    options = {"method": "tree", "tree": tree} if tree else {"method": "eagle", "num_speculative_tokens": 3}
    engine = Engine(CausalLM(model), draft=head, **options)
    seen = 0
    for seed in range(4):
        params = SamplingParams(temperature=8, max_tokens=24, seed=seed, ignore_eos=True)
        (completion,) = engine.generate([[5, 9, 8, 7]], params)
        seen += completion.counts.num_accepted
        text = [*completion.prompt_token_ids, *completion.token_ids]
        proposer, features = engine._decoder.proposer, engine._decoder._cache.features
        _, valid = proposer._owners[0]
        fresh = head.allocate(1, proposer._cache.capacity)
        with torch.inference_mode():
            head(features[:1, :valid], torch.tensor([text[1 : valid + 1]]), fresh)
        assert valid > 20
        (kept,), (computed,) = proposer._cache.layers, fresh.layers
        for actual, expected in ((kept.keys, computed.keys), (kept.values, computed.values)):
            torch.testing.assert_close(actual[:1, :, :valid], expected[:1, :, :valid])
    assert seen > 10, "hardly anything was accepted"
