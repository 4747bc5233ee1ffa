"""The supervisor of one device's worker process: starts it, watches it, and reports its end.

- The images that its decoding threads worked on are known after its death, because the heartbeat
  outlives it.
- A process is killed if a decoding thread works on one image for longer than `--max-seconds`.
- A process is killed if its session hangs: it has shards in flight, but for ten minutes neither
  decodes nor takes a batch nor commits. So is one that has work but uses no CPU time.
- The process never outlives its supervisor.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from imagemill.job.paths import JobPaths
from imagemill.pipeline.backends.nvidia import pinned
from imagemill.pipeline.heartbeat import Heartbeat, shared_file
from imagemill.records import DeviceSpec, Job, Lease
from imagemill.system import files, processes
from imagemill.system.processes import Child, Failed, Stop
from imagemill.workers.protocol import Begin, Died, Done, Idle, Pause, Ready, Want, WorkerStatus

_log = logging.getLogger(__name__)

_SLACK_S = 1.0
STALLED_S = 600.0
"""Longer than a batch takes on the slowest device, and than requests to an object store are
repeated.
"""
WITHOUT_CPU_S = 120.0
"""After this time without CPU use a process with work hangs. Requests to an object store are
repeated for a shorter time.
"""
_UNWATCHED_S = 10.0
"""If the process was not watched for this long, we were stopped ourselves (Ctrl-Z)."""


class Supervisor:
    """Starts and watches one worker process. A new process needs a new supervisor.

    Raises:
        WorkerError: no process can be started. OutputError: its log cannot be written.
    """

    def __init__(self, job: Job, device: DeviceSpec) -> None:
        self.device = device
        self._limit_s = job.limits.max_seconds + _SLACK_S
        self._log_file = JobPaths.of(job.output, job.log_dir).device_log(device.name)
        self._ready = False
        self._in_flight: set[int] = set()
        self._timed_out: tuple[int, ...] = ()
        self._batches = -1
        self._ticks: int | None = None
        self._ticked_at = self._watched_at = self._alive_at = time.monotonic()
        self._hang: str | None = None
        self._shared_file = shared_file()
        self._heartbeat = Heartbeat(self._shared_file.fileno())
        self._heartbeat.reset()
        visible, variables = pinned(device)
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._shared_file)
            log = undo.enter_context(files.appending(self._log_file))
            self._child = Child(
                "imagemill.workers.worker",
                self._shared_file.fileno(),
                log=log,
                inherited=(self._shared_file.fileno(),),
                variables=variables,
            )
            undo.pop_all()
        self.connection = self._child.connection
        self.send(Begin(job, visible))

    def send(self, message: Begin | Lease | Pause | Stop) -> None:
        """Send a message to the process. If it is dead, `receive` reports that."""
        if isinstance(message, Lease):
            self._in_flight.add(message.shard.number)
        self._child.send(message)

    def receive(self) -> Iterator[Ready | Want | Idle | Done | Failed | Died]:
        """Yield the messages that have arrived; the last one says that the process died."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                match message:
                    case Ready():
                        self._ready = True
                    case Done(receipt):
                        self._in_flight.discard(receipt.shard)
                        self._alive_at = time.monotonic()
                yield message
        except (EOFError, OSError):
            yield self._handle_exit()

    def watch(self) -> None:
        """Kill the process if it hangs; call this several times a second."""
        if self._child.is_reaped:
            return
        self._kill_for_slow_images()
        self._kill_if_stalled()
        self._kill_if_asleep()

    def status(self) -> WorkerStatus:
        """Return how far the process is."""
        return WorkerStatus(self._heartbeat.rows, self._heartbeat.clock)

    def wait(self, seconds: float) -> None:
        """Wait for the process to end by itself."""
        self._child.wait(seconds)

    def close(self) -> None:
        """Kill the process if it still runs, and release what belongs to it."""
        self._child.close()
        self._shared_file.close()

    def _handle_exit(self) -> Died:
        reason = self._child.reap()
        images = self._heartbeat.active_images() if self._ready else ()
        died = Died(
            self._child.pid,
            self._hang or reason,
            tuple(sorted({image.index for image in images})),
            self._timed_out,
            f"The last lines of {self._log_file}:\n{self._child.log_tail()}",
        )
        self.close()
        return died

    def _kill_for_slow_images(self) -> None:
        if not self._ready or self._timed_out:
            return
        now = time.monotonic_ns()
        self._timed_out = tuple(
            image.index
            for image in self._heartbeat.active_images()
            if image.since_ns and now - image.since_ns > self._limit_s * 1e9
        )
        if self._timed_out:
            _log.warning(
                "%s works on image %s for more than %.1f s: killed",
                self.device.name,
                self._timed_out,
                self._limit_s,
            )
            self._child.kill()

    def _kill_if_stalled(self) -> None:
        now = time.monotonic()
        batches, images = self._heartbeat.batches, self._heartbeat.active_images()
        if batches != self._batches or not self._in_flight or not self._ready or images:
            self._batches, self._alive_at = batches, now
        elif now - self._alive_at > STALLED_S:
            _log.warning(
                "%s has done nothing for %.0f s with %d shards in flight: killed",
                self.device.name,
                STALLED_S,
                len(self._in_flight),
            )
            self._alive_at = now
            self._child.kill()

    def _kill_if_asleep(self) -> None:
        """Kill a process that should start or work, but waits for something that never comes, such
        as a thread that could not start.
        """
        now = time.monotonic()
        has_work = not self._ready or (self._in_flight and not self._heartbeat.active_images())
        ticks = processes.cpu_ticks(self._child.pid) if has_work else None
        was_stopped = now - self._watched_at > _UNWATCHED_S
        self._watched_at = now
        if ticks is None or ticks != self._ticks or was_stopped:
            self._ticks, self._ticked_at = ticks, now
        elif now - self._ticked_at > WITHOUT_CPU_S:
            doing = "working" if self._ready else "starting"
            self._hang = (
                f"used no CPU time for {WITHOUT_CPU_S:.0f} s while {doing} and was killed; limits:"
                f" {processes.limits()}"
            )
            _log.warning("%s %s", self.device.name, self._hang)
            self._ticked_at = now
            self._child.kill()
