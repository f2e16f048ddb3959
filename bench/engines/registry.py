"""The available engines and their capabilities, and why an engine cannot run a cell."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.catalogue.methods import LLAMA_METHODS, PEER_METHODS, VLLM_METHODS
from bench.catalogue.pairs import Pair, folder
from bench.engines.base import BenchEngine, LoadOptions, Peers
from specdec.methods import GROUP as METHODS_GROUP
from specdec.methods import METHODS, is_method, method_spec
from specdec.runtime import extensions
from specdec.runtime.checks import nearest

GROUP: extensions.Group = "specdec.engines"
EXTRAS = (  # optional capabilities
    *("auto gamma", "synthetic acceptance", "placements", "other vocabularies"),
    *("arrivals", "method extensions", "running servers"),
)


@dataclass(frozen=True, slots=True)
class EngineKind:
    """Static description of an engine; an extension of group `specdec.engines` provides one.

    package: the package it requires. methods: supported drafting methods.
    load: `module:function`, imported on first use; the function takes (Pair, LoadOptions) and returns a BenchEngine, or
    a ServingEngine if "arrivals" is among the extras.
    max_batch_size: None for unlimited. verifications: supported rules. extras: from EXTRAS. kinds: supported kinds of
    pairs.
    why_missing: `module:function` (engine, Peers) -> why this machine cannot run it, with a remedy, or None; for an
    engine that another interpreter or program runs. By default the package must be installed here.
    Raises ValueError for an invalid `load` or extra.
    """

    package: str
    methods: tuple[str, ...]
    load: str
    max_batch_size: int | None = None
    verifications: tuple[str, ...] = ("token",)
    extras: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("decoder-only",)
    why_missing: str | None = None

    def __post_init__(self) -> None:
        if not extensions.REFERENCE.fullmatch(self.load):
            raise ValueError(f"load={self.load!r} must be module:function; name the function that loads the engine")
        for extra in self.extras:
            if extra not in EXTRAS:
                raise ValueError(f"extras={extra!r} must be one of {', '.join(EXTRAS)}{nearest(extra, EXTRAS)}")


_VLLM = EngineKind(
    "vllm",
    ("autoregressive", "ngram", "suffix", "draft_model", "eagle", *VLLM_METHODS),
    load="bench.engines.vllm:load",
    verifications=("token", "block"),
    extras=("synthetic acceptance",),
    why_missing="bench.engines.vllm:why_missing",
)
_SERVERS = "bench.engines.servers.running"
_RUNNING = EngineKind(  # on servers that somebody else started, with whatever method they were started with
    "",
    ("autoregressive", "ngram", "suffix", "draft_model", "eagle", *VLLM_METHODS),
    load=f"{_SERVERS}:load_openai",
    extras=("arrivals", "running servers"),
    why_missing=f"{_SERVERS}:why_missing",
)
ENGINES = {
    "specdec": EngineKind(
        "specdec",
        tuple(METHODS),
        load="bench.engines.specdec:load",
        verifications=("token", "block", "coupled"),
        extras=(
            *("auto gamma", "synthetic acceptance", "placements", "other vocabularies"),
            *("arrivals", "method extensions"),
        ),
        kinds=("decoder-only", "encoder-decoder"),
    ),
    "transformers": EngineKind(
        "transformers",
        ("autoregressive", "ngram", "draft_model"),
        load="bench.engines.transformers:load",
        max_batch_size=1,
        extras=("placements",),
        kinds=("decoder-only", "local-attention", "encoder-decoder"),
    ),
    "vllm": _VLLM,
    "vllm-server": replace(
        _VLLM, load="bench.engines.servers.vllm_server:load", extras=(*_VLLM.extras, "arrivals", "running servers")
    ),
    "sglang": replace(_RUNNING, package="sglang", load=f"{_SERVERS}:load_sglang"),
    "tensorrt-llm": replace(_RUNNING, package="tensorrt_llm", load=f"{_SERVERS}:load_tensorrt"),
    "openai": replace(_RUNNING, package="openai", load=f"{_SERVERS}:load_openai"),
    "llama-server": EngineKind(
        "llama.cpp",
        ("autoregressive", "ngram", "draft_model", *LLAMA_METHODS),
        load="bench.engines.servers.llama_server:load",
        extras=("synthetic acceptance", "arrivals"),
        why_missing="bench.engines.servers.llama_server:why_missing",
    ),
    "openvino": EngineKind(
        "openvino_genai",
        ("autoregressive", "ngram"),
        load="bench.engines.openvino:load",
        max_batch_size=1,
        why_missing="bench.engines.openvino:why_missing",
    ),
}


def is_running(engine: str, peers: Peers) -> bool:
    """Whether an engine is a server that somebody else started, possibly on another machine."""
    return "running servers" in engine_kind(engine).extras and peers.servers.urls.of(engine) is not None


def engine_kind(engine: str) -> EngineKind:
    """The description of an engine, built in or an extension. Raises ExtensionError for an unusable extension."""
    if engine in ENGINES:
        return ENGINES[engine]
    kind: EngineKind = extensions.load(
        GROUP, engine, lambda loaded: isinstance(loaded, EngineKind), "a bench.engines.registry.EngineKind"
    )
    return kind


def parse_engine(name: str, text: str) -> str:
    """One item of the option `engines`, a name of ENGINES or an extension, which is imported.

    Raises ValueError for anything else.
    """
    if text not in ENGINES and not extensions.is_extension(GROUP, text):
        rule = f"must be one of {', '.join(ENGINES)} or module:attribute"
        raise ValueError(f"{name}={text!r} {rule}{nearest(text, ENGINES)}")
    engine_kind(text)
    return text


def parse_method(name: str, text: str) -> str:
    """One item of the option `methods`, a name of an engine's method or an extension, which is imported.

    Raises ValueError for anything else.
    """
    if is_method(text):
        method_spec(text)
    elif text not in PEER_METHODS:
        known = (*METHODS, *PEER_METHODS)
        rule = f"must be one of {', '.join(known)} or module:attribute"
        raise ValueError(f"{name}={text!r} {rule}{nearest(text, known)}")
    return text


def extension_files(engines: Sequence[str], methods: Sequence[str]) -> list[Path]:
    """The source files of the engines and methods that are extensions."""
    outside = [(GROUP, name) for name in engines if name not in ENGINES]
    outside += [(METHODS_GROUP, name) for name in methods if name not in (*METHODS, *PEER_METHODS)]
    return [path for group, name in outside for path in extensions.source_files(group, name)]


def why_not(
    engine: str,
    method: str,
    batch_size: int,
    verification: str = "token",
    peers: Peers | None = None,
) -> str | None:
    """Why an engine cannot run a cell, with a remedy; None if it can."""
    kind = engine_kind(engine)
    if missing := _why_missing(engine, peers or Peers()):
        return missing
    if method not in kind.methods and not _is_own(kind, method):
        return f"engine={engine} has no method={method}; use {', '.join(kind.methods)}"
    if verification == "block" and is_method(method) and method_spec(method).drafts_trees:
        return f"method={method} has no verification=block; use --verification token or coupled"
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


def _is_own(kind: EngineKind, method: str) -> bool:
    """Whether a method is an extension, and the engine supports these."""
    return "method extensions" in kind.extras and is_method(method) and method not in METHODS


def why_not_pair(engine: str, pair: Pair, placement: str) -> str | None:
    """Why an engine cannot decode a pair with a placement, with a remedy; None if it can."""
    kind = engine_kind(engine)
    if pair.kind not in kind.kinds:
        able = [name for name, other in ENGINES.items() if pair.kind in other.kinds]
        remedy = f"use --engines {','.join(able)}" if able else "no engine does yet; use another pair"
        return f"engine={engine} does not support models of kind {pair.kind}, such as pair={pair.name}; {remedy}"
    if placement != "same" and "placements" not in kind.extras:
        return (
            f"engine={engine} places models itself and does not support placement={placement}; use --placements same "
            "and --vllm-options such as tensor_parallel_size"
        )
    return None


def _why_missing(engine: str, peers: Peers) -> str | None:
    kind = engine_kind(engine)
    if is_running(engine, peers):
        return None
    if kind.why_missing:
        why_missing = extensions.load(GROUP, kind.why_missing, callable, "a function (engine, Peers)")
        reason: str | None = why_missing(engine, peers)
        return reason
    if importlib.util.find_spec(kind.package) is None:
        return f"engine={engine} needs the package {kind.package}; pip install {kind.package}"
    return None


def load(engine: str, pair: Pair, options: LoadOptions) -> BenchEngine:
    """Load an engine with a pair's models."""
    load_models = extensions.load(GROUP, engine_kind(engine).load, callable, "a function (Pair, LoadOptions)")
    loaded: BenchEngine = load_models(pair, options)
    return loaded


def check_vocabulary(pair: Pair, engine: str) -> None:
    """Compare the vocabularies of a pair's target and draft model, before any weights are read.

    Raises LoadError if they differ, or if they share too little for an engine that supports different vocabularies, or
    if they cannot be read.
    """
    from specdec.drafts import check_vocabularies, kind_in
    from specdec.models.loading import resolve
    from specdec.runtime.artifacts import LoadError

    if pair.draft is None or kind_in(resolve(folder(pair.draft))) != "model":
        return
    try:
        same = "other vocabularies" not in engine_kind(engine).extras
        check_vocabularies(folder(pair.target), folder(pair.draft), pair.load_format, same=same)
    except ValueError as error:
        raise LoadError(f"pair={pair.name}: {error}") from error
