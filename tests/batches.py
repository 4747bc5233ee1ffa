"""Batches of random pixels and jobs without images, for tests of sessions."""

from __future__ import annotations

from typing import Any

import numpy as np

from imagemill.records import Batch, Bundle, Job, Limits, Precision, Row, SessionSpec, Shard, Status
from tiny import SIZE

_SHARD = Shard(0, 0, 1000, 0, "plan.parquet", 0)


def rows(filled: int) -> tuple[Row, ...]:
    """The rows of a batch whose images are all sound."""
    return tuple(
        Row(place, _SHARD, "/somewhere", f"{place}.jpg", Status.OK, None, SIZE, SIZE, place)
        for place in range(filled)
    )


def batches(
    count: int, size: int = 3, filled: int | None = None, seed: int = 0, width: int = SIZE
) -> list[Batch]:
    """Batches of random pixels; `filled` is of the last one, the others are full."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        places = size if filled is None or number < count - 1 else filled
        made.append(
            Batch(rng.integers(0, 256, (size, SIZE, width, 3), np.uint8), places, rows(places))
        )
    return made


def make_job(model: Bundle, **changes: Any) -> Job:
    """A job without sources, whose session is `make_spec`'s."""
    values: dict[str, Any] = {"output": "/nowhere", "sources": (), "variant": "model"}
    values |= {"session": make_spec(model), "num_workers": 0, "top_k": 5, "limits": Limits()}
    return Job(**(values | {"plan_id": "", "answer_id": ""} | changes))


def make_spec(model: Bundle, **changes: Any) -> SessionSpec:
    """A session with batches of three, in fp32."""
    values: dict[str, Any] = {"model_file": str(model.dir / "model.onnx"), "card": model.card}
    values |= {"precision": Precision.FP32, "batch_size": 3}
    return SessionSpec(**(values | changes))
