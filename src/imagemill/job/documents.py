"""The documents of a job folder: `job.json`, those in `appended/`, `manifest.json`, `summary.json`,
`retired.json` and `pace.json`.

They are checked when they are read. An error names the file and the key.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct

from imagemill.errors import OutputError
from imagemill.job.paths import JobPaths
from imagemill.job.store import Store
from imagemill.records import Filters, Job, Summary
from imagemill.system import files, interruptible, serialization

T = TypeVar("T")

FORMAT = 2
"""Of `job.json` and the documents of further generations."""


class Generation(Struct, frozen=True, kw_only=True):
    """What is known of the images that one command froze.

    Its document is written last, so if it exists, the generation's plan is complete.
    """

    format: int
    created: str
    filters: Filters
    limit: int | None
    shard_size: int
    images: int
    skipped_by_suffix: Mapping[str, int]
    """Skipped in the sources that this generation adds, like the counts below."""
    skipped_hidden: int
    skipped_by_filter: int
    skipped_broken_links: int
    decoder: str
    """Identity of the decoder, `DECODER` of the version that froze the images. A part of
    `answer_id`: another decoder gives other pixels.
    """
    versions: Mapping[str, str]
    vector_units: str
    """Of the processor that computes; empty if it is not known or decides nothing."""
    fixed: Mapping[str, str]
    """What also decides the last bits of answers, and must stay: batch size, device model and
    library versions. Empty on CPUs with OpenVINO or ONNX Runtime, where it decides nothing.
    """
    plan_nonce: str
    """Which plan in an object store belongs to this generation."""


class Frozen(Generation, frozen=True, kw_only=True):
    """`job.json`: the job as it was frozen, which is its first generation."""

    job: Job
    devices: str
    groups: int
    backend: str
    """The engines of its devices (`DeviceSpec.engine`), joined by `+`."""
    variant_sha256: str | None
    """Hash of the quantised variant; None if the job uses the model's own weights."""

    @property
    def answer_id(self) -> str:
        """Of its parts."""
        return self.job.answer_id

    @property
    def command(self) -> tuple[str, ...]:
        """The sources of the command that froze it."""
        return self.job.sources


class Appended(Generation, frozen=True, kw_only=True):
    """`appended/NNNNNN.json`: a further generation, the images that one `--append` added. It never
    changes.
    """

    command: tuple[str, ...]
    """The sources of the command that froze it."""
    sources: tuple[str, ...]
    """Those of them that the job did not have. Their positions follow those of earlier ones."""
    answer_id: str


class PartRecord(Struct, frozen=True):
    """What `manifest.json` says of one part."""

    rows: int
    failed_by_status: Mapping[str, int]
    sha256: str
    bytes: int


class Manifest(Struct, frozen=True):
    """`manifest.json`: what each part of a finished job holds. It can be rebuilt from the parts."""

    plan_id: str
    answer_id: str
    parts: Mapping[str, PartRecord]
    """By file name."""


class _Header(Struct, frozen=True):
    format: Any = None


def read_frozen(store: Store) -> Frozen | None:
    """Return the frozen job in a store; None if there is none.

    Raises:
        OutputError: it cannot be read, has another format, or a value has the wrong type.
    """
    data = _read(store, store.paths.job)
    return None if data is None else _decode(store, store.paths.job, data, Frozen)


def read_appended(store: Store) -> tuple[Appended, ...]:
    """Return the further generations of the job in a store, in order.

    Raises:
        OutputError: one is missing, cannot be read, has another format, or a value has the wrong
        type.
    """
    paths = store.paths
    known = [name for name in store.names(paths.appended) if re.fullmatch(r"\d+\.json", name)]

    def read(number: int) -> Appended:
        path = paths.appended_document(number)
        data = _read(store, path)
        if data is None:
            raise OutputError(
                f"{paths.shown(path)} is missing, although {paths.shown(paths.appended)} holds"
                f" {known[-1]}. Restore it from a copy, or give another --output."
            )
        return _decode(store, path, data, Appended)

    # A daily `--append` makes hundreds of documents.
    return tuple(interruptible.run_all(read, range(2, len(known) + 2)))


def _decode(store: Store, path: Path, data: bytes, kind: type[T]) -> T:
    shown, remedy = store.paths.shown(path), "Give another --output."
    header = serialization.decode(data, _Header, shown, OutputError, remedy)
    if header.format != FORMAT:
        raise OutputError(
            f"{shown} has format {header.format}, this version of imagemill reads format {FORMAT}."
            " Use the version that wrote it, or give another --output."
        )
    return serialization.decode(data, kind, shown, OutputError, remedy)


def read_summary(store: Store) -> Summary | None:
    """Return the summary of a finished job; None if there is none. Raises: OutputError if it cannot
    be read.
    """
    return _read_rebuildable(store, store.paths.summary, Summary)


def read_manifest(store: Store) -> Manifest | None:
    """Return the manifest of a finished job; None if there is none. Raises: OutputError if it
    cannot be read.
    """
    return _read_rebuildable(store, store.paths.manifest, Manifest)


def read_retired(store: Store) -> dict[str, str]:
    """Return the devices that the latest start has stopped using, with the reasons. Raises:
    OutputError if they cannot be read.
    """
    return _read_rebuildable(store, store.paths.retired, dict[str, str]) or {}


class RunningPace(Struct, frozen=True):
    """`pace.json`: how fast a running job is. Rates are images/s; None is not known yet."""

    images_per_second: float | None = None
    seconds_left: float | None = None
    devices: Mapping[str, float | None] = {}


def read_pace(paths: JobPaths) -> RunningPace:
    """Return how fast the running job is; nothing is known of a job on another machine."""
    try:
        data = paths.pace.read_bytes()
        return serialization.decode(data, RunningPace, str(paths.pace), OutputError)
    except (OSError, OutputError):
        return RunningPace()


def write_pace(paths: JobPaths, pace: RunningPace) -> None:
    """Replace `pace.json`. It is not synced, and a disk that is full does not end the job."""
    making = paths.pace.with_name(f".{paths.pace.name}.tmp")
    with contextlib.suppress(OSError):
        making.write_bytes(serialization.encode(pace))
        making.replace(paths.pace)


def _read_rebuildable(store: Store, path: Path, kind: type[T]) -> T | None:
    data = _read(store, path)
    if data is None:
        return None
    remedy = "Repeat the run to write it again."
    return serialization.decode(data, kind, store.paths.shown(path), OutputError, remedy)


def _read(store: Store, path: Path) -> bytes | None:
    try:
        return store.read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(
            f"{store.paths.shown(path)} cannot be read: {files.reason(error)}. Fix the cause and"
            " run the command again, or give another --output."
        ) from error
