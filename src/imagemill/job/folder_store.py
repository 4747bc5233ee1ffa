"""A job's results in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
from msgspec import Struct

from imagemill.errors import NotAJobError, OutputError
from imagemill.job.paths import JobPaths
from imagemill.system import files


class FolderStore(Struct, frozen=True):
    """A `Store` in a folder. Plan and logs are in place, so publishing them does nothing."""

    paths: JobPaths
    share_hint = (
        "Give an --output on storage that all nodes share, under the same path, or in an object"
        " store (s3://…)."
    )
    """What to do if another machine does not see the same results."""

    def read(self, path: Path) -> bytes:
        """Return a whole result. Raises: OSError, FileNotFoundError."""
        return path.read_bytes()

    def open(self, path: Path) -> pa.NativeFile:
        """Return a result as a file for Arrow. Raises: OSError."""
        return pa.OSFile(os.fsencode(path))  # the folder's name may not be UTF-8

    def exists(self, path: Path) -> bool:
        """Return whether a result exists. Raises: OSError if the store does not answer."""
        return path.is_file()

    def names(self, folder: Path) -> list[str]:
        """Return the names of the files in a folder of results, sorted."""
        with (
            files.output_errors(f"{folder} cannot be listed"),
            contextlib.suppress(FileNotFoundError),
        ):
            return sorted(path.name for path in folder.iterdir())
        return []

    def write(
        self,
        path: Path,
        data: bytes | memoryview | Iterable[bytes],
        *,
        create: bool = False,  # noqa: ARG002
    ) -> None:
        """Write a result, at once or in pieces.

        Raises:
            FileExistsError: `create` is set, and an object store has the result already. In a
            folder the lock makes sure that nobody else creates it.
        """
        files.write_whole(path, data)

    def remove(self, path: Path) -> None:
        """Remove a result if it exists."""
        with files.output_errors(
            f"cannot remove {path}", "Change its permissions and run the command again."
        ):
            path.unlink(missing_ok=True)

    def move(self, path: Path, goal: Path) -> None:
        """Give a result another name below the root."""
        files.make_folder(goal.parent)
        with files.output_errors(f"cannot move {path} to {goal}"):
            path.replace(goal)

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file in `predictions/`, by its path there."""
        found = {}
        for folder, _, names in os.walk(self.paths.predictions):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    path = Path(folder, name)
                    found[str(path.relative_to(self.paths.predictions))] = path.lstat().st_size
        return found

    def check_unused(self) -> None:
        """Raise OutputError if the place holds anything that an earlier start has not left."""
        root = self.paths.root
        try:
            names = {entry.name for entry in root.iterdir()}
        except FileNotFoundError:
            files.missing_goal(root)
            return
        except NotADirectoryError as error:
            raise NotAJobError(
                f"--output {root} is a file, or is inside one. Give a folder."
            ) from error
        except OSError as error:
            raise OutputError(
                f"--output {root} cannot be listed: {error.strerror}. Give another --output."
            ) from error
        others = sorted(
            name for name in names - self.paths.ours() if not files.is_system_file(name)
        )
        if others:
            raise NotAJobError(
                f"--output {root} is not empty and not an imagemill job (it holds {others[0]!r})."
                " Give a new folder."
            )

    def publish_plan(self, generation: int = 1) -> str:  # noqa: ARG002 - all are in the folder
        """Make one generation's plan on this machine visible to others. Return its nonce, empty in
        a folder.
        """
        return ""

    def forget_plan(self, nonce: str, generation: int = 1) -> None:
        """Remove a published plan because another launcher froze the generation first."""

    def fetch_plan(self, nonces: Sequence[str]) -> None:
        """Bring the plan to this machine as far as it is not here yet. Takes the nonces of all
        generations.
        """

    def publish_logs(self, pattern: str = "*.log", *, hasty: bool = False) -> None:
        """Copy logs of this machine to the results. A failure is only logged.

        Args:
            pattern: of the logs' names.
            hasty: give up early, because the user waits for the end.
        """
