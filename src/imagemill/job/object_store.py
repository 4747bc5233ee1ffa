"""A job's results in an object store.

Each result is one object under the name it has in a folder, written by one PUT. A folder in the
user's cache (`JobPaths.root`) holds plan and logs while they are written, and a copy of the plan.

Two launchers on two machines share no lock and may freeze a job in one store at the same moment.
So the files of a plan carry a nonce in the store (`plan/plan-00000-00000-NONCE.parquet`), and
`job.json`, which names the nonce, is only written if it does not exist yet. The first launcher to
write it has frozen the job, and the other one continues that job. From then on they cannot harm
each other: a part that is computed twice replaces itself.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import pyarrow as pa

from imagemill.errors import NotAJobError, OutputError
from imagemill.job.paths import JobPaths
from imagemill.system import files, storage

_log = logging.getLogger(__name__)

_NONCE_NAME = re.compile(r"(.+)-([0-9a-f]{16})(\.[^./]+)")
_NONCE_BYTES = 8
_RETRY = "Run the command again once the store answers"


class ObjectStore:
    """A `Store` below a prefix of an object store, whose URL is in `paths`.

    Raises:
        UsageError: the URL is malformed, or a package is missing.
    """

    share_hint = (
        "Make sure that the node has the store's endpoint and credentials in its environment."
    )

    def __init__(self, paths: JobPaths) -> None:
        self.paths = paths
        self._objects = storage.open_bucket(paths.url)

    def read(self, path: Path) -> bytes:
        """Return the object's bytes."""
        return self._objects.read(self.paths.key(path))

    def open(self, path: Path) -> pa.NativeFile:
        """Return the whole object, in memory."""
        return pa.BufferReader(self.read(path))

    def exists(self, path: Path) -> bool:
        """Return whether the object exists."""
        key = self.paths.key(path)
        return any(found == key for found, _ in self._objects.list(key))

    def names(self, folder: Path) -> list[str]:
        """Return the last parts of the keys below the folder's."""
        prefix = f"{self.paths.key(folder)}/"
        with files.output_errors(f"{self.paths.url}/{prefix} cannot be listed", f"{_RETRY}."):
            return sorted(key.removeprefix(prefix) for key, _ in self._objects.list(prefix))

    def write(
        self, path: Path, data: bytes | memoryview | Iterable[bytes], *, create: bool = False
    ) -> None:
        """Write the object by one PUT."""
        whole = bytes(data) if isinstance(data, bytes | memoryview) else b"".join(data)
        try:
            self._objects.put(self.paths.key(path), whole, create=create)
        except FileExistsError:
            raise
        except OSError as error:
            raise OutputError(
                f"cannot write {self.paths.shown(path)}: {files.reason(error)}. {_RETRY}: finished"
                " parts are kept."
            ) from error

    def remove(self, path: Path) -> None:
        """Delete the object if it exists."""
        with files.output_errors(f"cannot remove {self.paths.shown(path)}", f"{_RETRY}."):
            self._objects.remove(self.paths.key(path))

    def move(self, path: Path, goal: Path) -> None:
        """Copy the object, then delete it."""
        with files.output_errors(
            f"cannot move {self.paths.shown(path)} to {self.paths.shown(goal)}"
        ):
            self._objects.put(self.paths.key(goal), self.read(path))
            self._objects.remove(self.paths.key(path))

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the objects below `predictions/`."""
        folder = f"{self.paths.predictions.name}/"
        with files.output_errors(f"{self.paths.url}/{folder} cannot be listed", f"{_RETRY}."):
            return {key.removeprefix(folder): size for key, size in self._objects.list(folder)}

    def check_unused(self) -> None:
        """Look at the keys below the prefix; plans and logs may be left from an earlier start."""
        known = (f"{self.paths.plan.name}/", "logs/")
        with files.output_errors(
            f"--output {self.paths.url} cannot be listed",
            "Check its name, endpoint and credentials.",
        ):
            for key, _ in self._objects.list():
                if not key.startswith(known) and not any(map(files.is_system_file, key.split("/"))):
                    raise NotAJobError(
                        f"--output {self.paths.url} is not empty and not an imagemill job (it holds"
                        f" {key!r}). Give a new prefix."
                    )

    def publish_plan(self, generation: int = 1) -> str:
        """Copy the plan's files into the store, under names with a new nonce."""
        nonce = secrets.token_hex(_NONCE_BYTES)
        folder = self.paths.generation(generation)
        for path in sorted(folder.iterdir()):
            if not path.name.startswith("."):
                self.write(folder / f"{path.stem}-{nonce}{path.suffix}", path.read_bytes())
        self._keep_nonces([*self._local_nonces()[: generation - 1], nonce])
        return nonce

    def forget_plan(self, nonce: str, generation: int = 1) -> None:
        """Delete the plan's objects."""
        with contextlib.suppress(OSError, OutputError):
            for key, _ in list(self._plan_files(nonce, generation)):
                self._objects.remove(key)

    def fetch_plan(self, nonces: Sequence[str]) -> None:
        """Copy the plan's objects to this machine; its processes take turns."""
        paths, wanted = self.paths, list(nonces)
        if self._local_nonces()[: len(wanted)] == wanted:
            return
        with files.in_turn(paths.fetching):
            same = map(operator.eq, self._local_nonces(), wanted)
            kept = len(list(takewhile(bool, same)))
            self._keep_nonces(wanted[:kept])
            with files.output_errors(f"the plan in {paths.url} cannot be read", f"{_RETRY}."):
                for number, nonce in enumerate(wanted[kept:], kept + 1):
                    files.clear_folder(paths.generation(number))
                    for key, path in self._plan_files(nonce, number):
                        files.write_whole(path, self._objects.read(key))
                    paths.gather_indices(number)
                    self._keep_nonces(wanted[:number])

    def _local_nonces(self) -> list[str]:
        try:
            return self.paths.plan_nonces.read_text().split()
        except OSError:
            return []

    def _keep_nonces(self, nonces: Sequence[str]) -> None:
        files.write_whole(self.paths.plan_nonces, " ".join(nonces).encode())

    def _plan_files(self, nonce: str, generation: int) -> Iterator[tuple[str, Path]]:
        """Yield the key in the store and the local path of each file of one generation."""
        folder = self.paths.generation(generation)
        for name in self.names(folder):
            match = _NONCE_NAME.fullmatch(name)
            if match and match[2] == nonce:
                yield self.paths.key(folder / name), folder / (match[1] + match[3])

    def publish_logs(self, pattern: str = "*.log", *, hasty: bool = False) -> None:
        """Copy the logs, unless --log-dir keeps them on this machine."""
        if self.paths.log_dir:
            return
        policy = storage.CLOSING if hasty else None
        for path in sorted(self.paths.logs.glob(pattern)):
            try:
                self._objects.put(self.paths.key(path), path.read_bytes(), policy=policy)
            except OSError as error:
                _log.warning(
                    "%s could not be copied to %s: %s", path, self.paths.url, files.reason(error)
                )
                return
