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
    """A `Store` in a folder. Plan and logs are written in place."""

    paths: JobPaths
    share_hint = (
        "Give an --output on storage that all nodes share, under the same path, or in an object"
        " store (s3://…)."
    )

    def read(self, path: Path) -> bytes:
        """Return the file's bytes."""
        return path.read_bytes()

    def open(self, path: Path) -> pa.NativeFile:
        """Open the file; as bytes, because the folder's name may not be UTF-8."""
        return pa.OSFile(os.fsencode(path))

    def exists(self, path: Path) -> bool:
        """Return whether the file exists."""
        return path.is_file()

    def names(self, folder: Path) -> list[str]:
        """Return the names in the folder."""
        try:
            return sorted(path.name for path in folder.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise OutputError(f"{folder} cannot be listed: {files.reason(error)}.") from error

    def write(
        self,
        path: Path,
        data: bytes | memoryview | Iterable[bytes],
        *,
        create: bool = False,  # noqa: ARG002 - the lock of the folder makes sure
    ) -> None:
        """Write the file, then rename it into place."""
        files.write_whole(path, data)

    def remove(self, path: Path) -> None:
        """Remove the file if it exists."""
        with files.output_errors(
            f"cannot remove {path}", "Change its permissions and run the command again."
        ):
            path.unlink(missing_ok=True)

    def move(self, path: Path, goal: Path) -> None:
        """Rename the file."""
        files.make_folder(goal.parent)
        with files.output_errors(f"cannot move {path} to {goal}"):
            path.replace(goal)

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the files in `predictions/` and its sub-folders."""
        found = {}
        for folder, _, names in os.walk(self.paths.predictions):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    path = Path(folder, name)
                    found[str(path.relative_to(self.paths.predictions))] = path.lstat().st_size
        return found

    def check_unused(self) -> None:
        """Look at the names in the folder."""
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
        """Return an empty nonce: the plan is in the folder."""
        return ""

    def forget_plan(self, nonce: str, generation: int = 1) -> None:
        """Do nothing: the lock admits one launcher."""

    def fetch_plan(self, nonces: Sequence[str]) -> None:
        """Do nothing: the plan is in the folder."""

    def publish_logs(self, pattern: str = "*.log", *, hasty: bool = False) -> None:
        """Do nothing: the logs are in the folder."""
