"""The training loop: reproducible batches, evaluation on held-out texts, checkpoints and the best weights."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from specdec.distill.dataset import Dataset, TextBatch
from specdec.distill.students import Guesser, Student
from specdec.runtime.progress import bar

MAX_DEPTH = 4  # draft tokens that are evaluated
EVALUATED = 24  # held-out texts evaluated at each temperature


@dataclass(frozen=True, slots=True)
class Settings:
    """Training settings.

    num_steps: optimizer steps. tokens_per_batch: tokens per step, including padding. learning_rate: peak rate of the
    layers' matrices (Muon, matched to the scale of AdamW); other parameters use AdamW with a third of it. The rate
    rises over the first `warmup` fraction of the steps and falls to zero over the last `decay` fraction.
    evaluate_every, save_every: in steps. seed: for the order of batches, the initial weights and sampled tokens.
    """

    num_steps: int
    tokens_per_batch: int = 4096
    learning_rate: float = 3e-3
    warmup: float = 0.02
    decay: float = 0.9
    evaluate_every: int = 200
    save_every: int = 50
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """The learning rate at a step, relative to its peak."""
        done = step / self.num_steps
        return min(1.0, (done + 1 / self.num_steps) / self.warmup, (1 - done) / self.decay)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Probability that the first, second, ... token of a draft is accepted, with greedy and with sampled text."""

    greedy: list[float]
    sampled: list[float]

    def tokens_per_call(self, gamma: int) -> tuple[float, float]:
        """Expected tokens per target call with drafts of gamma tokens: (greedy, at temperature 1)."""
        return 1 + sum(self.greedy[:gamma]), 1 + sum(self.sampled[:gamma])


def train(student: Student, dataset: Dataset, settings: Settings, folder: Path, *, cost_ratio: float) -> None:
    """Train a student, resuming from folder/checkpoint.pt; writes best.pt (best weights) and progress.jsonl.

    cost_ratio: draft step time / target step time, used to select the best weights.
    Raises ValueError for a damaged checkpoint or one with different settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizers = _optimizers(student.module, settings)
    state = _load(folder / "checkpoint.pt", settings)
    best = 0.0
    if state:
        student.module.load_state_dict(state["module"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        best = state["best"]
    first = state["step"] if state else 0
    _truncate_progress(first, folder / "progress.jsonl")
    device = next(student.module.parameters()).device
    with bar(settings.num_steps, "step", initial=first) as steps:
        for step, indices in _batches(dataset, settings, first):
            random = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            loss = _step(student, optimizers, dataset.batch(indices).to(device), settings, step, random)
            steps.update()
            steps.set_postfix(loss=f"{loss:.3f}")
            done = step + 1
            if done % settings.evaluate_every == 0 or done == settings.num_steps:
                value = _evaluate_and_log(student, dataset, cost_ratio, folder, done, loss)
                if value > best:
                    best = value
                    _save(folder / "best.pt", {"module": student.module.state_dict(), "step": done})
            if done % settings.save_every == 0 or done == settings.num_steps:
                content = {"module": student.module.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
                _save(folder / "checkpoint.pt", content | {"step": done, "best": best, "settings": asdict(settings)})


def _batches(dataset: Dataset, settings: Settings, first: int) -> Iterator[tuple[int, list[int]]]:
    step, epoch = 0, 0
    while True:
        for indices in dataset.training_batches(settings.tokens_per_batch, settings.seed, epoch):
            if step == settings.num_steps:
                return
            if step >= first:
                yield step, indices
            step += 1
        epoch += 1


def _optimizers(module: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim == 2]
    others = [p for p in module.parameters() if p.requires_grad and p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=settings.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=settings.learning_rate / 3, betas=(0.9, 0.95), weight_decay=0.0)]


def _step(
    student: Student,
    optimizers: list[torch.optim.Optimizer],
    batch: TextBatch,
    settings: Settings,
    step: int,
    random: torch.Generator,
) -> float:
    with torch.autocast(batch.tokens.device.type, torch.bfloat16):
        loss = student.loss(batch, random)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.module.parameters(), 1.0)
    for optimizer, rate in zip(optimizers, (1.0, 1 / 3), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate * settings.rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


# ---- evaluation


@torch.no_grad()
def evaluate(student: Student, dataset: Dataset) -> Acceptance:
    """Acceptance on held-out texts, computed from the distributions along them.

    On greedy text, a draft is accepted up to the first token that differs from the text. At temperature 1, with p the
    target's and q the draft's distribution, the probability that tokens 1 to m are accepted is the mean over texts x of
    the target of min(1, q/p)(x_1) ... min(1, q/p)(x_(m-1)) * sum_y min(p, q)(y): draft paths reweighted to the target.
    """
    return Acceptance(_by_position(student, dataset, 0.0), _by_position(student, dataset, 1.0))


def _by_position(student: Student, dataset: Dataset, temperature: float) -> list[float]:
    """Mean acceptance by position in the draft."""
    device = next(student.module.parameters()).device
    sums, count = torch.zeros(MAX_DEPTH), 0
    for index in dataset.held_out(temperature)[:EVALUATED]:
        batch = dataset.batch([index]).to(device)
        start, end = int(batch.starts[0]), int(batch.lengths[0])
        accepted = accepted_ahead(student, batch, temperature, MAX_DEPTH)[:, max(1, start - 1) : end - MAX_DEPTH]
        sums += accepted.sum(1).cpu()
        count += accepted.shape[1]
    return (sums / max(1, count)).tolist()


@torch.no_grad()
def accepted_ahead(student: Guesser, batch: TextBatch, temperature: float, depth: int) -> Tensor:
    """Probability that a draft starting after each token of one text is accepted up to each of its tokens.

    Returns [depth, width - depth]: entry [d, j] is for the token at position j + 1 + d of a draft that starts after
    token j, as in `evaluate`.
    """
    with torch.autocast(batch.tokens.device.type, torch.bfloat16):
        distributions = student.logits(batch, depth)
        target = batch.features @ student.target_output.T.to(batch.features.dtype)
    text = batch.tokens[0, 1:, None]
    path = torch.ones(len(text) + 1 - depth, device=text.device)
    accepted = []
    target_probs = target[0, :-1].float().softmax(-1)
    for depth_index, distribution in enumerate(distributions):
        logits = distribution[0, :-1].float()
        if temperature == 0:
            ratio = overlap = (logits.argmax(-1) == text[:, 0]).float()
        else:
            probs = logits.softmax(-1)
            ratio = (probs.gather(1, text) / target_probs.gather(1, text)).clamp(max=1)[:, 0]
            overlap = torch.minimum(probs, target_probs).sum(-1)
        window = slice(depth_index, depth_index + len(path))
        accepted.append(path * overlap[window])
        path = path * ratio[window]
    return torch.stack(accepted)


def _evaluate_and_log(
    student: Student, dataset: Dataset, cost_ratio: float, folder: Path, step: int, loss: float
) -> float:
    """The predicted speedup with the best gamma, averaged over greedy and sampled; appends it to progress.jsonl."""
    student.module.eval()
    acceptance = evaluate(student, dataset)
    student.module.train()
    value = max(
        sum(acceptance.tokens_per_call(gamma)) / 2 / (1 + gamma * cost_ratio) for gamma in range(1, MAX_DEPTH + 1)
    )
    line = {"step": step, "loss": loss, **asdict(acceptance), "cost_ratio": cost_ratio, "predicted_speedup": value}
    with (folder / "progress.jsonl").open("a") as out:
        out.write(json.dumps(line) + "\n")
    tqdm.write(json.dumps(line))
    return value


# ---- checkpoints


def _truncate_progress(step: int, progress: Path) -> None:
    """Remove evaluations after the checkpoint, because they will be repeated."""
    if progress.exists():
        lines = progress.read_text().splitlines(keepends=True)
        progress.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def _save(path: Path, content: dict[str, Any]) -> None:
    """Save atomically: if the process is killed, the old file remains."""
    try:
        torch.save(content, path.with_suffix(".new"))
    except RuntimeError as error:  # raised by torch if the disk is full
        cause = str(error).splitlines()[0]
        raise OSError(f"{path} must be written ({cause}); free space and rerun to resume training") from error
    os.replace(path.with_suffix(".new"), path)


def _load(path: Path, settings: Settings) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"{path} must be a complete checkpoint ({cause}); remove it to start over") from None
    if state["settings"] != asdict(settings):
        raise ValueError(
            f"{path} must have settings {asdict(settings)}, but has {state['settings']}; use those, or remove it"
        )
    return state
