"""The documents of a job folder: `job.json` and `summary.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from imagemill.errors import OutputError
from imagemill.job.store import Store
from imagemill.records import Filters, Job, Summary
from imagemill.system import files, serialization

FORMAT = 2


@dataclass(frozen=True, slots=True)
class Frozen:
    """`job.json`: the job as it was frozen.

    A start writes it last, so if it exists, the plan is complete.
    """

    format: int
    created: str
    job: Job
    devices: str
    filters: Filters
    limit: int | None
    shard_size: int
    images: int
    groups: int
    skipped_by_suffix: Mapping[str, int]
    skipped_hidden: int
    skipped_by_filter: int
    backend: str
    variant_sha256: str | None = None
    """Hash of the quantised variant; None if the job uses the model's own weights."""
    decoder: str = ""
    """Identity of the decoder, `DECODER` of the version that froze the job. A part of `answer_id`:
    another decoder gives other pixels.
    """
    versions: Mapping[str, str] = field(default_factory=dict)
    plan_nonce: str = ""
    """Which plan in an object store belongs to this job."""
    skipped_broken_links: int = 0


def read_frozen(store: Store) -> Frozen | None:
    """Return the frozen job in a store; None if there is none. Raises: OutputError if it cannot be
    read.
    """
    shown = store.paths.shown(store.paths.job)
    try:
        plain = json.loads(store.read(store.paths.job))
        written = plain.get("format") if isinstance(plain, dict) else None
        if written != FORMAT:
            raise OutputError(
                f"{shown} has format {written}, this version of imagemill reads format {FORMAT}."
                " Use the version that wrote it, or give another --output."
            )
        return serialization.from_plain(Frozen, plain)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(
            f"{shown} cannot be read: {files.reason(error)}. Fix the cause and run the command"
            " again, or give another --output."
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(f"{shown} cannot be read: {error}. Give another --output.") from error


def read_summary(store: Store) -> Summary | None:
    """Return the summary of a finished job, or None."""
    try:
        return serialization.from_plain(Summary, json.loads(store.read(store.paths.summary)))
    except (OSError, ValueError, TypeError, KeyError):
        return None
