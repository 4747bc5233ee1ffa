"""Where a job's results are kept: a folder, or an object store.

Everything that reads or writes results goes through a `Store` and names them by their paths below
`JobPaths.root`. `open_store` is the only place that chooses between the two kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from imagemill.job.folder_store import FolderStore
from imagemill.job.object_store import ObjectStore

if TYPE_CHECKING:
    import pyarrow as pa

    from imagemill.job.paths import JobPaths


class Store(Protocol):
    """The results of one job, in one place. Each result is visible to others whole or not at all.

    Errors of the storage become `OutputError`, except where a method says otherwise.
    """

    @property
    def paths(self) -> JobPaths:
        """The names of all results."""
        ...

    @property
    def share_hint(self) -> str:
        """What to do if another machine does not see the same results, one sentence."""
        ...

    def read(self, path: Path) -> bytes:
        """Return a whole result. Raises: OSError, FileNotFoundError."""
        ...

    def open(self, path: Path) -> pa.NativeFile:
        """Return a result as a file for Arrow. Raises: OSError."""
        ...

    def exists(self, path: Path) -> bool:
        """Return whether a result exists. Raises: OSError if the store does not answer."""
        ...

    def names(self, folder: Path) -> list[str]:
        """Return the names of the files in a folder of results, sorted."""
        ...

    def write(
        self, path: Path, data: bytes | memoryview | Iterable[bytes], *, create: bool = False
    ) -> None:
        """Write a result, at once or in pieces.

        Raises:
            FileExistsError: `create` is set, and an object store has the result already. In a
            folder the lock makes sure that nobody else creates it.
        """
        ...

    def remove(self, path: Path) -> None:
        """Remove a result if it exists."""
        ...

    def move(self, path: Path, goal: Path) -> None:
        """Give a result another name below the root."""
        ...

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file in `predictions/`, by its path there."""
        ...

    def check_unused(self) -> None:
        """Raise OutputError if the place holds anything that an earlier start has not left."""
        ...

    def publish_plan(self, generation: int = 1) -> str:
        """Make one generation's plan on this machine visible to others. Return its nonce, empty in
        a folder.
        """
        ...

    def forget_plan(self, nonce: str, generation: int = 1) -> None:
        """Remove a published plan because another launcher froze the generation first."""
        ...

    def fetch_plan(self, nonces: Sequence[str]) -> None:
        """Bring the plan to this machine as far as it is not here yet. Takes the nonces of all
        generations.
        """
        ...

    def publish_logs(self, pattern: str = "*.log", *, hasty: bool = False) -> None:
        """Copy logs of this machine to the results. A failure is only logged.

        Args:
            pattern: of the logs' names.
            hasty: give up early, because the user waits for the end.
        """
        ...


def open_store(paths: JobPaths) -> Store:
    """Return the store of a job. Nothing is read yet. Raises: UsageError for a malformed URL."""
    return ObjectStore(paths) if paths.url else FolderStore(paths)
