"""When to repeat an operation that failed, and when to give up."""

from __future__ import annotations

import math
import random
import time

from msgspec import Struct


class RetryPolicy(Struct, frozen=True):
    """Limits of repeated attempts, and of the network requests made in them."""

    attempts: int = 6
    seconds: float = math.inf
    """No attempt starts later than this after the first one."""
    pause_s: float = 0.2
    """Pause before the second attempt; doubles with each, shortened at random by up to half."""
    longest_pause_s: float = 10.0
    """Also applies to a longer pause that a server asks for."""
    connect_s: float = 5.0
    """Time to connect."""
    silence_s: float | None = 15.0
    """A connection that delivers no byte for this long has failed; None: no limit."""
    request_s: float = 3_600.0
    """Longest time of one request to an object store."""


class Attempts:
    """The failures of one operation, and the pauses between its attempts."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._started = time.monotonic()
        self.failures = 0

    def pause(self, asked_s: float = 0.0) -> bool:
        """Count a failure and sleep until the next attempt.

        Args:
            asked_s: the pause that a server asked for.

        Returns:
            False, without sleeping, if no attempt is left.
        """
        policy = self._policy
        # Threads that failed together should not come back together.
        pause_s = policy.pause_s * 2**self.failures * random.uniform(0.5, 1.0)  # noqa: S311
        pause_s = min(max(pause_s, asked_s), policy.longest_pause_s)
        self.failures += 1
        elapsed_s = time.monotonic() - self._started
        if self.failures >= policy.attempts or elapsed_s + pause_s > policy.seconds:
            return False
        time.sleep(pause_s)
        return True
