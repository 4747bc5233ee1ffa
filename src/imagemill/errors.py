"""Every exception imagemill raises on purpose. The user sees one clear line, never a traceback, and
the exit code is 1 unless a class says otherwise.
"""

from __future__ import annotations

import shlex


def printable(value: object, limit: int = 200) -> str:
    """Return a value from outside as a message shows it: on one line, control characters escaped,
    and cut after `limit` characters.

    Example:
        >>> printable("a\\nb")
        'a\\\\nb'
    """
    text = str(value)
    cut = text[:limit] + "…" if len(text) > limit else text
    return "".join(
        item if item.isprintable() else item.encode("unicode_escape").decode() for item in cut
    )


def quoted(path: object) -> str:
    """Return a path as a shell takes it, on one line."""
    return printable(shlex.quote(str(path)))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the singular or plural.

    Example:
        >>> counted(1, "image"), counted(2_000, "class")
        ('1 image', '2,000 classes')
    """
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


class ImagemillError(Exception):
    """The base of all of them: its text is one clear message for the user."""

    exit_code = 1


class UsageError(ImagemillError):
    """The command or call is wrong; nothing was done."""

    exit_code = 2


class ClassCountError(UsageError):
    """Labels and model disagree about the number of classes."""


class JobMismatchError(UsageError):
    """An explicit setting differs from the one the job was frozen with."""


class ModelError(ImagemillError):
    """A model cannot be had, read or built."""


class CheckpointError(ModelError):
    """A weights file is damaged, hostile, or does not fit its architecture."""


class DownloadError(ModelError):
    """A model's home cannot be reached or sends the wrong bytes."""


class BadLogitsError(ModelError):
    """A model returns NaN or infinity for every image, or a session returned an array of the wrong
    shape.
    """


class DeviceError(ImagemillError):
    """A device or backend that was asked for is not there."""


class DeviceLostError(DeviceError):
    """A device's own program died. In a job the worker dies with it and is started again; elsewhere
    it is an error as any other.
    """


class DeviceMemoryError(DeviceError):
    """The free memory of a device does not suffice for the model and its batches."""


class InexactError(DeviceError):
    """An image's answer depends on its place in a batch, on its neighbours or on chance."""


class SourceError(ImagemillError):
    """A source as a whole cannot be listed."""

    exit_code = 2


class OutputError(ImagemillError):
    """The output is not a job, locked, full or read-only."""


class NotAJobError(OutputError):
    """The output is not a job, or cannot become one because it holds something else."""

    exit_code = 2


class PartError(OutputError):
    """A part is damaged, missing, or belongs to another job."""


class WorkerError(ImagemillError):
    """Workers die and restarting them does not help."""


class TooManyBadError(ImagemillError):
    """More images are unreadable than `--max-bad-fraction` allows."""


class Interrupted(ImagemillError):  # noqa: N818 - what happened, not a fault
    """The job was stopped by a signal, and exits with 130 or 143. The same command resumes it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
