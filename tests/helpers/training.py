"""Training that is killed, and started again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.distill import training
from specdec.distill.dataset import Dataset
from specdec.distill.training import Settings, train


def check_killed_run_resumes(students: list[Any], data: Dataset, settings: Settings, folder: Path, step: int) -> None:
    """Train to the end in folder / "whole", and in folder / "killed" a run that dies at a step and a run after it.

    students: three that start equal, one for each run. Asserts that the weights of the first and the last are equal.
    """
    whole, killed, resumed = students
    train(whole, data, settings, folder / "whole", cost_ratio=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_step", _dying_at(step))
        with pytest.raises(KeyboardInterrupt):
            train(killed, data, settings, folder / "killed", cost_ratio=0.1)
    train(resumed, data, settings, folder / "killed", cost_ratio=0.1)
    for one, other in zip(resumed.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(one, other)


def _dying_at(last: int) -> Any:
    step, seen = training._step, itertools.count()

    def dies(*arguments: Any) -> float:
        if next(seen) == last:
            raise KeyboardInterrupt
        return step(*arguments)

    return dies
