"""OpenVINO on the CPU, and on Intel's GPUs and NPUs: several requests in flight, answers in
order.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import ModelError
from imagemill.pipeline.backends import openvino_rewrites
from imagemill.pipeline.backends.base import Found, QueuedSession
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, DeviceSpec, Precision, SessionSpec
from imagemill.system import cpu, files
from imagemill.system.openvino_library import load_openvino, new_core

_log = logging.getLogger(__name__)


_KEPT = 8
"""Compiled models of one bundle that are kept however old they are."""
_IN_USE_S = 2 * 86_400.0
"""What was read or written so lately is not removed: a day, and another one, since file systems
note once a day that a file was read.
"""
_HINTS = {Precision.FP16: "f16", Precision.BF16: "bf16"}
_LARGE = 64
"""Images of a batch, beyond which its size may be why a model does not compile."""
_DRIVERS = {
    "gpu": (
        "Install Intel's compute driver (package intel-opencl-icd) and join the group that owns"
        " /dev/dri/renderD128. For an NVIDIA GPU: --devices cuda."
    ),
    "npu": (
        "Install Intel's NPU driver (linux-npu-driver) and join the group that owns"
        " /dev/accel/accel0."
    ),
}


def properties(precision: Precision, cores: int, kind: str = "cpu") -> dict[str, Any]:
    """Return OpenVINO's settings for `cores` CPU cores, or for another kind of device, which
    chooses its number of streams itself.

    A CPU gets one stream per core: on 2 cores, two streams of one thread gave as much as one of two
    or more (docs/performance.md). fp32 is asked for by name, because the plug-in's own choice on a
    processor with bfloat16 is bf16.
    """
    hints: dict[str, Any] = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": _HINTS.get(precision, "f32"),
    }
    if kind == "cpu":
        hints |= {"INFERENCE_NUM_THREADS": cores, "NUM_STREAMS": cores}
    return hints


def fold_constants(model: Any) -> None:
    """Around the weights of grouped convolutions ONNX's front end leaves arithmetic."""
    from openvino.passes import ConstantFolding, Manager

    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(model)


def _device_name(kind: str, number: int) -> str:
    """A device as OpenVINO spells it. Of NPUs it knows only one."""
    return f"{kind.upper()}.{number}" if kind == "gpu" else kind.upper()


def _compiled(core: Any, model: Any, name: str, hints: dict[str, Any]) -> Any:
    """Compile a model; without the cache where that was in the way: another worker may have put the
    same blob there at the same moment.
    """
    try:
        return core.compile_model(model, name, hints)
    except RuntimeError as error:
        if "filesystem error" not in str(error):
            raise
        _log.warning("compiled without the cache: %s", str(error).strip().splitlines()[-1])
        core.set_property({"CACHE_DIR": ""})
        return core.compile_model(model, name, hints)


class OpenVinoSession(QueuedSession):
    """See the module's docstring."""

    def __init__(self, spec: SessionSpec, device: DeviceSpec, clock: Stopwatch) -> None:
        ov = load_openvino()
        self._ov = ov
        super().__init__(spec, clock)
        self.versions = {"openvino": ov.get_version().split("-")[0]}
        core = new_core()
        # A models folder may be another user's, or read-only: then each start compiles.
        if spec.cache_dir and files.can_be_written(Path(spec.cache_dir)):
            core.set_property({"CACHE_DIR": spec.cache_dir})
        try:
            model = core.read_model(spec.model_file)
            for result in list(model.get_results()):
                if result.input(0).get_source_output().get_names().isdisjoint(self._names):
                    model.remove_result(result)
            model.reshape({spec.card.input: list(self._shape)})
            channels = openvino_rewrites.wanted(spec.precision, cpu.flags())
            if device.kind == "cpu" and channels:
                fold_constants(model)
                openvino_rewrites.merge(ov, model, channels, "f32")
            name = _device_name(device.kind, device.id)
            hints = properties(spec.precision, len(device.cores), kind=device.kind)
            if device.floating and device.kind == "cpu":
                # Else two such processes keep their threads on the same first cores.
                hints["ENABLE_CPU_PINNING"] = False
            compiled = _compiled(core, model, name, hints)
            if spec.cache_dir:
                _prune(Path(spec.cache_dir))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            if (size := spec.batch_size) > _LARGE:
                reason += f". It was for batches of {size}: repeat the command with a smaller"
                reason += " --batch-size"
            raise ModelError(f"{spec.model_file} cannot be compiled: {reason}") from error
        self._ports = [compiled.output(name) for name in self._names]
        self._widths = [port.shape[1] for port in self._ports]
        best = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._in_flight = spec.batches_per_step or 2 * max(1, best)
        self._free = deque(compiled.create_infer_request() for _ in range(self._in_flight))
        self._log_start(spec, device)

    @staticmethod
    def found(kind: str) -> Found:
        """See `Found`."""
        core = new_core()
        names = [name for name in core.available_devices if name.partition(".")[0] == kind.upper()]
        if not names:
            others = ", ".join(core.available_devices) or "none"
            return Found(
                (), f"OpenVINO finds no {kind.upper()} (it finds: {others}). {_DRIVERS[kind]}"
            )
        return Found(tuple(str(core.get_property(name, "FULL_DEVICE_NAME")) for name in names))

    def _start(self, pixels: NDArray[np.uint8]) -> Any:
        request = self._free.popleft()
        request.set_input_tensor(self._ov.Tensor(pixels, shared_memory=True))
        request.start_async()
        return request

    def _collect(self, batch: Batch, ticket: Any) -> list[NDArray[np.float32]]:
        ticket.wait()
        # Copied: the request's memory is used again.
        tensors = map(ticket.get_tensor, self._ports)
        found = [tensor.data[: batch.filled].copy() for tensor in tensors]
        self._free.append(ticket)
        return found

    def close(self) -> None:
        """See `Session.close`."""
        self._free.clear()


def _prune(folder: Path) -> None:
    """Remove the compiled models that were used longest ago: each batch size, precision and version
    of OpenVINO leaves one of its own.
    """
    found = []
    for blob in folder.glob("*.blob"):
        with contextlib.suppress(OSError):
            about = blob.stat()
            found.append((max(about.st_atime, about.st_mtime), blob))
    before = time.time() - _IN_USE_S
    for used, blob in sorted(found)[:-_KEPT]:
        if used < before:
            with contextlib.suppress(OSError):
                blob.unlink()
                since = time.ctime(used)
                _log.info("removed %s, a compiled model that was not used since %s", blob, since)
