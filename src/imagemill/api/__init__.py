"""The Python API: `run` processes a whole job, `load` opens a classifier.

Both use the decoding, preprocessing, sessions and ranking of the command line, so results are the
same, bit for bit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from imagemill.api.classifier import Answer, Classifier, Prediction
from imagemill.display import observer
from imagemill.errors import DeviceMemoryError, UsageError
from imagemill.job.open_job import OpenJob
from imagemill.models import bundle as bundles
from imagemill.pipeline.backends import depends_on_batch, devices, open_session
from imagemill.pipeline.session_checks import check_exactness, check_model
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Limits, Summary
from imagemill.runner import listing, thresholds
from imagemill.runner import run as runner
from imagemill.runner.freeze import session_of
from imagemill.runner.model import classes_kept, resolve_model, with_recipe
from imagemill.runner.settings import check_setting, check_settings, make_settings
from imagemill.scoring.record import Score
from imagemill.tuning import precisions

if TYPE_CHECKING:
    from imagemill.pipeline.backends.base import Session


__all__ = ["Answer", "Classifier", "Prediction", "load", "run", "score"]

PathLike: TypeAlias = "str | os.PathLike[str]"

_log = logging.getLogger(__name__)


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
        retry_failed: True computes failed images again. Statuses select shards with such failures.
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


def score(
    output: PathLike,
    truth: str,
    *,
    report: bool = True,
    moved: Mapping[str, str] | None = None,
) -> Score:
    """Compare the rows of a job with true labels.

    Args:
        output: the output folder or URL of a job, which may be running.
        truth: where the true labels are, as `--truth` on the command line: `folders`,
            `regex:PATTERN`, `@FILE.csv#path,label`, `column:NAME` or `cls`.
        report: False does not write an existing `report.html` again.
        moved: where sources were → where they are now; paths or URLs.

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
    if moved:
        job = listing.at_new_places(job, [(os.fspath(a), os.fspath(b)) for a, b in moved.items()])
    found = scoring.score(job, os.fspath(truth))
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
        limits: limits of one image. `max_seconds` is ignored: a thread cannot be stopped. Pillow's
            own limit holds, too: `PIL.Image.MAX_IMAGE_PIXELS` is a setting of your process.
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
    given = locals() | {"sources": os.curdir, "output": os.curdir}  # neither is used
    settings = make_settings(given)
    check_settings(settings)
    check_setting("devices", device)
    if limits is not None and not isinstance(limits, Limits):
        raise UsageError(f"limits: must be imagemill.Limits, not {type(limits).__name__}.")
    chosen = devices.resolve("cpu" if device is None else device)
    if len(chosen) != 1:
        raise UsageError(f"device {device} names {len(chosen)} devices; a classifier runs on one.")
    watcher = observer.Terminal() if progress else observer.Watcher()
    found = with_recipe(resolve_model(settings, watcher), settings)
    bundles.verify_hash(found)
    prepared = precisions.without_images(precision, found, chosen, watcher.notify)
    spec = session_of(settings, found, prepared, chosen)
    # Twice what sessions have in flight.
    ahead = 4 * len(chosen[0].cores) if chosen[0].kind == "cpu" else 8

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
