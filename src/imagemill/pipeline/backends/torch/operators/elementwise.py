"""Operators that compute each number by itself, or reduce numbers along axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own abbreviation
from msgspec import Struct

from imagemill.pipeline.backends.torch.operators.node import (
    DTYPES,
    Call,
    Node,
    Tensor,
    operator,
)

_UNARY: dict[str, Call] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": lambda x: torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device)),
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


_BINARY: dict[str, Call] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Div": _divide,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
    "Where": torch.where,
    "Xor": torch.logical_xor,
}


@operator(*_UNARY, *_BINARY)
def _plain(node: Node) -> Call:
    node.ignore("consumed_inputs")
    return (_UNARY | _BINARY)[node.kind]


class Power(Struct):
    """A power with a constant exponent: PyTorch squares instead of computing logarithms."""

    exponent: float

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it."""
        return torch.pow(x, self.exponent)


@operator("Pow")
def _pow(node: Node) -> Call:
    floating = node.values[0].is_floating_point()

    def power(x: Tensor, y: Tensor) -> Tensor:
        return torch.pow(x, y).to(x.dtype)

    if floating and node.values[1].numel() == 1 and not node.values[1].is_meta:
        shape = torch.broadcast_shapes(node.shape(0), node.shape(1))
        if shape == node.shape():
            return Power(node.host(1).item())  # type: ignore[union-attr]
    return power


_FOLDS: dict[str, Call] = {"Sum": torch.add, "Max": torch.maximum, "Min": torch.minimum}


@operator(*_FOLDS)
def _fold(node: Node) -> Call:
    function = _FOLDS[node.kind]
    return lambda *inputs: reduce(function, inputs)


@operator("Mean")
def _mean(_node: Node) -> Call:
    return lambda *inputs: reduce(torch.add, inputs) / len(inputs)


@operator("Mod")
def _mod(node: Node) -> Call:
    call: Call = torch.fmod if node.attribute("fmod", 0) else torch.remainder
    return call


@operator("Clip")
def _clip(node: Node) -> Call:
    floating = node.values[0].is_floating_point()
    if node.opset < 11:
        low, high = node.attribute("min", None), node.attribute("max", None)
    else:
        bounds = [node.host(1), node.host(2)]
        low, high = (None if bound is None else bound.reshape(()).item() for bound in bounds)
    if low is None and high is None:
        return lambda x: x
    if low is not None and high is not None and low > high:
        return lambda x: torch.full_like(x, high)  # ONNX: the upper bound wins
    # PyTorch refuses a bound that the type of an integer tensor cannot hold.
    if not floating:
        low, high = (None if bound is None else int(bound) for bound in (low, high))
    given = {"min": low, "max": high}
    return partial(
        torch.clamp, **{name: value for name, value in given.items() if value is not None}
    )


_WITH_ALPHA: dict[str, tuple[Call, float]] = {
    "LeakyRelu": (F.leaky_relu, 0.01),
    "Elu": (F.elu, 1.0),
    "Celu": (F.celu, 1.0),
}
"""Operator → PyTorch's function of x and alpha, and the default of alpha."""


@operator(*_WITH_ALPHA)
def _with_alpha(node: Node) -> Call:
    function, default = _WITH_ALPHA[node.kind]
    alpha = node.attribute("alpha", default)
    return lambda x: function(x, alpha)


@operator("PRelu")
def _prelu(_node: Node) -> Call:
    return lambda x, slope: torch.where(x < 0, x * slope, x)


@operator("ThresholdedRelu")
def _thresholded_relu(node: Node) -> Call:
    alpha = node.attribute("alpha", 1.0)
    return lambda x: torch.where(x > alpha, x, torch.zeros((), dtype=x.dtype, device=x.device))


@operator("Selu")
def _selu(node: Node) -> Call:
    alpha = node.attribute("alpha", 1.67326319217681884765625)
    gamma = node.attribute("gamma", 1.05070102214813232421875)
    return lambda x: gamma * F.elu(x, alpha)


@operator("HardSigmoid")
def _hard_sigmoid(node: Node) -> Call:
    alpha, beta = node.attribute("alpha", 0.2), node.attribute("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        hard: Call = F.hardsigmoid
        return hard
    return lambda x: torch.clamp(x * alpha + beta, 0, 1)


@operator("Swish")
def _swish(node: Node) -> Call:
    alpha = node.attribute("alpha", 1.0)
    return F.silu if alpha == 1 else lambda x: x * torch.sigmoid(alpha * x)


@operator("Gelu")
def _gelu(node: Node) -> Call:
    approximate = node.attribute("approximate", "none")
    node.require(approximate in ("none", "tanh"), f"with approximate={approximate}")
    return lambda x: F.gelu(x, approximate=approximate)


@operator("Cast")
def _cast(node: Node) -> Call:
    goal = node.attribute("to")
    node.ignore("saturate", "round_mode")
    node.require(goal in DTYPES, f"to the element type {goal}")
    return _converter(DTYPES[goal])


@operator("CastLike")
def _cast_like(node: Node) -> Call:
    node.ignore("saturate", "round_mode")
    node.on_host.add(1)  # its numbers do not matter
    return _converter(node.values[1].dtype)


def _converter(dtype: torch.dtype) -> Call:
    """Return the conversion to a type; a number that is wide enough already stays as it is."""
    if dtype.is_floating_point:
        return lambda x: x if x.is_floating_point() else x.to(dtype)
    return lambda x: x.to(dtype)


def _axes(node: Node, since: int) -> tuple[int, ...] | None:
    """Return the axes of a reduction, None for a reduction of nothing."""
    axes = node.integers(1, "axes", since=since)
    if not axes:
        if node.opset >= since and node.attribute("noop_with_empty_axes", 0):
            return None
        return tuple(range(node.rank()))
    return tuple(axis % node.rank() for axis in axes)


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


_REDUCTIONS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "ReduceL1": (lambda x, axes, keep: x.abs().sum(axes, keepdim=keep), 18),
    "ReduceL2": (lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keepdim=keep), 18),
    "ReduceLogSumExp": (lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep), 18),
    "ReduceMax": (lambda x, axes, keep: torch.amax(x, axes, keepdim=keep), 18),
    "ReduceMean": (lambda x, axes, keep: torch.mean(x, axes, keepdim=keep), 18),
    "ReduceMin": (lambda x, axes, keep: torch.amin(x, axes, keepdim=keep), 18),
    "ReduceProd": (_product, 18),
    "ReduceSum": (lambda x, axes, keep: torch.sum(x, axes, keepdim=keep, dtype=x.dtype), 13),
    "ReduceSumSquare": (lambda x, axes, keep: (x * x).sum(axes, keepdim=keep, dtype=x.dtype), 18),
}
"""Operator → PyTorch's function, and the opset from which the axes are an input."""


_PLAIN_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum")
"""Reductions that leave a single number as it is."""


@operator(*_REDUCTIONS)
def _reduction(node: Node) -> Call:
    function, since = _REDUCTIONS[node.kind]
    keep = bool(node.attribute("keepdims", 1))
    axes = _axes(node, since)
    node.ignore("noop_with_empty_axes")
    if axes is None:
        node.require(node.kind in _PLAIN_REDUCTIONS, "with noop_with_empty_axes=1")
        return lambda x: x
    if not axes:  # of a single number, which PyTorch would take for all axes
        return lambda x: function(x.reshape(1), (0,), False)
    return lambda x: function(x, axes, keep)


@operator("ArgMax", "ArgMin")
def _arg_max(node: Node) -> Call:
    axis, keep = node.attribute("axis", 0), bool(node.attribute("keepdims", 1))
    node.require(not node.attribute("select_last_index", 0), "with select_last_index=1")
    function = torch.argmax if node.kind == "ArgMax" else torch.argmin
    return lambda x: function(x, axis, keepdim=keep)


@operator("Softmax", "LogSoftmax")
def _softmax(node: Node) -> Call:
    function = F.softmax if node.kind == "Softmax" else F.log_softmax
    axis = node.attribute("axis", 1 if node.opset < 13 else -1)
    if node.opset >= 13:
        return lambda x: function(x, axis)
    # Before opset 13 all axes from this one on are one.
    shape = node.shape()
    rows = math.prod(shape[: axis % len(shape)])
    return lambda x: function(x.reshape(rows, -1), 1).reshape(shape)
