"""Which engines there are, what each of them can do, and why one cannot run a cell."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

from bench.catalogue.methods import VLLM_METHODS
from bench.catalogue.pairs import Pair, folder
from bench.engines.base import BenchEngine, LoadOptions, VllmOptions
from specdec.methods import METHODS


@dataclass(frozen=True, slots=True)
class EngineKind:
    """What is known of an engine before it is loaded.

    max_batch_size: None is unlimited. extras: what few have. kinds: those of pairs that it decodes.
    """

    package: str
    methods: tuple[str, ...]
    max_batch_size: int | None = None
    verifications: tuple[str, ...] = ("token",)
    extras: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("decoder-only",)


ENGINES = {
    "specdec": EngineKind(
        "specdec",
        tuple(METHODS),
        None,
        ("token", "block", "coupled"),
        ("auto gamma", "synthetic acceptance", "placements", "other vocabularies", "arrivals"),
        ("decoder-only", "encoder-decoder"),
    ),
    "transformers": EngineKind(
        "transformers",
        ("autoregressive", "ngram", "draft_model"),
        max_batch_size=1,
        extras=("placements",),
        kinds=("decoder-only", "local-attention", "encoder-decoder"),
    ),
    "vllm": EngineKind(
        "vllm",
        ("autoregressive", "ngram", "suffix", "draft_model", "eagle", *VLLM_METHODS),
        verifications=("token", "block"),
        extras=("synthetic acceptance", "interpreter"),
    ),
    "vllm-server": EngineKind(
        "vllm",
        ("autoregressive", "ngram", "suffix", "draft_model", "eagle", *VLLM_METHODS),
        verifications=("token", "block"),
        extras=("synthetic acceptance", "interpreter", "arrivals"),
    ),
}


def why_not(
    engine: str, method: str, batch_size: int, verification: str = "token", vllm: VllmOptions | None = None
) -> str | None:
    """Why an engine cannot run a cell, and what to do about it; None if it can."""
    kind = ENGINES[engine]
    if missing := _why_missing(engine, vllm or VllmOptions()):
        return missing
    if method not in kind.methods:
        return f"engine={engine} has no method={method}; use {', '.join(kind.methods)}"
    if method == "tree" and verification == "block":
        return "method=tree has no verification=block; use --verification token or coupled"
    if method != "autoregressive" and verification not in kind.verifications:
        return (
            f"engine={engine} has no verification={verification}; use --verification {' or '.join(kind.verifications)}"
        )
    if kind.max_batch_size is not None and batch_size > kind.max_batch_size:
        return (
            f"engine={engine} decodes at most {kind.max_batch_size} prompt at a time, not "
            f"batch_size={batch_size}; use --batch-sizes {kind.max_batch_size}"
        )
    return None


def why_not_pair(engine: str, pair: Pair, placement: str) -> str | None:
    """Why an engine cannot decode a pair, or not so placed, and what to do about it; None if it can."""
    kind = ENGINES[engine]
    if pair.kind not in kind.kinds:
        able = [name for name, each in ENGINES.items() if pair.kind in each.kinds]
        remedy = f"use --engines {','.join(able)}" if able else "no engine does yet; use another pair"
        return f"engine={engine} takes no models of kind {pair.kind}, as pair={pair.name} is; {remedy}"
    if placement != "same" and "placements" not in kind.extras:
        return (
            f"engine={engine} places models by itself, not by placement={placement}; use --placements same and "
            "--vllm-options such as tensor_parallel_size"
        )
    return None


def _why_missing(engine: str, vllm: VllmOptions) -> str | None:
    package = ENGINES[engine].package
    if engine == "vllm-server" and vllm.server_url:
        return None
    if "interpreter" in ENGINES[engine].extras:
        from bench.engines.vllm import why_no_interpreter

        return why_no_interpreter(engine, vllm.python)
    if importlib.util.find_spec(package) is None:
        return f"engine={engine} needs the package {package}; pip install {package}"
    return None


def load(engine: str, pair: Pair, options: LoadOptions) -> BenchEngine:
    """An engine with a pair's models in memory."""
    module = importlib.import_module(f"bench.engines.{engine.replace('-', '_')}")
    loaded: BenchEngine = module.load(pair, options)
    return loaded


def check_vocabulary(pair: Pair, engine: str) -> None:
    """Compare what token ids mean to a pair's target and draft model, before any weights are read.

    Raises LoadError if it is not the same, or for an engine that takes other vocabularies if too little of it is, or
    if it cannot be had.
    """
    from specdec.drafts import check_vocabularies, kind_in
    from specdec.models.loading import resolve
    from specdec.runtime.artifacts import LoadError

    if pair.draft is None or kind_in(resolve(folder(pair.draft))) != "model":
        return
    try:
        same = "other vocabularies" not in ENGINES[engine].extras
        check_vocabularies(folder(pair.target), folder(pair.draft), pair.load_format, same=same)
    except ValueError as error:
        raise LoadError(f"pair={pair.name}: {error}") from error
