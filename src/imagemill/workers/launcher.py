"""The launcher: leases shards to a crew of workers, one per device, has dead ones started again,
and stops.

Contract
--------
- Every shard that is not committed is either waiting in `Leases` or leased to exactly one worker;
  `wire.Done` is sent only after its part is durably in the output. A worker that dies or is lost
  gives its leases back.
- A worker may die at any moment and of anything. It is started again, at once, and the images that
  its decoding threads were at become suspects: the next worker decodes them in a disposable
  process. A shard that was in hand at two deaths is leased alone, with every image of it decoded
  that way. If an image hangs so though its decoder is disposable, its very reading hangs, and it is
  given up.
- A worker that cannot start three times running, or ten deaths without one commit between them, end
  the job with the log's last lines. Nodes that are lost do not count: a hundred of them may be
  reclaimed at once.
- Workers never outlive this process.
- Nothing here grows with the number of images, and little with the number of shards: those not
  committed are held as small records.

Where the workers are is the crew's business: `engines.local` or `engines.ray_crew`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from imagemill.errors import Interrupted, WorkerError
from imagemill.pipeline.stopwatch import total
from imagemill.records import Clock, DeviceSpec, Lease, Progress, Receipt, Shard, Throughput
from imagemill.system.processes import Failed
from imagemill.workers import protocol
from imagemill.workers.leases import Leases
from imagemill.workers.pool import Crew, Died, Heard, Joined, Lost
from imagemill.workers.timeline import Timeline

_log = logging.getLogger(__name__)

START_TRIES = 3
DEATHS_WITHOUT_COMMIT = 10
_TICK_S = 0.2


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
    joined: list[DeviceSpec] = field(default_factory=list)
    """Devices that came while it ran."""


@dataclass(slots=True)
class _Worker:
    """What is known here of one device and the process that drives it now."""

    device: DeviceSpec
    position: int
    ready: bool = False
    idle: bool = False
    leases: dict[int, Lease] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    rows: int = 0
    """Committed by this process."""

    def anew(self) -> None:
        """Its process is another one from now on."""
        self.ready = self.idle = False
        self.leases, self.clock, self.rows = {}, Clock(), 0


class Launcher:
    """Runs shards on devices until all of them are committed.

    Args:
        crew: one worker process for each device.
        devices: that the crew has.
        shards: the ones that are not committed yet.
        groups: how many sub-folders the shards are dealt by; where it equals the number of devices,
        each device takes its own first.
        grace_s: how long a SIGTERM or SIGINT waits for the shards in hand.
        on_tick: called some times a second with how far things are.
        on_receipt: called for each commit; may raise to end the job.
        say: takes a line for the user.
    """

    def __init__(
        self,
        crew: Crew,
        devices: Sequence[DeviceSpec],
        shards: Sequence[Shard],
        *,
        groups: int = 1,
        grace_s: float = 20.0,
        on_tick: Callable[[Progress], None] = lambda _: None,
        on_receipt: Callable[[Receipt], None] = lambda _: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._crew = crew
        self._devices = list(devices)
        self._leases = Leases(shards, dealt=groups == len(devices))
        self._grace_s = grace_s
        self._on_tick = on_tick
        self._on_receipt = on_receipt
        self._say = say
        self._workers: dict[str, _Worker] = {}
        self._failed_starts = 0
        self._deaths_since_commit = 0
        self._signals: list[int] = []
        self._failed_by_status: Counter[str] = Counter()
        self._earlier_clocks: dict[str, Clock] = {}
        self._first_lease = 0.0
        self._next_tick = 0.0
        self._last_commit = 0.0
        self._timeline = Timeline([device.name for device in devices])
        self._outcome = Outcome(
            devices={d.name: 0 for d in devices}, restarts={d.name: 0 for d in devices}
        )

    def run(self) -> Outcome:
        """Run to the end.

        Raises:
            Interrupted: SIGINT or SIGTERM came. WorkerError: workers die without end. Any other
            ImagemillError a worker ended with.
        """
        with self._handling_signals():
            try:
                for device in self._crew.begin(max(1, self._leases.remaining)):
                    self._workers[device.name] = _Worker(device, self._devices.index(device))
                while self._leases.remaining:
                    self._turn()
                    if self._signals:
                        self._stop_gracefully()
                        break
                self._on_tick(
                    self._progress()
                )  # the last word, also of a job that is over before its second tick
                if not self._leases.remaining:
                    self._crew.end()
            finally:
                self._crew.kill()
        self._outcome.seconds = max(0.0, self._last_commit - self._first_lease)
        self._outcome.throughput = self._timeline.read()
        for name in self._outcome.devices:
            self._outcome.clocks[name] = self._clock_of(name)
        if self._leases.remaining:
            number = self._signals[0]
            raise Interrupted(
                f"stopped by {signal.Signals(number).name}: {self._leases.remaining} shards are"
                " left. Repeat the command to resume.",
                128 + number,
            )
        return self._outcome

    # One turn of the loop.

    def _turn(self) -> None:
        for heard in self._crew.wait(_TICK_S):
            self._handle(heard)
        self._wake_idle()
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + _TICK_S
            self._on_tick(self._progress())

    def _handle(self, heard: Heard) -> None:
        if isinstance(heard.message, Joined):
            self._welcome(heard.message.device)
            return
        worker = self._workers[heard.device]
        match heard.message:
            case protocol.Ready(pid):
                worker.ready, worker.idle = True, True
                self._failed_starts = 0
                _log.info("%s is ready (pid %d)", worker.device.name, pid)
            case protocol.Want():
                lease = None if self._signals else self._next_lease(worker)
                self._crew.answer(worker.device.name, lease or protocol.Pause())
            case protocol.Idle():
                worker.idle = True
            case protocol.Done(receipt, clock):
                self._committed(worker, receipt, clock)
            case Failed() as failed:
                _log.error("%s: %s", worker.device.name, failed.message)
                raise failed.error()
            case Died() as died:
                self._bury(worker, died)
            case Lost() as lost:
                self._lose(worker, lost)
            case _:
                raise AssertionError(heard)

    def _welcome(self, device: DeviceSpec) -> None:
        """A device joined, or one that was lost has come back."""
        name = device.name
        known = next((place for place, one in enumerate(self._devices) if one.name == name), None)
        if known is None:
            known = len(self._devices)
            self._devices.append(device)
            self._outcome.joined.append(device)
            self._outcome.devices[name] = self._outcome.restarts[name] = 0
        self._workers[name] = _Worker(device, known)

    def _committed(self, worker: _Worker, receipt: Receipt, clock: Clock) -> None:
        del worker.leases[receipt.shard]
        worker.clock = clock
        worker.rows += receipt.rows
        self._leases.committed(receipt.shard)
        self._deaths_since_commit = 0
        self._last_commit = time.monotonic()
        self._outcome.receipts.append(receipt)
        self._outcome.devices[worker.device.name] += receipt.rows
        since_first_lease_s = self._last_commit - self._first_lease
        self._timeline.add(
            worker.device.name,
            since_first_lease_s - receipt.seconds,
            since_first_lease_s,
            receipt.rows,
        )
        self._failed_by_status.update(receipt.failed_by_status)
        self._on_receipt(receipt)

    def _wake_idle(self) -> None:
        """Give idle workers a lease where there is one: at the start, and when a dead worker's
        leases came back.
        """
        for worker in self._workers.values():
            if worker.idle and not self._signals and (lease := self._next_lease(worker)):
                worker.idle = False
                self._crew.answer(worker.device.name, lease)

    def _next_lease(self, worker: _Worker) -> Lease | None:
        lease = self._leases.next(worker.position, worker.leases.values())
        if lease is not None:
            self._first_lease = self._first_lease or time.monotonic()
            worker.leases[lease.shard.number] = lease
        return lease

    # Death.

    def _bury(self, worker: _Worker, died: Died) -> None:
        """Take back the leases of a dead worker, mark its suspects, and have it started again."""
        name = worker.device.name
        _log.warning(
            "%s (pid %d) %s, %d shards in flight",
            name,
            died.pid,
            died.how,
            len(worker.leases),
        )
        if not died.ready:
            self._failed_starts += 1
        elif (
            not died.timed_out
        ):  # that kind of death is progress: its image is never tried that way again
            self._deaths_since_commit += 1
        self._refuse_endless_deaths(name, died.how, died.last_words, ready=died.ready)
        for lease in reversed(worker.leases.values()):
            self._leases.give_back(lease, died.noted, died.timed_out)
        self._begin_anew(worker)
        self._crew.restart(name)

    def _lose(self, worker: _Worker, lost: Lost) -> None:
        """Take back the leases of a worker of which nothing is left to look at."""
        name = worker.device.name
        _log.warning("%s is lost, %d shards in hand: %s", name, len(worker.leases), lost.why)
        if worker.ready and not lost.with_machine:
            self._deaths_since_commit += 1
            self._refuse_endless_deaths(
                name,
                f"was lost ({lost.why})",
                "See the logs of Ray on that machine.",
                ready=True,
            )
        for lease in reversed(worker.leases.values()):
            self._leases.lost(lease)
        self._begin_anew(worker)

    def _begin_anew(self, worker: _Worker) -> None:
        name = worker.device.name
        self._outcome.restarts[name] += 1
        self._earlier_clocks[name] = self._clock_of(name)
        worker.anew()

    def _refuse_endless_deaths(self, name: str, how: str, last_words: str, *, ready: bool) -> None:
        if self._failed_starts >= START_TRIES or self._deaths_since_commit >= DEATHS_WITHOUT_COMMIT:
            what = (
                f"workers died {DEATHS_WITHOUT_COMMIT} times without finishing a shard; the last"
                " one"
                if ready
                else f"worker {name} failed to start {START_TRIES} times in a row; the last time it"
            )
            raise WorkerError(f"{what} {how}. {last_words}")

    # Signals.

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM while the loop runs; outside the main thread they stay the
        caller's.
        """
        try:
            before = {
                number: signal.signal(number, self._note_signal)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
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
        """Lease nothing more; wait for the shards in hand until the grace is over or a second
        signal comes.
        """
        name = signal.Signals(self._signals[0]).name
        _log.warning("%s: finishing the shards in hand, %g s at most", name, self._grace_s)
        self._say(
            f"{name}: finishing the shards in hand, {self._grace_s:g} s at most; a second signal"
            " drops them"
        )
        deadline = time.monotonic() + self._grace_s
        while (
            any(worker.leases for worker in self._workers.values())
            and time.monotonic() < deadline
            and len(self._signals) == 1
        ):
            if not self._could_finish(deadline - time.monotonic()):
                break
            self._turn()

    def _could_finish(self, seconds: float) -> bool:
        """Whether at least one shard in hand has a chance to be committed in time, as the device's
        rate so far suggests.
        """
        elapsed = time.monotonic() - self._first_lease
        for worker in self._workers.values():
            rows = self._outcome.devices[worker.device.name]
            if worker.leases and (
                not rows
                or rows / elapsed * (seconds + elapsed / 2)
                >= min(x.shard.count for x in worker.leases.values())
            ):
                return True
        return False

    # Telling.

    def _clock_of(self, device: str) -> Clock:
        earlier = self._earlier_clocks.get(device, Clock())
        worker = self._workers.get(device)
        return total((earlier, worker.clock if worker else Clock()))

    def _progress(self) -> Progress:
        devices, leased = dict(self._outcome.devices), dict.fromkeys(self._outcome.devices, 0)
        clocks = list(self._earlier_clocks.values())
        for name, worker in self._workers.items():
            told = self._crew.told(name)
            in_hand = max(0, told.rows - worker.rows)
            devices[name] += in_hand
            leased[name] = max(
                0, sum(lease.shard.count for lease in worker.leases.values()) - in_hand
            )
            clocks.append(told.clock)
        return Progress(
            rows=sum(self._outcome.devices.values()),
            failed_by_status=self._failed_by_status.copy(),
            devices=devices,
            leased=leased,
            clock=total(clocks),
            restarts=self._outcome.restarts.copy(),
            since_first_lease_s=time.monotonic() - self._first_lease if self._first_lease else 0.0,
            ready=sum(worker.ready for worker in self._workers.values()),
        )
