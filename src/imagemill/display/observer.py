"""What a caller hears of a job while it runs, and what its log keeps."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from imagemill.display import terminal, text
from imagemill.records import Progress


class Watcher:
    """What a caller may want to hear while a job runs; this one wants nothing."""

    def say(self, message: str) -> None:
        """One line for the user."""

    def download(self, done: int, total: int | None) -> None:
        """A model is being downloaded: bytes so far, and in all where known."""

    def begin(self, total: int, resumed: int) -> Callable[[Progress], None]:  # noqa: ARG002 - for those who override it
        """The job starts: `resumed` of `total` images are done. Returns what is told of the
        progress.
        """
        return lambda _: None

    def end(self) -> None:
        """The workers are gone."""


class Terminal(Watcher):
    """Says everything on stderr."""

    def __init__(self) -> None:
        self._downloading = terminal.DownloadProgress()

    def say(self, message: str) -> None:
        """See `Watcher.say`."""
        text.tell(f"imagemill: {message}")

    def begin(self, total: int, resumed: int) -> Callable[[Progress], None]:
        """See `Watcher.begin`."""
        self._display = terminal.display(total, resumed)
        return self._display

    def download(self, done: int, total: int | None) -> None:
        """See `Watcher.download`."""
        self._downloading(done, total)

    def end(self) -> None:
        """See `Watcher.end`."""
        self._display.close()


class _LogFile(logging.FileHandler):
    """A log that goes without what it cannot write: a full disk is told once, by what needs it, and
    ends no job for a line of log.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # of opening it
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging calls
        """Say nothing."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class logging_to:  # noqa: N801 - reads as the verb it is
    """Send this package's log to a file, and nowhere else, for a while."""

    def __init__(self, path: Path) -> None:
        self._handler = _LogFile(path, delay=True)
        self._handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        )

    def __enter__(self) -> None:
        logger = logging.getLogger("imagemill")
        self._before = (logger.level, logger.propagate)
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("imagemill")
        logger.removeHandler(self._handler)
        logger.level, logger.propagate = self._before
        self._handler.close()
