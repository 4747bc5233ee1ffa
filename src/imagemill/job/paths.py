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


class _Below:
    """The path of a name below the root of the `JobPaths` that it is an attribute of."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, paths: JobPaths, _: object) -> Path:
        return paths.root / self._name


class JobPaths(Struct, frozen=True):
    """The output folder of one job, or the local folder of a job in an object store."""

    root: Path
    log_dir: Path | None = None
    url: str = ""
    """Where the results are in an object store; empty: they are in `root`."""

    job = _Below("job.json")
    """The frozen job. A start writes it last, so if it exists, the plan is complete."""
    plan = _Below("plan")
    """The folder of the listing."""
    appended = _Below("appended")
    """The folder of the documents of further generations."""
    spool = _Below("plan/.listing.arrow.tmp")
    """The listing before it is cut into shards."""
    plan_nonces = _Below("plan.nonces")
    """The nonces of the generations of an object store whose plans `plan` holds now."""
    predictions = _Below("predictions")
    """The folder of the parts, which are both the results and the ledger."""
    quarantine = _Below("quarantine")
    """The folder that `verify --quarantine` moves damaged parts to."""
    summary = _Below("summary.json")
    """The summary, written when the job is complete."""
    retired = _Below("retired.json")
    """The devices that the latest start has stopped using. It exists only if there are any."""
    pace = _Below("pace.json")
    """How fast the running job is, for `imagemill status`. It exists only while it runs."""
    manifest = _Below("manifest.json")
    """The sha256 of every part. It can be rebuilt from the parts."""
    failed_list = _Below("failed.txt")
    """The paths of failed images, one a line: a list that can be a source again."""
    report = _Below("report.html")
    """The report, one self-contained page."""
    score = _Below("score.json")
    """How accurate the rows are, written by `imagemill score`."""
    launch = _Below(f".launch{_TEMPORARY_SUFFIX}")
    """A file by which workers on other machines check that they see the same output."""
    fetching = _Below(".fetching")
    """The lock of processes that fetch a plan from an object store to this machine."""
    lock = _Below(".lock")
    """The lock that the launcher holds while it runs."""

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

    def appended_document(self, number: int) -> Path:
        """Return the document of a further generation. It is written last, so if it exists, the
        generation's plan is complete.
        """
        return self.appended / f"{number:06d}.json"

    @property
    def logs(self) -> Path:
        """The folder of the logs, one per process."""
        return self.log_dir or self.root / "logs"

    @property
    def launcher_log(self) -> Path:
        """The launcher's log."""
        return self.logs / "launcher.log"

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

    def is_own(self, path: Path) -> bool:
        """Return whether a file is one of the job's own, apart from its report, or in one of its
        folders.
        """
        file, root = path.resolve(), self.root.resolve()
        if not file.is_relative_to(root) or file == root / self.report.name:
            return False
        below = (own for own in vars(JobPaths).values() if isinstance(own, _Below))
        names = {own._name.partition("/")[0] for own in below}
        return file.relative_to(root).parts[:1] in {(name,) for name in (*names, "logs")}

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
