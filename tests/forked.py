"""Processes that are forked from one that has imported their libraries.

Importing them takes a worker some twenty times as long as a test's few images. In a test that runs
imagemill in the test's own process, `Popen` below stands in for `subprocess.Popen`: it has a server
fork the child. The child is a process like any other, with its own environment, working
directory, standard streams and process group, but its modules are there already. `start` does the
same for a command line, beside which a server of its own forks its children: these die with that
server, and the server with the command line. A process is started as users start it if its
environment changes what an interpreter does as it starts. Of what Python runs at its start, a fork
runs one file: `sitecustomize.py`, which the variable `TEST_HOOKS` names.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from imagemill.system import processes
from imagemill.system.openvino_library import load_openvino

PRELOADED = (
    "PIL.Image",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "imagemill.cli",
    "imagemill.display.results",
    "imagemill.display.terminal",
    "imagemill.pipeline.backends.null",
    "imagemill.pipeline.backends.openvino",
    "imagemill.pipeline.decoding.isolated",
    "imagemill.pipeline.session_checks",
    "imagemill.pipeline.feed",
    "imagemill.pipeline.run_shards",
    "imagemill.pipeline.sink",
    "imagemill.pipeline.sources.archive",
    "imagemill.runner.append",
    "imagemill.runner.resume",
    "imagemill.runner.run",
    "imagemill.tuning.check_process",
    "imagemill.workers.worker",
    "numpy.random",
    "pyarrow.compute",
)
TORCH = ("torch", "torch.onnx.utils", "transformers.modeling_utils", "transformers.pytorch_utils")
"""Imported besides, if both are installed, where a test has the fixture `torch_is_preloaded`."""
COMMAND = tuple(processes.command(""))[:-1]
"""What a command of `processes.Child` begins with."""
MAIN = "forked"
"""This module, whose `main` is a command line."""
START = ("PYTHON", "LANG", "LC_", "LD_")
"""What the names of variables begin with that only the start of an interpreter reads."""
NAME = "forks-children"
"""What the kernel calls a server that belongs to a command line."""
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_MOST = 253
"""File descriptors that one message may carry."""


def of_start(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what only the start of an interpreter reads of an environment."""
    found = {k: v for k, v in environment.items() if k.startswith(START)}
    if hooks := environment.get("TEST_HOOKS"):
        paths = found.get("PYTHONPATH", "").split(os.pathsep)
        found["PYTHONPATH"] = os.pathsep.join(p for p in paths if p != os.path.dirname(hooks))
    return found


class Popen:
    """What `processes.Child` uses of `subprocess.Popen`, for a child that `Server` forks."""

    def __init__(
        self,
        server: Server,
        command: Sequence[str],
        *,
        stdout: Any,
        stderr: Any,
        pass_fds: Sequence[int],
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None = None,
    ) -> None:
        self.returncode: int | None = None
        self._status, theirs = socket.socketpair()
        streams = [one if isinstance(one, int) else one.fileno() for one in (stdout, stderr)]
        request = {"arguments": list(command[len(COMMAND) :]), "env": dict(env)}
        request |= {"cwd": os.fspath(cwd or os.getcwd()), "descriptors": list(pass_fds)}
        data = json.dumps(request).encode("utf-8", "surrogateescape")
        with theirs:
            server.send(data, [theirs.fileno(), *streams, *pass_fds])
        self.pid = int(self._status.recv(20))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("child", timeout or 0)
            if not (code := self._status.recv(20)):  # the server is gone
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            self.returncode = int(code or -signal.SIGKILL)
            self._status.close()
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Started(Popen):
    """What tests use of `subprocess.Popen`, for a command line that `Server` forks."""

    def __init__(self, server: Server, arguments: Sequence[str], **options: Any) -> None:
        pipes = [os.pipe() for _ in range(2)]
        self.stdout, self.stderr = (os.fdopen(reader, "rb") for reader, _ in pipes)
        out, err = (writer for _, writer in pipes)
        super().__init__(
            server,
            [*COMMAND, MAIN, "", "", *arguments],
            stdout=out,
            stderr=err,
            pass_fds=(),
            **options,
        )
        os.close(out)
        os.close(err)

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Return what is left of both outputs, after the end of the process."""
        found: dict[int, bytes] = {}
        streams = (self.stdout, self.stderr)
        readers = [
            threading.Thread(target=lambda at=at: found.update({at: streams[at].read()}))
            for at, stream in enumerate(streams)
            if not stream.closed
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        for stream in streams:
            stream.close()
        return found.get(0, b""), found.get(1, b"")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Server:
    """The process that forks children. It is started by the first one and ends with its maker, when
    the socket between them closes: the kernel's death signal would come with the end of the thread
    that made it.
    """

    def __init__(self, *more: str) -> None:
        self._more = more
        self._environment = processes.environment()
        self._socket: socket.socket | None = None

    def popen(self, command: Sequence[str], **options: Any) -> Any:
        """Stand in for `subprocess.Popen`."""
        env = options.get("env") or os.environ
        if tuple(command[: len(COMMAND)]) != COMMAND or not self.can_fork(env):
            return subprocess.Popen(command, **options)
        kept = {name: options[name] for name in ("stdout", "stderr", "pass_fds")}
        return Popen(self, command, env=env, **kept)

    def can_fork(self, env: Mapping[str, str]) -> bool:
        return sys.platform == "linux" and of_start(env) == of_start(self._environment)

    def send(self, data: bytes, descriptors: Sequence[int]) -> None:
        if self._socket is None:
            self._socket, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-W", "error", __file__, str(theirs.fileno()), *self._more],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=self._environment,
                )
        socket.send_fds(self._socket, [data], descriptors)

    def beside(self) -> None:
        """Have this process, which was forked and has one thread, fork its children in another that
        dies with it.
        """
        self._socket, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        parent = os.getpid()
        if os.fork():
            theirs.close()
            return
        try:
            self._socket.close()
            libc = call_this(NAME)
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                return
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (1, 2):
                os.dup2(nowhere, stream)
            serve(theirs)
        finally:
            os._exit(0)

    def fileno(self) -> int:
        """Return the descriptor by which this process asks for forks; -1 before the first."""
        return self._socket.fileno() if self._socket else -1

    def asked_by(self, descriptor: int) -> None:
        """Have the server that forked this process fork its children, too."""
        self._socket = socket.socket(fileno=descriptor)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def call_this(name: str) -> Any:
    """Give this process a name in the kernel's lists, up to 15 characters. Returns the library."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
    return libc


SERVER: Server | None = None
"""The one that forks command lines, while tests run."""


def start(
    arguments: Sequence[str], env: Mapping[str, str], cwd: str | os.PathLike[str] | None
) -> Started | None:
    """Start `imagemill ARGUMENTS` as a fork; None where it must be started as users start it."""
    if SERVER is None or not SERVER.can_fork(env):
        return None
    return Started(SERVER, arguments, env=env, cwd=cwd)


def main() -> int:
    """Be the command line, in a fork."""
    warnings.simplefilter("error")
    sys.argv = ["imagemill", *sys.argv[3:]]
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
    code: int = importlib.import_module("imagemill.cli").main()
    return code


def serve(requests: socket.socket) -> None:
    """Fork a child for each request, and tell its maker its number and its exit code."""
    waker, woken = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    makers = {requests}
    while True:
        ready = select.select([*makers, woken], [], [])[0]
        if woken in ready:
            ready.remove(woken)
            woken.recv(4096)
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                with children.pop(pid) as maker, contextlib.suppress(OSError):
                    maker.send(b"%d" % os.waitstatus_to_exitcode(status))
        for asking in ready:
            data, descriptors, _, _ = socket.recv_fds(asking, 1 << 20, _MOST)
            if not data and asking is requests:
                return
            if not data:
                makers.remove(asking)
                asking.close()
                continue
            maker = socket.socket(fileno=descriptors[0])
            ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
            if (pid := os.fork()) == 0:
                request = json.loads(data.decode("utf-8", "surrogateescape"))
                os._exit(be_child(request, [*descriptors[1:], theirs.detach()]))
            makers.add(ours)
            children[pid] = maker
            with contextlib.suppress(OSError):  # it may have died meanwhile
                maker.send(b"%-20d" % pid)
            theirs.close()
            for descriptor in descriptors[1:]:
                os.close(descriptor)


def be_child(request: dict[str, Any], received: Sequence[int]) -> int:
    """Become what the command would have started, in this fork. The last descriptor received is a
    socket by which this process can ask for forks.
    """
    libc = call_this("python")
    if request["arguments"][0] == MAIN:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    places = [1, 2, *request["descriptors"]]
    places.append(max(places) + 1)
    above = [fcntl.fcntl(one, fcntl.F_DUPFD, max(places) + 1) for one in received]
    os.closerange(3, max(places) + 1)
    for one, place in zip(above, places, strict=True):
        os.dup2(one, place, inheritable=place != places[-1])
    os.closerange(max(places) + 1, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    module, connection, _, *rest = request["arguments"]
    sys.argv = [module, connection, str(os.getppid()), *rest]
    sys.orig_argv = [sys.executable, "-m", *(["imagemill"] if module == MAIN else sys.argv)]
    atexit._clear()
    code = 1
    try:
        server = Server()
        if module == MAIN:
            os.close(places[-1])
            server.beside()
        else:
            server.asked_by(places[-1])
        processes.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": server.popen})
        if file := os.environ.get("TEST_HOOKS"):
            hooks = {"__name__": "sitecustomize", "__file__": file}
            exec(compile(Path(file).read_text(), file, "exec"), hooks)
        code = importlib.import_module(module).main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        threading._shutdown()  # type: ignore[attr-defined] - as an interpreter does
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    return code


if __name__ == "__main__":
    load_openvino()
    for name in (MAIN, *PRELOADED, *sys.argv[2:]):
        importlib.import_module(name)
    del sys.path[0]  # the folder of this file, which only tests search
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
