"""When a supervisor kills its worker, and when it leaves it alone: simulated time, and a
test in the worker's place.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batches import make_job
from imagemill.pipeline import heartbeat
from imagemill.pipeline.heartbeat import Heartbeat
from imagemill.records import Bundle, Clock, DeviceSpec, Lease, Limits, Receipt, Shard
from imagemill.system import processes
from imagemill.workers import protocol, supervisor
from imagemill.workers.supervisor import STALLED_S, Supervisor

SHARD = Shard(0, 0, 100, 0, "plan.parquet", 0)
LIMIT_S = 60.0


class Worker:
    """In the place of the process: its end of the pipe, its heartbeat, and whether it was
    killed.
    """

    pid, returncode = 4711, None

    def __init__(self, command: list[str], **options: Any) -> None:
        socket, notes = (os.dup(int(number)) for number in (command[-3], command[-1]))
        self.connection, self.board = Connection(socket), Heartbeat(notes)
        os.close(notes)
        self.killed = False

    def kill(self) -> None:
        self.killed = True

    def poll(self) -> int | None:
        return -9 if self.killed else None

    def wait(self, timeout: float | None = None) -> int:
        self.connection.close()
        return -9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Simulated time; `clock.now` is in seconds."""
    found = SimpleNamespace(now=1_000.0)
    simulated = SimpleNamespace(
        monotonic=lambda: found.now, monotonic_ns=lambda: int(found.now * 1e9)
    )
    for module in (supervisor, heartbeat):
        monkeypatch.setattr(module, "time", simulated)
    return found


@pytest.fixture
def watched(
    monkeypatch: pytest.MonkeyPatch, tiny: Bundle, tmp_path: Path, clock: SimpleNamespace
) -> Iterator[tuple[Supervisor, Worker]]:
    """A supervisor, and the worker that it watches, which is ready and has a shard to compute."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(processes.subprocess, "Popen", Worker)
    watching = Supervisor(
        make_job(tiny, output=str(tmp_path), limits=Limits(max_seconds=LIMIT_S)),
        DeviceSpec("null#0", "null", "null", (0,)),
    )
    worker: Any = watching._child._process
    worker.connection.send(protocol.Ready(worker.pid))
    assert [type(message) for message in watching.receive()] == [protocol.Ready]
    watching.send(Lease(SHARD))
    watching.watch()
    yield watching, worker
    watching.close()


def wait(
    watching: Supervisor,
    clock: SimpleNamespace,
    seconds: float,
    act: Callable[[], None] = lambda: None,
) -> None:
    """Let time pass, and watch several times, in steps of at most five seconds."""
    steps = max(4, math.ceil(seconds / 5))
    for _ in range(steps):
        clock.now += seconds / steps
        act()
        watching.watch()


def test_a_session_that_does_nothing_is_killed_after_ten_minutes(
    watched: tuple[Supervisor, Worker], clock: SimpleNamespace
) -> None:
    """Not before, and once."""
    watching, worker = watched
    wait(watching, clock, STALLED_S)
    assert not worker.killed
    wait(watching, clock, 1)
    assert worker.killed


@pytest.mark.parametrize("sign", ["batch", "commit", "decode"])
def test_a_slow_session_is_left_alone(
    watched: tuple[Supervisor, Worker], clock: SimpleNamespace, sign: str
) -> None:
    """A batch taken, a part committed or an image being decoded within ten minutes: it may go on
    for days.
    """
    watching, worker = watched
    for number in range(5):
        wait(watching, clock, STALLED_S - 1)
        if sign == "batch":
            worker.board.mark_batch()
        elif sign == "commit":
            watching.send(Lease(SHARD))
            worker.connection.send(protocol.Done(Receipt(number, 1, 0, 1, 0.0, ""), Clock()))
            assert len(list(watching.receive())) == 1
        else:
            worker.board.mark_image(0, number, timed=False)
        watching.watch()
        worker.board.clear_image(0)
    assert not worker.killed
    wait(watching, clock, STALLED_S + 1)
    assert worker.killed


def test_a_worker_with_nothing_to_do_is_left_alone(
    watched: tuple[Supervisor, Worker], clock: SimpleNamespace
) -> None:
    """Once its shards are committed it may wait for hours; what it did meanwhile is no excuse
    later.
    """
    watching, worker = watched
    worker.connection.send(protocol.Done(Receipt(SHARD.number, 1, 0, 1, 0.0, ""), Clock()))
    assert len(list(watching.receive())) == 1
    wait(watching, clock, 5 * STALLED_S)
    assert not worker.killed
    watching.send(Lease(SHARD))
    wait(watching, clock, STALLED_S - 1)
    assert not worker.killed
    wait(watching, clock, 2)
    assert worker.killed


def test_a_worker_is_killed_for_the_images_that_take_too_long(
    watched: tuple[Supervisor, Worker], clock: SimpleNamespace
) -> None:
    """A second after their time is over; the others that were being decoded are noted, and so is
    how it died.
    """
    watching, worker = watched
    worker.board.mark_image(0, 7)
    worker.board.mark_image(1, 8, timed=False)
    wait(watching, clock, LIMIT_S)
    worker.board.mark_image(2, 9)
    wait(watching, clock, 1)
    assert not worker.killed
    wait(watching, clock, 1)
    assert worker.killed
    worker.connection.close()
    (died,) = watching.receive()
    assert (died.reason, died.active, died.timed_out) == (
        "was killed by SIGKILL",
        (7, 8, 9),
        (7,),
    )  # type: ignore[union-attr]


def test_a_worker_that_is_still_starting_is_left_alone(
    watched: tuple[Supervisor, Worker], clock: SimpleNamespace
) -> None:
    """Compiling a model may take any time, and what the heartbeat says meanwhile is nobody's."""
    watching, worker = watched
    watching._ready = False
    worker.board.mark_image(0, 7)
    wait(watching, clock, 2 * STALLED_S)
    worker.board.clear_image(0)
    wait(watching, clock, 2 * STALLED_S)
    assert not worker.killed
    worker.board.mark_image(0, 7)
    worker.connection.close()
    (died,) = watching.receive()
    assert (died.active, died.timed_out) == ((), ())  # type: ignore[union-attr]
