"""The registry of head formats: how each is recognized by its config and tensors, and loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specdec.heads import eagle, eagle3, medusa, mlp_speculator, mtp, p_eagle
from specdec.heads.blocks import dflash, dflash2, domino, dspark
from specdec.heads.files import CONFIG, HeadFolder, PickleError
from specdec.models.base import FINAL, FeatureLayers
from specdec.runtime.artifacts import LoadError

_LOG = logging.getLogger("specdec")
_EMBEDDING = "embed_tokens.weight"
_SAMPLED_ROWS, _RESEMBLANCE = 64, 0.3  # of random rows the cosine is about 1 / sqrt(width)


@dataclass(frozen=True, slots=True)
class HeadFormat:
    """A checkpoint format.

    name: also that of its method. title: for people, "EAGLE-3 head". signs: what it is recognized by, for people.
    recognize: the dialect of a folder of this format ("SpecForge"), None for any other folder.
    load: of (folder, the transformers target, load_format as `load_pretrained` takes it) makes the head, in the
    target's dtype and on its device; raises LoadError for a damaged folder and ValueError for another target's. It is
    first called with a folder and a target whose weights are shapes alone, on the "meta" device: see `FoundHead.check`.
    """

    name: str
    title: str
    signs: str
    recognize: Callable[[HeadFolder], str | None]
    load: Callable[[HeadFolder, Any, str], Any]


FORMATS: tuple[HeadFormat, ...] = (
    HeadFormat("eagle", "EAGLE head", "draft_vocabulary.json beside the weights", eagle.recognize, eagle.load),
    HeadFormat(
        *("eagle3", "EAGLE-3 head", "layers.0.self_attn.q_proj of inputs twice as wide as o_proj's outputs"),
        eagle3.recognize,
        eagle3.load,
    ),
    HeadFormat("p_eagle", "P-EAGLE head", "mask_hidden beside EAGLE-3's tensors", p_eagle.recognize, p_eagle.load),
    HeadFormat("mtp", "MTP layer", "mtp.fc, mtp_layers.*.input_proj or layers.*.eh_proj", mtp.recognize, mtp.load),
    HeadFormat(
        "dflash", "DFlash head", "hidden_norm.weight and fc.weight, and a block_size", dflash.recognize, dflash.load
    ),
    HeadFormat("dflash2", "DFlash2 head", "candidate_selector.*", dflash2.recognize, dflash2.load),
    HeadFormat("dspark", "DSpark head", "markov_head.markov_w1.weight", dspark.recognize, dspark.load),
    HeadFormat("domino", "Domino head", "prefix_gru.weight_ih_l0", domino.recognize, domino.load),
    HeadFormat("medusa", "Medusa heads", "0.0.linear.weight", medusa.recognize_medusa, medusa.load_medusa),
    HeadFormat("hydra", "Hydra heads", "hydra_mlp.*", medusa.recognize_hydra, medusa.load_hydra),
    HeadFormat(
        *("mlp_speculator", "MLP speculator", "emb.0.weight, proj.0.weight and ln.0.weight"),
        mlp_speculator.recognize,
        mlp_speculator.load,
    ),
)


@dataclass(frozen=True, slots=True)
class FoundHead:
    """A head in a folder. dialect: as its format names it."""

    format: HeadFormat
    folder: HeadFolder
    dialect: str

    def load(self, target: Any, load_format: str = "auto") -> Any:
        """The head, see `HeadFormat.load`."""
        return self.format.load(self.folder, target, load_format)

    def check(self, skeleton: Any) -> str:
        """What the head is, in a phrase; found out by loading its shapes for those of its target, without any weights.

        skeleton: the transformers target on the "meta" device. Raises what `HeadFormat.load` raises.
        """
        return self.described(self.format.load(replace(self.folder, only_shapes=True), skeleton, "auto"))

    def warn_of_context(self, target: Any) -> None:
        """Log a warning if the head was trained for shorter texts than its target reads."""
        context_length = self.folder.config.get("max_position_embeddings")
        target_length = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if isinstance(context_length, int) and isinstance(target_length, int) and context_length < target_length:
            _LOG.warning(
                "max_position_embeddings=%d of the head %r is below the target's, %d: it may draft badly beyond it",
                *(context_length, str(self.folder.path), target_length),
            )

    def warn_of_embedding(self, target: Any) -> None:
        """Log a warning if the head has an embedding of its own that does not resemble its target's.

        Heads start from a copy of it; a random one was once exported in its place (TorchSpec#38).
        """
        target_embedding = target.get_input_embeddings().weight.detach()
        if self.folder.shapes.get(_EMBEDDING) != tuple(target_embedding.shape):
            return
        rows = torch.linspace(0, len(target_embedding) - 1, _SAMPLED_ROWS).long().unique()
        stored = self.folder.read_rows(_EMBEDDING, rows.tolist()).float()
        resemblance = float(
            torch.cosine_similarity(stored, target_embedding[rows.to(target_embedding.device)].cpu().float()).median()
        )
        if resemblance < _RESEMBLANCE:
            _LOG.warning(
                "%s of the head %r does not resemble the target's embedding (median cosine %.2f): if it was not "
                "trained, hardly any draft will be accepted; compare with another export of the head",
                *(_EMBEDDING, str(self.folder.path), resemblance),
            )

    def described(self, head: Any) -> str:
        """For people: format, dialect, number of layers, draft vocabulary and features."""
        num_tokens = f"draft vocabulary {len(head.draft_vocabulary)} of {head.vocab_size}"
        parts = [f"{self.format.title} ({self.dialect})", num_tokens, features(head.feature_layers)]
        if head.max_tokens is not None:
            parts.insert(1, f"{head.max_tokens} draft positions")
        if (layers := getattr(head, "layers", None)) is not None:
            parts.insert(1, f"{len(layers)} layer{'s' * (len(layers) != 1)}")
        return ", ".join(parts)


def features(layers: FeatureLayers) -> str:
    """Feature layers for people."""
    if layers == (FINAL,):
        return "final features"
    names = ", ".join("final" if layer == FINAL else str(layer) for layer in layers)
    return f"features of layer{'s' * (len(layers) != 1)} {names}"


def recognized(path: Path, *, allow_pickle: bool = False) -> FoundHead | None:
    """The head in a folder; None if there is none in it.

    Raises PickleError for weights that are only pickled and not allowed, see `HeadFolder.open`.
    """
    if not (path / CONFIG).is_file():
        return None
    try:
        folder = HeadFolder.open(path, allow_pickle=allow_pickle)
    except PickleError:
        raise
    except (LoadError, ValueError):
        return None  # the loader of models says what is wrong
    dialects = ((each, each.recognize(folder)) for each in FORMATS)
    return next((FoundHead(each, folder, dialect) for each, dialect in dialects if dialect is not None), None)
