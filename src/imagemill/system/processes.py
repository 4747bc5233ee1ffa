"""What all child processes share: the command that starts them, their environment, their cores,
their end.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
"""The folder that holds the package `imagemill`; it must be on a child's `sys.path`."""
_PR_SET_PDEATHSIG = 1
_SHORTAGES = (
    "start new thread",
    "Resource temporarily unavailable",
    "llocate memory",
    "failed to map segment",
    "bad_alloc",
    "can't alloc",
)
"""What Python, the dynamic loader, Arrow and OpenVINO say if memory or threads are short."""


def command(module: str, *arguments: object) -> list[str]:
    """Return the command that runs `main()` of a module in a new process, with `arguments` in its
    `sys.argv[1:]`.

    `-P` keeps the working directory off `sys.path`: a file there named like a module, such as
    `json.py`, is never executed. The module is imported under its own name, so both processes can
    pickle its records.
    """
    return [sys.executable, "-P", "-m", "imagemill.system.processes", module, *map(str, arguments)]


def environment() -> dict[str, str]:
    """The child's environment: ours, with this package importable and numeric libraries kept from
    starting threads of their own.
    """
    paths = [PACKAGE_PARENT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return (
        {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        | os.environ
        | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    )


def shortage(error: BaseException) -> str | None:
    """Describe an error that means too little memory, too few threads or too few open files; None
    if it means something else.
    """
    if isinstance(error, MemoryError):
        what = "out of memory"
    elif any(sign in str(error) for sign in _SHORTAGES):  # libraries have exceptions of their own
        what = " ".join(str(error).split())
    elif isinstance(error, OSError) and error.errno in (
        errno.ENOMEM,
        errno.EAGAIN,
        errno.EMFILE,
        errno.ENFILE,
    ):
        what = os.strerror(error.errno).lower()
    else:
        return None
    return f"{what}. Free some, or raise the limits of this shell ({limits()})."


def limits() -> str:
    """Return the limits of this process that may be too low, as `ulimit` names them."""
    asked = {
        "ulimit -v": (resource.RLIMIT_AS, 1024),
        "ulimit -u": (resource.RLIMIT_NPROC, 1),
        "ulimit -n": (resource.RLIMIT_NOFILE, 1),
    }
    found = {name: (resource.getrlimit(which)[0], unit) for name, (which, unit) in asked.items()}
    return ", ".join(
        f"{name} {'unlimited' if value == resource.RLIM_INFINITY else value // unit}"
        for name, (value, unit) in found.items()
    )


def is_memory_limited() -> bool:
    """Whether `ulimit -v` limits this process."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def cpu_ticks(pid: int) -> int | None:
    """Return how much CPU time a process and its children have used, in clock ticks; None if the
    system does not tell (it is not Linux).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return None
    return int(fields[11]) + int(fields[12]) + sum(cpu_ticks(int(child)) or 0 for child in children)


def keep_to(cores: Iterable[int]) -> None:
    """Stay on these CPU cores, where the system knows such a thing. Libraries that count cores are
    to be imported after this.
    """
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux); elsewhere the closed socket
    ends it at its next message.
    """
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    del sys.argv[0]  # the module comes first now
    sys.exit(import_module(sys.argv[0]).main())
