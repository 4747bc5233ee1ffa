"""The Python API: `run` processes a whole job, `load` opens a classifier.

Both use the decoding, preprocessing, sessions and ranking of the command line, so results are the
same, bit for bit.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from PIL import Image

from imagemill.display import observer
from imagemill.errors import DeviceMemoryError, UsageError
from imagemill.job.open_job import OpenJob
from imagemill.models import bundle as bundles
from imagemill.pipeline.backends import depends_on_batch, devices, open_session
from imagemill.pipeline.decoding import pillow, preprocess
from imagemill.pipeline.decoding.jpeg import ORIENTATION
from imagemill.pipeline.decoding.refusals import Refusal, check_budget, judge, one_line
from imagemill.pipeline.exactness import check_exactness
from imagemill.pipeline.feed import Feed
from imagemill.pipeline.sources.files import read_file
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.pipeline.top_k import check_model, top_k
from imagemill.records import (
    BadImage,
    Batch,
    Limits,
    Outputs,
    PlannedImage,
    Precision,
    Recipe,
    Saved,
    SessionSpec,
    Shard,
    Status,
    Summary,
    html_table,
)
from imagemill.runner import run as runner
from imagemill.runner import thresholds
from imagemill.runner.model import (
    classes_kept,
    resolve_model,
    saved_outputs,
    with_recipe,
)
from imagemill.runner.settings import (
    DEFAULT_MODEL,
    check_setting,
    check_settings,
    make_settings,
)
from imagemill.scoring.record import Score
from imagemill.tuning import precisions
from imagemill.tuning.batch_size import resolved

if TYPE_CHECKING:
    from typing import Protocol

    from numpy.typing import NDArray

    from imagemill.pipeline.backends.base import Session

    class BinaryFile(Protocol):
        """Any object whose `read` returns bytes."""

        def read(self, size: int, /) -> bytes | bytearray | memoryview | None:
            """Return up to `size` bytes, none at the end."""
            ...


__all__ = ["Answer", "Classifier", "Prediction", "load", "run", "score"]

PathLike: TypeAlias = "str | os.PathLike[str]"
Item: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryFile | NDArray[np.uint8] |"
    " Image.Image"
)
"""An image: a path, encoded bytes, a binary file, a Pillow image, or pixels, uint8 (H, W, 3), RGB,
or (H, W), grey.
"""

_log = logging.getLogger(__name__)
_PIXELS: Final = "Give uint8 (H, W, 3), RGB, or (H, W), grey, or a Pillow image"
_BAD: Final = "imagemill_bad"
"""Attribute that marks a Pillow image as undecodable: its next `load` may silently succeed with
wrong pixels.
"""
_CHUNK: Final = 2**20
"""Bytes per read of a binary file: some files allocate a buffer of the requested size even if they
are short.
"""


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


def run(
    sources: PathLike | Sequence[PathLike],
    output: PathLike,
    *,
    model: PathLike | None = None,
    models_dir: PathLike | None = None,
    devices: str | None = None,
    precision: str | None = None,
    batch_size: int | None = None,
    batches_per_step: int | None = None,
    num_workers: int | None = None,
    top_k: int | None = None,
    min_probability: float | PathLike | None = None,
    save: str | Sequence[str] | None = None,
    keep: str | Sequence[str] | Mapping[str, str] | None = None,
    shard_size: int | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    all_files: bool | None = None,
    limit: int | None = None,
    preprocess: str | None = None,
    background: str | None = None,
    labels: PathLike | None = None,
    max_pixels: int | None = None,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
    append: bool = False,
    retry_failed: bool | str | Sequence[str] = False,
    max_bad_fraction: float | None = None,
    grace_s: float = 20.0,
    log_dir: PathLike | None = None,
    engine: str = "local",
    allow_mixed: bool = False,
    allow_inexact: bool = False,
    report: bool = True,
    preflight: bool = True,
    moved: Mapping[str, PathLike] | None = None,
    user_agent: str | None = None,
    progress: bool = False,
) -> Summary:
    """Classify every image of the sources and write one row for each.

    The same call again resumes an interrupted job. It needs the same `include`, `exclude`,
    `all_files` and `limit` as the first call: without them it would select other images.

    Keywords have the meaning of the `imagemill run` options with the same name. None means that an
    option is not given. You can call it from any thread. In the main thread, Ctrl-C ends the job
    cleanly, and your signal handlers are restored afterwards.

    Args:
        sources: one or several folders, images, lists, archives, … as on the command line.
        output: the output folder.
        keep: columns of the sources that the rows have, too, as `--keep`; or a mapping of columns
            to their names in the rows.
        append: add images that are new in the sources, and in sources that the job does not have
            yet, to the job. Without a job, start one.
        retry_failed: True computes all shards with failed images again. Statuses select failures.
        grace_s: seconds to finish shards in progress when stopped, as `--grace`.
        report: False writes no report, as `--no-report`.
        preflight: False tries no sample of the images, as `--no-preflight`.
        moved: old place of a source → its place now, as `--moved OLD=NEW`.
        engine: `local`, or `ray` for a Ray cluster: the connected one, else see docs/scaling.md.
        progress: show on stderr what the command line shows.

    Returns:
        The content of `summary.json`.

    Raises:
        ImagemillError: with the subclasses in `imagemill.errors`.

    Example:
        >>> imagemill.run("photos", "out", model="efficientnet_lite0").ok
    """
    given = locals() | {"retry_failed": () if retry_failed is True else retry_failed or None}
    return runner.run(make_settings(given), observer.Terminal() if progress else None)


def score(output: PathLike, truth: str, *, report: bool = True) -> Score:
    """Compare the rows of a job with true labels.

    Args:
        output: the output folder or URL of a job, which may be running.
        truth: where the true labels are, as `--truth` on the command line: `folders`,
            `regex:PATTERN`, `@FILE.csv#path,label`, `column:NAME` or `cls`.
        report: False does not write an existing `report.html` again.

    Returns:
        The content of `score.json`, which is written, too. `notes` has messages about the truth,
        such as unknown labels.

    Raises:
        UsageError: the truth has no valid form, or no image has a true label that the model knows.
        SourceError: a table or archive with labels cannot be read.
        OutputError: the output is not a job, has no rows yet, or a part is damaged.

    Example:
        >>> imagemill.score("out", "folders").top1.value
    """
    from imagemill import report as reports
    from imagemill.scoring import score as scoring

    job = OpenJob.open(output)
    found = scoring.score(job, truth)
    reports.add_score(job, found, _log.info, rewrite=report)
    return found


def load(
    model: PathLike | None = None,
    device: str = "cpu",
    *,
    precision: str = "auto",
    models_dir: PathLike | None = None,
    labels: PathLike | None = None,
    top_k: int | None = None,
    min_probability: float | PathLike | None = None,
    save: str | Sequence[str] = (),
    batch_size: int | None = None,
    num_workers: int | None = None,
    background: str | None = None,
    limits: Limits | None = None,
    allow_inexact: bool = False,
    progress: bool = False,
) -> Classifier:
    """Open a classifier in this process. Close it, or use it in a `with` statement.

    Args:
        model: name, folder, or ONNX file with its card; default: as the command line. A
            missing model is downloaded.
        device: one device, as in `--devices`: `cpu`, …
        precision: `fp32`, `bf16`, `fp16`, `int8`, or `auto`. `auto` uses a faster precision than
            fp32 if an accuracy check of this model has accepted it. `imagemill quantize` makes the
            check for CPUs, `imagemill run` for GPUs.
        models_dir: default: `$IMAGEMILL_MODELS`, else the user's cache folder.
        labels: file with one label per line; default: the model's own labels.
        top_k: classes kept per image; default: 5.
        min_probability: keep only classes at least this probable, up to `top_k`: a number from 0 to
            1, or a CSV file with the columns label and threshold; default: keep all.
        save: also keep `logits` or `embedding`. Of a model without classes, the embedding is kept.
        batch_size: images per batch; does not affect results on CPUs.
        num_workers: decoding threads; default: one per core.
        background: blend transparent images onto this colour (`white`, `#rrggbb`, …); default: drop
            alpha, as published pipelines do.
        limits: limits of one image. `max_seconds` is ignored: a thread cannot be stopped.
        allow_inexact: accept a device whose results depend on an image's place in a batch. All
            devices are checked but CPUs with OpenVINO or ONNX Runtime.
        progress: show downloads and messages on stderr.

    Raises:
        UsageError: an argument is wrong.
        ModelError, DeviceError: the model or the device is not available.
        DeviceMemoryError: the device has too little free memory. InexactError: results depend on
            an image's place in a batch.
        BadLogitsError: the model returns NaN or infinity for every image.

    Example:
        >>> with imagemill.load("efficientnet_lite0") as classifier:
        ...     classifier.predict("photo.jpg")[0].label
    """
    given = locals() | {"sources": os.curdir, "output": ""}  # neither is used
    settings = make_settings(given)
    check_settings(settings)
    check_setting("devices", device)
    chosen = devices.resolve(device)
    if len(chosen) != 1:
        raise UsageError(f"device {device} names {len(chosen)} devices; a classifier runs on one.")
    watcher = observer.Terminal() if progress else observer.Watcher()
    found = with_recipe(resolve_model(settings, watcher), settings)
    bundles.verify_hash(found)
    if precision == Precision.INT8:
        precisions.refuse_int8(found.card)
    if precision == Precision.INT8 and precisions.usable(found, Precision.INT8) is None:
        raise UsageError(
            f"precision int8: {found.card.name} has no int8 variant for this machine. Make it: "
            f"`imagemill quantize {settings.model or DEFAULT_MODEL} --images SOURCE`."
        )
    prepared = precisions.prepare(
        precision, found, (), tuple, 0, chosen=chosen, notify=watcher.notify
    )
    spec = SessionSpec(
        model_file=str(prepared.model_file.absolute()),
        card=found.card,
        precision=prepared.precision,
        batch_size=batch_size or 0,
        save=saved_outputs(settings, found.card),
        cache_dir=str(found.dir.absolute() / "compiled"),
    )
    spec = resolved(spec, chosen)
    ahead = (
        4 * len(chosen[0].cores) if chosen[0].kind == "cpu" else 8
    )  # twice what sessions have in flight

    def opener() -> Session:
        device = chosen[0]
        try:
            session = open_session(spec, device, Stopwatch())
        except DeviceMemoryError as error:
            raise DeviceMemoryError(
                f"{error} Free memory, or use a smaller batch size: batch_size="
                f"{max(1, spec.batch_size // 2)}."
            ) from error
        try:
            check_model(session.stream, spec)
            if depends_on_batch(device.engine):
                check_exactness(session.stream, spec, device.name, allow_inexact=allow_inexact)
        except BaseException:
            session.close()
            raise
        return session

    return Classifier(
        spec,
        opener,
        ahead,
        classes_kept(settings, found.card),
        thresholds.min_probability_of(settings, found.card),
        num_workers or len(chosen[0].cores),
        limits or Limits(),
    )


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
        self._device = _Device(opener)
        limits = replace(
            limits, max_bytes=2**62
        )  # checked here, for encoded images only: pixels have no encoded size
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
        """The precision in use: `fp32`, `bf16` or `int8`."""
        return self._spec.precision.value

    def __enter__(self) -> Classifier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        items = _several(items)
        if isinstance(items, list | tuple):
            for number, item in enumerate(items):
                _check_type(number, item)
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
        return self._stream(_several(items))

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
            for _, future in (
                waiting if os.getpid() == self._process else ()
            ):  # in a forked child its lock may be held for ever
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
                    number, shard, "", b"item %d" % number, -1, self._fetcher(number, item)
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

    def _fetcher(self, number: int, item: Any) -> Callable[[], bytes]:
        """Return a function that returns the encoded bytes of an item. Raises: UsageError."""
        if isinstance(item, str | os.PathLike):
            return partial(_read_path, os.fspath(item), self._limits.max_bytes)
        _check_type(number, item)
        try:
            return partial(bytes, self._encoded(number, item))
        except BadImage as bad:
            return partial(_refuse, bad.status, bad.error, bad.width, bad.height)

    def _encoded(self, number: int, item: Any) -> bytes:
        """Return the encoded bytes of an item that is not a path. Pixels become PPM, so that they
        are prepared like every image. Raises: BadImage, UsageError.
        """
        limits, recipe = self._limits, self._spec.card.recipe
        if isinstance(item, bytes | bytearray | memoryview):
            return _read_buffer(item, limits.max_bytes)
        if isinstance(item, Image.Image):
            return _read_image(item, recipe, limits)
        if isinstance(item, np.ndarray):
            height, width = item.shape[:2]
            _check_size(width, height, limits)
            return _ppm(np.asarray(item))  # of a masked array, the values under its mask
        return _read_binary(number, item, limits.max_bytes)


_Work: TypeAlias = "SimpleQueue[tuple[Batch, Future[Outputs]] | None]"


class _Device:
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
    if (
        thread is not threading.current_thread()
    ):  # which may be the one that drops the last reference to a device
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


def _several(items: Any) -> Iterable[Any]:
    """Return items, a single one in a list. Files, arrays and strings are iterable, but single
    items.
    """
    single = isinstance(items, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)
    single = single or callable(getattr(items, "read", None))
    single = single or (isinstance(items, np.ndarray) and items.ndim != 4)
    return [items] if single or not isinstance(items, Iterable) else items


def _check_type(number: int, item: Any) -> None:
    """Raise UsageError if an item cannot be an image."""
    if isinstance(item, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        return
    if isinstance(item, np.ndarray):
        colour = item.ndim == 3 and item.shape[2] == 3
        if item.dtype != np.uint8 or not (colour or item.ndim == 2):
            raise UsageError(f"item {number} is an array of {item.dtype} {item.shape}. {_PIXELS}.")
    elif isinstance(item, io.TextIOBase):
        raise UsageError(f'item {number} is a file opened in text mode. Open it with mode "rb".')
    elif not callable(getattr(item, "read", None)):
        raise UsageError(
            f"item {number} is of type {type(item).__name__}. Give a path, encoded bytes, a binary"
            " file, or pixels."
        )


def _refuse(status: Status, error: str, width: int | None, height: int | None) -> bytes:
    raise BadImage(status, error, width, height)


def _read_path(path: str | bytes, max_bytes: int) -> bytes:
    try:
        return _read_buffer(read_file(os.fsencode(path), max_bytes), max_bytes)
    except BadImage as bad:
        if bad.status is Status.MISSING:
            raise BadImage(Status.MISSING, "there is no such file") from bad
        raise
    except UnicodeEncodeError as error:
        raise BadImage(
            Status.MISSING, "there can be no such file: its name cannot be encoded"
        ) from error
    except ValueError as error:
        raise BadImage(
            Status.MISSING, "there can be no such file: its name holds a null character"
        ) from error


def _read_buffer(data: bytes | bytearray | memoryview, max_bytes: int) -> bytes:
    try:
        size = memoryview(data).nbytes
        if size > max_bytes:
            raise BadImage(Status.TOO_LARGE, f"has {size} bytes, more than --max-bytes {max_bytes}")
        return bytes(data)
    except ValueError as error:
        raise BadImage(
            Status.READ_ERROR, f"cannot be read: {one_line(error)}"
        ) from error  # a memoryview that was released


def _read_binary(number: int, file: BinaryFile, max_bytes: int) -> bytes:
    """Read a file from its position to its end, but at most one byte more than allowed."""
    chunks: list[bytes] = []
    left = max_bytes + 1
    while left > 0:
        try:
            chunk = file.read(min(left, _CHUNK))
        except Exception as error:  # a file of any make may raise anything
            raise BadImage(
                Status.READ_ERROR,
                f"cannot be read: {getattr(error, 'strerror', None) or one_line(error)}",
            ) from error
        if chunk is None:
            raise BadImage(
                Status.READ_ERROR, "cannot be read: it is in non-blocking mode and has no data yet"
            )
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise UsageError(
                f"item {number} is a file whose read() returned {type(chunk).__name__}, not bytes."
                " Open it in binary mode."
            )
        if not chunk:
            return b"".join(chunks)
        chunks.append(bytes(chunk))
        left -= len(chunks[-1])
    raise BadImage(Status.TOO_LARGE, f"has more than --max-bytes {max_bytes} bytes")


def _read_image(image: Image.Image, recipe: Recipe, limits: Limits) -> bytes:
    """Encode what a Pillow image displays. Raises: BadImage."""
    _check_size(*image.size, limits)
    bad: tuple[Status, str] | None = vars(image).get(_BAD)
    if bad is None:
        try:
            pillow.prepare()
            image.load()
            orientation = _orientation(image) if recipe.exif else 1
            return _encode_image(
                image.transpose(preprocess.TURNS[orientation]) if orientation > 1 else image,
                keep_alpha=recipe.background is not None,
            )
        except MemoryError:
            bad = (Status.TOO_LARGE, "not enough memory to decode it")
        except Exception as error:  # plugins raise anything at all on damaged files
            if "closed" in str(error) or getattr(error, "strerror", None):
                bad = (
                    Status.READ_ERROR,
                    f"cannot be read: {getattr(error, 'strerror', None) or one_line(error)}",
                )
            else:
                bad = vars(image)[_BAD] = (judge(error, b""), one_line(error))
    orientation = (
        1 if image.format == "TIFF" or not recipe.exif else _orientation(image)
    )  # Pillow has turned a TIFF's size already
    raise BadImage(*bad, *preprocess.turned_size(*image.size, orientation))


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # broken EXIF is no reason to refuse an image
        return 1
    return found if isinstance(found, int) and found in preprocess.TURNS else 1


def _encode_image(image: Image.Image, *, keep_alpha: bool) -> bytes:
    """Encode a loaded image so that decoding it gives what a PNG of it gives. PNG has no 32-bit
    numbers, so these become a TIFF. Without `keep_alpha` transparency is dropped, as decoding would
    do, and the image need not be compressed.
    """
    if image.mode in {"I", "F"}:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(image)).save(buffer, "TIFF")
        return buffer.getvalue()
    if image.mode.startswith("I;16"):
        return _ppm((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in {"La", "RGBa"}:
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if keep_alpha and image.has_transparency_data:
        buffer = io.BytesIO()
        shown = image.convert("RGBA") if image.mode == "PA" else image  # PNG has no such mode
        shown.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    return _ppm(np.asarray(image.convert("L" if image.mode in {"1", "L"} else "RGB")))


def _check_size(width: int, height: int, limits: Limits) -> None:
    if not width or not height:
        raise BadImage(Status.EMPTY, f"it has no pixels: {width}×{height}", width, height)
    try:
        check_budget(width, height, limits)
    except Refusal as refusal:
        raise BadImage(refusal.status, refusal.error, width, height) from refusal


def _ppm(pixels: NDArray[np.uint8]) -> bytes:
    height, width = pixels.shape[:2]
    return b"P%d %d %d 255\n" % (6 if pixels.ndim == 3 else 5, width, height) + pixels.tobytes()
