"""The launcher's side of a Ray cluster, with a stand-in for Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from imagemill.workers.protocol import Died, Event, WorkerStatus
from imagemill.workers.ray.messages import Checked, Identity, Report
from imagemill.workers.ray.nodes import Node, Place
from imagemill.workers.ray.placement import Placement, Slot
from imagemill.workers.ray.pool import RayPool

DEATH = Died(1, "was killed by SIGKILL", (), (), "")


class Call:
    """What `ray.wait` waits for."""

    def __init__(self, value: Any, *, is_ready: bool = True) -> None:
        self.value, self.is_ready = value, is_ready


class Actor:
    """A node whose checks last until `is_checked`. Its worker dies in the first turn."""

    def __init__(self, *, is_checked: bool) -> None:
        self.preparing = Call(Checked(False), is_ready=is_checked)
        self.turns = 0

    def __getattr__(self, step: str) -> Any:
        return SimpleNamespace(remote=lambda *_, **__: self._call(step))

    def _call(self, step: str) -> Call:
        if step == "hello":
            return Call(Identity({}, ""))
        if step == "prepare":
            return self.preparing
        self.turns += 1
        return Call(Report((DEATH,) if self.turns == 1 else (), WorkerStatus()))


class Ray:
    exceptions = SimpleNamespace(RayTaskError=KeyError, RayError=KeyError)

    def remote(self, kind: object) -> object:
        return kind

    def wait(self, calls: list[Call], **_: object) -> tuple[list[Call], list[Call]]:
        return [call for call in calls if call.is_ready], []

    def get(self, call: Call) -> Any:
        return call.value


def test_a_worker_that_died_is_left_alone_until_its_death_is_reported() -> None:
    """While another node is checked, events are held back. The process of the dead worker has no
    connection any more, so asking it for a turn would end the job.
    """
    nodes = [Node(name, name, {"CPU": 2}) for name in "AB"]
    places = [Place(node, "null", "null", 0, 0, 1, 2.0) for node in nodes]
    slots = [Slot(place.device(number), place) for number, place in enumerate(places)]
    cluster: Any = SimpleNamespace(ray=Ray(), nodes=lambda: nodes)
    provisioning: Any = SimpleNamespace(check=lambda *_: None, assignment=lambda *_: None)
    ignore: Any = lambda *_: None  # noqa: E731
    job: Any = None
    pool = RayPool(cluster, job, provisioning, Placement(list, [], slots, ignore), slots, ignore)
    actors = [Actor(is_checked=True), Actor(is_checked=False)]
    for slot, actor in zip(slots, actors, strict=True):
        slot.actor = actor
        pool._slots[slot.device.name] = slot
        slot.ask("hello", ())
    pool._unchecked, pool._nodes_at = set(pool._slots), 1e12
    for _ in range(6):
        assert pool.receive(0) == []
    assert actors[0].turns == 1
    actors[1].preparing.is_ready = True
    events: list[Event] = []
    while len(events) < 2:
        events += pool.receive(0)
    assert [event.device for event in events if event.message == DEATH] == [
        slot.device.name for slot in slots
    ]
    pool.restart("a node that was lost meanwhile")
