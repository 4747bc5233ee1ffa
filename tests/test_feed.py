"""The feed: each image's pixels are in its own place, whatever fails around it, and are decoded
straight into it where nothing does.
"""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import helpers
import sample_images
from imagemill.pipeline import feed as feed_module
from imagemill.pipeline import heartbeat
from imagemill.pipeline.feed import Feed
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import (
    BadImage,
    Batch,
    Decoded,
    IsolationReason,
    Limits,
    PlannedImage,
    Recipe,
    Shard,
    Status,
)

SIDE = 4
SHARD = Shard(0, 0, 200, 0, "plan.parquet", 0)
RECIPE = Recipe(SIDE, SIDE, None)


def decoding(data: bytes, recipe: Recipe, limits: Limits, out: NDArray[np.uint8] | None) -> Decoded:
    """Fills the place with the image's number; a lower-case `f` fails after it wrote something."""
    out = np.empty((SIDE, SIDE, 3), np.uint8) if out is None else out
    number = int(data[1:])
    time.sleep(random.Random(number).random() / 5_000)
    out[:] = number % 251
    if data[:1] == b"f":
        return Decoded(None, Status.CORRUPT, "no image", None, None)
    return Decoded(out, Status.OK, None, SIDE, SIDE)


def image(number: int, kind: str) -> PlannedImage:
    def fetch() -> bytes:
        if kind == "m":
            raise BadImage(Status.MISSING, "gone")
        return f"{kind}{number}".encode()

    return PlannedImage(number, SHARD, "s", str(number).encode(), -1, fetch)


def fed(kinds: str, batch_size: int, workers: int) -> Iterator[Batch]:
    with Feed(RECIPE, Limits(), batch_size, workers, None, Stopwatch()) as feed:
        for batch in feed.batches(image(number, kind) for number, kind in enumerate(kinds)):
            yield Batch(
                batch.pixels.copy(), batch.filled, batch.rows
            )  # as it is now, while others are being decoded


@pytest.fixture(autouse=True)
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "decode", decoding)


def check(kinds: str, batch_size: int, workers: int) -> None:
    rows = []
    for batch in fed(kinds, batch_size, workers):
        slots = [row.slot for row in batch.rows if row.slot >= 0]
        assert slots == list(range(batch.filled))
        for row in batch.rows:
            assert (row.slot >= 0) == (row.status is Status.OK)
            if row.slot >= 0:
                assert (batch.pixels[row.slot] == row.index % 251).all(), (
                    f"image {row.index} of {kinds} has another's pixels"
                )
        rows += batch.rows
    assert [row.index for row in rows] == list(range(len(kinds)))
    assert [row.status is Status.OK for row in rows] == [kind == "o" for kind in kinds]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@given(kinds=st.text("oofm", max_size=120))
def test_every_image_has_its_own_pixels(kinds: str, batch_size: int, workers: int) -> None:
    check(kinds, batch_size, workers)


@pytest.mark.parametrize("seed", range(6))
def test_also_where_almost_all_fail_or_almost_none(seed: int) -> None:
    """More failures in a row than a batch waits for, at any place; single ones far apart."""
    chance = random.Random(seed)
    runs = [(chance.choice("ofm"), chance.choice([1, 1, 2, 5, 40, 150])) for _ in range(25)]
    check(
        "".join(kind * length for kind, length in runs),
        chance.choice([1, 2, 3, 4, 8]),
        chance.choice([1, 2, 4]),
    )


@given(
    kinds=st.text("oof", max_size=400),
    batch_size=st.integers(1, 4),
    ahead=st.integers(1, 14),
    most_rows=st.integers(4, 20),
)
def test_nobody_writes_to_a_place_that_is_settled(
    kinds: str, batch_size: int, ahead: int, most_rows: int
) -> None:
    """An image that is still being decoded may be written at any time: to no settled place, whether
    of a batch that is filled or of one given away.
    """
    settled: list[NDArray[np.uint8]] = []
    given: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
    window: deque[tuple[str, NDArray[np.uint8] | None]] = deque()
    places, coming, rows = feed_module._Places(batch_size, SIDE, SIDE), iter(kinds), 0
    while True:
        for kind in itertools.islice(coming, ahead - len(window)):
            window.append((kind, places.take(len(window))))
        if not window:
            assert all((pixels == before).all() for pixels, before in given)
            return
        kind, out = window.popleft()
        own = np.empty((SIDE, SIDE, 3), np.uint8) if out is None else out
        own[:] = number = len(settled) % 251
        slot, rows = places.settle(own if kind == "o" else None, out), rows + 1
        assert (slot >= 0) == (kind == "o")
        if slot >= 0:
            settled.append(places._batch(0)[slot])
            assert (settled[-1] == number).all()
        for _, theirs in window:
            assert theirs is None or not any(
                np.may_share_memory(theirs, one) for one in settled[-40:]
            )
        if places.filled == batch_size or rows >= most_rows:
            pixels, filled = places.batch()
            assert all(np.may_share_memory(one, pixels) for one in settled[len(settled) - filled :])
            given.append((pixels[:filled], pixels[:filled].copy()))
            rows = 0


def places(monkeypatch: pytest.MonkeyPatch, kinds: str) -> list[bool]:
    """Of each image that is ok, whether it was decoded straight into its place."""
    outs: dict[int, Any] = {}

    def noting(
        data: bytes, recipe: Recipe, limits: Limits, out: NDArray[np.uint8] | None
    ) -> Decoded:
        outs[int(data[1:])] = out
        return decoding(data, recipe, limits, out)

    monkeypatch.setattr(feed_module, "decode", noting)
    straight = []
    with Feed(RECIPE, Limits(), 4, 2, None, Stopwatch()) as feed:
        for batch in feed.batches(image(number, kind) for number, kind in enumerate(kinds)):
            for row in batch.rows:
                if row.slot >= 0:
                    out = outs.get(row.index)
                    straight.append(
                        out is not None and out.ctypes.data == batch.pixels[row.slot].ctypes.data
                    )
    return straight


def test_where_nothing_fails_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    assert places(monkeypatch, "o" * 50) == [True] * 50


def test_after_a_failure_only_those_under_way_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of four and two images a thread are in progress: twelve, and as many that were
    begun while those were settled.
    """
    found = places(monkeypatch, "o" * 20 + "m" + "o" * 60)
    assert found[:20] == [True] * 20
    assert found[20:].count(False) <= 24
    assert found[-30:] == [True] * 30


def test_real_images_are_decoded_into_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    data = sample_images.jpeg()
    alone = feed_module.decode(data, Recipe(32, 32), Limits())
    with Feed(Recipe(32, 32), Limits(), 4, 2, None, Stopwatch()) as feed:
        (batch,) = feed.batches(
            [PlannedImage(0, SHARD, "s", b"a", -1, lambda: data) for _ in range(3)]
        )
    assert batch.filled == 3
    for place in range(3):
        np.testing.assert_array_equal(batch.pixels[place], alone.pixels)


def test_a_run_of_failures_is_handed_on_in_bounded_pieces() -> None:
    """Rows of images that fail take no place in a batch, and still no more than sixteen batches of
    them are kept back.
    """
    found = list(fed("m" * 1_000, 2, 3))
    assert [len(batch.rows) for batch in found] == [32] * 31 + [8]
    assert [row.index for batch in found for row in batch.rows] == list(range(1_000))


def test_reading_ahead_is_bounded() -> None:
    """Two batches and two images a thread beyond what was handed on, however many images there
    are.
    """
    asked = itertools.count()
    begun = 0

    def endless() -> Iterator[PlannedImage]:
        nonlocal begun
        for begun in asked:
            yield image(begun, "o")

    with Feed(RECIPE, Limits(), 4, 3, None, Stopwatch()) as feed:
        batches = feed.batches(endless())
        for number in range(1, 6):
            next(batches)
            assert begun + 1 <= 4 * number + 2 * 4 + 2 * 3


def test_each_batch_that_is_handed_on_is_a_sign_of_life() -> None:
    """A slow session is not taken for one that hangs: the supervisor sees a batch more
    each time, images or failures.
    """
    with heartbeat.shared_file() as file:
        board = heartbeat.Heartbeat(file.fileno())
        with Feed(RECIPE, Limits(), 2, 1, board, Stopwatch()) as feed:
            kinds = "oooo" + "m" * 64
            signs = [
                board.batches
                for _ in feed.batches(image(number, kind) for number, kind in enumerate(kinds))
            ]
    assert signs == [1, 2, 3, 4]


def test_a_thread_notes_its_image_while_it_works_on_it_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading and decoding are timed. A quarantined image is decoded in a process with a clock of its own, so
    here its decoding is not timed.
    """
    seen: dict[str, list[heartbeat.ActiveImage]] = {}

    class Alone:
        def decode(self, data: bytes, recipe: Recipe, limits: Limits, why: str) -> Decoded:
            seen[f"alone for a {why}"] = board.active_images()
            return decoding(data, recipe, limits, np.empty((SIDE, SIDE, 3), np.uint8))

        def close(self) -> None:
            seen["closed"] = []

    def fetch(number: int) -> bytes:
        seen[f"read {number}"] = board.active_images()
        return b"o%d" % number

    monkeypatch.setattr(feed_module, "IsolatedDecoder", Alone)
    with heartbeat.shared_file() as file:
        board = heartbeat.Heartbeat(file.fileno())
        board.reset()
        reasons = {7: None, 8: IsolationReason.CRASH, 9: IsolationReason.HUNG_READ}
        images = [
            PlannedImage(n, SHARD, "s", b"a", -1, lambda n=n: fetch(n), why)
            for n, why in reasons.items()
        ]  # type: ignore[misc]
        with Feed(RECIPE, Limits(max_seconds=7), 4, 1, board, Stopwatch()) as feed:
            (batch,) = feed.batches(images)
            assert "closed" not in seen
        assert board.active_images() == []
    assert {
        name: [(note.index, note.since_ns > 0) for note in notes] for name, notes in seen.items()
    } == {
        "read 7": [(7, True)],
        "read 8": [(8, True)],
        "alone for a crash": [(8, False)],
        "closed": [],
    }
    assert [row.status for row in batch.rows] == [Status.OK, Status.OK, Status.TIMEOUT]
    assert batch.rows[2].error == "reading or decoding it took more than --max-seconds 7, twice"


Threads: TypeAlias = Callable[[], list[threading.Thread]]


@pytest.fixture
def decoding_threads() -> Threads:
    """Returns the living decoding threads of the test's own feeds."""
    earlier = set(threading.enumerate())
    return lambda: [
        thread
        for thread in threading.enumerate()
        if thread.name == "decode" and thread not in earlier
    ]


def release_when_joined(
    monkeypatch: pytest.MonkeyPatch, thread: threading.Thread, release: threading.Event
) -> None:
    """Set the event when the feed waits for its thread, which it has asked to end by then."""
    join = thread.join

    def release_and_join() -> None:
        release.set()
        join()

    monkeypatch.setattr(thread, "join", release_and_join)


def test_the_end_cancels_what_is_waiting_and_waits_for_what_is_being_read(
    monkeypatch: pytest.MonkeyPatch, decoding_threads: Threads
) -> None:
    """A job that ends early reads no further image, and none of its threads is at work
    afterwards.
    """
    fetched, entered, release = [], threading.Event(), threading.Event()

    def image(number: int) -> PlannedImage:
        def fetch() -> bytes:
            if number == 5:
                entered.set()
                release.wait(300)
            fetched.append(number)
            return b"o%d" % number

        return PlannedImage(number, SHARD, "s", b"a", -1, fetch)

    with Feed(RECIPE, Limits(), 2, 1, None, Stopwatch()) as feed:
        next(feed.batches(map(image, range(100))))
        assert entered.wait(300)
        release_when_joined(monkeypatch, *decoding_threads(), release)
    assert fetched == list(range(6))


def test_its_threads_end_with_a_feed_that_nobody_closes(decoding_threads: Threads) -> None:
    feed = Feed(RECIPE, Limits(), 2, 3, None, Stopwatch())
    assert sum(len(batch.rows) for batch in feed.batches(map(image, range(9), "o" * 9))) == 9
    threads = decoding_threads()
    assert len(threads) == 3
    del feed
    assert not any(thread.is_alive() for thread in threads)


def test_threads_that_were_started_end_if_one_cannot_start(
    monkeypatch: pytest.MonkeyPatch, decoding_threads: Threads
) -> None:
    start, numbers = threading.Thread.start, itertools.count()

    def failing(thread: threading.Thread) -> None:
        if next(numbers) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(RuntimeError, match="start new thread"):
        Feed(RECIPE, Limits(), 2, 4, None, Stopwatch())
    assert next(numbers) == 3
    gc.collect()  # the error may have kept it alive
    assert decoding_threads() == []


def test_there_are_no_more_threads_than_slots(decoding_threads: Threads) -> None:
    with Feed(RECIPE, Limits(), 2, heartbeat.SLOTS + 1, None, Stopwatch()):
        assert len(decoding_threads()) == heartbeat.SLOTS


def test_a_closed_feed_refuses_images(
    monkeypatch: pytest.MonkeyPatch, decoding_threads: Threads
) -> None:
    """Also if it is closed while somebody waits for an image, which may be in another thread."""
    reading, release = threading.Event(), threading.Event()

    def fetch() -> bytes:
        reading.set()
        release.wait(20)
        return b"o1"

    slow = PlannedImage(0, SHARD, "s", b"a", -1, fetch)
    refused: list[str] = []

    def wait() -> None:
        with pytest.raises(RuntimeError) as error:
            list(feed.batches([slow, image(1, "o")]))
        refused.append(str(error.value))

    with Feed(RECIPE, Limits(), 2, 1, None, Stopwatch()) as feed:
        waiter = threading.Thread(target=wait)
        waiter.start()
        assert reading.wait(300)
        release_when_joined(monkeypatch, *decoding_threads(), release)
    waiter.join(300)
    assert refused == ["the feed is closed"]
    with pytest.raises(RuntimeError, match="the feed is closed"):
        list(feed.batches([image(0, "o")]))


def test_a_slow_image_holds_up_no_other() -> None:
    """One thread works on the slow one; the other decodes everything else that is read ahead."""
    others, all_read = set(range(1, 8)), threading.Event()

    def planned(number: int) -> PlannedImage:
        def fetch() -> bytes:
            if number == 0:
                assert all_read.wait(20), f"not read: {others}"
            others.discard(number)
            if not others:
                all_read.set()
            return b"o%d" % number

        return PlannedImage(number, SHARD, "s", b"a", -1, fetch)

    with Feed(RECIPE, Limits(), 2, 2, None, Stopwatch()) as feed:
        batches = list(feed.batches(map(planned, range(8))))
    assert [row.index for batch in batches for row in batch.rows] == list(range(8))


def test_an_error_that_is_no_fault_of_the_image_is_raised_where_its_batch_is_wanted() -> None:
    def fetch() -> bytes:
        raise ZeroDivisionError("a bug")

    images = [image(0, "o"), image(1, "o"), PlannedImage(2, SHARD, "s", b"a", -1, fetch)]
    with Feed(RECIPE, Limits(), 2, 2, None, Stopwatch()) as feed:
        batches = feed.batches(images)
        assert [row.index for row in next(batches).rows] == [0, 1]
        with pytest.raises(ZeroDivisionError, match="a bug"):
            next(batches)


def test_reading_and_decoding_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading by the clock on the wall, decoding by the time of its thread: which of them bounds
    the job is judged by these sums.
    """
    clock = SimpleNamespace(wall=0.0, thread=0.0)
    monkeypatch.setattr(
        feed_module,
        "time",
        SimpleNamespace(perf_counter=lambda: clock.wall, thread_time=lambda: clock.thread),
    )

    def reads(number: int) -> PlannedImage:
        def fetch() -> bytes:
            clock.wall += 3.0
            clock.thread += 0.25  # what reading itself computes is not decoding
            return b"o%d" % number

        return PlannedImage(number, SHARD, "s", b"a", -1, fetch)

    def decodes(data: bytes, recipe: Recipe, limits: Limits, out: NDArray[np.uint8]) -> Decoded:
        clock.wall += 100.0
        clock.thread += 5.0
        return Decoded(out, Status.OK, None, SIDE, SIDE)

    monkeypatch.setattr(feed_module, "decode", decodes)
    stopwatch = Stopwatch()
    with Feed(RECIPE, Limits(), 4, 1, None, stopwatch) as feed:
        list(feed.batches(map(reads, range(2))))
    assert (stopwatch.read().read, stopwatch.read().decode, stopwatch.read().images) == (
        6.0,
        10.0,
        2,
    )


def test_an_image_that_changed_since_it_was_listed_is_noted_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both sizes; one whose size was not known, or is the same, is not."""
    helpers.capture_log("imagemill.pipeline.feed", caplog, monkeypatch)
    images = [
        PlannedImage(number, SHARD, "s", b"a%d" % number, size, lambda: b"o1")
        for number, size in enumerate((2, -1, 3, 0))
    ]
    with Feed(RECIPE, Limits(), 4, 1, None, Stopwatch()) as feed:
        list(feed.batches(images))
    assert [record.getMessage() for record in caplog.records] == [
        "b'a2' changed since it was listed: 3 bytes, now 2",
        "b'a3' changed since it was listed: 0 bytes, now 2",
    ]
