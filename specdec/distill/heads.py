"""The command that trains a head, of any of FORMATS."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec.distill.dataset import stored_layers
from specdec.distill.evaluation.cost import head_cost_ratio
from specdec.distill.exports import DIALECTS, check_dialect, export
from specdec.distill.runs import FREQUENT, about, largest, prepare, print_result, train
from specdec.distill.students import BlockStudent, HeadStudent, ParallelStudent, Student
from specdec.distill.students.sequential import PLACE_WEIGHTS
from specdec.distill.training import MAX_DEPTH
from specdec.distill.untrained import new_dflash, new_eagle3, new_mtp, new_p_eagle, train_output
from specdec.heads.eagle import new_head
from specdec.models.base import FINAL, FeatureLayers
from specdec.models.files.saving import fingerprint

FORMATS = ("eagle", *DIALECTS)
DECAY = 0.8  # of the loss weight from a draft token to the next, as in EAGLE-3


def train_head(options: Namespace) -> None:
    """Train a head: EAGLE, EAGLE-3, P-EAGLE, MTP or DFlash."""
    _check(options)
    layers = _layers(options)
    model, _, data, counts = prepare(options, layers)
    whole = options.format in ("mtp", "dflash")  # they draft the whole vocabulary
    vocabulary = torch.arange(len(counts), device=counts.device) if whole else largest(counts, options.vocabulary)
    if options.mask_token is None:
        options.mask_token = int((counts == counts.min()).nonzero()[-1])
    make = _maker(options, layers, vocabulary)
    head = make(model).float()
    if options.train_output:
        train_output(head)
    student = _student(options, head, model, largest(counts[vocabulary], FREQUENT), data.feature_sizes())
    cost_ratio = options.cost_ratio or head_cost_ratio(options.target, make, options.device)
    best = train(student, data, options, cost_ratio)
    if best is None:
        return
    if options.format == "eagle":
        head.save(options.out, fingerprint(model), about(options) | best)
    else:
        shares = options.share_output
        export(head, options.out, model, _dialect(options), about(options) | best, shares_output=shares)
    print_result("head", best, options)


def usual_layers(model: Any) -> list[int]:
    """The hidden states that EAGLE-3 heads usually read: a low, a middle and a high one.

    Source: SafeAILab/EAGLE `eagle/model/modeling_llama_kv.py`.
    """
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return sorted({min(2, num_layers), num_layers // 2, max(1, num_layers - 3)})


def described_dialects() -> str:
    """The dialects of each format, for people."""
    return "; ".join(f"{name}: {', '.join(dialects)}" for name, dialects in DIALECTS.items())


def _check(options: Namespace) -> None:
    """Raise ValueError for options that do not go together, before anything is loaded."""
    if options.format == "eagle":
        if options.dialect or options.train_output or options.share_output:
            raise ValueError('format="eagle" must go without --dialect and options of its output head; leave them out')
        return
    check_dialect(options.format, _dialect(options))
    if options.format in ("mtp", "dflash") and (options.train_output or options.share_output):
        raise ValueError(f"format={options.format!r} must use the target's output head, stored nowhere; leave it out")
    if options.train_output and options.share_output:
        raise ValueError("--share-output must go without --train-output, as a trained output head is not the target's")
    if options.num_tokens < MAX_DEPTH:
        raise ValueError(f"num_tokens={options.num_tokens} must be at least {MAX_DEPTH}, the draft that is evaluated")


def _dialect(options: Namespace) -> str:
    return options.dialect or DIALECTS[options.format][0]


def _layers(options: Namespace) -> FeatureLayers:
    """Hidden states that the head reads. Raises ValueError if `score` stored none for it."""
    if options.format in ("eagle", "mtp"):
        return (FINAL,)
    layers = options.feature_layers or stored_layers(options.folder)
    if not layers:
        raise ValueError(
            f"folder={str(options.folder)!r} must hold hidden states for format={options.format!r}, but has only the "
            "final features; run score with --layers, with a new --folder to which texts.jsonl was copied"
        )
    return tuple(layers)


def _maker(options: Namespace, layers: FeatureLayers, vocabulary: Tensor) -> Callable[[Any], Any]:
    """Makes an untrained head of a transformers model."""
    size = {} if options.num_layers is None else {"num_layers": options.num_layers}
    if options.format == "eagle3":
        return partial(new_eagle3, layers=layers, draft_vocabulary=vocabulary, **size)
    if options.format == "p_eagle":
        masks = {"draft_vocabulary": vocabulary, "mask_token": options.mask_token}
        return partial(new_p_eagle, layers=layers, **masks, **size)
    if options.format == "dflash":
        sizes = {"block_size": options.num_tokens + 1, "mask_token": options.mask_token} | size
        return partial(new_dflash, layers=layers, **sizes)
    return new_mtp if options.format == "mtp" else partial(new_head, draft_vocabulary=vocabulary)


def _student(options: Namespace, head: Any, model: Any, frequent: Tensor, sizes: Tensor) -> Student:
    sizes = sizes.to(model.device)
    if options.format == "dflash":
        return BlockStudent(head, model, frequent, sizes)
    if options.format == "p_eagle":
        return ParallelStudent(head, model, frequent, sizes, options.num_tokens)
    weights = PLACE_WEIGHTS if options.format == "eagle" else [DECAY**place for place in range(options.unroll)]
    return HeadStudent(head, model, frequent, sizes, weights)
