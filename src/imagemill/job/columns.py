"""The columns of `predictions/`."""

from __future__ import annotations

import os

import pyarrow as pa

from imagemill.records import Job

_TOP_K = pa.struct(
    [("class_id", pa.int32()), ("label", pa.string()), ("probability", pa.float32())]
)

_COLUMNS = [
    pa.field("index", pa.int64(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("path", pa.string(), nullable=False),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error", pa.string()),
    pa.field("class_id", pa.int32()),
    pa.field("label", pa.string()),
    pa.field("probability", pa.float32()),
    pa.field("top_k", pa.list_(_TOP_K)),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
]

COLUMNS = tuple(field.name for field in _COLUMNS)
"""The columns of every part, in order. Those of `--keep` and `--save` follow them."""


def names_of(job: Job) -> list[str]:
    """Return the names of a job's columns, in order."""
    return [
        *COLUMNS,
        *(kept.name for kept in job.keep),
        *(saved.value for saved in job.session.save),
    ]


def row_path(source: str, path: bytes) -> bytes:
    """Return what the column `path` holds. An image that is a source of its own has an empty path
    in the plan, and its file's name in the rows. Sources are named as in `job.json`.

    Example:
        >>> row_path("https://host/cats/1.jpg?size=2", b"")
        b'1.jpg'
    """
    if path or source.startswith("@"):  # a table's cell without a value has no path
        return path
    place = source.partition("?")[0] if "://" in source else source
    return os.fsencode(place.rpartition("/")[2])
