"""Watchers, which receive the messages and the progress of a job, and the log file of a job."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from imagemill.display import terminal, text
from imagemill.records import Progress
from imagemill.system.messages import Notify


class Watcher:
    """Receives the messages and the progress of a job. This base class forwards the messages, and
    ignores the rest.
    """

    def __init__(self, forward: Notify = lambda _: None) -> None:
        self._forward = forward

    def notify(self, message: str) -> None:
        """Receive one line for the user."""
        self._forward(message)

    def download(self, done: int, total: int | None) -> None:
        """Receive the bytes of a model downloaded so far, and in all; None if that is not
        known.
        """

    def begin(self, total: int, resumed: int) -> Callable[[Progress], None]:  # noqa: ARG002 - for subclasses
        """Return a function that receives the progress of a job that starts now.

        Of its `total` images, `resumed` are done already.
        """
        return lambda _: None

    def end(self) -> None:
        """End the display, after the last worker ended."""


class Terminal(Watcher):
    """Prints messages and progress to stderr."""

    def __init__(self) -> None:
        self._downloading = terminal.DownloadDisplay()

    def notify(self, message: str) -> None:
        """Print the line."""
        text.print_message(f"imagemill: {message}")

    def begin(self, total: int, resumed: int) -> Callable[[Progress], None]:
        """Start the display that fits the place where stderr goes."""
        self._display = terminal.make_display(total, resumed)
        return self._display

    def download(self, done: int, total: int | None) -> None:
        """Show how far the download is."""
        self._downloading(done, total)

    def end(self) -> None:
        """Close the display."""
        self._display.close()


class _LogFile(logging.FileHandler):
    """A log file that drops what it cannot write, so that a full disk does not end a job for the
    sake of a log line.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # of opening it
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - overrides logging.Handler
        """Ignore the error."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


_lock = threading.Lock()
_before: list[tuple[int, bool]] = []
"""Level and propagation of the logger as each open context found them."""


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Let this package log to a file, and nowhere else.

    Contexts may overlap; when the last one ends, the logger is as it was before the first.
    """
    logger, handler = logging.getLogger("imagemill"), _LogFile(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    with _lock:
        _before.append((logger.level, logger.propagate))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        with _lock:
            logger.removeHandler(handler)
            # All but the first context found what contexts set, so their order does not matter.
            level, logger.propagate = _before.pop()
            logger.setLevel(level)
        handler.close()
