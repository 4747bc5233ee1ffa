"""imagemill classifies images in bulk: folders in, one Parquet row per image out.

    imagemill.run(sources, output, …) -> Summary          a whole job, as `imagemill run`
    imagemill.load(model, …).predict(…) -> list[Prediction]
    imagemill.score(output, truth) -> Score               how many rows of a job are right

Nothing heavy is imported before the first of these is touched.
"""

from __future__ import annotations

from importlib import import_module

from imagemill.version import __version__

# not imported: `python -m imagemill` would take it from a `typing.py` in the working directory
TYPE_CHECKING = False
if TYPE_CHECKING:
    from imagemill.api import Answer, Classifier, Prediction, load, run, score
    from imagemill.errors import (
        BadLogitsError,
        CheckpointError,
        ClassCountError,
        DeviceError,
        DeviceLostError,
        DeviceMemoryError,
        DownloadError,
        ImagemillError,
        InexactError,
        Interrupted,
        JobMismatchError,
        ModelError,
        NotAJobError,
        OutputError,
        PartError,
        SourceError,
        TooManyBadError,
        UsageError,
        WorkerError,
    )
    from imagemill.records import Limits, Status, Summary
    from imagemill.scoring.record import Score

__all__ = [
    "Answer",
    "BadLogitsError",
    "CheckpointError",
    "ClassCountError",
    "Classifier",
    "DeviceError",
    "DeviceLostError",
    "DeviceMemoryError",
    "DownloadError",
    "ImagemillError",
    "InexactError",
    "Interrupted",
    "JobMismatchError",
    "Limits",
    "ModelError",
    "NotAJobError",
    "OutputError",
    "PartError",
    "Prediction",
    "Score",
    "SourceError",
    "Status",
    "Summary",
    "TooManyBadError",
    "UsageError",
    "WorkerError",
    "__version__",
    "load",
    "run",
    "score",
]

_HOMES = {
    "api": ("Answer", "Classifier", "Prediction", "load", "run", "score"),
    "records": ("Limits", "Status", "Summary"),
    "scoring.record": ("Score",),
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "errors")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
