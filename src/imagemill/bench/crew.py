"""The bench workers of all devices, given their orders together."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import IO

from imagemill import child, errors, wire
from imagemill.bench.records import Begin, Compute, Decode, Measured, Offline, Ready
from imagemill.errors import ImagemillError, WorkerError
from imagemill.records import DeviceSpec, Job

_LOG_BYTES = 2_000


@dataclass(frozen=True, slots=True)
class _Member:
    device: DeviceSpec
    process: subprocess.Popen[bytes]
    connection: Connection
    log: IO[bytes]


class Crew:
    """One process per device, each with its session compiled.

    Raises:
        ImagemillError: what a worker could not do. WorkerError: a worker died.
    """

    def __init__(self, job: Job, devices: Sequence[DeviceSpec]) -> None:
        self._members: list[_Member] = []
        try:
            for device in devices:
                self._members.append(_start(device))
                self._members[-1].connection.send(Begin(job, device))
            ready = [_answer(member) for member in self._members]
        except BaseException:
            self.close()
            raise
        self.versions: dict[str, str] = {}
        for answer in ready:
            assert isinstance(answer, Ready)
            self.versions |= answer.versions

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def measure(self, orders: Mapping[str, Compute | Decode | Offline]) -> dict[str, Measured]:
        """Give each device its order, all at once, and wait for all of them.

        Args:
            orders: device name → order; devices that are not named stay idle.
        """
        asked = [member for member in self._members if member.device.name in orders]
        for member in asked:
            with contextlib.suppress(OSError):  # dead: its answer will say so
                member.connection.send(orders[member.device.name])
        found = {}
        for member in asked:
            answer = _answer(member)
            assert isinstance(answer, Measured)
            found[member.device.name] = answer
        return found

    def close(self) -> None:
        """End all workers."""
        for member in self._members:
            with contextlib.suppress(OSError):
                member.connection.send(wire.Stop())
        for member in self._members:
            with contextlib.suppress(subprocess.TimeoutExpired):
                member.process.wait(timeout=2)
            if member.process.poll() is None:
                member.process.kill()
                member.process.wait()
            member.connection.close()
            member.log.close()
        self._members = []


def _start(device: DeviceSpec) -> _Member:
    ours, theirs = Pipe()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the crew
    command = [sys.executable, "-m", "imagemill.bench.worker", str(theirs.fileno()), str(os.getpid())]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=(theirs.fileno(),),
        process_group=0,
        env=child.environment(),
    )
    theirs.close()
    return _Member(device, process, ours, log)


def _answer(member: _Member) -> object:
    try:
        answer = member.connection.recv()
    except (EOFError, OSError):
        code = member.process.wait()
        member.log.seek(0)
        text = member.log.read()[-_LOG_BYTES:].decode("utf-8", "backslashreplace")
        raise WorkerError(f"the bench worker of {member.device.name} died (exit code {code}). Its last words:\n{text}") from None
    if isinstance(answer, wire.Failed):
        raise getattr(errors, answer.kind, ImagemillError)(answer.message)
    return answer
