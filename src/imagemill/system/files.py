"""Files on this machine: written whole or not at all, folders, and locks that others wait for."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from imagemill.errors import OutputError

_TEMPORARY_SUFFIX = ".tmp"

_SYSTEM_FILES = re.compile(
    # macOS
    r"\.DS_Store|\._.*|\.localized|\.Spotlight-V100|\.Trashes|\.fseventsd|\.TemporaryItems|\.apdisk|\.AppleDouble|Icon\r|__MACOSX"
    r"|Thumbs\.db|ehthumbs\.db|desktop\.ini|\$RECYCLE\.BIN|System Volume Information"  # Windows
    # Linux
    r"|lost\+found|\.directory|\.hidden|\.Trash-\d+|\.fuse_hidden.*|\.nfs.*|aquota\.(?:user|group)|\.lustre"
    # file servers and synchronised folders
    r"|[.~#]snapshots?|\.zfs|\.snap|@eaDir|#recycle|@Recycle|\.stfolder|\.sync",
    re.IGNORECASE,
)


def is_system_file(name: str) -> bool:
    """Return whether a name is that of a file or folder that systems, file servers and file
    managers make by themselves.
    """
    return _SYSTEM_FILES.fullmatch(name) is not None


def absolute(path: str) -> Path:
    """Return an absolute path without `..`, unless that would leave a link another way than the
    system does. Links stay as they were given.
    """
    plain = os.path.abspath(path)  # noqa: PTH100 - `Path.absolute` keeps `..`
    if ".." in Path(path).parts and os.path.realpath(plain) != os.path.realpath(path):
        return Path(path).absolute()
    return Path(plain)


def write_whole(path: Path, data: bytes | memoryview | Iterable[bytes]) -> None:
    """Write `data`, at once or in pieces, to `path` so that a reader, or a crash, sees all of it or
    nothing.

    The temporary file lies beside its goal (one file system), is synced before it gets its name,
    and the folder is synced after.

    Raises:
        OutputError: the disk is full, read-only, over its quota or failing; nothing is left behind
        under the final name.
    """
    # Not by process id: processes of two machines, or containers, may have the same one.
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}{_TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes | memoryview) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except BaseException as error:  # the iterable of pieces may raise anything
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def in_memory(name: str) -> IO[bytes]:
    """Open an empty file to write and read: in memory if the system can, else a temporary one."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create(name), "w+b")
    return tempfile.TemporaryFile()


def can_be_written(folder: Path) -> bool:
    """Make a folder and its parents, and return whether files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The one clear message for a write that failed."""
    remedy = {
        errno.ENOSPC: (
            "The disk is full. Free some space, then repeat the command: finished parts are kept."
        ),
        errno.EDQUOT: (
            "The disk quota is used up. Free some space, then repeat the command: finished parts"
            " are kept."
        ),
        errno.ENOENT: "Its folder does not exist. Make it, or give another path.",
        errno.EROFS: (
            "The file system is read-only. Give another --output, or remount it and repeat the"
            " command."
        ),
        errno.EACCES: (
            "The folder may not be written to. Give another --output, or change its permissions and"
            " repeat the command."
        ),
    }.get(error.errno or 0, "Fix the cause and run the command again: finished parts are kept.")
    return OutputError(f"cannot write {path}: {reason(error)}. {remedy}")


def reason(error: OSError) -> str:
    """Return why something could not be read or written, on one line without a full stop."""
    if error.errno in (errno.EEXIST, errno.ENOTDIR) and isinstance(error.filename, str | Path):
        path = Path(error.filename)
        for place in (path, *path.parents):
            if place.is_symlink() and not place.exists():
                return f"{place} is a link to {place.readlink()}, which does not exist"
            if place.is_file():
                return f"{place} is a file, not a folder"
    return " ".join((error.strerror or str(error) or type(error).__name__).split()).rstrip(".")


@contextlib.contextmanager
def output_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Turn an OSError in the block into an OutputError: what failed, why, and what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{what}: {reason(error)}. {remedy}".rstrip()) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into the OutputError that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def appending(path: Path) -> BinaryIO:
    """Open a file to append to and to read. Raises: OutputError."""
    with writing(path):
        return path.open("a+b")


def make_folder(path: Path) -> None:
    """Make a folder and its parents. If one of these is a link to nowhere, make the folder that it
    leads to. Raises: OutputError.
    """
    with writing(path):
        if (goal := missing_goal(path)) is not None:
            goal.mkdir(exist_ok=True)
        path.mkdir(parents=True, exist_ok=True)


def missing_goal(path: Path) -> Path | None:
    """Return the missing folder that `path`, or a folder above it, links to; None if there is no
    such link.

    Raises:
        OutputError: the folder above the missing one does not exist either, as on a disk that is
        not mounted.
    """
    link = next(
        (place for place in (path, *path.parents) if place.is_symlink() and not place.exists()),
        None,
    )
    if link is None:
        return None
    goal = Path(os.path.realpath(link))
    if goal.is_symlink():
        raise OutputError(
            f"{link} is a link that leads to itself. Remove it, or give another folder."
        )
    if not goal.parent.is_dir():
        raise OutputError(
            f"{link} is a link to {goal}, and {goal.parent} does not exist. Mount its disk, or give"
            " another folder."
        )
    return goal


def remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it if it exists. Raises: OutputError."""
    with writing(path), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def clear_folder(path: Path) -> None:
    """Remove a folder with all that is in it, and make it again. Raises: OutputError."""
    remove_folder(path)
    make_folder(path)


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against others of this machine, who wait; the kernel lets go of it
    however this process ends.

    Raises:
        OutputError: it cannot be written to.
    """
    make_folder(path.parent)
    with writing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
