"""Every path of the output folder is spelt here, and files appear whole or not at all.

Where the output is an object store, a folder in the user's cache stands for it: plan and logs are worked on there, and `home` reads and
writes the results, under the same names, in the store.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from imagemill import storage, userdirs
from imagemill.errors import OutputError

_PART_PREFIX = "part-"
_PART_SUFFIX = ".parquet"
_TEMPORARY_SUFFIX = ".tmp"
_SYSTEM_FILES = re.compile(
    r"\.DS_Store|\._.*|\.localized|\.Spotlight-V100|\.Trashes|\.fseventsd|\.TemporaryItems|\.apdisk|\.AppleDouble|Icon\r|__MACOSX"  # macOS
    r"|Thumbs\.db|ehthumbs\.db|desktop\.ini|\$RECYCLE\.BIN|System Volume Information"  # Windows
    r"|lost\+found|\.directory|\.hidden|\.Trash-\d+|\.fuse_hidden.*|\.nfs.*|aquota\.(?:user|group)|\.lustre"  # Linux
    r"|[.~#]snapshots?|\.zfs|\.snap|@eaDir|#recycle|@Recycle|\.stfolder|\.sync",  # file servers and synchronised folders
    re.IGNORECASE,
)
_LOCK_DELAYS_S = (0.01, 0.05, 0.2)
"""Waits for a lock that `is_locked` may hold for a moment, from another process."""


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
        return cls(userdirs.cache() / "jobs" / hashlib.sha256(url.encode()).hexdigest()[:16], logs, url)

    @property
    def output(self) -> str:
        """For people, and for `job.json`: the absolute path or the URL."""
        return self.url or str(self.root)

    def key(self, path: Path) -> str:
        """The key below `url` that a path below `root` has."""
        return path.relative_to(self.root).as_posix()

    def shown(self, path: Path) -> str:
        """A path below `root` for people."""
        return f"{self.url}/{self.key(path)}" if self.url and path.is_relative_to(self.root) else str(path)

    @property
    def job(self) -> Path:
        """The frozen job; written last of all that a start writes, so its presence says that plan and choices are whole."""
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
        """Paths of the pictures that have no answer, one a line, fit to be a source again."""
        return self.root / "failed.txt"

    @property
    def report(self) -> Path:
        """One self-contained page."""
        return self.root / "report.html"

    @property
    def launch(self) -> Path:
        """Written by a launcher whose workers are on other machines, so that these can tell whether they see the same folder."""
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
        """Every part on disk by shard number, whatever its content; temporary and foreign files are left out."""
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
        return left | {path.name for path in (self.plan, self.predictions, self.root / "logs", self.lock)}

    def sweep(self) -> None:
        """Remove what a killed process left half-written. Only for the holder of the lock, before workers run."""
        for folder in (self.root, self.plan, self.predictions):
            if folder.is_dir():
                for path in folder.glob(f".*{_TEMPORARY_SUFFIX}"):
                    path.unlink(missing_ok=True)


def is_system_file(name: str) -> bool:
    """Return whether a name is that of a file or folder that systems, file servers and file managers make by themselves."""
    return _SYSTEM_FILES.fullmatch(name) is not None


def delivered(key: str) -> Path:
    """The folder in the user's cache that holds a model which came from another machine."""
    return userdirs.cache() / "delivered" / key


def write_whole(path: Path, data: bytes | memoryview | Iterable[bytes]) -> None:
    """Write `data`, at once or in pieces, to `path` so that a reader, or a crash, sees all of it or nothing.

    The temporary file lies beside its goal (one file system), is synced before it gets its name, and the folder is synced after.

    Raises:
        OutputError: the disk is full, read-only, over its quota or failing; nothing is left behind under the final name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes | memoryview) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    except BaseException:  # of whoever makes the pieces
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The one clear message for a write that failed."""
    remedy = {
        errno.ENOSPC: "The disk is full. Free some space, then repeat the command: finished parts are kept.",
        errno.EDQUOT: "The disk quota is used up. Free some space, then repeat the command: finished parts are kept.",
        errno.EROFS: "The file system is read-only. Give another --output, or remount it and repeat the command.",
        errno.EACCES: "The folder may not be written to. Give another --output, or change its permissions and repeat the command.",
    }.get(error.errno or 0, "Repeat the command once the cause is mended: finished parts are kept.")
    return OutputError(f"cannot write {path}: {error.strerror or error}. {remedy}")


def appending(path: Path) -> BinaryIO:
    """Open a file to append to. Raises: OutputError."""
    try:
        return path.open("ab")
    except OSError as error:
        raise cannot_write(path, error) from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents. If one of these is a link to nowhere, make the folder that it leads to. Raises: OutputError."""
    try:
        if (goal := missing_goal(path)) is not None:
            goal.mkdir(exist_ok=True)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def missing_goal(path: Path) -> Path | None:
    """Return the missing folder that `path`, or a folder above it, links to; None if there is no such link.

    Raises:
        OutputError: the folder above the missing one does not exist either, as on a disk that is not mounted.
    """
    link = next((place for place in (path, *path.parents) if place.is_symlink() and not place.exists()), None)
    if link is None:
        return None
    goal = Path(os.path.realpath(link))
    if goal.is_symlink():
        raise OutputError(f"{link} is a link that leads to itself. Remove it, or give another folder.")
    if not goal.parent.is_dir():
        raise OutputError(f"{link} is a link to {goal}, and {goal.parent} does not exist. Mount its disk, or give another folder.")
    return goal


def clear_folder(path: Path) -> None:
    """Remove a folder with all that is in it, and make it again. Raises: OutputError."""
    try:
        shutil.rmtree(path, ignore_errors=False)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise cannot_write(path, error) from error
    make_folder(path)


@contextlib.contextmanager
def locked(paths: JobPaths) -> Iterator[None]:
    """Hold the output folder against a second launcher; the kernel lets go of it however this process ends.

    Raises:
        OutputError: another launcher holds it, or it cannot be written to.
    """
    make_folder(paths.root)
    try:
        handle = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise cannot_write(paths.lock, error) from error
    try:
        for delay_s in (*_LOCK_DELAYS_S, None):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise cannot_write(paths.lock, error) from error
                if delay_s is None:
                    raise OutputError(
                        f"{paths.output} is in use by another imagemill run. Wait for it or stop it; see `imagemill status {paths.output}`."
                    ) from error
                time.sleep(delay_s)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against others of this machine, who wait; the kernel lets go of it however this process ends.

    Raises:
        OutputError: it cannot be written to.
    """
    make_folder(path.parent)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_locked(paths: JobPaths) -> bool:
    """Whether a launcher is at work on this folder now."""
    try:
        handle = os.open(paths.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
