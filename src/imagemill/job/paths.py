"""Every path of the output folder is spelt here, and files appear whole or not at all.

Where the output is an object store, a folder in the user's cache stands for it: plan and logs are
worked on there, and `home` reads and writes the results, under the same names, in the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from imagemill.system import storage, userdirs
from imagemill.system.files import _TEMPORARY_SUFFIX

_PART_PREFIX = "part-"
_PART_SUFFIX = ".parquet"


@dataclass(frozen=True, slots=True)
class JobPaths:
    """The output folder of one job."""

    root: Path
    log_dir: Path | None = None
    url: str = ""
    """Of the object store that `root` stands for; empty: `root` is the output itself."""

    @classmethod
    def of(cls, output: str, log_dir: str | None = None) -> JobPaths:
        """What `--output` and `--log-dir` name: a folder, or an object store's URL."""
        logs = Path(log_dir).absolute() if log_dir else None
        if not storage.is_url(output):
            return cls(Path(output).absolute(), logs)
        url = output.rstrip("/")
        return cls(
            userdirs.cache() / "jobs" / hashlib.sha256(url.encode()).hexdigest()[:16], logs, url
        )

    @property
    def output(self) -> str:
        """For people, and for `job.json`: the absolute path or the URL."""
        return self.url or str(self.root)

    def key(self, path: Path) -> str:
        """The key below `url` that a path below `root` has."""
        return path.relative_to(self.root).as_posix()

    def shown(self, path: Path) -> str:
        """A path below `root` for people."""
        return (
            f"{self.url}/{self.key(path)}"
            if self.url and path.is_relative_to(self.root)
            else str(path)
        )

    @property
    def job(self) -> Path:
        """The frozen job; written last of all that a start writes, so its presence says that plan
        and choices are whole.
        """
        return self.root / "job.json"

    @property
    def plan(self) -> Path:
        """Folder of the listing."""
        return self.root / "plan"

    @property
    def spool(self) -> Path:
        """The listing while it is not yet cut into shards."""
        return self.plan / ".listing.arrow.tmp"

    @property
    def plan_nonce(self) -> Path:
        """Which plan of an object store lies in `plan` now."""
        return self.root / "plan.nonce"

    @property
    def predictions(self) -> Path:
        """Folder of the parts: the data set, and the ledger."""
        return self.root / "predictions"

    @property
    def quarantine(self) -> Path:
        """Folder that `verify --quarantine` moves damaged parts to."""
        return self.root / "quarantine"

    @property
    def logs(self) -> Path:
        """Folder with one log per process."""
        return self.log_dir or self.root / "logs"

    @property
    def launcher_log(self) -> Path:
        """The launcher's own log."""
        return self.logs / "launcher.log"

    @property
    def summary(self) -> Path:
        """Written when the ledger closes."""
        return self.root / "summary.json"

    @property
    def manifest(self) -> Path:
        """The sha256 of every part; rebuildable."""
        return self.root / "manifest.json"

    @property
    def failed_list(self) -> Path:
        """Paths of the images that have no answer, one a line, fit to be a source again."""
        return self.root / "failed.txt"

    @property
    def report(self) -> Path:
        """One self-contained page."""
        return self.root / "report.html"

    @property
    def launch(self) -> Path:
        """Written by a launcher whose workers are on other machines, so that these can tell whether
        they see the same folder.
        """
        return self.root / f".launch{_TEMPORARY_SUFFIX}"

    @property
    def fetching(self) -> Path:
        """Lock of those who fetch a plan from an object store to this machine."""
        return self.root / ".fetching"

    @property
    def lock(self) -> Path:
        """Held by the launcher as long as it lives."""
        return self.root / ".lock"

    def part(self, shard: int) -> Path:
        """The one file that shard `shard` becomes; its name depends on the shard alone."""
        return self.predictions / f"{_PART_PREFIX}{shard:06d}{_PART_SUFFIX}"

    def parts(self) -> dict[int, Path]:
        """Every part on disk by shard number, whatever its content; temporary and foreign files are
        left out.
        """
        with contextlib.suppress(FileNotFoundError), os.scandir(self.predictions) as entries:
            return self.parts_among(entry.name for entry in entries)
        return {}

    def parts_among(self, names: Iterable[str]) -> dict[int, Path]:
        """Those of the names in `predictions/` that are a part's, by shard number, in order."""
        found = {}
        for name in names:
            digits = name.removeprefix(_PART_PREFIX).removesuffix(_PART_SUFFIX)
            if digits.isdecimal() and name == self.part(int(digits)).name:
                found[int(digits)] = self.predictions / name
        return dict(sorted(found.items()))

    def device_log(self, device: str) -> Path:
        """The log of one device process."""
        return self.logs / f"{device}.log"

    def ours(self) -> set[str]:
        """Names that a start which was cut short may have left behind."""
        left = {path.name for path in self.root.glob(f".{self.job.name}.*{_TEMPORARY_SUFFIX}")}
        return left | {
            path.name for path in (self.plan, self.predictions, self.root / "logs", self.lock)
        }

    def sweep(self) -> None:
        """Remove what a killed process left half-written. Only for the holder of the lock, before
        workers run.
        """
        for folder in (self.root, self.plan, self.predictions):
            if folder.is_dir():
                for path in folder.glob(f".*{_TEMPORARY_SUFFIX}"):
                    path.unlink(missing_ok=True)
