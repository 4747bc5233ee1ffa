"""What the workers of a launch have done so far, and the figures made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec import Struct, field

from imagemill.pipeline.stopwatch import total
from imagemill.records import Clock, DeviceSpec, Lease, Progress, Receipt, Throughput
from imagemill.workers.protocol import WorkerStatus

BUCKETS = 64
"""Of `Throughput`, at most."""
_BUCKET_S = 0.125
"""The width of a bucket, doubled until the job fits."""


class Outcome(Struct):
    """The result of a launch."""

    receipts: list[Receipt] = []
    devices: dict[str, int] = {}
    """Committed rows by device."""
    restarts: dict[str, int] = {}
    retired: dict[str, str] = {}
    """Devices that are not used any more → why, in one line."""
    clocks: dict[str, Clock] = {}
    seconds: float = 0.0
    """From the first lease to the last commit."""
    throughput: Throughput | None = None
    joined: list[DeviceSpec] = []
    """Devices that joined while it ran."""


class WorkerState(Struct):
    """What the launcher knows about one device and its current process."""

    device: DeviceSpec
    position: int
    ready: bool = False
    idle: bool = False
    leases: dict[int, Lease] = {}
    clock: Clock = field(default_factory=Clock)
    rows: int = 0
    """Committed by this process."""

    def reset(self) -> None:
        """Start over with a new process."""
        self.ready = self.idle = False
        self.leases, self.clock, self.rows = {}, Clock(), 0


class Commit(Struct, frozen=True):
    """When a device made the rows of a part, in seconds since the first lease."""

    device: str
    begun_s: float
    ended_s: float
    rows: int


def throughput(devices: Iterable[str], commits: Sequence[Commit]) -> Throughput:
    """Return when rows were made. Those of a commit are spread evenly over the time they took."""
    bucket_s = _BUCKET_S
    while any(commit.ended_s >= bucket_s * BUCKETS for commit in commits):
        bucket_s *= 2
    made = {device: [0.0] * BUCKETS for device in devices}
    for commit in commits:
        ended_s, begun_s = commit.ended_s, min(max(0.0, commit.begun_s), commit.ended_s)
        first, last = int(begun_s / bucket_s), int(ended_s / bucket_s)
        for number in range(first, last + 1):
            start_s, end_s = number * bucket_s, (number + 1) * bucket_s
            overlap_s = max(0.0, min(end_s, ended_s) - max(start_s, begun_s))
            share = overlap_s / (ended_s - begun_s) if first < last else 1.0
            made[commit.device][number] += commit.rows * share
    used = max(
        (n for buckets in made.values() for n, rows in enumerate(buckets, 1) if rows), default=0
    )
    images = tuple(tuple(round(rows, 1) for rows in buckets[:used]) for buckets in made.values())
    return Throughput(bucket_s, tuple(made), images)


class Tally:
    """Counts commits, restarts and time of devices, which are named. All times are of one monotonic
    clock.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        zeros = dict.fromkeys(devices, 0)
        self.outcome = Outcome(devices=zeros.copy(), restarts=zeros)
        self._commits: list[Commit] = []
        self._failed_by_status: Counter[str] = Counter()
        self._earlier_clocks: dict[str, Clock] = {}
        """Device → sums over its earlier processes."""
        self._first_lease: float | None = None
        self._last_commit = 0.0

    def add_device(self, device: DeviceSpec) -> None:
        """Count a device that joined."""
        self.outcome.joined.append(device)
        self.outcome.devices[device.name] = self.outcome.restarts[device.name] = 0

    def lease(self, now: float) -> None:
        """Note that a shard was leased."""
        if self._first_lease is None:
            self._first_lease = now

    def elapsed(self, now: float) -> float:
        """Return the seconds since the first lease."""
        return 0.0 if self._first_lease is None else now - self._first_lease

    def commit(self, worker: WorkerState, receipt: Receipt, clock: Clock, now: float) -> None:
        """Count a commit."""
        name = worker.device.name
        worker.clock = clock
        worker.rows += receipt.rows
        self._last_commit = now
        self.outcome.receipts.append(receipt)
        self.outcome.devices[name] += receipt.rows
        elapsed_s = self.elapsed(now)
        begun_s = elapsed_s - receipt.seconds
        self._commits.append(Commit(name, begun_s, elapsed_s, receipt.rows))
        self._failed_by_status.update(receipt.failed_by_status)

    def restart(self, worker: WorkerState) -> None:
        """Count a restart, keep the time of the process that ended, and reset the worker."""
        self.outcome.restarts[worker.device.name] += 1
        self._keep_clock(worker)
        worker.reset()

    def retire(self, worker: WorkerState, reason: str) -> None:
        """Note that a device is not used any more, and keep the time of its last process."""
        self.outcome.retired[worker.device.name] = reason
        self._keep_clock(worker)

    def _keep_clock(self, worker: WorkerState) -> None:
        name = worker.device.name
        earlier = self._earlier_clocks.get(name, Clock())
        self._earlier_clocks[name] = total((earlier, worker.clock))

    def finish(self, workers: Iterable[WorkerState]) -> Outcome:
        """Return the outcome, with the figures that are known only at the end."""
        clocks = {worker.device.name: worker.clock for worker in workers}
        self.outcome.seconds = max(0.0, self.elapsed(self._last_commit))
        self.outcome.throughput = throughput(self.outcome.devices, self._commits)
        for name in self.outcome.devices:
            earlier = self._earlier_clocks.get(name, Clock())
            self.outcome.clocks[name] = total((earlier, clocks.get(name, Clock())))
        return self.outcome

    def progress(self, workers: Iterable[tuple[WorkerState, WorkerStatus]], now: float) -> Progress:
        """Return how far the job is. Its counters are copies, which stay as they are."""
        devices, leased = dict(self.outcome.devices), dict.fromkeys(self.outcome.devices, 0)
        clocks, ready = list(self._earlier_clocks.values()), 0
        for worker, status in workers:
            name = worker.device.name
            uncommitted = max(0, status.rows - worker.rows)
            images = sum(lease.shard.count for lease in worker.leases.values())
            devices[name] += uncommitted
            leased[name] = max(0, images - uncommitted)
            clocks.append(status.clock)
            ready += worker.ready
        return Progress(
            rows=sum(self.outcome.devices.values()),
            failed_by_status=self._failed_by_status.copy(),
            devices=devices,
            leased=leased,
            clock=total(clocks),
            restarts=self.outcome.restarts.copy(),
            retired=self.outcome.retired.copy(),
            since_first_lease_s=self.elapsed(now),
            ready=ready,
        )
