"""The process of one part: `python -m bench.first_light.part NAME FACTS DEVICE [ARGUMENT]`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from bench.first_light.report import Report

MODULES: dict[str, tuple[str, ...]] = {  # part -> module and its arguments
    "facts": ("facts",),
    "correctness": ("correctness",),
    "shapes-8b": ("shapes", "8b"),
    "shapes-135m": ("shapes", "135m"),
    "kernels": ("kernels",),
    "transformers": ("beside_transformers",),
    "real": ("real",),
}


def main(name: str, facts: str, device: str, *arguments: str) -> None:
    """Run a part. device: "cuda" or "cpu". arguments: select a share of the part's work; none for all of it."""
    import torch

    from bench.measure.machine import why_no_gpu

    report = Report(name, Path(facts))
    if device == "cuda" and (reason := why_no_gpu()):
        raise SystemExit(f"device=cuda must be usable, but it is not: {reason}")
    report.watch_fallbacks()
    module, *options = MODULES[name]
    torch_device = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
    importlib.import_module(f"bench.first_light.{module}").run(report, torch_device, *options, *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
