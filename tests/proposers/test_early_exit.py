"""Self-drafting: the target's first layers draft in its own cache, and nothing of that shows in what is emitted."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.toys import ExitTarget

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.toys import grid_pair, joint_distribution
from specdec.decoding import Decoder
from specdec.kernels import cpp
from specdec.models.causal import CausalLM, UnsupportedModelError
from specdec.models.fusion import FusedDecoder, fuse
from specdec.proposers.early_exit import EarlyExitProposer

FOUR = tiny.GQA | {"num_hidden_layers": 4}
WIDE = FOUR | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}  # shapes that the kernels take
needs_kernels = pytest.mark.skipif(
    not cpp.available(torch.bfloat16), reason="kernels need Linux, a C++ compiler and AVX512-BF16"
)


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_joint_distribution(seed: int, records: bool) -> None:
    """gamma = 1, exactly, over a cache that the draft has written to, recorded or not."""
    target, draft = grid_pair(seed)
    target = ExitTarget(target.table, draft.table)

    def make(source, rule, max_batch_size):
        options = {"max_batch_size": max_batch_size, "rule": rule, "uniforms": source, "records": records}
        return Decoder(target, EarlyExitProposer(target.first_layers(1), source), 1, **options)

    assert distance(exact_distribution(make, (1, 2), 4, (4, 2, 4)), joint_distribution(target, (1, 2), 4)) < 1e-12


class WrongPlace(EarlyExitProposer):
    """Takes the cache for one that holds the last token, too: everything stands a place too far."""

    def _drawn(self, batch, limits):
        model, forward = self._model, self._model.forward

        def shifted(tokens, cache):
            cache.num_cached[:] = [length + 1 for length in cache.num_cached]
            return forward(tokens, cache)

        model.forward = shifted
        try:
            return super()._drawn(batch, limits)
        finally:
            model.forward = forward


def acceptance(proposer: type) -> float:
    """Of a draft with the target's distribution."""
    table = grid_pair(1)[0].table
    target = ExitTarget(table, table)
    engine = Engine(target, max_batch_size=3)
    engine._decoder = Decoder(target, proposer(target.first_layers(1)), 3, max_batch_size=3)
    prompts = [[1, 2, 0, 1][: 1 + i % 4] for i in range(10)]
    completions = engine.generate(prompts, [SamplingParams(max_tokens=5 + 2 * i, seed=i) for i in range(10)])
    counts = [completion.counts for completion in completions]
    return sum(each.num_accepted for each in counts) / sum(each.num_drafted for each in counts)


def test_it_reads_and_writes_where_the_target_does() -> None:
    """Else the draft would not know the token before; ten requests through three slots. One place off is seen."""
    assert acceptance(EarlyExitProposer) == 1
    assert acceptance(WrongPlace) < 1


def shared_weights(model: CausalLM, shorter: CausalLM) -> bool:
    addresses = {weight.data_ptr() for weight in model.model.parameters()}
    return all(weight.data_ptr() in addresses for weight in shorter.model.parameters())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "gemma"])
def test_first_layers_are_those_of_a_smaller_model(kind: str) -> None:
    """Against the model that has only them; weights are shared, and the whole model stays what it was."""
    model, reference = (tiny.make(kind, tiny.SUPPORTED[kind] | {"num_hidden_layers": number}) for number in (4, 1))
    model = CausalLM(model)
    tokens = torch.tensor([[5, 9, 8, 7, 5, 9, 8], [3, 1, 4, 1, 5, 9, 2]])
    before = model.forward(tokens, model.allocate(2, 7))
    shorter = model.first_layers(1)
    reference.load_state_dict(model.model.state_dict(), strict=False)
    assert shared_weights(model, shorter)
    with torch.inference_mode():
        torch.testing.assert_close(shorter.forward(tokens, model.allocate(2, 7)), reference(tokens).logits)
    assert torch.equal(model.forward(tokens, model.allocate(2, 7)), before)


@pytest.mark.parametrize("number", [0, 4, 9])
def test_layers_that_are_not_there_are_refused(number: int) -> None:
    model = CausalLM(tiny.make("llama", FOUR))
    rule = "at least 1" if number == 0 else "at least 1 and below the layers of Llama.*, 4"
    with pytest.raises(ValueError, match=f"exit_layer={number} must be ({rule})"):
        Engine(model, method="early_exit", exit_layer=number)


def test_a_model_without_a_list_of_its_layers_is_refused() -> None:
    model = CausalLM(tiny.make("llama", FOUR))
    model.model.model.layers = torch.nn.ModuleDict({str(i): each for i, each in enumerate(model.model.model.layers)})
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM must have its 4 layers in one list"):
        model.first_layers(1)


@pytest.mark.parametrize("gamma", [2, "auto"])
@pytest.mark.parametrize("max_batch_size", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_greedy_equals_a_full_forward_for_each_token(fused: bool, max_batch_size: int, gamma: int | str) -> None:
    model = tiny.make("llama", WIDE)
    expected = [tiny.reference(model, prompt) for prompt in tiny.PROMPTS]
    if fused:
        fuse(model)
    options = {"num_speculative_tokens": gamma, "max_batch_size": max_batch_size}
    for exit_layer in (None,) if gamma == "auto" else (1, 3):
        engine = Engine(CausalLM(model), method="early_exit", exit_layer=exit_layer, **options)
        completions = engine.generate(tiny.PROMPTS, tiny.GREEDY)
        assert [list(completion.token_ids) for completion in completions] == expected


@needs_kernels
def test_with_kernels_self_drafting_is_bit_identical_to_plain_decoding() -> None:
    """In bf16; the first layers are run by the kernels, too."""
    model = tiny.make("llama", WIDE, torch.bfloat16)
    fuse(model)
    target = CausalLM(model)
    assert isinstance(target.first_layers(2).model.base_model, FusedDecoder)
    plain = Engine(target).generate(tiny.PROMPTS, tiny.GREEDY)
    engine = Engine(target, method="early_exit", exit_layer=2, num_speculative_tokens=3, max_batch_size=3)
    completions = engine.generate(tiny.PROMPTS, tiny.GREEDY)
    assert [c.token_ids for c in completions] == [c.token_ids for c in plain]
    assert sum(c.counts.num_drafted for c in completions) > 5
