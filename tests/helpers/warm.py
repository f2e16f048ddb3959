"""Python commands that start with torch and transformers imported: forked from a process that did it once.

Importing both takes longer than most of the commands that tests run. A test of the start itself, of signals or of
resource limits starts a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["pytest", "torch", "transformers.models.llama.modeling_llama"])
# anyio has a plugin and is imported already; Hypothesis's plugin imports all of it at the end of any run
_ADDOPTS = "-W ignore::pytest.PytestAssertRewriteWarning -p no:hypothesispytest"


def run_python(*arguments: str, cwd: Path, env: Mapping[str, str]) -> CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True, ...)`; no input.

    arguments: "-m" and a module, or "-c" and code, then the arguments of the program.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = _FORKS.Process(target=_main, args=(arguments, str(cwd), dict(env), folder))
        process.start()
        process.join()
        out, err = ((folder / stream).read_text() for stream in ("out", "err"))
        return CompletedProcess([sys.executable, *arguments], process.exitcode, out, err)


def _main(arguments: Sequence[str], cwd: str, env: Mapping[str, str], folder: Path) -> None:
    """Run a program as a new interpreter would: with its variables, folder, import path, output and arguments."""
    for stream, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update({"PYTEST_ADDOPTS": _ADDOPTS}, **env)
    os.chdir(cwd)
    for name in [name for name in sys.modules if name.partition(".")[0] == "helpers"]:
        del sys.modules[name]
    installed = [path for path in sys.path if Path(path).is_relative_to(sys.base_prefix) or "site-packages" in path]
    sys.path[:] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *installed]
    option, program, *rest = arguments
    sys.argv[:] = [option, *rest]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
