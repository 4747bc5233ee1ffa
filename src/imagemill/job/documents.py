"""The documents of a job folder: `job.json` and `summary.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from imagemill.errors import OutputError
from imagemill.job import plan, store
from imagemill.job.paths import JobPaths
from imagemill.records import (
    Filters,
    Job,
    Shard,
    Summary,
)
from imagemill.system import serialization

_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Frozen:
    """`job.json`: the job as it was frozen. Written last of what a start writes, so its presence
    says that the plan is whole.
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
    """Of the quantised variant that the job runs in; None where it runs in the bundle's own
    weights.
    """
    decoder: str = ""
    """Identity of the decoder, `DECODER` of the version that froze the job. A part of `answer_id`:
    another decoder gives other pixels.
    """
    versions: Mapping[str, str] = field(default_factory=dict)
    plan_nonce: str = ""
    """Which plan in an object store is this job's; see `home`."""
    skipped_broken_links: int = 0


def read_frozen(paths: JobPaths) -> Frozen | None:
    """The frozen job of an output folder; None where there is none. Raises: OutputError where it
    cannot be read.
    """
    try:
        plain = json.loads(store.read(paths, paths.job))
        written = plain.get("format") if isinstance(plain, dict) else None
        if written != _FORMAT:
            raise OutputError(
                f"{paths.shown(paths.job)} has format {written}, this version of imagemill reads"
                f" format {_FORMAT}. Use the version that wrote it, or give another --output."
            )
        return serialization.from_plain(Frozen, plain)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        remedy = "Repeat the command once the store answers, or give" if paths.url else "Give"
        raise OutputError(
            f"{paths.shown(paths.job)} cannot be read: {store.reason(error)}. {remedy} another"
            " --output."
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{paths.shown(paths.job)} cannot be read: {error}. Give another --output."
        ) from error


def planned(paths: JobPaths, frozen: Frozen) -> list[Shard]:
    """The shards of a frozen job's plan. Raises: OutputError, where the plan is not there, damaged
    or another one.
    """
    store.fetch_plan(paths, frozen.plan_nonce)
    shards = plan.shards(paths.plan)
    if sum(shard.count for shard in shards) != frozen.images:
        raise OutputError(
            f"{paths.shown(paths.plan)} does not hold the {frozen.images} images of job.json. Start"
            " anew in another --output."
        )
    return shards


def read_summary(paths: JobPaths) -> Summary | None:
    """The summary of a finished job, or None."""
    try:
        return serialization.from_plain(Summary, json.loads(store.read(paths, paths.summary)))
    except (OSError, ValueError, TypeError, KeyError):
        return None
