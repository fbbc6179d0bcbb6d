"""Runs one program that nobody has read, after giving up all that it could do harm with. A script of its own:

    python -s -P -S -B shut_in_child.py < request     a JSON object: program, nonce, parent, cpu_s, memory_bytes

Nothing of flocktune, and nothing that is installed, is imported here; what a program may import is imported before it
starts. Then a seccomp filter lets the process compute, read and write what is open, and nothing else: no file, socket,
process, thread, signal or other system call is to be had, whoever the user is; and resource limits bound time and
memory. The verdict goes to stdout: the nonce, and ``passed`` or ``raised`` and the name of what was. A program that
ends the process leaves none.
"""

import ctypes
import json
import math
import os
import platform
import resource
import signal
import sys
import time
import types

MODULES = """
    __future__ abc array ast base64 binascii bisect calendar cmath collections collections.abc contextlib copy
    dataclasses datetime decimal difflib enum fractions functools hashlib heapq inspect io itertools json keyword math
    numbers operator os pprint queue random re statistics string struct sys textwrap time traceback types typing
    unicodedata zlib _strptime
"""
"""What a program can import: nothing can be read from the disk any more when it starts."""

SYSCALLS = {
    # name: (x86-64, ARM-64); memory, clocks, and what is open already
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pselect6": (270, 72), "sched_yield": (24, 124),
    "mremap": (25, 216), "madvise": (28, 233), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93),
    "gettimeofday": (96, 169), "getrusage": (98, 165), "times": (100, 153), "sigaltstack": (131, 132),
    "gettid": (186, 178), "futex": (202, 98), "restart_syscall": (219, 128), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "getrandom": (318, 278),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Which column of SYSCALLS, and what the kernel calls the machine (AUDIT_ARCH)."""

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # refused: EPERM, so that Python raises
_PDEATHSIG, _SECCOMP, _FILTER, _NO_NEW_PRIVS = 1, 22, 2, 38


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def end_with(parent: int) -> None:
    """Let this process be killed when the process ``parent`` ends. Raises OSError when that is over already."""
    _prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError("its maker is gone")


def shut_in() -> None:
    """Let this process make the calls of SYSCALLS and no others, from now on. Raises OSError where that can not be."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise OSError(f"{sys.platform} on {platform.machine()}")
    column, machine = MACHINES[platform.machine()]
    allowed = sorted(numbers[column] for numbers in SYSCALLS.values())
    lines = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, machine), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    lines += [(_EQUAL, len(allowed) - place, 0, number) for place, number in enumerate(allowed)]
    lines += [(_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    instructions = (_Instruction * len(lines))(*(_Instruction(*line) for line in lines))
    _prctl(_NO_NEW_PRIVS, 1)
    _prctl(_SECCOMP, _FILTER, ctypes.byref(_Filter(len(lines), instructions)))


def _prctl(option: int, *values: object) -> None:
    padded = [option, *values, 0, 0, 0, 0][:5]
    call = ctypes.CDLL(None, use_errno=True).prctl
    if call(*(ctypes.c_ulong(value) if isinstance(value, int) else value for value in padded)):
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def limit(cpu_s: float, memory_bytes: int) -> None:
    """Bound what the kernel counts. Beyond ``cpu_s`` processor seconds from now on the process is killed."""
    until = math.ceil(time.process_time() + cpu_s)
    bounds = {"CPU": until, "AS": memory_bytes, "FSIZE": 0, "NPROC": 0, "CORE": 0}
    for name, bound in bounds.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (bound, bound))


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    os.close(0)  # or the program could read the request again
    for name in MODULES.split():
        __import__(name)
    nonce, program, write = request["nonce"], request["program"], os.write
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.stdin = open(os.devnull)  # noqa: SIM115
    try:
        limit(request["cpu_s"], request["memory_bytes"])
        end_with(request["parent"])
        shut_in()
    except (OSError, ValueError) as error:
        write(1, f"{nonce} open {error}".encode())
        return
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses look a class's module up there
    del request
    try:
        exec(compile(program, "program", "exec"), module.__dict__)
        verdict = "passed"
    except BaseException as error:  # SystemExit too: who leaves early has not passed
        verdict = f"raised {type(error).__name__}"
    write(1, f"{nonce} {verdict}"[:100].encode(errors="replace"))
    os._exit(0)


if __name__ == "__main__":
    main()
