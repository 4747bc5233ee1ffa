"""The `Machines` of `--engine ray`: the nodes of a cluster, and our connection to it."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imagemill.errors import DeviceError, UsageError, counted
from imagemill.job.open_job import OpenJob
from imagemill.pipeline.backends import devices
from imagemill.pipeline.backends.automatic import CPU
from imagemill.records import DeviceSpec, Shard
from imagemill.system import cpu
from imagemill.workers.ray.nodes import Node, Place, offer, places
from imagemill.workers.ray.placement import Placement, Slot
from imagemill.workers.ray.pool import RayPool
from imagemill.workers.ray.provisioning import Provisioning

_log = logging.getLogger(__name__)

_CONNECT_S = 5.0
_LOOPBACK = "127.0.0.2"
"""Address of a cluster that is started here. Ray would turn 127.0.0.1 into the machine's address in
its network, which others can reach.
"""
_OBJECT_STORE_BYTES = 2**28
"""Of a cluster that is started here. Only models pass through it, and its one node has them."""


def load_ray() -> Any:
    """Import Ray with its usage statistics off. Raises: UsageError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without this variable Ray advises to set it, on stderr, at each start.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UsageError(
            "--engine ray needs a package that is not installed. Type: pip install 'imagemill[ray]'"
        ) from error


class Cluster:
    """The `Machines` of `--engine ray`.

    It is the cluster that RAY_ADDRESS names, or the one that runs on this machine, or one that is
    started here.

    Args:
        notify: receives lines for the user.
        allow_mixed: allow nodes that differ in versions or vector units, which may change the last
            bits of results.

    Raises:
        UsageError: Ray is not installed, or RAY_ADDRESS is invalid. DeviceError: the cluster
        cannot be reached.
    """

    def __init__(self, notify: Callable[[str], None], *, allow_mixed: bool = False) -> None:
        self.ray = load_ray()
        self._notify = notify
        self._allow_mixed = allow_mixed
        self._asked: list[devices.Asked] = []
        self._places: dict[str, Place] = {}
        self._is_ours = not self.ray.is_initialized()
        if self._is_ours:
            before = signal.getsignal(signal.SIGTERM)
            self._connect()
            if before is not None:
                # Starting a cluster changes the handler, if this is the main thread.
                with contextlib.suppress(ValueError):
                    signal.signal(signal.SIGTERM, before)

    def _connect(self) -> None:
        address = os.environ.get("RAY_ADDRESS", "")
        if "://" in address:
            raise UsageError(
                f"RAY_ADDRESS {address}: imagemill must run on a machine of the cluster. Type it"
                " there (`ray exec` does), with HOST:PORT, or without RAY_ADDRESS."
            )
        if address not in ("", "local", "auto"):
            _refuse_unreachable(address)
        _send_messages_to_the_log()
        quiet: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": "CRITICAL",
            "namespace": "imagemill",
            "job_config": _without_working_directory(),
        }
        if address != "local":
            try:
                self.ray.init(address=address or "auto", **quiet)
                return
            except ConnectionError as error:
                if address:
                    raise _no_cluster(address) from error
            except RuntimeError as error:  # other versions of Python or Ray than the cluster's
                raise DeviceError(
                    f"Ray cluster {address or 'of this machine'}: {' '.join(str(error).split())}"
                ) from error
        cores = len(cpu.usable_cores())
        here: dict[str, Any] = {
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        if sys.platform == "linux":
            here["_node_ip_address"] = _LOOPBACK
        self.ray.init(address="local", num_cpus=cores, **here, **quiet)
        self._notify(
            f"no Ray cluster was named: one was started on this machine, for this job, with {cores}"
            " CPUs"
        )

    def devices(self, spec: str) -> tuple[DeviceSpec, ...]:
        """Return the devices of all nodes that a `--devices` argument names, in the order of the
        nodes' names. Raises: UsageError, DeviceError.
        """
        self._asked = devices.parse(spec)
        nodes = self.nodes()
        self._places = {}
        found: list[DeviceSpec] = []
        for place in (place for node in nodes for place in places(node, self._asked)):
            found.append(place.device(sum(device.kind == place.kind for device in found)))
            self._places[found[-1].name] = place
        if not found:
            offered = "; ".join(f"{node.name}: {offer(node)}" for node in nodes) or "it has no node"
            raise DeviceError(
                f"--devices {spec}: no node of the Ray cluster offers that ({offered}). Start nodes"
                " that do (`ray start --num-cpus N`, "
                """`--num-gpus N`, `--resources '{"ipu": N}'`), or wait for them: `ray status`."""
            )
        hosts = len({place.node.id for place in self._places.values()})
        self._notify(
            f"Ray: {counted(len(found), 'worker')} on {hosts} of {counted(len(nodes), 'node')}"
        )
        return tuple(found)

    def automatic(self, *_: object) -> str:
        """Return the CPUs of each node: nodes with GPUs may join at any time."""
        return CPU

    def nodes(self) -> list[Node]:
        """Return the live nodes, sorted by name."""
        try:
            every = self.ray.nodes()
        except Exception as error:  # a cluster that shuts down raises anything
            reason = " ".join(str(error).split())
            raise DeviceError(
                f"the Ray cluster does not answer: {reason}. Repeat the command once it does:"
                " finished parts are kept."
            ) from error
        found = []
        for item in every:
            if item["Alive"]:
                name = item.get("NodeName") or item["NodeManagerAddress"]
                found.append(
                    Node(item["NodeID"], f"{name} ({item['NodeID'][:8]})", item["Resources"])
                )
        return sorted(found, key=lambda node: node.name)

    def pool(
        self, job: OpenJob, chosen: Sequence[DeviceSpec], remaining: Sequence[Shard]
    ) -> RayPool:
        """Return a pool for the uncommitted shards of a frozen job."""
        backends = tuple(sorted({item.backend for item in self._asked}))
        provisioning = Provisioning(
            self.ray, job, remaining, backends, allow_mixed=self._allow_mixed
        )
        slots = [Slot(device, self._places[device.name]) for device in chosen]
        placement = Placement(self.nodes, self._asked, slots, self._notify)
        return RayPool(self, job.store, provisioning, placement, slots, self._notify)

    def close(self) -> None:
        """Disconnect, and stop a cluster that was started here."""
        if self._is_ours:
            self.ray.shutdown()


class _NoFolders(list[str]):
    """A list that stays empty when it is extended."""

    def extend(self, _: object) -> None:
        """Add nothing."""


def _without_working_directory() -> Any:
    """Return a configuration that keeps our working directory off its workers' `sys.path`."""
    config: Any = importlib.import_module("ray.job_config").JobConfig()
    config._py_driver_sys_path = _NoFolders()
    return config


def _refuse_unreachable(address: str) -> None:
    """Check that something listens at an address, because Ray would try for minutes.

    Raises:
        DeviceError: nothing does.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address) from error


def _no_cluster(address: str) -> DeviceError:
    return DeviceError(
        f"RAY_ADDRESS {address}: no Ray cluster answers there. Look with `ray status --address"
        f" {address}`."
    )


def _send_messages_to_the_log() -> None:
    """Log Ray's messages about dead workers.

    Ray would print them to stdout, which must hold exactly one JSON object.
    """
    module: Any = importlib.import_module("ray._private.worker")

    def to_the_log(data: Mapping[str, Any], *_: object, **__: object) -> None:
        for line in data.get("lines", ()):
            _log.warning("Ray: %s", " ".join(str(line).split()))

    if hasattr(module, "print_to_stdstream"):
        module.print_to_stdstream = to_the_log
