"""The paths of a job's files. No other module spells them.

If the output is an object store, a folder in the user's cache holds plan and logs while they are
written. `ObjectStore` keeps the results under the same names in the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from imagemill.system import files, storage, userdirs
from imagemill.system.files import _TEMPORARY_SUFFIX

_PART_PREFIX = "part-"
_PART_SUFFIX = ".parquet"


class JobPaths(Struct, frozen=True):
    """The output folder of one job, or the local folder of a job in an object store."""

    root: Path
    log_dir: Path | None = None
    url: str = ""
    """Where the results are in an object store; empty: they are in `root`."""

    @classmethod
    def of(cls, output: str, log_dir: str | None = None) -> JobPaths:
        """Return the paths of a job, from the values of `--output` and `--log-dir`."""
        logs = files.absolute(log_dir) if log_dir else None
        if not storage.is_url(output):
            return cls(files.absolute(output), logs)
        url = output.rstrip("/")
        return cls(
            userdirs.cache() / "jobs" / hashlib.sha256(url.encode()).hexdigest()[:16], logs, url
        )

    @property
    def output(self) -> str:
        """The absolute path or the URL, as messages and `job.json` show it."""
        return self.url or str(self.root)

    def key(self, path: Path) -> str:
        """Return the key below `url` of a path below `root`."""
        return path.relative_to(self.root).as_posix()

    def shown(self, path: Path) -> str:
        """Return a path as messages show it: below the URL if it is below `root`."""
        return f"{self.output}/{self.key(path)}" if path.is_relative_to(self.root) else str(path)

    @property
    def job(self) -> Path:
        """The frozen job. A start writes it last, so if it exists, the plan is complete."""
        return self.root / "job.json"

    @property
    def plan(self) -> Path:
        """The folder of the listing."""
        return self.root / "plan"

    def generation(self, number: int) -> Path:
        """Return the folder of one generation's plan. The first generation is the job as it was
        frozen; `--append` makes further ones.
        """
        return self.plan if number == 1 else self.plan / f"{number:06d}"

    def gather_indices(self, number: int) -> None:
        """Move what listing a further generation has learnt about its sources to where all sources
        look for it.
        """
        folder = self.generation(number)
        if folder != self.plan:
            for path in folder.glob("source-*"):
                path.replace(self.plan / path.name)

    @property
    def appended(self) -> Path:
        """The folder of the documents of further generations."""
        return self.root / "appended"

    def appended_document(self, number: int) -> Path:
        """Return the document of a further generation. It is written last, so if it exists, the
        generation's plan is complete.
        """
        return self.appended / f"{number:06d}.json"

    @property
    def spool(self) -> Path:
        """The listing before it is cut into shards."""
        return self.plan / ".listing.arrow.tmp"

    @property
    def plan_nonces(self) -> Path:
        """The nonces of the generations of an object store whose plans `plan` holds now."""
        return self.root / "plan.nonces"

    @property
    def predictions(self) -> Path:
        """The folder of the parts, which are both the results and the ledger."""
        return self.root / "predictions"

    @property
    def quarantine(self) -> Path:
        """The folder that `verify --quarantine` moves damaged parts to."""
        return self.root / "quarantine"

    @property
    def logs(self) -> Path:
        """The folder of the logs, one per process."""
        return self.log_dir or self.root / "logs"

    @property
    def launcher_log(self) -> Path:
        """The launcher's log."""
        return self.logs / "launcher.log"

    @property
    def summary(self) -> Path:
        """The summary, written when the job is complete."""
        return self.root / "summary.json"

    @property
    def retired(self) -> Path:
        """The devices that the latest start has stopped using. It exists only if there are any."""
        return self.root / "retired.json"

    @property
    def pace(self) -> Path:
        """How fast the running job is, for `imagemill status`. It exists only while it runs."""
        return self.root / "pace.json"

    @property
    def manifest(self) -> Path:
        """The sha256 of every part. It can be rebuilt from the parts."""
        return self.root / "manifest.json"

    @property
    def failed_list(self) -> Path:
        """The paths of failed images, one a line: a list that can be a source again."""
        return self.root / "failed.txt"

    @property
    def report(self) -> Path:
        """The report, one self-contained page."""
        return self.root / "report.html"

    @property
    def score(self) -> Path:
        """How accurate the rows are, written by `imagemill score`."""
        return self.root / "score.json"

    @property
    def launch(self) -> Path:
        """A file by which workers on other machines check that they see the same output."""
        return self.root / f".launch{_TEMPORARY_SUFFIX}"

    @property
    def fetching(self) -> Path:
        """The lock of processes that fetch a plan from an object store to this machine."""
        return self.root / ".fetching"

    @property
    def lock(self) -> Path:
        """The lock that the launcher holds while it runs."""
        return self.root / ".lock"

    def part(self, shard: int) -> Path:
        """Return the file of a shard's part. Its name depends on the shard alone."""
        return self.predictions / f"{_PART_PREFIX}{shard:06d}{_PART_SUFFIX}"

    def parts_among(self, names: Iterable[str]) -> dict[int, Path]:
        """Return the parts among names of files in `predictions/`, ordered by shard number. Other
        files are left out.
        """
        found = {}
        for name in names:
            digits = name.removeprefix(_PART_PREFIX).removesuffix(_PART_SUFFIX)
            if digits.isdecimal() and name == self.part(int(digits)).name:
                found[int(digits)] = self.predictions / name
        return dict(sorted(found.items()))

    def device_log(self, device: str) -> Path:
        """Return the log of a worker process."""
        return self.logs / f"{device}.log"

    def ours(self) -> set[str]:
        """Return the names that an interrupted start may have left in the folder."""
        left = {path.name for path in self.root.glob(f".{self.job.name}.*{_TEMPORARY_SUFFIX}")}
        return left | {
            path.name for path in (self.plan, self.predictions, self.root / "logs", self.lock)
        }

    def unmade(self) -> list[Path]:
        """Return what a start makes and does not exist yet: files and folders, and last the folders
        that hold them.
        """
        made = (self.launcher_log, self.logs, self.plan, self.predictions, self.lock)
        folders = (self.root, *self.root.parents)
        return [path for path in (*made, *folders) if not os.path.lexists(path)]

    def discard(self, made: Iterable[Path]) -> None:
        """Remove what a start has made whose job was refused, of what `unmade` returned before.
        Only for the holder of the lock.
        """
        self.plan_nonces.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):
                if path in (self.plan, self.logs):
                    shutil.rmtree(path)
                elif path.is_dir():
                    path.rmdir()
                else:
                    path.unlink()

    def sweep(self) -> None:
        """Remove temporary files of killed processes. Only for the holder of the lock, while no
        workers run.
        """
        for folder in (self.root, self.plan, self.appended, self.predictions):
            if folder.is_dir():
                for path in folder.glob(f".*{_TEMPORARY_SUFFIX}"):
                    path.unlink(missing_ok=True)
