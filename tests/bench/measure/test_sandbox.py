"""Code written by a model cannot leave the sandbox: each wall is tested by trying to pass it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from bench.measure.quality import sandbox
from bench.measure.quality.sandbox import Limits, Outcome, SandboxError, run

pytestmark = pytest.mark.skipif(sandbox.why_not() is not None, reason=f"no sandbox here: {sandbox.why_not()}")

NOBODY = 65534


def failing(program: str, limits: Limits = Limits()) -> str:  # noqa: B008 - frozen
    """What a program that must not come to its end was stopped by."""
    outcome = run(textwrap.dedent(program), limits)
    assert not outcome.passed
    return outcome.detail


def test_a_program_that_comes_to_its_end_passes_and_one_that_fails_does_not() -> None:
    solution = (
        "def add(a, b):\n    return a {} b\n\ndef check(candidate):\n    assert candidate(2, 3) == 5\n\ncheck(add)\n"
    )
    assert run(solution.format("+")) == Outcome(True)
    assert "AssertionError" in failing(solution.format("-"))


@pytest.mark.parametrize(
    "program", ["import sys\nsys.exit(0)", "import os\nos._exit(0)", "def (", "\0", "x = '\ud800'"]
)
def test_programs_that_exit_early_or_are_invalid_fail(program: str) -> None:
    assert not run(program + "\nassert False").passed


def test_the_standard_library_is_there_and_no_package_is() -> None:
    assert run("import collections, hashlib, math, random, re, typing\nhashlib.md5(b'')").passed
    assert "No module named 'numpy'" in failing("import numpy")


def test_a_fork_bomb_starts_nothing() -> None:
    assert "Resource temporarily unavailable" in failing("import os\nwhile True:\n    os.fork()")
    assert "can't start new thread" in failing("import threading\nthreading.Thread(target=print).start()")
    # also where the program waits and tries again it stays alone
    counting = "import os\nnumber = 0\ntry:\n    number = os.fork()\nexcept OSError:\n    pass\nassert number == 0"
    assert run(counting).passed


def test_an_endless_loop_ends() -> None:
    assert "exit status -9" in failing("while True:\n    pass", Limits(cpu_s=1))
    assert "no end within 0.5 s" in failing("import time\ntime.sleep(1000)", Limits(wall_s=0.5))
    stubborn = (
        "import signal, time\nfor number in range(1, 32):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
    )
    stubborn += "    except OSError:\n        pass\nwhile True:\n    pass"
    assert "exit status -9" in failing(stubborn, Limits(cpu_s=1))


def test_memory_is_limited() -> None:
    assert "MemoryError" in failing("x = bytearray(1 << 30)")
    assert run("x = bytearray(1 << 28)").passed


def test_files_are_limited_one_by_one_and_together() -> None:
    limits = Limits(disk_bytes=1 << 20)
    assert "OSError" in failing("open('big', 'wb').write(bytes(1 << 21))", limits)
    several = "for number in range(4):\n    open(str(number), 'wb').write(bytes(1 << 19))"
    assert "No space left" in failing(several, limits)
    assert "exit status" in failing("while True:\n    print('x' * 10000, flush=True)", limits)
    assert run("open('small', 'wb').write(bytes(1 << 19))", limits).passed


def test_no_files_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = set(os.listdir("/tmp")), Path("/proc/self/mounts").read_text()
    assert run("open('left', 'w').write('x')\nopen('/work/too', 'w').write('x')").passed
    assert Path("/proc/self/mounts").read_text() == before[1]
    assert not list(tmp_path.iterdir())
    assert not {"jail", "old"} & (set(os.listdir("/tmp")) - before[0])


def test_the_home_folder_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the walls protect the secret: the same read succeeds outside of them."""
    secret = tmp_path / "secret"
    secret.write_text("hush")
    secret.chmod(0o644)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SECRET", "hush")
    reading = f"print(open({str(secret)!r}).read())"
    assert subprocess.run([sys.executable, "-c", reading], capture_output=True, text=True).stdout == "hush\n"
    assert "No such file" in failing(reading)
    assert "KeyError" in failing("import os\nos.environ['SECRET']")
    assert "KeyError" in failing("import os\nos.environ['HOME']")
    assert "hush" not in failing("import os\nos.system('cat ~/secret')\nopen(os.path.expanduser('~/secret'))")
    assert "No such file" in failing("open('/proc/1/environ')")
    assert "Read-only" in failing("open('/usr/planted', 'w')")


def test_a_program_without_a_reader_ends(tmp_path: Path) -> None:
    """The process that started the jail is killed; the jail and its program end long before their time limit."""
    starting = f"from bench.measure.quality.sandbox import run, Limits; run({PROGRAMS['plain']!r}, Limits(wall_s=1000))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    caller = subprocess.Popen([sys.executable, "-c", starting], env=environment)
    jail = _eventually(lambda: _children(caller.pid))
    running = _eventually(lambda: _children(_children(jail)) if _children(jail) else "")
    caller.kill()
    caller.wait()
    assert _eventually(lambda: not _lives(jail) and not _lives(running))


def test_no_descriptor_of_the_caller_is_passed_on(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    try:
        looking = "import os\nfor number in range(4, 32):\n    try:\n        os.fstat(number)\n    except OSError:\n"
        assert run(looking + "        continue\n    raise AssertionError(number)").passed
    finally:
        os.close(descriptor)


def test_a_socket_reaches_nothing_not_even_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = server.getsockname()
        connecting = f"import socket\nsocket.create_connection({address!r}, timeout=2)"
        assert "unreachable" in failing(connecting)
        with pytest.raises(TimeoutError):
            server.accept()
        with socket.create_connection(address):  # it could have been reached
            server.accept()[0].close()
    assert "OSError" in failing("import socket\nsocket.socket().connect(('192.0.2.1', 80))")


def test_a_local_socket_of_the_machine_cannot_be_reached() -> None:
    """Abstract names are no files: the network's namespace hides them."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0specdec-{os.getpid()}")
        server.listen()
        connecting = f"import socket\nsocket.socket(socket.AF_UNIX).connect({server.getsockname()!r})"
        assert "refused" in failing(connecting)


@pytest.mark.parametrize(
    "action",
    [
        "os.setuid(1)",
        "os.chroot('.')",
        "os.mknod('device', 0o600 | stat.S_IFBLK, os.makedev(8, 0))",
        "resource.setrlimit(resource.RLIMIT_NPROC, (9, 9))",
        "check(libc.unshare(0x10000000))",
        "check(libc.unshare(0x20000))",
        "check(libc.mount(b'tmpfs', b'/work', b'tmpfs', 0, None))",
    ],
)
def test_privileges_cannot_be_regained(action: str) -> None:
    """0x10000000 would be a namespace of users, in which it had privileges again; 0x20000 one of mounts."""
    program = """
        import ctypes, os, resource, stat
        libc = ctypes.CDLL(None, use_errno=True)
        def check(status):
            if status:
                raise PermissionError(os.strerror(ctypes.get_errno()))
        """
    said = failing(textwrap.dedent(program) + action)
    assert "PermissionError" in said or "ValueError: not allowed to raise" in said


ATTACKS = {
    "read a keyring": "check(libc.syscall(KEYCTL, 0, ctypes.c_long(-3), 0))",  # the session's
    "find the user's keyring": "check(libc.syscall(KEYCTL, 0, ctypes.c_long(-4), 0))",
    "revoke a keyring": "check(libc.syscall(KEYCTL, 3, ctypes.c_long(-3)))",
    "leave a keyring": "check(libc.syscall(KEYCTL, 1, None))",
    "add a key": "check(libc.syscall(ADD_KEY, b'user', b'left', b'x', 1, ctypes.c_long(-4)))",
    "ask for a key": "check(libc.syscall(REQUEST_KEY, b'user', b'left', None, 0))",
    "talk to the host of a virtual machine": "check(libc.socket(40, 1, 0))",
    "talk to it with a dirty upper half": "check(libc.syscall(SOCKET, ctypes.c_ulong(40 + (1 << 32)), 1, 0))",
    "open a raw socket of packets": "check(libc.socket(17, 3, 0))",
    "use the kernel's cryptography": "check(libc.socket(38, 5, 0))",
    "hoard memory in a file that is none": "os.memfd_create('x')",
    "hoard memory in shared memory": "check(libc.shmget(0, 4096, 0o1600))",
    "hoard memory in messages": "check(libc.msgget(0, 0o1600))",
    "make calls by a ring": "check(libc.syscall(425, 1, ctypes.create_string_buffer(120)))",
    "look into another process": "check(libc.ptrace(0, 0, None, None))",
}
NUMBERS = {"x86_64": (250, 248, 249, 41), "aarch64": (219, 217, 218, 198)}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused(attack: str) -> None:
    """By the system call filter, not by namespaces or limits: each fails with "not permitted"."""
    program = f"import ctypes, os\nKEYCTL, ADD_KEY, REQUEST_KEY, SOCKET = {NUMBERS[os.uname().machine]}\n"
    program += "libc = ctypes.CDLL(None, use_errno=True)\ndef check(status):\n    if status == -1:\n"
    program += "        raise PermissionError(os.strerror(ctypes.get_errno()))\n"
    assert "Operation not permitted" in failing(program + ATTACKS[attack])


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other machines have no second set of calls")
@pytest.mark.parametrize("number", [0x40000000 + 39, 0x40000000 + 250])
def test_calls_by_other_numbers_end_the_program(number: int) -> None:
    assert "exit status -31" in failing(f"import ctypes\nctypes.CDLL(None).syscall({number})")


def test_a_machine_without_a_known_filter_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jail = tmp_path / "jail.py"
    jail.write_text(sandbox.JAIL.read_text().replace("_filter(os.uname().machine)", "_filter('z80')"))
    monkeypatch.setattr(sandbox, "JAIL", jail)
    with pytest.raises(SandboxError, match="a filter of system calls must be known for this machine, and z80 is not"):
        run("pass")


STUBBORN = """
import ctypes, os, signal, time
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # no signal when its parent dies
os.setsid()
for number in set(signal.Signals):  # an end of process 1 would be its own, but that is not to be had
    try:
        os.kill(1, number)
    except PermissionError:
        pass
for number in sorted(set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}):
    signal.signal(number, signal.SIG_IGN)
while True:
    time.sleep(1000)
"""
HEEDING = "import os, signal, sys; signal.signal(int(sys.argv[1]), signal.SIG_DFL); os.execv(sys.argv[2], sys.argv[2:])"
PROGRAMS = {"plain": "import time\ntime.sleep(1000)", "stubborn": STUBBORN}


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_program_ends_with_its_jail(kind: str, end: signal.Signals) -> None:
    """Also one that ignores every signal, leaves its session and clears its parent-death signal."""
    request = {
        "program": PROGRAMS[kind],
        "word": "w",
        "python": os.path.realpath(sys.executable),
        "binds": sandbox._binds(),
        "disk_bytes": 1 << 20,
        "wall_s": 1000,
        "limits": {},
    }
    command = [sys.executable, "-I", "-S", sandbox.JAIL]
    if end != signal.SIGKILL:  # a parent such as nohup may ignore the signal, which children inherit
        command = [sys.executable, "-c", HEEDING, str(int(end)), *map(str, command)]
    jail = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0
    )
    jail.stdin.write(json.dumps(request).encode())
    jail.stdin.close()
    guard = _eventually(lambda: _children(jail.pid))
    running = _eventually(lambda: _children(guard))
    _eventually(lambda: b"program.py" in Path(f"/proc/{running}/cmdline").read_bytes())
    _eventually(lambda: kind == "plain" or _ignores(running, signal.SIGSYS))
    os.killpg(jail.pid, end)  # as a terminal does, to the whole group
    jail.wait(120)
    jail.stdout.close()
    assert _eventually(lambda: not _lives(guard) and not _lives(running))


def _children(process: int | str) -> str:
    """The only child's id, or nothing."""
    return Path(f"/proc/{process}/task/{process}/children").read_text().strip()


def _ignores(process: str, number: signal.Signals) -> bool:
    mask = re.search(r"^SigIgn:\t(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(mask and int(mask[1], 16) >> (number - 1) & 1)


def _lives(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _eventually(look: object) -> object:
    """The first true value; fails after two minutes instead of waiting for ever."""
    end_s = time.monotonic() + 120
    while not (seen := look()):  # type: ignore[operator]
        assert time.monotonic() < end_s, "what is waited for has not come"
        time.sleep(0.01)
    return seen


@pytest.mark.parametrize("broken", ["_restrict(ROOT)", '_call("pivot_root"', "_unshare(is_root)", "resource.setrlimit"])
def test_a_wall_that_cannot_be_built_stops_everything(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program would leave a file if it were run."""
    text = sandbox.JAIL.read_text()
    assert text.count(broken) >= 1
    jail = tmp_path / "jail.py"
    jail.write_text(text.replace(broken, f"raise PermissionError('broken') or {broken}", 1))
    monkeypatch.setattr(sandbox, "JAIL", jail)
    with pytest.raises(SandboxError, match="broken"):
        run("pass")


@pytest.mark.parametrize(
    ("wall", "replacement", "message"),
    [
        (" | CLONE_NEWNET", "", "it must have no network"),
        ('_call("prctl", PR_SET_SECUREBITS', 'str("prctl"', "it must have no privileges"),
        ("os.setresuid(NOBODY, NOBODY, NOBODY)", "pass", "it must"),
        ("    _refuse_calls()\n", "", "it must reach no keyring"),
        ('"keyctl": (250, 219)', '"keyctl": (999, 999)', "it must reach no keyring"),
        (" | CLONE_NEWPID", "", "it must end with its caller"),
        ("    program = os.fork()\n", "    program = 0\n", "process 1 of the namespace must report how"),
        ("FAMILIES = (1, 2, 10, 16)", "FAMILIES = (1, 2, 10, 16, 40)", "it must reach no other machine"),
        ('"memfd_create": (319, 279)', '"memfd_create": (999, 999)', "its memory must be counted"),
        ('"io_uring_setup": (425, 425)', '"io_uring_setup": (999, 999)', "its calls must be seen"),
        ("resource.setrlimit(getattr(resource, name), (value, value))", "pass", "it must start no process"),
    ],
)
def test_a_missing_wall_is_noticed(
    wall: str, replacement: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutants of the jail: what is tried out before anything is run sees each."""
    is_roots = wall.startswith("os.setresuid")
    if is_roots != (os.geteuid() == 0) and (is_roots or "SECUREBITS" in wall):
        pytest.skip("another kind of user needs this wall")
    jail = tmp_path / "jail.py"
    assert wall in sandbox.JAIL.read_text()
    jail.write_text(sandbox.JAIL.read_text().replace(wall, replacement))
    monkeypatch.setattr(sandbox, "JAIL", jail)
    sandbox.why_not.cache_clear()
    try:
        assert message in sandbox.why_not()
    finally:
        sandbox.why_not.cache_clear()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_has_the_same_walls() -> None:
    """In a namespace of users. The tests above are this user's if the suite is run by one."""
    python = shutil.which("python3", path="/usr/bin") or ""
    if not python:
        pytest.skip("this interpreter may be where only root can read; there is no other in /usr/bin")
    looking = "import sandbox as s; print(s.why_not(), s.run('pass').passed, s.run('1/0').passed)"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own and TMPDIR may be root's alone
        for file in (sandbox.JAIL, Path(sandbox.__file__)):
            shutil.copy(file, folder)
        Path(folder).chmod(0o755)
        done = subprocess.run(
            [python, "-B", "-c", f"import sys; sys.path.insert(0, {folder!r}); {looking}"],
            user=12345, group=12345, extra_groups=[], cwd="/", capture_output=True, text=True, check=False,
        )  # fmt: skip
    if "unshare" in done.stdout:
        pytest.skip(f"the kernel gives ordinary users no namespaces: {done.stdout}")
    assert done.stdout == "None True False\n", done.stderr


def test_a_home_folder_among_system_libraries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some users live below /usr."""
    monkeypatch.setenv("HOME", "/usr/share")
    sandbox.why_not.cache_clear()
    try:
        assert sandbox.why_not() == "the home folder /usr/share is among the system's libraries or the interpreter's"
    finally:
        sandbox.why_not.cache_clear()
