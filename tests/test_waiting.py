"""Signals are handled during blocking calls that handle none, and what is left behind does no
harm.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

import pytest

from imagemill.system import interruptible


class Rung(Exception):  # noqa: N818 - a signal, not an error
    """The signal was handled."""


@pytest.fixture
def bell() -> Iterator[None]:
    """SIGUSR1 raises `Rung`."""

    def ring(*_: object) -> NoReturn:
        raise Rung

    before = signal.signal(signal.SIGUSR1, ring)
    yield
    signal.signal(signal.SIGUSR1, before)


def ring_and_wait(stop: threading.Event) -> bool:
    """What a library does: it waits, whatever comes."""
    os.kill(os.getpid(), signal.SIGUSR1)
    return stop.wait(60)


def test_what_the_call_gives_is_given() -> None:
    def bad() -> NoReturn:
        raise KeyError("x")

    assert interruptible.run(lambda: 7) == 7
    with pytest.raises(KeyError, match="x"):
        interruptible.run(bad)
    with pytest.raises(KeyError, match="x"):
        interruptible.run_all(lambda number: bad() if number == 2 else None, range(4))


def test_from_another_thread_it_is_called_right_there() -> None:
    found: list[bool] = []
    thread = threading.Thread(
        target=lambda: found.append(interruptible.run(threading.current_thread) is thread)
    )
    thread.start()
    thread.join()
    assert found == [True]
    assert interruptible.run(threading.current_thread) is not threading.current_thread()


@pytest.mark.usefixtures("bell")
def test_a_signal_ends_the_wait() -> None:
    stop = threading.Event()
    with pytest.raises(Rung):
        interruptible.run(lambda: ring_and_wait(stop))
    with pytest.raises(Rung):
        interruptible.run_all(
            lambda first: ring_and_wait(stop) if first else stop.wait(60), [True, False, False]
        )
    stop.set()


@pytest.mark.usefixtures("bell")
def test_a_write_waits_for_one_that_was_left() -> None:
    """Else an older one could undo a newer one; reading waits for nothing."""
    stop, order = threading.Event(), list[str]()

    def older() -> None:
        ring_and_wait(stop)
        order.append("older")

    with pytest.raises(Rung):
        interruptible.run(older, writes=True)
    assert interruptible.run(lambda: "read") == "read"
    threading.Timer(0.2, stop.set).start()
    interruptible.run(lambda: order.append("newer"), writes=True)
    assert order == ["older", "newer"]


def test_all_are_called_each_once() -> None:
    called: list[int] = []

    def double(number: int) -> int:
        called.append(number)
        return 2 * number

    assert interruptible.run_all(double, range(100)) == list(range(0, 200, 2))
    assert interruptible.run_all(double, []) == []
    assert sorted(called) == list(range(100))
