"""ONNX Runtime: one class for all of its execution providers, the CPU's included; several batches
in flight, answers in order.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.errors import DeviceError, DeviceLostError, DeviceMemoryError, ModelError
from imagemill.pipeline.backends.base import (
    Found,
    QueuedSession,
    cannot_compile,
    describe_memory_shortage,
)
from imagemill.pipeline.backends.nvidia import find_gpus, free_memory
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, DeviceSpec, SessionSpec
from imagemill.system.messages import one_line

_log = logging.getLogger(__name__)

_PIP = "pip install "
_OUT_OF_MEMORY = (
    "Failed to allocate memory",
    "Available memory of",
    "out of memory",
    "ALLOC_FAILED",
)
"""Parts of ONNX Runtime's and CUDA's messages about too little memory."""
_LOST = "CUDA failure "
"""Part of ONNX Runtime's messages about an error of CUDA, with its number."""
_AT_WORK = 2
"""Batches that a device other than the CPU has in flight: one computes while the next one's pixels
come.
"""


class Provider(Struct, frozen=True):
    """One execution provider: its name, the package that brings it, and its options."""

    name: str
    install: str
    """The line to type for it."""
    options: Mapping[str, Any] | None = {}
    """Beside the number of the device; None: it takes neither."""
    driver: Callable[[], Found] = lambda: Found(("device 0",))
    """Looks for the devices and what the system must bring for them."""
    library: str | None = None
    """The provider's own shared library, below `onnxruntime/capi`, whose loading shows which others
    are missing.
    """


def _amd() -> Found:
    nodes = sorted(Path("/sys/class/kfd/kfd/topology/nodes").glob("*/simd_count"))
    gpus = [node.parent.name for node in nodes if node.read_text().strip() != "0"]
    if not Path("/dev/kfd").exists() or not gpus:
        return Found(
            (),
            "No AMD GPU: /dev/kfd is not there, or shows none. Install ROCm until `rocminfo` lists"
            " the GPU.",
        )
    return Found(tuple(f"AMD GPU, node {node}" for node in gpus))


# CUDA's answers are made repeatable, and fp32 as wide as its name says. By default, its matrix
# products and convolutions are TF32 (10 bits instead of 23), and cuDNN's algorithms are chosen by a
# stopwatch at each start. Tensor cores want channels-last.
PROVIDERS: dict[str, Provider] = {
    "cpu": Provider("CPUExecutionProvider", _PIP + "'imagemill[onnxruntime]'", None),
    "cuda": Provider(
        "CUDAExecutionProvider",
        _PIP + "'imagemill[cuda]'",
        {"use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": 1},
        driver=find_gpus,
        library="libonnxruntime_providers_cuda.so",
    ),
    "rocm": Provider("MIGraphXExecutionProvider", _PIP + "onnxruntime-migraphx", driver=_amd),
    "coreml": Provider("CoreMLExecutionProvider", _PIP + "'imagemill[onnxruntime]'", None),
}
"""Kind of device → provider. A further one is a line here, and its kind in `backends.BACKENDS`."""


class OnnxRuntimeSession(QueuedSession):
    """See the module's docstring."""

    def __init__(self, spec: SessionSpec, device: DeviceSpec, clock: Stopwatch) -> None:
        provider = PROVIDERS[device.kind]
        if missing := _missing(provider):
            raise DeviceError(f"{device.name}: {missing}")
        import onnxruntime

        super().__init__(spec, clock)
        self.versions = {"onnxruntime": onnxruntime.__version__}
        self._device = device
        self._input = spec.card.input
        # As with OpenVINO, a batch a core gave more than one batch on all cores (docs/backends.md).
        # It changes no bit.
        cores = len(device.cores)
        at_work = cores if device.kind == "cpu" else _AT_WORK
        self._in_flight = spec.batches_per_step or 2 * at_work
        at_work = min(at_work, self._in_flight)
        self._session = _open(onnxruntime, spec, device, provider, threads=max(1, cores // at_work))
        self._pool = ThreadPoolExecutor(at_work, "session")
        # Engines are built and memory is taken now, so that whatever is wrong with the model ends
        # the start, not a batch.
        self._widths = [values.shape[1] for values in self._run(np.zeros(self._shape, np.uint8))]
        self._log_start(spec, device)

    @staticmethod
    def found(kind: str) -> Found:
        """See `Found`."""
        provider = PROVIDERS[kind]
        return provider.driver().lacking(_missing(provider))

    def _start(self, pixels: NDArray[np.uint8]) -> Future[list[NDArray[np.float32]]]:
        return self._pool.submit(self._run, pixels)

    def _run(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """The outputs of one batch, by name. Runs on the threads of the pool; the arrays that come
        back are its caller's.
        """
        try:
            found: list[NDArray[np.float32]] = self._session.run(self._names, {self._input: pixels})
        except Exception as error:  # the classes that ONNX Runtime raises share no other base
            _raise_if_device_failed(error, self._device, len(pixels))
            raise ModelError(
                f"{self._device.engine} cannot compute a batch of {len(pixels)}: {one_line(error)}"
            ) from error
        return found

    def _collect(
        self, batch: Batch, ticket: Future[list[NDArray[np.float32]]]
    ) -> list[NDArray[np.float32]]:
        return [np.asarray(array[: batch.filled], np.float32) for array in ticket.result()]

    def close(self) -> None:
        """See `Session.close`."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._session = None


def _missing(provider: Provider) -> str | None:
    """What the installed ONNX Runtime lacks for a provider, and the line to type."""
    if util.find_spec("onnxruntime") is None:
        return f"ONNX Runtime is not installed: {provider.install}."
    import onnxruntime

    if provider.name not in onnxruntime.get_available_providers():
        return (
            f"The installed ONNX Runtime {onnxruntime.__version__} has no {provider.name}. Exactly"
            " one of its wheels may be installed: pip uninstall -y onnxruntime, then"
            f" {provider.install}."
        )
    if provider.library and (reason := _unloadable(onnxruntime, provider.library)):
        return (
            f"{provider.name} cannot be loaded: {reason}. Install what it needs:"
            f" {provider.install}."
        )
    return None


def _unloadable(onnxruntime: Any, library: str) -> str | None:
    """Load a provider's library as ONNX Runtime itself would, and no further: nothing happens on
    the device. Why that fails, or None.
    """
    # It prints what it does not find, and stdout is for results.
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()  # the CUDA libraries that pip installed
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        for name in ("libonnxruntime_providers_shared.so", library):
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return None


def _open(
    onnxruntime: Any, spec: SessionSpec, device: DeviceSpec, provider: Provider, threads: int
) -> Any:
    """Compile the model; refuses what ONNX Runtime would do silently: go on with the CPU where the
    provider cannot be had.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Decoding threads want the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.use_deterministic_compute = True
    given = {} if provider.options is None else {"device_id": device.id, **provider.options}
    try:
        session = onnxruntime.InferenceSession(
            spec.model_file, options, providers=[(provider.name, given)], enable_fallback=0
        )
    except Exception as error:  # the classes that ONNX Runtime raises share no other base
        _raise_if_device_failed(error, device, spec.batch_size)
        raise cannot_compile(spec, device, one_line(error)) from error
    active = session.get_providers()
    if provider.name not in active:
        raise DeviceError(
            f"{device.name}: {provider.name} was asked for, ONNX Runtime {onnxruntime.__version__}"
            f" would use {', '.join(active)} instead; the log of {device.name} says why. Often"
            f" libraries are missing that come with: {provider.install}."
        )
    return session


def _raise_if_device_failed(error: Exception, device: DeviceSpec, batch_size: int) -> None:
    """Raise an error of the device's if it is the device's: DeviceMemoryError if its memory does
    not suffice, DeviceLostError if CUDA failed, after which a process cannot use the GPU again.
    """
    if device.kind != "cpu" and any(sign in str(error) for sign in _OUT_OF_MEMORY):
        free = free_memory(device.id) if device.kind == "cuda" else None
        text = describe_memory_shortage(device.name, batch_size, free)
        raise DeviceMemoryError(text) from error
    if device.kind == "cuda" and _LOST in str(error):
        raise DeviceLostError(f"{device.name}: the GPU failed: {one_line(error)}") from error
