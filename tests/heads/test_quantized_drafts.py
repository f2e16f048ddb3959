"""Drafts with weights in fewer bits than their target's: what they compute, and that the output stays the target's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from specdec import Engine
from specdec.drafts import load_with_drafts
from specdec.heads.eagle import new_head
from specdec.heads.medusa import MedusaHead, ResidualBlock
from specdec.kernels import cpp
from specdec.kernels.quantized import dequantize
from specdec.models.causal import CausalLM
from specdec.models.fusion import Projection, fuse
from specdec.models.quantization.quantizers import OF_HEAD, QUANTIZERS, quantize
from tests.helpers import tiny
from tests.helpers.tiny import GREEDY, PROMPTS

WIDE = tiny.GQA | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
OPTIONS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "attention": "auto", "load_format": "auto"}
pytestmark = pytest.mark.skipif(not cpp.available(torch.float32), reason="kernels need Linux, a C++ compiler, AVX-512")


def eagle_head(model: Any) -> Any:
    torch.manual_seed(0)
    head = new_head(model, torch.arange(0, 61, 2))
    for weight in head.parameters():
        nn.init.normal_(weight, std=0.2)
    return head.requires_grad_(False)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantized_head_is_the_head_of_its_dequantized_weights(name: str) -> None:
    model = tiny.make("llama", WIDE)
    head, dense = eagle_head(model), eagle_head(model)
    for module in dense.layers.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(dequantize(quantize(module.weight, name)), requires_grad=False)
    dense.output = dequantize(quantize(dense.output, OF_HEAD.get(name, name)))
    head.quantize(name)
    step_bytes = eagle_head(model).step_bytes
    states, tokens = torch.randn(1, 6, 64), torch.tensor([[5, 9, 8, 7, 3, 1]])
    outputs = []
    for each in (head, dense):
        each.fuse()
        outputs.append(each.logits(each(states, tokens, each.allocate(1, 6))).log_softmax(-1))
        assert isinstance(each.output_head, Projection)  # which computes the logits
    torch.testing.assert_close(*outputs, rtol=2e-3, atol=1e-2)
    assert head.step_bytes < 0.6 * step_bytes


def test_stateless_heads_are_quantized_layer_by_layer() -> None:
    model, states = tiny.make("llama", WIDE), torch.randn(1, 4, 64)

    def make() -> MedusaHead:
        torch.manual_seed(0)
        return MedusaHead(model, [[ResidualBlock(64, 64)]], [nn.Linear(64, 61, bias=False)]).requires_grad_(False)

    head, dense = make(), make()
    for module in dense.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(dequantize(quantize(module.weight, "int4")), requires_grad=False)
    head.quantize("int4")
    head.fuse()
    torch.testing.assert_close(head.logits(0, states), dense.logits(0, states), rtol=2e-3, atol=1e-3)


def folder_of(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("given", "bits"), [(None, 8.5), ("none", 32), ("int4", 5)])
def test_a_draft_model_has_its_own_quantization(given: str | None, bits: float, tmp_path: Path) -> None:
    """By default the target's."""
    target, draft = (folder_of(tiny.make("llama", WIDE), tmp_path / name) for name in ("target", "draft"))
    options = OPTIONS | {"quantization": "int8", "draft_quantization": given}
    model, drafts = load_with_drafts(target, [draft], **options)
    sizes = [8 * each.model.base_model.layers[0].down.weight.nbytes / (64 * 96) for each in (model, drafts[draft])]
    assert sizes == [8.5, bits]


def test_speculation_with_a_draft_of_other_types_is_bit_identical_to_plain_decoding() -> None:
    model = tiny.make("llama", WIDE, torch.float32)
    head = eagle_head(model)
    head.quantize("int4")
    head.fuse()
    fuse(model)
    longer = replace(GREEDY, max_tokens=30)
    plain = Engine(CausalLM(model)).generate(PROMPTS, longer)
    drafted = Engine(CausalLM(model), draft=head, method="eagle", num_speculative_tokens=3).generate(PROMPTS, longer)
    assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
    assert sum(each.counts.num_drafted for each in drafted) > 5
