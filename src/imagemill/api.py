"""The Python API: `run`, a whole job in one call, and `load`, a classifier at hand.

Both go the way of the command line: the same decoding, preprocessing, sessions and ranking, so answers are the same, bit for bit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from PIL import Image

from imagemill import batching, devices, freezing, quantizing, running, watching
from imagemill.errors import UsageError
from imagemill.images.feed import Feed
from imagemill.models import bundle as bundles
from imagemill.postprocess import check_model, top_k
from imagemill.records import BadPicture, Batch, Job, Limits, Outputs, Picture, Precision, Saved, Settings, Shard, Status, Summary
from imagemill.sessions import open_session
from imagemill.sources.files import read_file
from imagemill.stopwatch import Stopwatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imagemill.sessions.base import Session

__all__ = ["Answer", "Classifier", "Prediction", "load", "run"]

PathLike: TypeAlias = "str | os.PathLike[str]"
Item: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | NDArray[np.uint8] | Image.Image"
"""A picture: a path, encoded bytes, or pixels, uint8 (H, W, 3), RGB, or (H, W), grey."""

_PIXELS: Final = "Give uint8 (H, W, 3), RGB, or (H, W), grey"
_OWN: Final = ("sources", "output", "save", "include", "exclude", "retry_failed", "progress")
"""Arguments of `run` that are not passed on as they are."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One class of a picture's most probable ones."""

    class_id: int
    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What became of one picture: the columns of a job's row."""

    status: Status
    error: str | None
    """One line; None where status is ok."""
    class_id: int | None
    """Of the most probable class; None, as label and probability, where status is not ok."""
    label: str | None
    probability: float | None
    top_k: tuple[Answer, ...]
    """Most probable first, ties by class id; empty where status is not ok."""
    width: int | None
    """Of the picture as displayed; None where not known."""
    height: int | None
    logits: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """float32 (classes,), where `load(save=["logits"])` asks for it and status is ok."""
    embedding: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """float32 (features,), where `load(save=["embedding"])` asks for it and status is ok."""


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
    save: str | Sequence[str] | None = None,
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
    retry_failed: bool | str | Sequence[str] = False,
    max_bad_fraction: float | None = None,
    grace_s: float = 20.0,
    log_dir: PathLike | None = None,
    engine: str = "local",
    allow_mixed: bool = False,
    report: bool = True,
    preflight: bool = True,
    progress: bool = False,
) -> Summary:
    """Classify every picture of the sources, one row each; the same call again resumes what an earlier one began.

    Keywords mean what the flags of `imagemill run` of the same name mean; None leaves them unsaid. It may be called from any thread; in
    the main thread Ctrl-C ends the job in good order while it runs, and signal handlers are put back as they were.

    A call that resumes a job needs the same `include`, `exclude`, `all_files` and `limit` as the first call. Without them it would mean
    other images, and is refused.

    Args:
        sources: folders, pictures, lists, archives, … as on the command line, one or several.
        output: the output folder.
        retry_failed: True computes shards with failed pictures again; or the statuses that count as failed.
        progress: show on stderr what the command line shows.
        engine: `local`, or `ray` for the nodes of a Ray cluster: the one that is connected to already, else as docs/scaling.md says.

    Returns:
        what `summary.json` holds.

    Raises:
        ImagemillError: as its branches in `imagemill.errors` say.
    """
    given = {name: value for name, value in locals().items() if name not in _OWN}
    retried = () if retry_failed is True else _texts(retry_failed or None)
    settings = Settings(
        sources=_texts(sources) or (),
        output=os.fspath(output),
        save=_texts(save),
        include=_texts(include),
        exclude=_texts(exclude),
        retry_failed=retried,
        **{name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()},
    )
    return running.run(settings, watching.Terminal() if progress else None)


def _texts(value: PathLike | Sequence[PathLike] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return (os.fspath(value),) if isinstance(value, str | os.PathLike) else tuple(os.fspath(item) for item in value)


def load(
    model: PathLike | None = None,
    device: str = "cpu",
    *,
    precision: str = "auto",
    models_dir: PathLike | None = None,
    labels: PathLike | None = None,
    top_k: int = 5,
    save: str | Sequence[str] = (),
    batch_size: int | None = None,
    num_workers: int | None = None,
    background: str | None = None,
    limits: Limits | None = None,
    progress: bool = False,
) -> Classifier:
    """Open a classifier in this process. Close it, or use it in a `with` statement.

    Args:
        model: name, bundle folder, or ONNX file with its card; None: the command line's default. What lacks is fetched.
        device: one device, as `--devices` spells it: `cpu`, …
        precision: `fp32`, `bf16`, `int8`, or `auto`, which takes a faster one than fp32 where the model's card holds an accepted verdict
            on it. Nothing is measured or quantised here; `imagemill quantize` does that.
        models_dir: None: `$IMAGEMILL_MODELS`, else the user's cache folder.
        labels: a file with one label a line, instead of the model's own.
        top_k: classes kept per picture.
        save: `logits`, `embedding`: also keep these.
        batch_size: pictures per batch, which changes no answer; None: as the command line.
        num_workers: decoding threads; None: one a core.
        background: blend transparent images onto this colour (`white`, `#rrggbb`, …); None: drop alpha, as published pipelines do.
        limits: budgets of one picture; its `max_seconds` is not kept here, where nothing can be ended.
        progress: show on stderr how far a download is, and what is said on the way.

    Raises:
        UsageError: an argument that makes no sense. ModelError, DeviceError: the model or the device cannot be had. BadLogitsError: the
        model returns NaN or infinity for every image.
    """
    settings = Settings(
        sources=(os.curdir,),  # none is read
        output="",
        model=None if model is None else os.fspath(model),
        models_dir=None if models_dir is None else os.fspath(models_dir),
        precision=precision,
        batch_size=batch_size,
        num_workers=num_workers,
        top_k=top_k,
        save=_texts(save),
        labels=None if labels is None else os.fspath(labels),
        background=background,
    )
    freezing.check(settings)
    chosen = devices.resolve(device)
    if len(chosen) != 1:
        raise UsageError(f"device {device} names {len(chosen)} devices; a classifier runs on one.")
    watcher = watching.Terminal() if progress else watching.Watcher()
    found = freezing.with_recipe(freezing.resolve_model(settings, watcher), settings)
    bundles.verify_hash(found)
    if precision == Precision.INT8 and quantizing.usable(found, Precision.INT8) is None:
        raise UsageError(
            f"precision int8: {found.card.name} has no int8 variant for this machine. Make it: "
            f"`imagemill quantize {settings.model or freezing.DEFAULT_MODEL} --images SOURCE`."
        )
    prepared = quantizing.prepare(precision, found, (), tuple, 0, chosen=chosen, say=watcher.say)
    job = Job(
        output="",
        sources=(),
        model_file=str(prepared.model_file.absolute()),
        card=found.card,
        precision=prepared.precision,
        variant=prepared.variant,
        batch_size=batch_size or 0,
        batches_per_step=0,
        num_workers=num_workers or len(chosen[0].cores),
        top_k=top_k,
        save=tuple(Saved(item) for item in settings.save or ()),
        limits=limits or Limits(),
        plan_id="",
        answer_id="",
        cache_dir=str(found.dir.absolute() / "compiled"),
    )
    job = batching.resolved(job, chosen)
    return Classifier(job, lambda: open_session(job, chosen[0], Stopwatch()))


class Classifier:
    """An open model; made by `load`. Several threads may call `predict`: they take turns, each call using all of the device.

    A picture that crashes its decoder takes this process with it, which `run` would survive.
    """

    def __init__(self, job: Job, opener: Callable[[], Session]) -> None:
        self._job = job
        self._opener = opener
        self._lock = threading.Lock()
        self._session: Session | None = opener()
        try:
            check_model(self._session.stream, job)
        except BaseException:
            self._session.close()
            raise
        self._feed = Feed(job.card, job.limits, job.batch_size, job.num_workers, None, Stopwatch())
        self._is_open = True

    @property
    def name(self) -> str:
        """The model's name."""
        return self._job.card.name

    @property
    def labels(self) -> tuple[str, ...]:
        """One per class, in the order of the logits."""
        return self._job.card.labels

    @property
    def precision(self) -> str:
        """What it computes in: `fp32`, `bf16` or `int8`."""
        return self._job.precision.value

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the device and the decoding threads. A second time it does nothing."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                self._feed.__exit__(None, None, None)
                if self._session is not None:
                    self._session.close()
                self._session = None

    def predict(self, items: Item | Iterable[Item]) -> list[Prediction]:
        """Classify pictures.

        Args:
            items: one picture or many: paths, encoded bytes, or pixels, uint8 (H, W, 3), RGB, or (H, W), grey.

        Returns:
            a prediction per picture, in order, whatever is wrong with it: that is its status, not an error.

        Raises:
            UsageError: an array that cannot be pixels, something that is no picture at all, or the classifier is closed.
            BadLogitsError: the model returned an array of the wrong shape.
        """
        single = isinstance(items, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)
        single = single or (isinstance(items, np.ndarray) and items.ndim != 4)
        single = single or not isinstance(items, Iterable)  # it is none at all, which will be said
        every: list[Any] = [items] if single else list(items)  # type: ignore[arg-type]
        shard = Shard(0, 0, len(every), 0, "", 0)
        fetchers = [self._fetcher(number, item) for number, item in enumerate(every)]  # all are looked at before any is computed
        pictures = (Picture(number, shard, "", b"", -1, fetch) for number, fetch in enumerate(fetchers))
        with self._lock:
            if not self._is_open:
                raise UsageError("the classifier is closed. Load it again.")
            answers = self._answers(pictures)
        predictions: list[Prediction] = []
        for batch, outputs in answers:
            predictions += self._predictions(batch, outputs)
        return predictions

    def _answers(self, pictures: Iterator[Picture]) -> list[tuple[Batch, Outputs]]:
        """Let all pictures through the session, to the last, so that nothing of this call stays in it."""
        session = self._session or self._opener()
        self._session = None  # one that is interrupted is not used again
        answers = [(replace(batch, pixels=batch.pixels[:0]), outputs) for batch, outputs in session.stream(self._feed.batches(pictures))]
        self._session = session
        return answers

    def _predictions(self, batch: Batch, outputs: Outputs) -> Iterator[Prediction]:
        card, save = self._job.card, self._job.save
        batch, top = top_k(batch, outputs, card, self._job.top_k, self._job.precision)
        for row in batch.rows:
            if row.slot < 0:
                yield Prediction(row.status, row.error, None, None, None, (), row.width, row.height)
                continue
            pairs = zip(top.class_ids[row.slot].tolist(), top.probabilities[row.slot].tolist(), strict=True)
            best = tuple(Answer(class_id, card.labels[class_id], probability) for class_id, probability in pairs)
            yield Prediction(
                row.status,
                None,
                best[0].class_id,
                best[0].label,
                best[0].probability,
                best,
                row.width,
                row.height,
                outputs.logits[row.slot] if Saved.LOGITS in save else None,
                outputs.embedding[row.slot] if outputs.embedding is not None else None,
            )

    def _fetcher(self, number: int, item: Any) -> Callable[[], bytes]:
        """What gives a picture's encoded bytes. Pixels go as PPM, so that they are prepared as every picture is."""
        if isinstance(item, str | os.PathLike):
            return partial(_read, os.fsencode(item), self._job.limits.max_bytes)
        if isinstance(item, bytes | bytearray | memoryview):
            return partial(bytes, item)
        if isinstance(item, Image.Image):
            item = np.asarray(item.convert("RGB"))
        if not isinstance(item, np.ndarray):
            raise UsageError(f"item {number} is of type {type(item).__name__}. Give a path, encoded bytes, or pixels.")
        colour = item.ndim == 3 and item.shape[2] == 3
        if item.dtype != np.uint8 or not (colour or item.ndim == 2) or 0 in item.shape:
            raise UsageError(f"item {number} is an array of {item.dtype} {item.shape}. {_PIXELS}.")
        return partial(_ppm, item)


def _read(path: bytes, max_bytes: int) -> bytes:
    try:
        return read_file(path, max_bytes)
    except BadPicture as bad:
        if bad.status is Status.MISSING:
            raise BadPicture(Status.MISSING, "there is no such file") from bad
        raise
    except ValueError as error:
        raise BadPicture(Status.MISSING, "there can be no such file: its name holds a null character") from error


def _ppm(pixels: NDArray[np.uint8]) -> bytes:
    height, width = pixels.shape[:2]
    return b"P%d %d %d 255\n" % (6 if pixels.ndim == 3 else 5, width, height) + pixels.tobytes()
