"""A bundle's ONNX graph as a list of PyTorch calls with static shapes.

    pixels ─ Cast, Sub, Div ─► fp32 ─ Conv … Conv ─► the session's precision ─ Gemm ─► fp32

What depends on constants and shapes alone is computed while the graph is read. Everything before
the first convolution or matrix product stays in fp32, and so do the classifier and what follows it:
both cost next to nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from msgspec import Struct, field
from numpy.typing import NDArray

from imagemill.models.custom.outputs import live_nodes
from imagemill.pipeline.backends.torch import fusions
from imagemill.pipeline.backends.torch.operators.layout import to_tensor
from imagemill.pipeline.backends.torch.operators.node import (
    Call,
    Node,
    Tensor,
    Unsupported,
    bind,
)

if TYPE_CHECKING:
    import onnx

OPSETS: Final = range(7, 29)
"""Versions of ONNX's operators whose definitions were compared with `operators`."""
PRODUCTS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Linear")
"""Operators that a lower precision makes faster."""
_CONVOLUTIONS: Final = ("Conv", "ConvTranspose")
_VIEWS: Final = ("Transpose", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity")
"""Steps that move no bytes, at least as long as the layout allows it."""


class Step(Struct):
    """One PyTorch call."""

    kind: str
    """The ONNX operator, or the name of what several were fused to."""
    call: Call
    inputs: tuple[str | None, ...]
    """Names of the values that are passed; None for an optional one that is absent."""
    outputs: tuple[str, ...]
    is_reduced: bool = False
    """Whether it computes in the session's precision, not in fp32."""


class Program(Struct):
    """Steps, and the constants that they use. Made by `read`."""

    input: str
    outputs: tuple[str, ...]
    steps: list[Step]
    values: dict[str, Tensor]
    """Constants as float32 or integers; all other values on the device `meta`, so that their shapes
    are known.
    """
    users: Counter[str] = field(default_factory=Counter)
    """Value → how many steps and outputs use it."""

    def is_constant(self, name: str | None) -> bool:
        """Return whether a value is known before anything runs."""
        return name is not None and not self.values[name].is_meta

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a value's shape."""
        return tuple(self.values[name].shape)

    def _size(self, name: str, width: int, *, is_reduced: bool) -> int:
        value = self.values[name]
        each = width if is_reduced and value.is_floating_point() else value.element_size()
        return int(value.numel()) * each

    def memory(self, width: int) -> int:
        """Return about how many bytes it takes when it is loaded and runs: constants, and at any
        step the values that are still needed. Libraries take workspace beside that.

        Args:
            width: bytes of a number in the session's precision.
        """
        left, constants = self.users.copy(), dict[str, int]()
        alive = {self.input: int(self.values[self.input].numel())}
        peak = sum(alive.values())
        for step in self.steps:
            size = partial(self._size, width=width, is_reduced=step.is_reduced)
            alive.update((name, size(name)) for name in step.outputs if left[name])
            peak = max(peak, sum(alive.values()))
            for name in filter(None, step.inputs):
                if self.is_constant(name):
                    constants[name] = size(name)
                left[name] -= 1
                if not left[name]:
                    alive.pop(name, None)
        return sum(constants.values()) + peak

    def bytes_of_steps(self, width: int) -> Iterator[tuple[Step, int]]:
        """Yield each step that moves something, with the bytes that it reads and writes once.

        Args:
            width: bytes of a number in the session's precision.
        """
        reduced = {name for step in self.steps if step.is_reduced for name in step.outputs}
        for step in self.steps:
            if step.kind not in _VIEWS:
                moved = 0
                for name in filter(None, (*step.inputs, *step.outputs)):
                    is_weight = self.is_constant(name) and step.is_reduced
                    moved += self._size(name, width, is_reduced=is_weight or name in reduced)
                yield step, moved

    def refresh(self) -> None:
        """Drop what no output needs, and count the users of every value again."""
        needed, kept = set(self.outputs), []
        for step in reversed(self.steps):
            if needed.intersection(step.outputs):
                kept.append(step)
                needed.update(name for name in step.inputs if name is not None)
        self.steps = kept[::-1]
        self.users = Counter(self.outputs)
        for step in self.steps:
            self.users.update(name for name in step.inputs if name is not None)
        made = {name for step in self.steps for name in step.outputs}
        self.values = {
            name: value
            for name, value in self.values.items()
            if name in self.users or name in made or name == self.input
        }


def read(file: Path, pixels: str, shape: Sequence[int], outputs: Sequence[str]) -> Program:
    """Read an ONNX file.

    Args:
        file: the model.
        pixels: name of its input.
        shape: of the input, uint8: (batch, height, width, 3).
        outputs: names of the wanted outputs.

    Raises:
        Unsupported: the graph contains something that this backend does not compute. Exception: of
        onnx and PyTorch, if the file is damaged or its shapes do not fit.
    """
    import onnx

    model = onnx.load(str(file))
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    return from_model(model, pixels, torch.empty(tuple(shape), dtype=torch.uint8), outputs)


def from_model(
    model: onnx.ModelProto, entry: str, example: Tensor, outputs: Sequence[str]
) -> Program:
    """Turn an ONNX model into a program; `example` has the type and shape of its input."""
    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 1)
    if opset not in OPSETS:
        raise Unsupported(f"opset {opset} (it reads {OPSETS[0]} to {OPSETS[-1]})")
    if model.graph.sparse_initializer:
        raise Unsupported("sparse weights")
    program = Program(entry, tuple(outputs), [], _initial(model.graph, entry, example))
    with torch.no_grad():
        for node in live_nodes(model.graph, list(outputs)):
            _add(program, node, opset)
        for name in outputs:
            if name not in program.values:
                raise Unsupported(f"a graph without the output {name}")
        program.refresh()
        fusions.fuse(program)
    _choose_precisions(program)
    return program


def _initial(graph: onnx.GraphProto, entry: str, example: Tensor) -> dict[str, Tensor]:
    from onnx import numpy_helper

    values = {item.name: to_tensor(numpy_helper.to_array(item)) for item in graph.initializer}
    values[entry] = example.to("meta")
    for item in graph.input:
        if item.name not in values:
            raise Unsupported(f"a graph with the input {item.name} besides {entry}")
    return values


def _add(program: Program, node: onnx.NodeProto, opset: int) -> None:
    """Compute a node if everything it needs is constant; otherwise add it as a step."""
    from onnx import helper

    if node.domain not in ("", "ai.onnx"):
        raise Unsupported(f"operator {node.domain}.{node.op_type}")
    names = [name or None for name in node.input]
    while names and names[-1] is None:
        names.pop()
    bound = Node(
        node.op_type,
        opset,
        {item.name: helper.get_attribute_value(item) for item in node.attribute},
        [None if name is None else program.values[name] for name in names],
    )
    outputs = list(node.output)
    while outputs and not outputs[-1]:
        outputs.pop()
    bound.outputs = len(outputs)
    call = bind(bound)
    passed = [name for place, name in enumerate(names) if place not in bound.on_host]
    while passed and passed[-1] is None:
        passed.pop()
    made = run(program, call, passed)
    for name, value in zip(outputs, made, strict=False):
        program.values[name] = value
    if any(value.is_meta for value in made):
        program.steps.append(Step(node.op_type, call, tuple(passed), tuple(outputs)))


def run(program: Program, call: Call, names: Sequence[str | None]) -> tuple[Tensor, ...]:
    """Return what a call makes of values: numbers if all of them are constant, else shapes."""
    given = [None if name is None else program.values[name] for name in names]
    if any(value is not None and value.is_meta for value in given):
        given = [value if value is None else value.to("meta") for value in given]
    made = call(*given)
    return made if isinstance(made, tuple) else (made,)


def _choose_precisions(program: Program) -> None:
    """Mark the steps from the first product on that compute in the session's precision; the
    classifier and what follows it do not.
    """
    products = [number for number, step in enumerate(program.steps) if step.kind in PRODUCTS]
    end = len(program.steps)
    if len(products) > 1:
        shape = program.shape(program.steps[products[-1]].outputs[0])
        if math.prod(shape) == math.prod(shape[:2]):  # one vector per image
            end = products[-1]
    lower: set[str] = set()
    for number, step in enumerate(program.steps):
        step.is_reduced = number < end and (
            step.kind in PRODUCTS or any(name in lower for name in step.inputs)
        )
        if step.is_reduced:
            lower.update(step.outputs)


class _Bound(Struct):
    """A step whose values have places in a list."""

    call: Call
    inputs: list[int]
    outputs: list[int]
    casts: list[tuple[int, Any]]
    """Positions of inputs that are converted, and to which type."""
    ends: list[int] = []
    """Places whose value nobody needs afterwards."""


class Loaded:
    """A program on one device in one precision, ready to be called from any thread.

    Args:
        program: what to compute.
        device: as PyTorch spells it.
        dtype: of the steps that may compute in a lower precision than fp32.
    """

    def __init__(self, program: Program, device: str, dtype: torch.dtype) -> None:
        self.steps: list[_Bound] = []
        self._constants: list[Any] = [None]  # place 0: an absent input
        self._places: dict[tuple[str, torch.dtype | None], int] = {}
        self._program, self._device = program, torch.device(device)
        self._input = self._place(program.input, None)
        lower = {name for step in program.steps if step.is_reduced for name in step.outputs}
        last: dict[int, int] = {}
        for number, step in enumerate(program.steps):
            width = dtype if step.is_reduced else torch.float32
            inputs, casts = [], []
            for position, name in enumerate(step.inputs):
                if name is None:
                    inputs.append(0)
                elif program.is_constant(name):
                    inputs.append(self._constant(name, width, step, position))
                else:
                    place = self._place(name, None)
                    inputs.append(place)
                    last[place] = number
                    is_float = program.values[name].is_floating_point()
                    if is_float and (name in lower) != step.is_reduced:
                        casts.append((position, width))
            outputs = [self._place(name, None) if name else 0 for name in step.outputs]
            for place in outputs:
                last.setdefault(place, number)
            self.steps.append(_Bound(step.call, inputs, outputs, casts))
        self._outputs = [
            self._constant(name, torch.float32, None, 0)
            if program.is_constant(name)
            else self._place(name, None)
            for name in program.outputs
        ]
        for place, number in last.items():
            if place not in self._outputs and place:
                self.steps[number].ends.append(place)

    def _place(self, name: str, width: torch.dtype | None) -> int:
        key = (name, width)
        if key not in self._places:
            self._places[key] = len(self._constants)
            self._constants.append(None)
        return self._places[key]

    def _constant(self, name: str, width: torch.dtype, step: Step | None, position: int) -> int:
        value = self._program.values[name]
        place = self._place(name, width if value.is_floating_point() else None)
        if self._constants[place] is None:
            value = value.to(self._device)
            if value.is_floating_point():
                value = value.to(width)
            is_weight = step is not None and step.kind in _CONVOLUTIONS and position == 1
            if is_weight and value.dim() == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            self._constants[place] = value
        return place

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """Return the outputs, float32, for uint8 pixels (batch, height, width, 3) on the program's
        device.
        """
        values = list(self._constants)
        values[self._input] = pixels
        for step in self.steps:
            given = [values[place] for place in step.inputs]
            for position, width in step.casts:
                given[position] = given[position].to(width)
            made = step.call(*given)
            if isinstance(made, tuple):
                for place, value in zip(step.outputs, made, strict=False):
                    values[place] = value
            else:
                values[step.outputs[0]] = made
            del made, given
            for place in step.ends:
                values[place] = None
        return [values[place].float() for place in self._outputs]


class CpuRunner:
    """Computes several batches at once on CPU cores, a thread and its own cores for each.

    PyTorch's own threads wait in busy loops at every layer, so one core per batch is faster than
    all cores for each batch, and leaves the cores to the decoding threads.

    Args:
        program: loaded on the CPU.
        cores: how many it may use.
        in_flight: batches that may be started before the first is finished; 0: two per core.
    """

    def __init__(self, program: Loaded, cores: int, in_flight: int) -> None:
        self.in_flight = in_flight or 2 * cores
        at_work = min(cores, self.in_flight)
        threads = max(1, cores // at_work)
        self._program = program
        # OpenMP keeps the number per thread, so it is set in each of them.
        self._pool = ThreadPoolExecutor(at_work, "session", lambda: torch.set_num_threads(threads))

    def start(self, pixels: NDArray[np.uint8]) -> Any:
        """Start a batch; returns what `finish` is called with."""
        return self._pool.submit(self._compute, pixels)

    def finish(self, ticket: Future[list[NDArray[np.float32]]]) -> list[NDArray[np.float32]]:
        """Return a batch's outputs, which are the caller's own."""
        return ticket.result()

    def _compute(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        with torch.inference_mode():
            return [values.numpy() for values in self._program(as_tensor(pixels))]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def as_tensor(pixels: NDArray[np.uint8]) -> Any:
    """Return an array as a tensor, copied only if PyTorch does not take it: if it is read-only, or
    turned around, as a reversed batch of one image is.
    """
    is_plain = pixels.flags.writeable and min(pixels.strides) > 0
    return torch.from_numpy(pixels if is_plain else pixels.copy(order="C"))
