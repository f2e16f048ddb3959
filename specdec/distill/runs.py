"""What the commands that train share: the data, the run itself, and what is recorded and printed of it."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from torch import Tensor

from specdec.distill import training
from specdec.distill.dataset import Dataset
from specdec.distill.students import Student, unscale
from specdec.models.base import FINAL, FeatureLayers
from specdec.models.loading import load_pretrained

FREQUENT = 4096  # most frequent tokens, included in the loss at every training step


def prepare(options: Namespace, layers: FeatureLayers = (FINAL,)) -> tuple[Any, Any, Dataset, Tensor]:
    """The target, its tokenizer, the data set with the states of these layers, and its token counts."""
    options.device = training.own_device(options.device)
    model, tokenizer = load_pretrained(options.target, dtype=torch.bfloat16, device=options.device)
    data = Dataset(options.folder, layers)
    torch.manual_seed(options.seed)
    tokens = torch.from_numpy(data.tokens.astype(np.int64))
    return model, tokenizer, data, tokens.bincount(minlength=model.config.vocab_size).to(model.device)


def largest(counts: Tensor, number: int) -> Tensor:
    """Indices of the largest counts, ascending."""
    return counts.topk(min(number, len(counts))).indices.sort().values


def train(student: Student, data: Dataset, options: Namespace, cost_ratio: float) -> dict[str, Any] | None:
    """Train a student and give it its best weights.

    Returns their evaluation, or None if another process is the one to write the result.
    """
    settings = training.Settings(
        num_steps=options.steps,
        tokens_per_batch=options.tokens_per_batch,
        learning_rate=options.learning_rate,
        evaluate_every=options.evaluate_every,
        seed=options.seed,
    )
    training.train(student, data, settings, options.out / "training", cost_ratio=cost_ratio)
    best = torch.load(options.out / "training" / "best.pt", weights_only=True)
    student.module.load_state_dict(best["module"])
    unscale(student.module)
    if not PartialState().is_main_process:
        return None
    seen = [json.loads(line) for line in (options.out / "training" / "progress.jsonl").read_text().splitlines()]
    return {"held_out": next(line for line in seen if line["step"] == best["step"])}


def print_result(kind: str, best: dict[str, Any], options: Namespace) -> None:
    """Print the held-out evaluation of the best weights in one line."""
    numbers = {name: value for name, value in best["held_out"].items() if isinstance(value, int | float)}
    evaluation = ", ".join(f"{name}={value:.3g}" for name, value in numbers.items())
    print(f"{kind}: in {options.out}; held-out texts at the best step: {evaluation}")


def about(options: Namespace) -> dict[str, Any]:
    """What a draft's config records of how it was made."""
    return {"made_with": asked_for(options)} | machine()


def asked_for(options: Namespace) -> dict[str, Any]:
    """The options of a command that do not name a place."""
    left_out = ("run", "folder", "out", "evaluation")
    return {name: value for name, value in vars(options).items() if name not in left_out}


def machine() -> dict[str, Any]:
    """Versions and the date."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d")}
