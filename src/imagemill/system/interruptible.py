"""Waiting for libraries that wait where none of Python's signal handlers runs: Ctrl-C would wait as
long as they do, which may be minutes.

Handlers run in the main thread. So what that one wants is called in other threads, whose end
neither it nor the end of the process awaits.
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
"""Threads that are at work on something that must not overtake what comes later."""


def heard(call: Callable[[], T], *, writes: bool = False) -> T:
    """Call, and hear signals meanwhile. A handler that raises ends the wait; what was called then
    goes on unheard.

    Args:
        call: from another thread than the main one it is called right there.
        writes: whether it changes something, so that the next one that does must wait for it where
        it was left.

    Returns:
        what the call returns; raises what it raises.
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


def heard_all(call: Callable[[A], object], items: Iterable[A], at_once: int) -> None:
    """Call for every item, for so many at once, and hear signals meanwhile; see `heard`. Raises
    what the first item's call raises.
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
