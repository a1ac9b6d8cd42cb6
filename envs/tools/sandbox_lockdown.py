"""What a process does to itself before it runs code that nobody has read: Linux's own means, through ctypes.

- ``support``: what of it this machine has, as words; empty where a process cannot be confined.
- ``lock_down``: limits, Landlock, no privileges and a list of allowed system calls, for good.
- ``die_with``: end with the parent. ``library``: what the standard library is read from.
- ``main``: confine this process, then become another program.

Children run this file by its path, without the package; it needs the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
from collections.abc import Iterable, Sequence

_LIBC = ctypes.CDLL(None, use_errno=True)
_MACHINE = os.uname().machine
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (1 << bit for bit in (0, 1, 2, 3, 5, 8, 14))
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
FOLDER = WRITE_FILE | READ_FILE | READ_DIR | REMOVE_FILE | MAKE_REG | TRUNCATE
"""Rights in the one folder that may be written: plain files, no folders, no links, no devices."""
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many file rights each version of Landlock knows; from version 5 on it is 16."""
_NO_NEW_PRIVILEGES, _SET_DEATH_SIGNAL, _SET_SECCOMP, _FILTER = 38, 1, 22, 2
_SIGKILL = 9

# What CPython needs once it has started. The rest is answered by "Operation not permitted": sockets, new processes,
# signals, tracing, other limits, shared memory, links, modes and owners of files, clocks being set.
_ALLOWED = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8, "mmap": 9, "mprotect": 10,
        "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17,
        "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "sched_yield": 24, "mremap": 25, "madvise": 28,
        "dup": 32, "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79,
        "ftruncate": 77, "rename": 82, "unlink": 87, "gettimeofday": 96, "getuid": 102, "getgid": 104, "geteuid": 107,
        "getegid": 108, "getppid": 110, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202,
        "sched_getaffinity": 204, "getdents64": 217, "restart_syscall": 219, "clock_gettime": 228,
        "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "openat": 257, "open": 2, "newfstatat": 262,
        "unlinkat": 263, "renameat": 264, "faccessat": 269, "getrandom": 318, "renameat2": 316, "statx": 332,
        "rseq": 334, "faccessat2": 439, "poll": 7, "select": 23, "pselect6": 270, "ppoll": 271,
    },
    "aarch64": {
        "getcwd": 17, "dup": 23, "unlinkat": 35, "renameat": 38, "ftruncate": 46, "faccessat": 48,
        "openat": 56, "close": 57, "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66,
        "pread64": 67, "pwrite64": 68, "pselect6": 72, "ppoll": 73, "newfstatat": 79, "fstat": 80, "exit": 93,
        "exit_group": 94, "futex": 98, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114,
        "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128,
        "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "uname": 160,
        "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176,
        "getegid": 177, "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226,
        "madvise": 233, "renameat2": 276, "getrandom": 278, "statx": 291, "rseq": 293, "faccessat2": 439,
    },
}  # fmt: skip
# What a program needs on its way from execve to its own code.
_OF_PROGRAMS = {
    "x86_64": {"execve": 59, "arch_prctl": 158, "set_tid_address": 218, "set_robust_list": 273, "prlimit64": 302},
    "aarch64": {"execve": 221, "set_tid_address": 96, "set_robust_list": 99, "prlimit64": 261},
}
_IOCTL = {"x86_64": 16, "aarch64": 29}
_FCNTL = {"x86_64": 72, "aarch64": 25}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_CAPSET = {"x86_64": 126, "aarch64": 91}
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_TERMINAL_QUESTIONS = (0x5401, 0x5413, 0x5451)  # TCGETS, TIOCGWINSZ, FIOCLEX
_DESCRIPTOR_QUESTIONS = (0, 1, 2, 3, 1030)  # never F_SETOWN, which lets the kernel send signals for us
_LOADED = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/proc/self/maps")
"""What a program reads before its own code runs."""
_THREAD = 0x10000
_X32 = 0x40000000
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def support() -> tuple[str, ...]:
    """Return ``("Landlock ABI 7", "seccomp allow list")``, or nothing unless this machine has both."""
    if sys.platform != "linux" or _MACHINE not in _ALLOWED or struct.calcsize("P") != 8:
        return ()
    version = _landlock_version()
    # Asking for a filter with no program fails with EFAULT where the kernel has seccomp, with EINVAL where not.
    _LIBC.prctl(_SET_SECCOMP, _FILTER, None, 0, 0)
    if version < 1 or ctypes.get_errno() != 14:
        return ()
    return f"Landlock ABI {version}", "seccomp allow list"


def lock_down(
    *,
    memory: int,
    readable: Iterable[str] = (),
    listable: Iterable[str] = (),
    folder: str | None = None,
    program: str | None = None,
    file_size: int = 1 << 20,
) -> None:
    """Give up everything that ``support`` stands for; whatever fails raises, and the caller must not go on.

    Args:
        memory: bytes of address space beyond what is mapped now.
        readable: files and folders that may be read.
        listable: folders whose names may be read, and the names of all below.
        folder: where plain files may be made, read and removed.
        program: the process becomes this program next, which may have threads; None allows neither.
        file_size: the largest file, in bytes.
    """
    if not support():
        raise OSError("this machine has no Landlock or no seccomp")
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    limits = [
        (resource.RLIMIT_AS, memory if program else mapped + memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ]
    if program is None:
        limits.append((resource.RLIMIT_NPROC, 0))
    rules = [(path, READ_FILE | READ_DIR) for path in readable] + [(path, READ_DIR) for path in listable]
    if folder is not None:
        rules.append((folder, FOLDER))
    if program is not None:
        rules += [(path, EXECUTE | READ_FILE) for path in [program, *_LOADED]]
    _restrict_files(rules)
    _drop_capabilities()
    for kind, value in limits:
        resource.setrlimit(kind, (value, value))
    _restrict_calls(bool(program))


def die_with(parent: int) -> None:
    """End this process when its parent does; at once if that has happened already."""
    _check(_LIBC.prctl(_SET_DEATH_SIGNAL, _SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        os._exit(0)


def library() -> tuple[list[str], list[str]]:
    """Return the folders of Python's standard library, and all that is in them but the installed packages."""
    folders = [folder for folder in sys.path if os.path.isdir(folder)]
    entries = []
    for folder in folders:
        with os.scandir(folder) as found:
            entries += [entry.path for entry in found if entry.name not in ("site-packages", "dist-packages")]
    return folders, entries


def _landlock_version() -> int:
    return int(_LIBC.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def _restrict_files(rules: Iterable[tuple[str, int]]) -> None:
    version = _landlock_version()
    handled = (1 << _FS_BITS.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", handled, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _LIBC.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    _check(ruleset, "landlock_create_ruleset")
    for path, rights in rules:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not os.path.isdir(path):
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights & handled, handle)
        _check(_LIBC.syscall(_LANDLOCK_ADD, ruleset, 1, rule, ctypes.c_uint32(0)), f"landlock_add_rule for {path}")
        os.close(handle)
    _check(_LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    _check(_LIBC.syscall(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0)), "landlock_restrict_self")
    os.close(ruleset)


def _drop_capabilities() -> None:
    header = struct.pack("=Ii", 0x20080522, 0)
    nothing = bytes(24)
    _check(_LIBC.syscall(_CAPSET[_MACHINE], header, nothing), "capset")


def _restrict_calls(program: bool) -> None:
    machine = _MACHINE
    allowed = {*_ALLOWED[machine].values(), *(_OF_PROGRAMS[machine].values() if program else ())}
    code = [_step(_LOAD, 4), _step(_EQUAL, _ARCHITECTURE[machine], 1, 0), _step(_RETURN, _KILL), _step(_LOAD, 0)]
    if machine == "x86_64":
        code += [_step(_AT_LEAST, _X32, 0, 1), _step(_RETURN, _ERRNO | _EPERM)]
    for number in sorted(allowed):
        code += [_step(_EQUAL, number, 0, 1), _step(_RETURN, _ALLOW)]
    for number, values in ((_IOCTL[machine], _TERMINAL_QUESTIONS), (_FCNTL[machine], _DESCRIPTOR_QUESTIONS)):
        code += _only_with(number, 1, _EQUAL, values)
    code += [_step(_EQUAL, _CLONE3, 0, 1), _step(_RETURN, _ERRNO | _ENOSYS)]  # the C library then tries clone
    if program:
        code += _only_with(_CLONE[machine], 0, _ANY_BIT, (_THREAD,))
        code += [_step(_EQUAL, 157 if machine == "x86_64" else 167, 0, 1), _step(_RETURN, _ERRNO | _EPERM)]
    code.append(_step(_RETURN, _ERRNO | _EPERM))
    instructions = ctypes.create_string_buffer(b"".join(code))
    table = struct.pack("=HxxxxxxQ", len(code), ctypes.addressof(instructions))
    _check(_LIBC.prctl(_SET_SECCOMP, _FILTER, table, 0, 0), "seccomp")


def _only_with(number: int, argument: int, test: int, values: Sequence[int]) -> list[bytes]:
    """Allow system call ``number`` if its argument passes ``test`` for one of ``values``."""
    body = [_step(_LOAD, 16 + 8 * argument)]
    for value in values:
        body += [_step(test, value, 0, 1), _step(_RETURN, _ALLOW)]
    body.append(_step(_RETURN, _ERRNO | _EPERM))
    return [_step(_EQUAL, number, 0, len(body)), *body]


def _step(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def main() -> None:
    """``sandbox_lockdown.py MEMORY PROGRAM ARGUMENT...``: become the program, with no files and no network."""
    memory, program, *arguments = sys.argv[1:]
    os.chdir("/")
    for handle in os.listdir("/proc/self/fd"):
        if int(handle) > 2:
            try:
                os.close(int(handle))
            except OSError:  # the one that read the folder
                continue
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.close(3)
    lock_down(memory=int(memory), program=program, file_size=0)
    os.execve(program, [program, *arguments], {})


if __name__ == "__main__":
    main()
