"""Suffix decoding: what is copied and how far, and that the distribution is the target's with any history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from helpers.suffixes import spelt_out
from hypothesis import given
from hypothesis import strategies as st

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance, passes, radius
from specdec.conformance.toys import grid_pair, joint_distribution
from specdec.decoding import Decoder
from specdec.kernels import suffix_tree
from specdec.models.markov import MarkovModel
from specdec.proposers.suffix import (
    GREEDY_DOUBT,
    MIN_REACH,
    SAMPLED_DOUBT,
    Copy,
    FastTree,
    History,
    PlainTree,
    SuffixProposer,
    copy_from,
    doubt,
)
from specdec.proposers.suffix_tree import DEPTH, TOKEN_BYTES, SuffixTree
from specdec.requests import Batch, Request
from specdec.sampling.randomness import Role, own_seed, uniforms
from specdec.verification import Rule

TARGET, _ = grid_pair(3)
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not suffix_tree.available(), reason="needs Linux and a C++ compiler")
texts = st.lists(st.integers(0, 2), min_size=1, max_size=20)


def obvious_copy(text: list[int], depth: int, limit: int, doubt: float) -> Copy:
    """By lists of all the places where a run that ends here stood before: where the next token is, for each length."""
    longer, reach = list(text), [1.0]
    sizes = range(1, min(depth, len(text)))
    runs = [[end for end in range(n, len(text)) if text[end - n : end] == text[-n:]] for n in sizes]
    for _ in range(limit):
        behind = [within(text, ends) or [longer[end] for end in ends[:1]] for ends in runs if ends]
        candidates = [likeliest(found) for found in reversed(behind)]
        probs = [smoothed(behind, token, doubt) for token in candidates]
        if not probs or reach[-1] * max(probs) < MIN_REACH:
            break
        token = candidates[probs.index(max(probs))]
        runs = [list(range(len(text))), *runs[: depth - 2]]
        runs = [[end + 1 for end in ends if token in (text[end : end + 1] or longer[end : end + 1])] for ends in runs]
        longer.append(token)
        reach.append(reach[-1] * max(probs))
    return Copy(tuple(longer[len(text) :]), tuple(reach[1:]))


def within(text: list[int], ends: list[int]) -> list[int]:
    """The tokens after it in the text; an occurrence at the end has none, unless it is the only one."""
    return [text[end] for end in ends if end < len(text)]


def likeliest(found: list[int]) -> int:
    """The commonest token, among equals the latest."""
    counts = Counter(found)
    return max(found, key=lambda token: (counts[token], len(found) - found[::-1].index(token)))


def smoothed(behind: list[list[int]], token: int, doubt: float) -> float:
    """From the shortest run to the longest."""
    prob = 0.0
    for found in behind:
        prob = (found.count(token) + doubt * prob) / (len(found) + doubt)
    return prob


@given(texts, st.integers(2, 6), st.integers(1, 6), st.sampled_from([0.5, 1.5, 5.0]))
def test_a_copy_is_the_obvious_one(text: list[int], depth: int, limit: int, doubt: float) -> None:
    tree = SuffixTree(depth)
    for token in text:
        tree.append(token)
    copy, expected = copy_from(tree, tree.ends(), limit, doubt), obvious_copy(text, depth, limit, doubt)
    assert copy.tokens == expected.tokens
    assert copy.reach == pytest.approx(expected.reach)


steps = st.lists(st.sampled_from(["extend", "complete", "forget", "copy", "after"]), max_size=40)


@needs_compiler
@given(steps, st.integers(2, 6), st.integers(1, 8), st.sampled_from([0.5, 2.5, 5.0]), st.data())
def test_the_compiled_tree_has_the_results_of_the_one_in_python(
    steps: list[str], depth: int, limit: int, doubt: float, data: st.DataObject
) -> None:
    """The same copies to the last bit and the same computed memory, whatever is appended and forgotten."""
    trees, num_complete, is_growing = (PlainTree(depth), FastTree(depth)), 0, False
    for step in steps:
        tokens = data.draw(texts) if step in ("extend", "after") else None
        if step == "copy" or (step == "after" and not is_growing):
            plain, compiled = (tree.copied(tokens, limit, doubt) for tree in trees)
            assert compiled == plain
        for tree in trees:
            if step == "extend":
                tree.extend(tokens)
            elif step == "complete" or step == "forget":  # a text is complete before another one is forgotten
                tree.complete()
            if step == "forget" and num_complete:
                tree.forget_oldest()
        is_growing = step == "extend" or (is_growing and step not in ("complete", "forget"))
        num_complete += (step in ("complete", "forget")) - (step == "forget" and num_complete > 0)
        assert trees[1].num_bytes == trees[0].num_bytes


@needs_compiler
def test_the_compiled_tree_has_the_same_results_for_long_texts() -> None:
    """With as many different tokens as words have, so that nodes have many children, and half of it forgotten."""
    weights = 1 / torch.arange(1, 501, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(weights, 6000, replacement=True, generator=generator).tolist()
    plain, compiled = PlainTree(), FastTree(DEPTH)
    found = 0
    for start in range(0, len(tokens), 100):
        for place in range(start, start + 100, 4):
            for tree in (plain, compiled):
                tree.extend(tokens[place : place + 4])
            copy = plain.copied(None, 8, GREEDY_DOUBT)
            assert compiled.copied(None, 8, GREEDY_DOUBT) == copy
            found += len(copy.tokens)
        for tree in (plain, compiled):
            tree.complete()
        for place in range(0, start, 40):
            after = tokens[place : place + 20]
            assert compiled.copied(after, 8, SAMPLED_DOUBT) == plain.copied(after, 8, SAMPLED_DOUBT)
        for tree in (plain, compiled):
            if start >= 1000:
                tree.forget_oldest()
        assert compiled.num_bytes == plain.num_bytes
    assert found > 500


def test_a_copy_is_longer_where_more_is_alike_and_where_less_is_drawn() -> None:
    """One earlier occurrence of n tokens is believed as 1 - (d / (1 + d)) ** n, and so is each later token."""
    lengths = {}
    for sure in (GREEDY_DOUBT, SAMPLED_DOUBT):
        for alike in (1, 2, 3, 4):
            tree = SuffixTree()
            for token in [*range(30), *range(alike)]:
                tree.append(token)
            copy = copy_from(tree, tree.ends(), 20, sure)
            lengths[sure, alike] = len(copy.tokens)
            assert copy.tokens == tuple(range(alike, alike + len(copy.tokens)))
            chances = [1 - (sure / (1 + sure)) ** min(alike + i, 15) for i in range(len(copy.tokens))]
            assert copy.reach == pytest.approx(torch.tensor(chances).cumprod(0).tolist())
    assert list(lengths.values()) == [2, 20, 20, 20, 1, 2, 3, 5]


def test_doubt_follows_temperature() -> None:
    parameters = [{"temperature": 0}, {"temperature": 1, "top_k": 1}, {"temperature": 0.5}, {"temperature": 9}]
    doubts = [doubt(SamplingParams(**each)) for each in parameters]
    assert doubts == [GREEDY_DOUBT, GREEDY_DOUBT, (GREEDY_DOUBT + SAMPLED_DOUBT) / 2, SAMPLED_DOUBT]


# -- outputs of finished requests ----------------------------------------------------------------------------

REPEATS = MarkovModel(torch.eye(5, dtype=torch.float64).roll(1, 1).expand(5, 5, 5))  # after each token the next of five


def engine(model: MarkovModel = REPEATS, **options) -> Engine:
    return Engine(model, method="suffix", **options)


def num_drafted(engine: Engine, prompt: list[int] = (3,), max_tokens: int = 5) -> int:
    completion = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=max_tokens))[0]
    assert list(completion.token_ids) == [(prompt[-1] + 1 + i) % 5 for i in range(max_tokens)]
    return completion.counts.num_drafted


def test_later_requests_copy_earlier_ones_until_forget() -> None:
    """Five tokens that follow each other in no text of its own; the first request finds nothing to copy."""
    remembering = engine()
    assert [num_drafted(remembering) for _ in range(3)] == [0, 3, 3]
    remembering.forget()
    assert num_drafted(remembering) == 0
    assert [num_drafted(engine(max_history_bytes=0)) for _ in range(2)] == [0, 0]
    forgetful = engine(max_history_bytes=0)
    assert [num_drafted(forgetful) for _ in range(3)] == [0, 0, 0]


def test_the_end_of_a_prompt_is_remembered_with_the_output() -> None:
    remembering = engine()
    assert num_drafted(remembering, max_tokens=3) == 0
    assert num_drafted(remembering, max_tokens=3) == 1, "4 came after 3, and 0 after both"


def test_a_request_that_did_not_finish_is_not_remembered() -> None:
    """The caller took the first of two and left."""
    remembering = engine(max_batch_size=2)
    remembering._decoder.proposer.history = History(1 << 20, PlainTree)
    params = [SamplingParams(temperature=0, max_tokens=number) for number in (4, 40)]
    running = remembering._decoder.run([Request(i, (3,), each) for i, each in enumerate(params)])
    assert next(running).request.index == 0
    running.close()
    num_drafted(remembering)
    assert list(remembering._decoder.proposer.history.tree._lengths) == [1 + 4 + 1], "prompt, output, separator"


@pytest.mark.parametrize("max_bytes", [0, 700, 3000, 20_000])
def test_history_is_bounded_and_holds_the_latest_texts(max_bytes: int) -> None:
    """After each of 40 texts it is the history of the last few alone, and of as many as there is room for."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 9, (40, 12), generator=generator).tolist()
    history, room = History(max_bytes, PlainTree), max_bytes // TOKEN_BYTES - 1
    for number, text in enumerate(texts, 1):
        history.add(text)
        kept = texts[number - len(history.tree._lengths) : number]
        fresh, larger = History(1 << 30, PlainTree), History(1 << 30, PlainTree)
        for each in kept:
            fresh.add(each[-room:])
        for each in texts[max(0, number - len(kept) - 1) : number]:
            larger.add(each[-room:])
        assert spelt_out(history.tree) == spelt_out(fresh.tree)
        assert fresh.tree.num_bytes <= max_bytes
        assert len(kept) == number or larger.tree.num_bytes > max_bytes
    assert (len(kept) > 3) == (max_bytes == 20_000)


def test_of_a_text_that_is_too_long_the_end_is_kept() -> None:
    history = History(20 * TOKEN_BYTES, PlainTree)
    history.add(list(range(100)))
    assert len(history.tree.find([98])) == 2
    assert len(history.tree.find([50])) == 1


def test_greedy_output_is_plain_decoding_in_any_batch_and_after_any_history() -> None:
    prompts, params = [[0, 1, 2, 0, 1], [2], [1, 1], [0, 2, 1]], SamplingParams(temperature=0, max_tokens=30)
    plain = [completion.token_ids for completion in Engine(TARGET).generate(prompts, params)]
    for max_batch_size in (1, 3):
        for gamma in (1, 4, "auto"):
            remembering = engine(TARGET, num_speculative_tokens=gamma, max_batch_size=max_batch_size)
            for _ in range(2):
                assert [each.token_ids for each in remembering.generate(prompts, params)] == plain


# -- the distribution -------------------------------------------------------------------------------------------------

HISTORIES = {"nothing": [], "texts": [[0, 1, 2, 2, 1, 0], [1, 2, 0, 0, 1]], "one token": [[2] * 9]}


class Peeking(SuffixProposer):
    """Copies only if the uniform that the copy will be verified with is small."""

    source = uniforms

    def propose(self, batch: Batch, limits: Sequence[int]):
        origins = torch.tensor(batch.num_tokens())
        places = (batch.sampling.seeds, origins, torch.full_like(origins, Role.ACCEPT), origins)
        draws = self.source(*(each.unsqueeze(1) for each in places)).flatten().tolist()
        return super().propose(batch, [limit if u < 0.5 else 0 for limit, u in zip(limits, draws, strict=True)])


@pytest.mark.parametrize("history", HISTORIES)
def test_joint_distribution_with_any_history(history: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, for copies of one and two tokens, while requests of the same batch finish and are remembered."""
    monkeypatch.setattr("specdec.proposers.suffix.SAMPLED_DOUBT", 0.5)  # to copy more of these short texts
    distribution, lengths = joint_distribution_after(history, SuffixProposer)
    assert distance(distribution, joint_distribution(TARGET, (0, 1, 2, 0), 4)) < 1e-12
    assert lengths >= {1, 2}


def test_a_history_that_peeks_at_the_outcome_is_detected() -> None:
    distribution, _ = joint_distribution_after("texts", Peeking, 3)
    assert distance(distribution, joint_distribution(TARGET, (0, 1, 2, 0), 3)) > 0.01


def joint_distribution_after(history: str, proposer: type, num_tokens: int = 4) -> tuple[dict, set[int]]:
    lengths = set()

    def make(source, rule, max_batch_size):
        @Rule
        def recording(distribution, draft, *draws):
            lengths.update(draft.num_proposed.tolist())
            return rule(distribution, draft, *draws)

        suffix = proposer(3, CPU, 1 << 20)
        suffix.source = source
        for text in HISTORIES[history]:
            suffix.history.add(text)
        return Decoder(TARGET, suffix, 2, max_batch_size=max_batch_size, rule=recording, uniforms=source)

    return exact_distribution(make, (0, 1, 2, 0), num_tokens, (1, 4, 12)), lengths


# -- a seed that is used again -------------------------------------------------------------------------------

COINS = MarkovModel(torch.full((2, 2, 2), 0.5, dtype=torch.float64))
NUM_SEEDS, PROMPT = 700, [0, 1, 0, 0, 1, 1]


def said_again() -> list[tuple[int, ...]]:
    """The output of each seed's second request, after the same prompt as its first, for many seeds."""
    outputs = []
    for seed in range(NUM_SEEDS):
        remembering = engine(COINS, num_speculative_tokens=3)
        for _ in range(2):
            completion = remembering.generate([PROMPT], SamplingParams(max_tokens=4, seed=seed))[0]
        outputs.append(completion.token_ids[1:])
    return outputs


def test_copying_an_output_of_the_same_seed_keeps_the_distribution() -> None:
    """Fails falsely with probability at most 1e-6 for any seeds; repeated uniforms are distinguished from that."""
    distribution = dict.fromkeys(product(range(2), repeat=3), 1 / 8)
    assert passes(said_again(), distribution, 8)


def test_repeated_uniforms_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that was accepted by some uniforms is accepted by them again, and what they rejected is rejected again.

    So the second output leans towards what the first one drafted.
    """
    monkeypatch.setattr("specdec.engine.own_seed", lambda seed, number: seed)
    distribution, said = dict.fromkeys(product(range(2), repeat=3), 1 / 8), said_again()
    counts = Counter(said)
    found = distance({tokens: count / NUM_SEEDS for tokens, count in counts.items()}, distribution)
    assert found > 2 * radius(NUM_SEEDS, 8), "so its true distance is beyond the radius, but for one run in a million"
    assert not passes(said, distribution, 8)


def test_coupled_and_plain_seeds_are_unchanged() -> None:
    """Where no output depends on others a seed gives one sample, and the first request of an engine keeps its seed."""
    params = SamplingParams(max_tokens=20, seed=5)
    plain = Engine(TARGET, verification="coupled").generate([[0, 1, 2]], params)[0].token_ids
    coupled = engine(TARGET, verification="coupled")
    assert [coupled.generate([[0, 1, 2]], params)[0].token_ids for _ in range(3)] == [plain] * 3
    alone = engine(TARGET, max_history_bytes=0)
    first, again = (alone.generate([[0, 1, 2]], params)[0].token_ids for _ in range(2))
    assert first == again == engine(TARGET).generate([[0, 1, 2]], params)[0].token_ids


def test_own_seeds_are_apart() -> None:
    seeds = [own_seed(seed, number) for seed in (0, 1, 2**64 - 1) for number in (0, 1, 2, 2**40)]
    assert len(set(seeds)) == 12
    assert seeds[::4] == [0, 1, 2**64 - 1]
    assert all(0 <= seed < 2**64 for seed in seeds)
