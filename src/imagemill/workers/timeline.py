"""When rows were committed, per device, in a fixed number of time buckets."""

from __future__ import annotations

from collections.abc import Sequence

from imagemill.records import Throughput

BUCKETS = 64
_FIRST_S = 0.125


class Timeline:
    """Rows over time. When the job outlasts the buckets, they double their width."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._bucket_s = _FIRST_S
        self._rows = {name: [0.0] * BUCKETS for name in devices}

    def add(self, device: str, begun_s: float, ended_s: float, rows: int) -> None:
        """Spread the rows of a commit evenly over the time that they took, in seconds since the
        first lease. The device may be new.
        """
        begun_s = max(0.0, begun_s)
        ended_s = max(ended_s, begun_s)
        while ended_s >= self._bucket_s * BUCKETS:
            self._merge()
        buckets = self._rows.setdefault(device, [0.0] * BUCKETS)
        if ended_s == begun_s:
            buckets[int(begun_s / self._bucket_s)] += rows
            return
        for number in range(int(begun_s / self._bucket_s), int(ended_s / self._bucket_s) + 1):
            start, end = number * self._bucket_s, (number + 1) * self._bucket_s
            overlap_s = max(0.0, min(end, ended_s) - max(start, begun_s))
            buckets[number] += rows * overlap_s / (ended_s - begun_s)

    def _merge(self) -> None:
        self._bucket_s *= 2
        for name, rows in self._rows.items():
            merged = [first + second for first, second in zip(rows[::2], rows[1::2], strict=True)]
            self._rows[name] = merged + [0.0] * (BUCKETS - len(merged))

    def read(self) -> Throughput:
        """Return the rows so far, up to the last bucket that has any."""
        used = max(
            (number for rows in self._rows.values() for number, n in enumerate(rows, 1) if n),
            default=0,
        )
        images = tuple(tuple(round(n, 1) for n in rows[:used]) for rows in self._rows.values())
        return Throughput(self._bucket_s, tuple(self._rows), images)
