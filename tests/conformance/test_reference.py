"""Teacher-forced distributions are those that decoding draws from, however many positions are scored at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers.audited import TARGET
from helpers.tiny import SUPPORTED, make
from helpers.toys import top_k_distribution

from specdec import SamplingParams
from specdec.conformance import reference
from specdec.conformance.reference import Reference, boundary_gap
from specdec.models import loading
from specdec.models.causal import CausalLM
from specdec.models.markov import MarkovCache, MarkovModel
from specdec.sampling.state import SamplingState

PROMPTS = [[1, 2, 3], [4], [5, 5]]
OUTPUTS = [[6, 7, 0, 1], [2, 2], [3, 1, 2, 4, 4, 4]]
EVERYTHING = SamplingParams(
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.05,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    repetition_penalty=1.2,
    logit_bias={3: 1.5},
)


def all_distributions(of: Reference, prompts=PROMPTS, outputs=OUTPUTS) -> dict[tuple[int, int], torch.Tensor]:
    """{(output, position): distribution}, after checking the tokens that they belong to."""
    found = {}
    for positions in of.distributions(prompts, outputs):
        cells = zip(positions.requests.tolist(), positions.places.tolist(), strict=True)
        for index, (request, place) in enumerate(cells):
            assert positions.tokens[index] == outputs[request][place]
            found[request, place] = positions.distribution.dense()[index]
    assert sorted(found) == [(row, place) for row, output in enumerate(outputs) for place in range(len(output))]
    return found


@pytest.mark.parametrize("chunk", [1, 50, 1 << 24])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_distributions_are_the_tables_rows(chunk: int, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK", chunk)
    of = Reference(TARGET, SamplingParams(top_k=3), batch_size)
    for _ in range(2):  # the second time its cache has the prompts
        for (request, place), distribution in all_distributions(of).items():
            text = [0, *PROMPTS[request], *OUTPUTS[request][:place]]
            assert distribution == pytest.approx(top_k_distribution(TARGET.table[text[-2], text[-1]], 3), abs=1e-12)


@pytest.mark.parametrize("chunk", [200, 1 << 24])
def test_distributions_of_a_transformer_with_every_processor(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a forward without a cache and a step of one position at a time."""
    monkeypatch.setattr(reference, "_CHUNK", chunk)
    model = make("llama", SUPPORTED["llama"])
    for (request, place), distribution in all_distributions(Reference(CausalLM(model), EVERYTHING, 2)).items():
        prompt, before = PROMPTS[request], OUTPUTS[request][:place]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *before]]), use_cache=False).logits[:, -1:]
        state = SamplingState([EVERYTHING], [prompt], [before], model.config.vocab_size, logits.device)
        assert distribution == pytest.approx(state.distribution(logits)[0].dense()[0, 0], abs=1e-5)
        assert distribution.is_inference()


def test_another_output_of_other_prompts_meets_no_stale_cache() -> None:
    of = Reference(TARGET, SamplingParams())
    all_distributions(of)
    again = all_distributions(of, PROMPTS[::-1], OUTPUTS[::-1])
    assert again[0, 1] == pytest.approx(TARGET.table[5, 3], abs=1e-12)


@pytest.mark.parametrize(("chunk", "widths"), [(24 * 4 - 1, [3, 3]), (24 * 4, [4, 2]), (23, [1] * 6), (24 * 9, [6])])
def test_a_chunk_has_as_many_places_as_fit(chunk: int, widths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three outputs over eight tokens take 24 probabilities a place; the longest output has six."""
    monkeypatch.setattr(reference, "_CHUNK", chunk)
    chunks = list(Reference(TARGET, SamplingParams()).distributions(PROMPTS, OUTPUTS))
    assert [len(each.places.unique()) for each in chunks] == widths


def test_each_prompt_needs_an_output() -> None:
    of = Reference(TARGET, SamplingParams())
    for prompts, outputs in ((PROMPTS, OUTPUTS[:2]), (PROMPTS[:2], OUTPUTS)):
        with pytest.raises(ValueError, match="zip"):
            list(of.distributions(prompts, outputs))


class Counted(MarkovModel):
    """Counts the caches that are allocated."""

    num_allocated = 0

    def allocate(self, *arguments, **options):
        self.num_allocated += 1
        return super().allocate(*arguments, **options)


def num_allocated(of: Reference, *questions: tuple[list[list[int]], int]) -> list[int]:
    """How many caches each question allocates. questions: (prompts, length of their outputs)."""
    found = []
    for prompts, length in questions:
        before = of.model.num_allocated
        list(of.distributions(prompts, [[1] * length] * len(prompts)))
        found.append(of.model.num_allocated - before)
    return found


def test_a_cache_is_used_again_while_it_is_long_enough() -> None:
    of = Reference(Counted(TARGET.table), SamplingParams())
    assert num_allocated(of, (PROMPTS, 5), (PROMPTS, 5), (PROMPTS, 3), (PROMPTS, 6), (PROMPTS, 6)) == [1, 0, 0, 1, 0]
    assert num_allocated(of, (PROMPTS[:2], 5), (PROMPTS[::-1], 5), (PROMPTS, 6)) == [1, 1, 0]


def test_a_cache_that_cannot_be_rolled_back_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for all but the last token of each prompt."""
    asked = []

    def holds(cache, slot: int, num_tokens: int) -> bool:
        asked.append((slot, num_tokens))
        return slot == 0

    of = Reference(Counted(TARGET.table), SamplingParams())
    monkeypatch.setattr(MarkovCache, "holds", holds)
    assert num_allocated(of, (PROMPTS, 5), (PROMPTS, 5), (PROMPTS[:1], 5), (PROMPTS[:1], 5)) == [1, 1, 1, 0]
    assert {(0, 2), (1, 0)} <= set(asked)


@pytest.mark.parametrize(("room", "kept"), [(22, 2), (29, 2), (30, 3), (39, 3), (9, 1)])
def test_the_caches_used_last_are_kept(room: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has two rows of five positions. With room for all none is forgotten, and a single one always fits."""
    monkeypatch.setattr(reference, "_REMEMBERED", room)
    of = Reference(Counted(TARGET.table), SamplingParams())
    questions = [([[first], [2, 3]], 3) for first in range(4)]
    assert num_allocated(of, *questions[:2], questions[0]) == [1, 1, int(kept < 2)]
    assert num_allocated(of, questions[2]) == [1]
    recent = [questions[2], questions[0], questions[1]]  # the last used first
    assert num_allocated(of, *recent[:kept]) == [0] * kept
    assert num_allocated(of, *recent[kept : kept + 1]) == [1] * (kept < 3)
    assert num_allocated(of, questions[3], questions[3]) == [1, 0]


def test_half_precision_is_no_reference() -> None:
    model = CausalLM(make("llama", SUPPORTED["llama"], torch.bfloat16))
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16 of the reference must be float32 or wider; load it"):
        Reference(model, SamplingParams())


def test_a_constraint_is_refused() -> None:
    """Its distributions are not made here: leaving it out would call a right engine lossy."""
    with pytest.raises(ValueError, match="regex must not be in the reference's sampling; audit without a constraint"):
        Reference(TARGET, SamplingParams(regex="a"))
    with pytest.raises(ValueError, match="regex must not be in the reference's sampling"):
        Reference(TARGET, SamplingParams(regex="a", bad_words="b", min_tokens=1))


def test_stop_tokens_are_those_of_decoding() -> None:
    model = CausalLM(make("llama", SUPPORTED["llama"]))
    params = SamplingParams(stop_token_ids=(9,))
    assert Reference(model, params).stop_token_ids == {2, 9}
    assert Reference(model, replace(params, ignore_eos=True)).stop_token_ids == {9}


LOG_PROBS = torch.tensor([0.5, 0.25, 0.125, 0.125 - 1e-6, 1e-6], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("params", "token", "expected"),
    [
        (SamplingParams(), 4, 0),
        (SamplingParams(temperature=0), 0, 0),
        (SamplingParams(temperature=0), 1, math.log(2)),
        (SamplingParams(top_k=3), 2, 0),
        (SamplingParams(top_k=3), 3, -math.log1p(-8e-6)),
        (SamplingParams(top_k=2, temperature=0.5), 2, math.log(2)),  # logits, whatever the temperature
        (SamplingParams(top_k=9), 4, 0),  # as many as there are
        (SamplingParams(top_k=4, top_p=0.4), 1, math.log(0.5 / (1 - 1e-6) / 0.4)),  # of the mass that top-k keeps
        (SamplingParams(top_p=0.7), 1, 0),
        (SamplingParams(top_p=0.7), 2, math.log(0.75 / 0.7)),
        (SamplingParams(min_p=0.5), 1, 0),
        (SamplingParams(min_p=0.5), 2, math.log(2)),
        (SamplingParams(top_k=1, top_p=0.9, min_p=0.5), 2, math.log(4)),  # whatever it misses by most
        (SamplingParams(temperature=0.1), 4, math.inf),  # e^-131 is 0 in float32
    ],
)
def test_gap_by_hand(params: SamplingParams, token: int, expected: float) -> None:
    assert boundary_gap(LOG_PROBS, token, params) == pytest.approx(expected, abs=1e-8)


def test_a_forbidden_token_has_no_finite_gap() -> None:
    assert boundary_gap(torch.tensor([0.0, -math.inf]).double(), 1, SamplingParams()) == math.inf


def outside(params: SamplingParams, output: Sequence[int]) -> float:
    of = Reference(TARGET, params)
    positions = list(of.distributions([[1, 2]], [output]))[-1]
    return of.gap([1, 2], output, positions.logits[-1])


def test_gap_of_an_emitted_token_knows_penalties_and_biases() -> None:
    row = TARGET.table[2, 3].log()
    order = row.argsort(descending=True).tolist()
    second = order[1]
    assert outside(SamplingParams(temperature=0), [3, second]) == pytest.approx(float(row[order[0]] - row[second]))
    favoured = SamplingParams(temperature=0, logit_bias={second: 50.0})
    assert outside(favoured, [3, second]) == pytest.approx(0, abs=1e-9)
    assert outside(SamplingParams(logit_bias={second: -math.inf}), [3, second]) == math.inf
    # penalties count every token before the last: second is put below the others by two of them
    penalized = SamplingParams(temperature=0, frequency_penalty=2.0)
    row = TARGET.table[second, second].log()
    after = row.clone()
    after[second] -= 2 * 2.0
    assert outside(penalized, [second, second, second]) == pytest.approx(float(after.max() - after[second]))


def test_a_loaded_model_is_wrapped_as_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_pretrained(name: str, **options):
        asked.append((name, options))
        return make("llama", SUPPORTED["llama"]), None

    monkeypatch.setattr(loading, "load_pretrained", load_pretrained)
    of = Reference.load("some/model", SamplingParams(max_tokens=7), device="cpu", batch_size=3)
    assert asked == [("some/model", {"dtype": torch.float32, "device": "cpu"})]
    assert (type(of.model), of.sampling.max_tokens, of.batch_size) == (CausalLM, 7, 3)


def test_a_reference_is_loaded_by_its_name() -> None:
    """In float32, and not by what decoding forbids beyond it."""
    reference = Reference.load("smollm2-135m", SamplingParams(max_tokens=4), device="cpu")
    assert reference.model.dtype == torch.float32
    for limits in ({"min_tokens": 2}, {"bad_words": "a"}):
        with pytest.raises(ValueError, match=rf"{next(iter(limits))} must not be in the reference's sampling"):
            Reference(reference.model, SamplingParams(**limits))
