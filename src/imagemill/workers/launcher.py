"""The launcher: leases shards to a pool of workers, one per device, and restarts those that die.

Contract
--------
- Every uncommitted shard either waits in `Leases` or is leased to exactly one worker. A worker
  sends `Done` only after its part is durably in the output. A worker that dies or is lost returns
  its leases.
- A worker may die at any moment, for any reason. It is restarted at once, and the images that its
  decoding threads worked on are quarantined: the next worker decodes them in a process of their
  own. A shard in flight at two deaths is isolated: leased alone, with every image decoded that way.
  If an image takes too long even in quarantine, reading it hangs, and it is given up.
- A device is retired if its worker fails to start three times in a row, dies ten times without a
  commit of its own, or reports that the device cannot be used. The others take its shards. If no
  device is left, the job ends with that error. It also ends if workers die ten times without any
  commit in between. Lost nodes do not count: a hundred of them may be reclaimed at once.
- Workers never outlive this process.
- Memory does not grow with the number of images, and little with the number of shards: only
  uncommitted ones are held, as small records.

The `WorkerPool` decides where the workers run: `workers.local` or `workers.ray.pool`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from imagemill.errors import DeviceError, ImagemillError, Interrupted, WorkerError, counted
from imagemill.records import DeviceSpec, Lease, Progress, Receipt, Shard
from imagemill.system.processes import Failed
from imagemill.workers import protocol
from imagemill.workers.leases import Leases
from imagemill.workers.protocol import Died, Event, Joined, Lost, WorkerPool
from imagemill.workers.tally import Outcome, Tally, WorkerState

_log = logging.getLogger(__name__)

START_TRIES = 3
DEATHS_WITHOUT_COMMIT = 10
_TICK_S = 0.2


class Launcher:
    """Runs shards on devices until all of them are committed.

    Args:
        pool: one worker process for each device.
        devices: the devices of the pool.
        shards: the uncommitted ones.
        groups: number of sub-folders that the shards are grouped by. If it equals the number of
            devices, each device takes the shards of its own sub-folder first.
        grace_s: how long SIGTERM or SIGINT waits for the shards in flight.
        on_tick: called several times a second with the progress.
        on_receipt: called for each commit; may raise to end the job.
        notify: receives lines for the user.
    """

    def __init__(
        self,
        pool: WorkerPool,
        devices: Sequence[DeviceSpec],
        shards: Sequence[Shard],
        *,
        groups: int = 1,
        grace_s: float = 20.0,
        on_tick: Callable[[Progress], None] = lambda _: None,
        on_receipt: Callable[[Receipt], None] = lambda _: None,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._pool = pool
        self._devices = list(devices)
        self._images = sum(shard.count for shard in shards)
        self._leases = Leases(shards, by_group=groups == len(devices))
        self._grace_s = grace_s
        self._on_tick = on_tick
        self._on_receipt = on_receipt
        self._notify = notify
        self._workers: dict[str, WorkerState] = {}
        self._tally = Tally([device.name for device in devices])
        self._failed_starts: Counter[str] = Counter()
        """Device → its starts that failed in a row."""
        self._deaths: Counter[str] = Counter()
        """Device → its worker's deaths since its last commit."""
        self._deaths_since_commit = 0
        self._signals: list[int] = []
        self._next_tick = 0.0

    def run(self) -> Outcome:
        """Run to the end.

        Raises:
            Interrupted: SIGINT or SIGTERM came. WorkerError: workers keep dying, and no device is
            left. Any other ImagemillError: a worker ended with it.
        """
        with _noting_signals(self._signals):
            try:
                for device in self._pool.start(max(1, self._leases.remaining)):
                    position = self._devices.index(device)
                    self._workers[device.name] = WorkerState(device, position)
                while self._leases.remaining:
                    self._turn()
                    if self._signals:
                        self._stop_gracefully()
                        break
                self._tick()  # a short job may end before its second regular tick
                if not self._leases.remaining:
                    self._pool.stop()
            finally:
                self._pool.kill()
        outcome = self._tally.finish(self._workers.values())
        if self._leases.remaining:
            number, left = self._signals[0], self._images - sum(outcome.devices.values())
            raise Interrupted(
                f"stopped by {_name(number)}, {counted(left, 'image')} left. Run the same command"
                " again to continue.",
                128 + number,
            )
        return outcome

    # One turn of the loop.

    def _turn(self) -> None:
        for event in self._pool.receive(_TICK_S):
            self._handle(event)
        self._wake_idle()
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + _TICK_S
            self._tick()

    def _tick(self) -> None:
        workers = [(worker, self._pool.status(name)) for name, worker in self._workers.items()]
        self._on_tick(self._tally.progress(workers, time.monotonic()))

    def _handle(self, event: Event) -> None:
        if isinstance(event.message, Joined):
            self._add_worker(event.message.device)
            return
        worker = self._workers.get(event.device)
        if worker is None:  # the device was retired
            return
        match event.message:
            case protocol.Ready(pid):
                worker.ready, worker.idle = True, True
                self._failed_starts.pop(worker.device.name, None)
                _log.info("%s is ready (pid %d)", worker.device.name, pid)
            case protocol.Want():
                lease = None if self._signals else self._next_lease(worker)
                self._pool.send(worker.device.name, lease or protocol.Pause())
            case protocol.Idle():
                worker.idle = True
            case protocol.Done():
                self._handle_commit(worker, event.message)
            case Failed() as failed:
                self._handle_failure(worker, failed)
            case Died() as died:
                self._handle_exit(worker, died)
            case Lost() as lost:
                self._handle_lost(worker, lost)
            case _:
                raise AssertionError(event)

    def _add_worker(self, device: DeviceSpec) -> None:
        """Add a device that joined, or one that was lost and has come back."""
        names = [known.name for known in self._devices]
        if device.name not in names:
            self._devices.append(device)
            self._tally.add_device(device)
            names.append(device.name)
        self._workers[device.name] = WorkerState(device, names.index(device.name))

    def _handle_commit(self, worker: WorkerState, done: protocol.Done) -> None:
        del worker.leases[done.receipt.shard]
        self._leases.commit(done.receipt.shard)
        self._deaths_since_commit = 0
        self._deaths.pop(worker.device.name, None)
        self._tally.commit(worker, done.receipt, done.clock, time.monotonic())
        self._on_receipt(done.receipt)

    def _wake_idle(self) -> None:
        """Lease shards to idle workers: at the start, and when a dead worker's leases return."""
        for worker in self._workers.values():
            if worker.idle and not self._signals and (lease := self._next_lease(worker)):
                worker.idle = False
                self._pool.send(worker.device.name, lease)

    def _next_lease(self, worker: WorkerState) -> Lease | None:
        lease = self._leases.next(worker.position, worker.leases.values())
        if lease is not None:
            self._tally.lease(time.monotonic())
            worker.leases[lease.shard.number] = lease
        return lease

    # Exits.

    def _handle_failure(self, worker: WorkerState, failed: Failed) -> None:
        """Retire a device that cannot be used. Raises: ImagemillError: any other error."""
        _log.error("%s: %s", worker.device.name, failed.message)
        error = failed.error()
        if type(error) is not DeviceError or worker.ready:
            raise error
        self._retire(worker, error)

    def _handle_exit(self, worker: WorkerState, died: Died) -> None:
        """Return a dead worker's leases, quarantine its images, and restart it."""
        name, count = worker.device.name, len(worker.leases)
        _log.warning("%s (pid %d) %s, %d shards in flight", name, died.pid, died.reason, count)
        for lease in reversed(worker.leases.values()):
            self._leases.return_dead(lease, died.active, died.timed_out)
        # A timeout is progress: its image is not tried that way again.
        if died.timed_out or not self._gave_up(worker, died.reason, died.log_tail):
            self._tally.restart(worker)
            self._pool.restart(name)

    def _handle_lost(self, worker: WorkerState, lost: Lost) -> None:
        """Return the leases of a worker that is gone together with its supervisor."""
        name, count = worker.device.name, len(worker.leases)
        _log.warning("%s is lost, %d shards in flight: %s", name, count, lost.reason)
        for lease in reversed(worker.leases.values()):
            self._leases.return_lost(lease)
        reason, log = f"was lost ({lost.reason})", "See the logs of Ray on that machine."
        if lost.with_machine or not self._gave_up(worker, reason, log):
            self._tally.restart(worker)

    def _gave_up(self, worker: WorkerState, reason: str, log: str) -> bool:
        """Count a worker's end, and return whether its device was retired for it.

        Raises:
            WorkerError: no device is left, or workers die without end.
        """
        name = worker.device.name
        if not worker.ready:
            self._failed_starts[name] += 1
            if self._failed_starts[name] < START_TRIES:
                return False
            what = f"worker {name} failed to start {START_TRIES} times in a row; the last time it"
        else:
            self._deaths[name] += 1
            self._deaths_since_commit += 1
            times = f"died {DEATHS_WITHOUT_COMMIT} times without finishing a shard; the last"
            if self._deaths_since_commit >= DEATHS_WITHOUT_COMMIT:
                raise WorkerError(f"workers {times} one {reason}. {log}")
            if self._deaths[name] < DEATHS_WITHOUT_COMMIT:
                return False
            what = f"worker {name} {times} time it"
        self._retire(worker, WorkerError(f"{what} {reason}. {log}"))
        return True

    def _retire(self, worker: WorkerState, error: ImagemillError) -> None:
        """Continue without a device. Raises: ImagemillError: the given one if no other is left."""
        name = worker.device.name
        _log.error("%s is retired: %s", name, error)
        del self._workers[name]
        if not self._pool.retire(name):
            raise error
        reason, *log = str(error).splitlines()
        line = reason + "".join(f" … {line.strip()}" for line in log[-1:])
        self._tally.retire(worker, line)
        self._notify(f"{name} is retired, the others process its images: {line}")

    # Signals.

    def _stop_gracefully(self) -> None:
        """Lease nothing more, and wait for the shards in flight until the grace period is over or a
        second signal comes.
        """
        what = "%s: finishing the shards in flight, %g s at most"
        _log.warning(what, _name(self._signals[0]), self._grace_s)
        leases = [lease for worker in self._workers.values() for lease in worker.leases.values()]
        if leases:
            self._notify(_format_stopping(leases, self._signals[0], self._grace_s))
        deadline = time.monotonic() + self._grace_s
        while (
            time.monotonic() < deadline
            and len(self._signals) == 1
            and self._could_finish(deadline - time.monotonic())
        ):
            self._turn()

    def _could_finish(self, seconds: float) -> bool:
        """Return whether some shard in flight can be committed in time, at the device's rate."""
        elapsed = self._tally.elapsed(time.monotonic())
        for worker in self._workers.values():
            rows = self._tally.outcome.devices[worker.device.name]
            if worker.leases and (
                not rows
                or rows / elapsed * (seconds + elapsed / 2)
                >= min(lease.shard.count for lease in worker.leases.values())
            ):
                return True
        return False


def _format_stopping(leases: Sequence[Lease], number: int, grace_s: float) -> str:
    images = counted(sum(lease.shard.count for lease in leases), "image")
    again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
    return (
        f"stopping: finishing {counted(len(leases), 'shard')} ({images}) for at most {grace_s:g} s,"
        f" {again} to stop at once"
    )


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextlib.contextmanager
def _noting_signals(signals: list[int]) -> Iterator[None]:
    """Append SIGINT and SIGTERM to a list; outside the main thread they stay the caller's."""
    try:
        before = {
            number: signal.signal(number, lambda number, _frame: signals.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
