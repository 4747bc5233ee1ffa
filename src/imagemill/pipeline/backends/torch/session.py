"""PyTorch on NVIDIA GPUs, and on the CPU so that the same code can be tested anywhere.

PyTorch is imported by the session, in the worker process only: importing it takes seconds.
"""

from __future__ import annotations

import logging
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import DeviceError, DeviceLostError, DeviceMemoryError, ModelError
from imagemill.pipeline.backends.base import (
    Found,
    QueuedSession,
    cannot_compile,
    describe_memory_shortage,
)
from imagemill.pipeline.backends.nvidia import find_gpus
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, DeviceSpec, MemoryTraffic, Precision, SessionSpec
from imagemill.system.messages import one_line

if TYPE_CHECKING:
    from imagemill.pipeline.backends.torch.program import Loaded, Program

_log = logging.getLogger(__name__)

_INSTALL: Final = "pip install 'imagemill[torch]'"
_ALTERNATIVE: Final = {"cpu": "--devices cpu", "cuda": "--devices cuda@onnxruntime"}


class TorchSession(QueuedSession):
    """A model's graph, computed by PyTorch in batches of one size."""

    def __init__(self, spec: SessionSpec, device: DeviceSpec, clock: Stopwatch) -> None:
        if missing := _missing(device.kind):
            raise DeviceError(f"{device.name}: {missing}")
        import torch

        super().__init__(spec, clock)
        self.versions = {"torch": str(torch.__version__)}
        self.recomputed = 0
        """Images that overflowed fp16 and were computed again in fp32."""
        dtype = {
            Precision.FP32: torch.float32,
            Precision.BF16: torch.bfloat16,
            Precision.FP16: torch.float16,
        }[spec.precision]
        program = self._read(spec, device, spec.batch_size)
        self._widths = [program.shape(name)[1] for name in self._names]
        # One image at a time, so that its neighbours change no bit of it.
        single = self._read(spec, device, 1) if spec.precision is Precision.FP16 else None
        self._program, self._width = program, dtype.itemsize
        self._exact: Loaded | None = None
        self._cuda: Any = None
        self._place = "cpu"
        self._memory: tuple[int | None, int | None] = None, None
        """Free and total memory of the GPU before anything was loaded, bytes."""
        try:
            self._open(spec, device, program, single, dtype)
        except RuntimeError as error:
            from imagemill.pipeline.backends.torch.cuda import is_out_of_memory

            if device.kind == "cuda" and is_out_of_memory(error):
                need = program.memory(dtype.itemsize) + (single.memory(4) if single else 0)
                text = describe_memory_shortage(device.name, spec.batch_size, *self._memory, need)
                raise DeviceMemoryError(text) from error
            is_open = device.kind != "cuda" or self._memory[0] is not None
            if isinstance(error, torch.AcceleratorError) or not is_open:
                text = f"{device.name}: the GPU failed: {one_line(error)}"
                raise DeviceLostError(text) from error
            raise cannot_compile(spec, device, one_line(error)) from error
        self._in_flight = self._runner.in_flight
        self._log_start(spec, device)

    def _read(self, spec: SessionSpec, device: DeviceSpec, batch: int) -> Program:
        from imagemill.pipeline.backends.torch.operators.node import Unsupported
        from imagemill.pipeline.backends.torch.program import read

        other = _ALTERNATIVE[device.kind]
        try:
            pixels = (batch, *self._shape[1:])
            program = read(Path(spec.model_file), spec.card.input, pixels, self._names)
        except Unsupported as error:
            raise ModelError(
                f"{spec.model_file}: the torch backend does not know {error}. Use {other}."
            ) from error
        except Exception as error:  # onnx's, protobuf's and PyTorch's classes share no other base
            raise cannot_compile(spec, device, one_line(error)) from error
        for name in self._names:
            if len(shape := program.shape(name)) != 2 or shape[0] != batch:
                why = f"its output {name} has the shape {shape} for {batch} images"
                raise cannot_compile(spec, device, why)
        return program

    def _open(
        self,
        spec: SessionSpec,
        device: DeviceSpec,
        program: Program,
        single: Program | None,
        dtype: Any,
    ) -> None:
        import torch

        from imagemill.pipeline.backends.torch.program import CpuRunner, Loaded

        cores = len(device.cores)
        if device.kind == "cuda":
            from imagemill.pipeline.backends.torch import cuda

            cuda.prepare()
            self._cuda, self._place = cuda.open_card(device.id)
            self._memory = self._cuda.mem_get_info(self._place)
            self.versions["cuda"] = str(torch.version.cuda)
            self.versions["cudnn"] = str(torch.backends.cudnn.version())
            loaded = Loaded(program, self._place, dtype)
            self._runner: Any = cuda.CudaRunner(
                loaded,
                self._shape,
                self._cuda,
                self._place,
                spec.batches_per_step,
                clock=self._clock,
            )
        else:
            loaded = Loaded(program, self._place, dtype)
            self._runner = CpuRunner(loaded, cores, spec.batches_per_step)
        if single is not None:
            self._exact = Loaded(single, self._place, torch.float32)
        # Memory is taken now, so that whatever is wrong with the model ends the start, not a batch.
        self._runner.finish(self._runner.start(np.zeros(self._shape, np.uint8)))
        if self._exact is not None:
            self._again(np.zeros(self._shape[1:], np.uint8))

    @staticmethod
    def found(kind: str) -> Found:
        """Return the GPUs that the NVIDIA driver shows, if PyTorch is installed."""
        devices = find_gpus() if kind == "cuda" else Found(("the CPU",))
        return devices.lacking(_missing(kind))

    def _start(self, pixels: NDArray[np.uint8]) -> Any:
        return self._runner.start(pixels)

    def _collect(self, batch: Batch, ticket: Any) -> list[NDArray[np.float32]]:
        found = [values[: batch.filled] for values in self._runner.finish(ticket)]
        if self._exact is not None:
            self._replace_overflows(batch, found)
        return found

    def _replace_overflows(self, batch: Batch, found: list[NDArray[np.float32]]) -> None:
        finite = np.logical_and.reduce([np.isfinite(values).all(axis=1) for values in found])
        for row in np.flatnonzero(~finite):
            for values, exact in zip(found, self._again(batch.pixels[row]), strict=True):
                values[row] = exact
            self.recomputed += 1
            if batch.rows:  # the checks at the start have none
                self._clock.recompute()
            if self.recomputed.bit_count() == 1:  # 1, 2, 4, 8, …: a few lines, however many
                _log.warning(
                    "%d images overflowed fp16 and were computed again in fp32", self.recomputed
                )

    def _again(self, image: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Return an image's outputs in fp32."""
        import torch

        assert self._exact is not None
        from imagemill.pipeline.backends.torch.cuda import lost_if_it_fails

        with torch.inference_mode(), lost_if_it_fails():
            pixels = torch.from_numpy(image[np.newaxis].copy()).to(self._place)
            return [values.cpu().numpy()[0] for values in self._exact(pixels)]

    def memory_traffic(self) -> MemoryTraffic | None:
        """See `QueuedSession.memory_traffic`; on GPUs alone."""
        if self._cuda is None:
            return None
        from imagemill.pipeline.backends.torch.cuda import measure_copies

        moved = sum(moved for _, moved in self._program.bytes_of_steps(self._width))
        return MemoryTraffic(moved / self._shape[0], measure_copies(self._cuda, self._place))

    def close(self) -> None:
        """Let go of the device."""
        if self.recomputed:
            _log.info("%d images overflowed fp16 in all", self.recomputed)
        self._runner.close()


def _missing(kind: str) -> str | None:
    """Return what to type if PyTorch is not installed, or without CUDA. It is not imported."""
    try:
        here = util.find_spec("torch")
    except ValueError:  # a module without a spec, such as one that was blocked
        here = None
    if here is None or here.origin is None:
        return f"PyTorch is not installed: {_INSTALL}."
    if kind == "cuda" and not list(Path(here.origin).parent.glob("lib/*torch_cuda.*")):
        return f"The installed PyTorch has no CUDA: pip uninstall -y torch, then {_INSTALL}."
    return None
