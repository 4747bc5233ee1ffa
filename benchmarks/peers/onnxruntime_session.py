"""ONNX Runtime on the CPU: the bundle's ONNX file, or a static QDQ int8 one; without any decoding,
or with a plain Pillow loader.

The int8 file is made by `make_int8.py ort`.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import Meter, arguments, images, in_batches, load, synthetic


def session(file: str, threads: int):  # type: ignore[no-untyped-def]
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--file", help="another ONNX file than the bundle's")
    parser.add_argument("--name", default="onnxruntime fp32")
    parser.add_argument("--batch-size", type=int, default=8)
    asked = parser.parse_args()
    meter = Meter()
    opened = session(asked.file or str(Path(asked.model_dir) / "model.onnx"), asked.threads)
    name = opened.get_inputs()[0].name

    def classify(batch: np.ndarray) -> None:
        logits = opened.run(["logits"], {name: batch})[0]
        assert np.isfinite(logits).all()
        logits.argmax(axis=1)
        meter.done(len(batch))

    if asked.images is None:
        batch = synthetic(asked.batch_size)
        classify(batch)
        end = time.monotonic() + asked.seconds
        while time.monotonic() < end:
            classify(batch)
    else:
        with ThreadPoolExecutor(
            asked.threads
        ) as pool:  # the next batch is loaded while this one is computed
            batches = [
                pool.map(load, names)
                for names in in_batches(images(asked.images, asked.limit), asked.batch_size)
            ]
            for loaded in batches:
                classify(np.stack(list(loaded)))
    meter.report(asked.name)


if __name__ == "__main__":
    main()
