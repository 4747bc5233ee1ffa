"""One device's worker process: started, watched over, and seen to its end. Whoever supervises is
the process's parent.

- The images that its decoding threads were at are known after its death, whatever it died of: the
  noteboard outlives it.
- A decoding thread that is at one image for longer than the time budget is a death that is brought
  about here. So is a session that hangs: a worker with shards in hand that for ten minutes neither
  decodes nor takes a batch nor commits.
- The process never outlives its supervisor.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from imagemill.job.paths import JobPaths
from imagemill.pipeline import heartbeat
from imagemill.pipeline.heartbeat import Noteboard
from imagemill.records import DeviceSpec, Job, Lease
from imagemill.system import files, processes
from imagemill.system.processes import Child, Failed, Stop
from imagemill.workers import protocol
from imagemill.workers.pool import Died, Told

_log = logging.getLogger(__name__)

_SLACK_S = 1.0
STALLED_S = 600.0
"""Longer than a batch takes on the slowest device, and than an object store is waited for."""
WITHOUT_CPU_S = 120.0
"""A worker that has work, does none and uses no CPU time for so long hangs; an object store is
waited for less.
"""
_UNWATCHED_S = 10.0
"""This process was itself stopped (Ctrl-Z) if it has not looked for so long."""


class Supervisor:
    """Starts one worker process and watches it. It is for one process: a new one has a supervisor
    of its own.

    Args:
        job: the frozen job.
        device: what the process drives.

    Raises:
        WorkerError: no process can be started. OutputError: its log cannot be written.
    """

    def __init__(self, job: Job, device: DeviceSpec) -> None:
        self.device = device
        self._limit_s = job.limits.max_seconds + _SLACK_S
        self._log_file = JobPaths.of(job.output, job.log_dir).device_log(device.name)
        self._ready = False
        self._in_hand: set[int] = set()
        self._timed_out: tuple[int, ...] = ()
        self._pulse = -1
        self._ticks: int | None = None
        self._ticked_at = self._watched_at = time.monotonic()
        self._hangs: str | None = None
        self._alive_at = time.monotonic()
        self._notes = heartbeat.shared_file()
        self._board = Noteboard(self._notes.fileno())
        self._board.clear()
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._notes)
            log = undo.enter_context(files.appending(self._log_file))
            self._child = Child(
                "imagemill.workers.worker",
                self._notes.fileno(),
                log=log,
                inherited=(self._notes.fileno(),),
            )
            undo.pop_all()
        self.connection = self._child.connection
        self.send(protocol.Begin(job, device))

    def send(self, message: protocol.Begin | Lease | protocol.Pause | Stop) -> None:
        """Tell the process something. Where it is dead already, `hear` will say so."""
        if isinstance(message, Lease):
            self._in_hand.add(message.shard.number)
        self._child.send(message)

    def hear(
        self,
    ) -> Iterator[protocol.Ready | protocol.Want | protocol.Idle | protocol.Done | Failed | Died]:
        """What the process has said and was not heard yet, last of all that it died."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                match message:
                    case protocol.Ready():
                        self._ready = True
                    case protocol.Done(receipt):
                        self._in_hand.discard(receipt.shard)
                        self._alive_at = time.monotonic()
                yield message
        except (EOFError, OSError):
            yield self._bury()

    def watch(self) -> None:
        """Kill the process where it hangs; call this some times a second."""
        if self._child.is_reaped:
            return
        self._kill_hanging()
        self._kill_stalled()
        self._kill_asleep()

    def told(self) -> Told:
        """How far the process is."""
        return Told(self._board.rows, self._board.clock)

    def wait(self, seconds: float) -> None:
        """Wait for the process to end by itself."""
        self._child.wait(seconds)

    def close(self) -> None:
        """Kill the process if it still runs, and release what belongs to it."""
        self._child.close()
        self._notes.close()

    def _bury(self) -> Died:
        reason = self._child.reap()
        noted = tuple(sorted({note.index for note in self._board.notes()})) if self._ready else ()
        self._notes.close()
        log = f"The last lines of {self._log_file}:\n{self._child.log_tail()}"
        return Died(
            self._child.pid, self._hangs or reason, self._ready, noted, self._timed_out, log
        )

    def _kill_hanging(self) -> None:
        if not self._ready or self._timed_out:
            return
        now = time.monotonic_ns()
        hanging = tuple(
            n.index
            for n in self._board.notes()
            if n.since_ns and now - n.since_ns > self._limit_s * 1e9
        )
        if hanging:
            _log.warning(
                "%s is at image %s for more than %.1f s: killed",
                self.device.name,
                hanging,
                self._limit_s,
            )
            self._timed_out = hanging
            self._child.kill()

    def _kill_stalled(self) -> None:
        now = time.monotonic()
        pulse = self._board.pulse
        if pulse != self._pulse or not self._in_hand or not self._ready or self._board.notes():
            self._pulse, self._alive_at = pulse, now
        elif now - self._alive_at > STALLED_S:
            _log.warning(
                "%s has done nothing for %.0f s with %d shards in hand: killed",
                self.device.name,
                STALLED_S,
                len(self._in_hand),
            )
            self._alive_at = now
            self._child.kill()

    def _kill_asleep(self) -> None:
        """Kill a process that should start or work, but waits for something that never comes, such
        as a thread that could not start.
        """
        now = time.monotonic()
        is_due = (self._in_hand and not self._board.notes()) if self._ready else True
        ticks = processes.cpu_ticks(self._child.pid) if is_due else None
        was_stopped = now - self._watched_at > _UNWATCHED_S
        self._watched_at = now
        if ticks is None or ticks != self._ticks or was_stopped:
            self._ticks, self._ticked_at = ticks, now
        elif now - self._ticked_at > WITHOUT_CPU_S:
            doing = "working" if self._ready else "starting"
            self._hangs = (
                f"used no CPU time for {WITHOUT_CPU_S:.0f} s while {doing} and was killed; limits:"
                f" {processes.limits()}"
            )
            _log.warning("%s %s", self.device.name, self._hangs)
            self._ticked_at = now
            self._child.kill()
