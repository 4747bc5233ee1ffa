"""The class that Ray runs on the nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from imagemill.records import Lease
    from imagemill.system.processes import Failed
    from imagemill.workers.protocol import Pause
    from imagemill.workers.ray.messages import Assignment, Checked, Identity, Report, Restart
    from imagemill.workers.ray.node_agent import NodeAgent


def actor_class() -> type:
    """Return the class of the actors.

    A class that is made in a function travels by value, so a node without imagemill can say so.
    """

    class Worker:
        def hello(self, backends: tuple[str, ...]) -> Identity | Mapping[str, str]:
            """Return what decides this node's answers. If imagemill cannot be imported there are no
            records: return a mapping with the keys `missing` and `python`.
            """
            import os
            import sys

            # Ray has set it, not the user. A worker's own value is set by who starts it.
            os.environ.pop("OMP_NUM_THREADS", None)
            try:
                from imagemill.workers.ray import node_agent
            except ImportError as error:
                return {"missing": str(error), "python": sys.executable}
            self.agent: NodeAgent | None = None
            return node_agent.identity(backends)

        def prepare(self, assignment: Assignment, *contents: object) -> Checked | Failed:
            """Check the node, and start the worker unless the model must be sent first."""
            from imagemill.errors import ImagemillError
            from imagemill.system.processes import Failed
            from imagemill.workers.ray.messages import Checked
            from imagemill.workers.ray.node_agent import NodeAgent

            try:
                self.agent = NodeAgent(
                    assignment,
                    [memoryview(content) for content in contents],  # type: ignore[arg-type]
                )
            except ImagemillError as error:
                return Failed.of(error)
            return Checked(self.agent.lacks_model)

        def turn(
            self, messages: Sequence[Lease | Pause | Restart], seconds: float
        ) -> Report | Failed:
            """Exchange messages with the worker."""
            from imagemill.errors import ImagemillError
            from imagemill.system.processes import Failed

            assert self.agent is not None
            try:
                return self.agent.turn(messages, seconds)
            except ImagemillError as error:
                return Failed.of(error)

        def end(self, *, at_once: bool) -> None:
            """End the worker."""
            if self.agent is not None:
                (self.agent.close if at_once else self.agent.end)()

    return Worker
