"""The registry of drafting methods: one entry per method, with its requirements and the builder of its proposer.

Importing this module is cheap: the command line checks names before it imports torch, and a method's proposer is
imported when it is built. A method of your own is one `MethodSpec` in your package, see `specdec.runtime.extensions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specdec.runtime import extensions
from specdec.runtime.checks import require, require_choice

if TYPE_CHECKING:
    from specdec.drafts import AnyDraft, Kind
    from specdec.models.base import LanguageModel
    from specdec.models.vocabularies import SharedVocabulary
    from specdec.proposers.adaptive import AdaptiveLength
    from specdec.proposers.base import Proposer
    from specdec.proposers.ngram import TokenIndex
    from specdec.proposers.suffix import SuffixProposer
    from specdec.trees.shape import Tree

GROUP: extensions.Group = "specdec.proposers"
VERIFICATION_NAMES = ("token", "block", "coupled")
DRAFT_SAMPLING_NAMES = ("probabilistic", "greedy")


@dataclass(frozen=True, slots=True)
class Parts:
    """The arguments that a proposer is built from.

    draft: of one of the method's `draft_kinds`, or the target's first layers if it exits early; None: there is none.
    shared: what the draft model's vocabulary shares with the target's; None if they are the same.
    adaptive: decides how long drafts are; None: as long as they may be. tree: the shape of drafts; None: chains.
    history_bytes: memory for the text of finished requests.
    """

    target: LanguageModel
    draft: AnyDraft | None = None
    shared: SharedVocabulary | None = None
    adaptive: AdaptiveLength | None = None
    tree: Tree | None = None
    history_bytes: int = 0


Builder = Callable[[Parts], "Proposer"]


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A drafting method.

    name: as users write it. summary: what proposes tokens, for the help text.
    build: makes its proposer; None: nothing is proposed.
    draw: makes the part of the proposer that runs a model, whose time "auto" and trees weigh; None if there is none.
    draft_kinds: the kinds of draft it takes, the preferred one first; it needs one of them, or none if empty.
    packaged_draft: the draft in this package for a target is named `<target>-<packaged_draft>`.
    history_bytes: default memory for the text of finished requests; None: it does not copy from them.
    is_adaptive: whether it can end a draft early, as num_speculative_tokens="auto" needs.
    drafts_trees, exits_early: whether it takes `tree` and `exit_layer`.
    """

    name: str
    summary: str
    build: Builder | None = None
    draw: Builder | None = None
    draft_kinds: tuple[Kind, ...] = ()
    packaged_draft: str | None = None
    history_bytes: int | None = None
    is_adaptive: bool = False
    drafts_trees: bool = False
    exits_early: bool = False


METHODS: dict[str, MethodSpec] = {}


def register(spec: MethodSpec) -> None:
    """Make a drafting method known. Raises ValueError if its name is taken."""
    require(spec.name not in METHODS, f"method {spec.name!r} must have a name of its own; known: {', '.join(METHODS)}")
    METHODS[spec.name] = spec


def method_spec(name: str) -> MethodSpec:
    """The entry of a method; that of an extension is imported.

    Raises ValueError for a name that is neither, ExtensionError for an extension that cannot be used.
    """
    if name in METHODS or not is_method(name):
        require_choice("method", name, METHODS)
        return METHODS[name]
    spec: MethodSpec = extensions.load(
        GROUP, name, lambda loaded: isinstance(loaded, MethodSpec), "a specdec.methods.MethodSpec"
    )
    return spec


def is_method(name: str) -> bool:
    """Whether `method_spec` takes a name for a method; imports nothing."""
    return name in METHODS or extensions.is_extension(GROUP, name)


def default_draft(target: str, method: str) -> str | None:
    """The draft for a target and a method where none is named: one in this package, or a layer of the target's own.

    Returns its source, or None if there is none.
    """
    if method_spec(method).draft_kinds == ("mtp",):
        from specdec.drafts import find

        return target if find(target, target=target).kind == "mtp" else None
    return packaged_draft(target, method)


def packaged_draft(target: str, method: str) -> str | None:
    """The name of the draft in this package for a target and a method, or None."""
    from specdec.models.loading import packaged

    name = f"{target}-{method_spec(method).packaged_draft}"
    return name if name in packaged() else None


def _ngram(parts: Parts, new_index: Callable[[], TokenIndex] | None = None) -> Proposer:
    from specdec.proposers.ngram import LookupIndex, NgramProposer

    return NgramProposer(parts.target.vocab_size, parts.target.device, new_index or LookupIndex, parts.adaptive)


def _ngram_store(parts: Parts) -> Proposer:
    from specdec.proposers.ngram import CountIndex

    return _ngram(parts, CountIndex)


def _ngram_table(parts: Parts) -> Proposer:
    from specdec.proposers.ngram import LookupIndex
    from specdec.proposers.table import Fallback

    table: Any = parts.draft
    return _ngram(parts, lambda: Fallback(LookupIndex(), table))


def _suffix(parts: Parts) -> SuffixProposer:
    from specdec.proposers.suffix import SuffixProposer

    return SuffixProposer(parts.target.vocab_size, parts.target.device, parts.history_bytes, parts.adaptive)


def _drawn(parts: Parts) -> Proposer:
    """From a head, by how it drafts, or from a draft model."""
    from specdec.drafts import is_head, kind_of

    draft: Any = parts.draft
    if is_head(kind_of(draft)):
        return _headed(parts)
    from specdec.models.elsewhere import seen_from
    from specdec.proposers.draft_model import DraftModelProposer

    model = seen_from(draft, parts.target.device)
    return DraftModelProposer(model, adaptive=parts.adaptive, shared=parts.shared, tree=parts.tree)


def _pard(parts: Parts) -> Proposer:
    from specdec.models.elsewhere import seen_from
    from specdec.proposers.pard import PardProposer

    draft: Any = parts.draft
    require(parts.shared is None, "a parallel draft model must have the target's vocabulary; use one of its family")
    return PardProposer(seen_from(draft, parts.target.device), draft.mask_token, adaptive=parts.adaptive)


def _headed(parts: Parts) -> Proposer:
    """From a head, by the way it drafts."""
    from specdec.proposers.heads.block import BlockProposer
    from specdec.proposers.heads.eagle import EagleProposer
    from specdec.proposers.heads.parallel import ParallelHeadProposer
    from specdec.proposers.heads.stateless import StatelessProposer

    head: Any = parts.draft
    if head.drafting in ("block", "parallel"):
        require(parts.tree is None, f"a {head.format} head drafts chains, not trees; use method={head.format!r}")
        make = BlockProposer if head.drafting == "block" else ParallelHeadProposer
        return make(head, adaptive=parts.adaptive)
    makers: dict[str, Any] = {"sequential": EagleProposer, "stateless": StatelessProposer}
    proposer: Proposer = makers[head.drafting](head, adaptive=parts.adaptive, tree=parts.tree)
    return proposer


def _exit(parts: Parts) -> Proposer:
    from specdec.proposers.early_exit import EarlyExitProposer

    first_layers: Any = parts.draft
    return EarlyExitProposer(first_layers, adaptive=parts.adaptive)


def _hybrid(parts: Parts) -> Proposer:
    from specdec.drafts import kind_of
    from specdec.proposers.hybrid import BetterCopies, HybridProposer

    draw = _pard if kind_of(parts.draft) == "pard" else _drawn
    return HybridProposer(BetterCopies(_suffix(parts), parts.adaptive), draw(parts))


_HEADS = {
    "eagle": "a head on the target's features",
    "eagle3": "a head on features of several layers",
    "mtp": "a layer of the target for one token more",
    "medusa": "a network per draft position",
    "hydra": "a network per draft position that reads the draft so far",
    "mlp_speculator": "a recurrent state advanced by each token",
}
_BLOCK_HEADS = {
    "p_eagle": "an EAGLE-3 head that drafts in one pass",
    "dflash": "a head that drafts a block in one pass",
    "dflash2": "DFlash with a choice among candidates by the token before",
    "dspark": "DFlash with a bias by the token before",
    "domino": "DFlash with a correction by the draft so far",
}
_HEAD_OR_MODEL: tuple[Kind, ...] = (*_HEADS, "model", "pard")
for _spec in (
    MethodSpec("autoregressive", "nothing"),
    MethodSpec("ngram", "prompt lookup", _ngram, is_adaptive=True),
    MethodSpec("ngram_store", "online n-gram counts", _ngram_store, is_adaptive=True),
    MethodSpec("ngram_table", "lookup, else a table", _ngram_table, None, ("table",), "ngrams", is_adaptive=True),
    MethodSpec("suffix", "copies from own and finished texts", _suffix, history_bytes=64 << 20, is_adaptive=True),
    MethodSpec("draft_model", "a smaller language model", _drawn, _drawn, ("model", "pard"), "draft", is_adaptive=True),
    MethodSpec("pard", "a model that drafts in one pass", _pard, _pard, ("pard",), is_adaptive=True),
    *(
        MethodSpec(name, summary, _drawn, _drawn, (name,), name, is_adaptive=True)
        for name, summary in (_HEADS | _BLOCK_HEADS).items()
    ),
    MethodSpec("early_exit", "the target's first layers", _exit, _exit, is_adaptive=True, exits_early=True),
    MethodSpec(
        "hybrid",
        "a copy or a drawn draft",
        _hybrid,
        _drawn,
        (*_HEAD_OR_MODEL, *_BLOCK_HEADS),
        "eagle",
        0,
        is_adaptive=True,
    ),
    MethodSpec("tree", "a head or a draft model", _drawn, _drawn, _HEAD_OR_MODEL, "eagle", drafts_trees=True),
):
    register(_spec)
