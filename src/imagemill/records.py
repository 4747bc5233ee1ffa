"""The frozen records that cross borders between stages, in the order the data travels.

    Settings ─► Job ─► Lease(Shard) ─► PlannedImage ─► Decoded ─► Batch ─► Outputs ─► TopK
             ─► Receipt ─► Summary

A stage knows only the record that it receives and the one that it hands on. Nothing heavier than
NumPy is imported here, and NumPy only for typing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Status(StrEnum):
    """What became of one image; every value but OK comes with a one-line error."""

    OK = "ok"
    MISSING = "missing"
    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    UNSUPPORTED = "unsupported"
    TOO_LARGE = "too_large"
    TIMEOUT = "timeout"
    CRASHED_DECODER = "crashed_decoder"
    READ_ERROR = "read_error"
    INVALID_OUTPUT = "invalid_output"


class Precision(StrEnum):
    """The arithmetic of a session."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


class Engine(StrEnum):
    """What places a job's workers and keeps them alive."""

    LOCAL = "local"
    RAY = "ray"


class IsolationReason(StrEnum):
    """Why an image is quarantined, hence decoded in a process of its own."""

    CRASH = "crash"
    """Its decoder was running when a worker died."""
    TIMEOUT = "timeout"
    """Its worker was killed because the image took longer than `--max-seconds`."""
    HUNG_READ = "hung_read"
    """It took too long again in quarantine, so reading it hangs: it is not touched again."""


class Interpolation(StrEnum):
    """The resampling filter of a recipe, antialiased as Pillow does it (`nearest` alone is not)."""

    NEAREST = "nearest"
    BOX = "box"
    BILINEAR = "bilinear"
    HAMMING = "hamming"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class Centre(StrEnum):
    """How the centre is found when the number of pixels to remove or to add is odd."""

    TORCHVISION = "torchvision"
    """A crop begins at `int(round((side - size) / 2.0))`; the odd pixel of a border is at the
    end.
    """
    TRANSFORMERS = "transformers"
    """A crop begins at `(side - size) // 2`; the odd pixel of a border is at the beginning."""


class Scores(StrEnum):
    """What the numbers that a model returns are."""

    LOGITS = "logits"
    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class Saved(StrEnum):
    """Extra columns a job may keep."""

    LOGITS = "logits"
    EMBEDDING = "embedding"


class KeptType(StrEnum):
    """The type of a column of `--keep`, as Arrow calls it."""

    TEXT = "string"
    WHOLE = "int64"
    FLOAT = "double"
    BOOLEAN = "bool"


class Kept(Struct, frozen=True):
    """A column of the sources that goes along into `predictions/`."""

    column: str
    """As the sources name it."""
    name: str
    """As `predictions/` names it."""
    type: KeptType = KeptType.TEXT

    def __str__(self) -> str:
        return self.column if self.column == self.name else f"{self.column}={self.name}"


class Recipe(Struct, frozen=True, forbid_unknown_fields=True):
    """How an image becomes the model's input; normalisation is not here, it is the graph's first
    layer. What another version may have written here changes pixels, so it is not ignored.
    """

    height: int = 224
    """Of the model's input, pixels."""
    width: int = 224
    """Of the model's input, pixels."""
    resize: int | tuple[int, int] | None = 256
    """Length of the short side after resizing, pixels; or width and height of a box that the image
    is resized to; None: it is not resized. Then the centre is cut out, and what is smaller than the
    input gets a border.
    """
    pad: bool = False
    """With a box: the image keeps its ratio and is fitted inside the box, instead of being squashed
    to it.
    """
    fill: str = "#000000"
    """Colour of the border, as `#rrggbb`."""
    centre: Centre = Centre.TORCHVISION
    """Which pixels are the centre."""
    interpolation: Interpolation = Interpolation.BILINEAR
    exif: bool = True
    """Whether images are turned as their EXIF orientation says."""
    background: str | None = None
    """Colour that transparent images are blended onto, as `#rrggbb`; None: alpha is dropped."""


class Card(Struct, frozen=True):
    """What a bundle knows about its model (`card.json`)."""

    name: str
    architecture: str
    labels: tuple[str, ...]
    """One per class, in the order of the logits; empty for a network without a head."""
    recipe: Recipe
    mean: tuple[float, float, float]
    """RGB mean that the graph subtracts, on the scale 0 to 255."""
    std: tuple[float, float, float]
    """RGB deviation that the graph divides by, on the scale 0 to 255."""
    sha256: str
    """Of `model.onnx`."""
    licence: str
    origin: Mapping[str, str | int | bool | None]
    """Where the weights come from: `source` (`file`, `url`, `package`, `random`), its `sha256`,
    `verified`, …
    """
    parameters: int = 0
    """How many trained numbers the published model has."""
    scores: Scores = Scores.LOGITS
    input: str = "pixels"
    """Name of the graph's input: uint8 (n, height, width, 3), RGB."""
    normalised: str | None = None
    """Name of the tensor where normalisation ends: float32 (n, 3, height, width), or (n, height,
    width, 3) where the model wants it so.
    """
    outputs: tuple[str, ...] = ("logits", "embedding")
    """A network without a head has only `embedding`."""
    top1: float | None = None
    """Published top-1 accuracy on ImageNet, per cent."""

    @property
    def has_head(self) -> bool:
        """Whether the model has classes. Without a head, its result is the embedding."""
        return "logits" in self.outputs


class Limits(Struct, frozen=True):
    """Budgets of one image; beyond them it is a `too_large` or `timeout` row."""

    max_pixels: int = 180_000_000
    """Width times height as the header says, before decoding."""
    max_bytes: int = 256 * 2**20
    """Size of the encoded image."""
    max_seconds: float = 60.0
    """Reading and decoding, wall clock."""


class Access(Struct, frozen=True):
    """How the sources of a job are read now. It changes no answer and is not part of the frozen
    job.
    """

    moved: tuple[tuple[str, str], ...] = ()
    """Where sources were and where they are now: absolute paths or URLs, without a slash at the
    end.
    """
    user_agent: str | None = None
    """Of requests by HTTP; None: imagemill's own."""

    def at(self, location: bytes) -> bytes:
        """Return the path or URL where a location is read now. The longest match counts."""
        for old, new in sorted(self.moved, key=lambda pair: -len(pair[0])):
            if is_below(location, old):
                return os.fsencode(new) + location[len(os.fsencode(old)) :]
        return location


AS_GIVEN = Access()
"""Sources are where their names say."""


def is_below(location: bytes, place: str) -> bool:
    """Return whether a path or URL is `place`, or lies below it."""
    return location.startswith(os.fsencode(place)) and location[len(os.fsencode(place)) :][:1] in (
        b"",
        b"/",
    )


class Settings(Struct, frozen=True):
    """What the user asked for; None means unsaid, so that a resumed job keeps what was frozen.

    `include`, `exclude`, `all_files` and `limit` select images also by their absence, so for them
    None is a value: no such selection.
    """

    sources: tuple[str, ...]
    """As they were given; `check_settings` turns them into what is frozen."""
    output: str
    model: str | None = None
    models_dir: str | None = None
    devices: str | None = None
    precision: str | None = None
    batch_size: int | None = None
    batches_per_step: int | None = None
    num_workers: int | None = None
    top_k: int | None = None
    min_probability: float | str | None = None
    """A probability, or the path of a file with one per label."""
    save: tuple[str, ...] | None = None
    keep: tuple[str | tuple[str, str], ...] | None = None
    """Columns of the sources, as `resolve_kept` takes them."""
    shard_size: int | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    all_files: bool | None = None
    limit: int | None = None
    preprocess: str | None = None
    background: str | None = None
    labels: str | None = None
    max_pixels: int | None = None
    max_bytes: int | None = None
    max_seconds: float | None = None
    append: bool = False
    """Whether images that an existing job does not have are added to it."""
    dry_run: bool = False
    retry_failed: tuple[str, ...] | None = None
    max_bad_fraction: float | None = None
    grace_s: float = 20.0
    log_dir: str | None = None
    engine: str = "local"
    allow_mixed: bool = False
    allow_inexact: bool = False
    report: bool = True
    """Whether `report.html` is written at the end."""
    preflight: bool = True
    """Whether a sample of a new job's images is looked at as it starts."""
    moved: tuple[tuple[str, str], ...] | None = None
    """Where sources were and where they are now."""
    user_agent: str | None = None


class DeviceSpec(Struct, frozen=True):
    """One device as the launcher hands it to its worker process."""

    name: str
    """`cpu#0`, `cuda#1`, …"""
    kind: str
    """`cpu`, `cuda`, `gpu`, `npu`, `ipu`, `null`, …"""
    backend: str
    """`openvino`, `torch`, `onnxruntime`, `popart`, `null`: a row of `BACKENDS` in
    `pipeline/backends/__init__.py`.
    """
    cores: tuple[int, ...]
    """CPU cores that the process may use, by number."""
    id: int = 0
    """Which of its kind it is, as the backend counts them."""
    model: str = ""
    """Name of the hardware, such as `NVIDIA H100 80GB HBM3 (132 SMs)`; empty if it is not known."""
    floating: bool = False
    """It may use so many cores as `cores` has, whichever these are: others, who are not ours, may
    be at work on the machine.
    """
    uuid: str = ""
    """Of an NVIDIA GPU, as CUDA_VISIBLE_DEVICES takes it; empty if it is not known."""

    @property
    def engine(self) -> str:
        """What decides the last bits of its answers, and so is part of the answer id: `openvino`,
        `onnxruntime`, `onnxruntime:cuda`, …
        """
        return self.backend if self.kind in ("cpu", "null") else f"{self.backend}:{self.kind}"


class SessionSpec(Struct, frozen=True):
    """What a session compiles, and how."""

    model_file: str
    """The ONNX or OpenVINO file."""
    card: Card
    precision: Precision
    batch_size: int
    """Images; 0 until `tuning.batch_size.resolved` has set it."""
    batches_per_step: int = 0
    """Maximum number of batches in flight, on an IPU the batches of one step; 0: the session
    decides.
    """
    save: tuple[Saved, ...] = ()
    """Outputs to keep besides the most probable classes."""
    cache_dir: str | None = None
    """Folder for compiled models."""
    synthetic: bool = False
    """A benchmark without images: a device may generate its input itself."""


class Job(Struct, frozen=True):
    """One `imagemill run` as it was frozen; all that a worker needs besides its device and its
    leases.
    """

    output: str
    sources: tuple[str, ...]
    """Absolute paths or URLs; a plan row names its source by position."""
    session: SessionSpec
    variant: str
    """Which file of the bundle: `model`, or `int8-<hash>`."""
    num_workers: int
    """Decoding threads per device; 0 leaves it to the worker."""
    top_k: int
    """Classes kept per image; 0 for a network without a head."""
    limits: Limits
    plan_id: str
    answer_id: str
    min_probability: float | tuple[float, ...] | None = None
    """Less probable classes are not kept: one number, or one per class; None: all are kept."""
    keep: tuple[Kept, ...] = ()
    """Columns of the sources that the rows have, too."""
    allow_inexact: bool = False
    """Whether answers may depend on an image's place in a batch and on its neighbours."""
    log_dir: str | None = None
    access: Access = AS_GIVEN
    """How the sources are read this time; in `job.json` always the default."""


class Shard(Struct, frozen=True):
    """A run of images that is committed as a whole."""

    number: int
    first: int
    """Index of its first image in the plan."""
    count: int
    group: int
    """The sub-folder it belongs to where sub-folders are dealt to devices, else 0."""
    plan_file: str
    """File name below `plan/`."""
    row_group: int
    answer_id: str = ""
    """Of its generation, which its part carries; empty: that of the job as it was frozen."""
    is_retried: bool = False
    """Its part has failed rows, and only these are computed again."""


class Lease(Struct, frozen=True):
    """A shard on its way to a worker, with what is known about the images in it."""

    shard: Shard
    quarantined: Mapping[int, IsolationReason] = {}
    """Index of each image to decode in a process of its own → why."""
    isolate: bool = False
    """Decode every image of the shard in a process of its own, because more than one worker died
    with it.
    """


class PlannedImage(Struct, frozen=True):
    """One planned image, not yet read."""

    index: int
    shard: Shard
    source: str
    path: bytes
    """Relative to its source, as the file system spells it."""
    size: int
    """Bytes when it was listed; -1 where unknown."""
    fetch: Callable[[], bytes]
    """Reads the encoded bytes. Raises `BadImage`."""
    isolation: IsolationReason | None = None
    """Why it must be decoded in a process of its own; None: it need not."""
    kept: bytes = b""
    """As `Entry.kept`."""


class BadImage(Exception):  # noqa: N818 - not an error of the program but a row of the result
    """An image that cannot be had: becomes a row with this status and error."""

    def __init__(
        self, status: Status, error: str, width: int | None = None, height: int | None = None
    ) -> None:
        super().__init__(status, error, width, height)
        self.status = status
        self.error = " ".join(error.split())
        self.width = width
        self.height = height


class Decoded(Struct, frozen=True):
    """One image after decoding and preprocessing."""

    pixels: NDArray[np.uint8] | None
    """uint8 (height, width, 3), RGB; None where error is set."""
    status: Status = Status.OK
    error: str | None = None
    width: int | None = None
    """Of the image as displayed; None where not known."""
    height: int | None = None


class Row(Struct, frozen=True):
    """What a batch knows of one image: everything but its pixels."""

    index: int
    shard: Shard
    source: str
    path: str
    """For people: bytes that are not UTF-8 are shown as `\\xNN`."""
    status: Status
    error: str | None
    width: int | None
    height: int | None
    slot: int
    """Its place in the batch; -1 where status is not ok."""
    kept: bytes = b""
    """As `Entry.kept`."""


class Batch(Struct, frozen=True):
    """A fixed-size batch. Images that could not be decoded take no place in it, only a row."""

    pixels: NDArray[np.uint8]
    """uint8 (batch size, height, width, 3), RGB, C-contiguous; places from `filled` on are
    padding.
    """
    filled: int
    rows: tuple[Row, ...]
    """In plan order; at least `filled` of them."""


class Outputs(Struct, frozen=True):
    """What a session returns for a batch, padding dropped."""

    logits: NDArray[np.float32]
    """float32 (filled, classes); without classes for a network without a head."""
    embedding: NDArray[np.float32] | None = None
    """float32 (filled, features), where the job saves it."""


class TopK(Struct, frozen=True):
    """The most probable classes of each image of a batch, most probable first, ties by class id.

    Of each image, only the first `counts` of the k classes are kept. The others are padding.
    """

    class_ids: NDArray[np.int32]
    """int32 (filled, k)."""
    probabilities: NDArray[np.float32]
    """float32 (filled, k)."""
    counts: NDArray[np.intp]
    """int (filled,), at most k; less with a minimum probability."""
    outputs: Outputs


class Receipt(Struct, frozen=True):
    """What committing a part returns."""

    shard: int
    rows: int
    failed: int
    bytes: int
    seconds: float
    """From the shard's first batch to its commit."""
    sha256: str
    failed_by_status: Mapping[str, int] = {}


class Clock(Struct, frozen=True):
    """Where a worker's time went since it started, seconds."""

    read: float = 0.0
    """Summed over decoding threads: fetching bytes."""
    decode: float = 0.0
    """Summed over decoding threads: CPU time of decoding and resampling."""
    starved: float = 0.0
    """The session waited for images."""
    compute: float = 0.0
    """The loop waited for the session."""
    write: float = 0.0
    """Building and committing parts."""
    decode_wall: float = 0.0
    """Summed over decoding threads: time from the last byte read to the pixels, waiting for a core
    included.
    """
    session_cpu: float = 0.0
    """CPU time of the session's own threads; 0 if the device is not the CPU."""
    images: int = 0
    recomputed: int = 0
    """Images that overflowed fp16 and were computed again in fp32."""
    device: float = 0.0
    """The device computed, by its own clock; 0 if it does not tell."""
    transfer: float = 0.0
    """Copies between host and device, by the device's clock; they may overlap."""


class MemoryTraffic(Struct, frozen=True):
    """What a device's memory allows a model."""

    bytes_per_image: float
    """Read and written if each layer reads its inputs and writes its outputs once."""
    bytes_per_s: float
    """At which the device copies within its memory, reads plus writes."""


class Throughput(Struct, frozen=True):
    """When rows were made, per device."""

    bucket_s: float
    """Width of a bucket; the first begins with the first lease."""
    devices: tuple[str, ...]
    images: tuple[tuple[float, ...], ...]
    """Of each device, rows per bucket; a commit's rows are spread evenly over the time that its
    shard took.
    """


class Preflight(Struct, frozen=True):
    """Estimates for a new job, from a sample of its images and its first seconds."""

    sampled: int
    """Images in the sample, chosen at random from the plan."""
    unreadable: Mapping[str, int]
    """Unreadable images in the sample, by status."""
    unreadable_low: float
    """Share of unreadable images in the whole job: lower bound of the 95 % Wilson interval."""
    unreadable_high: float
    """Upper bound of the same interval."""
    images_per_second: float | None = None
    """This and all below: None if the job ended before its rate was known."""
    seconds: float | None = None
    """Estimated time from the first lease to the last result."""
    result_bytes: int | None = None
    """Estimated size of all parts."""


class DeviceSummary(Struct, frozen=True):
    """One device's share of a job."""

    name: str
    images: int
    images_per_second: float | None
    restarts: int
    clock: Clock | None = None
    """Where its time went; None if nothing ran."""
    retired: str | None = None
    """Why it was not used any more; None if it was."""
    busy: float | None = None
    """Share of the time in which it computed; None if it does not tell."""


class Summary(Struct, frozen=True):
    """`summary.json`: what one finished job was, and what this invocation added to it."""

    images: int
    ok: int
    failed: int
    failed_by_status: Mapping[str, int]
    skipped_by_suffix: Mapping[str, int]
    shards: int
    resumed_shards: int
    seconds: float
    images_per_second: float | None
    """Rows committed by this invocation over the seconds from the first lease to the last commit;
    None if none.
    """
    model: str
    precision: str
    bottleneck: str | None
    """`compute`, `decode`, `read` or `write`; None for less than five seconds."""
    devices: tuple[DeviceSummary, ...]
    output: str
    rates: Mapping[str, float] = {}
    """images/s: `decode_only`, `compute_only` and, if the devices tell, `transfer_only`, as this
    run's clocks suggest them; and `achieved`.
    """
    advice: str | None = None
    skipped_hidden: int = 0
    skipped_by_filter: int = 0
    skipped_broken_links: int = 0
    """Links that lead nowhere and may have led to a folder of images, such as one on a disk that is
    not mounted.
    """
    new_in_source: int = 0
    """Images in the source that are not in the frozen plan (known only when a finished job is
    repeated).
    """
    appended: int = 0
    """Images that this invocation added to the job, with `--append`."""
    changed_in_source: int = 0
    """Images in the source whose size is not that in the plan (known only with `--append` and when
    a finished job is repeated).
    """
    missing_in_source: int = 0
    """Images of the plan that are no longer in the source (known as above)."""
    complete: bool = True
    throughput: Throughput | None = None
    """Of this invocation alone; None if nothing ran."""
    preflight: Preflight | None = None
    """None where this invocation made none."""
    recomputed: int = 0
    """Images that overflowed fp16 and were computed again in fp32, in this run."""
    extras: Mapping[str, int] = {}
    """Extras that are not installed and would read failed images → how many images."""
    machine: Mapping[str, str] = {}
    """What the job ran on: `system`, `processor`, `cores`, `memory`, `python`."""

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self._facts().items())

    def _repr_html_(self) -> str:
        return html_table(self._facts().items())

    def _facts(self) -> dict[str, str]:
        """Return what notebooks and Python's prompt show."""
        statuses = ", ".join(f"{n:,} {status}" for status, n in self.failed_by_status.items())
        failed = f", {self.failed:,} failed ({statuses})" if self.failed else ""
        facts = {"images": f"{self.images:,}, {self.ok:,} ok{failed}"}
        facts["model"] = f"{self.model} in {self.precision}"
        if self.images_per_second:
            facts["speed"] = f"{self.images_per_second:,.1f} images/s over {self.seconds:,.1f} s"
        facts["results"] = f"{self.output}/predictions"
        if self.failed:
            facts["failed images"] = f"{self.output}/failed.txt"
        return facts


def html_table(rows: Iterable[tuple[str, str]]) -> str:
    """Return names and values as an HTML table, for notebooks."""
    from html import escape

    cells = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table style="text-align:left">{"".join(cells)}</table>'


class Bundle(Struct, frozen=True):
    """A model on disk."""

    dir: Path
    card: Card


class Entry(Struct, frozen=True):
    """One line of a listing."""

    source: int
    """Position of its source in the command."""
    path: bytes
    size: int
    """Bytes; -1 where unknown."""
    group: int = 0
    """Which sub-folder it is in, counted from 0 in listing order."""
    locator: bytes = b""
    """Where in its source its bytes lie, in the source's own words, so that nothing has to be
    searched for it; empty: its path says it.
    """
    kept: bytes = b""
    """A JSON list of the values that `Job.keep` names; empty: all are null."""


class Filters(Struct, frozen=True):
    """Which entries of a source are planned."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    all_files: bool = False


class Progress(Struct, frozen=True):
    """How far the job is, handed to the display at every tick."""

    rows: int
    """Committed by this invocation."""
    failed_by_status: Counter[str]
    """Among the committed."""
    devices: dict[str, int]
    """Rows per device with an answer, committed or not. They decrease when a worker dies, because
    its shards in flight are done again.
    """
    leased: dict[str, int]
    """Leased rows per device without an answer yet."""
    clock: Clock
    """Where the time of all devices went."""
    restarts: dict[str, int]
    since_first_lease_s: float
    ready: int
    """Devices whose session is compiled."""
    retired: dict[str, str] = {}
    """Devices that are not used any more → why."""
