"""Where a job's results are kept: a folder, or an object store.

Everything that reads or writes results goes through a `Store` and names them by their paths below
`JobPaths.root`. `open_store` is the only place that chooses between the two kinds.
"""

from __future__ import annotations

from typing import TypeAlias

from imagemill.job.folder_store import FolderStore
from imagemill.job.object_store import ObjectStore
from imagemill.job.paths import JobPaths

Store: TypeAlias = FolderStore | ObjectStore
"""The results of one job, in one place. Each result is visible to others whole or not at all.

`FolderStore` says what the methods promise in both. Errors of the storage become `OutputError`,
except where a method says otherwise.
"""


def open_store(paths: JobPaths) -> Store:
    """Return the store of a job. Nothing is read yet. Raises: UsageError for a malformed URL."""
    return ObjectStore(paths) if paths.url else FolderStore(paths)
