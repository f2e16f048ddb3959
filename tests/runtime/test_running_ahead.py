"""Steps that are recorded as a whole and launched ahead of what the host knows: everything is as without that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from helpers import tiny
from test_engine import DRAFT, PROMPTS, TARGET, engine_for

from specdec import Completion, Engine, SamplingParams
from specdec.conformance.toys import FeatureTarget, ToyHead, grid_pair
from specdec.decoding import Decoder
from specdec.device_rows import DeviceRows, RowState
from specdec.heads.eagle import new_head
from specdec.models.causal import CausalLM
from specdec.models.markov import MarkovModel
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.heads.eagle import EagleProposer
from specdec.requests import Generation, Request
from specdec.runtime.devices import Mailbox
from specdec.sampling.state import NonFiniteLogitsError
from specdec.verification import verify_block, verify_coupled, verify_tokens

METHODS = ("autoregressive", "draft_model", "eagle", "early_exit")
MIXED = [
    SamplingParams(max_tokens=23, seed=1),
    SamplingParams(max_tokens=9, temperature=0),
    SamplingParams(max_tokens=1, seed=2),
    SamplingParams(max_tokens=40, seed=3, stop_token_ids=(2,), n=3),
    SamplingParams(max_tokens=2, temperature=0.7, top_k=2, seed=4),
]
STOPPING = [replace(params, seed=10 + i, max_tokens=30, stop_token_ids=(i % 3,)) for i, params in enumerate(MIXED)]
CHANGING = [  # rows whose logits or text the host must see, beside others that are decoded longer
    replace(MIXED[0], logprobs=True, top_logprobs=2, max_tokens=7),
    MIXED[3],
    replace(MIXED[1], frequency_penalty=0.4, max_tokens=5),
    MIXED[0],
    replace(MIXED[4], logit_bias={1: 1.0}, max_tokens=4),
]


RETURNING = [  # a long row beside short ones, of which every other one keeps both from running ahead
    SamplingParams(max_tokens=54, seed=5),
    SamplingParams(max_tokens=9, seed=6),
    SamplingParams(max_tokens=7, seed=7, frequency_penalty=0.1),
    SamplingParams(max_tokens=9, seed=8),
    SamplingParams(max_tokens=9, seed=9, logprobs=True),
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Number of steps launched, by the number of earlier steps whose outcome was still unknown."""
    counts: dict[int, int] = defaultdict(int)
    step = Decoder._step

    def counting(decoder, batch, cache, num_unread):
        counts[num_unread] += 1
        return step(decoder, batch, cache, num_unread)

    monkeypatch.setattr(Decoder, "_step", counting)
    return counts


def without_times(completion: Completion) -> tuple:
    """All but times, and log-probabilities, which are rounded otherwise where recorded rows are padded."""
    others = ("ttft_s", "latency_s", "queue_s", "logprobs", "top_logprobs")
    return tuple(getattr(completion, name) for name in completion.__slots__ if name not in others)


def check_equal(run: Callable[[bool], list], launched: dict[int, int]) -> None:
    """Twice over the same recordings, with steps ahead only where steps are recorded."""
    expected = run(False)
    assert set(launched) == {0}
    assert run(True) == expected
    assert launched[1] > 0


@pytest.mark.parametrize(
    "params", [MIXED, STOPPING, CHANGING, RETURNING], ids=["mixed", "stopping", "changing", "returning"]
)
@pytest.mark.parametrize("max_batch_size", [1, 2, 3, 9])
@pytest.mark.parametrize("method", METHODS)
def test_completions_are_the_same(method: str, max_batch_size: int, params: list, launched: dict[int, int]) -> None:
    """Tokens, steps and why they end: with slots that change hands, samples, stop tokens inside drafts."""

    def run(records: bool) -> list[tuple]:
        engine = engine_for(method, max_batch_size=max_batch_size, records=records)
        return [without_times(each) for _ in range(2) for each in engine.generate(PROMPTS, params)]

    check_equal(run, launched)


@pytest.mark.parametrize("method", METHODS)
def test_log_probabilities_are_the_same(method: str, launched: dict[int, int]) -> None:
    recorded, eager = (
        engine_for(method, max_batch_size=1, records=records).generate(PROMPTS, CHANGING) for records in (True, False)
    )
    assert launched[1] > 0
    assert recorded[0].logprobs == pytest.approx(eager[0].logprobs, abs=1e-4)
    assert [list(each) for each in recorded[0].top_logprobs] == [list(each) for each in eager[0].top_logprobs]


@pytest.mark.parametrize("verification", ["block", "coupled"])
@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_other_rules(method: str, verification: str, launched: dict[int, int]) -> None:
    def run(records: bool) -> list[tuple]:
        engine = engine_for(method, max_batch_size=2, records=records, verification=verification)
        return [without_times(each) for each in engine.generate(PROMPTS, MIXED)]

    check_equal(run, launched)


@pytest.mark.parametrize("gamma", [1, 2, 5])
@pytest.mark.parametrize("rule", [verify_tokens, verify_block, verify_coupled])
def test_a_head_that_reads_features_from_the_right_places(rule, gamma: int, launched: dict[int, int]) -> None:
    """It drafts another token from another's feature. Prompts shorter and longer than a step's tokens."""
    target, draft = FeatureTarget(grid_pair(1)[0].table), grid_pair(1)[1]
    requests = [
        Request(i, tuple(prompt), SamplingParams(max_tokens=30, seed=i), frozenset({2} if i % 2 else ()))
        for i, prompt in enumerate([*PROMPTS, [1] * 30])
    ]
    requests += [Request(6 + i, (1, 2), replace(params, seed=40 + i)) for i, params in enumerate(RETURNING)]

    def run(records: bool) -> list[tuple]:
        proposer = EagleProposer(ToyHead(draft))
        decoder = Decoder(target, proposer, gamma, max_batch_size=2, rule=rule, records=records)
        rows = sorted(decoder.run(requests), key=lambda row: row.request.index)
        return [(row.tokens, row.steps, row.finish_reason) for row in rows]

    check_equal(run, launched)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_are_the_same(method: str, launched: dict[int, int]) -> None:
    """Those of a prompt, in their order; between prompts the order may differ, since slots are handed over later."""

    def run(records: bool) -> list[tuple]:
        chunks = defaultdict(list)
        for chunk in engine_for(method, max_batch_size=2, records=records).stream(PROMPTS, MIXED):
            chunks[chunk.index, chunk.sample].append((chunk.token_ids, chunk.sources, chunk.completion is None))
        return sorted(chunks.items())

    check_equal(run, launched)


def test_rows_of_a_step_come_in_the_order_of_their_slots(launched: dict[int, int]) -> None:
    requests = [Request(i, (i,), SamplingParams(max_tokens=4)) for i in range(2)]

    def run(records: bool) -> list[tuple]:
        rows = Decoder(TARGET, max_batch_size=2, records=records).advance(requests)
        return [(row.request.index, len(row.output)) for row in rows]

    check_equal(run, launched)


def test_arrivals(launched: dict[int, int]) -> None:
    def run(records: bool) -> list[tuple]:
        engine = engine_for("draft_model", max_batch_size=2, records=records)
        completions = engine.generate(PROMPTS, MIXED, arrivals_s=[0.02, 0.0, 0.01, 0.0, 0.03])
        return [without_times(each) for each in completions]

    check_equal(run, launched)


def similar_llama() -> CausalLM:
    """Nearly the target, for a shorter context."""
    model = tiny.make("llama", tiny.GQA | {"max_position_embeddings": 48})
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return CausalLM(model)


@pytest.mark.parametrize("returning", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_real_models(method: str, returning: bool, launched: dict[int, int]) -> None:
    """Up to the last token that the context has room for."""
    torch.manual_seed(0)
    model = tiny.make("llama", tiny.GQA)
    options = {} if method == "autoregressive" else {"num_speculative_tokens": 3}
    if method == "eagle":
        options["draft"] = new_head(model, torch.arange(0, 61, 2)).eval().requires_grad_(False)
    if method == "draft_model":
        options["draft"] = similar_llama()
    params = [
        SamplingParams(max_tokens=64 - len(prompt), temperature=i % 2, ignore_eos=True, seed=i)
        for i, prompt in enumerate(tiny.PROMPTS)
    ]
    prompts = tiny.PROMPTS
    if returning:
        prompts, params = [[3, 4]] * 10, [replace(each, ignore_eos=True) for each in RETURNING * 2]

    def run(records: bool) -> list[tuple]:
        engine = Engine(CausalLM(model), method=method, max_batch_size=2, records=records, **options)
        return [(each.token_ids, each.steps) for _ in range(2) for each in engine.generate(prompts, params)]

    check_equal(run, launched)


def test_no_step_is_launched_that_all_rows_end_before(launched: dict[int, int]) -> None:
    """Where `max_tokens` ends them, and none is rejected."""
    for max_tokens in (1, 2, 3, 8):
        launched.clear()
        (completion,) = Engine(TARGET, records=True).generate([[0, 1]], SamplingParams(max_tokens=max_tokens))
        assert len(completion.steps) == sum(launched.values()) == max_tokens - 1


def test_a_surplus_step_leaves_no_trace(launched: dict[int, int]) -> None:
    """A stop token is known one step late; what was launched meanwhile is not counted."""
    params = SamplingParams(max_tokens=50, stop_token_ids=(2,), seed=37)
    completions = [
        Engine(TARGET, method="draft_model", draft=DRAFT, num_speculative_tokens=1, records=records).generate(
            [[0, 1]], params
        )[0]
        for records in (False, True)
    ]
    assert completions[0].finish_reason == "stop"
    assert len(completions[0].steps) > 1
    assert without_times(completions[0]) == without_times(completions[1])
    assert sum(launched.values()) == 2 * len(completions[0].steps) + 1


@pytest.mark.parametrize("method", METHODS)
def test_closing_a_stream_leaves_nothing_under_way_that_is_read_later(method: str) -> None:
    expected = [without_times(each) for each in engine_for(method, max_batch_size=2).generate(PROMPTS, MIXED)]
    engine = engine_for(method, max_batch_size=2, records=True)
    for _ in range(2):
        for number in (1, 4, 9):
            chunks = engine.stream(PROMPTS, MIXED)
            for _ in range(number):
                next(chunks)
            chunks.close()
        assert [without_times(each) for each in engine.generate(PROMPTS, MIXED)] == expected


class Poisoned(MarkovModel):
    """Its logits after token 2 are NaN."""

    def forward_at(self, tokens, *args, **kwargs):
        logits = super().forward_at(tokens, *args, **kwargs)
        return torch.where((tokens == 2).unsqueeze(-1), torch.nan, logits)[:, : logits.shape[1]]


@pytest.mark.parametrize("poisoned", ["target", "draft"])
def test_logits_without_a_distribution_are_reported_alike(poisoned: str, launched: dict[int, int]) -> None:
    draft = Poisoned(TARGET.table) if poisoned == "draft" else TARGET
    target = Poisoned(TARGET.table) if poisoned == "target" else TARGET
    request = Request(7, (0, 1), SamplingParams(max_tokens=60, seed=1))
    messages = []
    for records in (False, True):
        decoder = Decoder(target, DraftModelProposer(draft), 2, max_batch_size=2, records=records)
        with pytest.raises(NonFiniteLogitsError, match="request 7 at token position") as caught:
            list(decoder.run([request]))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert launched[1] > 0


def test_phases_are_timed_inside_a_recorded_step() -> None:
    engine = engine_for("draft_model", records=True)
    for _ in range(3):
        engine.generate(PROMPTS[:1], SamplingParams(max_tokens=40))
    times = engine.phase_times
    assert min(times.prefill_s, times.draft_s, times.scoring_s, times.verification_s, times.bookkeeping_s) > 0
    assert times.recording_s == 0
    plain = Engine(TARGET, records=True)
    plain.generate(PROMPTS[:1], SamplingParams(max_tokens=40))
    assert plain.phase_times.draft_s == 0 < plain.phase_times.scoring_s


# -- the parts -----------------------------------------------------------------------------------------------


def rows_of(*lengths: int) -> Iterator[Generation]:
    for index, length in enumerate(lengths):
        row = Generation(Request(index, (5,) * (length - 1), SamplingParams(max_tokens=10)), 0.0)
        row.emit([6])
        yield row


def test_the_state_after_a_step() -> None:
    state = RowState.unpack(torch.tensor([[7, 9, 1, 4, 0, 0], [7, 2, 2, 3, 4, 0], [2, 0, 1, 0, 0, 0]]))
    assert state.newest.tolist() == [[4], [4], [0]]
    assert state.limits(2, 100).tolist() == [2, 1, 0]
    assert state.limits(2, 8).tolist() == [1, 1, 0]
    drafted, next_token = torch.tensor([[11, 12], [11, 12], [11, 12]]), torch.tensor([21, 22, 23])
    behind = state.after(drafted, torch.tensor([2, 1, 0]), next_token, torch.tensor([3, 1, 1]))
    assert behind.num_tokens.tolist() == [10, 9, 2]
    assert behind.remaining.tolist() == [6, 0, 0]
    assert behind.pending[0].tolist() == [11, 12, 21]
    assert behind.newest.tolist() == [[21], [22], [23]]
    assert RowState.unpack(behind.packed()).packed().equal(behind.packed())


def test_only_slots_that_change_hands_are_entered() -> None:
    rows, device_rows, entered = list(rows_of(4, 6, 3)), DeviceRows(3, 2, torch.device("cpu")), []

    def pending(slot: int) -> list[int]:
        entered.append(slot)
        return [5, 6]

    state = device_rows.enter([rows[0], None, rows[1]], pending)
    assert state.value.tolist() == [[4, 9, 2, 5, 6], [2, 0, 1, 0, 0], [6, 9, 2, 5, 6]]
    with torch.inference_mode():
        state.value[0, 0] = 5  # as a step does
    device_rows.enter([rows[0], None, rows[1]], pending)
    device_rows.enter([rows[0], rows[2], None], pending)
    assert state.value.tolist() == [[5, 9, 2, 5, 6], [3, 9, 2, 5, 6], [2, 0, 1, 0, 0]]
    assert entered == [0, 2, 1]
    device_rows.forget()
    assert device_rows.enter([rows[0], rows[2], None], pending) is state
    assert state.value[0, 0] == 4
    assert entered == [0, 2, 1, 0, 1]


def test_two_letters_are_under_way_at_a_time() -> None:
    mailbox, place = Mailbox(torch.device("cpu")), torch.zeros(2, dtype=torch.int64)
    letters = [mailbox.send(place.fill_(number)) for number in range(2)]
    assert [letter.tolist() for letter in letters] == [[0, 0], [1, 1]]
    assert mailbox.send(place.fill_(2)) is letters[0]
    assert letters[0].tolist() == [2, 2]
