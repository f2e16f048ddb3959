"""Sampling defaults in a model's generation_config.json, as `transformers.generate` applies them."""

from __future__ import annotations

import logging
from typing import Any

_SHARED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # with SamplingParams
_NEUTRAL: dict[str, Any] = {  # what else changes the output of `transformers.generate`, and the value with which not
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_new_tokens": None,
    "min_length": 0,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
}


def sampling_defaults(config: Any) -> dict[str, Any]:
    """Arguments of SamplingParams from a GenerationConfig, or None; greedy unless it has do_sample."""
    named = {name: getattr(config, name, None) for name in _SHARED}
    found = {name: value for name, value in named.items() if value is not None}
    if getattr(config, "do_sample", False):
        return {"top_k": 50} | found  # transformers' default
    return {"temperature": 0.0, "repetition_penalty": found.get("repetition_penalty", 1.0)}


def warn_of_ignored(config: Any) -> None:
    """Log what a GenerationConfig, or None, has that changes greedy output in `transformers.generate`, and not here."""
    found = {name: getattr(config, name, None) for name in _NEUTRAL}
    named = [f"{name}={value!r}" for name, value in found.items() if value not in (None, _NEUTRAL[name], [])]
    if named:
        logging.getLogger("specdec").warning(
            "the model's generation_config has %s, which transformers.generate applies and SamplingParams() does not; "
            "engine.default_sampling() has its temperature, top_k, top_p, min_p and repetition_penalty",
            ", ".join(named),
        )
