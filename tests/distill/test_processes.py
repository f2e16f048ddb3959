"""Several processes, started by `accelerate launch`, train the same head as one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specdec.distill.__main__ import main

LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def losses(folder: Path) -> list[float]:
    lines = (folder / "training" / "progress.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_two_processes_train_as_one(texts, target_folder: Path, tmp_path: Path) -> None:
    """With the same batches: the same losses and weights, but for rounding in other orders."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(asdict(text)) + "\n" for text in texts))
    common = ["--target", str(target_folder), "--folder", str(tmp_path)]
    assert main(["score", *common, "--layers", "0", "1"]) == 0
    steps = ["--steps", "6", "--evaluate-every", "2", "--tokens-per-batch", "400", "--learning-rate", "1e-3"]
    arguments = ["head", *common, "--format", "dflash", "--vocabulary", "64", *steps]
    arguments += ["--cost-ratio", "0.1", "--dialect", "speculators"]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    command = [sys.executable, *LAUNCH, "-m", "specdec.distill", *arguments, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("head: in ") == 1
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 3
    assert two == pytest.approx(one, rel=2e-3)
    assert one[-1] < one[0]
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name].float(), weight.float(), rtol=0.02, atol=0.02, msg=name)
