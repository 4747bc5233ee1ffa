"""Operators with weights, pooling and normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own abbreviation

from imagemill.pipeline.backends.torch.operators.node import Call, Held, Node, Tensor, operator


def padding(
    node: Node, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the padding before and after each spatial axis, as `auto_pad` and `pads` say."""
    auto, count = node.attribute("auto_pad", "NOTSET"), len(kernel)
    pads = node.attribute("pads", None) or [0] * 2 * count
    if auto == "NOTSET":
        return list(pads[:count]), list(pads[count:])
    if auto == "VALID":
        return [0] * count, [0] * count
    node.require(auto in ("SAME_UPPER", "SAME_LOWER"), f"with auto_pad={auto}")
    before, after = [], []
    for axis, size in enumerate(node.shape()[2:]):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        goal = -(-size // strides[axis])
        total = max(0, (goal - 1) * strides[axis] + reach - size)
        small, large = total // 2, total - total // 2
        before.append(small if auto == "SAME_UPPER" else large)
        after.append(large if auto == "SAME_UPPER" else small)
    return before, after


def sides(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return padding in the order of `torch.nn.functional.pad`: the last axis first."""
    return [side for pair in reversed(list(zip(before, after, strict=True))) for side in pair]


class ConvSettings:
    """What a convolution does besides multiplying: padding, strides, dilations and groups."""

    def __init__(self, node: Node) -> None:
        weight = node.shape(1)
        count = len(weight) - 2
        node.ignore("kernel_shape")
        self.strides = list(node.attribute("strides", None) or [1] * count)
        self.dilations = list(node.attribute("dilations", None) or [1] * count)
        self.group = node.attribute("group", 1)
        self.before, self.after = padding(node, weight[2:], self.strides, self.dilations)
        self.rank = count

    def padded(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """Return the input, and the padding that the convolution adds by itself on both sides."""
        if self.before == self.after:
            return x, self.before
        return F.pad(x, sides(self.before, self.after)), [0] * self.rank

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve."""
        x, pads = self.padded(x)
        function = (F.conv1d, F.conv2d, F.conv3d)[self.rank - 1]
        return function(x, weight, bias, self.strides, pads, self.dilations, self.group)


@operator("Conv")
def _conv(node: Node) -> Call:
    node.require(3 <= node.rank() <= 5, "with other than 1 to 3 spatial axes")
    return ConvSettings(node)


@operator("ConvTranspose")
def _conv_transpose(node: Node) -> Call:
    auto = node.attribute("auto_pad", "NOTSET")
    node.require(auto in ("NOTSET", "VALID"), f"with auto_pad={auto}")
    node.require(node.attribute("output_shape", None) is None, "with output_shape")
    conv = ConvSettings(node)
    node.require(conv.before == conv.after, "with unequal padding")
    more = (
        list(node.attribute("output_padding", None) or [0] * conv.rank),
        conv.group,
        conv.dilations,
    )
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[conv.rank - 1]
    return lambda x, w, b=None: function(x, w, b, conv.strides, conv.before, *more)


@operator("Gemm")
def _gemm(node: Node) -> Call:
    alpha, beta = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
    first, second = node.attribute("transA", 0), node.attribute("transB", 0)
    node.ignore("broadcast")

    def gemm(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.t() if first else a, b.t() if second else b
        if c is None:
            product = a @ b
            return product if alpha == 1 else product * alpha
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)

    return gemm


@operator("MatMul")
def _matmul(_node: Node) -> Call:
    call: Call = torch.matmul
    return call


@operator("Einsum")
def _einsum(node: Node) -> Call:
    equation = node.attribute("equation").replace(" ", "")
    return lambda *inputs: torch.einsum(equation, *inputs)


class BatchNorm:
    """Batch normalisation at inference: one factor and one summand per channel."""

    def __init__(self, node: Node) -> None:
        self.epsilon = node.attribute("epsilon", 1e-5)
        node.ignore("momentum", "is_test", "consumed_inputs")
        node.require(bool(node.attribute("spatial", 1)), "with spatial=0")
        self.training = bool(node.attribute("training_mode", 0))
        # Exporters leave it for weights that are normalised; images would depend on neighbours.
        constant = not node.values[0].is_meta
        node.require(not self.training or constant, "in training mode")
        node.require(node.outputs == 1 or self.training, "with more than one output")

    def __call__(
        self, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
    ) -> Tensor:
        """Normalise."""
        if self.training:
            return F.batch_norm(x, None, None, scale, bias, True, 0.0, self.epsilon)
        return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, self.epsilon)


@operator("BatchNormalization")
def _batch_norm(node: Node) -> Call:
    return BatchNorm(node)


@operator("InstanceNormalization")
def _instance_norm(node: Node) -> Call:
    epsilon = node.attribute("epsilon", 1e-5)
    node.ignore("consumed_inputs")
    # `F.instance_norm` refuses maps of one number.
    return lambda x, scale, bias: torch.group_norm(x, x.shape[1], scale, bias, epsilon)


@operator("GroupNormalization")
def _group_norm(node: Node) -> Call:
    groups, epsilon = node.attribute("num_groups"), node.attribute("epsilon", 1e-5)
    node.ignore("stash_type")
    channels = node.shape()[1]

    def normalise(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if node.opset < 21:  # one number per group
            scale, bias = (values.repeat_interleave(channels // groups) for values in (scale, bias))
        return torch.group_norm(x, groups, scale, bias, epsilon)

    return normalise


@operator("LayerNormalization", "RMSNormalization")
def _layer_norm(node: Node) -> Call:
    shape = node.shape()[node.attribute("axis", -1) % node.rank() :]
    epsilon = node.attribute("epsilon", 1e-5)
    node.ignore("stash_type")
    node.require(node.outputs == 1, "with more than one output")
    function = F.layer_norm if node.kind == "LayerNormalization" else F.rms_norm
    return lambda x, *weights: function(
        x, shape, *(values.expand(shape) for values in weights), eps=epsilon
    )


@operator("LpNormalization")
def _lp_norm(node: Node) -> Call:
    axis, power = node.attribute("axis", -1), node.attribute("p", 2)

    def normalise(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, power, axis, keepdim=True)
        return torch.where(norm == 0, torch.zeros_like(x), x / norm)

    return normalise


@operator("LRN")
def _lrn(node: Node) -> Call:
    size, alpha = node.attribute("size"), node.attribute("alpha", 1e-4)
    beta, bias = node.attribute("beta", 0.75), node.attribute("bias", 1.0)
    before, after = (size - 1) // 2, size // 2

    def normalise(x: Tensor) -> Tensor:
        squares = F.pad((x * x).flatten(2), (0, 0, before, after))
        means = F.avg_pool2d(squares, (size, 1), 1).reshape(x.shape)
        return x / torch.pow(means * alpha + bias, beta)

    return normalise


@operator("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(node: Node) -> Call:
    axes = tuple(range(2, node.rank()))
    function: Call = torch.mean if node.kind == "GlobalAveragePool" else torch.amax
    return lambda x: function(x, axes, keepdim=True)


class _Window:
    """The sliding window of a pooling operator.

    With `ceil_mode`, a last window that begins in the padding behind the image does not count.
    """

    def __init__(self, node: Node) -> None:
        self.kernel = list(node.attribute("kernel_shape"))
        count = len(self.kernel)
        self.strides = list(node.attribute("strides", None) or [1] * count)
        self.dilations = list(node.attribute("dilations", None) or [1] * count)
        self.before, self.after = padding(node, self.kernel, self.strides, self.dilations)
        self.extra = [0] * count
        """Padding behind `after` that `ceil_mode` adds; it is never averaged over."""
        if node.attribute("ceil_mode", 0):
            for axis, size in enumerate(node.shape()[2:]):
                reach = (self.kernel[axis] - 1) * self.dilations[axis] + 1
                free = size + self.before[axis] + self.after[axis] - reach
                steps = -(-free // self.strides[axis])
                if steps * self.strides[axis] >= size + self.before[axis]:
                    steps -= 1
                self.extra[axis] = max(0, steps * self.strides[axis] - free)

    @property
    def behind(self) -> list[int]:
        """All padding behind the image."""
        return [one + two for one, two in zip(self.after, self.extra, strict=True)]

    @property
    def is_even(self) -> bool:
        """Whether PyTorch pads like this by itself."""
        return self.before == self.behind and all(
            2 * pad <= size for pad, size in zip(self.before, self.kernel, strict=True)
        )


@operator("MaxPool")
def _max_pool(node: Node) -> Call:
    window = _Window(node)
    node.require(node.outputs == 1, "with more than one output")
    node.ignore("storage_order")
    rank = len(window.kernel)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    if window.is_even:
        return lambda x: function(x, window.kernel, window.strides, window.before, window.dilations)
    around = sides(window.before, window.behind)
    return lambda x: function(
        F.pad(x, around, value=-math.inf), window.kernel, window.strides, 0, window.dilations
    )


@operator("AveragePool")
def _average_pool(node: Node) -> Call:
    window = _Window(node)
    with_padding = bool(node.attribute("count_include_pad", 0))
    rank = len(window.kernel)
    node.require(window.dilations == [1] * rank, "with dilations")
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    no_padding = not any(window.before) and not any(window.behind)
    if no_padding or (window.is_even and (with_padding or rank < 3)):
        return lambda x: function(
            x, window.kernel, window.strides, window.before, False, with_padding
        )
    # Averages of the padded image over averages of ones: PyTorch cannot pad unequally.
    around = sides(window.before, window.behind)
    ones = torch.ones((1, 1, *node.shape()[2:]))
    if with_padding:
        ones = F.pad(ones, sides(window.before, window.after), value=1.0)
        ones = F.pad(ones, sides([0] * rank, window.extra))
    else:
        ones = F.pad(ones, around)
    share = Held(function(ones, window.kernel, window.strides).numpy())

    def average(x: Tensor) -> Tensor:
        means = function(F.pad(x, around), window.kernel, window.strides)
        return means / share.on(x).to(x.dtype)

    return average
