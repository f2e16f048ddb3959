"""Where code that a model wrote is run: in `jail.py`, a child process that can reach nothing and keep nothing."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

JAIL = Path(__file__).with_name("jail.py")
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")  # of libraries

# run before anything else is: raises unless the walls hold
PROBE = """
import ctypes, os, socket
assert socket.if_nameindex() in ([], [(1, "lo")]), "it must have no network"
assert sorted(os.listdir(".")) == ["program.py"], "it must have an empty folder"
assert not os.path.exists({home!r}) or not os.listdir({home!r}) or {holds_python}, "it must not see the home folder"
assert not os.environ or set(os.environ) == {{"LC_CTYPE"}}, "its environment must be empty"
def must_fail(rule, action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return
    raise AssertionError(rule)
must_fail("it must reach no network", socket.create_connection, ("192.0.2.1", 80), 1)
must_fail("it must start no process", os.fork)
must_fail("it must have no privileges", os.chroot, ".")
libc = ctypes.CDLL(None, use_errno=True)
def must_be_refused(rule, call, *arguments):
    assert getattr(libc, call)(*arguments) == -1 and ctypes.get_errno() == 1, rule
add_key, request_key, keyctl = (248, 249, 250) if os.uname().machine == "x86_64" else (217, 218, 219)
for call in (add_key, request_key, keyctl):
    must_be_refused("it must reach no keyring", "syscall", call, 0, ctypes.c_long(-3), 0, 0, 0)
assert os.getppid() == 1, "it must end with its caller, as process 1 does"
for family in (38, 40):  # the kernel's cryptography, and sockets of virtual machines
    must_be_refused("it must reach no other machine", "socket", family, 1, 0)
    must_be_refused("it must reach no other machine", "socketpair", family, 1, 0, None)
must_be_refused("its memory must be counted", "memfd_create", b"x", 0)
must_be_refused("its memory must be counted", "shmget", 0, 4096, 0o1600)
for call in (425, 426, 427):
    must_be_refused("its calls must be seen", "syscall", call, 1, None, 0, 0, 0, 0)
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use.

    cpu_s, wall_s: seconds of a processor and of the clock. memory_bytes: of addresses. disk_bytes: of all its files.
    It may have one process with one thread.
    """

    cpu_s: int = 5
    wall_s: float = 20.0
    memory_bytes: int = 1 << 29
    disk_bytes: int = 1 << 24

    def by_name(self) -> dict[str, int]:
        """By the names of `resource`."""
        return {
            "RLIMIT_CPU": self.cpu_s,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.disk_bytes,
            "RLIMIT_NPROC": 1,
            "RLIMIT_NOFILE": 32,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program. passed: whether it came to its end. detail: why not, with the last of what it wrote."""

    passed: bool
    detail: str = ""


class SandboxError(RuntimeError):
    """No program can be run safely here; the message says why."""


def run(program: str, limits: Limits = Limits()) -> Outcome:
    """Run a Python program with the standard library alone.

    Raises SandboxError if it cannot be shut in; it is then not run.
    """
    word = secrets.token_hex(16)
    request = {
        "program": program.encode(errors="replace").decode(),
        "word": word,
        "python": os.path.realpath(sys.executable),
        "binds": _binds(),
        "disk_bytes": limits.disk_bytes,
        "wall_s": limits.wall_s,
        "limits": limits.by_name(),
    }
    report = _launch(json.dumps(request))
    if not report["is_set_up"]:
        raise SandboxError(report["output"])
    if report["passed"]:
        return Outcome(True)
    ended = f"exit status {report['status']}" if report["status"] is not None else f"no end within {limits.wall_s:g} s"
    return Outcome(False, f"{ended}: {report['output'].strip()}")


@cache
def why_not() -> str | None:
    """Why no code can be run here, by trying; None if it can."""
    home = _home()
    holds_python = any(Path(bind).is_relative_to(home) for bind in _binds())
    probe = PROBE.format(home=str(home), holds_python=holds_python)
    try:
        if any(home.is_relative_to(bind) for bind in _binds()):
            raise SandboxError(f"the home folder {home} is among the system's libraries or the interpreter's")
        outcome = run(probe)
    except SandboxError as error:
        return str(error)
    return None if outcome.passed else outcome.detail.splitlines()[-1]


def _home() -> Path:
    """Where this user's files are; of a user without a home the folder that is none, as such users have it."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")


def _binds() -> list[str]:
    """What an interpreter needs: the system's libraries and its own folders, none inside another."""
    paths = [path for path in SYSTEM if os.path.lexists(path)]
    for prefix in map(os.path.realpath, (sys.base_prefix, sys.base_exec_prefix)):
        if not any(Path(prefix).is_relative_to(path) for path in paths):
            paths.append(prefix)
    return paths


def _launch(request: str) -> dict[str, Any]:
    """The jail's report; the jail itself watches the time."""
    if sys.platform != "linux":
        raise SandboxError(f"namespaces need Linux, and this is {sys.platform}")
    command = [sys.executable, "-I", "-S", str(JAIL)]
    try:
        done = subprocess.run(
            command, input=request, env={}, capture_output=True, text=True, start_new_session=True, check=False
        )
    except OSError as error:
        raise SandboxError(str(error)) from error
    if done.returncode:
        raise SandboxError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    report: dict[str, Any] = json.loads(done.stdout)
    return report
