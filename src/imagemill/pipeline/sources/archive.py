"""What archives share: blobs that open at their first read."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import ClassVar

from imagemill.errors import SourceError
from imagemill.pipeline.sources import objects
from imagemill.pipeline.sources.files import retried
from imagemill.system import storage

GET_IT_AGAIN = "Get it again, or unpack what is whole of it and give the folder."
_KEPT_OPEN = 4


class LazyBlob:
    """A blob that the first read opens, in any process, and that is opened again after an error.

    Safe for many threads.

    A job may have thousands of archives; a process keeps the last few open, which is enough for
    images that come in plan order.
    """

    _kept: ClassVar[deque[weakref.ref[LazyBlob]]] = deque()
    _keeping = threading.Lock()

    def __init__(self, opener: Callable[[], storage.Blob]) -> None:
        self._opener = opener
        self._opening = threading.Lock()
        self._blob: storage.Blob | None = None

    def read_at(self, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset`; fewer only where the blob ends. Raises: BadImage."""
        return retried(
            lambda: self._read_at(offset, length),
            "the archive was listed but is gone, or its link leads nowhere",
        )

    def _read_at(self, offset: int, length: int) -> bytes:
        blob = self._blob or self._open()
        try:
            return (
                blob.read_at(offset, min(length, blob.size - offset)) if offset < blob.size else b""
            )
        except OSError:
            self._blob = None
            raise

    def _open(self) -> storage.Blob:
        with self._opening:
            if (blob := self._blob) is not None:
                return blob
            self._blob = blob = self._opener()
        with self._keeping:
            self._kept.append(weakref.ref(self))
            while len(self._kept) > _KEPT_OPEN:
                if (oldest := self._kept.popleft()()) is not None and oldest is not self:
                    # not closed: other threads may be reading from it, the last of them closes it
                    oldest._blob = None
        return blob


def cannot_read(name: str, error: OSError, what: str) -> SourceError:
    """Return the error for an archive that cannot be listed."""
    if storage.is_url(name):
        return objects.cannot_read(name, error)
    return SourceError(f"source {name} cannot be read: {error.strerror or error}. Give {what}.")
