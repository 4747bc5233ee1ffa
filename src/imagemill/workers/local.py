"""The workers of this machine: one child process per device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from imagemill.records import DeviceSpec, Job, Lease
from imagemill.system.processes import Stop
from imagemill.workers import protocol
from imagemill.workers.pool import Heard, Told
from imagemill.workers.supervisor import Supervisor

_END_S = 2.0


class LocalCrew:
    """See `crew.Crew`.

    Args:
        job: the frozen job.
        devices: one worker process each.
    """

    def __init__(self, job: Job, devices: Sequence[DeviceSpec]) -> None:
        self._job = job
        self._devices = devices
        self._workers: dict[str, Supervisor] = {}

    def begin(self, most: int) -> Sequence[DeviceSpec]:
        """See `Crew.begin`."""
        begun = self._devices[:most]
        for device in begun:
            self._workers[device.name] = self._start(device)
        return begun

    def wait(self, seconds: float) -> Sequence[Heard]:
        """See `Crew.wait`."""
        by_connection: dict[Any, Supervisor] = {
            worker.connection: worker for worker in self._workers.values()
        }
        heard: list[Heard] = []
        for connection in wait(list(by_connection), timeout=seconds):
            assert isinstance(connection, Connection)
            worker = by_connection[connection]
            heard += [Heard(worker.device.name, message) for message in worker.hear()]
        for worker in self._workers.values():
            worker.watch()
        return heard

    def answer(self, device: str, message: Lease | protocol.Pause) -> None:
        """See `Crew.answer`."""
        self._workers[device].send(message)

    def restart(self, device: str) -> None:
        """See `Crew.restart`."""
        self._workers[device] = self._start(self._workers[device].device)

    def told(self, device: str) -> Told:
        """See `Crew.told`."""
        return self._workers[device].told()

    def end(self) -> None:
        """See `Crew.end`."""
        for worker in self._workers.values():
            worker.send(Stop())
        deadline = time.monotonic() + _END_S
        for worker in self._workers.values():
            worker.wait(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """See `Crew.kill`."""
        for worker in self._workers.values():
            worker.close()

    def _start(self, device: DeviceSpec) -> Supervisor:
        return Supervisor(self._job, device)
