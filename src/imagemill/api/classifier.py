"""An open model in the caller's process, and its predictions."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import replace

from imagemill.api.device import Device
from imagemill.api.items import Item, check_type, fetcher, several
from imagemill.errors import UsageError
from imagemill.pipeline.feed import Feed
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.pipeline.top_k import top_k
from imagemill.records import (
    Batch,
    Limits,
    Outputs,
    PlannedImage,
    Saved,
    SessionSpec,
    Shard,
    Status,
    html_table,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imagemill.pipeline.backends.base import Session


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the most probable classes of an image."""

    class_id: int
    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The result of one image, with the columns of a job's row."""

    status: Status
    error: str | None
    """One line; None if status is ok."""
    class_id: int | None
    """The most probable class. It is None, like label and probability, if status is not ok, if the
    model has no classes, or if no class is as probable as `min_probability`.
    """
    label: str | None
    probability: float | None
    top_k: tuple[Answer, ...]
    """Most probable first, ties by class id; empty if `class_id` is None."""
    width: int | None
    """Of the image as displayed; None if unknown."""
    height: int | None
    logits: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """float32 (classes,) with `load(save=["logits"])` if status is ok."""
    embedding: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """float32 (features,) with `load(save=["embedding"])`, or if the model has no classes, if
    status is ok.
    """

    def __repr__(self) -> str:
        shown = [f"{value} {what}".rstrip() for value, what in self._lines()]
        return f"Prediction({', '.join(shown[:3])}{', …' * (len(shown) > 3)})"

    def _repr_html_(self) -> str:
        return html_table(self._lines())

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Yield what notebooks and Python's prompt show: the classes, or why there are none."""
        if self.status is not Status.OK:
            yield self.status.value, self.error or ""
        elif not self.top_k:
            yield "ok", "no class"
        for answer in self.top_k:
            yield f"{answer.probability:.1%}", answer.label


class Classifier:
    """An open model, returned by `load`.

    Several threads and open streams can use it at the same time. They share the device and the
    decoding threads. A forked child must load its own. An image that crashes its decoder ends this
    process, unlike with `run`.
    """

    def __init__(
        self,
        spec: SessionSpec,
        opener: Callable[[], Session],
        ahead: int,
        top_k: int,
        min_probability: float | Sequence[float] | None,
        num_workers: int,
        limits: Limits,
    ) -> None:
        self._spec = spec
        self._top_k = top_k
        self._min_probability = min_probability
        self._limits = limits
        self._ahead = ahead
        self._process = os.getpid()
        self._device = Device(opener)
        # Bytes are checked here, for encoded images only: pixels have no encoded size.
        limits = replace(limits, max_bytes=2**62)
        self._feed = Feed(spec.card.recipe, limits, spec.batch_size, num_workers, None, Stopwatch())
        self._is_open = True

    @property
    def name(self) -> str:
        """The model's name."""
        return self._spec.card.name

    @property
    def labels(self) -> tuple[str, ...]:
        """One per class, in the order of the logits; empty if the model has no classes."""
        return self._spec.card.labels

    @property
    def precision(self) -> str:
        """The precision in use: `fp32`, `bf16`, `fp16` or `int8`."""
        return self._spec.precision.value

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the device and the decoding threads.

        Calls in other threads and open streams end with `UsageError`. Closing twice, or in a
        forked child, does nothing.
        """
        if self._is_open and os.getpid() == self._process:
            self._is_open = False
            self._feed.__exit__(None, None, None)
            self._device.close()

    def predict(self, items: Item | Iterable[Item]) -> list[Prediction]:
        """Return a prediction for each image, in order.

        Apart from the returned list, it needs as little memory as `stream`.

        Args:
            items: one image or many: paths, encoded bytes, binary files, Pillow images, or pixels,
                uint8 (H, W, 3), RGB, or (H, W), grey.

        Returns:
            One prediction per image. A bad image is a status of its prediction, not an error.

        Raises:
            UsageError: an item is not an image, such as a number or a text file (in a list or
                tuple this is found before anything is computed); or the classifier is closed, or
                was opened in another process.
            BadLogitsError: the model returned an array of the wrong shape.
        """
        self._check_usable()
        items = several(items)
        if isinstance(items, list | tuple):
            for number, item in enumerate(items):
                check_type(number, item)
        return list(self.stream(items))

    def stream(self, items: Item | Iterable[Item]) -> Iterator[Prediction]:
        """Yield a prediction for each image, in order and in bounded memory, while images arrive.

        The iterable is read in the thread that asks for the next prediction. At most 2 batches and
        2 images per decoding thread are decoded ahead, and on a CPU 4 batches per core computed
        ahead. All items but paths are read at once, so the iterable may close a file or reuse an
        array before it yields the next item.

        Args:
            items: as for `predict`.

        Raises:
            UsageError, BadLogitsError: as `predict` does. An error of an item, or of the iterable
                itself, is raised after the predictions of the images before it.
        """
        self._check_usable()
        return self._stream(several(items))

    def _stream(self, items: Iterable[Any]) -> Iterator[Prediction]:
        self._check_usable()
        failed: list[Exception] = []
        waiting: deque[tuple[Batch, Future[Outputs]]] = deque()
        try:
            for batch in self._feed.batches(self._images(items, failed)):
                waiting.append((batch, self._device.submit(batch)))
                while waiting and (len(waiting) > self._ahead or waiting[0][1].done()):
                    yield from self._answers(*waiting.popleft())
            while waiting:
                yield from self._answers(*waiting.popleft())
        except (CancelledError, RuntimeError):
            self._check_usable()  # close() makes the threads refuse work
            raise
        finally:
            if os.getpid() == self._process:  # in a forked child a lock may be held for ever
                for _, future in waiting:
                    future.cancel()
        if failed:
            raise failed[0]

    def _answers(self, batch: Batch, future: Future[Outputs]) -> Iterator[Prediction]:
        for prediction in self._predictions(batch, future.result()):
            yield prediction
            self._check_usable()

    def _images(self, items: Iterable[Any], failed: list[Exception]) -> Iterator[PlannedImage]:
        """Yield items as planned images until they end or raise. An exception is kept in `failed`,
        so that the images before it get their predictions.
        """
        shard = Shard(0, 0, 0, 0, "", 0)
        try:
            for number, item in enumerate(items):
                yield PlannedImage(
                    number,
                    shard,
                    "",
                    b"item %d" % number,
                    -1,
                    fetcher(number, item, self._spec.card.recipe, self._limits),
                )
        except Exception as error:  # the caller's; `_stream` raises it again
            failed.append(error)

    def _check_usable(self) -> None:
        if os.getpid() != self._process:
            raise UsageError(
                f"the classifier was opened in process {self._process} and is used in process"
                f" {os.getpid()}. Its threads do not survive a fork: load it in the child."
            )
        if not self._is_open:
            raise UsageError("the classifier is closed. Load it again.")

    def _predictions(self, batch: Batch, outputs: Outputs) -> Iterator[Prediction]:
        card, save = self._spec.card, self._spec.save
        batch, top = top_k(batch, outputs, self._spec, self._top_k, self._min_probability)
        for row in batch.rows:
            if row.slot < 0:
                yield Prediction(row.status, row.error, None, None, None, (), row.width, row.height)
                continue
            count = top.counts[row.slot]
            pairs = zip(
                top.class_ids[row.slot, :count].tolist(),
                top.probabilities[row.slot, :count].tolist(),
                strict=True,
            )
            best = tuple(
                Answer(class_id, card.labels[class_id], probability)
                for class_id, probability in pairs
            )
            yield Prediction(
                row.status,
                None,
                best[0].class_id if best else None,
                best[0].label if best else None,
                best[0].probability if best else None,
                best,
                row.width,
                row.height,
                outputs.logits[row.slot] if Saved.LOGITS in save else None,
                outputs.embedding[row.slot] if outputs.embedding is not None else None,
            )
