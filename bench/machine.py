"""What a result depends on besides the options: versions, sources, processor, threads."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("specdec", "torch", "transformers", "vllm", "numpy")


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that results depend on; None where one is missing."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in PACKAGES}


def source_sha256() -> str:
    """A digest of the sources of specdec and of this harness: a change in them makes cells incomparable."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    patterns = ("specdec/**/*.py", "specdec/**/*.cpp", "bench/**/*.py")
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def busy() -> str:
    """A warning, if other programs keep the processors busy: they make times unreliable, intervals or not."""
    load, num_cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load <= num_cpus / 2:
        return ""
    return f"; the machine is busy (load {load:.1f} on {num_cpus} CPUs): times will be noisy"


def resolve_device(device: str) -> str:
    """What `--device` means here. Raises ValueError for a GPU that is not there."""
    if device == "cpu":
        return device
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if num_gpus else "cpu"
    if int(device.partition(":")[2] or 0) >= num_gpus:
        raise ValueError(f"device={device} must exist, but torch sees {num_gpus} GPUs; use --device cpu or auto")
    return device


def information() -> dict[str, Any]:
    """For `machine_info`: processor, threads, GPUs."""
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "cpu_model": cpu_model(),
        "cpu_count": os.cpu_count(),
        "torch_num_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
    }
