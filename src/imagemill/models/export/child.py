"""The child process that turns a network of transformers or timm into an ONNX file.

parent                              child
(Request, staging folder) ────────►
                          ◄──────── Exported or Failed

The older of PyTorch's two exporters is used. It needs no further package, and for 27 small networks
it took a fifth of the newer one's time (63 instead of 291 s; PyTorch 2.13.0, onnxscript 0.7.2).
"""

from __future__ import annotations

import contextlib
import logging
import resource
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from imagemill.errors import ImagemillError, ModelError
from imagemill.models import bundle as bundles
from imagemill.system import cpu, processes
from imagemill.system.messages import one_line
from imagemill.system.openvino_library import new_core

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

INPUT: Final = "pixel_values"
MAX_DIFFERENCE: Final = 1e-4
"""Between answers of the exported network and of PyTorch, as a share of the largest answer."""
_BATCHES: Final = (1, 3)
"""Batch sizes that are compared. The network is traced with 2, so neither can be built in."""
_OPSET: Final = 18
"""The first that has every operator of the networks that were tried."""
_BASE_BYTES: Final = 8 * 2**30
_COPIES: Final = 24
"""Bounds of the child's memory: what libraries take, and copies of the weights. Weights in fp16
take twice their file's size in fp32, and there are up to six copies during the export.
"""


class Request(Struct, frozen=True):
    """What to export."""

    network: str
    """A class of transformers, or a name of timm."""
    library: str
    shape: tuple[int, int, int]
    """Channels, height and width of the input."""
    shards: tuple[Path, ...]
    """The safetensors files."""


class Exported(Struct, frozen=True):
    """The last message: the file was written and compared."""

    output: str
    difference: float
    """The largest one from PyTorch's answers, as a share of the largest answer."""


def main() -> int:
    """Run the child process."""
    return processes.run_child(_work)


def _work(connection: Connection) -> None:
    request, staging = connection.recv()
    assert isinstance(request, Request)
    _limit_memory(request)
    connection.send(export(request, staging))


def _limit_memory(request: Request) -> None:
    """Keep a hostile configuration from taking the machine's memory."""
    weights = sum(shard.stat().st_size for shard in request.shards)
    limit = _BASE_BYTES + _COPIES * weights
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def export(request: Request, staging: Path) -> Exported:
    """Write `onnx/model.onnx` of a staging folder, and compare it with PyTorch.

    Raises:
        ModelError: the network cannot be loaded or exported, or answers differently.
    """
    from imagemill.models.export import networks

    with _step("its libraries cannot be imported"):
        import torch

        if request.library == "timm":
            import timm  # noqa: F401
        else:
            networks.load_transformers()
    torch.set_num_threads(len(cpu.usable_cores()))  # a child's environment asks for one
    file = staging / "onnx" / bundles.MODEL
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        with _step("it cannot be loaded"):
            network = networks.load(request, staging / "model")
            networks.simplify_pooling(network, max(request.shape[1:]))
        with _step(f"it does not run on images of {request.shape}"):
            example = torch.randn(2, *request.shape, generator=generator)
            named = networks.with_one_output(network, example)
        with _step("PyTorch cannot export it"), networks.constant_positions():
            torch.onnx.export(
                named,
                (example,),
                str(file),
                dynamo=False,
                opset_version=_OPSET,
                input_names=[INPUT],
                output_names=[named.output],
                dynamic_axes={INPUT: {0: "n"}, named.output: {0: "n"}},
            )
        with _step("the exported network does not run"):
            images = [torch.randn(n, *request.shape, generator=generator) for n in _BATCHES]
            difference = _difference(file, named, images)
    if not difference <= MAX_DIFFERENCE:  # so is NaN
        raise ModelError(
            f"the exported network's answers differ from PyTorch's by {difference:.1g} of the"
            f" largest, and {MAX_DIFFERENCE:g} is allowed."
        )
    return Exported(named.output, difference)


def _difference(file: Path, network: torch.nn.Module, batches: list[torch.Tensor]) -> float:
    """Return the largest difference of a file's answers from a network's, as a share of the largest
    answer; infinity if shapes differ.
    """
    import numpy as np

    core = new_core()
    compiled = core.compile_model(
        core.read_model(str(file)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    largest = 0.0
    for images in batches:
        expected = network(images).numpy()
        found = compiled(images.numpy())[0]
        if found.shape != expected.shape:
            return np.inf
        # an untrained network may answer 0 alone
        difference = np.abs(found - expected).max() / (np.abs(expected).max() or 1.0)
        largest = float(np.maximum(largest, difference))  # NaN stays NaN
    return largest


@contextlib.contextmanager
def _step(failed: str) -> Iterator[None]:
    """Turn any error of a library into one line, and log the whole of it."""
    try:
        yield
    except ImagemillError:
        raise
    except MemoryError as error:
        raise ModelError(f"{failed}: out of memory.") from error
    except Exception as error:
        _log.exception("%s", failed)
        text = f"{type(error).__name__}: {one_line(error)}".rstrip(".…")
        raise ModelError(f"{failed}: {text}.") from error
