"""The launcher and a pool of simulated workers, in simulated time: how shards are leased where
workers differ in speed, come and go.
"""

from __future__ import annotations

import heapq
import itertools
import signal
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from batches import make_job
from imagemill import records
from imagemill.errors import (
    DeviceError,
    ImagemillError,
    InexactError,
    Interrupted,
    ModelError,
    WorkerError,
)
from imagemill.pipeline.backends import devices
from imagemill.records import Clock, DeviceSpec, Lease, Receipt, Shard
from imagemill.system.processes import Failed
from imagemill.workers import launcher, local, protocol
from imagemill.workers.launcher import Launcher
from imagemill.workers.protocol import Died, Event, Joined, Lost, WorkerStatus
from imagemill.workers.ray.nodes import Node, places
from imagemill.workers.ray.placement import Placement, Slot
from imagemill.workers.ray.pool import RayPool

IMAGES = 10


def shards(count: int) -> list[Shard]:
    return [
        Shard(number, IMAGES * number, IMAGES, 0, "plan-00000-00000.parquet", number)
        for number in range(count)
    ]


def device(number: int) -> DeviceSpec:
    return DeviceSpec(f"null#{number}", "null", "null", (0,))


class Simulated:
    """Workers that take so many seconds for a shard; each asks for a lease when it begins its last
    one, as a real worker does.
    """

    def __init__(self, seconds: dict[str, float]) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.hands: dict[str, list[Lease]] = {name: [] for name in seconds}
        self.most_in_hand = dict.fromkeys(seconds, 0)
        self.idle_from: dict[str, float] = {}
        self.committed: list[tuple[float, str, int]] = []
        self.events: list[tuple[float, int, Callable[[], list[Event]]]] = []
        self.answered: dict[str, int] = {}
        """Rows that have their answers, as a worker's heartbeat says."""
        self.failing_starts: list[bool] = []
        """Whether each of the next restarts fails."""
        self.dead: dict[str, ImagemillError | None] = {}
        """Devices on which no worker starts → the error that it sends; None: it just dies."""
        self._order = itertools.count()
        self._working: dict[str, int] = dict.fromkeys(seconds, 0)
        """Counts the lives of a worker, so that what it would have done in an earlier one does not
        happen.
        """

    def at(self, seconds: float, act: Callable[[], list[Event]]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self._order), act))

    def start(self, limit: int) -> Sequence[DeviceSpec]:
        begun = [device(number) for number in range(len(self.seconds))][:limit]
        for one in begun:
            self.at(0.0, lambda name=one.name: self._begin(name))
        return begun

    def _begin(self, name: str) -> list[Event]:
        if name not in self.dead:
            return [Event(name, protocol.Ready(1))]
        error = self.dead[name]
        sent = [Event(name, Failed.of(error))] if error else []
        return sent + self.die(name)

    def receive(self, seconds: float) -> Sequence[Event]:
        if not self.events:
            self.now += seconds
            return []
        self.now, _, act = heapq.heappop(self.events)
        return act()

    def send(self, name: str, message: Lease | protocol.Pause) -> None:
        hand = self.hands[name]
        if isinstance(message, protocol.Pause):
            return
        hand.append(message)
        self.most_in_hand[name] = max(self.most_in_hand[name], len(hand))
        self.idle_from.pop(name, None)
        if len(hand) == 1:
            self._work(name)

    def _work(self, name: str) -> None:
        life = self._working[name]

        def done() -> list[Event]:
            if life != self._working[name]:
                return []
            lease = self.hands[name].pop(0)
            self.committed.append((self.now, name, lease.shard.number))
            outputs = [
                Event(
                    name, protocol.Done(Receipt(lease.shard.number, IMAGES, 0, 1, 0.0, ""), Clock())
                )
            ]
            if self.hands[name]:
                self._work(name)
            else:
                self.idle_from[name] = self.now
                outputs.append(Event(name, protocol.Idle()))
            return outputs

        if len(self.hands[name]) == 1:
            self.at(
                0.0, lambda: [Event(name, protocol.Want())] if life == self._working[name] else []
            )
        self.at(self.seconds[name], done)

    def lose(self, name: str, *, with_machine: bool = True) -> list[Event]:
        self._working[name] += 1
        self.hands[name] = []
        return [Event(name, Lost("pulled the plug", with_machine))]

    def die(self, name: str, *, timed_out: tuple[int, ...] = ()) -> list[Event]:
        self._working[name] += 1
        self.hands[name] = []
        return [
            Event(
                name,
                Died(
                    1,
                    "was killed by SIGKILL",
                    timed_out,
                    timed_out,
                    "The last lines of its log:\n  loading\n  no driver",
                ),
            )
        ]

    def join(self, name: str, seconds: float) -> list[Event]:
        self.seconds[name] = seconds
        self.hands[name], self.most_in_hand[name], self._working[name] = (
            [],
            0,
            self._working.get(name, 0) + 1,
        )
        self.at(0.0, lambda: [Event(name, protocol.Ready(1))])
        return [Event(name, Joined(DeviceSpec(name, "null", "null", (0,))))]

    def restart(self, name: str) -> None:
        fails = self.failing_starts.pop(0) if self.failing_starts else False
        self.at(0.0, lambda: self.die(name) if fails else self._begin(name))

    def retire(self, name: str) -> bool:
        self._working[name] += 1
        del self.seconds[name]
        return bool(self.seconds)

    def status(self, name: str) -> WorkerStatus:
        return WorkerStatus(self.answered.get(name, 0))

    def stop(self) -> None:
        self.ended = True

    def kill(self) -> None:
        self.killed = True


def run(pool: Simulated, count: int) -> launcher.Outcome:
    return Launcher(
        pool, [device(number) for number in range(len(pool.seconds))], shards(count)
    ).run()


def test_a_fast_worker_is_never_idle_while_shards_remain() -> None:
    """One is thirty times as fast as the other: the slow one holds two shards at most, the fast one
    works until none is waiting.
    """
    pool = Simulated({"null#0": 30.0, "null#1": 1.0})
    outcome = run(pool, 100)
    assert pool.most_in_hand == {"null#0": 2, "null#1": 2}
    last_of_fast = max(when for when, name, _ in pool.committed if name == "null#1")
    others = [when for when, name, _ in pool.committed if name == "null#0"]
    assert pool.idle_from["null#1"] == last_of_fast, (
        "it was idle only once nothing was left to lease"
    )
    assert sum(when > last_of_fast for when in others) <= 2
    assert last_of_fast >= 100 - 2 - len(others)
    assert sorted(number for _, _, number in pool.committed) == list(range(100))
    assert outcome.devices == {
        "null#0": IMAGES * len(others),
        "null#1": IMAGES * (100 - len(others)),
    }


def test_a_device_that_joins_takes_part_and_is_counted() -> None:
    """It is reported like the others: rows, restarts, its place in the timeline."""
    pool = Simulated({"null#0": 1.0})
    pool.at(5.5, lambda: pool.join("null#7", 1.0))
    outcome = run(pool, 40)
    assert [one.name for one in outcome.joined] == ["null#7"]
    assert set(outcome.devices) == {"null#0", "null#7"}
    assert sum(outcome.devices.values()) == 40 * IMAGES
    assert 150 <= outcome.devices["null#7"] <= 200
    assert outcome.throughput is not None
    assert outcome.throughput.devices == ("null#0", "null#7")


def test_lost_nodes_never_end_a_job_by_their_number() -> None:
    """Twenty reclaimed before one shard was done, then one that stays: every shard is committed
    once, and restarts are counted.
    """
    pool = Simulated({"null#0": 1.0})

    def reclaim(left: int) -> list[Event]:
        pool.at(0.2, lambda: pool.join("null#0", 1.0))
        if left:
            pool.at(0.5, lambda: reclaim(left - 1))
        return pool.lose("null#0")

    pool.at(0.5, lambda: reclaim(19))
    outcome = run(pool, 5)
    assert outcome.restarts == {"null#0": 20}
    assert sorted(number for _, _, number in pool.committed) == list(range(5))


@pytest.mark.parametrize("how", ["die", "lose"])
def test_workers_that_die_on_a_sound_machine_for_ever_end_the_job(how: str) -> None:
    """Whether the process alone dies or who watches it too, as where memory is short: ten times
    without a commit between them.
    """
    pool = Simulated({"null#0": 1.0})

    def strike() -> list[Event]:
        pool.at(0.5, strike)
        if how == "die":
            return pool.die("null#0")
        pool.at(0.2, lambda: pool.join("null#0", 1.0))
        return pool.lose("null#0", with_machine=False)

    pool.at(0.5, strike)
    with pytest.raises(
        WorkerError,
        match=(
            r"workers died 10 times without finishing a shard; the last one was (killed by"
            r" SIGKILL|lost \(pulled the plug\))\."
        ),
    ):
        run(pool, 5)
    assert pool.committed == []
    assert pool.killed


def strikes(pool: Simulated, times: int, every: float, **how: object) -> None:
    """Have worker 0 die so many times."""

    def strike(left: int) -> list[Event]:
        if left > 1:
            pool.at(every, lambda: strike(left - 1))
        return pool.die("null#0", **how)  # type: ignore[arg-type]

    pool.at(every, lambda: strike(times))


def test_any_number_of_deaths_is_survived_if_shards_are_committed_between_them() -> None:
    """A job of many hours may lose many workers: only deaths without a commit between them count
    against it.
    """
    pool = Simulated({"null#0": 1.0})
    strikes(pool, 4 * launcher.DEATHS_WITHOUT_COMMIT, 2.5)
    outcome = run(pool, 100)
    assert outcome.restarts == {"null#0": 4 * launcher.DEATHS_WITHOUT_COMMIT}
    assert sorted(number for _, _, number in pool.committed) == list(range(100))


def test_deaths_for_the_sake_of_an_image_that_hangs_do_not_count() -> None:
    """Each of them is progress: that image is never tried in the same way again."""
    pool = Simulated({"null#0": 100.0})
    strikes(pool, 2 * launcher.DEATHS_WITHOUT_COMMIT, 1.0, timed_out=(3,))
    outcome = run(pool, 2)
    assert outcome.restarts == {"null#0": 2 * launcher.DEATHS_WITHOUT_COMMIT}
    assert len(pool.committed) == 2


@pytest.mark.parametrize("commits_between", [True, False])
def test_only_starts_that_fail_in_a_row_end_the_job(commits_between: bool) -> None:
    """Two fail, the third works, and so again and again: the job goes on. A third that fails ends
    it.
    """
    pool = Simulated({"null#0": 1.0})
    pool.failing_starts = [True, True, False] * 4
    strikes(pool, 4, 2.5 if commits_between else 0.1)
    assert run(pool, 20).restarts == {"null#0": 12}
    pool = Simulated({"null#0": 1.0})
    pool.failing_starts = [True, True, True]
    strikes(pool, 1, 2.5)
    with pytest.raises(
        WorkerError,
        match=(
            r"^worker null#0 failed to start 3 times in a row; the last time it was killed by"
            r" SIGKILL\. The last lines of its log:\n  loading\n  no driver$"
        ),
    ):
        run(pool, 20)
    assert pool.killed
    assert not hasattr(pool, "ended"), "workers were let end as if all was committed"


NO_START = (
    "worker null#3 failed to start 3 times in a row; the last time it was killed by SIGKILL. The"
    " last lines of its log: … no driver"
)
MISSING = "null#3: the driver has lost it."


@pytest.mark.parametrize(
    ("error", "starts", "reason"), [(None, 3, NO_START), (DeviceError(MISSING), 1, MISSING)]
)
def test_one_of_eight_devices_that_never_starts_is_retired(
    error: ImagemillError | None, starts: int, reason: str
) -> None:
    """It is named once, the others do its share, and the outcome says so. What it reports as an
    error is not tried again.
    """
    pool = Simulated({f"null#{number}": 1.0 for number in range(8)})
    pool.dead = {"null#3": error}
    lines: list[str] = []
    seen: list[records.Progress] = []
    given = [device(number) for number in range(8)]
    job = Launcher(pool, given, shards(40), groups=8, notify=lines.append, on_tick=seen.append)
    outcome = job.run()
    assert outcome.retired == {"null#3": reason}
    assert lines == [f"null#3 is retired, the others process its images: {reason}"]
    assert outcome.restarts["null#3"] == starts - 1
    assert outcome.devices["null#3"] == 0
    assert sorted(number for _, _, number in pool.committed) == list(range(40))
    assert seen[-1].retired == {"null#3": reason}
    assert pool.ended


@pytest.mark.parametrize("error", [None, DeviceError(MISSING)])
def test_a_job_ends_once_no_device_is_left(error: ImagemillError | None) -> None:
    """With the last one's error."""
    pool = Simulated({f"null#{number}": 1.0 for number in range(3)})
    pool.dead = dict.fromkeys(pool.seconds, error)
    message = r"failed to start 3 times in a row" if error is None else MISSING
    with pytest.raises(DeviceError if error else WorkerError, match=message):
        run(pool, 20)
    assert pool.committed == []
    assert pool.killed


@pytest.mark.parametrize("error", [ModelError("no model"), InexactError("inexact")])
def test_an_error_that_is_not_the_devices_ends_the_job(error: ImagemillError) -> None:
    """Another device would meet it too, or its answers would differ."""
    pool = Simulated({"null#0": 1.0, "null#1": 1.0})
    pool.dead = {"null#1": error}
    with pytest.raises(type(error), match=str(error)):
        run(pool, 20)


def test_a_device_error_of_a_worker_that_computes_ends_the_job() -> None:
    """Only what keeps a device from starting retires it."""
    pool = Simulated({"null#0": 1.0, "null#1": 1.0})
    pool.at(2.5, lambda: [Event("null#1", Failed.of(DeviceError("odd")))])
    with pytest.raises(DeviceError, match="odd"):
        run(pool, 20)


def test_a_device_on_which_workers_die_for_ever_is_retired() -> None:
    """It starts, takes shards and dies; the commits of the others do not hide that."""
    pool = Simulated({"null#0": 3.0, "null#1": 1.0})

    def strike() -> list[Event]:
        if "null#0" in pool.seconds:
            pool.at(1.5, strike)
            return pool.die("null#0")
        return []

    pool.at(1.5, strike)
    outcome = run(pool, 60)
    assert outcome.retired["null#0"].startswith(
        "worker null#0 died 10 times without finishing a shard; the last time it was killed by"
    )
    assert outcome.devices == {"null#0": 0, "null#1": 60 * IMAGES}


def test_a_device_that_is_lost_at_each_start_is_retired_unless_its_machine_is_gone() -> None:
    """As where Ray's actor dies with its worker."""

    def outcome_of(*, with_machine: bool) -> launcher.Outcome:
        pool = Simulated({"null#0": 1.0, "null#1": 1.0})
        ready = pool._begin

        def begin(name: str) -> list[Event]:
            if name == "null#1":
                return ready(name)
            if name not in pool.seconds:
                return []
            pool.at(0.7, lambda: begin(name))
            return [Event(name, Joined(device(0))), *pool.lose(name, with_machine=with_machine)]

        pool._begin = begin  # type: ignore[method-assign]
        return run(pool, 20)

    assert outcome_of(with_machine=False).retired == {
        "null#0": "worker null#0 failed to start 3 times in a row; the last time it was lost"
        " (pulled the plug). See the logs of Ray on that machine."
    }
    assert outcome_of(with_machine=True).retired == {}


def test_a_device_without_a_worker_takes_the_place_of_a_retired_one(
    monkeypatch: pytest.MonkeyPatch, tiny: records.Bundle
) -> None:
    """A job of few shards starts few workers; the other devices are not lost to it."""

    class Watched:
        def __init__(self, _job: object, device: DeviceSpec) -> None:
            self.device, self.connection = device, None

        def watch(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(local, "Supervisor", Watched)
    pool = local.LocalPool(make_job(tiny), [device(number) for number in range(3)])
    assert [one.name for one in pool.start(1)] == ["null#0"]
    monkeypatch.setattr(local, "wait", lambda *_, **__: [])
    for number in (1, 2):
        assert pool.retire(f"null#{number - 1}")
        assert pool.receive(0.0) == [Event(f"null#{number}", Joined(device(number)))]
        assert pool.receive(0.0) == []
    assert not pool.retire("null#2")


def test_a_device_retired_on_a_cluster_stays_without_a_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its actor publishes its log before it ends, and another free place gets a worker."""
    done: list[str] = []

    def actor(name: str) -> SimpleNamespace:
        def end(*, at_once: bool) -> str:
            assert at_once
            return f"{name} ends"

        return SimpleNamespace(name=name, end=SimpleNamespace(remote=end))

    def start_actor(pool: RayPool, slot: Slot) -> None:
        slot.actor, slot.step = actor(slot.device.name), "turn"
        pool._slots[slot.device.name] = slot

    monkeypatch.setattr(RayPool, "_open", start_actor)
    ray = SimpleNamespace(
        remote=lambda made: made,
        wait=lambda calls, timeout: done.extend(calls),
        kill=lambda killed: done.append(f"{killed.name} is killed"),
    )
    node, asked = Node("id", "a node", {"CPU": 3}), devices.parse("null:3")
    slots = [Slot(place.device(number), place) for number, place in enumerate(places(node, asked))][
        :2
    ]
    placement = Placement(lambda: [node], asked, slots, lambda _: None)
    store, launch = Mock(), Mock()
    pool = RayPool(SimpleNamespace(ray=ray), store, launch, placement, slots, lambda _: None)  # type: ignore[arg-type]
    assert [one.name for one in pool.start(2)] == ["null#0", "null#1"]
    assert pool.retire("null#0")
    assert done == ["null#0 ends", "null#0 is killed"]
    assert [(event.device, type(event.message)) for event in pool._held] == [("null#2", Joined)]
    assert pool.retire("null#1")
    assert set(pool._slots) == {"null#2"}
    assert not pool.retire("null#2")


@pytest.fixture
def simulated_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[Simulated], None]:
    """Has the launcher look at the clock of a pool, which shows 1,000 s."""

    def simulate(pool: Simulated) -> None:
        pool.now = 1_000.0
        monkeypatch.setattr(launcher, "time", SimpleNamespace(monotonic=lambda: pool.now))

    return simulate


def test_the_seconds_of_a_launch_are_those_from_its_first_lease_to_its_last_commit(
    simulated_time: Callable[[Simulated], None],
) -> None:
    """Starting workers does not count, and workers are let end when all is committed."""
    pool = Simulated({"null#0": 1.0})
    simulated_time(pool)
    outcome = run(pool, 40)
    assert outcome.seconds == 40.0
    assert pool.ended


def arrives(number: signal.Signals) -> list[Event]:
    """Send this process a signal. It reaches the launcher as users' signals do."""
    assert callable(signal.getsignal(number)), "it would end the process"
    signal.raise_signal(number)
    return []


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_a_signal_has_the_shards_in_flight_finished_and_no_others(
    simulated_time: Callable[[Simulated], None], number: signal.Signals, name: str, code: int
) -> None:
    """Nothing more is leased, the wait ends with the last commit and not with the grace, and the
    exit code is the signal's.
    """
    pool = Simulated({"null#0": 2.0, "null#1": 2.0})
    simulated_time(pool)
    pool.at(5.0, lambda: arrives(number))
    lines: list[str] = []
    runner = Launcher(pool, [device(0), device(1)], shards(40), grace_s=20.0, notify=lines.append)
    with pytest.raises(
        Interrupted,
        match=rf"stopped by {name}, 320 images left\. Run the same command again to continue\.",
    ) as caught:
        runner.run()
    assert caught.value.exit_code == code
    again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
    assert lines == [
        f"stopping: finishing 4 shards (40 images) for at most 20 s, {again} to stop at once"
    ]
    assert len(pool.committed) == 8
    assert pool.now <= 1_008.5
    assert pool.killed
    assert not hasattr(pool, "ended")


def test_a_signal_before_the_first_shard_has_nothing_to_finish(
    simulated_time: Callable[[Simulated], None],
) -> None:
    """The job ends at once, without a line about shards."""
    pool = Simulated({"null#0": 2.0})
    simulated_time(pool)
    pool.at(0.0, lambda: arrives(signal.SIGINT))
    lines: list[str] = []
    with pytest.raises(Interrupted, match=r"stopped by Ctrl-C, 40 images left"):
        Launcher(pool, [device(0)], shards(4), notify=lines.append).run()
    assert lines == []


@pytest.mark.parametrize("how", ["grace", "second signal", "no chance"])
def test_the_wait_after_a_signal_ends(
    simulated_time: Callable[[Simulated], None], how: str
) -> None:
    """With the grace, with a second signal, or at once where no shard in flight could be committed in
    time at the rate so far.
    """
    pool = Simulated({"null#0": 10.0})
    simulated_time(pool)
    strike = lambda: arrives(signal.SIGTERM)  # noqa: E731
    pool.at(1.0 if how != "no chance" else 10.5, strike)
    if how == "second signal":
        pool.at(2.0, strike)
    for tenth in range(150):
        pool.at(tenth / 10, list)
    with pytest.raises(Interrupted):
        Launcher(pool, [device(0)], shards(4), grace_s=4.0 if how != "no chance" else 1.0).run()
    ends = {"grace": (5.0, 5.3), "second signal": (2.0, 2.3), "no chance": (10.5, 10.8)}
    assert ends[how][0] <= pool.now - 1_000 <= ends[how][1]
    assert len(pool.committed) == (how == "no chance")


def test_progress_counts_answers_before_they_are_committed(
    simulated_time: Callable[[Simulated], None],
) -> None:
    """A device's rows are those committed and those of its heartbeat beyond them; what it has in
    hand besides is leased.
    """
    pool = Simulated({"null#0": 10.0})
    simulated_time(pool)
    seen: list[records.Progress] = []
    pool.at(1.0, lambda: pool.answered.update({"null#0": 4}) or [])
    pool.at(12.0, lambda: pool.answered.update({"null#0": 17}) or [])
    for second in range(30):
        pool.at(second + 0.5, list)
    Launcher(pool, [device(0)], shards(2), on_tick=seen.append).run()
    found = [
        (one.rows, one.devices["null#0"], one.leased["null#0"], one.ready)
        for one in seen
        if one.since_first_lease_s % 1 == 0.5
    ]
    assert found[1] == (0, 4, 16, 1)
    assert found[11] == (10, 10, 10, 1)
    assert found[13] == (10, 17, 3, 1)
    assert (seen[-1].rows, seen[-1].devices["null#0"], seen[-1].leased["null#0"]) == (20, 20, 0)


def test_progress_of_an_earlier_tick_stays_as_it_was(
    simulated_time: Callable[[Simulated], None],
) -> None:
    """Counters that a display keeps do not change when a worker dies later."""
    pool = Simulated({"null#0": 1.0})
    simulated_time(pool)
    seen: list[records.Progress] = []
    pool.at(5.5, lambda: pool.die("null#0"))
    Launcher(pool, [device(0)], shards(10), on_tick=seen.append).run()
    assert [seen[0].restarts, seen[-1].restarts] == [{"null#0": 0}, {"null#0": 1}]
    assert seen[0].failed_by_status is not seen[-1].failed_by_status
