"""Run blocking library calls so that Ctrl-C and SIGTERM are handled while they block.

Python runs signal handlers in the main thread, between its instructions, and a library may block
it for minutes. So the main thread makes such calls in daemon threads, and waits in Python.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
A = TypeVar("A")

_unfinished: set[threading.Thread] = set()
"""Threads whose writes a later write must not overtake."""


def run(call: Callable[[], T], *, writes: bool = False) -> T:
    """Return what a call returns, and handle signals meanwhile.

    A handler that raises ends the wait; the call then continues in its thread.

    Args:
        call: outside the main thread it is called directly.
        writes: whether it changes something. The next call that does waits until it has ended.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    if writes:
        for thread in list(_unfinished):
            if thread.is_alive():
                thread.join()
            _unfinished.discard(thread)
    answer: Future[T] = Future()
    thread = threading.Thread(target=_answer, args=(answer, call), name="waiting", daemon=True)
    if writes:
        _unfinished.add(thread)
    thread.start()
    try:
        return answer.result()
    finally:
        if answer.done():
            _unfinished.discard(thread)


def run_all(call: Callable[[A], object], items: Iterable[A], at_once: int) -> None:
    """Call for every item, `at_once` at a time, and handle signals meanwhile.

    Raise the error of the first item whose call failed.
    """
    todo: queue.SimpleQueue[tuple[Future[object], A]] = queue.SimpleQueue()
    answers = []
    for item in items:
        answers.append(Future[object]())
        todo.put((answers[-1], item))

    def work() -> None:
        while True:
            try:
                answer, item = todo.get_nowait()
            except queue.Empty:
                return
            _answer(answer, lambda item=item: call(item))  # type: ignore[misc]

    for _ in range(min(at_once, len(answers))):
        threading.Thread(target=work, name="waiting", daemon=True).start()
    for answer in answers:
        answer.result()


def _answer(answer: Future[T], call: Callable[[], T]) -> None:
    try:
        answer.set_result(call())
    except BaseException as error:
        answer.set_exception(error)
