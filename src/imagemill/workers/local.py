"""The worker pool of this machine: one child process per device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

from imagemill.records import DeviceSpec, Job, Lease
from imagemill.system.processes import Stop
from imagemill.workers import protocol
from imagemill.workers.protocol import Event, Joined, WorkerStatus
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
        """Start at least one and at most `limit` workers, and return their devices."""
        started, self._spare = self._spare[:limit], self._spare[limit:]
        for device in started:
            self._workers[device.name] = Supervisor(self._job, device)
        return started

    def receive(self, seconds: float) -> Sequence[Event]:
        """Return events in order, as soon as there are any; nothing if none came in `seconds`."""
        by_connection: dict[Any, Supervisor] = {
            worker.connection: worker for worker in self._workers.values()
        }
        events, self._joined = self._joined, []
        for connection in wait(list(by_connection), timeout=0 if events else seconds):
            worker = by_connection[connection]
            events += [Event(worker.device.name, message) for message in worker.receive()]
        for worker in self._workers.values():
            worker.watch()
        return events

    def send(self, device: str, message: Lease | protocol.Pause) -> None:
        """Send a lease to an idle worker, or either message to one that sent `Want`."""
        self._workers[device].send(message)

    def restart(self, device: str) -> None:
        """Start the process of a worker that died again."""
        self._workers[device] = Supervisor(self._job, self._workers[device].device)

    def retire(self, device: str) -> bool:
        """Kill a worker for good. Return whether others are left, or were started for it."""
        self._workers.pop(device).close()
        if self._spare:
            spare = self._spare.pop(0)
            self._workers[spare.name] = Supervisor(self._job, spare)
            self._joined.append(Event(spare.name, Joined(spare)))
        return bool(self._workers)

    def status(self, device: str) -> WorkerStatus:
        """Return how far a worker's process is."""
        return self._workers[device].status()

    def stop(self) -> None:
        """Let the workers end by themselves, once everything is committed."""
        for worker in self._workers.values():
            worker.send(Stop())
        deadline = time.monotonic() + _STOP_S
        for worker in self._workers.values():
            worker.wait(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """Kill all workers; none outlives this call."""
        for worker in self._workers.values():
            worker.close()
