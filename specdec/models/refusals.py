"""The error for a model of transformers that cannot be decoded here, naming the layer that failed."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


class UnsupportedModelError(ValueError):
    """A model whose cache cannot be rolled back by length, or that does not support per-row positions."""


def cannot_decode(model: Any, error: Exception) -> str:
    """The error message for a decoder-only model whose forward call raised `error`."""
    name = type(model).__name__
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return (
            f"{name} keeps no keys and values between calls (its forward takes no past_key_values), so each step would "
            "compute the whole text again; its layers would have to write to a cache; use a decoder-only model that "
            "does, such as Llama"
        )
    return (
        f"{name} does not support the per-row position ids, 4-D mask and cache of ragged batches "
        f"({_what_failed(error)}); use a decoder-only model that does, such as Llama"
    )


def cannot_decode_seq2seq(model: Any, error: Exception) -> str:
    """The error message for an encoder-decoder whose forward call raised `error`."""
    return (
        f"the decoder of {type(model).__name__} does not support the per-row positions, 4-D masks and cache of ragged "
        f"batches ({_what_failed(error)}); use a model of the families of T5, BART, Pegasus, Marian or M2M-100"
    )


def _what_failed(error: Exception) -> str:
    """The innermost module of transformers that raised an error, and the error's type."""
    trace, failed = error.__traceback__, None
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and type(module).__module__.startswith("transformers.models."):
            failed = type(module).__name__
        trace = trace.tb_next
    return f"its {failed or 'forward'} raised {type(error).__name__}"
