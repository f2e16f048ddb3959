"""What the README and the documentation show runs, and what they name exists."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest

import specdec
from bench.campaign.config import BenchConfig, options_of
from bench.campaign.options import build
from bench.report.rendering import parser as report_parser
from bench.tools.lossy_modes import parser as lossy_modes_parser
from specdec.cli.main import parser as specdec_parser
from specdec.conformance.__main__ import parser as conformance_parser
from specdec.distill.__main__ import parser as distill_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
# a fence of a language that can run, and the comment above it. Python runs unless the comment gives a reason; a command
# runs only if the comment allows it, as it could change the environment that the tests run in. tests/project/
# test_extending.py runs the fences that have a title: each is a file
FENCE = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?^```(?P<language>python|bash)\n(?P<code>.*?)^```$", re.M | re.S)
NOT_RUN = re.compile(r"not run: .+|the (test|benchmark) command")  # .ci/run runs these two
OPENING = re.compile(r"^(?:`{3,}|~{3,})(.*)\n(?:.*\n)*?(?:`{3,}|~{3,})$", re.M)
SMALLER = {"Qwen/Qwen3-8B": "smollm2-135m", "Qwen/Qwen3-0.6B": "smollm2-135m-draft", '"cuda"': '"cpu"'}
CHANGES_THE_MACHINE = re.compile(r"\b(install|uninstall|venv|rm|git|sudo)\b")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of Python or of commands. mark: the comment above it, or empty."""

    language: str
    code: str
    mark: str

    @property
    def runs(self) -> bool:
        return self.mark == "run" if self.language == "bash" else not NOT_RUN.fullmatch(self.mark)

    @property
    def runnable_code(self) -> str:
        """With other models, where the comment asks for them."""
        code = self.code
        for large, small in SMALLER.items() if self.mark == "run: with smaller models" else ():
            code = code.replace(large, small)
        return code

    @property
    def commands(self) -> list[list[str]]:
        """Commands, as words; without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [list(each) for line in words for is_and, each in groupby(line, "&&".__eq__) if not is_and]


def blocks(page: str) -> list[Block]:
    return [Block(match["language"], match["code"], match["mark"] or "") for match in FENCE.finditer(TEXTS[page])]


def runnable(language: str) -> list[str]:
    """Pages with blocks of a language that run."""
    return [page for page in TEXTS if any(each.language == language and each.runs for each in blocks(page))]


@pytest.mark.parametrize("page", TEXTS)
def test_each_command_is_marked(page: str) -> None:
    """To be run, or with the reason why not; what installs or removes anything is never run."""
    for block in blocks(page):
        if block.language == "bash":
            assert block.mark == "run" or NOT_RUN.fullmatch(block.mark), f"{page}: mark {block.code!r}"
            assert not (block.runs and CHANGES_THE_MACHINE.search(block.code)), f"{page}: {block.code!r}"


@pytest.mark.parametrize("page", runnable("python"))
def test_python_runs(page: str) -> None:
    """The blocks of a page one after the other, in one namespace: later ones use what earlier ones made."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and block.runs:
            exec(compile(block.runnable_code, page, "exec"), namespace)


@pytest.mark.parametrize("page", runnable("bash"))
def test_commands_run(page: str) -> None:
    paths = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "PYTHONPATH": str(ROOT)}
    for block in blocks(page):
        if block.language == "bash" and block.runs:
            command = ["bash", "-euo", "pipefail", "-c", block.code]
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True, check=False, timeout=300
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip()


def test_blocks_that_do_not_run_compile_and_name_programs_that_exist() -> None:
    for page in TEXTS:
        for block in blocks(page):
            if block.language == "python":
                compile(block.code, page, "exec")
            for module in re.findall(r"python -m ([\w.]+)", block.code):
                assert module == "venv" or importlib.util.find_spec(module), f"{page}: python -m {module}"


@pytest.mark.parametrize("page", TEXTS)
def test_each_block_is_of_a_kind_that_a_test_looks_at(page: str) -> None:
    """Or is no code: output, and files with a title, which are those of the extension page's package."""
    openings = OPENING.findall(TEXTS[page])
    assert len(openings) * 2 == len(re.findall(r"^(?:`{3,}|~{3,})", TEXTS[page], re.M))
    titled = [each for each in openings if "title=" in each]
    assert not titled or page == "docs/extending.md"
    assert {each for each in openings if each not in titled} <= {"python", "bash", "text"}
    assert len(blocks(page)) == len([each for each in openings if each in ("python", "bash")])


@pytest.mark.parametrize("page", [page for page in TEXTS if any(not each.runs for each in blocks(page))])
def test_commands_that_do_not_run_are_understood(page: str) -> None:
    """By the parsers of their programs: each option and each of its values, or the extra that pip installs."""
    outside = [block for block in blocks(page) if block.language == "bash" and "this page's package" not in block.mark]
    for words in (words for block in outside for words in block.commands):
        match words:
            case [pytest_, "bench/", *options] if pytest_.endswith("pytest"):
                assert bench_config(options)
            case ["python", "-m", "bench.campaign", "--ray", _, *options]:
                assert bench_config(options)
            case ["python", "-m", "bench.report", *arguments]:
                assert report_parser().parse_args(arguments)
            case ["python", "-m", "specdec", *arguments]:
                assert specdec_parser().parse_args(arguments)
            case ["python", "-m", "specdec.conformance", *arguments]:
                assert conformance_parser().parse_args(arguments)
            case ["python", "-m", "specdec.distill", *arguments]:
                assert distill_parser().parse_args(arguments)
            case ["python", "-m", "bench.tools.lossy_modes", *arguments]:
                assert lossy_modes_parser().parse_args(arguments)
            case ["pip" | ".venv/bin/pip", "install", "-e", package]:
                assert package.removeprefix(".").strip("[]") in {"", *EXTRAS}
            case _:
                assert words[0] in PROGRAMS or (words[:2] == ["python", "-m"] and len(words) <= 4), words


PROGRAMS = {
    "vllm",
    "python3",
    ".",
    "git",
    "cd",
    "vllm/bin/pip",
    "openvino/bin/pip",
    "pre-commit",
    "ruff",
    "mypy",
    "tox",
    "pytest",
    ".venv/bin/pytest",
}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def bench_config(options: list[str]) -> object:
    """The options of `pytest bench/`. Raises ValueError for one that cannot be."""
    given, rest = {}, iter(options)
    known = {option.flag: option for option in options_of(BenchConfig)}
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in known:
            given[known[flag].name] = value if equals else next(rest) if known[flag].metavar else "1"
        else:
            assert flag in ("--benchmark-json", "-m"), word
            assert equals or next(rest)
    for name in ("vllm_python", "openvino_python", "llama_server"):  # which the reader makes
        given.pop(name, None)
    return build(given)


def test_benchmark_options_exist() -> None:
    """Each `--option` of a `pytest bench/` command, in blocks and in sentences."""
    known = {option.flag for option in options_of(BenchConfig)} | {"--benchmark-json"}
    commands = [command for text in TEXTS.values() for command in re.findall(r"pytest bench/ ((?:\\\n|[^\n`])*)", text)]
    used = {option for command in commands for option in re.findall(r"(?<!\S)--[\w-]+", command)}
    assert len(used) > 8
    assert used <= known


@pytest.mark.parametrize("page", [page for page in TEXTS if "`tests/" in TEXTS[page]])
def test_every_test_that_is_named_exists(page: str) -> None:
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?", TEXTS[page]):
        assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{page}: {path} has no {name}"
        assert (ROOT / path).is_file(), f"{page}: {path}"


def test_guarantees_have_tests() -> None:
    """Each row of the tables of claims names at least one."""
    rows = [row for row in TEXTS["docs/guarantees.md"].splitlines() if re.match(r"\| (?!claim)[A-Z]", row)]
    assert len(rows) > 15
    assert [row for row in rows if not re.search(r"`tests/[\w/]+\.py", row)] == []


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere_in_a_checkout(page: str) -> None:
    """Where the site is read as files, too, as on a code host; `mkdocs build --strict` checks the site's own."""
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", TEXTS[page]):
        assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


@pytest.mark.parametrize("page", TEXTS)
def test_sentences_are_wrapped_at_120_columns(page: str) -> None:
    """But for tables, pictures and what a command writes."""
    prose = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.M | re.S)
    if "<!-- written by: " not in prose:
        lines = [line for line in prose.splitlines() if not re.match(r"\||!\[|Verdict: ", line)]
        assert [line for line in lines if len(line) > 120] == []


def test_the_api_reference_has_every_public_name() -> None:
    reference = TEXTS["docs/reference/api.md"]
    assert [name for name in specdec.__all__ if not re.search(rf"\b{name}\b", reference)] == []


def test_the_site_shows_reports_and_import_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from site_hooks import on_page_markdown

    page = on_page_markdown("<!-- report: bench/baselines/engines-cpu.json -->\n<!-- import levels: specdec -->")
    assert "hybrid" in page
    assert "| 0 | " in page
    assert "`runtime`" in page
    links = "[a](../bench/baselines/README.md#x) [b](../../specdec/weights/README.md) [c](docs/index.md) [d](index.md)"
    assert on_page_markdown(links) == "[a](baselines/README.md#x) [b](../weights/README.md) [c](index.md) [d](index.md)"
