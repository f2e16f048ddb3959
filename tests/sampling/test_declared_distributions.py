"""The verification rule receives the models' own softmax, to 1e-12, for the target and for every proposer.

Enumeration takes uniforms from the middle of intervals, so it misses an error of 1e-3 in a declared probability, such
as a row rounded to bfloat16. Here each row that the rule receives is compared with the model's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from helpers.toys import ExitTarget, distribution_after, obvious_distribution

from specdec import Engine, SamplingParams
from specdec.conformance.toys import FeatureTarget, ToyHead, next_distribution
from specdec.models.markov import MarkovCache, MarkovModel
from specdec.proposers.table import NgramTable
from specdec.sampling.distributions import Distribution
from specdec.trees.shape import Tree
from specdec.verification import Draft, Rule, Verification

VOCAB, TOLERANCE, MASK = 7, 1e-12, 6
PROMPT = (0, 1, 2, 3, 0, 1, 2)


def irregular(seed: int) -> torch.Tensor:
    """Random distributions without round numbers, float64 [vocab, vocab, vocab]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCAB, VOCAB, VOCAB, generator=generator, dtype=torch.float64).softmax(-1)


TARGET, DRAFT = FeatureTarget(irregular(0)), MarkovModel(irregular(1))
MASKED = MarkovModel(DRAFT.table)  # the same model, asked for several tokens at once
MASKED.mask_token = MASK


class StatelessToy(ToyHead):
    """Its state is the code of the last two tokens, as a feature is."""

    format, drafting = "hydra", "stateless"

    def start(self, features: torch.Tensor) -> torch.Tensor:
        return features

    def advance(self, place: int, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return states % self.vocab_size * self.vocab_size + tokens.unsqueeze(-1)

    def logits(self, place: int, states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().logits(states)


class ParallelToy(ToyHead):
    """After its first token it knows only that two masks came before."""

    format, drafting, mask_token = "p_eagle", "parallel", MASK

    def mask_state(self) -> torch.Tensor:
        return torch.tensor([float(MASK)])


class BlockToy(ToyHead):
    """Likewise, with a cache of features by position."""

    format, drafting, max_tokens = "dflash", "block", 3

    def extend(self, features: torch.Tensor, tokens: torch.Tensor, cache: MarkovCache, first_slot: int = 0) -> None:
        for slot, codes in enumerate(features[..., 0].long(), first_slot):
            start = cache.num_cached[slot]
            cache.tokens[slot, start : start + len(codes)] = codes

    def block(self, newest: torch.Tensor, num_tokens: int, cache: MarkovCache) -> torch.Tensor:
        return torch.stack([cache.tokens[slot, cache.num_cached[slot] - 1] for slot in range(len(newest))])

    def logits(self, block: torch.Tensor, newest: torch.Tensor, drafted: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        masked = torch.full_like(newest, MASK * self.vocab_size + MASK)
        codes = masked if drafted.shape[1] else block % self.vocab_size * self.vocab_size + newest
        return super().logits(codes.view(-1, 1, 1))

    def confidence(self, *arguments: torch.Tensor) -> None:
        return None


TREE = Tree(((0,), (1,), (0, 0), (0, 1), (1, 0)))
METHODS: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "ngram": {},
    "ngram_store": {},
    "ngram_table": {"draft": NgramTable.count([[0, 1, 2, 3, 4, 5, 6, 0, 2, 4]], VOCAB)},
    "suffix": {"max_history_bytes": 1 << 16},
    "draft_model": {"draft": DRAFT},
    "eagle": {"draft": ToyHead(DRAFT)},
    "hydra": {"draft": StatelessToy(DRAFT)},
    "pard": {"draft": MASKED},
    "p_eagle": {"draft": ParallelToy(DRAFT)},
    "dflash": {"draft": BlockToy(DRAFT)},
    "hybrid": {"draft": DRAFT},
    "early_exit": {"exit_layer": 1},
    "tree": {"draft": DRAFT, "tree": TREE},
}
DRAWN = ("draft_model", "eagle", "hydra", "pard", "p_eagle", "dflash", "early_exit", "tree")
PARAMS = {
    "plain": SamplingParams(max_tokens=24),
    "temperature": SamplingParams(max_tokens=24, temperature=0.5),
    "truncated": SamplingParams(max_tokens=24, top_k=4),
    "shifted": SamplingParams(max_tokens=24, presence_penalty=0.25, logit_bias={2: 0.5}),
}
Seen = tuple[Distribution, Draft, Verification]


def recorded(engine: Engine, params: SamplingParams) -> tuple[list[Seen], tuple[int, ...]]:
    """Every call of the rule while one request is decoded, and the output."""
    seen: list[Seen] = []
    rule = engine._decoder.rule

    @partial(Rule, needs_noise=rule.needs_noise)
    def recording(target: Distribution, draft: Draft, *draws: torch.Tensor) -> Verification:
        outcome = rule(target, draft, *draws)
        seen.append((target, draft, outcome))
        return outcome

    engine._decoder.rule = recording
    (completion,) = engine.generate([PROMPT], params)
    return seen, completion.token_ids


def paths_to_target_rows(draft: Draft) -> list[list[int]]:
    """Indices of the draft tokens before each target row: none for the first, then those on the path to each node."""
    num_tokens = int(draft.num_proposed[0])
    if draft.tree is None:
        return [list(range(i)) for i in range(num_tokens + 1)]
    return [draft.tree.lineage(node) for node in range(-1, num_tokens)]


def seen_by_draft(method: str, context: list[int], num_drafted: int) -> list[int]:
    """What the draft's distribution depends on: some methods see masks instead of the draft's own tokens."""
    if method not in ("pard", "p_eagle", "dflash") or num_drafted == 0:
        return context
    return context[:-num_drafted] + [MASK] * (num_drafted + (method != "pard"))


def differences(
    seen: Sequence[Seen], output: Sequence[int], params: SamplingParams, kind: str, method: str = ""
) -> list[float]:
    """For each row that the rule received, the largest deviation of a probability from the table's.

    kind: the draft's: "copied" (one-hot), "drawn" from the draft model, or "either".
    """
    found, num_emitted = [], 0
    for target, draft, outcome in seen:
        before, tokens = list(output[:num_emitted]), draft.tokens[0].tolist()
        for row, path in enumerate(paths_to_target_rows(draft)):
            context = before + [tokens[i] for i in path]
            found.append(deviation(target.dense()[0, row], distribution_after(TARGET, params, PROMPT, context)))
        for row, path in enumerate(paths_to_draft_rows(draft)):
            context = before + [tokens[i] for i in path]
            probs = draft.distribution.dense()[0, row]
            copied = deviation(probs, torch.zeros(VOCAB).scatter(0, draft.tokens[0, row : row + 1], 1.0).tolist())
            logits = next_distribution(DRAFT, [*PROMPT, *seen_by_draft(method, context, len(path))]).log().tolist()
            drawn = deviation(probs, obvious_distribution(logits, params, list(PROMPT), context))
            found.append({"copied": copied, "drawn": drawn, "either": min(copied, drawn)}[kind])
        num_emitted += int(outcome.accepted[0]) + 1
    return found


def paths_to_draft_rows(draft: Draft) -> list[list[int]]:
    """Indices of the draft tokens before each draft row, one row per family for a tree."""
    paths = paths_to_target_rows(draft)
    if draft.tree is None:
        return paths[:-1]
    families = sorted(set(draft.tree.parents[: int(draft.num_proposed[0])]))
    return [paths[node + 1] for node in families]


def deviation(probs: torch.Tensor, expected: Sequence[float]) -> float:
    return float((probs.double() - torch.tensor(expected, dtype=torch.float64)).abs().max())


def engine_for(method: str) -> Engine:
    target = ExitTarget(TARGET.table, DRAFT.table) if method == "early_exit" else TARGET
    return Engine(target, method=method, num_speculative_tokens=3, **METHODS[method])  # type: ignore[arg-type]


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("method", METHODS)
def test_the_rule_receives_the_models_own_distributions(method: str, params: SamplingParams) -> None:
    """A copied token's is one-hot; a sampled token's is the draft model's, given the tokens before it."""
    seen, output = recorded(engine_for(method), params)
    kinds = dict.fromkeys(DRAWN, "drawn") | {"hybrid": "either"}
    found = differences(seen, output, params, kinds.get(method, "copied"), method)
    assert len(found) >= len(output)
    assert max(found) < TOLERANCE
    assert method == "autoregressive" or any(draft.tokens.shape[1] for _, draft, _ in seen), "nothing was drafted"


@pytest.mark.parametrize("whose", ["target", "draft"])
def test_a_row_rounded_to_bfloat16_is_detected(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: one side's logits are rounded before the softmax."""
    model = TARGET if whose == "target" else DRAFT
    forward = model.forward_at

    def rounded(*arguments: Any, **options: Any) -> torch.Tensor:
        return forward(*arguments, **options).bfloat16().double()

    monkeypatch.setattr(model, "forward_at", partial(rounded))
    seen, output = recorded(engine_for("draft_model"), PARAMS["plain"])
    assert max(differences(seen, output, PARAMS["plain"], "drawn")) > 1e-5
