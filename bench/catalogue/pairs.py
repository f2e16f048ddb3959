"""The catalogue of model pairs, `pairs.toml`, and pairs named on the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from bench.catalogue.methods import VLLM_DRAFTS
from specdec.methods import is_method, method_spec
from specdec.models.files.formats import OWN_QUANTIZATIONS
from specdec.runtime.checks import nearest

KINDS = ("decoder-only", "local-attention", "encoder-decoder")
_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "torchao-int8": 1, "bitsandbytes-4bit": 0.5}
_WEIGHT_BYTES |= dict.fromkeys(OWN_QUANTIZATIONS, 2.5)  # in bfloat16, until all layers are packed, and packed


@dataclass(frozen=True, slots=True)
class Published:
    """What others measured with a pair: with which method and gamma, in which setting, and where they say so."""

    method: str
    setting: str
    source: str
    gamma: int | None = None
    speedup: float | None = None
    acceptance_rate: float | None = None
    mean_acceptance_length: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A target and the draft that may speak for it.

    target, draft: a bundled name, a hub id or a folder. table: likewise, an n-gram table. heads: likewise, heads on the
    target's hidden states by the name of their method; where a pair has none, a draft of that format is taken.
    kind: one of KINDS, attention: one of transformers' implementations. dtype: what `--dtype auto` means.
    context: tokens that prompt and output may have together, if known. load_format: "dummy" for random weights.
    gated: whether the hub wants the licence accepted. target_params, draft_params: numbers of weights, 0 if not known.
    placement: of the cells that are measured now.
    """

    name: str
    target: str
    draft: str | None = None
    table: str | None = None
    dtype: str = "bfloat16"
    context: int | None = None
    load_format: str = "auto"
    licence: str = ""
    source: str = ""
    heads: Mapping[str, str] = field(default_factory=dict, hash=False)
    kind: str = "decoder-only"
    attention: str = "sdpa"
    gated: bool = False
    target_params: int = 0
    draft_params: int = 0
    published: tuple[Published, ...] = ()
    placement: str = "same"

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of the weights of target and draft in a number format, or so quantised at the least; 0: not known."""
        return int((self.target_params + self.draft_params) * _WEIGHT_BYTES[dtype])

    def published_for(self, method: str) -> Published | None:
        """What others measured with a method: the first such entry of the catalogue."""
        return next((each for each in self.published if each.method == method), None)

    def draft_for(self, method: str) -> str | None:
        """What proposes tokens under a method that needs more than the target; None if the pair has no such thing."""
        kinds = method_spec(method).draft_kinds if is_method(method) else (method,) if method in VLLM_DRAFTS else ()
        sources = dict.fromkeys(self._draft_kinds(kinds), self.draft) | {"table": self.table} | dict(self.heads)
        return next((source for kind in kinds if (source := sources.get(kind))), None)

    def _draft_kinds(self, kinds: Sequence[str]) -> Sequence[str]:
        """The kinds that `draft` may be of. What a user names on the hub may be of any, which is seen when it loads."""
        if self.source or self.draft is None:
            return ("model",)
        kind = _kind_in(folder(self.draft))
        return (kind,) if kind else kinds

    def lacks_draft(self, method: str) -> bool:
        """Whether a method needs more than the target and the pair does not have it."""
        needs_draft = method in VLLM_DRAFTS or (is_method(method) and method_spec(method).draft_kinds)
        return bool(needs_draft) and self.draft_for(method) is None


@cache
def _kind_in(source: str) -> str | None:
    """The kind of a draft; None for one that may be on the hub."""
    from specdec.drafts import kind_in
    from specdec.models.loading import packaged

    return kind_in(source) if source in packaged() or Path(source).expanduser().is_dir() else None


@cache
def catalogue() -> dict[str, Pair]:
    """The pairs of `pairs.toml` by name."""
    tables = tomllib.loads(Path(__file__).with_name("pairs.toml").read_text())
    for table in tables.values():
        table["published"] = tuple(Published(**each) for each in table.pop("published", ()))
    return {name: Pair(name=name, **table) for name, table in tables.items()}


def folder(source: str) -> str:
    """What to load for a pair's target or draft: the folder beside `pairs.toml` if there is one, else the source."""
    beside = Path(__file__).parent / "models" / source if source and "/" not in source else None
    return str(beside) if beside and (beside / "config.json").is_file() else source


def parse_pairs(text: str) -> tuple[Pair, ...]:
    """`NAME,...`, where an item may also be `target=MODEL` followed by `draft=MODEL`.

    Raises ValueError for a name that the catalogue lacks and for a draft without its target.
    """
    pairs: list[Pair] = []
    for item in text.split(","):
        key, equals, model = item.strip().partition("=")
        if not equals:
            pairs.append(_named(key))
        elif key == "target" and model:
            pairs.append(Pair(name=_short(model), target=_existing(model)))
        elif key == "draft" and model and pairs and not pairs[-1].source and pairs[-1].draft is None:
            target = pairs.pop().target
            pairs.append(Pair(name=f"{_short(target)}+{_short(model)}", target=target, draft=_existing(model)))
        else:
            raise ValueError(
                f"pairs={text!r} must be names, or target=MODEL with draft=MODEL right after it; {_remedy()}"
            )
    _require_distinct([pair.name for pair in pairs], text)
    return tuple(pairs)


def _named(name: str) -> Pair:
    if name not in catalogue():
        raise ValueError(f"pairs={name!r} must be in the catalogue; {_remedy()}{nearest(name, catalogue())}")
    return catalogue()[name]


def _existing(model: str) -> str:
    """A model that is given as a path must be there; whether a hub has it is seen when it is loaded."""
    if model.startswith(("/", ".", "~")) and not Path(model).expanduser().exists():
        raise ValueError(f"pairs={model!r} must exist, as it is a path; check it, or {_remedy()}")
    return model


def _remedy() -> str:
    return f"use {' or '.join(catalogue())}, or target=MODEL,draft=MODEL with hub ids or folders"


def _short(model: str) -> str:
    return Path(model.rstrip("/")).name or model


def _require_distinct(names: Sequence[str], text: str) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"pairs={text!r} must be distinct, but gives {', '.join(names)}; name each pair once")
