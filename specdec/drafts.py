"""What may speak for a target: a draft model, a head on its features, or an n-gram table; and loading them with it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from specdec.models import LanguageModel
from specdec.models.loading import WEIGHTS, load_pretrained, read_vocabulary, resolve
from specdec.proposers.table import NgramTable

if TYPE_CHECKING:
    from specdec.models.causal import CausalLM
    from specdec.models.eagle import EagleHead

    AnyDraft = LanguageModel | EagleHead | NgramTable

Kind = Literal["model", "head", "table"]
NEEDS: dict[str, tuple[Kind, ...]] = {  # by method
    "draft_model": ("model",),
    "eagle": ("head",),
    "ngram_table": ("table",),
    "hybrid": ("head", "model"),
}
_FILES: dict[Kind, str] = {"head": "draft_vocabulary.json", "table": "table.safetensors"}


class HasVocabulary(Protocol):
    """A draft or a target, or what is known of it before weights are read; a `tokenizer` is looked at if present."""

    @property
    def vocab_size(self) -> int: ...


def kind_of(draft: Any) -> Kind:
    """What sort of draft an object is."""
    if isinstance(draft, NgramTable):
        return "table"
    return "head" if hasattr(draft, "draft_vocabulary") else "model"


def kind_in(source: str) -> Kind:
    """What sort of draft a source holds: a folder with a head's or a table's file, else a model."""
    folders = (Path(source), WEIGHTS / source)
    found = [kind for kind, file in _FILES.items() if any((folder / file).is_file() for folder in folders)]
    return found[0] if found else "model"


def load_with_drafts(target: str, drafts: Iterable[str], **options: Any) -> tuple[CausalLM, dict[str, AnyDraft]]:
    """A target and what may speak for it, by source, fused; options and errors as for `load_pretrained`.

    drafts: models' sources, and folders with a head or a table. Vocabularies are compared before weights are read.
    """
    places = {source: resolve(source) for source in drafts}
    for place in places.values():
        if kind_in(place) == "model":
            check_same_vocabulary(*(read_vocabulary(source, options["load_format"]) for source in (target, place)))
    model, tokenizer = load_pretrained(target, **options)
    loaded = {source: _load(place, model, options) for source, place in places.items()}
    return _fused(model, tokenizer), loaded  # fused at last: a head borrows from the target as it was


def _load(place: str, target: Any, options: dict[str, Any]) -> AnyDraft:
    from specdec.models.eagle import load_head

    kind = kind_in(place)
    if kind == "table":
        return NgramTable.load(Path(place) / _FILES["table"])
    if kind == "model":
        return _fused(*load_pretrained(place, **options))
    head = load_head(place, target, options["load_format"])
    head.fuse()
    return head


def _fused(model: Any, tokenizer: Any) -> CausalLM:
    from specdec.models.causal import CausalLM
    from specdec.models.fusion import fuse

    fuse(model)
    return CausalLM(model, tokenizer)


def check_same_vocabulary(target: HasVocabulary, draft: HasVocabulary) -> None:
    """Raise ValueError unless token ids mean the same to both models."""
    require(
        target.vocab_size == draft.vocab_size,
        f"the draft's vocabulary of {draft.vocab_size} tokens must be the target's, {target.vocab_size}; "
        "use a draft of the same family",
    )
    tokenizers: list[Any] = [getattr(model, "tokenizer", None) for model in (target, draft)]
    if all(tokenizers):
        ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
        different = min((token for token, _ in ours.items() ^ theirs.items()), default=None)
        require(
            ours == theirs,
            f"the draft's tokenizer must be the target's, but token {different!r} is "
            f"{ours.get(different)} for the target and {theirs.get(different)} for the draft; "
            "use a draft of the same family",
        )


def require(holds: bool, message: str) -> None:
    """Raise ValueError with the message unless it holds."""
    if not holds:
        raise ValueError(message)
