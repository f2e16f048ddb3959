"""The training loop: reproducible batches, evaluation on held-out texts, checkpoints and the best weights.

Started by `accelerate launch`, several processes share each batch: its texts are divided among them, and gradients are
added up, so that a step is the same as that of one process up to rounding.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
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
    anchors_per_text: places of a text after which heads that draft in one pass learn to draft, in each step.
    """

    num_steps: int
    tokens_per_batch: int = 4096
    learning_rate: float = 3e-3
    warmup: float = 0.02
    decay: float = 0.9
    evaluate_every: int = 200
    save_every: int = 50
    seed: int = 0
    anchors_per_text: int = 32

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


def own_device(device: str) -> str:
    """The device of this process: of several, each takes a GPU of its own for "cuda"."""
    return str(PartialState().device) if device == "cuda" else device


def train(student: Student, dataset: Dataset, settings: Settings, folder: Path, *, cost_ratio: float) -> None:
    """Train a student, resuming from folder/checkpoint.pt; writes best.pt (best weights) and progress.jsonl.

    cost_ratio: draft pass time / target step time, used to select the best weights.
    Raises ValueError for a damaged checkpoint or one with different settings.
    """
    device = next(student.module.parameters()).device
    processes = PartialState(cpu=device.type == "cpu")
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
    processes.wait_for_everyone()  # all have read the checkpoint
    if processes.is_main_process:
        _truncate_progress(first, folder / "progress.jsonl")
    with bar(settings.num_steps, "step", initial=first, shown=processes.is_main_process) as steps:
        for step, indices in _batches(dataset, settings, first):
            batch = _with_uniforms(dataset.batch(indices), settings, step)
            part = batch.part(processes.process_index, processes.num_processes).to(device)
            loss = _step(student, optimizers, part, settings, step)
            steps.update()
            steps.set_postfix(loss=f"{loss:.3f}")
            done = step + 1
            is_last = done == settings.num_steps
            if processes.is_main_process and (done % settings.evaluate_every == 0 or is_last):
                value = _evaluate_and_log(student, dataset, cost_ratio, folder, done, loss)
                if value > best:
                    best = value
                    _save(folder / "best.pt", {"module": student.module.state_dict(), "step": done})
            if processes.is_main_process and (done % settings.save_every == 0 or is_last):
                content = {"module": student.module.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
                _save(folder / "checkpoint.pt", content | {"step": done, "best": best, "settings": asdict(settings)})
    processes.wait_for_everyone()


def _with_uniforms(batch: TextBatch, settings: Settings, step: int) -> TextBatch:
    """The batch with the uniforms of a step, which do not depend on how it is divided among processes."""
    random = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) ^ 0x5EED)
    return replace(batch, uniforms=torch.rand(len(batch.tokens), settings.anchors_per_text, generator=random))


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
    """Muon for matrices between hidden states, AdamW for the others: norms, biases and an output head."""
    trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
    matrices = {name: each for name, each in trained.items() if each.ndim == 2 and name != "output"}
    others = [each for name, each in trained.items() if name not in matrices]
    muon = torch.optim.Muon(
        list(matrices.values()), lr=settings.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=settings.learning_rate / 3, betas=(0.9, 0.95), weight_decay=0.0)]


def _step(
    student: Student, optimizers: list[torch.optim.Optimizer], part: TextBatch, settings: Settings, step: int
) -> float:
    """One optimizer step with this process's part of a batch; returns the loss of the whole batch."""
    loss = _backward(student, part, torch.Generator().manual_seed(settings.seed * 1_000_003 + step))
    torch.nn.utils.clip_grad_norm_(student.module.parameters(), 1.0)
    for optimizer, rate in zip(optimizers, (1.0, 1 / 3), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate * settings.rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
    return loss


def _backward(student: Student, part: TextBatch, random: torch.Generator) -> float:
    """Gradients of the whole batch's loss, added up over all processes; returns that loss."""
    parameters = [each for each in student.module.parameters() if each.requires_grad]
    total, num_terms = torch.zeros((), device=part.tokens.device), 0
    if len(part.tokens):  # a batch may have fewer texts than there are processes
        with torch.autocast(part.tokens.device.type, torch.bfloat16):
            loss = student.loss(part, random)
        loss.mean.backward()
        total, num_terms = loss.mean.detach() * loss.num_terms, loss.num_terms
    if PartialState().num_processes == 1:
        return total.item() / max(1, num_terms)
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad * num_terms for each in parameters]
    sums = torch.cat([total.view(1), torch.tensor([float(num_terms)]).to(total), *(g.flatten() for g in gradients)])
    summed: Tensor = reduce(sums, "sum")
    divisor = summed[1].clamp(min=1)
    parts = (summed[2:] / divisor).split([each.numel() for each in parameters])
    for parameter, gradient in zip(parameters, parts, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return (summed[0] / divisor).item()


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
        sum(acceptance.tokens_per_call(gamma)) / 2 / (1 + (1 if student.one_pass else gamma) * cost_ratio)
        for gamma in range(1, MAX_DEPTH + 1)
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
