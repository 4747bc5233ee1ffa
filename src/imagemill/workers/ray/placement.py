"""Which devices of a Ray cluster get a worker next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct, field

from imagemill.errors import WorkerError
from imagemill.pipeline.backends import devices
from imagemill.records import DeviceSpec, Lease
from imagemill.system.messages import Notify
from imagemill.workers.protocol import Pause, WorkerStatus
from imagemill.workers.ray.messages import Restart
from imagemill.workers.ray.nodes import Node, Place, places

WITHOUT_WORKERS_S = 300.0
"""How long a job waits for a node after it has lost the last one."""
UNPLACED_S = 15.0
"""How long Ray may take to start an actor before the user is informed, and before the others begin
without it.
"""


class Slot(Struct):
    """One device, and its current actor."""

    device: DeviceSpec
    place: Place
    actor: Any = None
    call: Any = None
    """The one outstanding call."""
    step: str = "hello"
    """Method of the latest call: `hello`, `prepare`, `turn`."""
    called_at: float = 0.0
    outbox: list[Lease | Pause | Restart] = []
    status: WorkerStatus = field(default_factory=WorkerStatus)
    late: bool = False
    """Whether it joined a running job. If its node is not fit, the job goes on without it."""

    def ask(self, step: str, *arguments: object) -> None:
        """Call a method of the actor."""
        self.step = step
        self.called_at = time.monotonic()
        self.call = getattr(self.actor, step).remote(*arguments)

    def waits_longer_than(self, seconds: float) -> bool:
        """Return whether the latest call was made longer ago than that."""
        return time.monotonic() - self.called_at > seconds


class Placement:
    """Finds devices for further workers than the first slots, as `--devices` asked for them, and
    reports those that Ray cannot start. `nodes` returns the live nodes.
    """

    def __init__(
        self,
        nodes: Callable[[], Sequence[Node]],
        asked: Sequence[devices.Asked],
        first: Sequence[Slot],
        notify: Notify,
    ) -> None:
        self._nodes = nodes
        self._asked = asked
        self._notify = notify
        self._names = {slot.place.key: slot.device.name for slot in first}
        """Place → the latest name of its device, so that it gets the same again."""
        self._no_workers_since: float | None = None
        self._unplaced: set[str] = set()
        self.limit = len(first)
        """How many workers there may be."""
        self.unfit: set[str] = set()
        """Ids of nodes that joined and are not fit."""
        self.retired: set[str] = set()
        """Names of devices that get no worker any more."""

    def new_slots(self, slots: Mapping[str, Slot]) -> Iterator[Slot]:
        """Yield slots for nodes that joined, and for places whose actor was lost.

        Args:
            slots: the current ones, by name; the caller adds each new one before the next.
        """
        taken = {slot.place.key for slot in slots.values()}
        for node in self._nodes():
            for place in places(node, self._asked):
                is_unfit = node.id in self.unfit or self._names.get(place.key) in self.retired
                if place.key not in taken and not is_unfit and len(slots) < self.limit:
                    yield self._new_slot(place, slots)

    def report(self, slots: Mapping[str, Slot]) -> None:
        """Tell the user of actors that Ray does not start, and of a lack of nodes.

        Raises:
            WorkerError: there has been no node for too long.
        """
        for name, slot in slots.items():
            is_waiting = slot.step == "hello" and slot.waits_longer_than(UNPLACED_S)
            if is_waiting and name not in self._unplaced:
                self._unplaced.add(name)
                self._notify(
                    f"waiting for Ray to place {name} on node {slot.place.node.name}: its resources"
                    " are in use, see `ray status`"
                )
        now = time.monotonic()
        if slots:
            self._no_workers_since = None
        elif self._no_workers_since is None:
            self._no_workers_since = now
            self._notify(
                "no node of the Ray cluster is left for a worker: waiting for one,"
                f" {WITHOUT_WORKERS_S:g} s at most"
            )
        elif now - self._no_workers_since > WITHOUT_WORKERS_S:
            raise WorkerError(
                f"no node of the Ray cluster was there for a worker for {WITHOUT_WORKERS_S:g} s."
                " Start nodes (`ray status` lists them), then repeat the command: finished parts"
                " are kept."
            )

    def _new_slot(self, place: Place, slots: Mapping[str, Slot]) -> Slot:
        name = self._names.get(place.key)
        if name is None or name in slots:
            number = 0
            while f"{place.kind}#{number}" in slots.keys() | self.retired:
                number += 1
            name = self._names[place.key] = f"{place.kind}#{number}"
        return Slot(place.device(int(name.rpartition("#")[2])), place, late=True)
