"""The processes that measure, one a device, given their orders together."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import IO

from imagemill import errors
from imagemill.bench.messages import Begin, Compute, Decode, Measured, Ready
from imagemill.errors import ImagemillError, WorkerError
from imagemill.records import DeviceSpec, Job
from imagemill.system import processes
from imagemill.workers import protocol

_LOG_BYTES = 2_000


@dataclass(frozen=True, slots=True)
class _Member:
    device: DeviceSpec
    process: subprocess.Popen[bytes]
    connection: Connection
    log: IO[bytes]


class Crew:
    """One process per device, each with its session compiled.

    Args:
        job: what is compiled.
        devices: for which.
        patience_s: how long a worker may say nothing; None: for ever.

    Raises:
        ImagemillError: what a worker could not do. WorkerError: a worker died, or said nothing for
        too long.
    """

    def __init__(
        self, job: Job, devices: Sequence[DeviceSpec], patience_s: float | None = None
    ) -> None:
        self._members: list[_Member] = []
        self._batch_size = job.batch_size
        self._patience_s = patience_s
        try:
            for device in devices:
                self._members.append(_start(device))
                self._members[-1].connection.send(Begin(job, device))
            ready = [_answer(member, patience_s) for member in self._members]
        except BaseException:
            self.close()
            raise
        self.versions: dict[str, str] = {}
        for answer in ready:
            assert isinstance(answer, Ready)
            self.versions |= answer.versions

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def measure(self, orders: Mapping[str, Compute | Decode]) -> dict[str, Measured]:
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
            answer = _answer(member, self._patience_s)
            assert isinstance(answer, Measured)
            found[member.device.name] = answer
        return found

    def warm_up(self, batches: int = 4) -> None:
        """Compute so many batches on every device, or a few more."""
        self.measure(
            {member.device.name: Compute(_whole(batches, member)) for member in self._members}
        )

    def orders(self, seconds: float, fewest: int = 8) -> dict[str, Compute]:
        """See how many batches take every device about so long, and at least `fewest`, by having it
        compute as many as these.
        """
        tried = self.measure(
            {member.device.name: Compute(_whole(fewest, member)) for member in self._members}
        )
        rates = {name: found.images_per_second / self._batch_size for name, found in tried.items()}
        members = {member.device.name: member for member in self._members}
        return {
            name: Compute(_whole(max(fewest, seconds * rate), members[name]))
            for name, rate in rates.items()
        }

    def close(self) -> None:
        """End all workers."""
        for member in self._members:
            with contextlib.suppress(OSError):
                member.connection.send(protocol.Stop())
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
    process = subprocess.Popen(
        processes.command("imagemill.bench.worker", theirs.fileno(), os.getpid()),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=(theirs.fileno(),),
        process_group=0,
        env=processes.environment(),
    )
    theirs.close()
    return _Member(device, process, ours, log)


def _whole(batches: float, member: _Member) -> int:
    """So many batches or a few more: as many for each stream, one a core, lest some are idle while
    others compute the last ones.
    """
    streams = len(member.device.cores)
    return streams * math.ceil(batches / streams)


def _answer(member: _Member, patience_s: float | None) -> object:
    if not member.connection.poll(patience_s):
        raise WorkerError(
            f"the process that measures {member.device.name} said nothing for {patience_s:g} s."
        )
    try:
        answer = member.connection.recv()
    except (EOFError, OSError):
        code = member.process.wait()
        member.log.seek(0)
        text = member.log.read()[-_LOG_BYTES:].decode("utf-8", "backslashreplace")
        raise WorkerError(
            f"the process that measures {member.device.name} died (exit code {code}). Its last"
            f" words:\n{text}"
        ) from None
    if isinstance(answer, protocol.Failed):
        raise getattr(errors, answer.kind, ImagemillError)(answer.message)
    return answer
