"""When rows were committed, per device: a fixed number of buckets that double their width when the
job outlasts them.
"""

from __future__ import annotations

from collections.abc import Sequence

from imagemill.records import Throughput

BUCKETS = 64
_FIRST_S = 0.125


class Timeline:
    """Rows over time. Its size depends on the number of devices alone.

    Args:
        devices: their names.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self._bucket_s = _FIRST_S
        self._rows = {name: [0.0] * BUCKETS for name in devices}

    def add(self, device: str, begun_s: float, ended_s: float, rows: int) -> None:
        """Spread the rows of a commit evenly over the time that they took.

        Args:
            device: its name.
            begun_s: since the first lease.
            ended_s: the same, of the commit.
            rows: how many.
        """
        begun_s = max(0.0, begun_s)
        ended_s = max(ended_s, begun_s)
        while ended_s >= self._bucket_s * BUCKETS:
            self._merge()
        buckets = self._rows.setdefault(
            device, [0.0] * BUCKETS
        )  # it may have come while the job ran
        if ended_s == begun_s:
            buckets[int(begun_s / self._bucket_s)] += rows
            return
        for number in range(int(begun_s / self._bucket_s), int(ended_s / self._bucket_s) + 1):
            start, end = number * self._bucket_s, (number + 1) * self._bucket_s
            buckets[number] += (
                rows * max(0.0, min(end, ended_s) - max(start, begun_s)) / (ended_s - begun_s)
            )

    def _merge(self) -> None:
        self._bucket_s *= 2
        for name, rows in self._rows.items():
            merged = [first + second for first, second in zip(rows[::2], rows[1::2], strict=True)]
            self._rows[name] = merged + [0.0] * (BUCKETS - len(merged))

    def read(self) -> Throughput:
        """What there is so far, up to the last bucket that holds a row."""
        used = max(
            (
                number + 1
                for rows in self._rows.values()
                for number, count in enumerate(rows)
                if count
            ),
            default=0,
        )
        images = tuple(
            tuple(round(count, 1) for count in rows[:used]) for rows in self._rows.values()
        )
        return Throughput(self._bucket_s, tuple(self._rows), images)
