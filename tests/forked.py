"""Child processes that are forked from one that has imported their libraries.

Importing them takes a worker some twenty times as long as a test's few images. In a test that runs
imagemill in the test's own process, `Popen` below stands in for `subprocess.Popen`: it has a server
fork the child. The child is a process like any other, with its own environment, working
directory, standard streams, process group and death, but its modules are there already. A child is
started as users start it if its environment changes what an interpreter does as it starts, and by
every command line that is a process of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from imagemill.system import processes
from imagemill.system.openvino_library import load_openvino

PRELOADED = (
    "PIL.Image",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "imagemill.pipeline.backends.null",
    "imagemill.pipeline.backends.openvino",
    "imagemill.pipeline.decoding.isolated",
    "imagemill.pipeline.session_checks",
    "imagemill.pipeline.feed",
    "imagemill.pipeline.run_shards",
    "imagemill.pipeline.sink",
    "imagemill.tuning.check_process",
    "imagemill.workers.worker",
    "numpy.random",
    "pyarrow.compute",
)
TORCH = ("torch", "torch.onnx.utils", "transformers.modeling_utils", "transformers.pytorch_utils")
"""Imported besides, if both are installed, where a test has the fixture `torch_is_preloaded`."""
COMMAND = tuple(processes.command(""))[:-1]
"""What a command of `processes.Child` begins with."""
_MOST = 253
"""File descriptors that one message may carry."""


def of_start(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what only the start of an interpreter reads of an environment."""
    return {k: v for k, v in environment.items() if k.startswith(("PYTHON", "LC_", "LD_"))}


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
    ) -> None:
        self.returncode: int | None = None
        self._status, theirs = socket.socketpair()
        streams = [one if isinstance(one, int) else one.fileno() for one in (stdout, stderr)]
        request = {"arguments": list(command[len(COMMAND) :]), "env": dict(env)}
        request |= {"cwd": os.getcwd(), "descriptors": list(pass_fds)}
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
            self.returncode = int(self._status.recv(20) or -signal.SIGKILL)
            self._status.close()
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


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
        if (
            tuple(command[: len(COMMAND)]) != COMMAND
            or of_start(env) != of_start(self._environment)
            or sys.platform != "linux"
        ):
            return subprocess.Popen(command, **options)
        kept = {name: options[name] for name in ("stdout", "stderr", "pass_fds")}
        return Popen(self, command, env=env, **kept)

    def send(self, data: bytes, descriptors: Sequence[int]) -> None:
        if self._socket is None:
            self._socket, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, __file__, str(theirs.fileno()), *self._more],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=self._environment,
                )
        socket.send_fds(self._socket, [data], descriptors)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._process.wait()


def serve(requests: socket.socket, *more: str) -> None:
    """Fork a child for each request, and tell its maker its number and its exit code."""
    load_openvino()
    for name in (*PRELOADED, *more):
        importlib.import_module(name)
    waker, woken = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    while True:
        ready = select.select([requests, woken], [], [])[0]
        if woken in ready:
            woken.recv(4096)
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                with children.pop(pid) as maker, contextlib.suppress(OSError):
                    maker.send(b"%d" % os.waitstatus_to_exitcode(status))
        if requests in ready:
            data, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, _MOST)
            if not data:
                return
            maker = socket.socket(fileno=descriptors[0])
            if (pid := os.fork()) == 0:
                os._exit(be_child(json.loads(data.decode("utf-8", "surrogateescape")), descriptors))
            children[pid] = maker
            maker.send(b"%-20d" % pid)
            for descriptor in descriptors[1:]:
                os.close(descriptor)


def be_child(request: dict[str, Any], received: Sequence[int]) -> int:
    """Become what the command would have started, in this fork."""
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    places = [1, 2, *request["descriptors"]]
    above = [fcntl.fcntl(one, fcntl.F_DUPFD, max(places) + 1) for one in received[1:]]
    os.closerange(3, max(places) + 1)
    for one, place in zip(above, places, strict=True):
        os.dup2(one, place)
    os.closerange(max(places) + 1, max(above) + 1)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    module, connection, _, *rest = request["arguments"]
    sys.argv = [module, connection, str(os.getppid()), *rest]
    code = 1
    try:
        code = importlib.import_module(module).main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    return code


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), *sys.argv[2:])
