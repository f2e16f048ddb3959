"""Cost of a draft step relative to a target step, measured on this machine at batch size 1 as in decoding."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import LlamaForCausalLM

from specdec.heads.eagle import new_head
from specdec.models.causal import CausalLM
from specdec.models.fusion import fuse
from specdec.models.loading import load_pretrained
from specdec.runtime.timing import durations_s

CONTEXT = 256  # cached tokens
REPETITIONS = 15


def head_cost_ratio(source: str, vocabulary_size: int, device: str) -> float:
    """Step time of a head with this draft vocabulary over that of its target, a source for `load_pretrained`."""
    model, _ = load_pretrained(source, dtype=torch.bfloat16, device=device)
    head = new_head(model, torch.arange(vocabulary_size, device=model.device))
    head.placed(model.device, model.dtype).eval().requires_grad_(False).fuse()
    cache = head.allocate(1, CONTEXT + 1)
    features = torch.zeros(1, CONTEXT, model.config.hidden_size, dtype=model.dtype, device=model.device)
    tokens = torch.zeros(1, CONTEXT, dtype=torch.int64, device=model.device)
    head(features, tokens, cache)
    cache.num_cached[0] = CONTEXT
    step_s = _seconds(lambda: head.logits(head(features[:, :1], tokens[:, :1], cache)), model.device)
    return step_s / _model_seconds(model)


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
