"""Ray Data + ONNX Runtime, as Ray's guide to batch inference does it: read_images, a map that
prepares, map_batches with a class, Parquet.

`--concurrency` sessions of `--threads` threads each. Usage statistics are off.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
from common import arguments, begun, images, prepare, print_line

HERE = str(Path(__file__).resolve().parent)


def prepared(row: dict) -> dict:
    from PIL import Image

    return {"path": row["path"], "pixels": prepare(Image.fromarray(row["image"]))}


class Classifier:
    def __init__(self, file: str, threads: int) -> None:
        from onnxruntime_session import session

        self._session = session(file, threads)
        self._input = self._session.get_inputs()[0].name

    def __call__(self, batch: dict) -> dict:
        logits = self._session.run(
            ["logits"], {self._input: np.ascontiguousarray(batch["pixels"])}
        )[0]
        return {
            "path": batch["path"],
            "class_id": logits.argmax(axis=1),
            "done_s": np.full(len(logits), time.monotonic()),
        }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    asked = parser.parse_args()
    start = begun()
    import ray

    cores = len(os.sched_getaffinity(0))
    ray.init(
        num_cpus=max(cores, asked.concurrency + 1),
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": HERE, "RAY_USAGE_STATS_ENABLED": "0"}},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    file = str((Path(asked.model_dir) / "model.onnx").resolve())
    with tempfile.TemporaryDirectory() as output:
        found = ray.data.read_images(
            images(asked.images, asked.limit), mode="RGB", include_paths=True
        )
        found = found.map(prepared).map_batches(
            Classifier,
            fn_constructor_kwargs={"file": file, "threads": asked.threads},
            batch_size=asked.batch_size,
            concurrency=asked.concurrency,
            num_cpus=1,
        )
        found.write_parquet(output)
        seconds = time.monotonic() - start
        import pyarrow.parquet as pq

        done = pq.read_table(output, columns=["done_s"])["done_s"].to_numpy()
    ray.shutdown()
    first, last = done.min(), done.max()
    steady = float((done > first).sum() / (last - first)) if last > first else None
    print_line(
        f"ray data, {asked.concurrency} × {asked.threads} threads",
        len(done),
        seconds,
        steady,
        ray=ray.__version__,
    )


if __name__ == "__main__":
    main()
