"""The accuracy check's results of a bundle's faster precisions, and its int8 files.

    DIR/accuracy.json            what was measured, by precision; `imagemill quantize` replaces it
    DIR/int8-<hash>.xml, .bin    OpenVINO IR; the .bin appears first, so each .xml has its weights

Results are not part of `card.json`, which is the model's identity.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from imagemill.errors import ModelError, OutputError
from imagemill.models import bundle as bundles
from imagemill.records import Recipe
from imagemill.system import files, serialization

ACCURACY: Final = "accuracy.json"
TOO_FEW: Final = "too few images"
"""Start of a comparison's reason if there are too few images."""


class Flip(Struct, frozen=True):
    """An image with another answer than in fp32."""

    image: str
    """Its path in its source."""
    fp32: str
    """fp32's answer: a label, or the labels of a multi-label model."""
    fp32_probability: float
    """Probability of fp32's most probable class in fp32."""
    answer: str
    """The faster precision's answer."""
    probability: float
    """Probability of its most probable class."""


class TrueAccuracy(Struct, frozen=True):
    """How many answers are right, by `quantize --truth`: shares of the most probable class."""

    truth: str
    """As the user wrote it."""
    images: int
    """Number of compared images with a true class."""
    fp32: float
    precision: float


class Comparison(Struct, frozen=True):
    """The result of comparing a faster precision with fp32."""

    images: int
    agreement: float
    """Share of the images with fp32's answer, see `compared`; 0 without images."""
    wilson_low: float
    """Lower end of the agreement's 95 % interval."""
    wilson_high: float
    sure: int
    """Number of images of which fp32 was sure: its probabilities lie far from another answer."""
    flips_where_sure: int
    """Number of these images with another answer."""
    mean_probability_difference: float
    """Mean over the images of |p − p′|: the probability of fp32's top-1 class in fp32 and in the
    faster precision.
    """
    accepted: bool
    reason: str
    min_agreement: float
    """Minimum of `wilson_low` for an accepted precision."""
    compared: str = "top-1 class"
    """What the answer of an image is: see `accuracy.agree`."""
    flips: tuple[Flip, ...] = ()
    """Some images with another answer, those that fp32 was surest of first."""
    true: TrueAccuracy | None = None

    @property
    def is_verdict(self) -> bool:
        """Whether the images were enough to accept or refuse the precision."""
        return not self.reason.startswith(TOO_FEW)


class Calibration(Struct, frozen=True):
    """The images that int8 was calibrated on."""

    id: str
    images: int


class PrecisionRecord(Struct, frozen=True):
    """What a bundle keeps of one faster precision."""

    comparison: Comparison
    held_out: str
    """Identity of the images of the comparison."""
    model: str
    """The model's sha256."""
    versions: Mapping[str, str]
    """Versions of the libraries that decide the answers."""
    instruction_set: str
    recipe: Recipe
    group_channels: int = 0
    """Width that narrow groups of convolutions are merged to; 0: they are not."""
    images_per_second: float = 0.0
    """Compute only; 0 if the images were too few to measure it."""
    fp32_images_per_second: float = 0.0
    file: str | None = None
    """Name of the int8 file; this and all below are set for int8 only."""
    sha256: str | None = None
    """Of the int8 files, see `digest`."""
    calibration: Calibration | None = None
    kept: bool = True
    """False if the bundle keeps an older record instead."""

    @property
    def speedup(self) -> float | None:
        """Over fp32, compute only; None if it was not measured."""
        both = self.images_per_second and self.fp32_images_per_second
        return self.images_per_second / self.fp32_images_per_second if both else None


def read(folder: Path) -> dict[str, PrecisionRecord]:
    """Read a bundle's `accuracy.json`: precision → record, for a GPU with its model, as in `fp16 on
    NVIDIA H100 (132 SMs)`. It is empty if there is no such file.

    Raises:
        ModelError: the file cannot be read, or a value has the wrong type.
    """
    file = folder / ACCURACY
    remedy = "Remove it; `imagemill quantize` writes it again."
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}. {remedy}") from error
    found = serialization.decode(data, dict[str, dict[str, Any]], str(file), ModelError, remedy)
    records = {}
    for name, value in found.items():
        try:
            records[name] = serialization.from_plain(PrecisionRecord, value)
        except ValueError as error:
            raise ModelError(f"{file} cannot be read: {name}.{error}. {remedy}") from error
    return records


def write(folder: Path, **records: PrecisionRecord) -> dict[str, PrecisionRecord]:
    """Add records by name to a bundle's `accuracy.json`, which is replaced as a whole.

    Raises:
        ModelError: the file cannot be read or written.
    """
    found = read(folder) | records
    try:
        files.write_whole(folder / ACCURACY, serialization.encode(found))
    except OutputError as error:
        raise ModelError(
            f"{folder / ACCURACY} cannot be written. Make room or rights there, or use"
            " --precision fp32."
        ) from error
    return found


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a bundle against other processes that would quantise it; they wait.

    The kernel releases the lock when this process ends.

    Raises:
        ModelError: the folder cannot be opened.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be opened: {error.strerror}. Give the folder of a model that"
            " imagemill made."
        ) from error
    try:
        # Some network file systems have no locks: there, the last process to finish wins.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def digest(model_file: Path) -> str:
    """Return one sha256 of an int8 model's .xml and .bin, in hexadecimal."""
    sums = [bundles.sha256(model_file.with_suffix(suffix)) for suffix in (".xml", ".bin")]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def int8_file(folder: Path, record: PrecisionRecord | None) -> Path | None:
    """Return the file of an int8 record if it exists and is unchanged; else None."""
    name = record.file if record else None
    if name is None or Path(name).name != name or not name.endswith(".xml"):
        return None
    try:
        return folder / name if record and digest(folder / name) == record.sha256 else None
    except OSError:
        return None


def remove(model_file: Path) -> None:
    """Remove an int8 model's files, the .xml first."""
    for suffix in (".xml", ".bin"):
        model_file.with_suffix(suffix).unlink(missing_ok=True)
