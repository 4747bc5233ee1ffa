"""The launcher: one child process per device. It leases shards, watches, restarts and stops.

Contract
--------
- Every shard that is not committed is either waiting here or leased to exactly one live worker; `wire.Done` is sent only after its part is
  durably on disk. A worker that dies gives its leases back.
- A worker may die at any moment and of anything. It is started again, at once, and the pictures that its decoding threads were at (the
  noteboard outlives it) become suspects: the next worker decodes them in a disposable process. A shard that was in hand at two deaths
  is leased alone, with every picture decoded that way.
- A decoding thread that is at one picture for longer than the time budget is a death that the launcher brings about itself. If the same
  picture does so again, though its decoder is disposable, its very reading hangs, and it is given up.
- So is a session that hangs: a worker with shards in hand that for ten minutes neither decodes nor takes a batch nor commits.
- A worker that cannot start three times running, or ten deaths without one commit between them, end the job with the log's last lines.
- Workers never outlive this process.
- Nothing here grows with the number of pictures, and little with the number of shards: those not committed are held as small records.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

from imagemill import child, errors, layout, noteboard, wire
from imagemill.errors import ImagemillError, Interrupted, WorkerError
from imagemill.layout import JobPaths
from imagemill.noteboard import Noteboard
from imagemill.records import Clock, DeviceSpec, Job, Lease, Receipt, Shard, Throughput
from imagemill.stopwatch import total
from imagemill.timeline import Timeline

_log = logging.getLogger(__name__)

START_TRIES = 3
DEATHS_WITHOUT_COMMIT = 10
ALONE_AFTER_DEATHS = 2
_TICK_S = 0.2
_SLACK_S = 1.0
STALLED_S = 600.0
"""Longer than a batch takes on the slowest device, and than an object store is waited for."""
_LOG_LINES = 12


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the job is, handed to the display at every tick."""

    rows: int
    """Committed by this invocation."""
    failed_by_status: Counter[str]
    """Among the committed."""
    devices: dict[str, int]
    """Rows per device that have their answers, committed or not. Becomes less where a worker dies: what it had in hand is done again."""
    leased: dict[str, int]
    """Rows per device that are leased to it and have no answer yet."""
    clock: Clock
    """Where the time of all devices went."""
    restarts: dict[str, int]
    since_first_lease_s: float
    ready: int
    """Devices whose session is compiled."""
    sampling: bool = False
    """A preflight takes some of the cores' time; the launcher itself does not know of it."""


@dataclass(slots=True)
class Outcome:
    """What a launch was, when it is over."""

    receipts: list[Receipt] = field(default_factory=list)
    devices: dict[str, int] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    clocks: dict[str, Clock] = field(default_factory=dict)
    seconds: float = 0.0
    """From the first lease to the last commit."""
    throughput: Throughput | None = None


@dataclass(slots=True)
class _Worker:
    """One device and the process that drives it now."""

    device: DeviceSpec
    position: int
    process: subprocess.Popen[bytes]
    connection: Connection
    notes: IO[bytes]
    board: Noteboard
    ready: bool = False
    idle: bool = False
    leases: dict[int, Lease] = field(default_factory=dict)
    timed_out: tuple[int, ...] = ()
    """Pictures for whose sake the launcher killed it."""
    clock: Clock = field(default_factory=Clock)
    rows: int = 0
    """Committed by this process."""
    pulse: int = -1
    alive_at: float = 0.0
    """When it was last seen doing something, on the monotonic clock."""


class Launcher:
    """Runs shards on devices until all of them are committed.

    Args:
        job: the frozen job.
        devices: one worker process each.
        shards: the ones that are not committed yet.
        groups: how many sub-folders the shards are dealt by; where it equals the number of devices, each device takes its own first.
        grace_s: how long a SIGTERM or SIGINT waits for the shards in hand.
        on_tick: called some times a second with how far things are.
        on_receipt: called for each commit; may raise to end the job.
        say: takes a line for the user.
    """

    def __init__(
        self,
        job: Job,
        devices: Sequence[DeviceSpec],
        shards: Sequence[Shard],
        *,
        groups: int = 1,
        grace_s: float = 20.0,
        on_tick: Callable[[Progress], None] = lambda _: None,
        on_receipt: Callable[[Receipt], None] = lambda _: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._job = job
        self._devices = devices
        self._paths = JobPaths.of(job.output, job.log_dir)
        self._dealt = groups == len(devices)
        self._queues: dict[int, deque[Lease]] = {}
        for shard in shards:
            self._queues.setdefault(shard.group if self._dealt else 0, deque()).append(Lease(shard))
        self._alone: deque[Lease] = deque()
        self._remaining = len(shards)
        self._grace_s = grace_s
        self._on_tick = on_tick
        self._on_receipt = on_receipt
        self._say = say
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._deaths_since_commit = 0
        self._deaths_of_shard: Counter[int] = Counter()
        self._signals: list[int] = []
        self._failed_by_status: Counter[str] = Counter()
        self._earlier_clocks: dict[str, Clock] = {}
        self._first_lease = 0.0
        self._next_tick = 0.0
        self._last_commit = 0.0
        self._timeline = Timeline([device.name for device in devices])
        self._outcome = Outcome(devices={d.name: 0 for d in devices}, restarts={d.name: 0 for d in devices})

    def run(self) -> Outcome:
        """Run to the end.

        Raises:
            Interrupted: SIGINT or SIGTERM came. WorkerError: workers die without end. Any other ImagemillError a worker ended with.
        """
        with self._handling_signals():
            try:
                for position, device in enumerate(self._devices[: max(1, min(len(self._devices), self._remaining))]):
                    self._workers.append(self._start(device, position))
                while self._remaining:
                    self._turn()
                    if self._signals:
                        self._stop_gracefully()
                        break
                self._on_tick(self._progress())  # the last word, also of a job that is over before its second tick
                if not self._remaining:
                    self._end_workers()
            finally:
                self._kill_workers()
        self._outcome.seconds = max(0.0, self._last_commit - self._first_lease)
        self._outcome.throughput = self._timeline.read()
        for device in self._devices:
            self._outcome.clocks[device.name] = self._clock_of(device.name)
        if self._remaining:
            number = self._signals[0]
            raise Interrupted(
                f"stopped by {signal.Signals(number).name}: {self._remaining} shards are left. Repeat the command to resume.", 128 + number
            )
        return self._outcome

    # One turn of the loop.

    def _turn(self) -> None:
        by_connection: dict[Any, _Worker] = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection), timeout=_TICK_S):
            worker = by_connection[connection]
            try:
                while worker.connection.poll():
                    self._handle(worker, worker.connection.recv())
            except (EOFError, OSError):
                self._bury(worker)
        self._wake_idle()
        self._kill_hanging()
        self._kill_stalled()
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + _TICK_S
            self._on_tick(self._progress())

    def _handle(self, worker: _Worker, message: object) -> None:
        match message:
            case wire.Ready():
                worker.ready, worker.idle = True, True
                self._failed_starts = 0
                _log.info("%s is ready (pid %d)", worker.device.name, worker.process.pid)
            case wire.Want():
                lease = None if self._signals or self._holds_suspect(worker) else self._next_lease(worker)
                worker.connection.send(lease or wire.Pause())
            case wire.Idle():
                worker.idle = True
            case wire.Done(receipt, clock):
                self._committed(worker, receipt, clock)
            case wire.Failed(kind, text):
                _log.error("%s: %s", worker.device.name, text)
                raise getattr(errors, kind, ImagemillError)(text)
            case _:
                raise AssertionError(message)

    def _committed(self, worker: _Worker, receipt: Receipt, clock: Clock) -> None:
        del worker.leases[receipt.shard]
        worker.clock = clock
        worker.rows += receipt.rows
        worker.alive_at = time.monotonic()
        self._remaining -= 1
        self._deaths_since_commit = 0
        self._deaths_of_shard.pop(receipt.shard, None)
        self._last_commit = time.monotonic()
        self._outcome.receipts.append(receipt)
        self._outcome.devices[worker.device.name] += receipt.rows
        since_first_lease_s = self._last_commit - self._first_lease
        self._timeline.add(worker.device.name, since_first_lease_s - receipt.seconds, since_first_lease_s, receipt.rows)
        self._failed_by_status.update(receipt.failed_by_status)
        self._on_receipt(receipt)

    def _wake_idle(self) -> None:
        """Give idle workers a lease where there is one: at the start, and when a dead worker's leases came back."""
        for worker in self._workers:
            if worker.idle and not self._signals and (lease := self._next_lease(worker)):
                worker.idle = False
                with contextlib.suppress(OSError):  # dead: its lease comes back when it is buried
                    worker.connection.send(lease)

    # Leases.

    def _next_lease(self, worker: _Worker) -> Lease | None:
        if self._alone:
            if worker.leases:
                return None  # wait until this worker's hands are empty, then take it
            lease = self._alone.popleft()
        else:
            own = self._queues.get(worker.position if self._dealt else 0)
            queue = own or max(self._queues.values(), key=len, default=None)
            if not queue:
                return None
            lease = queue.popleft()
        self._first_lease = self._first_lease or time.monotonic()
        worker.leases[lease.shard.number] = lease
        return lease

    def _holds_suspect(self, worker: _Worker) -> bool:
        return any(lease.isolate for lease in worker.leases.values())

    # Death.

    def _bury(self, worker: _Worker) -> None:
        """Take back the leases of a dead worker, mark its suspects, and start it again."""
        code = self._reap(worker)
        name = worker.device.name
        self._outcome.restarts[name] += 1
        how = f"signal {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        _log.warning("%s (pid %d) died of %s, %d shards in hand", name, worker.process.pid, how, len(worker.leases))
        self._earlier_clocks[name] = self._clock_of(name)
        if not worker.ready:
            self._failed_starts += 1
        elif not worker.timed_out:  # that kind of death is progress: its picture is never tried that way again
            self._deaths_since_commit += 1
        if self._failed_starts >= START_TRIES or self._deaths_since_commit >= DEATHS_WITHOUT_COMMIT:
            what = (
                f"{name} could not start {START_TRIES} times running"
                if not worker.ready
                else f"workers died {DEATHS_WITHOUT_COMMIT} times without finishing one shard"
            )
            log = self._paths.device_log(name)
            raise WorkerError(f"{what} (last: {how}). The last lines of {log}:\n{_tail(log)}")
        noted = {note.index for note in worker.board.notes()} if worker.ready else set()
        for lease in reversed(worker.leases.values()):
            self._give_back(lease, noted, worker.timed_out)
        worker.notes.close()
        self._workers[self._workers.index(worker)] = self._start(worker.device, worker.position)

    def _give_back(self, lease: Lease, noted: set[int], timed_out: tuple[int, ...]) -> None:
        shard = lease.shard
        suspects = dict(lease.suspects)
        for index in noted:
            if shard.first <= index < shard.first + shard.count:
                if index in timed_out:
                    suspects[index] = "hung_read" if suspects.get(index) == "timeout" else "timeout"
                else:
                    suspects.setdefault(index, "crash")
                _log.warning("picture %d is suspected: %s", index, suspects[index])
        self._deaths_of_shard[shard.number] += 1
        if self._deaths_of_shard[shard.number] >= ALONE_AFTER_DEATHS:
            _log.warning("shard %d was in hand at %d deaths: alone now", shard.number, self._deaths_of_shard[shard.number])
            self._alone.append(Lease(shard, suspects, isolate=True))
        else:
            self._queues.setdefault(shard.group if self._dealt else 0, deque()).appendleft(Lease(shard, suspects))

    def _kill_hanging(self) -> None:
        limit_s = self._job.limits.max_seconds + _SLACK_S
        now = time.monotonic_ns()
        for worker in self._workers:
            if not worker.ready or worker.timed_out:
                continue
            hanging = tuple(n.index for n in worker.board.notes() if n.since_ns and now - n.since_ns > limit_s * 1e9)
            if hanging:
                _log.warning("%s is at picture %s for more than %.1f s: killed", worker.device.name, hanging, limit_s)
                worker.timed_out = hanging
                worker.process.kill()

    def _kill_stalled(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            pulse = worker.board.pulse
            if pulse != worker.pulse or not worker.leases or not worker.ready or worker.board.notes():
                worker.pulse, worker.alive_at = pulse, now
            elif now - worker.alive_at > STALLED_S:
                _log.warning(
                    "%s has done nothing for %.0f s with %d shards in hand: killed", worker.device.name, STALLED_S, len(worker.leases)
                )
                worker.alive_at = now
                worker.process.kill()

    # Processes.

    def _start(self, device: DeviceSpec, position: int) -> _Worker:
        ours, theirs = Pipe()
        notes = noteboard.shared_file()
        board = Noteboard(notes.fileno())
        board.clear()
        fds = (theirs.fileno(), notes.fileno())
        # -P: no module is taken from the folder that the user happens to be in.
        command = [sys.executable, "-P", "-m", "imagemill.worker", *map(str, fds), str(os.getpid())]
        with contextlib.ExitStack() as undone:
            undone.callback(notes.close)
            undone.callback(ours.close)
            try:
                with layout.appending(self._paths.device_log(device.name)) as log:
                    process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=fds, process_group=0, env=child.environment()
                    )
            except OSError as error:
                raise WorkerError(f"no process can be started for {device.name}: {error.strerror} ({sys.executable}).") from error
            finally:
                theirs.close()
            undone.pop_all()
        with contextlib.suppress(OSError):  # dead already: the next turn of the loop buries it
            ours.send(wire.Begin(self._job, device))
        return _Worker(device, position, process, ours, notes, board)

    def _reap(self, worker: _Worker) -> int:
        worker.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return worker.process.wait(timeout=5)
        worker.process.kill()
        return worker.process.wait()

    def _end_workers(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.connection.send(wire.Stop())
        deadline = time.monotonic() + 2
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=max(0.0, deadline - time.monotonic()))

    def _kill_workers(self) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.kill()
            worker.process.wait()
            worker.connection.close()
            worker.notes.close()

    # Signals.

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM while the loop runs; outside the main thread they stay the caller's."""
        try:
            before = {number: signal.signal(number, self._note_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_signal(self, number: int, _frame: object) -> None:
        self._signals.append(number)

    def _stop_gracefully(self) -> None:
        """Lease nothing more; wait for the shards in hand until the grace is over or a second signal comes."""
        name = signal.Signals(self._signals[0]).name
        _log.warning("%s: finishing the shards in hand, %g s at most", name, self._grace_s)
        self._say(f"{name}: finishing the shards in hand, {self._grace_s:g} s at most; a second signal drops them")
        deadline = time.monotonic() + self._grace_s
        while any(worker.leases for worker in self._workers) and time.monotonic() < deadline and len(self._signals) == 1:
            if not self._could_finish(deadline - time.monotonic()):
                break
            self._turn()

    def _could_finish(self, seconds: float) -> bool:
        """Whether at least one shard in hand has a chance to be committed in time, as the device's rate so far suggests."""
        elapsed = time.monotonic() - self._first_lease
        for worker in self._workers:
            rows = self._outcome.devices[worker.device.name]
            if worker.leases and (
                not rows or rows / elapsed * (seconds + elapsed / 2) >= min(x.shard.count for x in worker.leases.values())
            ):
                return True
        return False

    # Telling.

    def _clock_of(self, device: str) -> Clock:
        earlier = self._earlier_clocks.get(device, Clock())
        now = next((worker.clock for worker in self._workers if worker.device.name == device), Clock())
        return total((earlier, now))

    def _progress(self) -> Progress:
        devices, leased = dict(self._outcome.devices), dict.fromkeys(self._outcome.devices, 0)
        clocks = list(self._earlier_clocks.values())
        for worker in self._workers:
            in_hand = max(0, worker.board.rows - worker.rows)
            devices[worker.device.name] += in_hand
            leased[worker.device.name] = max(0, sum(lease.shard.count for lease in worker.leases.values()) - in_hand)
            clocks.append(worker.board.clock)
        return Progress(
            rows=sum(self._outcome.devices.values()),
            failed_by_status=self._failed_by_status,
            devices=devices,
            leased=leased,
            clock=total(clocks),
            restarts=self._outcome.restarts,
            since_first_lease_s=time.monotonic() - self._first_lease if self._first_lease else 0.0,
            ready=sum(worker.ready for worker in self._workers),
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16_384))
            lines = file.read().decode("utf-8", "backslashreplace").splitlines()
    except OSError as error:
        return f"  (no log: {error.strerror})"
    return "\n".join(f"  {line}" for line in lines[-_LOG_LINES:])
