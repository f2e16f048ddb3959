"""Checkpoints of heads: tensors by canonical names, what a head borrows of its target, and draft vocabularies.

A checkpoint is compared with the module that its config describes before a tensor is read, so that what does not fit
is refused by the name and the shape of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.heads.files import HeadFolder
from specdec.runtime.artifacts import LoadError

Shapes = Mapping[str, tuple[int, ...]]
OTHER_TARGET = "give the model that the head was trained for, or train a head for this one"


@dataclass(frozen=True, slots=True)
class Lender:
    """The target as a head sees it. config: of its text model. embedding, output: float [vocab, hidden]."""

    config: Any
    embedding: Tensor
    output: Tensor

    @classmethod
    def of(cls, model: Any) -> Lender:
        """Of a transformers model."""
        tensors = (each.weight.detach() for each in (model.get_input_embeddings(), model.get_output_embeddings()))
        return cls(model.config.get_text_config(decoder=True), *tensors)

    @property
    def vocab_size(self) -> int:
        """Size of the target's vocabulary."""
        return int(self.config.vocab_size)

    @property
    def hidden_size(self) -> int:
        """Width of the target's hidden states."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of the target's layers."""
        return int(self.config.num_hidden_layers)


# ---- checkpoints


@dataclass(frozen=True, slots=True)
class Tensors:
    """Tensors of a folder by canonical names.

    names: {canonical: as stored}. is_dummy: whether weights are random, and only maps of token ids are read.
    """

    folder: HeadFolder
    names: dict[str, str]
    is_dummy: bool = False

    @classmethod
    def of(cls, folder: HeadFolder, canonical: Callable[[str], str | None], load_format: str = "auto") -> Tensors:
        """canonical: of a name as stored, None for a tensor that is not the head's.

        Raises LoadError if two tensors have one canonical name.
        """
        names: dict[str, str] = {}
        for name in sorted(folder.shapes):
            if (key := canonical(name)) is not None:
                if key in names:
                    raise LoadError(
                        f"{names[key]!r} and {name!r} of {str(folder.path)!r} must not both be {key!r}; remove one"
                    )
                names[key] = name
        return cls(folder, names, load_format == "dummy")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By canonical name."""
        return {key: self.folder.shapes[name] for key, name in self.names.items()}

    def without(self, keys: Collection[str]) -> Tensors:
        """All but these."""
        return replace(self, names={key: name for key, name in self.names.items() if key not in keys})

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Those of these tensors that there are, by canonical name; no others are read."""
        names = {key: self.names[key] for key in keys if key in self.names}
        drawn = {key: _random(key, self.shapes[key]) for key in names if self.is_dummy and key not in TOKEN_MAPS}
        tensors = self.folder.read({name for key, name in names.items() if key not in drawn})
        return drawn | {key: tensors[name] for key, name in names.items() if key not in drawn}


TOKEN_MAPS = ("d2t", "t2d")


def _random(key: str, shape: tuple[int, ...]) -> Tensor:
    """A weight of "dummy" heads: normal, and near 1 for norms."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * 0.02 + float("norm" in key)


def load_into(module: nn.Module, tensors: Tensors) -> None:
    """Load a module that is on the meta device.

    Raises LoadError for a tensor that is missing, unknown, or of another shape than the module's.
    """
    check_shapes(module, tensors.shapes, tensors.folder.path)
    module.load_state_dict(tensors.read(module.state_dict()), assign=True)


def check_shapes(module: nn.Module, shapes: Shapes, source: Path) -> None:
    """Raise LoadError unless a checkpoint has the tensors of a module, of the same shapes, and no others."""
    wanted, place = module.state_dict(), str(source)
    for key, tensor in wanted.items():
        if key not in shapes:
            raise LoadError(f"{key!r} is missing in the head {place!r}; copy it again, or convert it again")
        if shapes[key] != tuple(tensor.shape):
            raise LoadError(
                f"{key!r} of the head {place!r} has the shape {list(shapes[key])}, but by its config it must have "
                f"{list(tensor.shape)}; correct the config, or copy the head again"
            )
    if unknown := sorted(set(shapes) - set(wanted)):
        raise LoadError(
            f"{', '.join(unknown[:3])} of the head {place!r} are tensors that this format does not have; without them "
            "it might draft wrongly: convert the head, or remove unused tensors"
        )


# ---- vocabularies


def check_draft_vocabulary(tokens: Tensor, vocab_size: int) -> Tensor:
    """The draft vocabulary, int64 [n], n >= 1, if it ascends within [0, vocab_size); else raises ValueError.

    `Partial` distributions are looked up by bisection. With unsorted or duplicate ids, the verified distribution would
    differ from the sampled one and the output would no longer be lossless.
    """
    if tokens.ndim != 1 or not len(tokens) or int(tokens[0]) < 0 or int(tokens[-1]) >= vocab_size:
        raise ValueError(f"draft_vocabulary must be a list of token ids in [0, {vocab_size}); write it again")
    if bool((tokens[1:] <= tokens[:-1]).any()):
        place = int((tokens[1:] <= tokens[:-1]).nonzero()[0])
        raise ValueError(
            f"draft_vocabulary has {int(tokens[place + 1])} after {int(tokens[place])} and must ascend, each token "
            "once; write it again, with the head that was trained for it"
        )
    return tokens


def vocabulary_by_offsets(d2t: Tensor, t2d: Tensor | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The draft vocabulary, ascending, and the row of the head's output for each of its tokens, int64 [n] both.

    d2t: int64 [n], what is added to a draft id to give the target's. t2d: bool [vocab], the target's ids that the head
    knows, or None. Raises LoadError if ids are out of range, occur twice, or are not those of t2d.
    """
    tokens = torch.arange(len(d2t)) + d2t.long()
    if not len(tokens) or int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        place = int(((tokens < 0) | (tokens >= vocab_size)).int().argmax()) if len(tokens) else 0
        raise LoadError(
            f"d2t[{place}]={d2t[place].item() if len(d2t) else None} must be an offset to a token id in "
            f"[0, {vocab_size}): id = {place} + offset; give the target that the head was trained for"
        )
    vocabulary, rows = tokens.sort()
    if bool((vocabulary[1:] == vocabulary[:-1]).any()):
        twice = int(vocabulary[1:][vocabulary[1:] == vocabulary[:-1]][0])
        raise LoadError(
            f"d2t must map to each token once, but token {twice} has two draft ids; were offsets saved as token ids? "
            "convert the head again"
        )
    if t2d is not None:
        known = t2d.bool().nonzero().flatten()
        if not torch.equal(known, vocabulary):
            raise LoadError(
                f"d2t and t2d must name the same tokens, but they name {len(vocabulary)} and {len(known)}, of which "
                f"{len(set(vocabulary.tolist()) & set(known.tolist()))} are shared; convert the head again"
            )
    return vocabulary, rows


SHARED = (*TOKEN_MAPS, "embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class SharedParts:
    """Embedding, output head and draft vocabulary: the head's own where it brings them, else the target's.

    width: of the head's hidden states. is_tied: whether an own embedding is the output head, too, where there is none.
    """

    tensors: Tensors
    lender: Lender
    width: int
    is_tied: bool

    def check(self) -> None:
        """Raise LoadError for tensors that do not fit, and ValueError if the target cannot lend what is missing."""
        shapes, lender, path = self.tensors.shapes, self.lender, self.tensors.folder.path
        if "d2t" not in shapes and self._num_outputs != lender.vocab_size:
            raise LoadError(
                f"lm_head.weight of the head {str(path)!r} has {self._num_outputs} rows, but without d2t it must have "
                f"{lender.vocab_size}, one for each token of the target; copy the head again, d2t with it"
            )
        if "d2t" in shapes and "lm_head.weight" in shapes and shapes["d2t"][0] != self._num_outputs:
            raise LoadError(
                f"lm_head.weight of the head {str(path)!r} has {self._num_outputs} rows, but must have one for each "
                f"entry of d2t, {shapes['d2t'][0]}; copy or convert the head again"
            )
        if shapes.get("embed_tokens.weight", (lender.vocab_size,))[0] < lender.vocab_size:
            raise other_target(
                "number of tokens in embed_tokens.weight", shapes["embed_tokens.weight"][0], lender.vocab_size, path
            )
        for key, part in (("embed_tokens.weight", "embedding"), ("lm_head.weight", "output head")):
            if key in shapes and shapes[key][1] != self.width:
                raise LoadError(
                    f"{key} of the head {str(path)!r} has rows of {shapes[key][1]} numbers, but must have "
                    f"hidden_size={self.width}; correct the config, or copy the head again"
                )
            is_given = key in shapes or (key == "lm_head.weight" and self._uses_embedding)
            if not is_given and self.width != lender.hidden_size:
                raise ValueError(
                    f"{key} is missing in the head {str(path)!r}, whose hidden_size={self.width} is not the "
                    f"target's, {lender.hidden_size}, so that the target's {part} does not fit; "
                    "copy or convert the head again"
                )

    def load(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embedding [vocab, width], output head [draft vocab, width], draft vocabulary int64 [draft vocab]."""
        given, lender = self.tensors.read(SHARED), self.lender
        embedding = given.get("embed_tokens.weight", lender.embedding)
        if "embed_tokens.weight" in given and _is_equal(embedding, lender.embedding):
            embedding = lender.embedding
        output = given.get("lm_head.weight", embedding if self._uses_embedding else lender.output)
        if "d2t" not in given:
            return embedding, output[: lender.vocab_size], torch.arange(lender.vocab_size)
        vocabulary, rows = vocabulary_by_offsets(given["d2t"], given.get("t2d"), lender.vocab_size)
        return embedding, output[(rows if "lm_head.weight" in given else vocabulary).to(output.device)], vocabulary

    @property
    def _uses_embedding(self) -> bool:
        shapes = self.tensors.shapes
        return self.is_tied and "lm_head.weight" not in shapes and "embed_tokens.weight" in shapes

    @property
    def _num_outputs(self) -> int:
        return self.tensors.shapes.get("lm_head.weight", (self.lender.vocab_size,))[0]


def _is_equal(stored: Tensor, lent: Tensor) -> bool:
    return not (stored.is_meta or lent.is_meta) and stored.shape == lent.shape and torch.equal(stored.to(lent), lent)


def check_feature_layers(
    layers: Sequence[int], num_inputs: int, lender: Lender, source: object, *, also: Collection[int] = ()
) -> None:
    """Raise ValueError unless fc reads these hidden states, which the target must have. also: further ids."""
    if num_inputs != len(layers) * lender.hidden_size:
        raise other_target(
            "width of the states that fc.weight reads",
            num_inputs,
            f"{lender.hidden_size} for each of the layers {list(layers)}",
            source,
        )
    for layer in layers:
        if layer not in also and not 0 <= layer <= lender.num_layers:
            raise ValueError(
                f"layer {layer} of {list(layers)}, which the head {str(source)!r} reads, must be in "
                f"[0, {lender.num_layers}], the target's hidden states; give the target that the head was trained for"
            )


def other_target(name: str, value: object, expected: object, source: object) -> ValueError:
    """The error for a head of another target."""
    return ValueError(f"{name}={value} of the head {str(source)!r} must be the target's, {expected}; {OTHER_TARGET}")
