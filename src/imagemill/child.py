"""What all child processes share: the command that starts them, their environment, their cores, their end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def command(module: str, *arguments: object) -> list[str]:
    """Return the command that runs `main()` of a module in a new process, with `arguments` in its `sys.argv[1:]`.

    `-P` keeps the working directory off `sys.path`: a file there named like a module, such as `json.py`, is never executed.
    The module is imported under its own name, so both processes can pickle its records.
    """
    return [sys.executable, "-P", "-m", "imagemill.child", module, *map(str, arguments)]


def environment() -> dict[str, str]:
    """The child's environment: ours, with this package importable and numeric libraries kept from starting threads of their own."""
    package_home = str(Path(__file__).resolve().parents[1])
    paths = [package_home, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def keep_to(cores: Iterable[int]) -> None:
    """Stay on these CPU cores, where the system knows such a thing. Libraries that count cores are to be imported after this."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux); elsewhere the closed socket ends it at its next message."""
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    del sys.argv[0]  # the module comes first now
    sys.exit(import_module(sys.argv[0]).main())
