"""Draft sources of a target, and loading them with it: a draft model, a head on its features, an n-gram table."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from specdec.heads.files import VOCABULARY_FILE, PickleError
from specdec.models.base import LanguageModel
from specdec.models.loading import (
    WEIGHTS,
    WEIGHTS_SHARE,
    Vocabulary,
    check_complete,
    hub_folder,
    load_pretrained,
    packaged,
    read_layer_bytes,
    read_skeleton,
    read_vocabulary,
    resolve,
)
from specdec.models.placement import PlacementError, plan_placement
from specdec.models.quantization.quantizers import QUANTIZERS
from specdec.models.vocabularies import SharedVocabulary, check_coverage, share
from specdec.proposers.table import NgramTable
from specdec.runtime.artifacts import LoadError
from specdec.runtime.checks import require
from specdec.runtime.devices import free_memories
from specdec.trees.optimal import Rates

if TYPE_CHECKING:
    from specdec.heads.base import Head
    from specdec.heads.formats import FoundHead
    from specdec.models.causal import CausalLM
    from specdec.models.seq2seq import Seq2SeqLM

    AnyDraft = LanguageModel | Head | NgramTable

MODELS = ("model", "pard")
Kind = str  # "model", "pard" (a parallel draft model), "table", or the format of a head, see `specdec.heads.formats`
RATES_FILE = "acceptance.json"  # in a draft's folder, what was measured of it
_FILES: dict[Kind, str] = {"eagle": VOCABULARY_FILE, "table": "table.safetensors"}


class HasVocabulary(Protocol):
    """A language model, or its description before its weights are read."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def is_encoder_decoder(self) -> bool: ...


def as_language_model(model: Any, tokenizer: Any = None) -> Any:
    """A loaded transformers model, put into eval mode, as a LanguageModel; anything else as it is.

    Raises ValueError for a tokenizer beside anything else.
    """
    if not hasattr(model, "get_input_embeddings") or hasattr(model, "draft_vocabulary"):  # a head has both
        require(tokenizer is None, f"tokenizer= is of a transformers model; {type(model).__name__} has its own")
        return model
    require(
        not isinstance(tokenizer, str | bytes | Path | Real),
        f"tokenizer={tokenizer!r} must be a loaded tokenizer, such as AutoTokenizer.from_pretrained(...)",
    )
    from specdec.models.causal import CausalLM
    from specdec.models.seq2seq import Seq2SeqLM

    return (Seq2SeqLM if model.config.is_encoder_decoder else CausalLM)(model.eval(), tokenizer)


def kind_of(draft: Any) -> Kind:
    """The kind of a draft."""
    if isinstance(draft, NgramTable):
        return "table"
    if hasattr(draft, "draft_vocabulary"):
        return str(draft.format)
    return "model" if draft.mask_token is None else "pard"


def is_head(kind: Kind | None) -> bool:
    """Whether drafts of a kind are heads on the target's features."""
    return kind not in (*MODELS, "table", None)


@dataclass(frozen=True, slots=True)
class DraftSource:
    """The contents of a source before its weights are read. place: as for `load_pretrained`. head: set for a head."""

    place: str
    kind: Kind
    head: FoundHead | None = None


def find(
    source: str, load_format: str = "auto", *, target: str | None = None, allow_pickle: bool = False
) -> DraftSource:
    """Recognize the draft in a source: a folder or hub id with a head, a table or a model. Weights are not read.

    What is on the hub is downloaded. A bundled model is not, nor is a draft of this package put together.
    target: the target's source. A model with an MTP layer of its own is a draft model for any other target.
    allow_pickle: whether a head's weights may be .bin or .pt files. Raises LoadError if they are and it is not allowed.
    """
    folder = _folder(source, load_format, allow_pickle)
    if folder is None:
        return DraftSource(source, "model")
    from specdec.heads.formats import recognized  # imports transformers
    from specdec.heads.mtp import is_whole_model

    try:
        head = recognized(folder, allow_pickle=allow_pickle)
    except PickleError:
        if load_format != "dummy":
            raise
        head = None  # random weights need no file
    is_own = target in (None, source)
    if head and (is_own or head.format.name != "mtp" or not is_whole_model(head.folder)):
        return DraftSource(source if source in packaged() else str(folder), head.format.name, head)
    kinds = [kind for kind, file in _FILES.items() if (folder / file).is_file()]
    return DraftSource(source, kinds[0] if kinds else "pard" if _is_parallel(folder) else "model")


def _folder(source: str, load_format: str, allow_pickle: bool) -> Path | None:
    """The folder with a source's config; None for a bundled model, a file, or a hub model that need not be read."""
    if source in packaged():
        return WEIGHTS / source
    path = Path(source).expanduser()
    return path if path.is_dir() else hub_folder(source, allow_pickle=allow_pickle) if load_format == "auto" else None


def kind_in(source: str) -> Kind:
    """The kind of draft in a source, see `find`."""
    return find(source).kind


def _is_parallel(folder: Path) -> bool:
    """Whether a folder has a language model that was trained to draft several tokens in a pass (PARD)."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):  # missing, or damaged, which its loader reports
        return False
    parts = (config, *config.values()) if isinstance(config, dict) else ()  # a composite has that of its text model
    return any(isinstance(part, dict) and part.get("pard_token") is not None for part in parts)


def load_with_drafts(
    target: str,
    drafts: Iterable[str],
    placement: str = "same",
    *,
    allow_pickle: bool = False,
    draft_quantization: str | None = None,
    **options: Any,
) -> tuple[CausalLM | Seq2SeqLM, dict[str, AnyDraft]]:
    """A target and its drafts by source, fused; options and errors as for `load_pretrained`.

    drafts: models' sources, and folders or hub ids with a head or a table. What is wrong with them, and whether they
        fit the target, is found out before weights of the target are read.
    placement: over which of the devices that `device` stands for they are spread, see `specdec.models.placement`;
        heads are with the target. What is spread over several devices, quantised or sharded is not fused.
    allow_pickle: whether a head's weights may be .bin or .pt files, which are read without running code.
    draft_quantization: as `quantization`, of the drafts; "none" for none. None: draft models' is the target's, and
        heads have none.
    """
    load_format = options["load_format"]
    found = {source: find(source, load_format, target=target, allow_pickle=allow_pickle) for source in drafts}
    return load_with_found(target, found, placement, draft_quantization=draft_quantization, **options)


def load_with_found(
    target: str,
    drafts: Mapping[str, DraftSource],
    placement: str = "same",
    *,
    draft_quantization: str | None = None,
    **options: Any,
) -> tuple[CausalLM | Seq2SeqLM, dict[str, AnyDraft]]:
    """As `load_with_drafts`, for drafts that `find` recognized, by source."""
    _check_draft_quantization(draft_quantization, drafts.values())
    found = {source: replace(each, place=resolve(each.place)) for source, each in drafts.items()}
    models = [each.place for each in found.values() if each.kind in MODELS]
    places = (target, *models) if found else ()
    vocabularies = {place: read_vocabulary(place, options["load_format"]) for place in places}
    descriptions = _check_sources(target, found, vocabularies, options)
    target_device, devices = place_models(target, models, placement, options)
    read_from = {"vocabulary": vocabularies.get(target), "device": target_device}
    model, tokenizer = load_pretrained(target, **options | read_from)
    loaded: dict[str, AnyDraft] = {}
    for source, each in found.items():
        own = {"device": devices.get(each.place, options["device"]), "vocabulary": vocabularies.get(each.place)}
        own |= {"quantization": _quantization_of(each.kind, draft_quantization, options.get("quantization"))}
        loaded[source] = _load(each, model, options | own)
    for source, description in descriptions.items():
        cast("Any", loaded[source]).description = description
    return _fused(model, tokenizer), loaded  # fused last: a head borrows from the target's unfused layers


def _check_draft_quantization(name: str | None, drafts: Iterable[DraftSource]) -> None:
    """Raise ValueError if a draft cannot be quantized as it is named."""
    if name in (None, "none"):
        return
    for draft in drafts:
        if is_head(draft.kind):
            require(
                name in QUANTIZERS,
                f"draft_quantization={name!r} of a head must be {' or '.join(QUANTIZERS)}; use one of them, or none",
            )
        require(draft.kind != "table", f"draft_quantization={name!r} must be left out: a table has no weights")


def _quantization_of(kind: Kind, given: str | None, of_target: str | None) -> str | None:
    """The quantization of a draft of this kind; given: `draft_quantization`."""
    default = of_target if kind in MODELS else None
    return default if given is None else None if given == "none" else given


def _check_sources(
    target: str, sources: Mapping[str, DraftSource], vocabularies: Mapping[str, Vocabulary], options: Mapping[str, Any]
) -> dict[str, str]:
    """Check drafts against the target before weights are read. Returns a description of each head, which is logged.

    vocabularies: of the target and of draft models, by their places.
    """
    descriptions, load_format = {}, options["load_format"]
    for source, each in sources.items():
        check_kinds(vocabularies[target], each.kind)
        if each.kind in MODELS:
            share_vocabulary(vocabularies[target], vocabularies[each.place])
            _check_model(each.place, load_format)
        if each.head:
            skeleton = read_skeleton(target, options["dtype"], load_format)
            descriptions[source] = each.head.check(skeleton)
            logging.getLogger("specdec").info("%s: %s", source, descriptions[source])
            each.head.warn_of_context(skeleton)
    return descriptions


def _check_model(place: str, load_format: str) -> None:
    """Raise LoadError for a folder that is neither a complete language model nor a head of a known format."""
    if load_format != "auto" or not Path(place).is_dir():
        return
    try:
        check_complete(place)
    except LoadError as error:
        from specdec.heads.formats import FORMATS

        known = "; ".join(f"{each.title} by {each.signs}" for each in FORMATS)
        raise LoadError(f"{error}. Nor is it a known head: {known}") from error


def check_vocabularies(target: str, draft: str, load_format: str = "auto", *, same: bool = False) -> None:
    """Raise ValueError unless the draft model can propose tokens for the target; weights of neither are read.

    same: whether token ids must mean the same to both.
    """
    check = check_same_vocabulary if same else share_vocabulary
    check(read_vocabulary(target, load_format), read_vocabulary(draft, load_format))


Device = str | list[torch.device]  # as `load_pretrained` takes it


def place_models(
    target: str, drafts: Iterable[str], placement: str, options: Mapping[str, Any]
) -> tuple[Device, dict[str, Device]]:
    """The device argument of `load_pretrained` for the target, and for each draft model by its source.

    options: those of `load_pretrained`; `device` is a kind of device, "cuda" for all GPUs. Raises PlacementError.
    """
    drafts, device = list(drafts), options["device"]
    if placement == "same":
        return device, dict.fromkeys(drafts, device)
    if read_vocabulary(target, options["load_format"]).is_encoder_decoder:
        raise PlacementError(
            f'placement={placement!r} must be "same" for an encoder-decoder, whose layers stay together; use that, or '
            "a smaller model"
        )
    memories = free_memories(device)
    read = partial(read_layer_bytes, dtype=options["dtype"], load_format=options["load_format"])
    sizes = {source: read(source) for source in (target, *drafts)}
    largest = max((sizes[source] for source in drafts), key=lambda each: each.total, default=None)
    usable = [int(WEIGHTS_SHARE * memory) for memory in memories.values()]
    devices = list(memories)

    def on(indices: Sequence[int] | None) -> Device:
        assert indices is not None, "there is a draft"
        return [devices[index] for index in indices]

    of_target = on(plan_placement(sizes[target], largest, usable, placement).target)
    return of_target, {
        source: on(plan_placement(sizes[target], sizes[source], usable, placement).draft) for source in drafts
    }


def _load(source: DraftSource, target: Any, options: dict[str, Any]) -> AnyDraft:
    if source.kind == "table":
        return NgramTable.load(Path(source.place) / _FILES["table"])
    if source.kind in MODELS:
        return _fused(*load_pretrained(source.place, **options))
    if source.head is None:  # a damaged head of our own format: its loader says what is wrong
        from specdec.heads import eagle

        head: Any = eagle.load_head(source.place, target, options["load_format"])
    else:
        head = _as_trained(source.head, target, options["load_format"])
    if options["quantization"]:
        head.quantize(options["quantization"])
    head.fuse()
    if (rates := Path(source.place) / RATES_FILE).is_file():
        head.rates = Rates.load(rates)
    return cast("Head", head)


def _as_trained(found: FoundHead, target: Any, load_format: str) -> Head:
    """The head, read as `specdec.heads.convention` measured, if it did."""
    from specdec.heads.convention import stored_options

    head: Head = found.load(target, load_format)
    if load_format == "auto":
        found.warn_of_embedding(target)
        if options := stored_options(found.folder.path, target):
            head = head.with_options(options)
    return head


def _fused(model: Any, tokenizer: Any) -> CausalLM | Seq2SeqLM:
    from specdec.models.causal import CausalLM
    from specdec.models.fusion import fuse
    from specdec.models.seq2seq import Seq2SeqLM

    if model.config.is_encoder_decoder:
        return Seq2SeqLM(model, tokenizer)
    if _is_plain(model):
        fuse(model)
    return CausalLM(model, tokenizer)


def _is_plain(model: Any) -> bool:
    """Whether all weights are ordinary numbers on one device."""
    weights = list(model.parameters())
    return all(type(weight) is nn.Parameter and weight.is_floating_point() for weight in weights) and (
        len({weight.device for weight in weights}) == 1
    )


_KINDS = ("a decoder-only model", "an encoder-decoder")


def check_kinds(target: HasVocabulary, kind: Kind) -> None:
    """Raise ValueError if no draft of this kind can propose tokens for the target."""
    require(
        not is_head(kind) or not target.is_encoder_decoder,
        "a head needs the features of a decoder-only target, but this one is an encoder-decoder; use a draft model of "
        'its family, or method="ngram", which copies from the prompt, too',
    )


def check_draft(target: LanguageModel, draft: AnyDraft) -> SharedVocabulary | None:
    """What the vocabularies of a target and of its draft share, where they differ; None where they do not.

    Raises ValueError if the draft cannot propose tokens for the target.
    """
    kind = kind_of(draft)
    check_kinds(target, kind)
    if kind in MODELS:
        return share_vocabulary(target, cast("LanguageModel", draft), target.device)
    _check_vocab_size(target.vocab_size, draft.vocab_size)
    return None


def can_be_recorded(target: LanguageModel, draft: AnyDraft | None = None) -> bool:
    """Whether all that a step computes is on one device, and needs nothing that only the host can tell."""
    source: Any = draft
    if draft is None or kind_of(draft) == "table":
        return target.is_recordable
    is_recordable = is_head(kind_of(draft)) or source.is_recordable
    return bool(target.is_recordable and is_recordable and source.device == target.device)


def share_vocabulary(
    target: HasVocabulary, draft: HasVocabulary, device: torch.device | str = "cpu"
) -> SharedVocabulary | None:
    """What the vocabularies of a target and of a draft model share, where they differ; None where they do not.

    device: of the tensors of what is returned.

    Raises ValueError if they share too little, if there are no tokenizers to tell by, or if one is an encoder-decoder
    and the other is not; both being one, their vocabularies must be the same.
    """
    kinds = [_KINDS[model.is_encoder_decoder] for model in (target, draft)]
    require(kinds[0] == kinds[1], f"the draft model, {kinds[1]}, must be {kinds[0]} as the target is; use such a draft")
    tokenizers = [target.tokenizer, draft.tokenizer]
    sizes = target.vocab_size, draft.vocab_size
    if (
        target.is_encoder_decoder
        or not all(tokenizers)
        or (sizes[0] == sizes[1] and tokenizers[0].get_vocab() == tokenizers[1].get_vocab())
    ):
        check_same_vocabulary(target, draft)
        return None
    shared = share(tokenizers[0], tokenizers[1], sizes, device)
    check_coverage(shared, tokenizers[0], sizes)
    return shared


def check_same_vocabulary(target: HasVocabulary, draft: HasVocabulary) -> None:
    """Raise ValueError unless token ids mean the same to both models."""
    _check_vocab_size(target.vocab_size, draft.vocab_size)
    tokenizers = [target.tokenizer, draft.tokenizer]
    if all(tokenizers):
        target_tokens, draft_tokens = (tokenizer.get_vocab() for tokenizer in tokenizers)
        different = min((token for token, _ in target_tokens.items() ^ draft_tokens.items()), default=None)
        require(
            target_tokens == draft_tokens,
            f"the draft's tokenizer must be the target's, but token {different!r} is "
            f"{target_tokens.get(different)} for the target and {draft_tokens.get(different)} for the draft; "
            "use a draft of the same family",
        )


def _check_vocab_size(target: int, draft: int) -> None:
    require(
        target == draft,
        f"the draft's vocabulary of {draft} tokens must be the target's, {target}; use a draft of the same family",
    )
