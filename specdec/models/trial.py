"""The trial of a loaded model: per-row positions, a rollback and token trees give the logits of plain forward calls."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.models.base import prefill
from specdec.models.early_exit import first_layers
from specdec.models.refusals import UnsupportedModelError, cannot_decode
from specdec.models.state.ragged import RaggedCache
from specdec.models.state.recurrent import RecurrentCache
from specdec.trees.columns import Branches
from specdec.trees.shape import Tree

# `lm` is a CausalLM, whose module imports this one, or where a docstring allows it a Seq2SeqLM


@torch.inference_mode()
def check_ragged_equals_plain(lm: Any) -> None:
    """Compare logits from the ragged cache with those of plain forward calls, at each relevant length."""
    for threshold in _thresholds(lm):
        name, ends = type(lm.model).__name__, _ends(threshold, lm.context_length)
        tried = _for_trial(lm, threshold)
        tokens = lm._positions.without_padding(torch.arange(ends[-1]).mul(7919).remainder(lm.vocab_size).tolist())
        try:
            expected = _plain_logits(tried, tokens, ends)
            logits, cache = _ragged_logits(tried, tokens, threshold)
            actual = logits[[end - ends[-1] - 1 for end in ends]]
        except Exception as error:  # any exception of a model's forward means that it is unsupported
            raise UnsupportedModelError(cannot_decode(lm.model, error)) from error
        check_logits(actual, expected, name, rounding(lm.dtype, lm.num_layers))
        if isinstance(cache, RecurrentCache):
            _check_states(tried, cache, tokens, threshold)


def _thresholds(lm: Any) -> list[int]:
    """Lengths at which the model's computation may change, from its config, and the length of a short trial.

    Of a local layer, that is where its ring is first overwritten, which its window ends before.
    """
    rings = {each.size: each.num_columns(lm.context_length) for each in lm.local if each}
    overwritten = {size: number for size, number in rings.items() if number < lm.context_length}
    named = {6, *overwritten.values(), *_named_lengths(lm.config.to_dict(), overwritten)}
    longest = max(2, lm.context_length - 4)
    return sorted({min(length, longest) for length in named if length < lm.context_length})


def _named_lengths(config: Mapping[str, Any], known: Container[int] = ()) -> Iterator[int]:
    """Window and chunk sizes and their doubles, in case of a second window, and lengths where rotary factors change.

    known: sizes that are tried anyway.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _named_lengths(value, known)
        elif type(value) is int and value > 1 and _LENGTHS.search(name) and not _is_about_fixed_factors(config, name):
            if ("window" in name or "chunk" in name) and value in known:
                continue
            yield from (value, 2 * value) if "window" in name or "chunk" in name else (value,)


_LENGTHS = re.compile(r"window(?!_layers)|chunk|block_size|block_length|floor_scale|index_topk|original_max_position")
_FIXED_FACTORS = {"default", "linear", "yarn", "llama3", "proportional"}  # rotary factors computed once for all lengths


def _is_about_fixed_factors(config: Mapping[str, Any], name: str) -> bool:
    """Whether a length only describes how fixed rotary factors were computed."""
    rope = config if "rope_type" in config else config.get("rope_parameters") or {}
    return (
        name.startswith("original_max") and rope.get("rope_type") in _FIXED_FACTORS and "scaling_beta" not in str(rope)
    )


def _for_trial(lm: Any, length: int) -> Any:
    """The model, or for long texts its first layers, including one of each kind, over the same weights."""
    kinds = getattr(lm.config, "layer_types", None) or ()
    kept = next((n for n in range(2, len(kinds)) if set(kinds[:n]) == set(kinds)), 2)
    if length <= _LONG_TRIAL or kept >= lm.num_layers or lm.is_spread:
        return lm
    shorter = first_layers(lm.model, lm.num_layers, kept)
    if shorter is None:
        return lm
    twin = object.__new__(type(lm))
    twin._describe(shorter, None)
    return twin


_LONG_TRIAL = 256  # longest text, in tokens, that is tried with all layers


def _check_states(lm: Any, cache: RecurrentCache, tokens: list[int], threshold: int) -> None:
    """Compare the recurrent states that the trial left in slot 1 with those of a new slot that nothing was rejected in.

    A state that hardly matters to the logits of a short text may matter later.
    """
    new = lm.allocate(1, len(tokens))
    assert isinstance(new, RecurrentCache), "so is the model's other cache"
    for chunk in _chunks(tokens, threshold):
        prefill(lm, chunk, new, 0)
    lm.forward(torch.tensor([tokens[new.num_cached[0] :]], device=lm.device), new)
    for (layer, actual), (_, expected) in zip(cache.states(1, len(tokens)), new.states(0, len(tokens)), strict=True):
        difference = (actual.float() - expected.float()).norm() / expected.float().norm()
        if not difference <= rounding(lm.dtype, lm.num_layers):
            raise UnsupportedModelError(
                f"the recurrent state of layer {layer} of {type(lm.model).__name__} differs after a rejection (by "
                f"{difference:.2g} of its norm), so its output would be wrong; use another model"
            )


def _ends(threshold: int, context_length: int) -> list[int]:
    """Text lengths at which logits are compared: below, at and beyond a threshold."""
    ends = (
        range(threshold - 1, threshold + 4) if threshold <= _LONG_TRIAL else (threshold, threshold + 1, threshold + 3)
    )
    return [end for end in ends if 0 < end <= context_length]


def _plain_logits(lm: Any, tokens: Sequence[int], ends: Sequence[int]) -> Tensor:
    """Logits after the first `end` tokens for each of `ends`, each by an uncached call, [len(ends), vocab]."""

    def after(end: int) -> Tensor:
        inputs = torch.tensor([tokens[:end]], device=lm.device)
        return lm.model(input_ids=inputs, use_cache=False, logits_to_keep=1).logits[0, -1].to(lm.device)  # type: ignore[no-any-return]

    return torch.stack([after(end) for end in ends])


def _ragged_logits(lm: Any, tokens: list[int], threshold: int) -> tuple[Tensor, RaggedCache]:
    """Logits after each token, starting just before the threshold, [positions, vocab], and the cache.

    The tokens are fed in chunks to slot 1, which held others, the last chunk in a batch with a longer and a shorter row
    and after other tokens in its place were rejected.
    """
    cut = max(0, threshold - 2)
    longer, shorter = tokens[::-1][: cut + 3], tokens[:1]
    cache = lm.allocate(3, max(len(tokens), len(longer) + len(tokens) - cut))
    for slot, text in enumerate((longer, tokens[::-1], shorter)):
        prefill(lm, text, cache, slot)
    cache.num_cached[1] = 0
    for chunk in _chunks(tokens, threshold):
        prefill(lm, chunk, cache, 1)
    last = torch.tensor([tokens[cut:]] * 3, device=lm.device)
    wrong = torch.cat([last[:, :1], (last[:, 1:] + 1) % lm.vocab_size], 1)
    first = lm.forward(wrong, cache)[1, :1]
    cache.num_cached[:] = [length + 1 for length in cache.num_cached]
    logits = torch.cat([first, in_two_calls(lm, last[:, 1:], cache)[1]]) if last.shape[1] > 1 else first
    return logits, cache


def _chunks(tokens: list[int], threshold: int) -> list[list[int]]:
    """The tokens that the trial reads as a prompt, in two pieces."""
    cut = max(0, threshold - 2)
    return [chunk for chunk in (tokens[: cut // 2], tokens[cut // 2 : cut]) if chunk]


def in_two_calls(lm: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Logits of tokens [rows, width], the last of which is fed alone, for which some models ignore the mask."""
    if tokens.shape[1] == 1:
        return lm.forward(tokens, cache)  # type: ignore[no-any-return]
    before = lm.forward(tokens[:, :-1], cache)
    cache.num_cached[:] = [length + tokens.shape[1] - 1 for length in cache.num_cached]
    return torch.cat([before, lm.forward(tokens[:, -1:], cache)], 1)


def check_logits(actual: Tensor, expected: Tensor, name: str, tolerance: float) -> None:
    """Raise UnsupportedModelError unless logits with the ragged cache equal those of a plain forward call.

    tolerance: from `rounding`, by the dtype of the weights: some models in 16 bits have logits in float32.
    """
    difference = (actual.float() - expected.float()).norm() / expected.float().norm()
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"the logits of {name} differ between calls with and without per-row positions (relative difference "
            f"{difference:.2g} must be <= {tolerance:g}), so its output would be wrong; use another model"
        )


def rounding(dtype: torch.dtype, num_layers: int) -> float:
    """Tolerance for rounding differences between two computations of the same logits, relative to their norm.

    In 16-bit formats it grows with depth: 32 layers of random weights in bfloat16 differed by 0.059 on an H100.
    """
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.05 * max(1.0, num_layers / 16)


@torch.inference_mode()
def check_tree_equals_plain(lm: Any) -> None:
    """Compare logits after the nodes of a small tree with those of a plain forward along each path.

    lm: a CausalLM or a Seq2SeqLM. Raises UnsupportedModelError if they differ.
    """
    name = type(lm.model).__name__
    text, nodes = ([token % lm.vocab_size for token in tokens] for tokens in ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]))
    tree = Tree(((0,), (1,), (0, 0), (1, 0), (1, 1)))
    cache, num_prompt = lm.allocate(1, len(text) + len(nodes)), 2
    prefill(lm, text[:-1], cache, 0, num_prompt=num_prompt)
    tokens = torch.tensor([[text[-1], *nodes]], device=lm.device)
    logits = lm.forward(tokens, cache, branches=Branches.after_root(tree.parents))[0].float()
    for node in (2, 4):
        path = [*text, *(nodes[i] for i in tree.lineage(node))]
        expected = prefill(lm, path, lm.allocate(1, len(path)), 0, num_prompt=num_prompt)[0, -1].float()
        difference = (logits[node + 1] - expected).norm() / expected.norm()
        if not difference <= rounding(lm.dtype, lm.num_layers):
            raise UnsupportedModelError(
                f"the logits of {name} for a token tree differ from those for its paths (relative difference "
                f"{difference:.2g}), so its output would be wrong; use a method that drafts chains, such as eagle"
            )
