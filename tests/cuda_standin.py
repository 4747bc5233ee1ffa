"""A stand-in for `torch.cuda` that computes on the CPU and keeps count, so that the GPU's code can
run without a GPU.

Streams do their work at once. A graph keeps the calls that were captured and makes them again into
the same memory, as a real one does. What the order of calls must be is checked: no event is
waited for that was not recorded, and no stream is left by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Event:
    """An event; must be made with `blocking=True`, because waiting must not occupy a core."""

    def __init__(self, *, blocking: bool = False, enable_timing: bool = False) -> None:
        assert blocking
        self.recorded = 0
        self.recorded_at = 0.0
        self.timed = enable_timing

    def record(self, stream: Stream) -> None:
        assert stream.current, "an event is recorded on a stream that is not the current one"
        self.recorded += 1
        self.recorded_at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        assert self.timed
        assert end.timed
        assert self.recorded == end.recorded > 0, "the events of a batch are recorded together"
        return 1000 * (end.recorded_at - self.recorded_at)

    def synchronize(self) -> None:
        assert self.recorded


class Stream:
    """A stream whose work is done at once."""

    def __init__(self, device: str) -> None:
        self.current = False

    def wait_event(self, event: Event) -> None:
        assert event.recorded


class Graph(TorchDispatchMode):
    """What was captured, to be run again into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[torch.Tensor], None] = lambda _found: None

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        self.before()
        for function, args, kwargs, made in self.calls:
            found = function(*args, **kwargs)
            for goal, value in zip(tree_leaves(made), tree_leaves(found), strict=True):
                if isinstance(goal, torch.Tensor) and goal.data_ptr() != value.data_ptr():
                    goal.copy_(value)
        self.after(self.calls[-1][-1])


class Cuda:
    """The part of `torch.cuda` that the runner uses.

    Args:
        fail: called at each replay with its number; may raise.
        spoil: called after each replay with the last thing that was computed, which it may change.
    """

    def __init__(
        self,
        fail: Callable[[int], None] = lambda _number: None,
        spoil: Callable[[torch.Tensor], None] = lambda _found: None,
    ) -> None:
        self.fail, self.spoil = fail, spoil
        self.replays = 0
        self.captures = 0
        self.Stream, self.Event = Stream, Event

    def is_available(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    def mem_get_info(self, number: int) -> tuple[int, int]:
        return 1_200_000_000, 24_000_000_000

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        stream.current = True
        yield
        stream.current = False

    def CUDAGraph(self) -> Graph:
        made = Graph()
        made.before, made.after = self._replayed, lambda found: self.spoil(found)
        return made

    @contextlib.contextmanager
    def graph(self, graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        self.captures += 1
        with self.stream(stream), graph:
            yield

    def _replayed(self) -> None:
        self.fail(self.replays)
        self.replays += 1
