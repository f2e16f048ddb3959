"""Several samples of a prompt: each is the completion that its own seed gives, and the prompt is read once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import tiny
from test_engine import PROMPTS, TARGET, engine_for
from transformers import T5Config, T5ForConditionalGeneration

from specdec import METHODS, Engine, SamplingParams
from specdec.models.causal import CausalLM
from specdec.models.markov import MarkovModel
from specdec.models.seq2seq import Seq2SeqLM
from specdec.sampling.randomness import own_seed, sample_seed

NUM_SAMPLES = [3, 1, 2, 4, 1]  # of each prompt
PARAMS = [
    SamplingParams(max_tokens=6 + i, seed=i % 2, n=n, frequency_penalty=0.2 * i) for i, n in enumerate(NUM_SAMPLES)
]
FORGETFUL = [method for method in METHODS if "suffix" not in method]  # the others draft from earlier outputs


def alone(engine: Engine, prompts: list, params: list[SamplingParams]) -> list[tuple[int, int, tuple[int, ...]]]:
    """(prompt, sample, tokens) by requests of one sample each."""
    seeded = [
        (i, sample, prompt, replace(each, n=1, seed=sample_seed(each.seed, sample)))
        for i, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        for sample in range(each.n)
    ]
    return [(i, sample, engine.generate([prompt], each)[0].token_ids) for i, sample, prompt, each in seeded]


def together(engine: Engine, prompts: list, params: list[SamplingParams]) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(c.index, c.sample, c.token_ids) for c in engine.generate(prompts, params)]


@pytest.mark.parametrize(
    ("method", "verification"), [*((method, "token") for method in FORGETFUL), ("draft_model", "coupled")]
)
def test_samples_follow_from_their_seeds(method: str, verification: str) -> None:
    """In any batch, beside other prompts, in slots that change hands; the first is what one sample gives."""
    expected = alone(engine_for(method, verification=verification), PROMPTS, PARAMS)
    for max_batch_size, records in ((1, False), (2, False), (3, True), (11, False)):
        engine = engine_for(method, verification=verification, max_batch_size=max_batch_size, records=records)
        assert together(engine, PROMPTS, PARAMS) == expected
    assert len({tokens for index, _, tokens in expected if index == 3}) > 1


def llama() -> CausalLM:
    return CausalLM(tiny.make("llama", tiny.GQA))


def t5() -> Seq2SeqLM:
    options = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=61, eos_token_id=1, **options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return Seq2SeqLM(model)


@pytest.mark.parametrize("make", [llama, t5])
def test_samples_of_real_architectures(make) -> None:
    """Keys, values and encoded prompts are copied as a whole: tokens are the same, not nearly."""
    target, params = make(), [replace(each, max_tokens=8) for each in PARAMS[:4]]
    expected = alone(Engine(target, method="ngram"), tiny.PROMPTS, params)
    for max_batch_size in (1, 3):
        assert together(Engine(target, method="ngram", max_batch_size=max_batch_size), tiny.PROMPTS, params) == expected


class Counting(MarkovModel):
    """Counts how often a prompt of ten tokens is read."""

    num_read = 0

    def forward(self, tokens, cache, first_slot=0, last_only=False):
        self.num_read += tokens.shape[1] >= 10
        return super().forward(tokens, cache, first_slot, last_only)


@pytest.mark.parametrize("max_batch_size", [1, 2, 7])
def test_the_target_reads_a_prompt_once_for_all_its_samples(max_batch_size: int) -> None:
    target = Counting(TARGET.table)
    engine = Engine(target, method="ngram", max_batch_size=max_batch_size, records=False)
    prompts = [[0, 1, 2, 0, 1] * 2, [2] * 10]
    engine.generate(prompts, SamplingParams(n=5, max_tokens=4))
    assert target.num_read == 2
    engine.generate(prompts, SamplingParams(max_tokens=4))  # and again, where there is but one
    assert target.num_read == 4


def test_seeds_of_samples_differ_from_all_others() -> None:
    seeds = [sample_seed(seed, sample) for seed in (0, 1, 2**64 - 1) for sample in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == 0
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert not set(seeds[1:50]) & {own_seed(0, number) for number in range(50)}


def test_samples_are_streamed_apart() -> None:
    engine = engine_for("draft_model", max_batch_size=3)
    said: dict[tuple[int, int], tuple[int, ...]] = {}
    for chunk in engine.stream(PROMPTS, PARAMS):
        key = (chunk.index, chunk.sample)
        said[key] = said.get(key, ()) + chunk.token_ids
        if chunk.completion:
            assert chunk.completion.token_ids == said[key]
            assert (chunk.completion.index, chunk.completion.sample) == key
    assert [(*key, said[key]) for key in sorted(said)] == together(engine, PROMPTS, PARAMS)


@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_no_samples_are_refused(n: float) -> None:
    with pytest.raises(ValueError, match=f"n={n} must be an integer >= 1"):
        SamplingParams(n=n)
