"""The worker pool of a Ray cluster: one actor per device of every node.

Each actor supervises the same worker process that a local run has.

    launcher ── Lease ─► RayPool ── turn(Lease) ─► actor: NodeAgent ── Lease ─► worker: run_shards
             ◄── Done ─          ◄── Report ──                      ◄── Done ─

Ray lists the nodes, starts an actor if its node has room for it, reports actors and nodes that are
gone, and carries the model to the nodes. The launcher schedules the shards. Each actor has one call
outstanding, which returns as soon as its worker sends something. A lease is sent when a worker has
begun its last one, so a slow node never holds more than that.

Ray's own restarts of actors are not used: they bring back an actor without its state, and hide why
the first one died. Here a lost actor is a lost worker: its leases return, and a new actor starts on
the node if Ray says that the node is alive. A part that a lost worker committed unseen is committed
again, and replaces itself.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from imagemill.errors import ImagemillError, WorkerError
from imagemill.job.store import Store
from imagemill.records import DeviceSpec, Lease
from imagemill.system.messages import Notify
from imagemill.system.processes import Failed
from imagemill.workers.protocol import Died, Event, Joined, Lost, Pause, WorkerStatus
from imagemill.workers.ray.actor import actor_class
from imagemill.workers.ray.messages import Checked, Identity, Report, Restart
from imagemill.workers.ray.placement import UNPLACED_S, Placement, Slot
from imagemill.workers.ray.provisioning import Provisioning

if TYPE_CHECKING:
    from imagemill.workers.ray.cluster import Cluster

_log = logging.getLogger(__name__)

_NODES_EVERY_S = 1.0
_CHECKS_S = 120.0
"""How long the others wait for a node's checks, which may include sending the model."""
_SILENT_S = 120.0
"""After this time without an answer an actor, which should answer within about a second, is lost.
"""
_TURN_S = 0.2
_TURNS_PER_S = 1_000
"""Answers that the launcher's machine can take: with more than 200 workers, turns become longer."""
_END_S = 30.0
"""How long workers may take to end by themselves, and to upload their logs to an object store."""
_KILL_S = 5.0
_NODE_GONE = ("node has died", "node was terminated", "node is dead", "not alive")
"""Parts of Ray's message if an actor died because its node did."""


class RayPool:
    """The `WorkerPool` of `--engine ray`. It starts with the given slots."""

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        provisioning: Provisioning,
        placement: Placement,
        slots: Sequence[Slot],
        notify: Notify,
    ) -> None:
        self._cluster = cluster
        self._ray = cluster.ray
        self._store = store
        self._provisioning = provisioning
        self._placement = placement
        self._first = slots
        self._notify = notify
        self._class = self._ray.remote(actor_class())
        self._slots: dict[str, Slot] = {}
        self._nodes_at = 0.0
        self._unchecked: set[str] = set()
        """The workers to start with whose node is not checked yet."""
        self._held: list[Event] = []
        self._is_over = False

    def start(self, limit: int) -> Sequence[DeviceSpec]:
        """Open the first slots, at most `limit`, and return their devices."""
        self._placement.limit = limit
        self._store.write(self._store.paths.launch, self._provisioning.launch.encode())
        started = self._first[:limit]
        for slot in started:
            self._open(slot)
        self._unchecked = set(self._slots)
        self._nodes_at = time.monotonic() + _NODES_EVERY_S
        return [slot.device for slot in started]

    def receive(self, seconds: float) -> Sequence[Event]:
        """Return events in order, as soon as there are any; nothing if none came in `seconds`."""
        events = list(self._look_at_nodes())
        turn_s = max(_TURN_S, len(self._slots) / _TURNS_PER_S)
        dead = {event.device for event in self._held if isinstance(event.message, Died)}
        for slot in self._slots.values():
            if slot.call is None and slot.device.name not in dead:  # its death is not reported yet
                slot.ask("turn", slot.outbox, turn_s)
                slot.outbox = []
        calls = {slot.call: slot for slot in self._slots.values() if slot.call is not None}
        if events or not calls:
            time.sleep(0 if events else seconds)
            return events
        ready, _ = self._ray.wait(list(calls), num_returns=1, timeout=seconds)
        if ready:
            ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for call in ready:
            events += self._handle_answer(calls.pop(call))
        for slot in calls.values():
            if slot.step == "turn" and slot.waits_longer_than(_SILENT_S):
                events.append(
                    self._handle_lost(slot, f"no answer for {_SILENT_S:g} s", with_node=True)
                )
        return self._hold_until_checked(events)

    def _hold_until_checked(self, events: list[Event]) -> list[Event]:
        """Return the events, but none before the nodes of the first workers are checked, so that no
        worker gets a lease before.
        """
        for name in list(self._unchecked):
            slot = self._slots.get(name)
            if (
                slot is None
                or slot.step == "turn"
                or slot.waits_longer_than(UNPLACED_S if slot.step == "hello" else _CHECKS_S)
            ):
                self._unchecked.remove(name)
        self._held += events
        if self._unchecked:
            return []
        events, self._held = self._held, []
        return events

    def send(self, device: str, message: Lease | Pause) -> None:
        """Send a message with the next turn."""
        if device in self._slots:  # otherwise it is lost, which `receive` reports
            self._slots[device].outbox.append(message)

    def restart(self, device: str) -> None:
        """Have the agent start its worker again, with the next turn."""
        if device in self._slots:  # otherwise it is lost, which `receive` reports
            self._slots[device].status = WorkerStatus()
            self._slots[device].outbox = [Restart()]

    def retire(self, device: str) -> bool:
        """Kill an actor for good. Return whether others are left, or were started for it."""
        self._placement.retired.add(device)
        if slot := self._slots.pop(device, None):  # otherwise it is lost already
            if slot.step != "hello":  # it publishes its log
                self._ray.wait([slot.actor.end.remote(at_once=True)], timeout=_KILL_S)
            self._ray.kill(slot.actor)
        self._nodes_at = 0.0
        self._held += self._look_at_nodes()
        return bool(self._slots)

    def status(self, device: str) -> WorkerStatus:
        """Return how far a worker's process was at its last turn."""
        return self._slots[device].status if device in self._slots else WorkerStatus()

    def stop(self) -> None:
        """Let the workers end by themselves, once everything is committed."""
        self._end(at_once=False, seconds=_END_S)

    def kill(self) -> None:
        """Kill all actors, and their workers with them."""
        self._end(at_once=True, seconds=_KILL_S)
        for slot in self._slots.values():
            self._ray.kill(slot.actor)
        self._slots.clear()
        with contextlib.suppress(ImagemillError):  # the storage may be gone
            self._store.remove(self._store.paths.launch)

    def _end(self, *, at_once: bool, seconds: float) -> None:
        if self._is_over:
            return
        self._is_over = True
        calls = [
            slot.actor.end.remote(at_once=at_once)
            for slot in self._slots.values()
            if slot.step != "hello"
        ]
        if calls:
            self._ray.wait(calls, num_returns=len(calls), timeout=seconds)

    # Nodes.

    def _open(self, slot: Slot) -> None:
        """Have Ray start an actor for a slot, and call it."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        name, place = slot.device.name, slot.place
        self._slots[name] = slot
        _log.info("%s is on node %s, with %g CPUs", name, place.node.name, place.cpus)
        slot.actor = self._class.options(
            **place.resources(),
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node.id, soft=False),
            max_restarts=0,
            max_task_retries=0,
        ).remote()
        slot.ask("hello", self._provisioning.backends)

    def _look_at_nodes(self) -> Iterator[Event]:
        """Now and then, start workers on nodes that joined, and in place of lost actors."""
        now = time.monotonic()
        if now < self._nodes_at:
            return
        self._nodes_at = now + _NODES_EVERY_S
        for slot in self._placement.new_slots(self._slots):
            self._open(slot)
            yield Event(slot.device.name, Joined(slot.device))
        self._placement.report(self._slots)

    # Answers.

    def _handle_answer(self, slot: Slot) -> list[Event]:
        """Return the events that the answer to a slot's call means."""
        call, slot.call = slot.call, None
        name, node = slot.device.name, slot.place.node
        try:
            answer: Identity | Mapping[str, str] | Checked | Report | Failed = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            cause = " ".join(str(error.cause or error).split())
            raise WorkerError(f"{name} on node {node.name}: unexpected {cause}") from error
        except self._ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())
            with_node = (
                isinstance(error, self._ray.exceptions.ActorUnavailableError)
                or any(words in reason for words in _NODE_GONE)
                or all(other.id != node.id for other in self._cluster.nodes())
            )
            return [self._handle_lost(slot, reason, with_node=with_node)]
        match answer:
            case Failed():
                self._handle_failure(slot, answer)
            case Report(messages, status):
                slot.status = status
                return [Event(name, message) for message in messages]
            case Checked(lacks_model):
                if lacks_model:
                    self._prepare(slot, *self._provisioning.model_contents)
            case _:
                try:
                    self._provisioning.check(node.name, answer)
                except ImagemillError as error:
                    self._handle_failure(slot, Failed.of(error))
                else:
                    self._prepare(slot)
        return []

    def _prepare(self, slot: Slot, *contents: object) -> None:
        slot.ask("prepare", self._provisioning.assignment(slot.device, slot.place), *contents)

    def _handle_failure(self, slot: Slot, failed: Failed) -> None:
        """Drop a node that joined and is not fit. Raises: ImagemillError: of any other slot."""
        node, text = slot.place.node, failed.message
        if node.name not in text:
            text = f"node {node.name}: {text}"
        if not slot.late or slot.step == "turn":
            raise Failed(failed.kind, text).error()
        self._placement.unfit.add(node.id)
        self._notify(f"left out: {text}")
        self._ray.kill(slot.actor)
        del self._slots[slot.device.name]

    def _handle_lost(self, slot: Slot, reason: str, *, with_node: bool) -> Event:
        """Drop a slot whose actor is gone, for Ray's reason. A new one is opened once Ray says its
        node is alive. `with_node`: the node is gone too, or unreachable; Ray may take half a minute
        to know which.
        """
        name, node = slot.device.name, slot.place.node
        self._ray.kill(slot.actor)  # if it is only unreachable, it must not run beside the new one
        del self._slots[name]
        where = f"node {node.name}{' is gone or out of sight' if with_node else ''}"
        return Event(name, Lost(f"{where}: {reason}", with_node))
