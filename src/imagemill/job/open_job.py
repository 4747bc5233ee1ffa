"""The open job: one object that every command passes on."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from imagemill.errors import NotAJobError, OutputError, counted, printable
from imagemill.job import documents, ledger, lock, plan
from imagemill.job.documents import Appended, Frozen
from imagemill.job.paths import JobPaths
from imagemill.job.store import Store, open_store
from imagemill.records import Access, Receipt, Shard

if TYPE_CHECKING:
    import pyarrow as pa


class JobStatus(Struct, frozen=True):
    """How far a job has got."""

    images: int
    done: int
    shards: int
    shards_done: int
    failed_by_status: Mapping[str, int]
    running: bool
    complete: bool
    retired: Mapping[str, str]
    """Devices that the latest start has stopped using → why."""
    images_per_second: float | None = None
    """Of a job that runs on this machine, recently; None if it is not known."""
    seconds_left: float | None = None
    devices: Mapping[str, float | None] = {}
    """images/s by device, while the job runs on this machine."""


class OpenJob(Struct, frozen=True, dict=True):
    """A frozen job with its store and its plan.

    `frozen` is the whole job, all of its generations together. Only what continues a job or adds to
    it needs them one by one.
    """

    store: Store
    first: Frozen
    """`job.json`, the first generation."""
    appended: tuple[Appended, ...] = ()
    """The further generations, in order."""

    @classmethod
    def find(cls, output: str, log_dir: str | None = None) -> OpenJob | None:
        """Return the job in an output folder or object store; None if there is none.

        Args:
            output: a path or URL.
            log_dir: where this start keeps its logs; None: where the job keeps them.

        Raises:
            OutputError: `job.json` cannot be read.
        """
        store = open_store(JobPaths.of(output, log_dir))
        frozen = documents.read_frozen(store)
        if frozen is None:
            return None
        if frozen.job.log_dir and not log_dir:
            store = open_store(JobPaths.of(output, frozen.job.log_dir))
        return cls(store, frozen, documents.read_appended(store))

    @classmethod
    def open(cls, output: str | os.PathLike[str]) -> OpenJob:
        """Return the job in an output. Raises: OutputError if it is none, or cannot be read."""
        job = cls.find(os.fspath(output))
        if job is None:
            paths = JobPaths.of(os.fspath(output))
            if lock.is_locked(paths):
                raise NotAJobError(
                    f"{printable(paths.output)} is not an imagemill job yet: an `imagemill run` is"
                    " listing its images. Try again in a moment."
                )
            why = "it has no job.json" if paths.url or paths.root.exists() else "it does not exist"
            raise NotAJobError(
                f"{printable(paths.output)} is not an imagemill job: {why}. Give the output folder"
                " of an `imagemill run`."
            )
        return job

    @property
    def paths(self) -> JobPaths:
        """The names of the job's files."""
        return self.store.paths

    @property
    def generations(self) -> tuple[Frozen | Appended, ...]:
        """All generations, in order."""
        return (self.first, *self.appended)

    @cached_property
    def frozen(self) -> Frozen:
        """The job with the sources and images of all generations. What they may differ in, such as
        filters and decoder, is that of the first.
        """
        if not self.appended:
            return self.first
        skipped = Counter(self.first.skipped_by_suffix)
        for generation in self.appended:
            skipped.update(generation.skipped_by_suffix)

        def total(name: str) -> int:
            return sum(getattr(generation, name) for generation in self.generations)

        added = (source for generation in self.appended for source in generation.sources)
        return replace(
            self.first,
            job=replace(self.first.job, sources=(*self.first.job.sources, *added)),
            images=total("images"),
            groups=1,  # the sub-folders of further generations are not assigned to devices
            skipped_by_suffix=dict(sorted(skipped.items())),
            skipped_hidden=total("skipped_hidden"),
            skipped_by_filter=total("skipped_by_filter"),
            skipped_broken_links=total("skipped_broken_links"),
        )

    def generation_of(self, shard: Shard) -> Frozen | Appended:
        """Return the generation that a shard belongs to."""
        number = int(shard.plan_file.rpartition("/")[0] or 1)
        return self.generations[number - 1]

    @property
    def plan_nonces(self) -> list[str]:
        """Of all generations, as `Store.fetch_plan` takes them."""
        return [generation.plan_nonce for generation in self.generations]

    @cached_property
    def shards(self) -> list[Shard]:
        """The shards of the plan, in order. Raises: OutputError if the plan is missing, damaged or
        of another job.
        """
        shards, problem = self._read_shards()
        if problem:
            raise OutputError(
                f"{self.paths.shown(self.paths.plan)} {problem}. Start again in another --output."
            )
        return shards

    def _read_shards(self) -> tuple[list[Shard], str]:
        """Return the shards of the plan, and what is wrong with it."""
        self.store.fetch_plan(self.plan_nonces)
        answer_ids = ["", *(found.answer_id for found in self.appended)]
        shards = plan.shards(self.paths.plan, answer_ids)
        is_whole = sum(shard.count for shard in shards) == self.frozen.images
        images = counted(self.frozen.images, "image")
        return shards, "" if is_whole else f"does not hold the {images} of job.json"

    def rows(self, shard: Shard) -> list[plan.PlannedRow]:
        """Return the plan's rows of a shard."""
        return plan.read(self.paths.plan, shard)

    def with_access(self, access: Access) -> OpenJob:
        """Return the job with another way to read its sources."""
        job = replace(self.first.job, access=access)
        return replace(self, first=replace(self.first, job=job))

    def all_rows(self) -> Iterator[plan.PlannedRow]:
        """Yield the rows of the whole plan."""
        for shard in self.shards:
            yield from self.rows(shard)

    def row(self, index: int) -> plan.PlannedRow:
        """Return the plan's row of an image."""
        shard = self.shards[bisect_right(self.shards, index, key=lambda shard: shard.first) - 1]
        return self.rows(shard)[index - shard.first]

    def sources_of(self, shards: Iterable[Shard]) -> tuple[str, ...]:
        """Return the sources that shards have images of. Raises: OutputError if a plan file is
        damaged.
        """
        sources = self.frozen.job.sources
        return tuple(sources[place] for place in sorted(plan.sources_of(self.paths.plan, shards)))

    def committed(self) -> set[int]:
        """Return the shards whose part exists now. A part appears whole, so its name is enough."""
        parts = ledger.existing_parts(self.store)
        return parts.keys() & {shard.number for shard in self.shards}

    def committed_shards(self) -> list[Shard]:
        """Return the shards whose part exists now, in order."""
        done = self.committed()
        return [shard for shard in self.shards if shard.number in done]

    def tables(
        self, shards: Sequence[Shard], columns: Sequence[str]
    ) -> Iterator[tuple[Shard, pa.Table]]:
        """Yield committed shards with the rows of their parts; see `ledger.tables`."""
        numbers = [shard.number for shard in shards]
        return zip(shards, ledger.tables(self.store, numbers, columns), strict=True)

    def shortfall(self, rows: int) -> str:
        """Return that the job is not finished, and what to do, as the beginning of a message. It
        has `rows` rows.
        """
        of = counted(self.frozen.images, "image")
        remedy = (
            "Wait until the `imagemill run` that is at work has finished"
            if lock.is_locked(self.paths)
            else "Run the same `imagemill run` command again to finish it"
        )
        return f"{self.paths.output} is not finished: {rows:,} of {of} have a row. {remedy}"

    def failed_by_status(self, shards: Iterable[int]) -> Counter[str]:
        """Count failed images in committed shards. Raises: PartError if a part is damaged."""
        failed: Counter[str] = Counter()
        for number in shards:
            failed.update(ledger.examine(self.store, number).failed_by_status)
        return failed

    def shards_with(self, statuses: Collection[str]) -> set[int]:
        """Return committed shards with a row of one of these statuses; of any failure if empty."""
        found = ((number, self.failed_by_status([number])) for number in self.committed())
        return {
            number
            for number, failed in found
            if failed and (not statuses or not failed.keys().isdisjoint(statuses))
        }

    def close(self, receipts: Iterable[Receipt], as_line: ledger.AsLine) -> ledger.Totals:
        """Prove that every image has one row; write the manifest and `failed.txt`.

        Args:
            receipts: of the parts that were committed just now and need not be read again.
            as_line: returns a failed image as a line of a list, for `failed.txt`.

        Raises:
            PartError: a part is missing, damaged, mismatched or of another length than its shard.
        """
        return ledger.close(self.store, self.shards, self.frozen.job, receipts, as_line)

    def status(self) -> JobStatus:
        """Return how far the job has got. Reads only, so it is safe while the job runs."""
        done, running = self.committed_shards(), lock.is_locked(self.paths)
        pace = documents.read_pace(self.paths) if running else documents.RunningPace()
        return JobStatus(
            images=self.frozen.images,
            done=sum(shard.count for shard in done),
            shards=len(self.shards),
            shards_done=len(done),
            failed_by_status=dict(
                sorted(self.failed_by_status(shard.number for shard in done).items())
            ),
            running=running,
            complete=len(done) == len(self.shards) and self.store.exists(self.paths.summary),
            retired=documents.read_retired(self.store),
            images_per_second=pace.images_per_second,
            seconds_left=pace.seconds_left,
            devices=pace.devices,
        )

    def verify(self, *, quarantine: bool = False) -> tuple[list[ledger.Problem], list[Path]]:
        """Check all parts against the plan; with `quarantine`, move damaged ones away.

        Returns:
            the problems, none if the job is complete and sound; and where damaged parts are now.

        Raises:
            OutputError: `quarantine` is set while the job runs, or the plan cannot be read.
        """
        shards, problem = self._read_shards()
        if problem:  # nothing to compare parts with
            return [ledger.Problem(None, self.paths.plan, problem)], []
        # Parts that a run replaces meanwhile would look damaged.
        with lock.locked(self.paths) if quarantine else contextlib.nullcontext():
            problems = list(ledger.verify(self.store, shards, self.frozen.job))
            return problems, ledger.quarantine(self.store, problems) if quarantine else []
