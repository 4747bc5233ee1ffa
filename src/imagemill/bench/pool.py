"""A pool of processes that measure, one per device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from msgspec import Struct

from imagemill.bench.messages import Begin, Compute, Decode, Measured, Ready
from imagemill.errors import WorkerError
from imagemill.pipeline.backends.nvidia import pinned
from imagemill.records import DeviceSpec, MemoryTraffic, SessionSpec
from imagemill.system.processes import Child, ChildError, Stop


class _Member(Struct, frozen=True):
    device: DeviceSpec
    child: Child

    def receive(self, timeout_s: float | None) -> object:
        try:
            return self.child.receive(timeout_s)
        except ChildError as died:
            raise WorkerError(
                f"the process that measures {self.device.name} {died}. The last lines of its"
                f" log:\n{died.log_tail}"
            ) from died

    def whole(self, batches: float) -> int:
        """Round up to the same number of batches for each stream, of which there is one per core.

        Otherwise some streams would be idle while others compute the last batches.
        """
        streams = len(self.device.cores)
        return streams * math.ceil(batches / streams)


class MeasuringPool:
    """One process per device, each with a compiled session. They wait `patience_s` for an answer;
    None: for ever.

    Raises:
        ImagemillError: a process reported it. WorkerError: a process died, or did not answer.
    """

    def __init__(
        self, spec: SessionSpec, devices: Sequence[DeviceSpec], patience_s: float | None = None
    ) -> None:
        self._members: list[_Member] = []
        self._batch_size = spec.batch_size
        self._patience_s = patience_s
        try:
            for device in devices:
                visible, variables = pinned(device)
                member = _Member(device, Child("imagemill.bench.worker", variables=variables))
                self._members.append(member)
                member.child.send(Begin(spec, visible))
            ready = [member.receive(patience_s) for member in self._members]
        except BaseException:
            self.close()
            raise
        self.versions: dict[str, str] = {}
        self.traffic: dict[str, MemoryTraffic] = {}
        """Device → what its memory allows, if that is known."""
        for member, answer in zip(self._members, ready, strict=True):
            assert isinstance(answer, Ready)
            self.versions |= answer.versions
            if answer.traffic is not None:
                self.traffic[member.device.name] = answer.traffic

    def __enter__(self) -> MeasuringPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def measure(self, orders: Mapping[str, Compute | Decode]) -> dict[str, Measured]:
        """Give each named device its order, all at once, and return the results. Other devices
        stay idle.
        """
        asked = [member for member in self._members if member.device.name in orders]
        for member in asked:
            member.child.send(orders[member.device.name])
        found = {}
        for member in asked:
            answer = member.receive(self._patience_s)
            assert isinstance(answer, Measured)
            found[member.device.name] = answer
        return found

    def warm_up(self, batches: int = 4) -> dict[str, Measured]:
        """Compute at least this many batches on every device."""
        return self.measure(
            {member.device.name: Compute(member.whole(batches)) for member in self._members}
        )

    def orders(self, seconds: float, fewest: int = 8) -> dict[str, Compute]:
        """Return orders that take every device about `seconds`, with at least `fewest` batches.

        Each device's rate is measured on `fewest` batches first.
        """
        tried = self.warm_up(fewest)
        rates = {name: found.images_per_second / self._batch_size for name, found in tried.items()}
        return {
            (name := member.device.name): Compute(member.whole(max(fewest, seconds * rates[name])))
            for member in self._members
        }

    def close(self) -> None:
        """End all processes."""
        for member in self._members:
            member.child.send(Stop())
        for member in self._members:
            member.child.wait(2)
            member.child.close()
        self._members = []
