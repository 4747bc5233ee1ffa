"""Messages for people: where they go, and what they say of an exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from imagemill.errors import printable

Notify: TypeAlias = Callable[[str], None]
"""Receives one line for the user."""
DownloadProgress: TypeAlias = Callable[[int, int | None], None]
"""Receives the bytes so far and in all (None if unknown)."""


def one_line(error: BaseException, limit: int = 400) -> str:
    """Return the text of an exception on one line; its class if it has none.

    Example:
        >>> one_line(OSError(13, "Permission denied")), one_line(KeyError())
        ('Permission denied', 'KeyError')
    """
    text = getattr(error, "strerror", None) or str(error)
    return printable(" ".join(text.split()), limit) or type(error).__name__
