"""Tokens as they are emitted, and prompts that arrive while others are decoded."""

from __future__ import annotations

from itertools import groupby

import pytest

from specdec import Chunk, Completion, Engine, SamplingParams
from specdec.conformance.toys import grid_pair
from specdec.decoding import Decoder
from specdec.models.markov import MarkovModel
from specdec.requests import Request

TARGET, DRAFT = grid_pair(4)
PROMPTS = [[0, 1, 2, 0, 1], [2], [1, 1, 1, 1, 1, 1, 1, 2], [0, 2], [2, 0, 1]]
PARAMS = [SamplingParams(max_tokens=1 + 4 * i, seed=i) for i in range(5)]


def engine(max_batch_size: int = 2) -> Engine:
    return Engine(TARGET, method="draft_model", draft=DRAFT, num_speculative_tokens=3, max_batch_size=max_batch_size)


def without_times(completion: Completion) -> tuple:
    return completion.index, completion.token_ids, completion.steps, completion.finish_reason


def test_chunks_are_the_completion_step_by_step() -> None:
    chunks: list[Chunk] = list(engine().stream(PROMPTS, PARAMS))
    for index, completion in enumerate(engine().generate(PROMPTS, PARAMS)):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert [len(chunk.token_ids) for chunk in own] == [
            1,
            *(s.num_accepted + (s.last is not None) for s in completion.steps),
        ]
        assert sum((chunk.token_ids for chunk in own), ()) == completion.token_ids
        assert sum((chunk.sources for chunk in own), ()) == completion.sources
        assert [chunk.completion is None for chunk in own] == [True] * (len(own) - 1) + [False]
        assert without_times(own[-1].completion) == without_times(completion)
        assert {chunk.text for chunk in own} == {None}


def test_the_first_chunk_comes_before_the_second_token_is_decoded() -> None:
    class Counting(Decoder):
        steps = 0

        def _step(self, *args):
            Counting.steps += 1
            return super()._step(*args)

    rows = Counting(TARGET, max_batch_size=2).advance(
        [Request(i, (i,), SamplingParams(max_tokens=3)) for i in range(2)]
    )
    seen = [(row.request.index, len(row.output), Counting.steps) for row in rows]
    assert seen == [(0, 1, 0), (1, 1, 0), (0, 2, 1), (1, 2, 1), (0, 3, 2), (1, 3, 2)]


class Bytes:
    """A tokenizer whose tokens are the three bytes of a euro sign, so that a character is complete at every third."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return b"".join(b"\xe2\x82\xac"[token : token + 1] for token in tokens).decode(errors="replace")


def test_text_holds_back_the_end_of_an_unfinished_character() -> None:
    target, _ = grid_pair(4)
    target.tokenizer = Bytes()
    bias = {1: 20.0}
    for seed in range(5):  # e2 82 ac in any order, and a last one that may be cut
        params = SamplingParams(max_tokens=11, seed=seed, logit_bias=bias if seed == 0 else {})
        chunks = list(Engine(target).stream([[0]], params))
        given = [chunk.text for chunk in chunks]
        assert "".join(given) == chunks[-1].completion.text
    never = Engine(target).stream([[0]], SamplingParams(max_tokens=4, logit_bias={0: -30.0, 2: -30.0}))
    assert [chunk.text for chunk in never] == ["", "", "", "\N{REPLACEMENT CHARACTER}" * 4]


class Letters:
    """A tokenizer whose tokens are letters, which are never special."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join("abc"[token] for token in tokens)

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize("draft", ["other", "same"])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_stream_that_ends_by_a_stop_token_is_whole(stop: int, draft: str) -> None:
    """Its last tokens come with their text and the completion; with a draft that is the target inside accepted runs."""
    target = MarkovModel(grid_pair(4)[0].table)
    target.tokenizer = Letters()
    streaming = Engine(
        target,
        method="draft_model",
        draft=target if draft == "same" else DRAFT,
        num_speculative_tokens=3,
        max_batch_size=2,
    )
    params = [SamplingParams(max_tokens=20, seed=seed, stop_token_ids=(stop,)) for seed in range(20)]
    prompts = [PROMPTS[seed % 5] for seed in range(20)]
    chunks, completions = list(streaming.stream(prompts, params)), streaming.generate(prompts, params)
    for index, completion in enumerate(completions):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert sum((chunk.token_ids for chunk in own), ()) == completion.token_ids
        assert "".join(chunk.text for chunk in own) == completion.text == Letters().decode(completion.token_ids, True)
        assert [chunk.completion is None for chunk in own] == [True] * (len(own) - 1) + [False]
        assert without_times(own[-1].completion) == without_times(completion)
    stopped = [each for each in completions if each.finish_reason == "stop"]
    assert len(stopped) > 10
    assert all(each.token_ids[-1] == stop for each in stopped)
    if draft == "same":
        assert any(each.steps and each.steps[-1].last is None for each in stopped), "none ends inside an accepted run"


def test_arguments_are_checked_at_the_call() -> None:
    with pytest.raises(ValueError, match="prompt 0 must not be empty"):
        engine().stream([[]])


# -- completions as they are finished ------------------------------------------------------------------------


def test_completions_come_as_they_are_finished() -> None:
    finished = list(engine(5).as_completed(PROMPTS, PARAMS))
    lengths = [len(completion.token_ids) for completion in finished]
    assert lengths[0] == 1  # the shortest of those that began together
    assert [each.index for each in finished] != sorted(each.index for each in finished) or lengths == sorted(lengths)
    by_index = sorted(finished, key=lambda completion: completion.index)
    assert [without_times(each) for each in by_index] == [
        without_times(each) for each in engine(5).generate(PROMPTS, PARAMS)
    ]
    with pytest.raises(ValueError, match="prompt 0 must not be empty"):
        engine().as_completed([[]])


def test_closing_drops_unfinished_requests_and_the_engine_stays_usable() -> None:
    streaming = engine(2)
    completions = streaming.as_completed(PROMPTS, PARAMS)
    assert next(completions).index == 0
    completions.close()
    total_s = streaming.phase_times.total_s
    assert total_s >= streaming.phase_times.prefill_s > 0  # of what was done
    assert [without_times(each) for each in streaming.generate(PROMPTS, PARAMS)] == [
        without_times(each) for each in engine(2).generate(PROMPTS, PARAMS)
    ]


def test_queueing_time_is_reported() -> None:
    """One slot: a request takes it only after the previous one is done."""
    params = [SamplingParams(max_tokens=6)] * 3
    first, second, third = Engine(TARGET).generate(PROMPTS[:3], params)
    assert 0 <= first.queue_s < first.ttft_s
    assert first.latency_s <= second.queue_s < second.ttft_s
    assert second.latency_s <= third.queue_s < third.ttft_s
    alone = Engine(TARGET, max_batch_size=3).generate(PROMPTS[:3], params)
    assert all(each.queue_s < alone[0].latency_s for each in alone)


# -- arrivals ------------------------------------------------------------------------------------------------


def test_output_does_not_depend_on_arrival_times() -> None:
    at_once = engine().generate(PROMPTS, PARAMS)
    arriving = engine().generate(PROMPTS, PARAMS, arrivals_s=[0.02, 0.0, 0.01, 0.0, 0.03])
    assert [without_times(each) for each in arriving] == [without_times(each) for each in at_once]


def test_no_request_is_decoded_before_its_arrival_and_slots_go_by_arrival() -> None:
    """One slot: rows come out one after the other, in the order of their arrival, waiting while no request is there."""
    arrivals = [0.03, 0.0, 0.06]
    requests = [Request(i, (i,), SamplingParams(max_tokens=4), arrival_s=each) for i, each in enumerate(arrivals)]
    rows = list(Decoder(TARGET).advance(requests))
    assert [index for index, _ in groupby(row.request.index for row in rows)] == [1, 0, 2]
    for row in rows:
        assert row.arrival_s < row.first_token_s <= row.last_token_s
    start_s = rows[0].arrival_s
    assert [row.arrival_s - start_s for row in rows[::4]] == pytest.approx([0.0, 0.03, 0.06])


def test_a_row_in_flight_continues_while_another_is_awaited() -> None:
    requests = [Request(i, (i,), SamplingParams(max_tokens=40), arrival_s=10.0 * i) for i in range(2)]
    rows = Decoder(TARGET, max_batch_size=2).advance(requests)
    assert [next(rows).request.index for _ in range(40)] == [0] * 40


@pytest.mark.parametrize("arrivals", [[0.0], [0.0, -1.0], [0.0, float("inf")], [0.0, float("nan")]])
def test_bad_arrivals_are_refused(arrivals: list[float]) -> None:
    with pytest.raises(ValueError, match=r"arrivals_s=.* must be seconds >= 0, one for each of the 2 prompts"):
        engine().generate([[0], [1]], arrivals_s=arrivals)


def test_a_request_arrives_after_the_one_that_it_follows() -> None:
    """Two conversations of two turns in one slot: a second turn arrives when the first is finished, not before."""
    at_once = engine().generate(PROMPTS[:4], PARAMS[:4])
    following = list(engine(1).as_completed(PROMPTS[:4], PARAMS[:4], after=[None, None, 1, 0]))
    assert [each.index for each in following] == [0, 1, 3, 2]
    assert sorted(map(without_times, following)) == list(map(without_times, at_once))
    for each in following[2:]:
        assert 0 <= each.queue_s < each.ttft_s <= each.latency_s


def test_a_follower_arrives_a_delay_after_the_last_token() -> None:
    first = Request(0, (0,), SamplingParams(max_tokens=3))
    second = Request(1, (1,), SamplingParams(max_tokens=1), arrival_s=0.05, after=0)
    third = Request(2, (2,), SamplingParams(max_tokens=1), after=1)  # its predecessor ends with the prefill
    rows = list(Decoder(TARGET, max_batch_size=2).run([third, first, second]))
    assert [row.request.index for row in rows] == [0, 1, 2]
    assert rows[1].arrival_s == rows[0].last_token_s + 0.05
    assert rows[1].admitted_s >= rows[1].arrival_s
    assert rows[2].arrival_s == rows[1].last_token_s


@pytest.mark.parametrize("after", [[None], [0, None], [None, 1], [None, -1]])
def test_requests_follow_earlier_ones_only(after: list[int | None]) -> None:
    with pytest.raises(ValueError, match=r"after=.* must be None or the index of an earlier prompt with n=1"):
        engine().as_completed([[0], [1]], after=after)


def test_a_prompt_with_several_samples_cannot_be_followed() -> None:
    with pytest.raises(ValueError, match=r"after=\[None, 0\] must be None or the index of an earlier prompt with n=1"):
        engine().as_completed([[0], [1]], [SamplingParams(n=2), SamplingParams()], after=[None, 0])
