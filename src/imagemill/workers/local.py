"""The worker pool of this machine: one child process per device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from imagemill.records import DeviceSpec, Job, Lease
from imagemill.system.processes import Stop
from imagemill.workers import protocol
from imagemill.workers.pool import Event, Joined, WorkerStatus
from imagemill.workers.supervisor import Supervisor

_STOP_S = 2.0
"""How long workers may take to end by themselves."""


class LocalPool:
    """The `WorkerPool` of `--engine local`: one worker process for each device."""

    def __init__(self, job: Job, devices: Sequence[DeviceSpec]) -> None:
        self._job = job
        self._spare = list(devices)
        """Devices without a worker."""
        self._joined: list[Event] = []
        self._workers: dict[str, Supervisor] = {}

    def start(self, limit: int) -> Sequence[DeviceSpec]:
        """Implement `WorkerPool.start`."""
        started, self._spare = self._spare[:limit], self._spare[limit:]
        for device in started:
            self._workers[device.name] = Supervisor(self._job, device)
        return started

    def receive(self, seconds: float) -> Sequence[Event]:
        """Implement `WorkerPool.receive`."""
        by_connection: dict[Any, Supervisor] = {
            worker.connection: worker for worker in self._workers.values()
        }
        events, self._joined = self._joined, []
        for connection in wait(list(by_connection), timeout=0 if events else seconds):
            assert isinstance(connection, Connection)
            worker = by_connection[connection]
            events += [Event(worker.device.name, message) for message in worker.receive()]
        for worker in self._workers.values():
            worker.watch()
        return events

    def send(self, device: str, message: Lease | protocol.Pause) -> None:
        """Implement `WorkerPool.send`."""
        self._workers[device].send(message)

    def restart(self, device: str) -> None:
        """Implement `WorkerPool.restart`."""
        self._workers[device] = Supervisor(self._job, self._workers[device].device)

    def retire(self, device: str) -> bool:
        """Implement `WorkerPool.retire`."""
        self._workers.pop(device).close()
        if self._spare:
            spare = self._spare.pop(0)
            self._workers[spare.name] = Supervisor(self._job, spare)
            self._joined.append(Event(spare.name, Joined(spare)))
        return bool(self._workers)

    def status(self, device: str) -> WorkerStatus:
        """Implement `WorkerPool.status`."""
        return self._workers[device].status()

    def stop(self) -> None:
        """Implement `WorkerPool.stop`."""
        for worker in self._workers.values():
            worker.send(Stop())
        deadline = time.monotonic() + _STOP_S
        for worker in self._workers.values():
            worker.wait(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """Implement `WorkerPool.kill`."""
        for worker in self._workers.values():
            worker.close()
