"""Look at a job without running it: `imagemill status` and `imagemill verify`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imagemill.job import documents, ledger, lock, plan, store
from imagemill.job.paths import JobPaths


@dataclass(frozen=True, slots=True)
class JobStatus:
    """How far a job is."""

    images: int
    done: int
    shards: int
    shards_done: int
    failed_by_status: Mapping[str, int]
    running: bool
    complete: bool


def status(paths: JobPaths, frozen: documents.Frozen) -> JobStatus:
    """Count what is committed; reads only, so it is safe beside a running job."""
    shards = documents.planned(paths, frozen)
    done = ledger.committed(paths, shards)
    failed: Counter[str] = Counter()
    for shard in shards:
        if shard.number in done:
            failed.update(ledger.examine(paths, shard.number).failed_by_status)
    return JobStatus(
        images=frozen.images,
        done=sum(shard.count for shard in shards if shard.number in done),
        shards=len(shards),
        shards_done=len(done),
        failed_by_status=dict(sorted(failed.items())),
        running=lock.is_locked(paths),
        complete=len(done) == len(shards) and store.exists(paths, paths.summary),
    )


def verify(
    paths: JobPaths, frozen: documents.Frozen, *, quarantine: bool = False
) -> tuple[list[ledger.Problem], list[Path]]:
    """Check a whole job against its plan; with `quarantine` move damaged parts aside.

    Returns:
        the problems, none if the job is complete and sound; and where damaged parts went.

    Raises:
        OutputError: quarantine is asked for while a run is at work on the folder.
    """
    store.fetch_plan(paths, frozen.plan_nonce)
    shards = plan.shards(paths.plan)
    problems = list(ledger.verify(paths, shards, frozen.job.plan_id, frozen.job.answer_id))
    if sum(shard.count for shard in shards) != frozen.images:
        problems.append(
            ledger.Problem(
                None, paths.plan, f"does not hold the {frozen.images} images of job.json"
            )
        )
    if not quarantine:
        return problems, []
    with lock.locked(paths):
        return problems, ledger.quarantine(paths, problems)
