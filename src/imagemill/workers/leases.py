"""Which shard goes to whom next; and what is known about a shard that was in hand when its worker
died.

Nothing here knows of processes, machines or time. Every shard that is not committed is either
waiting here or leased.

- Where sub-folders are dealt to devices, a device takes those of its own first; one whose own are
  gone takes from the longest queue.
- What a dead worker had in hand comes back to the front of its queue. Images that its decoding
  threads were at become suspects.
- A shard that was in hand when workers died twice is leased alone, every image of it decoded in a
  disposable process. A node that was lost weighs half of that: most are lost for reasons of their
  own, yet an image that takes all of a node's memory takes the node.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Collection, Sequence

from imagemill.records import Lease, Shard

_log = logging.getLogger(__name__)

_DEATH, _LOSS = 2, 1
_ALONE_FROM = 4
"""Weight from which a shard is leased alone: two deaths, four losses, or one death and two
losses.
"""


class Leases:
    """Deals shards.

    Args:
        shards: the ones that are not committed yet.
        dealt: whether a shard's group says which device, by position, takes it first.
    """

    def __init__(self, shards: Sequence[Shard], *, dealt: bool = False) -> None:
        self._dealt = dealt
        self._queues: dict[int, deque[Lease]] = {}
        for shard in shards:
            self._queue_of(shard).append(Lease(shard))
        self._alone: deque[Lease] = deque()
        self._blame: Counter[int] = Counter()
        self.remaining = len(shards)
        """Shards that are not committed, leased or not."""

    @property
    def waiting(self) -> int:
        """Shards that are not leased."""
        return len(self._alone) + sum(map(len, self._queues.values()))

    def next(self, position: int, holds: Collection[Lease] = ()) -> Lease | None:
        """The next shard for the device at `position`, which has these in hand; None: there is none
        for it now.
        """
        if any(lease.isolate for lease in holds):
            return None
        if self._alone:
            return (
                None if holds else self._alone.popleft()
            )  # its hands must be empty: then, at its next question, it takes it
        own = self._queues.get(position if self._dealt else 0)
        queue = own or max(self._queues.values(), key=len, default=None)
        return queue.popleft() if queue else None

    def committed(self, shard: int) -> None:
        """A part was committed."""
        self.remaining -= 1
        self._blame.pop(shard, None)

    def give_back(
        self, lease: Lease, noted: Collection[int] = (), timed_out: Collection[int] = ()
    ) -> None:
        """Take back what a dead worker had in hand.

        Args:
            lease: as it was dealt.
            noted: indices of images that the worker's decoding threads were at.
            timed_out: those of them for whose sake it was killed.
        """
        shard = lease.shard
        suspects = dict(lease.suspects)
        for index in noted:
            if shard.first <= index < shard.first + shard.count:
                if index in timed_out:
                    suspects[index] = "hung_read" if suspects.get(index) == "timeout" else "timeout"
                else:
                    suspects.setdefault(index, "crash")
                _log.warning("image %d is suspected: %s", index, suspects[index])
        self._take(Lease(shard, suspects), _DEATH)

    def lost(self, lease: Lease) -> None:
        """Take back what was in hand where a worker was lost together with whoever watched it:
        nothing is known of its last moments.
        """
        self._take(Lease(lease.shard, lease.suspects), _LOSS)

    def _take(self, lease: Lease, weight: int) -> None:
        number = lease.shard.number
        self._blame[number] += weight
        if self._blame[number] >= _ALONE_FROM:
            _log.warning("shard %d was in hand too often when a worker died: alone now", number)
            self._alone.append(Lease(lease.shard, lease.suspects, isolate=True))
        else:
            self._queue_of(lease.shard).appendleft(lease)

    def _queue_of(self, shard: Shard) -> deque[Lease]:
        return self._queues.setdefault(shard.group if self._dealt else 0, deque())
