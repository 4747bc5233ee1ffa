"""A real Ray cluster on this machine: several raylets, each of which is a node. It listens on
127.0.0.1 and ends with the tests.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helpers

STORE_BYTES = 100 * 2**20
_HEALTH = {"health_check_period_ms": 1_000, "health_check_failure_threshold": 5}
"""So that a node that was killed is known to be within some seconds, not half a minute; the next
test would find it else. Much less, and a node that starts beside other work is taken for dead.
"""


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Change this process's environment for a moment: what Ray starts inherits it."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Nodes:
    """A head and the nodes that joined it."""

    def __init__(self, **head: Any) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        self._environment = helpers.environment()
        self._hosts = itertools.count(2)
        with _environment(self._environment | head.pop("env", {})):
            self._cluster = Cluster(
                initialize_head=True, head_node_args=self._arguments(_system_config=_HEALTH, **head)
            )
        self.head = self._cluster.head_node

    @property
    def address(self) -> str:
        """What RAY_ADDRESS must be."""
        return str(self._cluster.address)

    def add(self, env: Mapping[str, str] | None = None, **options: Any) -> Any:
        """Start one more node; `env` is what its workers find in their environment."""
        with _environment(self._environment | dict(env or {})):
            return self._cluster.add_node(wait=True, **self._arguments(**options))

    def kill(self, node: Any) -> None:
        """A power cut: SIGKILL to all of a node's processes."""
        self._cluster.remove_node(node, allow_graceful=False)

    def remove(self, node: Any) -> None:
        """Let a node go in good order."""
        self._cluster.remove_node(node, allow_graceful=True)

    def stop(self) -> None:
        """End all of them."""
        self._cluster.shutdown()

    def environment(self, **changes: str) -> dict[str, str]:
        """For a launcher on this cluster."""
        return helpers.environment(RAY_ADDRESS=self.address, **changes)

    def _arguments(self, **options: Any) -> dict[str, Any]:
        # loopback too, but Ray would turn 127.0.0.1 into the machine's address in its network
        address = f"127.0.0.{next(self._hosts)}"
        return {
            "num_cpus": 1,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            "node_ip_address": address,
        } | options


@contextlib.contextmanager
def cluster(**head: Any) -> Iterator[Nodes]:
    """A cluster with a head of one CPU."""
    nodes = Nodes(**head)
    try:
        yield nodes
    finally:
        nodes.stop()


def parent(pid: int) -> int:
    """Of a worker process: the actor that watches it."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
