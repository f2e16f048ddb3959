"""What is trained is what runs: the distributions seen in training are those of the draft at work."""

import pytest
import torch
from helpers import tiny

from specdec.distill.dataset import TextBatch
from specdec.distill.loss import HARD, distillation_loss
from specdec.distill.students import scale, unroll, unscale
from specdec.heads.eagle import new_head


@pytest.fixture
def target():
    return tiny.make("llama", tiny.GQA)


@pytest.fixture
def head(target):
    head = new_head(target, torch.arange(0, 61, 2))
    torch.manual_seed(1)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return head.eval()


def batch_of(target, tokens: list[int]) -> TextBatch:
    ids = torch.tensor([tokens])
    with torch.no_grad():
        features = target.base_model(input_ids=ids).last_hidden_state
    return TextBatch(ids, features, torch.tensor([len(tokens)]), torch.tensor([1]))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_unrolled_training_sees_the_features_that_drafting_will(target, head, depth):
    tokens = [5, 9, 8, 7, 5, 9, 8, 30, 2, 17]
    batch = batch_of(target, tokens)
    with torch.no_grad():
        guesses = unroll(head, batch, depth)
        for last in range(1, len(tokens) - depth + 1):  # the token that was committed last
            cache = head.allocate(1, 32)
            guessed = head(batch.features[:, :last], batch.tokens[:, 1 : last + 1], cache)[:, -1:]
            cache.num_cached[0] = last
            for place in range(depth):
                torch.testing.assert_close(guesses[place][:, last + place], guessed[:, 0], rtol=1e-4, atol=1e-4)
                if place < depth - 1:
                    guessed = head(guessed, batch.tokens[:, last + place + 1 : last + place + 2], cache)
                    cache.num_cached[0] += 1


def test_the_loss_and_its_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 700, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    features, target_weight = torch.randn(700, 24), torch.randn(30, 24)
    loss = distillation_loss(hidden, weight, features, target_weight, (1.0, 0.5))
    loss.backward()
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    goal = (features @ target_weight.T).softmax(-1)
    goal = goal + HARD * torch.nn.functional.one_hot(goal.argmax(-1), 30)
    first, second = -(goal * (hidden @ weight.T).log_softmax(-1)).sum(-1).mean(-1)
    expected = first + 0.5 * second
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    for actual, exact in zip(got, (hidden.grad, weight.grad), strict=True):  # bfloat16 products
        assert (actual - exact).norm() <= 0.04 * exact.norm()


def test_a_scaled_weight_is_a_product_until_it_is_unscaled():
    layer = torch.nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    scale(layer, torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.5, 4.0]))
    expected = before * torch.tensor([[2.0], [3.0]]) * torch.tensor([1.0, 0.5, 4.0])
    torch.testing.assert_close(layer.weight, expected)
    unscale(torch.nn.Sequential(layer))
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
