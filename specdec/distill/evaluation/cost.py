"""Cost of a draft step relative to a target step, measured on this machine at batch size 1 as in decoding."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from specdec.models.causal import CausalLM
from specdec.models.fusion import fuse
from specdec.models.loading import load_pretrained
from specdec.runtime.timing import durations_s

CONTEXT = 256  # cached tokens
TOKENS = 4  # draft tokens of a pass
REPETITIONS = 15


def head_cost_ratio(source: str, make: Callable[[Any], Any], device: str) -> float:
    """Time of a head's pass over that of a step of its target, a source for `load_pretrained`.

    make: of the target's transformers model, the head, not fused. A head that drafts in one pass does so for TOKENS.
    """
    model, _ = load_pretrained(source, dtype=torch.bfloat16, device=device)
    head = make(model).placed(model.device, model.dtype).eval().requires_grad_(False)
    head.fuse()
    cache = head.allocate(1, CONTEXT + 2 * TOKENS)
    features = torch.zeros(
        1, CONTEXT, len(head.feature_layers) * model.config.hidden_size, dtype=model.dtype, device=model.device
    )
    tokens = torch.zeros(1, CONTEXT, dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        if head.drafting == "block":
            head.extend(features, tokens, cache)
        else:
            head(head.encode(features), tokens, cache)
    cache.num_cached[0] = CONTEXT
    return _seconds(lambda: _pass(head, features, tokens, cache), model.device) / _model_seconds(model)


def _pass(head: Any, features: Tensor, tokens: Tensor, cache: Any) -> Tensor:
    """A draft token of a sequential head, or TOKENS of others."""
    if head.drafting == "block":
        block: Tensor = head.block(tokens[:, 0], min(TOKENS, head.max_tokens), cache).logits
        return block
    states, width = head.encode(features[:, :1]), 1
    if head.drafting == "parallel":
        width = TOKENS
        states = torch.cat([states, head.mask_state().expand(1, TOKENS - 1, -1)], 1)
    logits: Tensor = head.logits(head(states, tokens[:, :width], cache))
    return logits


def draft_cost_ratio(source: str, config: Any, device: str) -> float:
    """Step time of a Llama model with this configuration over that of the target."""
    model, _ = load_pretrained(source, dtype=torch.bfloat16, device=device)
    draft = LlamaForCausalLM(config).to(model.device, model.dtype).eval().requires_grad_(False)
    return _model_seconds(draft) / _model_seconds(model)


def _model_seconds(model: Any) -> float:
    fuse(model)
    lm = CausalLM(model)
    cache = lm.allocate(1, CONTEXT + 1)
    tokens = torch.zeros(1, CONTEXT, dtype=torch.int64, device=lm.device)
    lm.forward(tokens, cache)
    cache.num_cached[0] = CONTEXT
    return _seconds(lambda: lm.forward(tokens[:, :1], cache), lm.device)


@torch.inference_mode()
def _seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Median over repetitions after warm-up."""
    return median(durations_s(step, device, repeats=REPETITIONS, warm_up=3))
