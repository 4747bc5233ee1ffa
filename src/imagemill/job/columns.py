"""The columns of `predictions/`."""

from __future__ import annotations

import pyarrow as pa

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
"""The columns of every part, in order. Columns of `--save` follow them."""
