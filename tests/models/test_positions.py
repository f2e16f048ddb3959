"""Models that derive positions from a mask or from the length of their cache, for rows of unequal lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import architectures
from helpers.tiny import GREEDY, PROMPTS, reference

from specdec import Engine
from specdec.models.causal import CausalLM, UnsupportedModelError
from specdec.models.positions import alibi, embeddings

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "BLOOM": ("bloom", {}),
    "BLOOM, three heads": ("bloom", {"n_head": 3, "hidden_size": 24}),  # slopes of another rule
    "Falcon": ("falcon", {"alibi": True}),
    "MPT": ("mpt", {}),
    "RoBERTa": ("roberta", {"pad_token_id": 1}),
    "RoFormer": ("roformer", {}),
    "TrOCR": ("trocr", {}),
    "TrOCR, sinusoids": ("trocr", {"use_learned_position_embeddings": False}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str) -> Any:
    name, options = KINDS[kind]
    return architectures.make(architectures.config(name, **options))


@each_kind
@pytest.mark.parametrize("records", [False, True])
def test_output_equals_that_without_a_cache(kind: str, records: bool) -> None:
    """With chains and trees, in three slots that are used again, also as a GPU would record the steps."""
    model = make(kind)
    expected = [reference(model, prompt) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) > 1
    target, draft = CausalLM(model), CausalLM(architectures.draft_of(model))
    for options in ({"method": "ngram"}, {"method": "tree", "draft": draft, "tree": architectures.TREE}):
        engine = Engine(target, max_batch_size=3, records=records, **options)
        assert [list(each.token_ids) for each in engine.generate(PROMPTS, GREEDY)] == expected, options["method"]


@each_kind
def test_the_model_is_left_as_it_was(kind: str) -> None:
    model, tokens = make(kind), torch.tensor([[5, 9, 8, 7]])
    with torch.inference_mode():
        before = model(input_ids=tokens).logits
        Engine(CausalLM(model), method="ngram").generate(PROMPTS, GREEDY)
        assert torch.equal(model(input_ids=tokens).logits, before)


@pytest.mark.parametrize("kind", ["BLOOM", "Falcon", "MPT"])
def test_biases_of_columns_instead_of_positions_are_refused_for_trees(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Siblings have the same position but stand in different columns."""
    target = CausalLM(make(kind))

    class ByColumn(alibi.RaggedCache):
        def seen_positions(self) -> torch.Tensor:
            return torch.arange(self.window.extent).view(1, 1, -1)

    monkeypatch.setattr("specdec.models.causal.RaggedCache", ByColumn)
    with pytest.raises(UnsupportedModelError, match="for a token tree differ"):
        Engine(target, method="tree", draft=target, tree=architectures.TREE)


@pytest.mark.parametrize("kind", ["RoFormer", "TrOCR"])
def test_embeddings_of_a_neighboring_position_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        embeddings, "embedding", lambda ids, table: torch.nn.functional.embedding((ids + 1) % len(table), table)
    )
    with pytest.raises(UnsupportedModelError, match="differ between calls with and without per-row positions"):
        CausalLM(make(kind))


def test_position_ids_before_the_first_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoBERTa's begin after that of the padding token, which shortens the context."""
    assert CausalLM(make("RoBERTa")).context_length == architectures.CONTEXT - 2
    monkeypatch.setattr("specdec.models.positions.rows._padding", lambda model: None)
    with pytest.raises(UnsupportedModelError, match="the logits of RobertaForCausalLM differ"):
        CausalLM(make("RoBERTa"))
