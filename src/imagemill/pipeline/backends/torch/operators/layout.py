"""Operators that move numbers, or make constants and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own abbreviation

from imagemill.pipeline.backends.torch.operators.node import (
    Call,
    Held,
    Node,
    Tensor,
    as_ints,
    operator,
)


def to_tensor(values: np.ndarray) -> Tensor:
    """Return an array as a tensor; every floating-point type becomes float32."""
    array = np.asarray(values)
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    elif array.dtype in (np.uint16, np.uint32, np.uint64):
        array = array.astype(np.int64)
    # PyTorch warns about memory that it must not write to, such as the file's.
    return torch.from_numpy(np.array(array, order="C"))


@operator("Constant")
def _constant(node: Node) -> Call:
    from onnx import numpy_helper

    for name in ("value_float", "value_floats", "value_int", "value_ints"):
        found = node.attribute(name, None)
        if found is not None:
            kind = np.float32 if "float" in name else np.int64
            value = to_tensor(np.asarray(found, kind))
            break
    else:
        value = to_tensor(numpy_helper.to_array(node.attribute("value")))
    return lambda: value


@operator("ConstantOfShape")
def _constant_of_shape(node: Node) -> Call:
    from onnx import numpy_helper

    value = node.attribute("value", None)
    fill = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    shape = as_ints(node.host(0))
    return lambda: to_tensor(np.broadcast_to(fill.reshape(()), shape))


@operator("Shape")
def _shape(node: Node) -> Call:
    found = torch.tensor(
        node.shape()[node.attribute("start", 0) : node.attribute("end", None)], dtype=torch.int64
    )
    node.on_host.add(0)
    return lambda: found


@operator("Size")
def _size(node: Node) -> Call:
    found = torch.tensor(math.prod(node.shape()), dtype=torch.int64)
    node.on_host.add(0)
    return lambda: found


@operator("Range")
def _range(node: Node) -> Call:
    start, limit, step = (node.host(index).item() for index in range(3))  # type: ignore[union-attr]
    values = to_tensor(np.arange(start, limit, step))
    return lambda: values


@operator("Dropout")
def _dropout(node: Node) -> Call:
    node.ignore("ratio", "seed", "is_test")
    training = node.host(2)
    node.require(training is None or not training.any(), "in training mode")
    node.host(1)
    if node.outputs == 1:
        return lambda x: x
    return lambda x: (x, torch.ones_like(x, dtype=torch.bool))


@operator("Transpose")
def _transpose(node: Node) -> Call:
    order = node.attribute("perm", None) or list(range(node.rank()))[::-1]
    return lambda x: x.permute(order)


@operator("Flatten")
def _flatten(node: Node) -> Call:
    axis, shape = node.attribute("axis", 1), node.shape()
    axis = axis + len(shape) if axis < 0 else axis
    goal = (math.prod(shape[:axis]), math.prod(shape[axis:]))
    return lambda x: x.reshape(goal)


@operator("Reshape")
def _reshape(node: Node) -> Call:
    goal, shape = as_ints(node.host(1)), node.shape()
    if not node.attribute("allowzero", 0):
        goal = [shape[place] if size == 0 else size for place, size in enumerate(goal)]
    return lambda x: x.reshape(goal)


@operator("Squeeze")
def _squeeze(node: Node) -> Call:
    axes = node.integers(1, "axes", since=13)
    shape = node.shape()
    gone = (
        {place for place, size in enumerate(shape) if size == 1}
        if not axes
        else {axis % len(shape) for axis in axes}
    )
    node.require(all(shape[axis] == 1 for axis in gone), "of an axis longer than 1")
    goal = [size for place, size in enumerate(shape) if place not in gone]
    return lambda x: x.reshape(goal)


@operator("Unsqueeze")
def _unsqueeze(node: Node) -> Call:
    axes = node.integers(1, "axes", since=13) or []
    rank = node.rank() + len(axes)
    goal = list(node.shape())
    for axis in sorted(axis % rank for axis in axes):
        goal.insert(axis, 1)
    return lambda x: x.reshape(goal)


@operator("Concat")
def _concat(node: Node) -> Call:
    axis = node.attribute("axis")
    return lambda *inputs: torch.cat(inputs, axis)


@operator("Split")
def _split(node: Node) -> Call:
    axis = node.attribute("axis", 0)
    parts = node.integers(1, "split", since=13)
    count = node.attribute("num_outputs", None) or node.outputs
    if parts is None:
        length = node.shape()[axis]
        each = -(-length // count)
        parts = [min(each, max(0, length - each * number)) for number in range(count)]
    return lambda x: tuple(torch.split(x, parts, axis))


@operator("Slice")
def _slice(node: Node) -> Call:
    shape = node.shape()
    starts = node.integers(1, "starts", since=10)
    ends = node.integers(2, "ends", since=10)
    axes = node.integers(3, "axes", since=10)
    steps = node.integers(4, "steps", since=10) if node.opset >= 10 else None
    assert starts is not None
    assert ends is not None
    cuts = [slice(None)] * len(shape)
    backwards: list[int] = []
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = (axes[place] if axes else place) % len(shape)
        step = steps[place] if steps else 1
        first = max(start, -shape[axis]) if step < 0 else start  # unlike in Python
        last = None if step < 0 and end < -shape[axis] else end  # below the first number: all of it
        chosen = range(*slice(first, last, step).indices(shape[axis]))
        if step > 0:
            cuts[axis] = slice(chosen.start, max(chosen.start, chosen.stop), step)
        else:  # PyTorch slices forwards only: the same numbers, then turned around
            kept = chosen[::-1]
            cuts[axis] = slice(kept.start, max(kept.start, kept.stop), -step)
            backwards.append(axis)
    index = tuple(cuts)
    if backwards:
        return lambda x: x[index].flip(backwards)
    return lambda x: x[index]


@operator("Gather")
def _gather(node: Node) -> Call:
    axis = node.attribute("axis", 0)
    length = node.shape()[axis]
    if not node.values[1].is_meta:
        chosen = np.asarray(node.host(1))
        node.require(bool((np.abs(chosen + 0.5) < length).all()), "with an index out of range")
        chosen = chosen % length if length else chosen
        if chosen.ndim == 0:
            return lambda x: x.select(axis, int(chosen))
        places = Held(chosen.reshape(-1).astype(np.int64))
        shape = node.shape()
        axis %= len(shape)
        goal = (*shape[:axis], *chosen.shape, *shape[axis + 1 :])
        return lambda x: x.index_select(axis, places.on(x)).reshape(goal)

    def gather(x: Tensor, index: Tensor) -> Tensor:
        place = axis % x.dim()
        chosen = torch.where(index < 0, index + length, index).long()
        goal = (*x.shape[:place], *index.shape, *x.shape[place + 1 :])
        return x.index_select(place, chosen.reshape(-1)).reshape(goal)

    return gather


@operator("GatherElements")
def _gather_elements(node: Node) -> Call:
    axis = node.attribute("axis", 0)
    length = node.shape()[axis]
    return lambda x, index: torch.gather(
        x, axis, torch.where(index < 0, index + length, index).long()
    )


@operator("ScatterND")
def _scatter_nd(node: Node) -> Call:
    reduction = node.attribute("reduction", "none")
    node.require(reduction == "none", f"with reduction={reduction}")
    index = np.asarray(node.host(1))
    places = [Held(np.ascontiguousarray(index[..., axis])) for axis in range(index.shape[-1])]

    def scatter(x: Tensor, updates: Tensor) -> Tensor:
        return torch.index_put(x, [place.on(x) for place in places], updates.to(x.dtype))

    return scatter


@operator("Expand")
def _expand(node: Node) -> Call:
    goal = torch.broadcast_shapes(node.shape(), tuple(as_ints(node.host(1))))
    return lambda x: x.expand(goal)


@operator("Tile")
def _tile(node: Node) -> Call:
    repeats = as_ints(node.host(1))
    return lambda x: x.repeat(repeats)


@operator("Trilu")
def _trilu(node: Node) -> Call:
    offset = node.host(1)
    diagonal = 0 if offset is None else int(offset.reshape(()))
    function = torch.triu if node.attribute("upper", 1) else torch.tril
    return lambda x: function(x, diagonal)


@operator("DepthToSpace")
def _depth_to_space(node: Node) -> Call:
    size, mode = node.attribute("blocksize"), node.attribute("mode", "DCR")
    n, c, h, w = node.shape()
    deep = c // size**2
    if mode == "CRD":
        return lambda x: F.pixel_shuffle(x, size)
    return lambda x: (
        x.reshape(n, size, size, deep, h, w)
        .permute(0, 3, 4, 1, 5, 2)
        .reshape(n, deep, h * size, w * size)
    )


@operator("SpaceToDepth")
def _space_to_depth(node: Node) -> Call:
    size = node.attribute("blocksize")
    n, c, h, w = node.shape()
    return lambda x: (
        x.reshape(n, c, h // size, size, w // size, size)
        .permute(0, 3, 5, 1, 2, 4)
        .reshape(n, c * size**2, h // size, w // size)
    )


@operator("Pad")
def _pad(node: Node) -> Call:
    mode = node.attribute("mode", "constant")
    rank = node.rank()
    if node.opset < 11:
        pads, value = list(node.attribute("pads")), node.attribute("value", 0.0)
        axes = list(range(rank))
    else:
        pads = as_ints(node.host(1))
        fill = node.host(2)
        value = 0 if fill is None else fill.reshape(()).item()
        given = node.host(3) if node.opset >= 18 else None
        axes = list(range(rank)) if given is None else [axis % rank for axis in as_ints(given)]
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        before[axis], after[axis] = pads[place], pads[place + len(axes)]
    if mode == "constant":
        sides = [side for axis in reversed(range(rank)) for side in (before[axis], after[axis])]
        return lambda x: F.pad(x, sides, value=value)
    node.require(mode in ("reflect", "edge", "wrap"), f"with mode={mode}")
    # NumPy's padding of the positions says which number goes where.
    shape = node.shape()
    sources = {
        axis: np.pad(
            np.arange(shape[axis]), (max(0, before[axis]), max(0, after[axis])), mode=mode
        )[max(0, -before[axis]) :]
        for axis in range(rank)
        if before[axis] or after[axis]
    }
    places = {
        axis: Held(found[: len(found) + min(0, after[axis])]) for axis, found in sources.items()
    }

    def pad(x: Tensor) -> Tensor:
        for axis, index in places.items():
            x = x.index_select(axis, index.on(x))
        return x

    return pad


_ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda position: np.ceil(position - 0.5),
    "round_prefer_ceil": lambda position: np.floor(position + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@operator("Resize", "Upsample")
def _resize(node: Node) -> Call:
    shape = node.shape()
    mode = node.attribute("mode", "nearest")
    scales, sizes = _scales_and_sizes(node)
    transform = node.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = node.attribute("nearest_mode", "round_prefer_floor")
    if node.opset < 11:
        transform, rounding = "asymmetric", "floor"
    coefficient = node.attribute("cubic_coeff_a", -0.75)
    outside = bool(node.attribute("exclude_outside", 0))
    node.ignore("extrapolation_value")
    node.require(not node.attribute("antialias", 0), "with antialias=1")
    node.require(mode in ("nearest", "linear", "cubic"), f"with mode={mode}")
    node.require(not outside or mode == "cubic", f"with exclude_outside=1 and mode={mode}")
    known = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    node.require(transform in known, f"with coordinate_transformation_mode={transform}")
    node.require(rounding in _ROUNDINGS, f"with nearest_mode={rounding}")
    steps: list[Call] = []
    for axis, (length, goal) in enumerate(zip(shape, sizes, strict=True)):
        if scales[axis] == 1 and goal == length:
            continue
        position = _positions(length, goal, scales[axis], transform)
        if mode == "nearest":
            index = np.clip(_ROUNDINGS[rounding](position), 0, length - 1).astype(np.int64)
            steps.append(_picking(axis, index))
        elif mode == "linear":
            steps.append(_blending(axis, np.clip(position, 0, length - 1), length, len(shape)))
        else:
            steps.append(_mixing(axis, _cubic_weights(position, length, coefficient, outside)))

    def resize(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return resize


def _picking(axis: int, index: np.ndarray) -> Call:
    """Return what takes one number for each number of the result."""
    places = Held(index)
    return lambda x: x.index_select(axis, places.on(x))


def _blending(axis: int, position: np.ndarray, length: int, rank: int) -> Call:
    """Return what blends two neighbours for each number of the result."""
    first = np.floor(position).astype(np.int64)
    share = (position - first).reshape([-1 if other == axis else 1 for other in range(rank)])
    low, high = Held(first), Held(np.minimum(first + 1, length - 1))
    weight = Held(share.astype(np.float32))

    def blend(x: Tensor) -> Tensor:
        pair = (x.index_select(axis, places.on(x)) for places in (low, high))
        return torch.lerp(*pair, weight.on(x).to(x.dtype))

    return blend


def _mixing(axis: int, weights: np.ndarray) -> Call:
    """Return what makes each number of the result of all numbers along an axis."""
    matrix = Held(weights.astype(np.float32))
    return lambda x: torch.matmul(
        x.movedim(axis, -1), matrix.on(x).to(x.dtype).transpose(0, 1)
    ).movedim(-1, axis)


def _cubic_weights(
    position: np.ndarray, length: int, coefficient: float, exclude_outside: bool
) -> np.ndarray:
    """Return a matrix (new length, length) of Keys' cubic convolution.

    Neighbours beyond the border have the border's number, or no weight.
    """
    weights = np.zeros((len(position), length))
    rows = np.arange(len(position))
    for offset in (-1, 0, 1, 2):
        place = np.floor(position) + offset
        t = np.abs(position - place)
        near = ((coefficient + 2) * t - (coefficient + 3)) * t * t + 1
        far = ((t - 5) * t + 8) * t * coefficient - 4 * coefficient
        share = np.where(t <= 1, near, far)
        inside = (place >= 0) & (place < length)
        share = np.where(inside | (not exclude_outside), share, 0)
        np.add.at(weights, (rows, np.clip(place, 0, length - 1).astype(np.int64)), share)
    return weights / weights.sum(axis=1, keepdims=True) if exclude_outside else weights


def _scales_and_sizes(node: Node) -> tuple[list[float], list[int]]:
    """Return the factor and the new length of each axis."""
    shape = node.shape()
    given: np.ndarray | None
    wanted: np.ndarray | None = None
    if node.opset < 9 and node.kind == "Upsample":
        given = np.asarray(node.attribute("scales"))
    elif node.opset < 11:
        given = node.host(1)
    else:
        given, wanted = node.host(2), node.host(3)
        node.host(1)  # the region of interest, which only `tf_crop_and_resize` uses
    policy = node.attribute("keep_aspect_ratio_policy", "stretch")
    node.require(policy == "stretch", f"with keep_aspect_ratio_policy={policy}")
    axes = [axis % len(shape) for axis in node.attribute("axes", None) or range(len(shape))]
    scales, sizes = [1.0] * len(shape), list(shape)
    for place, axis in enumerate(axes):
        if given is not None and given.size:
            scales[axis] = float(given[place])
            sizes[axis] = int(np.float32(shape[axis]) * np.float32(given[place]))
        else:
            assert wanted is not None
            sizes[axis] = int(wanted[place])
            scales[axis] = sizes[axis] / shape[axis]
    return scales, sizes


def _positions(length: int, goal: int, scale: float, transform: str) -> np.ndarray:
    """Return where in the original each number of the result lies, in the float32 of ONNX Runtime
    and OpenVINO: with a scale of 1/3, rounding decides which number is the nearest.
    """
    place, one = np.arange(goal, dtype=np.float32), np.float32(1)
    if transform == "asymmetric":
        return place / np.float32(scale)
    if transform == "align_corners":
        return place * np.float32(length - 1) / np.float32(goal - 1) if goal != 1 else place * 0
    if transform == "pytorch_half_pixel" and goal == 1:
        return place * 0
    return (place + one / 2) / np.float32(scale) - one / 2
