"""Run blocking library calls so that Ctrl-C and SIGTERM are handled while they block.

Python runs signal handlers in the main thread, between its instructions, and a library may block
it for minutes. So the main thread makes such calls in daemon threads, and waits in Python.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
A = TypeVar("A")

_AT_ONCE = 16
"""Calls of `run_all`. Servers and object stores take some 30 ms for each."""
_last_write: list[Future[Any]] = []
"""The latest write, which a later one must not overtake; it may have ended."""


def run(call: Callable[[], T], *, writes: bool = False) -> T:
    """Return what a call returns, and handle signals meanwhile.

    A handler that raises ends the wait; the call then continues in its thread.

    Args:
        call: outside the main thread it is called directly.
        writes: whether it changes something. The next call that does waits until it has ended.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    answer: Future[T] = Future()
    thread = threading.Thread(target=set_answer, args=(answer, call), name="waiting", daemon=True)
    if writes:
        wait(_last_write)  # a thread whose `join` a signal interrupts would count as ended
        _last_write[:] = [answer]
    thread.start()
    return answer.result()


def run_all(call: Callable[[A], T], items: Iterable[A]) -> list[T]:
    """Return what a call returns for each item, made for several at once, and handle signals
    meanwhile. Raise the error of the first item whose call failed.
    """
    answers = [(Future[T](), item) for item in items]
    waiting = iter(answers)  # threads may share the iterator of a list

    def work() -> None:
        for answer, item in waiting:
            set_answer(answer, partial(call, item))

    for _ in answers[:_AT_ONCE]:
        threading.Thread(target=work, name="waiting", daemon=True).start()
    return [answer.result() for answer, _ in answers]


def set_answer(answer: Future[T], call: Callable[[], T]) -> None:
    """Call, and set what is returned or raised."""
    try:
        answer.set_result(call())
    except BaseException as error:
        answer.set_exception(error)
