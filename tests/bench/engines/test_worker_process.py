"""Workers that die, stay silent or write garbage: an error with their last lines, never a hang."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from bench.engines.base import EngineError
from bench.engines.process import NUM_LAST_LINES, PIPE_BYTES, Worker
from bench.engines.vllm import SCRIPT

Started = Callable[..., Worker]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    """Start a worker from its source, or the real one; all are closed at the end."""
    with ExitStack() as stack:

        def start(source: str = "", environment: Mapping[str, str] = os.environ) -> Worker:
            script = tmp_path / "worker.py" if source else SCRIPT
            if source:
                script.write_text(source)
            return stack.enter_context(closing(Worker("worker=it", [sys.executable, str(script)], environment)))

        yield start


ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


def test_answers_of_any_size_arrive_one_by_one(started: Started) -> None:
    worker = started(ECHO)
    for request in ({"a": 1}, {"b": "x" * 5 * PIPE_BYTES}, {"c": [None, "\n"]}):
        assert worker.ask(request, 30) == request


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import sys; print('last words', file=sys.stderr); sys.exit(3)",
            "keep running, but ended with exit status 3; .*\nlast",
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "keep running, but was killed by SIGKILL; .*\n.nothing.",
        ),
        ("print('no JSON', flush=True); input()", "must answer with a JSON object, but answered b'no JSON"),
        ("print('[1]', flush=True); input()", "must answer with a JSON object, but answered b'.1."),
        ('print(\'{"error": "E: text"}\', flush=True)', "worker=it failed: E: text; its last output was"),
        ('print(\'{"error": "text", "explained": true}\', flush=True)', "^worker=it: text$"),
    ],
)
def test_a_worker_that_fails_is_an_error_with_its_last_words(started: Started, source: str, message: str) -> None:
    worker = started(source)
    with pytest.raises(EngineError, match=message):
        worker.ask({}, 30)
    assert not exists(worker.pid)


@pytest.mark.parametrize("request_size", [1, 5 * PIPE_BYTES])  # the larger one cannot even be written
def test_a_silent_worker_is_killed_in_time(started: Started, request_size: int) -> None:
    worker, start_s = started("import time; time.sleep(600)"), time.monotonic()
    with pytest.raises(EngineError, match=r"worker=it must answer within 0\.5 s, but did not"):
        worker.ask({"x": "x" * request_size}, 0.5)
    assert time.monotonic() - start_s < 30
    assert not exists(worker.pid)


def test_only_the_last_lines_are_kept(started: Started) -> None:
    worker = started("import sys\nfor i in range(5000): print('line', i, file=sys.stderr)")
    with pytest.raises(EngineError) as caught:
        worker.ask({}, 30)
    lines = str(caught.value).splitlines()
    assert lines[1:] == [f"line {i}" for i in range(5000 - NUM_LAST_LINES, 5000)]


def test_child_processes_of_a_worker_end_with_it(started: Started) -> None:
    worker = started(
        "import json, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(json.dumps({'child': child.pid}), flush=True); input(); input()"
    )
    child = worker.ask({}, 30)["child"]
    assert exists(child)
    worker.close()
    deadline_s = time.monotonic() + 10
    while exists(child) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not exists(child)


def exists(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# ---- the real worker, with a stand-in for vLLM that prints where answers go, and knows few keys

STAND_IN = """
import dataclasses, sys
__version__ = "9.8"
print("a greeting on the standard output", flush=True)
@dataclasses.dataclass
class EngineArgs:
    model: str = ""
    speculative_config: object = None
class LLM:
    def __init__(self, **arguments):
        print("a word before the end", flush=True)
        raise MemoryError("out of memory")
"""
CONFIG = """
import dataclasses, typing
@dataclasses.dataclass
class SpeculativeConfig:
    method: typing.Literal["ngram", typing.Literal["eagle"]] | None = None
    num_speculative_tokens: int = 1
    target_model_config: object = None
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    (package / "config.py").write_text(CONFIG)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("engine", "speculative", "message"),
    [
        (
            {"modle": ""},
            None,
            "it: engine arguments modle must be known to vLLM 9.8, which is installed; use model, spec",
        ),
        (
            {},
            {"method": "ngram", "target_model_config": 1},
            "it: speculative_config target_model_config must be known to vLLM 9.8, .*; use method, num_speculative",
        ),
        (
            {},
            {"method": "suffix"},
            "it: method=suffix must be known to vLLM 9.8, which is installed; use eagle, ngram$",
        ),
        ({}, None, "it failed: MemoryError: out of memory; its last output was:\na greeting .*\na word before the end"),
    ],
)
def test_the_worker_reports_options_unknown_to_its_vllm(
    started: Started,
    environment: dict[str, str],
    engine: dict[str, str],
    speculative: dict[str, str] | None,
    message: str,
) -> None:
    worker = started(environment=environment)
    with pytest.raises(EngineError, match=message):
        worker.ask({"engine": engine, "speculative": speculative, "optional": {}}, 60)
