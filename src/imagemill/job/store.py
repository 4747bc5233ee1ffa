"""Where a job's results live: the output folder, or an object store that a folder on this machine
stands for.

Every reader and writer of results goes through here and names them by their paths below
`JobPaths.root`. In an object store each result is one object of the same name, written by one PUT,
so that others see all of it or nothing.

Two launchers may freeze a job in one store at the same moment, from two machines that share no
lock. So the files of a plan carry a nonce there (`plan/plan-00000-00000-NONCE.parquet`), and
`job.json`, which names the nonce, is only written where none is: the first to write it has frozen
the job, the other one takes that job up. From then on they do each other no harm: a part that is
computed twice replaces itself.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from imagemill.errors import OutputError
from imagemill.job.paths import JobPaths
from imagemill.system import files, storage

if TYPE_CHECKING:
    from imagemill.system.storage import Store

_log = logging.getLogger(__name__)

_NONCED = re.compile(r"(.+)-([0-9a-f]{16})(\.[^./]+)")
_NONCE_BYTES = 8


@functools.cache
def _store(url: str) -> Store:
    return storage.open_store(url)


def foreign(paths: JobPaths) -> str | None:
    """The key of something in an object store's output that no start of ours has left; None: it is
    free. Raises: OutputError.
    """
    try:
        keys = (
            key
            for key, _ in _store(paths.url).list()
            if not any(map(files.is_system_file, key.split("/")))
        )
        return next(
            (key for key in keys if not key.startswith((f"{paths.plan.name}/", "logs/"))), None
        )
    except OSError as error:
        raise OutputError(
            f"--output {paths.url} cannot be listed: {reason(error)}. Check its name, endpoint and"
            " credentials."
        ) from error


def read(paths: JobPaths, path: Path) -> bytes:
    """A whole result. Raises: OSError, FileNotFoundError."""
    return _store(paths.url).read(paths.key(path)) if paths.url else path.read_bytes()


def exists(paths: JobPaths, path: Path) -> bool:
    """Whether a result is there. Raises: OSError where the store does not answer."""
    if not paths.url:
        return path.is_file()
    key = paths.key(path)
    return any(found == key for found, _ in _store(paths.url).list(key))


def write(
    paths: JobPaths, path: Path, data: bytes | memoryview | Iterable[bytes], *, create: bool = False
) -> None:
    """Write a result so that others see all of it or nothing.

    Args:
        paths: of the job.
        path: below its root.
        data: at once, or in pieces.
        create: in an object store, only where it is not there yet.

    Raises:
        FileExistsError: `create`, and it is there. OutputError: it cannot be written.
    """
    if not paths.url:
        files.write_whole(path, data)
        return
    whole = bytes(data) if isinstance(data, bytes | memoryview) else b"".join(data)
    try:
        _store(paths.url).put(paths.key(path), whole, create=create)
    except FileExistsError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write {paths.shown(path)}: {reason(error)}. Repeat the command once the store"
            " answers: finished parts are kept."
        ) from error


def remove(paths: JobPaths, path: Path) -> None:
    """Remove a result, if it is there. Raises: OutputError."""
    try:
        if paths.url:
            _store(paths.url).remove(paths.key(path))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot remove {paths.shown(path)}: {reason(error)}. Change its permissions and repeat"
            " the command."
        ) from error


def move(paths: JobPaths, path: Path, goal: Path) -> None:
    """Move a result to another name below the root. Raises: OutputError."""
    try:
        if paths.url:
            _store(paths.url).put(paths.key(goal), read(paths, path))
            _store(paths.url).remove(paths.key(path))
        else:
            files.make_folder(goal.parent)
            path.replace(goal)
    except OSError as error:
        raise OutputError(
            f"cannot move {paths.shown(path)} to {paths.shown(goal)}: {reason(error)}."
        ) from error


def parts(paths: JobPaths) -> dict[int, Path]:
    """Every part there is, by shard number, whatever its content. Raises: OutputError."""
    if not paths.url:
        return paths.parts()
    folder = f"{paths.predictions.name}/"
    try:
        return paths.parts_among(
            key.removeprefix(folder) for key, _ in _store(paths.url).list(folder)
        )
    except OSError as error:
        raise _unlisted(paths, error) from error


def _unlisted(paths: JobPaths, error: OSError) -> OutputError:
    folder = paths.shown(paths.predictions)
    return OutputError(
        f"{folder}/ cannot be listed: {reason(error)}. Repeat the command once the store answers."
    )


def sizes(paths: JobPaths) -> dict[str, int]:
    """Bytes of every file in `predictions/`, by name; those in folders by their path. Raises:
    OutputError.
    """
    if paths.url:
        folder = f"{paths.predictions.name}/"
        try:
            return {key.removeprefix(folder): size for key, size in _store(paths.url).list(folder)}
        except OSError as error:
            raise _unlisted(paths, error) from error
    found = {}
    for folder, _, names in os.walk(paths.predictions):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                path = Path(folder, name)
                found[str(path.relative_to(paths.predictions))] = path.lstat().st_size
    return found


def strangers(paths: JobPaths) -> list[Path]:
    """Parquet files in `predictions/` that are no parts, and that whoever reads the folder would
    read. Raises: OutputError.
    """
    known = {path.name for path in parts(paths).values()}
    names = sorted(name for name in sizes(paths) if name.endswith(".parquet") and name not in known)
    return [paths.predictions / name for name in names if not Path(name).name.startswith(".")]


def publish_plan(paths: JobPaths) -> str:
    """Put the plan, as it lies in the folder on this machine, into the store. Returns: its nonce;
    empty where the output is a folder.
    """
    if not paths.url:
        return ""
    nonce = secrets.token_hex(_NONCE_BYTES)
    for path in sorted(paths.plan.iterdir()):
        if not path.name.startswith("."):
            write(paths, path.with_name(f"{path.stem}-{nonce}{path.suffix}"), path.read_bytes())
    files.write_whole(paths.plan_nonce, nonce.encode())
    return nonce


def forget_plan(paths: JobPaths, nonce: str) -> None:
    """Take back a plan that another launcher was quicker than."""
    for key in _plan_keys(paths, nonce):
        with contextlib.suppress(OSError):
            _store(paths.url).remove(key)


def fetch_plan(paths: JobPaths, nonce: str) -> None:
    """Have the frozen job's plan in the folder on this machine, whoever else wants it there at the
    same time. Raises: OutputError.
    """
    if paths.url and _here(paths) != nonce:
        with files.in_turn(paths.fetching):
            _fetch_plan(paths, nonce)


def _fetch_plan(paths: JobPaths, nonce: str) -> None:
    if _here(paths) == nonce:
        return
    files.make_folder(paths.plan)
    paths.plan_nonce.unlink(missing_ok=True)
    for path in paths.plan.iterdir():
        path.unlink()
    try:
        for key, name in _plan_keys(paths, nonce).items():
            files.write_whole(paths.plan / name, _store(paths.url).read(key))
    except OSError as error:
        raise OutputError(
            f"the plan in {paths.url} cannot be read: {reason(error)}. Repeat the command once the"
            " store answers."
        ) from error
    files.write_whole(paths.plan_nonce, nonce.encode())


def _here(paths: JobPaths) -> str | None:
    try:
        return paths.plan_nonce.read_text()
    except OSError:
        return None


def _plan_keys(paths: JobPaths, nonce: str) -> dict[str, str]:
    """Key in the store → name in the plan's folder, of one plan's files."""
    folder = f"{paths.plan.name}/"
    found = {}
    for key, _ in _store(paths.url).list(folder):
        if (match := _NONCED.fullmatch(key.removeprefix(folder))) and match[2] == nonce:
            found[key] = match[1] + match[3]
    return found


def publish_logs(paths: JobPaths, pattern: str = "*.log", *, hasty: bool = False) -> None:
    """Put the logs beside the results. They are no result: where that fails, the log of this
    machine says so, and the others stay there.

    Args:
        paths: of the job.
        pattern: of the logs' names.
        hasty: whether the user waits for the end.
    """
    if not paths.url or paths.log_dir:
        return
    for path in sorted(paths.logs.glob(pattern)):
        try:
            _store(paths.url).put(
                paths.key(path), path.read_bytes(), policy=storage.CLOSING if hasty else None
            )
        except OSError as error:
            _log.warning("%s could not be put into %s: %s", path, paths.url, reason(error))
            return


def reason(error: OSError) -> str:
    """Why something could not be read or written, without a full stop."""
    return " ".join((error.strerror or str(error) or type(error).__name__).split()).rstrip(".")


def refuse_foreign(paths: JobPaths) -> None:
    """Raises: OutputError if the folder holds something that no start of ours has left."""
    if paths.url:
        if key := foreign(paths):
            raise OutputError(
                f"--output {paths.url} is not empty and not an imagemill job (it holds {key!r})."
                " Give a new prefix."
            )
        return
    try:
        names = {entry.name for entry in paths.root.iterdir()}
        others = sorted(name for name in names - paths.ours() if not files.is_system_file(name))
    except FileNotFoundError:
        files.missing_goal(paths.root)
        return
    except NotADirectoryError as error:
        raise OutputError(
            f"--output {paths.root} is a file, or lies below one. Give a folder."
        ) from error
    except OSError as error:
        raise OutputError(
            f"--output {paths.root} cannot be looked into: {error.strerror}. Give another --output."
        ) from error
    if others:
        raise OutputError(
            f"--output {paths.root} is not empty and not an imagemill job (it holds {others[0]!r})."
            " Give a new folder."
        )
