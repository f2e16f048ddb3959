"""A draft for each method: tiny random heads of every format, and the toys' parallel draft model."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from helpers import checkpoints
from specdec import METHODS
from specdec.drafts import is_head
from specdec.heads import formats
from specdec.models.causal import CausalLM
from specdec.models.markov import MarkovModel

HEAD_METHODS = [name for name, spec in METHODS.items() if spec.draft_kinds and all(map(is_head, spec.draft_kinds))]


@cache
def target() -> CausalLM:
    """The model that the heads here draft for; no token ends its texts."""
    model = checkpoints.target()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return CausalLM(model)


@cache
def head(method: str) -> Any:
    """A random head of a method's own format for `target`."""
    checkpoint = next(each for name, each in checkpoints.everything() if name.split()[0] == method)
    with tempfile.TemporaryDirectory() as folder:
        found = formats.recognized(checkpoint.write(Path(folder)))
        assert found, f"no format recognizes its checkpoint for {method}"
        return found.load(target().model)


def parallel(model: MarkovModel, mask_token: int = 0) -> MarkovModel:
    """The model as one that fills in mask tokens."""
    draft = MarkovModel(model.table)
    draft.mask_token = mask_token
    return draft
