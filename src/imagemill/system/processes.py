"""Child processes: how they are started, how they report errors, and how they end.

The parent makes a `Child`; the child's `main()` calls `run_child`. Both ends exchange pickled
messages over one socket pair. Two messages mean the same in every protocol: `Stop` tells the child
to end, and `Failed` is an error for the user.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from msgspec import Struct

from imagemill import errors
from imagemill.errors import DeviceLostError, ImagemillError, WorkerError

_log = logging.getLogger(__name__)

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
"""Parts of messages about a shortage of memory or threads, by Python, the dynamic loader, Arrow and
OpenVINO.
"""
_EXIT_S = 5.0
"""How long a child may take to exit after it has closed its connection."""
_LOG_LINES = 12
_LOG_BYTES = 16_384


class Stop(Struct, frozen=True):
    """Tells a child to end."""


class Failed(Struct, frozen=True):
    """A child's last message: an error for the user, which starting it again would not fix."""

    kind: str
    """Class name; one that `imagemill.errors` does not have stands for `ImagemillError`."""
    message: str

    @classmethod
    def of(cls, error: ImagemillError) -> Failed:
        """Return the message that carries an error."""
        return cls(type(error).__name__, str(error))

    def error(self) -> ImagemillError:
        """Return the error that the message carries."""
        found: ImagemillError = getattr(errors, self.kind, ImagemillError)(self.message)
        return found


class ChildError(Exception):
    """A child ended, or sent nothing for too long, while its parent waited for a message.

    The text continues a sentence about the child: "was killed by SIGKILL".
    """

    def __init__(self, reason: str, log_tail: str) -> None:
        super().__init__(reason)
        self.log_tail = log_tail


class Child:
    """A process that runs `main()` of a module, and the connection to it.

    The process is in a process group of its own, so Ctrl-C in a terminal reaches its parent only.
    `main()` calls `run_child` or `connect_to_parent`.

    Args:
        module: full name of the module.
        arguments: what `main()` finds in `sys.argv[3:]`.
        log: receives the child's output; a file must be readable, and is closed with the child.
            By default it is a temporary file.
        inherited: file descriptors to keep open in the child.
        variables: environment variables to set.

    Raises:
        WorkerError: no process can be started.
    """

    def __init__(
        self,
        module: str,
        *arguments: object,
        log: IO[bytes] | int | None = None,
        inherited: Sequence[int] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._log = tempfile.TemporaryFile() if log is None else log  # noqa: SIM115 - until close
        self.connection, theirs = Pipe()
        try:
            self._process = subprocess.Popen(
                command(module, theirs.fileno(), os.getpid(), *arguments),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs.fileno(), *inherited),
                process_group=0,
                env=environment() | dict(variables or {}),
            )
        except OSError as error:
            self._close_files()
            raise WorkerError(
                f"cannot start a process with {sys.executable}: {error.strerror}."
            ) from error
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    @property
    def is_reaped(self) -> bool:
        """Whether the process has ended and its exit code was collected."""
        return self._process.returncode is not None

    def send(self, message: object) -> None:
        """Send a message. If the child is dead, `receive` reports it."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def receive(self, timeout_s: float | None = None) -> Any:
        """Wait for the next message and return it.

        Raises:
            ImagemillError: the child sent `Failed`. ChildError: the child ended, or sent nothing
            for `timeout_s`.
        """
        try:
            if not self.connection.poll(timeout_s):
                raise ChildError(f"sent no message for {timeout_s:g} s", self.log_tail())
            message = self.connection.recv()
        except (EOFError, OSError):
            raise ChildError(self.reap(), self.log_tail()) from None
        if isinstance(message, Failed):
            raise message.error()
        return message

    def wait(self, seconds: float) -> None:
        """Wait for the process to end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)

    def kill(self) -> None:
        """Kill the process; its end is noticed as if it had died by itself."""
        self._process.kill()

    def reap(self) -> str:
        """Collect a process that has closed its connection, and describe how it ended."""
        self.connection.close()
        self.wait(_EXIT_S)
        if self._process.poll() is None:
            self._process.kill()
        return describe_exit(self._process.wait())

    def log_tail(self) -> str:
        """Return the last lines of the log, indented."""
        if isinstance(self._log, int):
            return ""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LOG_BYTES))
        lines = self._log.read().decode("utf-8", "backslashreplace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-_LOG_LINES:])

    def close(self) -> None:
        """Kill the process if it still runs, and close the connection and the log."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._close_files()

    def _close_files(self) -> None:
        self.connection.close()
        if not isinstance(self._log, int):
            self._log.close()


def describe_exit(code: int) -> str:
    """Describe an exit code of `subprocess`: `was killed by SIGKILL`, `ended with exit code 1`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"


def connect_to_parent() -> Connection:
    """Set up this process as a child and return the connection to its parent.

    The process dies with its parent, leaves SIGINT and SIGTERM to it, and logs to stderr.
    """
    socket, parent = (int(argument) for argument in sys.argv[1:3])
    if sys.platform == "linux":
        # The kernel kills this process when its parent dies. Elsewhere the process ends at its next
        # message, when it finds the socket closed.
        libc: Any = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    warnings.simplefilter("ignore")  # a library's warning about an image belongs in its row
    return Connection(socket)


def run_child(work: Callable[[Connection], object]) -> int:
    """Run a child's work and report its error to the parent as `Failed`.

    A lost device and a lack of memory are not reported: the process dies of them, and its parent
    decides whether to start another.

    Args:
        work: is called with the connection to the parent.

    Returns: the exit code.
    """
    connection = connect_to_parent()
    try:
        work(connection)
        return 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        _log.warning("the parent process is gone")
        return 1
    except MemoryError:
        _log.exception("out of memory")
        return 1
    except ImagemillError as error:
        _log.error("%s", error)
        if isinstance(error, DeviceLostError):
            return 1
        failed = Failed.of(_with_limits(error))
    except Exception as error:
        _log.exception("unexpected")
        text = shortage(error) or f"unexpected {type(error).__name__}: {error}"
        failed = Failed("ImagemillError", text)
    with contextlib.suppress(OSError):
        connection.send(failed)
    return 1


def _with_limits(error: ImagemillError) -> ImagemillError:
    """Name the limits of this process in an error that they may have caused."""
    is_limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if isinstance(error, errors.ModelError) and (is_limited or shortage(error)):
        return type(error)(f"{error} (Limits: {limits()}.)")
    return error


def command(module: str, *arguments: object) -> list[str]:
    """Return the command that runs `main()` of a module with `arguments` in `sys.argv[1:]`.

    `-P` keeps the working directory off `sys.path`: a file there named like a module, such as
    `json.py`, is never executed. The module is imported under its own name, so both processes can
    pickle its records.
    """
    return [sys.executable, "-P", "-m", "imagemill.system.processes", module, *map(str, arguments)]


def environment() -> dict[str, str]:
    """Return the environment of a child process.

    It is ours, with this package importable and numeric libraries kept from starting threads.
    """
    paths = [PACKAGE_PARENT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return (
        {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        | os.environ
        | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    )


def shortage(error: BaseException) -> str | None:
    """Describe an error that means a lack of memory, threads or open files; None for any other."""
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


def cpu_ticks(pid: int) -> int | None:
    """Return the CPU time of a process and its children in clock ticks; None if not on Linux."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return None
    return int(fields[11]) + int(fields[12]) + sum(cpu_ticks(int(child)) or 0 for child in children)


def pin_to_cores(cores: Iterable[int]) -> None:
    """Pin this process to CPU cores, if the system supports it.

    Import libraries that count cores after this call.
    """
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    del sys.argv[0]  # the module is now the first argument
    sys.exit(import_module(sys.argv[0]).main())
