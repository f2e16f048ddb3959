"""Which reading of a checkpoint a head was trained with, measured by how much of its drafts the target would accept.

Layer ids off by one, states before or after the final norm, two meanings of one config key, the order of concatenated
inputs: a checkpoint does not reliably tell, and a wrong guess leaves the output correct while hardly any draft is
accepted (1.2 % in vllm-project/vllm#50170). So each reading that a head offers by `choices` is tried on a few texts of
the target's own: drafts begin at many places of a text, are continued with the text's tokens, and count by the overlap
of both distributions, the probability that speculative sampling accepts a token.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.heads.base import Choice
from specdec.models.base import FINAL, FeatureLayers, LanguageModel
from specdec.models.files.saving import fingerprint
from specdec.runtime.artifacts import cache_root
from specdec.runtime.json_files import fields, read_json
from specdec.runtime.private_files import make_private_folder

CONVENTION_FILE = "convention.json"  # in a head's folder, the reading that was measured to be right
MAX_READINGS = 96
_RESAMPLES, _ERROR = 4000, 0.01  # of the bootstrap; chance that its interval misses the difference
_SAME = 1e-3  # accepted tokens per draft: readings that differ by less are equally good


# ---- the readings of a head


def feature_layer_choice(layers: FeatureLayers, num_layers: int, name: str = "feature layers") -> Choice:
    """The readings of feature layers, by the option "feature_layers".

    As they are, one later and one earlier; each also in reverse order, and with the last layer's output before the
    final norm instead of after it or the other way round. num_layers: of the target.
    """
    shifted = [tuple(each if each == FINAL else each + by for each in layers) for by in (0, 1, -1)]
    valid = [each for each in shifted if all(layer == FINAL or 0 <= layer <= num_layers for layer in each)]
    readings = [other for each in valid for other in (each, _other_end(each, num_layers))]
    readings += [each[::-1] for each in readings]
    return Choice(name, {_label(each): {"feature_layers": list(each)} for each in readings})


def _other_end(layers: FeatureLayers, num_layers: int) -> FeatureLayers:
    """With the final features for those before the final norm, and the other way round."""
    other = {FINAL: num_layers, num_layers: FINAL}
    return tuple(other.get(layer, layer) for layer in layers)


def _label(layers: FeatureLayers) -> str:
    return ", ".join("final" if layer == FINAL else str(layer) for layer in layers)


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a checkpoint. labels: the reading of each choice, by its name. options: for `with_options`."""

    labels: Mapping[str, str]
    options: Mapping[str, Any]


def readings(choices: Sequence[Choice]) -> list[Reading]:
    """All combinations, the head's own first. Raises ValueError if there are more than MAX_READINGS."""
    made = []
    for combination in itertools.product(*(choice.readings.items() for choice in choices)):
        labels = {choice.name: label for choice, (label, _) in zip(choices, combination, strict=True)}
        made.append(Reading(labels, {key: value for _, options in combination for key, value in options.items()}))
    if len(made) > MAX_READINGS:
        raise ValueError(
            f"{len(made)} readings of {', '.join(each.name for each in choices)} are more than "
            f"{MAX_READINGS}; leave some of them out"
        )
    return made


# ---- measuring


@dataclass(frozen=True, slots=True)
class Text:
    """A text that the target generated. tokens: of prompt and output. num_prompt: how many of them are the prompt."""

    tokens: Sequence[int]
    num_prompt: int


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A reading and the expected accepted tokens per draft, float64 [texts], the mean over a text's places."""

    reading: Reading
    accepted: np.ndarray

    @property
    def mean(self) -> float:
        """Over all texts."""
        return float(self.accepted.mean())


@torch.inference_mode()
def measure(
    target: LanguageModel, head: Any, texts: Sequence[Text], num_tokens: int = 3, num_places: int = 24
) -> list[Measured]:
    """Expected accepted tokens of each reading of a head, in the order of `readings`.

    num_tokens: tokens per draft. num_places: drafts per text, at the most.
    Raises ValueError without texts that are long enough.
    """
    num_tokens = min(num_tokens, head.max_tokens or num_tokens)
    heads = [(each, head.with_options(each.options)) for each in readings(head.choices())]
    layers = tuple(sorted({layer for _, other in heads for layer in other.feature_layers}))
    accepted: list[list[float]] = [[] for _ in heads]
    for text in texts:
        places = _places(text, num_tokens, num_places)
        if not places:
            continue
        states, probs = _scored(target, text, layers)
        for row, (_, other) in zip(accepted, heads, strict=True):
            features = torch.cat([states[layer] for layer in other.feature_layers], -1)
            tokens = torch.tensor(text.tokens, device=features.device)
            row.append(_accepted(other, features, tokens, probs, places, num_tokens))
    if not accepted[0]:
        raise ValueError(f"texts={len(texts)} must have outputs of more than {num_tokens} tokens; use longer ones")
    return [Measured(reading, np.array(row)) for (reading, _), row in zip(heads, accepted, strict=True)]


def _places(text: Text, num_tokens: int, num_places: int) -> list[int]:
    """Places of the newest token of drafts, spread over the output: they need two tokens before them."""
    first, end = max(2, text.num_prompt - 1), len(text.tokens) - num_tokens
    if end <= first:
        return []
    return sorted({int(place) for place in np.linspace(first, end - 1, min(num_places, end - first))})


def _scored(target: LanguageModel, text: Text, layers: FeatureLayers) -> tuple[dict[int, Tensor], Tensor]:
    """Hidden states of these layers, [tokens, width] each, and the target's next-token probabilities after each token.

    The target reads the text once, with all layers of all readings.
    """
    tokens = torch.tensor([list(text.tokens)], device=target.device)
    cache = target.allocate(1, tokens.shape[1], features=layers)
    logits = target.forward(tokens, cache)
    assert cache.features is not None
    widths = [_width(target, layer) for layer in layers]
    states = cache.features[0].split(widths, -1)
    return dict(zip(layers, states, strict=True)), logits[0].float().softmax(-1)


def _width(target: LanguageModel, layer: int) -> int:
    features = target.allocate(1, 1, features=(layer,)).features
    assert features is not None
    return features.shape[-1]


Drafter = Callable[[Any, Tensor, Tensor, list[int], int], Iterator[Tensor]]


def _accepted(head: Any, features: Tensor, tokens: Tensor, probs: Tensor, places: list[int], num_tokens: int) -> float:
    """Mean expected accepted tokens of drafts of num_tokens after these places, continued with the text's tokens."""
    rows, survival, total = torch.tensor(places, device=tokens.device), torch.ones(len(places)), torch.zeros(1)
    vocabulary = head.draft_vocabulary
    for index, logits in enumerate(_DRAFTERS[head.drafting](head, features, tokens, places, num_tokens)):
        wanted = probs[rows + index][:, vocabulary.to(probs.device)]
        survival = survival * torch.minimum(wanted, logits.float().softmax(-1)).sum(-1).cpu()
        total = total + survival.mean()
    return float(total)


def _drafts_of_sequential(
    head: Any, features: Tensor, tokens: Tensor, places: list[int], num_tokens: int
) -> Iterator[Tensor]:
    """Logits [places, draft vocab] of each draft position. One slot per place, all copies of one pass over the text."""
    cache = head.allocate(len(places), len(tokens) + num_tokens)
    head.forward(head.encode(features[:-1].unsqueeze(0)), tokens[1:].unsqueeze(0), cache)
    _copy(cache, [place - 1 for place in places])  # cache position i is of token i + 1
    rows = torch.tensor(places, device=tokens.device)
    states = head.encode(features[rows - 1].unsqueeze(1))
    for index in range(num_tokens):
        states = head.forward(states, tokens[rows + index].unsqueeze(1), cache)
        cache.num_cached = [length + 1 for length in cache.num_cached]
        yield head.logits(states)[:, 0]


def _drafts_of_block(
    head: Any, features: Tensor, tokens: Tensor, places: list[int], num_tokens: int
) -> Iterator[Tensor]:
    cache = head.allocate(len(places), len(tokens) + head.max_tokens + 1)
    head.extend(features[:-1].unsqueeze(0), tokens[1:].unsqueeze(0), cache)
    _copy(cache, places)
    rows = torch.tensor(places, device=tokens.device)
    newest = tokens[rows]
    block = head.block(newest, num_tokens, cache)
    for index in range(num_tokens):
        drafted = torch.stack([tokens[rows + 1 + before] for before in range(index)], 1) if index else newest[:, None]
        yield head.logits(block, newest, drafted[:, :index])[:, 0]


def _drafts_of_stateless(
    head: Any, features: Tensor, tokens: Tensor, places: list[int], num_tokens: int
) -> Iterator[Tensor]:
    rows = torch.tensor(places, device=tokens.device)
    states = head.start(features[rows - 1].unsqueeze(1))
    for index in range(num_tokens):
        states = head.advance(index, states, tokens[rows + index].unsqueeze(1))
        yield head.logits(index, states)[:, 0]


_DRAFTERS: dict[str, Drafter] = {
    "sequential": _drafts_of_sequential,
    "block": _drafts_of_block,
    "stateless": _drafts_of_stateless,
}


def _copy(cache: Any, lengths: list[int]) -> None:
    """Let each slot hold this many of the tokens in the first one, which is cut last."""
    for slot in reversed(range(len(lengths))):
        cache.copy_slot(0, slot, lengths[slot])


# ---- the decision


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the measurement says.

    best: the reading with the most accepted tokens. is_own: whether that is the head's own, or as good as it.
    low, high: 99 % interval of how much more it accepts than the head's own reading.
    rival: the best reading that is not equally good. is_certain: whether best is better than that beyond noise.
    """

    best: Measured
    own: Measured
    rival: Measured | None
    low: float
    high: float
    is_own: bool
    is_certain: bool


def verdict(measured: Sequence[Measured]) -> Verdict:
    """The reading that a head was trained with. The head's own, the first, is kept unless another is surely better.

    Intervals are of a paired bootstrap over texts, whose places are not independent of each other.
    """
    own, best = measured[0], max(measured, key=lambda each: each.mean)
    low, high = difference(best, own)
    is_own = best is own or low <= 0 or best.mean - own.mean < _SAME
    best = own if is_own else best
    others = [each for each in measured if np.abs(each.accepted - best.accepted).max() >= _SAME]
    rival = max(others, key=lambda each: each.mean, default=None)
    is_certain = rival is None or difference(best, rival)[0] > 0
    return Verdict(best, own, rival, low, high, is_own, is_certain)


def difference(one: Measured, other: Measured) -> tuple[float, float]:
    """99 % interval of how many more tokens one reading has accepted than another, per draft."""
    differences = one.accepted - other.accepted
    chosen = np.random.default_rng(0).integers(0, len(differences), (_RESAMPLES, len(differences)))
    low, high = np.quantile(differences[chosen].mean(1), [_ERROR / 2, 1 - _ERROR / 2])
    return float(low), float(high)


def table(measured: Sequence[Measured], found: Verdict, limit: int = 12) -> str:
    """The best readings for people, with how many tokens they have accepted per draft, and the conclusion."""
    names = list(found.own.reading.labels)
    ranked = sorted(measured, key=lambda each: -each.mean)
    shown = ranked[:limit] + [found.own] * (found.own not in ranked[:limit])
    rows = [[*(each.reading.labels[name] for name in names), f"{each.mean:.3f}", _mark(each, found)] for each in shown]
    head = [*names, "accepted per draft", ""]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    hidden = len(ranked) - len(shown)
    return "\n".join([*lines, *([f"... and {hidden} more"] if hidden > 0 else []), conclusion(found)])


def _mark(each: Measured, found: Verdict) -> str:
    marks = {"trained with": each is found.best, "as the checkpoint says": each is found.own}
    return ", ".join(mark for mark, holds in marks.items() if holds)


def conclusion(found: Verdict) -> str:
    """The verdict in a sentence."""
    names = ", ".join(f"{name}: {label}" for name, label in found.best.reading.labels.items())
    if found.is_own:
        certainty = "better than all others" if found.is_certain else "not surely better than others: use more prompts"
        return f"The head is read as its checkpoint says ({names}), {certainty}."
    certainty = "" if found.is_certain else " Readings close to it are not surely worse: use more prompts."
    return (
        f"The head was trained with {names}: {found.low:.3f} to {found.high:.3f} more tokens are accepted per draft "
        f"(99 % interval) than as the checkpoint says.{certainty}"
    )


# ---- storing it


def store(folder: Path, target: Any, found: Verdict) -> Path:
    """Write the reading for the next load, beside the head or, where that cannot be written, into the cache.

    Returns the file. target: the transformers model, not fused.
    """
    record = {
        "target": fingerprint(target),
        "options": dict(found.best.reading.options),
        "readings": dict(found.best.reading.labels),
        "accepted_per_draft": round(found.best.mean, 4),
        "accepted_per_draft_as_given": round(found.own.mean, 4),
        "is_certain": found.is_certain,
    }
    text = json.dumps(record, indent=1) + "\n"
    try:
        (folder / CONVENTION_FILE).write_text(text)
        return folder / CONVENTION_FILE
    except OSError:
        path = _cached(folder)
        make_private_folder(path.parent)
        path.write_text(text)
        return path


def stored_options(folder: Path, target: Any) -> dict[str, Any]:
    """The options that were stored for a head and this transformers target; {} if there are none.

    What was measured with another target is not used, and logged. Raises ValueError for a damaged file.
    """
    path = next((each for each in (folder / CONVENTION_FILE, _cached(folder)) if each.is_file()), None)
    if path is None:
        return {}
    rule = "convention must be a JSON file with target and options; measure it again, or remove it"
    measured, options = read_json(path, rule, lambda value: (str(value["target"]), dict(fields(value["options"]))))
    if measured != fingerprint(target):
        logging.getLogger("specdec").warning(
            "%s was measured with another target and is not used; measure it again with `python -m specdec.distill "
            "convention`, or remove it",
            path,
        )
        return {}
    return options


def _cached(folder: Path) -> Path:
    """Where the reading of a head in a folder that cannot be written is stored: by its place and its config."""
    key = hashlib.sha256(str(folder.resolve()).encode() + (folder / "config.json").read_bytes()).hexdigest()
    return cache_root() / "conventions" / f"{key[:16]}.json"
