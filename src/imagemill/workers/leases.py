"""Which shard goes to which device next, and what is known about shards whose worker died.

Nothing here knows of processes, machines or time. Every uncommitted shard either waits here or is
leased.

- If sub-folders are assigned to devices, a device takes shards of its own sub-folder first. When it
  has none left it takes from the longest queue.
- A dead worker's shards return to the front of their queue. The images that its decoding threads
  worked on are quarantined.
- A shard that was in flight when workers died twice is isolated: it is leased alone, and every
  image of it is decoded in a process of its own. A lost node counts half. Most nodes are lost for
  reasons of their own, but an image that takes all of a node's memory takes the node.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Collection, Sequence

from imagemill.records import IsolationReason, Lease, Shard

_log = logging.getLogger(__name__)

_DEATH, _LOSS = 2, 1
_ISOLATE_FROM = 4
"""Blame at which a shard is isolated: two deaths, four losses, or one death and two losses."""


class Leases:
    """A queue of shards, from which devices take leases.

    Args:
        shards: the uncommitted ones.
        by_group: whether a shard's group is the position of the device that takes it first.
    """

    def __init__(self, shards: Sequence[Shard], *, by_group: bool = False) -> None:
        self._by_group = by_group
        self._queues: dict[int, deque[Lease]] = {}
        for shard in shards:
            self._queue_of(shard).append(Lease(shard))
        self._isolated: deque[Lease] = deque()
        self._blame: Counter[int] = Counter()
        self.remaining = len(shards)
        """Number of uncommitted shards, leased or not."""

    def next(self, position: int, in_flight: Collection[Lease] = ()) -> Lease | None:
        """Return the next lease for the device at a position, which holds the leases `in_flight`;
        None if there is none for it now.
        """
        if any(lease.isolate for lease in in_flight):
            return None
        if self._isolated:
            # A device that holds leases gets nothing more, so that it soon can take this one.
            return None if in_flight else self._isolated.popleft()
        own = self._queues.get(position if self._by_group else 0)
        queue = own or max(self._queues.values(), key=len, default=None)
        return queue.popleft() if queue else None

    def commit(self, shard: int) -> None:
        """Record that a shard was committed."""
        self.remaining -= 1
        self._blame.pop(shard, None)

    def return_dead(
        self, lease: Lease, active: Collection[int] = (), timed_out: Collection[int] = ()
    ) -> None:
        """Take back a lease of a worker that died.

        Args:
            lease: as it was handed out.
            active: indices of the images that the worker's decoding threads worked on.
            timed_out: those of them that the worker was killed for.
        """
        shard = lease.shard
        quarantined = dict(lease.quarantined)
        for index in active:
            if shard.first <= index < shard.first + shard.count:
                if index not in timed_out:
                    quarantined.setdefault(index, IsolationReason.CRASH)
                elif quarantined.get(index) is IsolationReason.TIMEOUT:
                    quarantined[index] = IsolationReason.HUNG_READ
                else:
                    quarantined[index] = IsolationReason.TIMEOUT
                _log.warning("image %d is quarantined: %s", index, quarantined[index])
        self._return(Lease(shard, quarantined), _DEATH)

    def return_lost(self, lease: Lease) -> None:
        """Take back a lease of a worker that was lost with its supervisor, so that nothing is known
        about its end.
        """
        self._return(Lease(lease.shard, lease.quarantined), _LOSS)

    def _return(self, lease: Lease, blame: int) -> None:
        number = lease.shard.number
        self._blame[number] += blame
        if self._blame[number] >= _ISOLATE_FROM:
            _log.warning("shard %d was in flight when several workers died: isolated", number)
            self._isolated.append(Lease(lease.shard, lease.quarantined, isolate=True))
        else:
            self._queue_of(lease.shard).appendleft(lease)

    def _queue_of(self, shard: Shard) -> deque[Lease]:
        return self._queues.setdefault(shard.group if self._by_group else 0, deque())
