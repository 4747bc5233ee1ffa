"""The columns of `predictions/`."""

from __future__ import annotations

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
