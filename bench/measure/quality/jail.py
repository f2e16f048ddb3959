"""Runs one untrusted Python program on Linux: `python -I -S jail.py`, with a request on stdin and a report on stdout.

The program runs in new namespaces (mounts, processes, network, System V IPC; also users, unless the caller is root).
They contain the interpreter and the system's libraries, read-only, an empty folder in memory, and a loopback interface
that is down: no home folder, /proc or devices, and no access to other users or processes. Process 1 of its namespace is
a guard that ends when the caller ends, for whatever reason; the kernel then kills the program, whatever its signal
handlers. A seccomp filter refuses system calls for resources that namespaces do not isolate, such as keyrings, sockets
of virtual machines and memory that escapes the limits. Everything is set up before the program starts; if any part
fails, it does not run. This is no defense against kernel vulnerabilities.

bubblewrap 0.8 was tried: it would replace the mounts, the namespaces and the guard, but not the filter, the limits and
the report. It is a system package, so all of this would remain for machines without it, and each variant would be
tested only half as much.

This file is run as a script by `bench.measure.quality.sandbox` and needs no package.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 1 << 12, 1 << 14, 1 << 18, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 1 << 15
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS = 28, 38
SECBIT_NOROOT, SECBIT_NOROOT_LOCKED = 1, 2
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
# machine -> AUDIT_ARCH constant, and refused system calls by number on each machine. Listed by hand, because this file
# must not need packages, and the bindings on PyPI (pyseccomp, of 2021) need libseccomp
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
REFUSED = {
    # keyrings, which namespaces do not isolate
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # memory that neither RLIMIT_AS nor the size of a mount limits
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    # asynchronous system calls, which bypass the filter
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # other processes and namespaces, and kernel features that such programs do not need
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "open_by_handle_at": (304, 265),
}
SOCKET, SOCKETPAIR = (41, 198), (53, 199)
FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6 and AF_NETLINK, which the network's namespace parts
OUTPUT, VERDICT = 1, 3  # the program's file descriptors
OUTPUT_BYTES = 2000  # reported from the end of the program's output
ROOT, JAIL, WORK = "/tmp", "/tmp/jail", "/tmp/jail/work"  # mounted over existing content

# the runner writes a secret word if the program reaches its end, so that `sys.exit(0)` is not a success; a malicious
# program could find the word, as it could find the tests
RUNNER = """
import os, sys
word = sys.argv.pop()
source = open("program.py", encoding="utf-8").read()
exec(compile(source, "program.py", "exec"), {"__name__": "program"})
os.write(3, word.encode())
"""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    parent, request = os.getppid(), json.load(sys.stdin)
    output, verdict, ended = map(os.memfd_create, ("output", "verdict", "ended"))
    lifeline, caller = os.pipe()  # only this process keeps `caller` open
    is_root = os.geteuid() == 0
    _unshare(is_root)
    guard = os.fork()
    if guard == 0:
        os.close(caller)
        _guard(partial(_become, request, is_root, output, verdict), lifeline, ended)
    status = _status(ended) if _ends(guard, request["wall_s"], parent) else None
    print(json.dumps(_report(request["word"], status, output, verdict)))


def _guard(become_program: Callable[[], NoReturn], lifeline: int, ended: int) -> NoReturn:
    """Process 1 of the namespace, with which all others in it end. It writes the program's exit status to `ended`.

    lifeline: a pipe whose other end the caller alone holds, so that it is closed however the caller ends. Signals from
    inside the namespace do not reach process 1, nor can the program look into it or stop it.
    """
    program = os.fork()
    if program == 0:
        become_program()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the caller, too
    exited, either = os.pidfd_open(program), select.poll()
    either.register(lifeline, 0)  # for what poll always reports: that the other end is closed
    either.register(exited, select.POLLIN)
    if lifeline not in dict(either.poll()):
        os.write(ended, str(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])).encode())
    os._exit(0)


def _become(request: dict[str, Any], is_root: bool, output: int, verdict: int) -> NoReturn:
    """Set up the jail and become the program; on failure exits, with the reason as output."""
    _keep_only(output, verdict)
    try:
        os.umask(0o022)
        _close_off(request["binds"], request["disk_bytes"], request["program"])
        _drop_privileges(is_root)
        for name, value in request["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        python = request["python"]
        os.execve(python, [python, "-I", "-S", "-B", "-c", RUNNER, request["word"]], {})
    except BaseException as error:
        os.write(VERDICT, b"not set up")
        os.write(OUTPUT, str(error).encode())
        os._exit(1)


def _unshare(is_root: bool) -> None:
    """Enter new namespaces; without root privileges, this requires a user namespace."""
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    _call("unshare", flags | (0 if is_root else CLONE_NEWUSER))
    if not is_root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    with contextlib.suppress(OSError):  # System V memory, which no limit counts; in older kernels it is root's to limit
        Path("/proc/sys/kernel/shmmni").write_text("0")


def _keep_only(output: int, verdict: int) -> None:
    """Close all file descriptors except an empty stdin, the output and the verdict."""
    output, verdict = os.dup(output), os.dup(verdict)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, descriptor in ((OUTPUT, output), (2, output), (VERDICT, verdict)):
        os.dup2(descriptor, number)
    os.closerange(VERDICT + 1, os.sysconf("SC_OPEN_MAX"))


def _close_off(binds: list[str], disk_bytes: int, program: str) -> None:
    """Enter a new file system with `binds`, read-only, and a folder with the program."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    sources = {path: os.open(path, os.O_PATH) for path in binds if not os.path.islink(path)}
    links = {path: os.readlink(path) for path in binds if os.path.islink(path)}
    _mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    for folder in (f"{ROOT}/old", JAIL, WORK):
        os.mkdir(folder)
    for path, descriptor in sources.items():
        _bind(descriptor, JAIL + path)
    for path, to in links.items():
        os.symlink(to, JAIL + path)
    _restrict(ROOT)
    _mount("tmpfs", WORK, "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_bytes},nr_inodes=1024,mode=777")
    Path(WORK, "program.py").write_text(program, encoding="utf-8")
    _call("pivot_root", ROOT.encode(), f"{ROOT}/old".encode())
    os.chdir("/")
    _call("umount2", b"/old", MNT_DETACH)
    os.chroot("/jail")  # the kernel refuses new user namespaces in a chroot, and so new privileges
    os.chdir("/work")


def _bind(descriptor: int, to: str) -> None:
    """Bind-mount an open file or folder at a new path."""
    source = f"/proc/self/fd/{descriptor}"
    os.makedirs(to if os.path.isdir(source) else os.path.dirname(to), exist_ok=True)
    if not os.path.isdir(source):
        Path(to).touch()
    _mount(source, to, None, MS_BIND | MS_REC)
    os.close(descriptor)


def _restrict(path: str) -> None:
    """Make a mount tree read-only, without devices and setuid programs."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))


def _drop_privileges(is_root: bool) -> None:
    """Drop all privileges permanently at `execve`: root becomes nobody, also in a user namespace."""
    _call("prctl", PR_SET_SECUREBITS, *map(ctypes.c_ulong, (SECBIT_NOROOT | SECBIT_NOROOT_LOCKED, 0, 0, 0)))
    if is_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("prctl", PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    _refuse_calls()


def _refuse_calls() -> None:
    """Install the filter permanently; PR_SET_NO_NEW_PRIVS makes that possible without privileges."""
    program = b"".join(_filter(os.uname().machine))
    instructions = ctypes.create_string_buffer(program, len(program))
    sock_fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    _call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.c_char_p(sock_fprog), 0, 0)


def _filter(machine: str) -> list[bytes]:
    """The filter in classic BPF: tests the number, the architecture and the first argument of each system call."""
    if machine not in ARCHITECTURES:
        raise OSError(f"a filter of system calls must be known for this machine, and {machine} is not")
    column = list(ARCHITECTURES).index(machine)
    refuse, allow, kill = (_bpf(0x06, value) for value in (0x50000 | errno.EPERM, 0x7FFF0000, 0x80000000))
    argument = _bpf(0x20, 16)  # the first, whose lower half is all that the kernel takes
    families = [_bpf(0x15, family, len(FAMILIES) - place) for place, family in enumerate(FAMILIES)]
    lines = [_bpf(0x20, 4), _bpf(0x15, ARCHITECTURES[machine], 1), kill, _bpf(0x20, 0)]
    lines += [_bpf(0x35, 0x40000000, 0, 1), kill]  # x32, which has other numbers
    for numbers in REFUSED.values():
        lines += _when(numbers[column], [refuse])
    for numbers in (SOCKET, SOCKETPAIR):
        lines += _when(numbers[column], [argument, *families, refuse, allow])
    return [*lines, allow]


def _when(number: int, body: list[bytes]) -> list[bytes]:
    """The instructions for one system call."""
    return [_bpf(0x15, number, 0, len(body)), *body]


def _bpf(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Encode an instruction. 0x20 loads a word, 0x15 and 0x35 jump if it is equal or not less, 0x06 returns."""
    return struct.pack("HBBI", code, if_true, if_false, value)


def _ends(guard: int, wall_s: float, parent: int) -> bool:
    """Whether the guard ends within `wall_s`, not counting suspensions of this process; otherwise it is killed.

    parent: without it nobody waits for the report.
    """
    waited_s, before_s = 0.0, time.monotonic()
    while waited_s < wall_s and os.getppid() == parent:
        if os.waitpid(guard, os.WNOHANG)[0]:
            return True
        time.sleep(0.005)
        now_s = time.monotonic()
        waited_s, before_s = waited_s + min(now_s - before_s, 0.1), now_s
    os.kill(guard, signal.SIGKILL)
    os.waitpid(guard, 0)
    return False


def _status(ended: int) -> int:
    """The program's exit status. Raises OSError if the guard ended without it."""
    text = os.pread(ended, 16, 0)
    if not text:
        raise OSError("process 1 of the namespace must report how the program ended, but it ended before")
    return int(text)


def _report(word: str, status: int | None, output: int, verdict: int) -> dict[str, Any]:
    written = os.pread(verdict, len("not set up") + len(word), 0).decode(errors="replace")
    start = max(0, os.fstat(output).st_size - OUTPUT_BYTES)
    text = os.pread(output, OUTPUT_BYTES, start).decode(errors="replace")
    passed = status == 0 and written == word
    return {"is_set_up": written != "not set up", "passed": passed, "status": status, "output": text}


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    source_, target_, kind_, data_ = (each.encode() if each else None for each in (source, target, kind, data))
    _call("mount", source_, target_, kind_, ctypes.c_ulong(flags), data_)


def _call(name: str, *arguments: Any) -> None:
    """Call the C library. Raises OSError."""
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
