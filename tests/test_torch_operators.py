"""Every operator of the PyTorch backend, with random attributes, against ONNX's own implementation
and ONNX Runtime, from opset 7 to the newest.

Where the two disagree, the operator's definition decides; `REFERENCE_IS_WRONG` names these cases.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

torch = pytest.importorskip("torch", reason="needs torch")
from imagemill.pipeline.backends.torch.operators.node import OPERATORS, Node, Unsupported, bind  # noqa: E402
from imagemill.pipeline.backends.torch.program import OPSETS, Loaded, from_model  # noqa: E402

pytestmark = pytest.mark.ecosystem

Array = np.ndarray
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass
class Case:
    """One node: `inputs` in their order, of which the one at `variable` comes at run time; None is
    an absent optional input.
    """

    inputs: list[Array | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    variable: int = 0


def numbers(draw: Draw, shape: tuple[int, ...], low: float = -3, high: float = 3) -> Array:
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    return rng.uniform(low, high, shape).astype(np.float32)


def a_shape(draw: Draw, least: int = 1, most: int = 4) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 5), min_size=least, max_size=most)))


def some_axes(draw: Draw, rank: int) -> list[int]:
    axes = draw(st.lists(st.integers(0, rank - 1), unique=True, min_size=1))
    return [axis - rank if draw(st.booleans()) else axis for axis in axes]


def ints(values: Any) -> Array:
    return np.array(values, np.int64)


def maybe(draw: Draw, **values: Any) -> dict[str, Any]:
    """Some of these attributes."""
    return {name: value for name, value in values.items() if draw(st.booleans())}


def unary(low: float = -3, high: float = 3) -> Callable[[Draw, int], Case]:
    return lambda draw, _: Case([numbers(draw, a_shape(draw), low, high)])


def logical(draw: Draw, _: int) -> Case:
    return Case([numbers(draw, a_shape(draw)) > 0])


def broadcast(draw: Draw, kind: Any = np.float32, low: float = -3) -> Case:
    """Two inputs whose shapes broadcast, either of which may be the constant one."""
    shape = a_shape(draw)
    other = tuple(1 if draw(st.booleans()) else side for side in shape)
    other = other[draw(st.integers(0, len(shape))) :]
    pair: list[Array | None] = [numbers(draw, shape, low), numbers(draw, other, low)]
    if kind is not np.float32:
        pair = [(value * 3).astype(kind) for value in pair if value is not None]
    if draw(st.booleans()):
        pair.reverse()
    return Case(pair, variable=draw(st.integers(0, 1)))


def binary(low: float = -3) -> Callable[[Draw, int], Case]:
    return lambda draw, _: broadcast(draw, low=low)


def comparison(draw: Draw, _: int) -> Case:
    return broadcast(draw)


def of_bools(draw: Draw, _: int) -> Case:
    case = broadcast(draw)
    case.inputs = [value > 0 for value in case.inputs if value is not None]
    return case


def power(draw: Draw, opset: int) -> Case:
    case = broadcast(draw, low=0.1)
    case.variable = 0
    if draw(st.booleans()):
        case.inputs[1] = np.float32(draw(st.sampled_from([0.5, 1, 2, 3])))
    return case


def several(draw: Draw, opset: int) -> Case:
    shape = a_shape(draw)
    return Case([numbers(draw, shape) for _ in range(draw(st.integers(1, 3)))])


def mod(draw: Draw, _: int) -> Case:
    case = broadcast(draw, low=0.5)
    case.attributes["fmod"] = 1
    return case


def where(draw: Draw, _: int) -> Case:
    case = broadcast(draw)
    shape = np.broadcast_shapes(*(value.shape for value in case.inputs if value is not None))
    case.inputs.insert(0, numbers(draw, shape) > 0)
    case.variable += 1
    return case


def clip(draw: Draw, opset: int) -> Case:
    low, high = sorted([draw(st.floats(-2, 2, width=32)), draw(st.floats(-2, 2, width=32))])
    chosen = maybe(draw, min=low, max=high)
    x = numbers(draw, a_shape(draw))
    if opset < 11:
        return Case([x], chosen)
    bounds = [np.float32(chosen[name]) if name in chosen else None for name in ("min", "max")]
    return Case([x, *bounds])


def with_alpha(name: str = "alpha", **more: Any) -> Callable[[Draw, int], Case]:
    def make(draw: Draw, _: int) -> Case:
        value = draw(st.floats(0.125, 2, width=32))
        return Case([numbers(draw, a_shape(draw))], maybe(draw, **{name: value}, **more))

    return make


def prelu(draw: Draw, _: int) -> Case:
    n, c, h = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return Case([numbers(draw, (n, c, h, h)), numbers(draw, (c, 1, 1))])


def hard_sigmoid(draw: Draw, _: int) -> Case:
    chosen = draw(st.sampled_from([{}, {"alpha": 1 / 6, "beta": 0.5}, {"alpha": 0.3}]))
    return Case([numbers(draw, a_shape(draw))], chosen)


def gelu(draw: Draw, _: int) -> Case:
    return Case(
        [numbers(draw, a_shape(draw))], {"approximate": draw(st.sampled_from(["none", "tanh"]))}
    )


def cast(draw: Draw, _: int) -> Case:
    goal = draw(st.sampled_from([TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32]))
    source = draw(st.sampled_from([np.float32, np.uint8, np.int64]))
    return Case([numbers(draw, a_shape(draw), 0, 200).astype(source)], {"to": goal})


def cast_like(draw: Draw, _: int) -> Case:
    kind = draw(st.sampled_from([np.float32, np.int64]))
    return Case([numbers(draw, a_shape(draw), 0, 200), np.zeros(1, kind)])


def softmax(draw: Draw, opset: int) -> Case:
    shape = a_shape(draw)
    low = -len(shape) if opset >= 11 else 0
    chosen = maybe(draw, axis=draw(st.integers(low, len(shape) - 1)))
    if not chosen and opset < 13 and len(shape) < 2:
        chosen = {"axis": 0}
    return Case([numbers(draw, shape)], chosen)


def reduction(since: int) -> Callable[[Draw, int], Case]:
    def make(draw: Draw, opset: int) -> Case:
        shape = a_shape(draw)
        chosen = maybe(draw, keepdims=draw(st.integers(0, 1)))
        axes = some_axes(draw, len(shape)) if draw(st.booleans()) else None
        if opset < 11 and axes:
            axes = [axis % len(shape) for axis in axes]
        x = numbers(draw, shape, 0.5)
        if opset < since:
            return Case([x], chosen | ({} if axes is None else {"axes": axes}))
        return Case([x, None if axes is None else ints(axes)], chosen)

    return make


def arg_max(draw: Draw, opset: int) -> Case:
    shape = a_shape(draw)
    axis = draw(st.integers(0 if opset < 11 else -len(shape), len(shape) - 1))
    return Case(
        [numbers(draw, shape)],
        maybe(draw, axis=axis, keepdims=draw(st.integers(0, 1))),
    )


def transpose(draw: Draw, _: int) -> Case:
    shape = a_shape(draw)
    return Case([numbers(draw, shape)], maybe(draw, perm=draw(st.permutations(range(len(shape))))))


def flatten(draw: Draw, opset: int) -> Case:
    shape = a_shape(draw)
    low = -len(shape) if opset >= 11 else 0
    return Case(
        [numbers(draw, shape)], maybe(draw, axis=draw(st.integers(low, len(shape)))) or {"axis": 0}
    )


def reshape(draw: Draw, _: int) -> Case:
    shape = a_shape(draw)
    goal = [shape[0] if draw(st.booleans()) else 0, -1]
    if draw(st.booleans()):
        goal.insert(1, 1)
    return Case([numbers(draw, shape), ints(goal)])


def squeeze(draw: Draw, opset: int) -> Case:
    shape = (draw(st.integers(1, 3)), 1, draw(st.integers(2, 3)), 1)
    axes = draw(st.sampled_from([None, [1], [1, 3], [3]]))
    if opset >= 11 and axes == [3]:
        axes = [-1]
    if opset < 13:
        return Case([numbers(draw, shape)], {} if axes is None else {"axes": axes})
    return Case([numbers(draw, shape), None if axes is None else ints(axes)])


def unsqueeze(draw: Draw, opset: int) -> Case:
    shape = a_shape(draw, 1, 3)
    axes = draw(st.sampled_from([[0], [1], [0, 2], [0, 1]]))
    if opset >= 11 and axes == [1]:
        axes = [-1]
    if opset < 13:
        return Case([numbers(draw, shape)], {"axes": axes})
    return Case([numbers(draw, shape), ints(axes)])


def concat(draw: Draw, opset: int) -> Case:
    shape = list(a_shape(draw))
    axis = draw(st.integers(0, len(shape) - 1))
    inputs: list[Array | None] = []
    for _ in range(draw(st.integers(1, 3))):
        shape[axis] = draw(st.integers(1, 3))
        inputs.append(numbers(draw, tuple(shape)))
    given_axis = axis - len(shape) if opset >= 11 and draw(st.booleans()) else axis
    return Case(inputs, {"axis": given_axis}, variable=draw(st.integers(0, len(inputs) - 1)))


def split(draw: Draw, opset: int) -> Case:
    parts = draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
    shape = list(a_shape(draw))
    axis = draw(st.integers(0, len(shape) - 1))
    is_even = draw(st.booleans())
    if is_even:
        parts = [parts[0]] * len(parts)
    shape[axis] = sum(parts)
    attributes: dict[str, Any] = {"axis": axis}
    inputs: list[Array | None] = [numbers(draw, tuple(shape))]
    if is_even and draw(st.booleans()):
        if opset >= 18:
            attributes["num_outputs"] = len(parts)
    elif opset < 13:
        attributes["split"] = parts
    else:
        inputs.append(ints(parts))
    return Case(inputs, attributes, outputs=len(parts))


def cut(draw: Draw, opset: int) -> Case:
    shape = a_shape(draw)
    axes = draw(st.lists(st.integers(0, len(shape) - 1), unique=True, min_size=1))
    starts, ends, steps = [], [], []
    for axis in axes:
        length = shape[axis]
        step = draw(st.sampled_from([1, 1, 2, -1, -2])) if opset >= 10 else 1
        start, end = sorted([draw(st.integers(0, length)), draw(st.integers(0, length))])
        if end == start:
            start, end = 0, length
        if step < 0:
            start, end = end - 1, (start - 1 if start else -(2**31))
        elif draw(st.booleans()) and start:
            start -= length
        if step > 0 and end == length and draw(st.booleans()):
            end = 2**31 - 1
        starts.append(start)
        ends.append(end)
        steps.append(step)
    x = numbers(draw, shape)
    if opset < 10:
        return Case([x], {"starts": starts, "ends": ends, "axes": axes})
    return Case([x, ints(starts), ints(ends), ints(axes), ints(steps)])


def gather(draw: Draw, opset: int) -> Case:
    shape = a_shape(draw)
    axis = draw(st.integers(0 if opset < 11 else -len(shape), len(shape) - 1))
    length = shape[axis]
    low = 0 if opset < 11 else -length
    index = draw(
        st.one_of(
            st.integers(low, length - 1),
            st.lists(st.integers(low, length - 1), min_size=1, max_size=4),
        )
    )
    return Case([numbers(draw, shape), ints(index)], {"axis": axis})


def gather_elements(draw: Draw, _: int) -> Case:
    shape = a_shape(draw)
    axis = draw(st.integers(0, len(shape) - 1))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return Case(
        [numbers(draw, shape), rng.integers(-shape[axis], shape[axis], shape)], {"axis": axis}
    )


def scatter_nd(draw: Draw, _: int) -> Case:
    shape = a_shape(draw, 2, 3)
    depth = draw(st.integers(1, len(shape)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    places = list(np.ndindex(*shape[:depth]))
    chosen = rng.permutation(len(places))[: draw(st.integers(1, min(3, len(places))))]
    index = ints([places[place] for place in chosen])
    updates = numbers(draw, (len(index), *shape[depth:]))
    return Case([numbers(draw, shape), index, updates], variable=draw(st.sampled_from([0, 2])))


def expand(draw: Draw, _: int) -> Case:
    shape = a_shape(draw)
    start = tuple(1 if draw(st.booleans()) else side for side in shape)
    goal = tuple(1 if draw(st.booleans()) else side for side in shape)
    return Case([numbers(draw, start), ints(goal)])


def tile(draw: Draw, _: int) -> Case:
    shape = a_shape(draw)
    return Case([numbers(draw, shape), ints([draw(st.integers(1, 3)) for _ in shape])])


def trilu(draw: Draw, _: int) -> Case:
    shape = a_shape(draw, 2)
    inputs = [numbers(draw, shape), ints(draw(st.integers(-2, 2)))]
    return Case(inputs[: draw(st.integers(1, 2))], maybe(draw, upper=draw(st.integers(0, 1))))


def depth_to_space(draw: Draw, opset: int) -> Case:
    x = numbers(draw, (2, 8, draw(st.integers(1, 3)), 2))
    chosen = {"blocksize": 2}
    if opset >= 11:
        chosen |= maybe(draw, mode=draw(st.sampled_from(["DCR", "CRD"])))
    return Case([x], chosen)


def space_to_depth(draw: Draw, _: int) -> Case:
    return Case([numbers(draw, (2, draw(st.integers(1, 3)), 4, 6))], {"blocksize": 2})


def pad(draw: Draw, opset: int) -> Case:
    mode = draw(st.sampled_from(["constant", "reflect", "edge"]))
    shape = tuple(draw(st.integers(3, 5)) for _ in range(draw(st.integers(1, 4))))
    axes = list(range(len(shape)))
    if opset >= 18 and draw(st.booleans()):
        axes = some_axes(draw, len(shape))
    low = -1 if mode == "constant" else 0
    pads = [draw(st.integers(low, 2)) for _ in range(2 * len(axes))]
    x, value = numbers(draw, shape), draw(st.floats(-2, 2, width=32))
    if opset < 11:
        return Case([x], {"pads": pads, "mode": mode, "value": value})
    inputs: list[Array | None] = [x, ints(pads), np.float32(value)]
    if axes != list(range(len(shape))):
        inputs.append(ints(axes))
    return Case(inputs, {"mode": mode})


def resize(draw: Draw, opset: int) -> Case:
    x = numbers(draw, (1, 2, draw(st.integers(2, 10)), draw(st.integers(2, 5))))
    mode = draw(st.sampled_from(["nearest", "linear", *(["cubic"] if opset >= 11 else [])]))
    scales = np.float32(
        [
            *(1, 1),
            draw(st.sampled_from([0.5, 1, 2, 3, 0.6, 0.7, 1.3])),
            draw(st.sampled_from([1, 1.5, 2])),
        ]
    )
    if opset < 11:
        return Case([x, scales], {"mode": mode})
    chosen = {
        "mode": mode,
        "coordinate_transformation_mode": draw(
            st.sampled_from(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
        ),
    }
    if mode == "nearest":
        chosen["nearest_mode"] = draw(
            st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
        )
    if mode == "cubic":
        chosen |= maybe(draw, cubic_coeff_a=-0.5, exclude_outside=1)
    if draw(st.booleans()):
        return Case([x, None, scales], chosen)
    sizes = [1, 2, draw(st.integers(1, 9)), draw(st.integers(1, 9))]
    return Case([x, None, None, ints(sizes)], chosen)


def upsample(draw: Draw, opset: int) -> Case:
    x = numbers(draw, (1, 2, 3, 4))
    scales = [1.0, 1.0, draw(st.sampled_from([1.0, 2.0, 3.0])), draw(st.sampled_from([1.0, 2.0]))]
    mode = draw(st.sampled_from(["nearest", "linear"]))
    if opset < 9:
        return Case([x], {"mode": mode, "scales": scales})
    return Case([x, np.float32(scales)], {"mode": mode})


def windows(
    draw: Draw, rank: int, sides: list[int], kernel: list[int], dilations: list[int]
) -> dict[str, Any]:
    """Strides and padding of a sliding window that fits."""
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    chosen: dict[str, Any] = {"strides": [draw(st.integers(1, 3)) for _ in range(rank)]}
    if auto != "NOTSET":
        return chosen | {"auto_pad": auto}
    if draw(st.booleans()):
        reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
        chosen["pads"] = [
            min(draw(st.integers(0, 2)), reach[axis % rank]) for axis in range(2 * rank)
        ]
    return chosen


def conv(draw: Draw, _: int) -> Case:
    rank = draw(st.sampled_from([1, 2, 2, 2, 3]))
    group = draw(st.sampled_from([1, 1, 2, 4]))
    inputs, outputs = group * draw(st.integers(1, 3)), group * draw(st.integers(1, 3))
    sides = [draw(st.integers(5, 8)) for _ in range(rank)]
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    dilations = [draw(st.sampled_from([1, 1, 2])) for _ in range(rank)]
    chosen = windows(draw, rank, sides, kernel, dilations) | {"group": group}
    if "auto_pad" in chosen:
        dilations = [1] * rank
    weight = numbers(draw, (outputs, inputs // group, *kernel))
    given: list[Array | None] = [numbers(draw, (2, inputs, *sides)), weight]
    if draw(st.booleans()):
        given.append(numbers(draw, (outputs,)))
    return Case(given, chosen | maybe(draw, kernel_shape=kernel) | {"dilations": dilations})


def conv_transpose(draw: Draw, _: int) -> Case:
    group = draw(st.sampled_from([1, 2]))
    kernel = [draw(st.integers(2, 3)), draw(st.integers(2, 3))]
    strides = [draw(st.integers(1, 2)), 2]
    side = [draw(st.integers(0, 1)), draw(st.integers(0, 1))]
    weight = numbers(draw, (2 * group, draw(st.integers(1, 2)), *kernel))
    chosen = {"group": group, "strides": strides, "pads": side * 2}
    if strides[0] == 2:
        chosen |= maybe(draw, output_padding=[1, 1])
    return Case([numbers(draw, (1, 2 * group, 4, 5)), weight], chosen)


def gemm(draw: Draw, opset: int) -> Case:
    m, k, n = (draw(st.integers(1, 4)) for _ in range(3))
    first, second = draw(st.integers(0, 1)), draw(st.integers(0, 1))
    a = numbers(draw, (k, m) if first else (m, k))
    b = numbers(draw, (n, k) if second else (k, n))
    chosen = maybe(draw, alpha=0.5, beta=draw(st.sampled_from([0.25, 1.0])))
    chosen |= {"transA": first, "transB": second}
    shape = draw(st.sampled_from([(n,), (1, n), (m, n), (m, 1)]))
    if opset >= 11 and draw(st.booleans()):
        return Case([a, b], chosen)
    return Case([a, b, numbers(draw, shape)], chosen)


def matmul(draw: Draw, _: int) -> Case:
    m, k, n, batch = (draw(st.integers(1, 4)) for _ in range(4))
    left = draw(st.sampled_from([(m, k), (batch, m, k), (2, batch, m, k)]))
    right = draw(st.sampled_from([(k, n), (k,), (*left[:-2], k, n)]))
    return Case([numbers(draw, left), numbers(draw, right)], variable=draw(st.integers(0, 1)))


def einsum(draw: Draw, _: int) -> Case:
    equation, *shapes = draw(
        st.sampled_from(
            [
                ("bij,bjk->bik", (2, 3, 4), (2, 4, 2)),
                ("bhwc, hkc -> bhwk", (1, 3, 4, 2), (3, 5, 2)),
                ("ij->ji", (2, 3)),
            ]
        )
    )
    return Case([numbers(draw, shape) for shape in shapes], {"equation": equation})


def batch_norm(draw: Draw, _: int) -> Case:
    c = draw(st.integers(1, 4))
    shape = (2, c, *draw(st.sampled_from([(), (3,), (3, 2)])))
    return Case(
        [
            numbers(draw, shape),
            *(numbers(draw, (c,)) for _ in range(3)),
            numbers(draw, (c,), 0.1, 3),
        ],
        maybe(draw, epsilon=1e-3, momentum=0.5),
    )


def instance_norm(draw: Draw, _: int) -> Case:
    c = draw(st.integers(1, 4))
    return Case(
        [numbers(draw, (2, c, 3, 4)), numbers(draw, (c,)), numbers(draw, (c,))],
        maybe(draw, epsilon=1e-3),
    )


def group_norm(draw: Draw, opset: int) -> Case:
    groups = draw(st.integers(1, 3))
    c = groups * draw(st.integers(1, 3))
    length = c if opset >= 21 else groups
    return Case(
        [numbers(draw, (2, c, 3, 2)), numbers(draw, (length,)), numbers(draw, (length,))],
        {"num_groups": groups} | maybe(draw, epsilon=1e-3),
    )


def layer_norm(draw: Draw, _: int) -> Case:
    shape = a_shape(draw, 2, 4)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    given = [numbers(draw, shape[axis:]) for _ in range(draw(st.integers(1, 2)))]
    return Case([numbers(draw, shape), *given], {"axis": axis} | maybe(draw, epsilon=1e-3))


def rms_norm(draw: Draw, _: int) -> Case:
    shape = a_shape(draw, 2, 4)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    given = numbers(draw, shape[axis:])
    return Case([numbers(draw, shape), given], {"axis": axis} | maybe(draw, epsilon=1e-3))


def lp_norm(draw: Draw, _: int) -> Case:
    shape = a_shape(draw)
    return Case(
        [numbers(draw, shape)],
        {"axis": draw(st.integers(0, len(shape) - 1))} | maybe(draw, p=draw(st.integers(1, 2))),
    )


def lrn(draw: Draw, _: int) -> Case:
    return Case(
        [numbers(draw, (2, draw(st.integers(1, 6)), 3, 2))],
        {"size": draw(st.sampled_from([1, 3, 5]))} | maybe(draw, alpha=0.5, beta=0.5, bias=2.0),
    )


def global_pool(draw: Draw, _: int) -> Case:
    return Case(
        [numbers(draw, (2, 3, *(draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 3))))))]
    )


def pool(draw: Draw, opset: int, dilated: bool) -> Case:
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    sides = [draw(st.integers(5, 8)) for _ in range(rank)]
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    dilations = (
        [draw(st.sampled_from([1, 1, 2])) for _ in range(rank)]
        if dilated and opset >= 10
        else [1] * rank
    )
    chosen = windows(draw, rank, sides, kernel, dilations) | {"kernel_shape": kernel}
    if opset >= 10 and "auto_pad" not in chosen:
        chosen["ceil_mode"] = draw(st.integers(0, 1))
    if any(size > 1 for size in dilations) and "auto_pad" not in chosen:
        chosen["dilations"] = dilations
    return Case([numbers(draw, (2, 2, *sides))], chosen)


def max_pool(draw: Draw, opset: int) -> Case:
    return pool(draw, opset, dilated=True)


def average_pool(draw: Draw, opset: int) -> Case:
    case = pool(draw, opset, dilated=False)
    case.attributes |= maybe(draw, count_include_pad=draw(st.integers(0, 1)))
    return case


def dropout(draw: Draw, opset: int) -> Case:
    if opset < 12:
        return Case([numbers(draw, a_shape(draw))], maybe(draw, ratio=0.3))
    given: list[Array | None] = [np.float32(0.3), np.array(False)]
    return Case([numbers(draw, a_shape(draw)), *given[: draw(st.integers(0, 2))]])


def shape_of(draw: Draw, opset: int) -> Case:
    shape = a_shape(draw)
    chosen = {}
    if opset >= 15:
        chosen = maybe(draw, start=draw(st.integers(-4, 4)), end=draw(st.integers(-4, 4)))
    return Case([numbers(draw, shape)], chosen)


CASES: dict[str, tuple[int, Callable[[Draw, int], Case]]] = {
    **dict.fromkeys(
        [
            "Abs",
            "Ceil",
            "Cos",
            "Exp",
            "Floor",
            "Identity",
            "Neg",
            "Relu",
            "Sigmoid",
            "Sin",
            "Softplus",
            "Softsign",
            "Tanh",
        ],
        (7, unary()),
    ),
    **dict.fromkeys(["Log", "Sqrt", "Reciprocal"], (7, unary(0.1))),
    **dict.fromkeys(["Erf", "IsNaN", "Sign"], (9, unary())),
    "Round": (11, unary()),
    "HardSwish": (14, unary()),
    "Mish": (18, unary()),
    "Not": (7, logical),
    **dict.fromkeys(["Add", "Mul", "Sub"], (7, binary())),
    "Div": (7, binary(0.1)),
    **dict.fromkeys(["And", "Or", "Xor"], (7, of_bools)),
    **dict.fromkeys(["Greater", "Less"], (9, comparison)),
    "Equal": (11, comparison),
    **dict.fromkeys(["GreaterOrEqual", "LessOrEqual"], (12, comparison)),
    **dict.fromkeys(["Sum", "Mean", "Max", "Min"], (8, several)),
    "Pow": (7, power),
    "Mod": (10, mod),
    "Where": (9, where),
    "Clip": (7, clip),
    "LeakyRelu": (7, with_alpha()),
    "Elu": (7, with_alpha()),
    "Celu": (12, with_alpha()),
    "Selu": (7, with_alpha(gamma=1.5)),
    "ThresholdedRelu": (10, with_alpha()),
    "Swish": (24, with_alpha()),
    "PRelu": (7, prelu),
    "HardSigmoid": (7, hard_sigmoid),
    "Gelu": (20, gelu),
    "Cast": (7, cast),
    "CastLike": (15, cast_like),
    "Softmax": (7, softmax),
    "LogSoftmax": (7, softmax),
    **dict.fromkeys(
        [
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSumSquare",
        ],
        (7, reduction(18)),
    ),
    "ReduceSum": (7, reduction(13)),
    "ArgMax": (7, arg_max),
    "ArgMin": (7, arg_max),
    "Transpose": (7, transpose),
    "Flatten": (7, flatten),
    "Reshape": (7, reshape),
    "Squeeze": (7, squeeze),
    "Unsqueeze": (7, unsqueeze),
    "Concat": (7, concat),
    "Split": (7, split),
    "Slice": (7, cut),
    "Gather": (7, gather),
    "GatherElements": (11, gather_elements),
    "ScatterND": (11, scatter_nd),
    "Expand": (8, expand),
    "Tile": (7, tile),
    "Trilu": (14, trilu),
    "DepthToSpace": (7, depth_to_space),
    "SpaceToDepth": (7, space_to_depth),
    "Pad": (7, pad),
    "Resize": (10, resize),
    "Upsample": (7, upsample),
    "Conv": (7, conv),
    "ConvTranspose": (7, conv_transpose),
    "Gemm": (7, gemm),
    "MatMul": (7, matmul),
    "Einsum": (12, einsum),
    "BatchNormalization": (7, batch_norm),
    "InstanceNormalization": (7, instance_norm),
    "GroupNormalization": (18, group_norm),
    "LayerNormalization": (17, layer_norm),
    "RMSNormalization": (23, rms_norm),
    "LpNormalization": (7, lp_norm),
    "LRN": (7, lrn),
    "GlobalAveragePool": (7, global_pool),
    "GlobalMaxPool": (7, global_pool),
    "MaxPool": (7, max_pool),
    "AveragePool": (7, average_pool),
    "Dropout": (7, dropout),
    "Shape": (7, shape_of),
    "Size": (7, unary()),
}
"""Operator → first opset that is tested, and what makes a case for an opset."""
LAST = {"Upsample": 9}
"""Operator → last opset that has it."""
WITHOUT_INPUTS = {"Constant", "ConstantOfShape", "Range"}
"""Operators that only occur with constant inputs; tested by hand."""


def model_of(kind: str, opset: int, case: Case) -> onnx.ModelProto:
    """A model of one node. Constant inputs are initializers."""
    names = ["" if value is None else f"i{place}" for place, value in enumerate(case.inputs)]
    names[case.variable] = "x"
    outputs = [f"o{place}" for place in range(case.outputs)]
    node = helper.make_node(kind, names, outputs, **case.attributes)
    x = np.asarray(case.inputs[case.variable])
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in zip(names, case.inputs, strict=True)
            if name not in ("", "x") and value is not None
        ],
    )
    for output in graph.output:
        output.type.tensor_type.elem_type = _output_type(kind, case)
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=helper.find_min_ir_version_for(
            [helper.make_opsetid("", opset)], ignore_unknown=True
        ),
    )


def _output_type(kind: str, case: Case) -> int:
    if kind in ("Shape", "Size", "ArgMax", "ArgMin"):
        return int(TensorProto.INT64)
    if kind in (
        "And",
        "Or",
        "Xor",
        "Not",
        "Equal",
        "Greater",
        "Less",
        "GreaterOrEqual",
        "LessOrEqual",
        "IsNaN",
    ):
        return int(TensorProto.BOOL)
    if kind == "Cast":
        return int(case.attributes["to"])
    like = case.inputs[1] if kind in ("CastLike", "Where") else case.inputs[0]
    return int(helper.np_dtype_to_tensor_dtype(np.asarray(like).dtype))


def by_torch(model: onnx.ModelProto, x: Array) -> list[Array]:
    names = [output.name for output in model.graph.output]
    program = from_model(model, "x", torch.from_numpy(x), names)
    raw = Loaded(program, "cpu", torch.float32)
    with torch.inference_mode():
        return [values.numpy() for values in raw(torch.from_numpy(x))]


def by_reference(model: onnx.ModelProto, x: Array) -> list[Array] | None:
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        return list(ReferenceEvaluator(model).run(None, {"x": x}))
    return None


def by_runtime(model: onnx.ModelProto, x: Array) -> list[Array] | None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    with contextlib.suppress(Exception):
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return list(session.run(None, {"x": x}))
    return None


def _pads_wrongly(case: Case) -> bool:
    """The size of the output is the input's over the stride, rounded up; `onnx.reference` rounds
    down for SAME_LOWER. Padding is never negative; it is there, where strides skip pixels.
    """
    kernel = case.attributes["kernel_shape"]
    skips = any(np.array(case.attributes.get("strides", 1)) > np.array(kernel))
    auto = case.attributes.get("auto_pad")
    return auto == "SAME_LOWER" or (auto == "SAME_UPPER" and skips)


def _scales_of(case: Case) -> Any:
    """Return the scales of a Resize; empty if it has sizes."""
    scales = case.inputs[1] if len(case.inputs) == 2 else case.inputs[2]
    return () if scales is None else scales


REFERENCE_IS_WRONG: dict[str, Callable[[int, Case], bool]] = {
    # Before opset 13 all axes from this one on are one; it normalises along this one alone.
    **dict.fromkeys(["Softmax", "LogSoftmax"], lambda opset, _: opset < 13),
    # It takes the sum of the numbers for the sum of their absolute values.
    "LpNormalization": lambda _, case: case.attributes.get("p") == 1,
    # It mixes the batch's own statistics in, as in training.
    "BatchNormalization": lambda opset, _: opset < 14,
    # It takes the batch size for the number of channels.
    "LRN": lambda *_: True,
    # It is right for two spatial axes only.
    "GlobalMaxPool": lambda _, case: np.ndim(case.inputs[0]) != 4,
    **dict.fromkeys(["MaxPool", "AveragePool"], lambda _, case: _pads_wrongly(case)),
    # The resized length is a whole number; it computes with the fraction.
    # It computes in float64, and the others in float32, in which 0.7 * 10 is 7.
    "Resize": lambda _, case: (
        case.attributes.get("coordinate_transformation_mode") == "align_corners"
        or any(scale in np.float32([0.6, 0.7, 1.3]) for scale in _scales_of(case))
    ),
}
"""Operator → whether `onnx.reference` contradicts the definition in a case."""


def newest() -> int:
    return min(onnx.defs.onnx_opset_version(), OPSETS[-1])


def is_close(one: list[Array], other: list[Array]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape
        and np.allclose(a.astype(np.float64), np.asarray(b, np.float64), rtol=1e-4, atol=1e-4)
        for a, b in zip(one, map(np.asarray, other), strict=True)
    )


def test_every_operator_is_tested() -> None:
    """A new operator needs a case."""
    assert set(OPERATORS) == set(CASES) | WITHOUT_INPUTS


@pytest.mark.parametrize("kind", CASES)
def test_an_operator_computes_what_its_definition_says(kind: str) -> None:
    """For random attributes and shapes in every opset."""
    first, make = CASES[kind]
    compared = 0

    @settings(max_examples=10)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal compared
        opset = data.draw(st.integers(first, LAST.get(kind, newest())), "opset")
        case = make(data.draw, opset)
        model = model_of(kind, opset, case)
        x = np.asarray(case.inputs[case.variable])
        answers = {}
        if not REFERENCE_IS_WRONG.get(kind, lambda *_: False)(opset, case):
            answers["onnx.reference"] = by_reference(model, x)
        answers["onnxruntime"] = by_runtime(model, x)
        if not any(answers.values()):
            return
        found = by_torch(model, x)
        for who, expected in answers.items():
            if expected is not None:
                compared += 1
                assert is_close(found, expected), f"{who}: {expected}, torch: {found}"

    check()
    assert compared >= 10


NODE = helper.make_node
RARE: dict[str, tuple[list[Any], dict[str, Any], Array, int]] = {
    "every third number is a matter of rounding": (
        [
            NODE(
                *("Resize", ["x", "", "s"], ["y"]),
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
        ],
        {"s": np.float32([1, 1, 1, 1 / 3])},
        np.arange(30, dtype=np.float32).reshape(1, 1, 1, 30),
        13,
    ),
    "a power of whole numbers": (
        [
            NODE("Cast", ["x"], ["i"], to=TensorProto.INT64),
            NODE("Pow", ["i", "h"], ["p"]),
            NODE("Cast", ["p"], ["y"], to=TensorProto.FLOAT),
        ],
        {"h": np.float32(0.5)},
        np.float32([[1, 9, 16, 3]]),
        13,
    ),
    "a bias that is wider than the product": (
        [NODE("MatMul", ["x", "w"], ["m"]), NODE("Add", ["m", "b"], ["y"])],
        {"w": np.ones((4, 1), np.float32), "b": np.arange(3, dtype=np.float32)},
        np.ones((2, 4), np.float32),
        17,
    ),
    "maps of one number": (
        [NODE("InstanceNormalization", ["x", "s", "b"], ["y"])],
        {"s": np.ones(3, np.float32), "b": np.arange(3, dtype=np.float32)},
        np.ones((1, 3, 1, 1), np.float32),
        17,
    ),
    "a slice that begins before the first number and goes back": (
        [NODE("Slice", ["x", "s", "e", "a", "t"], ["y"])],
        {name: np.int64([value]) for name, value in zip("seat", (-100, -200, 1, -1), strict=True)},
        np.arange(8, dtype=np.float32).reshape(2, 4),
        17,
    ),
    "no axes are all axes": (
        [NODE("Squeeze", ["x", "a"], ["y"])],
        {"a": np.int64([])},
        np.ones((2, 1, 3, 1), np.float32),
        17,
    ),
}


@pytest.mark.parametrize("name", RARE)
def test_rare_graphs_answer_as_in_onnx_runtime(name: str) -> None:
    nodes, constants, x, opset = RARE[name]
    graph = helper.make_graph(
        nodes,
        "rare",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    expected = by_runtime(model, x)
    assert expected is not None
    assert is_close(by_torch(model, x), expected)


def by_hand(kind: str, inputs: list[Any], **attributes: Any) -> Any:
    """What one node with constant inputs becomes."""
    values = [torch.from_numpy(np.asarray(value)) for value in inputs]
    node = Node(kind, 13, attributes, values)
    call = bind(node)
    passed = [value for place, value in enumerate(values) if place not in node.on_host]
    return call(*passed).tolist()


def test_operators_that_make_constants() -> None:
    """They have no input that depends on images."""
    tensor = numpy_helper.from_array(np.float64([[1.5, 2]]))
    assert by_hand("Constant", [], value=tensor) == [[1.5, 2.0]]
    assert by_hand("Constant", [], value_int=3) == 3
    assert by_hand("Constant", [], value_floats=[0.5, 1.0]) == [0.5, 1.0]
    seven = numpy_helper.from_array(np.int64([7]))
    assert by_hand("ConstantOfShape", [ints([2, 2])], value=seven) == [[7, 7], [7, 7]]
    assert by_hand("ConstantOfShape", [ints([2])]) == [0.0, 0.0]
    assert by_hand("Range", [ints(1), ints(8), ints(3)]) == [1, 4, 7]


def test_weights_may_be_normalised_by_their_own_statistics() -> None:
    """Exporters write weight standardisation as a batch norm in training mode. Images may not: each
    would depend on its neighbours.
    """
    weight = np.random.default_rng(0).normal(2, 3, (1, 2, 6)).astype(np.float32)
    one, zero = np.ones(2, np.float32), np.zeros(2, np.float32)
    inputs = [weight, one, zero, zero, one]
    node = Node("BatchNormalization", 15, {"training_mode": 1}, list(map(torch.from_numpy, inputs)))
    found = bind(node)(*node.values).numpy()
    expected = (weight - weight.mean(2, keepdims=True)) / weight.std(2, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(Unsupported, match="operator BatchNormalization in training mode"):
        by_torch(model_of("BatchNormalization", 15, Case([*inputs], {"training_mode": 1})), weight)


@pytest.mark.parametrize(
    ("kind", "attributes", "message"),
    [
        ("NonZero", {}, "operator NonZero"),
        ("Relu", {"slope": 2}, "operator Relu with the attribute slope"),
        ("Concat", {}, "operator Concat without the attribute axis"),
        ("Gelu", {"approximate": "cubic"}, "operator Gelu with approximate=cubic"),
        ("Resize", {"antialias": 1}, "operator Resize with antialias=1"),
        ("Cast", {"to": TensorProto.STRING}, "operator Cast to the element type 8"),
    ],
)
def test_an_unknown_operator_or_attribute_is_named(
    kind: str, attributes: dict[str, Any], message: str
) -> None:
    """It would otherwise be ignored, and change results."""
    values = [np.zeros((1, 1, 2, 2), np.float32), None, np.float32([1, 1, 2, 2])]
    case = Case(values[: 3 if kind == "Resize" else 1], attributes)
    with pytest.raises(Unsupported, match=re.escape(message)):
        by_torch(model_of(kind, 13, case), values[0])


def test_a_shape_that_depends_on_images_is_named() -> None:
    """Shapes are static."""
    case = Case([np.zeros(4, np.float32), ints([2, 2])], variable=1)
    with pytest.raises(Unsupported, match="operator Reshape whose input 1 is computed from the"):
        by_torch(model_of("Reshape", 13, case), ints([2, 2]))


@pytest.mark.parametrize("opset", [6, 99])
def test_an_opset_that_was_not_compared_is_refused(opset: int) -> None:
    """A later one may define an operator differently."""
    model = model_of("Relu", 13, Case([np.zeros(2, np.float32)]))
    model.opset_import[0].version = opset
    with pytest.raises(Unsupported, match=rf"opset {opset} \(it reads 7 to 28\)"):
        by_torch(model, np.zeros(2, np.float32))


def test_operators_of_other_domains_are_refused() -> None:
    """They are named with their domain."""
    model = model_of("Relu", 13, Case([np.zeros(2, np.float32)]))
    model.graph.node[0].domain = "com.microsoft"
    with pytest.raises(Unsupported, match=r"operator com\.microsoft\.Relu"):
        by_torch(model, np.zeros(2, np.float32))
