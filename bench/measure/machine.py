"""The machine and the software that a result depends on: versions, sources, processor, GPUs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import specdec
from bench.engines.registry import is_running
from specdec.models.placement import num_devices
from specdec.runtime.devices import free_memories

if TYPE_CHECKING:
    from bench.campaign.config import BenchConfig
    from bench.catalogue.pairs import Pair

PACKAGES = ("torch", "transformers", "vllm", "numpy")


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that results depend on; None for a missing one."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {"specdec": specdec.__version__} | {package: version(package) for package in PACKAGES}


def source_sha256(extension_files: Iterable[Path] = ()) -> str:
    """A digest of the sources of specdec, bench and extensions: cells of different sources must not be mixed."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    patterns = ("specdec/**/*.py", "specdec/**/*.cpp", "bench/**/*.py")
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    for path in extension_files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cpu_model() -> str:
    """The processor's name, or its architecture where the system does not report a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def busy() -> str:
    """A warning if other programs keep the processors busy, which makes times unreliable; else an empty text."""
    load, num_cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load <= num_cpus / 2:
        return ""
    return f"; the machine is busy (load {load:.1f} on {num_cpus} CPUs): times will be noisy"


def resolve_device(device: str) -> str:
    """The device that `--device` stands for here. Raises ValueError for a GPU that does not exist."""
    if device == "cpu":
        return device
    import torch

    reason = why_no_gpu()
    if device == "auto":
        return "cpu" if reason else "cuda"
    num_gpus = 0 if reason else torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= num_gpus:
        seen = f"{num_gpus} GPUs ({reason})" if reason else f"{num_gpus} GPUs"
        raise ValueError(f"device={device} must exist, but torch sees {seen}; use --device cpu or auto")
    return device


def why_no_gpu() -> str | None:
    """Why torch cannot use a GPU here, with the remedy if there is one; None if it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU; unset it"
    with warnings.catch_warnings(record=True) as caught:  # torch only warns of a driver that is too old
        warnings.simplefilter("always")
        if not torch.cuda.is_available():
            return str(caught[0].message).partition("\n")[0] if caught else "no driver, or no GPU"
    capability, oldest = torch.cuda.get_device_capability(), _oldest_capability(torch.cuda.get_arch_list())
    if capability < oldest:
        have, need = (".".join(map(str, each)) for each in (capability, oldest))
        return f"compute capability {have} must be at least {need} for torch {torch.__version__}"
    return None


def _oldest_capability(architectures: Sequence[str]) -> tuple[int, int]:
    """(major, minor) of the oldest GPU that torch was compiled for. architectures: such as sm_75, sm_90a."""
    numbers = [int(found[1]) for each in architectures if (found := re.match(r"(?:sm|compute)_(\d+)", each))]
    return divmod(min(numbers, default=0), 10)


def device_failure(error: RuntimeError, device: str) -> str | None:
    """The message for an error of a failed or full GPU, with the remedy; None for other errors."""
    import torch

    cause = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"device={device} must have room for this cell, but {cause}; lower --batch-sizes or --max-tokens"
    if isinstance(error, torch.AcceleratorError):
        return (
            f"device={device} must keep working, but {cause}; finished cells are in the journal: check the GPU "
            "(nvidia-smi), then rerun with --resume"
        )
    return None


def gpu_uuids(device: str) -> list[str]:
    """The GPUs that a run on a device may use: one if it is named, all for "cuda", none for "cpu"."""
    if not device.startswith("cuda"):
        return []
    import torch

    index = device.partition(":")[2]
    indices = [int(index)] if index else range(torch.cuda.device_count())
    return [str(torch.cuda.get_device_properties(each).uuid) for each in indices]


def why_no_room(engine: str, pair: Pair, placement: str, config: BenchConfig, device: str) -> str | None:
    """Why a pair in this placement does not fit into this machine, and the remedy; None if it may fit.

    Only weights are counted; a pair of unknown size always may fit. device: from `resolve_device`.
    """
    if is_running(engine, config.peers):
        return None
    memories, needed_devices = list(free_memories(device).values()), num_devices(placement)
    if needed_devices > len(memories):
        return (
            f"placement={placement} needs {needed_devices} devices, but device={device} has {len(memories)}; "
            "use --placements same"
        )
    is_vllm = engine.startswith("vllm")
    if is_vllm and "quantization" in json.loads(config.vllm_options):
        return None
    quantization = config.quantization if config.quantization != "none" and not is_vllm else None
    number_format = quantization or config.dtype_of(pair)
    # vLLM may distribute models by its own options
    room = sum(memories) if placement != "same" or is_vllm else memories[0]
    if (needed := pair.weight_bytes(number_format)) <= room:
        return None
    return (
        f"pair={pair.name} needs {needed / 1e9:.1f} GB for its weights in {number_format}, but device={device} has "
        f"{room / 1e9:.1f} GB free; use a smaller pair or a larger machine, --placements auto where there are several "
        "GPUs, or --quantization"
    )


def information() -> dict[str, Any]:
    """The fields of `machine_info`: processor, threads, GPUs."""
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "cpu_model": cpu_model(),
        "cpu_count": os.cpu_count(),
        "torch_num_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
    }
