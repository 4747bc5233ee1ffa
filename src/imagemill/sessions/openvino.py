"""OpenVINO on the CPU: several requests in flight, answers in order."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import ModelError
from imagemill.records import Batch, DeviceSpec, Job, Outputs, Precision, Saved
from imagemill.stopwatch import Stopwatch

_log = logging.getLogger(__name__)


def load_openvino() -> Any:
    """Import OpenVINO with its telemetry off: importing it otherwise sends an event."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def properties(precision: Precision, cores: int, streams: int | None = None) -> dict[str, Any]:
    """How OpenVINO compiles for `cores` CPU cores.

    One stream a core: on 2 cores two streams of one thread gave as much as one of two or more (docs/performance.md). fp32 is asked for by
    name, since the plug-in's own choice on a processor with bfloat16 is bf16.
    """
    return {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": "bf16" if precision is Precision.BF16 else "f32",
        "INFERENCE_NUM_THREADS": cores,
        "NUM_STREAMS": streams or cores,
    }


class OpenVinoSession:
    """See the module's docstring."""

    backend = "openvino"

    def __init__(self, job: Job, device: DeviceSpec, clock: Stopwatch) -> None:
        ov = load_openvino()
        self._ov = ov
        self.versions = {"openvino": ov.get_version().split("-")[0]}
        self._clock = clock
        size = job.card.recipe.size
        self._shape = (job.batch_size, size, size, 3)
        self._with_embedding = Saved.EMBEDDING in job.save
        core = ov.Core()
        if job.cache_dir and _can_be_written(Path(job.cache_dir)):
            core.set_property({"CACHE_DIR": job.cache_dir})
        try:
            model = core.read_model(job.model_file)
            kept = list(job.card.outputs) if self._with_embedding else ["logits"]
            for result in list(model.get_results()):
                if not set(result.output(0).get_node().input(0).get_source_output().get_names()) & set(kept):
                    model.remove_result(result)
            model.reshape({job.card.input: list(self._shape)})
            compiled = core.compile_model(model, "CPU", properties(job.precision, len(device.cores)))
        except RuntimeError as error:
            raise ModelError(f"{job.model_file} cannot be compiled: {str(error).strip().splitlines()[-1]}") from error
        self._logits = compiled.output("logits")
        self._embedding = compiled.output("embedding") if self._with_embedding else None
        in_flight = job.batches_per_step or 2 * max(1, int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")))
        self._free = deque(compiled.create_infer_request() for _ in range(in_flight))
        _log.info("compiled %s for %s: %d batches of %d in flight", job.model_file, device.name, in_flight, job.batch_size)

    def stream(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Outputs]]:
        """See `Session.stream`."""
        busy: deque[tuple[Batch, Any]] = deque()
        for batch in batches:
            if batch.pixels.shape != self._shape or batch.pixels.dtype != np.uint8:
                raise ModelError(f"batch of {batch.pixels.dtype} {batch.pixels.shape} for a session compiled for uint8 {self._shape}")
            while not self._free:
                yield self._finish(*busy.popleft())
            request = None
            if batch.filled:
                request = self._free.popleft()
                request.set_input_tensor(self._ov.Tensor(batch.pixels, shared_memory=True))
                request.start_async()
            busy.append((batch, request))
        while busy:
            yield self._finish(*busy.popleft())

    def _finish(self, batch: Batch, request: Any) -> tuple[Batch, Outputs]:
        if request is not None:
            begun = time.perf_counter()
            request.wait()
            self._clock.add("compute", time.perf_counter() - begun)

        def output(port: Any) -> NDArray[np.float32]:
            if request is None:
                return np.empty((0, port.shape[1]), np.float32)
            values: NDArray[np.float32] = request.get_tensor(port).data[: batch.filled].copy()  # the request's memory is used again
            return values

        outputs = Outputs(output(self._logits), output(self._embedding) if self._embedding else None)
        if request is not None:
            self._free.append(request)
        return batch, outputs

    def close(self) -> None:
        """See `Session.close`."""
        self._free.clear()


def _can_be_written(folder: Path) -> bool:
    """Make a folder. A models folder may be another user's, or read-only: then models are compiled anew at each start."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
