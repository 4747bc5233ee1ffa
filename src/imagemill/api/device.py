"""The thread that computes the batches of a classifier."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

from imagemill.records import Batch, Outputs

if TYPE_CHECKING:
    from imagemill.pipeline.backends.base import Session


_Work: TypeAlias = "SimpleQueue[tuple[Batch, Future[Outputs]] | None]"


class Device:
    """A thread that opens a session and computes the batches of all callers in turn.

    Callers do not affect each other: none waits for another's iterable, and an interrupted caller
    leaves no half-read session. The session is a local variable of the thread, because a forked
    child does not destroy those: OpenVINO's destructor would hang there.
    """

    def __init__(self, opener: Callable[[], Session]) -> None:
        self._work: _Work = SimpleQueue()
        self._lock = threading.Lock()
        self._is_open = True
        opened: Future[None] = Future()
        thread = threading.Thread(
            target=_compute, args=(opener, self._work, opened), name="device", daemon=True
        )
        thread.start()
        self._stop = weakref.finalize(self, _stop, self._work, thread)
        opened.result()

    def submit(self, batch: Batch) -> Future[Outputs]:
        """Return the future outputs of a batch. Raises: RuntimeError after `close`."""
        future: Future[Outputs] = Future()
        with self._lock:
            if not self._is_open:
                raise RuntimeError("the device is closed")
            self._work.put((batch, future))
        return future

    def close(self) -> None:
        """Compute the submitted batches, then close the session."""
        with self._lock:
            self._is_open = False
        self._stop()


def _stop(work: _Work, thread: threading.Thread) -> None:
    work.put(None)
    # The thread itself may be the one that drops the last reference to a device.
    if thread is not threading.current_thread():
        thread.join()


def _compute(opener: Callable[[], Session], work: _Work, opened: Future[None]) -> None:
    """Compute batches until None arrives: each gets outputs or an error."""
    session: Session | None = None
    try:
        session = opener()
    except BaseException as error:  # raised in the thread that waits for `opened`
        opened.set_exception(error)
        return
    opened.set_result(None)
    while (first := work.get()) is not None:
        taken: deque[Future[Outputs]] = deque()
        try:
            session = session or opener()
            for _, outputs in session.stream(_submitted(first, work, taken)):
                taken.popleft().set_result(outputs)
        except BaseException as error:  # as above
            session = None  # a failed session is not used again
            for future in {first[1], *taken}:
                if not future.done():
                    future.set_exception(error)
        del first
    if session is not None:
        session.close()


def _submitted(
    first: tuple[Batch, Future[Outputs]], work: _Work, taken: deque[Future[Outputs]]
) -> Iterator[Batch]:
    """Yield the waiting batches, and append their futures to `taken`. Then end, so that the session
    returns all of them.
    """
    coming: tuple[Batch, Future[Outputs]] | None = first
    while coming is not None:
        batch, future = coming
        if future.set_running_or_notify_cancel():
            taken.append(future)
            yield batch
        try:
            coming = work.get_nowait()
        except Empty:
            return
    work.put(None)  # for `_compute`; nothing follows it
