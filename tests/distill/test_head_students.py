"""Heads of the published formats in training: their predictions are those of the same head at work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import checkpoints
from torch import Tensor

from specdec.distill import untrained
from specdec.distill.dataset import TextBatch
from specdec.distill.students import BlockStudent, HeadStudent, ParallelStudent, unscale
from specdec.distill.students.base import Anchors
from specdec.heads.convention import _DRAFTERS

LAYERS, MASK, DEPTH = (2, 4, 5), checkpoints.MASK, 4
FREQUENT = torch.arange(0, 30, 2)
TOKENS = [[5, 9, 8, 7, 5, 9, 8, 30, 2, 17, 44, 3], [11, 4, 60, 4, 11, 90, 2, 2]]
NAMES = ("eagle3", "eagle3 of 2 layers", "p_eagle", "mtp", "dflash")


@pytest.fixture(scope="module")
def target() -> Any:
    return checkpoints.target()


def new_student(name: str, target: Any) -> Any:
    """A student with random weights, larger than initial ones, so that outputs depend on all of them."""
    torch.manual_seed(1)
    vocabulary = torch.arange(0, checkpoints.VOCAB, 3)
    made = {
        "eagle3": lambda: untrained.new_eagle3(target, LAYERS, vocabulary),
        "eagle3 of 2 layers": lambda: untrained.new_eagle3(target, LAYERS, vocabulary, 2),
        "p_eagle": lambda: untrained.new_p_eagle(target, LAYERS, vocabulary, MASK),
        "mtp": lambda: untrained.new_mtp(target),
        "dflash": lambda: untrained.new_dflash(target, LAYERS, MASK, block_size=DEPTH + 1),
    }[name]()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    sizes = torch.rand(checkpoints.WIDTH * (1 if name == "mtp" else len(LAYERS))) + 0.5
    if name == "dflash":
        return BlockStudent(made, target, FREQUENT, sizes)
    if name == "p_eagle":
        return ParallelStudent(made, target, FREQUENT, sizes, DEPTH)
    return HeadStudent(made, target, FREQUENT, sizes, (1.0, 0.8, 0.6, 0.5))


def batch_of(target: Any, name: str) -> TextBatch:
    """Texts of different lengths, right-padded, as `Dataset` gives them."""
    lengths = torch.tensor([len(text) for text in TOKENS])
    ids = torch.tensor([text + [0] * (int(lengths.max()) - len(text)) for text in TOKENS])
    with torch.no_grad():
        output = target(input_ids=ids, output_hidden_states=True)
    states = None if name == "mtp" else torch.cat([output.hidden_states[layer] for layer in LAYERS], -1)
    uniforms = torch.rand(len(ids), 6, generator=torch.Generator().manual_seed(0))
    return TextBatch(ids, output.hidden_states[-1], lengths, torch.tensor([2, 1]), states, uniforms)


def drafted(head: Any, features: Tensor, tokens: Tensor, places: list[int]) -> list[Tensor]:
    """Logits [places, draft vocab] of each draft position, by the head's own cache, as in decoding."""
    if head.drafting != "parallel":
        return list(_DRAFTERS[head.drafting](head, features, tokens, places, DEPTH))
    rows = []
    for place in places:
        masks = head.mask_state().expand(1, DEPTH - 1, -1)
        states = torch.cat([head.encode(features[None, :place]), masks], 1)
        read = torch.cat([tokens[None, 1 : place + 1], torch.full((1, DEPTH - 1), head.mask_token)], 1)
        rows.append(head.logits(head(states, read, head.allocate(1, 64)))[0, -DEPTH:])
    return list(torch.stack(rows, 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_draft_in_training_is_the_draft_at_work(name: str, target: Any) -> None:
    student, batch = new_student(name, target), batch_of(target, name)
    with torch.no_grad():
        trained = student.logits(batch, DEPTH)
        unscale(student.module)
        head = student.module
        for row, length in enumerate(batch.lengths.tolist()):
            places = list(range(1, length - DEPTH))
            tokens, features = batch.tokens[row, :length], batch.inputs[row, :length]
            for depth, expected in enumerate(drafted(head, features, tokens, places)):
                actual = trained[depth][row, [place + depth for place in places]][:, head.draft_vocabulary]
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_trained(name: str, target: Any) -> None:
    student = new_student(name, target)
    loss = student.loss(batch_of(target, name), torch.Generator().manual_seed(0))
    loss.mean.backward()
    assert loss.num_terms >= 10
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in student.module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(name: str, target: Any) -> None:
    """Weighted by their numbers of terms: so processes that share a batch train as one would."""
    student, batch = new_student(name, target), batch_of(target, name)
    whole, *parts = (
        student.loss(each, torch.Generator().manual_seed(0)) for each in (batch, batch.part(0, 2), batch.part(1, 2))
    )
    assert whole.num_terms == sum(part.num_terms for part in parts)
    mean = sum(part.mean * part.num_terms for part in parts) / whole.num_terms
    torch.testing.assert_close(whole.mean, mean, rtol=1e-2, atol=0)  # products in bfloat16


def test_an_output_head_of_its_own_is_trained(target: Any) -> None:
    student = new_student("eagle3", target)
    untrained.train_output(student.module)
    student.loss(batch_of(target, "eagle3"), torch.Generator().manual_seed(0)).mean.backward()
    assert student.module.output.grad.abs().sum() > 0
    assert "output" in student.module.state_dict()


def test_anchors_have_a_token_before_and_one_after_them(target: Any) -> None:
    batch = batch_of(target, "dflash")
    extremes = torch.tensor([[0.0, 1 - 2**-24]] * 2)
    anchors = Anchors.drawn(TextBatch(batch.tokens, batch.features, batch.lengths, batch.starts, None, extremes), 3)
    assert anchors.places.tolist() == [[1, 10], [1, 6]]
    assert anchors.has_next.tolist() == [[[True] * 3, [True, False, False]]] * 2
    torch.testing.assert_close(anchors.goals(batch)[0, 0], batch.features[0, 1:4])
