"""The engine's public interface: its results, and its errors for bad input."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from helpers import drafts, tiny
from helpers.toys import ExitTarget

from specdec import METHODS, AcceptanceCounts, Engine, SamplingParams
from specdec.conformance.toys import grid_pair
from specdec.drafts import check_same_vocabulary
from specdec.heads.eagle import EagleHead, new_head
from specdec.models.causal import CausalLM
from specdec.models.markov import MarkovModel
from specdec.proposers.table import NgramTable
from specdec.sampling.state import NonFiniteLogitsError

TARGET, DRAFT = grid_pair(4)
PROMPTS = [[0, 1, 2, 0, 1], [2], [1, 1, 1, 1, 1, 1, 1, 2], [0, 2], [2, 0, 1]]


TABLE = NgramTable.count([[0, 1, 2, 0, 1, 1, 2, 0, 2, 1, 0, 1, 2]], 3)


@cache
def features_pair() -> tuple[CausalLM, EagleHead]:
    """A random Llama over the toys' three tokens, and a random head that drafts two of them."""
    model = tiny.make("llama", tiny.GQA | {"vocab_size": 3})
    head = new_head(model, torch.tensor([0, 2])).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return CausalLM(model), head


def engine_for(method: str, **options) -> Engine:
    if method == "eagle":
        target, head = features_pair()
        return Engine(target, method="eagle", draft=head, **options)
    if method in drafts.HEAD_METHODS:
        return Engine(
            drafts.target(), method=method, draft=drafts.head(method), **{"num_speculative_tokens": 3} | options
        )
    if method == "early_exit":
        return Engine(ExitTarget(TARGET.table, DRAFT.table), method="early_exit", **options)
    if method == "tree":
        options = {"tree": [(0,), (1,), (0, 0), (0, 1), (1, 0)]} | options
    models = {
        "draft_model": DRAFT,
        "hybrid": DRAFT,
        "tree": DRAFT,
        "ngram_table": TABLE,
        "pard": drafts.parallel(DRAFT),
    }
    history = (
        {"max_history_bytes": 0} if method == "suffix" else {}
    )  # with one only distributions do not depend on others
    return Engine(TARGET, method=method, draft=models.get(method), **history, **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_in_any_batch_equals_the_row_alone(method: str) -> None:
    """With penalties, bias and truncation that differ by request, at T > 0, with more requests than slots."""
    params = [
        SamplingParams(
            max_tokens=5 + 3 * i,
            seed=i,
            temperature=0.5 * i,
            frequency_penalty=0.2 * i,
            repetition_penalty=1 + 0.1 * i,
            logit_bias={1: 0.3 * i},
            top_k=3 if i % 2 else 0,
        )
        for i in range(5)
    ]
    alone = [engine_for(method).generate([prompt], each)[0] for prompt, each in zip(PROMPTS, params, strict=True)]
    for max_batch_size in (2, 5):
        together = engine_for(method, max_batch_size=max_batch_size).generate(PROMPTS, params)
        assert [c.token_ids for c in together] == [c.token_ids for c in alone]
        assert [c.steps for c in together] == [c.steps for c in alone]
        assert [c.index for c in together] == list(range(5))


@pytest.mark.parametrize("method", METHODS)
def test_counts_and_sources_agree_with_the_output(method: str) -> None:
    for completion in engine_for(method, max_batch_size=2).generate(PROMPTS, SamplingParams(max_tokens=17, seed=9)):
        counts = completion.counts
        assert len(completion.token_ids) == 17 == len(completion.sources) == 1 + counts.num_emitted
        assert completion.sources.count("accepted") == counts.num_accepted
        assert completion.finish_reason == "length"
        assert 0 < completion.ttft_s <= completion.latency_s
        rejections = sum(step.num_accepted < step.num_drafted and step.last is not None for step in completion.steps)
        if method == "tree":  # of which most nodes are never accepted, also where a path comes to its end
            assert completion.sources.count("recovered") <= rejections
        else:
            assert completion.sources.count("recovered") == rejections
        if method == "autoregressive":
            assert set(completion.sources) == {"plain"}


def test_phase_times_add_up() -> None:
    engine = engine_for("draft_model")
    engine.generate(PROMPTS, SamplingParams(max_tokens=20))
    times = engine.phase_times
    assert min(times.prefill_s, times.draft_s, times.scoring_s, times.verification_s, times.bookkeeping_s) > 0
    assert times.bookkeeping_s < times.total_s


def test_logprobs_are_the_log_of_the_unprocessed_distribution() -> None:
    params = SamplingParams(max_tokens=9, temperature=0.7, top_k=2, logprobs=True, seed=1)
    completion = engine_for("draft_model").generate([[0, 1]], params)[0]
    tokens = [0, 1, *completion.token_ids]
    expected = [math.log(TARGET.table[tokens[i - 2], tokens[i - 1], tokens[i]]) for i in range(2, len(tokens))]
    assert completion.logprobs == pytest.approx(expected)
    assert engine_for("ngram").generate([[0, 1]])[0].logprobs is None


def test_first_token_may_end_a_request() -> None:
    """max_tokens = 1, and a stop token from the prefill; the slot takes the next request at once."""
    completions = engine_for("ngram").generate(PROMPTS, SamplingParams(max_tokens=1))
    assert [(len(c.token_ids), c.finish_reason, c.steps) for c in completions] == [(1, "length", ())] * 5
    completions = engine_for("ngram").generate(PROMPTS, SamplingParams(stop_token_ids=(0, 1, 2)))
    assert [(len(c.token_ids), c.finish_reason) for c in completions] == [(1, "stop")] * 5


def test_model_end_of_sequence_ends_unless_ignored() -> None:
    class WithEos(MarkovModel):
        eos_token_ids = frozenset([0])

    engine = Engine(WithEos(TARGET.table))
    assert engine.generate([[1]], SamplingParams(max_tokens=60))[0].finish_reason == "stop"
    ignored = engine.generate([[1]], SamplingParams(max_tokens=60, ignore_eos=True))[0]
    assert (ignored.finish_reason, len(ignored.token_ids)) == ("length", 60)


def test_no_prompts_no_completions() -> None:
    assert engine_for("ngram").generate([]) == []


def test_counts_sum_over_completions() -> None:
    completions = engine_for("ngram").generate(PROMPTS, SamplingParams(max_tokens=6))
    assert AcceptanceCounts.total(c.counts for c in completions).num_emitted == 5 * 5


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method='magic' must be one of autoregressive, ngram, ngram_store, ngram_table, suffix"),
        (
            {"method": "ngram", "num_speculative_tokens": 0},
            'num_speculative_tokens=0 must be at least 1, or "auto"; for plain decoding use method="autoregressive"',
        ),
        ({"method": "draft_model"}, 'method="draft_model" needs a draft'),
        ({"method": "ngram", "draft": DRAFT}, "draft: method='ngram' does not use a model"),
        ({"max_batch_size": 0}, "max_batch_size=0 must be at least 1"),
        (
            {"method": "suffix", "max_history_bytes": -1},
            "max_history_bytes=-1 must be at least 0; 0 disables the history",
        ),
        (
            {"max_history_bytes": 9},
            "max_history_bytes=9 must be left out with method='autoregressive'; use method='suff",
        ),
        ({"method": "early_exit"}, "target=MarkovModel must have first_layers"),
        ({"exit_layer": 2}, "exit_layer=2 must be left out with method='autoregressive'; use method='early_exit'"),
        ({"method": "suffix", "draft": DRAFT}, "draft: method='suffix' does not use a model; omit it"),
        (
            {"method": "draft_model", "draft": MarkovModel(torch.full((5, 5, 5), 0.2))},
            "the draft's vocabulary of 5 tokens must be the target's, 3",
        ),
    ],
)
def test_bad_engines_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(TARGET, **options)


def test_bad_options_are_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(ValueError, match="method='magic' must be one of"):
        Engine.load("no/such-model", method="magic")


class Tokenizer:
    def __init__(self, vocabulary: dict[str, int]) -> None:
        self.get_vocab = lambda: vocabulary


def test_an_incomparable_tokenizer_is_refused() -> None:
    target, draft = grid_pair(4)
    target.tokenizer, draft.tokenizer = Tokenizer({"a": 0, "b": 1, "c": 2}), Tokenizer({"a": 0, "c": 1, "b": 2})
    with pytest.raises(ValueError, match="tokenizer Tokenizer must be byte-level or SentencePiece-like for a draft"):
        Engine(target, method="draft_model", draft=draft)
    with pytest.raises(ValueError, match="token 'b' is 1 for the target and 2 for the draft"):
        check_same_vocabulary(target, draft)


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([[0], []], None, "prompt 1 must not be empty"),
        ([[0, 3]], None, r"prompt 0 must have token ids in \[0, 3\)"),
        (["hello"], None, "a text prompt needs a model with a tokenizer"),
        ([[0]] * 2, [SamplingParams()], "1 sampling parameters must be one, or one for each of the 2 prompts"),
        ([[0]], SamplingParams(logit_bias={7: 1.0}), r"logit_bias and stop_token_ids of prompt 0 .* not \[7\]"),
        (
            [[0] * 190],
            SamplingParams(max_tokens=20),
            "prompt 0 has 190 tokens, which with max_tokens=20 exceeds .* of 200",
        ),
    ],
)
def test_bad_prompts_are_refused_before_any_decoding(prompts, sampling, message: str) -> None:
    class Untouchable(MarkovModel):
        def forward(self, *args, **kwargs):
            raise AssertionError("decoding began")

    with pytest.raises(ValueError, match=message):
        Engine(Untouchable(TARGET.table, context_length=200)).generate(prompts, sampling)


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("broken", ["target", "draft"])
def test_logits_without_a_distribution_name_request_position_and_step(broken: str, value: float) -> None:
    class Breaks(MarkovModel):
        """Gives up at position 8 of its second sequence."""

        def forward(self, tokens, cache, first_slot=0, last_only=False):
            logits = super().forward(tokens, cache, first_slot, last_only)
            if first_slot == 0 and len(cache.num_cached) > 1 and len(tokens) > 1 and cache.num_cached[1] >= 8:
                logits[1] = value
            return logits

    models = {"target": TARGET, "draft": DRAFT} | {broken: Breaks(TARGET.table)}
    engine = Engine(models["target"], method="draft_model", draft=models["draft"], max_batch_size=2)
    whose = "the target's" if broken == "target" else "the draft model's"
    message = rf"logits of {whose} request 1 at token position \d+ \(decode step \d+\) are NaN, \+inf or all -inf"
    with pytest.raises(NonFiniteLogitsError, match=message):
        engine.generate([[0, 1], [1, 2]], SamplingParams(max_tokens=40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree": [(0,), (1, 0)]}, r"tree path \(1, 0\) must have its parent"),
        ({"tree": "no-such-file.json"}, "tree='no-such-file.json' must be a JSON file of rank paths"),
        (
            {"tree": [(0,), (1,), (2,), (3,)]},
            "a tree with 4 siblings must have at most 3, the draft's vocabulary",
        ),
        ({"num_speculative_tokens": 600}, r"num_nodes=600 must lie in \[1, 512\]"),
        ({"verification": "block"}, "verification='block' must be token or coupled with method=\"tree\""),
        ({"synthetic_acceptance_rates": [0.5]}, 'synthetic_acceptance_rates must be omitted with method="tree"'),
        ({"method": "draft_model", "tree": [(0,)]}, "tree: method='draft_model' does not draft trees"),
    ],
)
def test_trees_that_cannot_be_drafted_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(TARGET, draft=DRAFT, **{"method": "tree"} | options)


def test_a_tree_has_the_requested_size_and_auto_chooses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is usual where nothing was measured, with no more siblings than the draft has tokens."""
    assert len(Engine(TARGET, method="tree", draft=DRAFT, num_speculative_tokens=9).tree) == 9
    free = {width: 1.0 if width <= 6 else 9.0 for width in range(1, 99)}
    monkeypatch.setattr(
        "specdec.assembly.target_costs", lambda target, rows, records, widths: [free[w] for w in widths]
    )
    monkeypatch.setattr("specdec.assembly.draft_cost", lambda *_: 0.0)
    assert len(Engine(TARGET, method="tree", draft=DRAFT, num_speculative_tokens="auto").tree) in (4, 5)


def test_a_recurrent_model_drafts_no_trees() -> None:
    model = CausalLM(
        tiny.make("mamba", {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}, attention="eager")
    )
    with pytest.raises(ValueError, match="a recurrent state cannot be given to several branches of a token tree"):
        Engine(model, method="tree", draft=model)
