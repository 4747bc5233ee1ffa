"""The workers of a Ray cluster: one actor per device of every node, each of which supervises the
same worker process as a local run has.

    launcher ── Lease ─► RayCrew ── turn(Lease) ─► actor: Station ── Lease ─► worker: run_shards
             ◄── Done ─          ◄── Report ──                    ◄── Done ─

Ray says which nodes there are, starts an actor where its node has room for it, tells when an actor
or a node is gone, and carries the model to the nodes. Shards are dealt by the launcher: each actor
has one question outstanding, which is answered as soon as its worker says something; a lease goes
out when a worker has begun its last one, so a slow node never holds more than that.

Ray's own restarts of actors are not used: they bring back an actor that knows nothing, and hide why
the first one died. Here a lost actor is a lost worker: its leases go back, and a new one is started
on the node if Ray says that this is alive. What a lost worker may have committed unseen is
committed once more, and replaces itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import numpy as np

from imagemill.errors import DeviceError, ImagemillError, WorkerError
from imagemill.job.paths import JobPaths
from imagemill.job.store import open_store
from imagemill.pipeline.backends import devices
from imagemill.records import DeviceSpec, Job, Lease, Shard
from imagemill.system.processes import Failed
from imagemill.workers import protocol
from imagemill.workers.pool import Heard, Joined, Lost, Told
from imagemill.workers.ray import node_agent
from imagemill.workers.ray.nodes import Place, places

if TYPE_CHECKING:
    from imagemill.workers.ray.cluster import Cluster

_log = logging.getLogger(__name__)

START_TRIES = 3
WITHOUT_WORKERS_S = 300.0
"""How long a job waits for a node when it has lost the last one."""
_NODES_EVERY_S = 1.0
_UNPLACED_S = 15.0
"""So long Ray may take to start an actor before it is said, and before the others begin without
it.
"""
_CHECKS_S = 120.0
"""So long the others wait for a node's checks, which may have a model sent to it."""
_SILENT_S = 120.0
"""After so long without an answer an actor that should answer within a second or so counts as
lost.
"""
_TURN_S = 0.2
_TURNS_PER_S = 1_000
"""Answers that the launcher's machine takes in a second: above 200 workers turns become longer."""
_END_S = 30.0
"""For workers to end by themselves, and to put their logs into an object store."""
_KILL_S = 5.0
_OF_NODES = ("node has died", "node was terminated", "node is dead", "not alive")
"""What Ray's message says where an actor has died because its node has."""


def _actor_class() -> type:
    """What runs on the nodes. A class that is made in a function travels by value, so a node
    without imagemill can say that it has none.
    """

    class Worker:
        def hello(self, backends: tuple[str, ...]) -> dict[str, str]:
            """What of this node decides answers; or only `missing`, and by which `python`."""
            import os
            import sys

            os.environ.pop(
                "OMP_NUM_THREADS", None
            )  # Ray's, and not the user's: a worker's own are set by who starts it
            try:
                from imagemill.workers.ray import node_agent
            except ImportError as error:
                return {"missing": str(error), "python": sys.executable}
            self.station: Any = None
            return node_agent.identity(backends)

        def prepare(self, order: Any, *contents: Any) -> Any:
            """Check the node and start the worker. Returns: whether the model's contents are wanted
            first; or what failed.
            """
            from imagemill.errors import ImagemillError
            from imagemill.system.processes import Failed
            from imagemill.workers.ray import node_agent

            try:
                self.station = node_agent.Station(
                    order, [memoryview(content) for content in contents]
                )
            except ImagemillError as error:
                return Failed.of(error)
            return self.station.lacks_model

        def turn(self, messages: Any, seconds: float) -> Any:
            """See `Station.turn`."""
            from imagemill.errors import ImagemillError
            from imagemill.system.processes import Failed

            try:
                return self.station.turn(messages, seconds)
            except ImagemillError as error:
                return Failed.of(error)

        def end(self, *, at_once: bool) -> None:
            """See `Station.end` and `Station.close`."""
            if getattr(self, "station", None) is not None:
                (self.station.close if at_once else self.station.end)()

    return Worker


class _Step(Enum):
    """What an actor was asked last."""

    HELLO = auto()
    PREPARE = auto()
    TURN = auto()


@dataclass(slots=True)
class Seat:
    """One device, and the actor that is there for it now."""

    device: DeviceSpec
    place: Place
    actor: Any = None
    call: Any = None
    """The one question outstanding."""
    step: _Step = _Step.HELLO
    asked_at: float = 0.0
    outbox: list[Any] = field(default_factory=list)
    told: Told = field(default_factory=Told)
    ready: bool = False
    """Its worker has been ready once."""
    late: bool = False
    """It came while the job was under way: where its node is not fit, the job does without it."""


class RayCrew:
    """See `crew.Crew`. Made by `Cluster.crew`."""

    def __init__(
        self,
        cluster: Cluster,
        job: Job,
        paths: JobPaths,
        seats: Sequence[Seat],
        left: Sequence[Shard],
        plan_nonce: str,
        asked: Sequence[devices.Asked],
        say: Callable[[str], None],
        *,
        allow_mixed: bool,
    ) -> None:
        self._cluster = cluster
        self._ray = cluster.ray
        self._job = job
        self._store = open_store(paths)
        self._first = seats
        self._plan_nonce = plan_nonce
        self._asked = asked
        self._say = say
        self._allow_mixed = allow_mixed
        self._backends = tuple(sorted({item.backend for item in asked}))
        self._launch = secrets.token_hex(8)
        self._left = left
        self._most = 0
        self._class = self._ray.remote(_actor_class())
        self._seats: dict[str, Seat] = {}
        self._numbers: dict[tuple[str, str, int], str] = {}
        """Place → the name its device had, so that it has the same again."""
        self._failed_starts: Counter[tuple[str, str, int]] = Counter()
        self._unfit: set[str] = set()
        """Nodes that came late and are not fit."""
        self._identity: dict[str, str] = {}
        self._units_of = ""
        self._contents: list[Any] | None = None
        self._nodes_at = 0.0
        self._alone_since: float | None = None
        self._unplaced: set[str] = set()
        self._unchecked: set[str] = set()
        """Of the workers that were begun with: those whose node was not checked yet."""
        self._held: list[Heard] = []
        self._is_over = False

    def begin(self, most: int) -> Sequence[DeviceSpec]:
        """See `Crew.begin`."""
        self._most = most
        self._identity = node_agent.identity(self._backends)
        self._samples = node_agent.sample(self._job, self._left) if self._left else ()
        self._model = node_agent.model_files(self._job)
        self._store.write(self._store.paths.launch, self._launch.encode())
        for seat in self._first:
            self._numbers[seat.place.key] = seat.device.name
        begun = self._first[:most]
        for seat in begun:
            self._open(seat)
        self._unchecked = set(self._seats)
        self._nodes_at = time.monotonic() + _NODES_EVERY_S
        return [seat.device for seat in begun]

    def wait(self, seconds: float) -> Sequence[Heard]:
        """See `Crew.wait`."""
        heard = list(self._look_at_nodes())
        for seat in self._seats.values():
            if seat.call is None:
                self._ask(seat, "turn", seat.outbox, max(_TURN_S, len(self._seats) / _TURNS_PER_S))
                seat.outbox = []
        calls = {seat.call: seat for seat in self._seats.values()}
        if heard or not calls:
            time.sleep(0 if heard else seconds)
            return heard
        ready, _ = self._ray.wait(list(calls), num_returns=1, timeout=seconds)
        if ready:
            ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for call in ready:
            heard += self._answered(calls.pop(call))
        for seat in calls.values():
            if seat.step is _Step.TURN and time.monotonic() - seat.asked_at > _SILENT_S:
                heard.append(self._lost(seat, f"no answer for {_SILENT_S:g} s", with_node=True))
        return self._after_checks(heard)

    def _after_checks(self, heard: list[Heard]) -> list[Heard]:
        """What was heard; but nothing before the nodes of the first workers were checked, so that
        none gets a lease before.
        """
        for name in list(self._unchecked):
            seat = self._seats.get(name)
            patience_s = _UNPLACED_S if seat and seat.step is _Step.HELLO else _CHECKS_S
            if (
                seat is None
                or seat.step is _Step.TURN
                or time.monotonic() - seat.asked_at > patience_s
            ):
                self._unchecked.remove(name)
        self._held += heard
        if self._unchecked:
            return []
        heard, self._held = self._held, []
        return heard

    def answer(self, device: str, message: Lease | protocol.Pause) -> None:
        """See `Crew.answer`."""
        if device in self._seats:  # else it is lost, and the launcher hears so
            self._seats[device].outbox.append(message)

    def restart(self, device: str) -> None:
        """See `Crew.restart`."""
        self._seats[device].told = Told()
        self._seats[device].outbox = [node_agent.Restart()]

    def told(self, device: str) -> Told:
        """See `Crew.told`."""
        return self._seats[device].told if device in self._seats else Told()

    def end(self) -> None:
        """See `Crew.end`."""
        self._end(at_once=False, seconds=_END_S)

    def kill(self) -> None:
        """See `Crew.kill`."""
        self._end(at_once=True, seconds=_KILL_S)
        for seat in self._seats.values():
            self._ray.kill(seat.actor)
        self._seats.clear()
        with contextlib.suppress(ImagemillError):  # where the storage is gone, this is the least
            self._store.remove(self._store.paths.launch)

    def _end(self, *, at_once: bool, seconds: float) -> None:
        if self._is_over:
            return
        self._is_over = True
        calls = [
            seat.actor.end.remote(at_once=at_once)
            for seat in self._seats.values()
            if seat.step is not _Step.HELLO
        ]
        if calls:
            self._ray.wait(calls, num_returns=len(calls), timeout=seconds)

    # Nodes.

    def _open(self, seat: Seat) -> None:
        """Have Ray start an actor for a seat, and greet it."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        name = seat.device.name
        self._seats[name] = seat
        _log.info("%s is on node %s, with %g CPUs", name, seat.place.node.name, seat.place.cpus)
        seat.actor = self._class.options(
            **seat.place.resources(),
            scheduling_strategy=NodeAffinitySchedulingStrategy(seat.place.node.id, soft=False),
            max_restarts=0,
            max_task_retries=0,
        ).remote()
        self._ask(seat, "hello", self._backends)

    def _ask(self, seat: Seat, what: str, *arguments: Any) -> None:
        seat.step = {"hello": _Step.HELLO, "prepare": _Step.PREPARE, "turn": _Step.TURN}[what]
        seat.asked_at = time.monotonic()
        seat.call = getattr(seat.actor, what).remote(*arguments)

    def _look_at_nodes(self) -> Iterator[Heard]:
        """Now and then: give nodes that joined, and places whose actor was lost, a worker.

        Raises: WorkerError: no node is left, for too long.
        """
        now = time.monotonic()
        if now < self._nodes_at:
            return
        self._nodes_at = now + _NODES_EVERY_S
        taken = {seat.place.key for seat in self._seats.values()}
        for place in (
            place for node in self._cluster.nodes() for place in places(node, self._asked)
        ):
            if (
                place.key not in taken
                and place.node.id not in self._unfit
                and len(self._seats) < self._most
            ):
                name = self._numbers.setdefault(place.key, self._free_name(place.kind))
                if name in self._seats:
                    name = self._numbers[place.key] = self._free_name(place.kind)
                seat = Seat(place.device(int(name.rpartition("#")[2])), place, late=True)
                self._open(seat)
                yield Heard(name, Joined(seat.device))
        for seat in self._seats.values():
            name = seat.device.name
            if (
                seat.step is _Step.HELLO
                and now - seat.asked_at > _UNPLACED_S
                and name not in self._unplaced
            ):
                self._unplaced.add(name)
                self._say(
                    f"waiting for Ray to place {name} on node {seat.place.node.name}: its resources"
                    " are in use, see `ray status`"
                )
        if self._seats:
            self._alone_since = None
            return
        if self._alone_since is None:
            self._alone_since = now
            self._say(
                "no node of the Ray cluster is left for a worker: waiting for one,"
                f" {WITHOUT_WORKERS_S:g} s at most"
            )
        if now - self._alone_since > WITHOUT_WORKERS_S:
            raise WorkerError(
                f"no node of the Ray cluster was there for a worker for {WITHOUT_WORKERS_S:g} s."
                " Start nodes (`ray status` lists them), then repeat the command: finished parts"
                " are kept."
            )

    def _free_name(self, kind: str) -> str:
        """The name with the smallest number that no worker has now."""
        number = 0
        while f"{kind}#{number}" in self._seats:
            number += 1
        return f"{kind}#{number}"

    # Answers.

    def _answered(self, seat: Seat) -> list[Heard]:
        """What the answer to a seat's question means to the launcher."""
        call, seat.call = seat.call, None
        name = seat.device.name
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            raise WorkerError(
                f"{name} on node {seat.place.node.name}: unexpected"
                f" {' '.join(str(error.cause or error).split())}"
            ) from error
        except self._ray.exceptions.RayError as error:
            told = " ".join(str(error).split())
            gone = isinstance(error, self._ray.exceptions.ActorUnavailableError) or any(
                words in told for words in _OF_NODES
            )
            return [
                self._lost(
                    seat,
                    told,
                    with_node=gone
                    or all(node.id != seat.place.node.id for node in self._cluster.nodes()),
                )
            ]
        if isinstance(answer, Failed):
            return self._failed(seat, answer)
        if seat.step is _Step.TURN:
            seat.told = answer.told
            if any(isinstance(message, protocol.Ready) for message in answer.heard):
                seat.ready = True
                self._failed_starts.pop(seat.place.key, None)
            return [Heard(name, message) for message in answer.heard]
        if seat.step is _Step.HELLO:
            try:
                self._compare(seat, answer)
            except ImagemillError as error:
                return self._failed(seat, Failed.of(error))
            self._ask(seat, "prepare", self._order(seat))
        elif answer:
            self._ask(seat, "prepare", self._order(seat), *self._delivery())
        return []

    def _compare(self, seat: Seat, found: Mapping[str, str]) -> None:
        """Raises: DeviceError: the node lacks imagemill, or its answers may differ."""
        name = seat.place.node.name
        if "missing" in found:
            raise DeviceError(
                f"node {name} cannot import imagemill ({found['missing']}). Type there: "
                f"{found['python']} -m pip install 'imagemill[ray]=={self._identity['imagemill']}'"
            )
        versions = {key: value for key, value in self._identity.items() if key != node_agent.UNITS}
        node_agent.refuse_other(
            name, found, versions, "this machine", allow_mixed=self._allow_mixed
        )
        if not self._units_of:
            self._identity[node_agent.UNITS], self._units_of = found[node_agent.UNITS], name
        units = {node_agent.UNITS: self._identity[node_agent.UNITS]}
        node_agent.refuse_other(
            name, found, units, f"node {self._units_of}", allow_mixed=self._allow_mixed
        )

    def _order(self, seat: Seat) -> node_agent.Order:
        place = seat.place
        return node_agent.Order(
            node=place.node.name,
            job=self._job,
            device=seat.device,
            index=place.order,
            processes=place.of,
            cpus=int(place.node.resources.get("CPU", 0)),
            launch=self._launch,
            plan_nonce=self._plan_nonce,
            model=self._model,
            samples=self._samples,
        )

    def _delivery(self) -> list[Any]:
        """The model's files in Ray's object store, put there when the first node lacks them: each
        node fetches them from there once.
        """
        if self._contents is None:
            folder = os.path.dirname(self._job.model_file)  # noqa: PTH120
            self._contents = [
                self._ray.put(np.fromfile(f"{folder}/{file.name}", np.uint8))
                for file in self._model
            ]
        return self._contents

    def _failed(self, seat: Seat, what: Failed) -> list[Heard]:
        """A node is not fit, or a worker came to an end that restarting would not mend."""
        node = seat.place.node
        text = what.message if node.name in what.message else f"node {node.name}: {what.message}"
        if seat.late and seat.step is not _Step.TURN:
            self._unfit.add(node.id)
            self._say(f"left out: {text}")
            self._ray.kill(seat.actor)
            del self._seats[seat.device.name]
            return []
        raise Failed(what.kind, text).error()

    def _lost(self, seat: Seat, told: str, *, with_node: bool) -> Heard:
        """An actor is gone. A new one is started when Ray next says that its node is alive.

        Args:
            seat: its own.
            told: by Ray.
            with_node: whether its node is gone too, or out of sight; Ray may take half a minute to
            know which.

        Raises: WorkerError: on a node that is there actors are lost again and again as they start.
        """
        name, node = seat.device.name, seat.place.node
        self._ray.kill(
            seat.actor
        )  # where it is only out of sight: it must not go on beside its successor
        del self._seats[name]
        if not seat.ready:
            self._failed_starts[seat.place.key] += 1
            if self._failed_starts[seat.place.key] >= START_TRIES and not with_node:
                raise WorkerError(
                    f"{name} on node {node.name} was lost {START_TRIES} times running as it started"
                    f" (last: {told})"
                )
        return Heard(
            name,
            Lost(
                f"node {node.name}{' is gone or out of sight' if with_node else ''}: {told}",
                with_node,
            ),
        )
