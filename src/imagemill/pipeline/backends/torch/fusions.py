"""What a program gains by computing several nodes as one.

Normalisation and its neighbours become one factor and one summand per channel, which a preceding
convolution takes into its weights. Activations and sums behind a convolution are computed in its
output's memory. Chains that exporters write for GELU, SiLU and layer normalisation become
PyTorch's own calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own abbreviation
from msgspec import Struct
from msgspec.structs import replace

from imagemill.pipeline.backends.torch.operators.elementwise import Power
from imagemill.pipeline.backends.torch.operators.layers import BatchNorm, ConvSettings
from imagemill.pipeline.backends.torch.operators.node import Tensor

if TYPE_CHECKING:
    from imagemill.pipeline.backends.torch.program import Program, Step


def fuse(program: Program) -> None:
    """Apply all fusions to a program."""
    for step in program.steps:
        if step.kind == "Sum" and len(step.inputs) == 2:
            step.kind = "Add"
    for one in (_affine_steps, _merge_affine, _activations, _linear, _epilogues):
        one(program)
        program.refresh()


class Affine(Struct):
    """x · factor + summand, with float64 (C,) per channel on axis 1, or (1,) for all."""

    factor: Tensor
    summand: Tensor

    def after(self, first: Affine) -> Affine:
        """Return both as one: `first`, then this one."""
        return Affine(first.factor * self.factor, first.summand * self.factor + self.summand)


def _per_channel(program: Program, name: str | None, rank: int) -> Tensor | None:
    """Return a constant with one number per channel, or one for all, as a float64 vector."""
    if name is None or not program.is_constant(name):
        return None
    value = program.values[name]
    if not value.is_floating_point() or value.dim() > rank:
        return None
    if value.numel() == 1:
        return value.reshape(1).double()
    shape = (1,) * (rank - value.dim()) + tuple(value.shape)
    if value.numel() != shape[1]:
        return None
    return value.reshape(-1).double()


def _as_affine(program: Program, step: Step) -> tuple[str, Affine] | None:
    """Return a step's variable input, and what the step does if that is the same for all places of
    a channel.
    """
    (output,) = step.outputs if len(step.outputs) == 1 else (None,)
    if output is None or any(name is None for name in step.inputs):
        return None
    shape, names = program.shape(output), [name or "" for name in step.inputs]
    if len(shape) < 2 or not program.values[output].is_floating_point():
        return None
    if isinstance(step.call, BatchNorm) and all(map(program.is_constant, names[1:])):
        scale, bias, mean, variance = (program.values[name].double() for name in names[1:])
        factor = scale / torch.sqrt(variance + step.call.epsilon)
        return names[0], Affine(factor, bias - mean * factor)
    if step.kind not in ("Add", "Sub", "Mul", "Div") or len(names) != 2:
        return None
    swapped = program.is_constant(names[0])
    variable, constant = names[::-1] if swapped else names
    number = _per_channel(program, constant, len(shape))
    if number is None or program.is_constant(variable) or program.shape(variable) != shape:
        return None
    one, zero = torch.ones_like(number), torch.zeros_like(number)
    if step.kind == "Add":
        return variable, Affine(one, number)
    if step.kind == "Mul":
        return variable, Affine(number, zero)
    if step.kind == "Sub":
        return variable, Affine(-one, number) if swapped else Affine(one, -number)
    return None if swapped else (variable, Affine(1 / number, zero))


def _affine_steps(program: Program) -> None:
    for step in program.steps:
        if found := _as_affine(program, step):
            variable, affine = found
            step.kind, step.inputs, step.call = "Affine", (variable,), affine  # type: ignore[assignment]


def _merge_affine(program: Program) -> None:
    """Merge neighbouring affine steps, give them to a convolution in front, and turn the others
    into calls.
    """
    makers = {step.outputs[0]: step for step in program.steps}
    for step in program.steps:
        if step.kind != "Affine":
            continue
        affine: Affine = step.call  # type: ignore[assignment]
        (name,) = step.inputs
        maker = makers.get(name or "")
        if maker is None or program.users[name or ""] != 1:
            continue
        if maker.kind == "Affine":
            step.call, step.inputs = affine.after(maker.call), maker.inputs  # type: ignore[arg-type,assignment]
        elif maker.kind == "Conv" and all(map(program.is_constant, maker.inputs[1:])):
            _into_convolution(program, maker, affine)
            step.kind, step.call, step.inputs = maker.kind, maker.call, maker.inputs
            makers[step.outputs[0]] = step
    for step in program.steps:
        if step.kind == "Affine":
            _as_call(program, step)


def _into_convolution(program: Program, step: Step, affine: Affine) -> None:
    weight = program.values[step.inputs[1] or ""].double()
    channels = len(weight)
    has_bias = len(step.inputs) > 2 and step.inputs[2] is not None
    bias = program.values[step.inputs[2] or ""].double() if has_bias else torch.zeros(channels)
    factor = affine.factor.expand(channels)
    names = (f"{step.outputs[0]}/weight", f"{step.outputs[0]}/bias")
    program.values[names[0]] = (weight * factor.reshape(-1, *[1] * (weight.dim() - 1))).float()
    program.values[names[1]] = (bias * factor + affine.summand).float()
    step.inputs = (step.inputs[0], *names)


def _as_call(program: Program, step: Step) -> None:
    affine: Affine = step.call  # type: ignore[assignment]
    rank = len(program.shape(step.outputs[0]))
    shape = (1, -1, *[1] * (rank - 2))
    names: list[str | None] = []
    for name, vector in (("factor", affine.factor), ("summand", affine.summand)):
        neutral = 1.0 if name == "factor" else 0.0
        if bool((vector == neutral).all()):
            names.append(None)
            continue
        names.append(f"{step.outputs[0]}/{name}")
        program.values[names[-1] or ""] = vector.float().reshape(shape)
    factor, summand = names
    variable = step.inputs[0]
    if factor and summand:
        step.inputs = (summand, variable, factor)
        step.call = torch.addcmul
    elif factor:
        step.inputs, step.call = (variable, factor), torch.mul
    elif summand:
        step.inputs, step.call = (variable, summand), torch.add
    else:
        step.call = _same


def _same(x: Tensor) -> Tensor:
    return x


class _Graph:
    """Looks up who makes a value, and whether a chain of steps is used by nobody else."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.makers = {name: step for step in program.steps for name in step.outputs}

    def maker(self, name: str | None, *kinds: str) -> Step | None:
        """Return the step that makes a value, if it is of one of these kinds."""
        step = self.makers.get(name or "")
        return step if step is not None and step.kind in kinds else None

    def number(self, name: str | None) -> float | None:
        """Return a constant that is one number."""
        if name is None or not self.program.is_constant(name):
            return None
        value = self.program.values[name]
        return float(value) if value.numel() == 1 else None


def _activations(program: Program) -> None:
    graph = _Graph(program)
    for step in program.steps:
        for rule in (_gated, _gelu, _layer_norm):
            if found := rule(graph, step):
                step.kind, step.call, step.inputs = found
                break


Fused = tuple[str, Callable[..., Any], tuple[str | None, ...]]


def _pairs(step: Step) -> list[tuple[str | None, str | None]]:
    first, second = step.inputs
    return [(first, second), (second, first)]


def _gated(graph: _Graph, step: Step) -> Fused | None:
    """x · sigmoid(x), or x · hardsigmoid(x)."""
    if step.kind != "Mul":
        return None
    for x, gate in _pairs(step):
        found = graph.maker(gate, "Sigmoid", "HardSigmoid")
        if found is None or found.inputs != (x,):
            continue
        if found.kind == "Sigmoid":
            return "Silu", F.silu, (x,)
        if found.call is F.hardsigmoid:
            return "HardSwish", F.hardswish, (x,)
    return None


def _is_close(value: float | None, goal: float) -> bool:
    return value is not None and abs(value - goal) <= 1e-4 * abs(goal)


def _factor_of(graph: _Graph, step: Step) -> float | None:
    """Return the number that an affine step multiplies by, if that is all it does."""
    is_product = step.kind == "Affine" and step.call is torch.mul
    return graph.number(step.inputs[1]) if is_product else None


def _gelu(graph: _Graph, step: Step) -> Fused | None:
    """x · ½ · (1 + erf(x / √2)), multiplied in any order."""
    factors: list[str | None] = []
    total = 1.0
    pending: list[str | None] = [step.outputs[0]]
    while pending:  # the product's tree, as far as it consists of products
        name = pending.pop()
        maker = graph.maker(name, "Mul", "Affine")
        number = _factor_of(graph, maker) if maker else None
        is_inner = name == step.outputs[0] or graph.program.users[name or ""] == 1
        if maker is not None and maker.kind == "Mul" and is_inner:
            pending += maker.inputs
        elif maker is not None and number is not None and is_inner:
            total *= number
            pending.append(maker.inputs[0])
        else:
            factors.append(name)
        if len(factors) > 2:
            return None
    if len(factors) != 2 or not _is_close(total, 0.5):
        return None
    for x, gate in (factors, factors[::-1]):
        add = graph.maker(gate, "Affine")
        if add is None or add.call is not torch.add:
            continue
        if graph.number(add.inputs[1]) != 1:
            continue
        erf = graph.maker(add.inputs[0], "Erf")
        scaled = graph.maker(erf.inputs[0], "Affine") if erf else None
        if scaled is None or scaled.inputs[0] != x:
            continue
        if _is_close(_factor_of(graph, scaled), 0.5**0.5):
            return "Gelu", F.gelu, (x,)
    return None


def _layer_norm(graph: _Graph, step: Step) -> Fused | None:
    """(x − mean) / √(mean of squares + ε), over the last axis; factor and summand stay apart."""
    if step.kind != "Div":
        return None
    sub = graph.maker(step.inputs[0], "Sub")
    root = graph.maker(step.inputs[1], "Sqrt")
    add = graph.maker(root.inputs[0], "Affine") if root else None
    if sub is None or add is None or add.call is not torch.add:
        return None
    epsilon = graph.number(add.inputs[1])
    spread = graph.maker(add.inputs[0], "ReduceMean")
    square = graph.maker(spread.inputs[0], "Pow", "Mul") if spread else None
    mean = graph.maker(sub.inputs[1], "ReduceMean")
    if spread is None or square is None or mean is None or epsilon is None:
        return None
    x = sub.inputs[0]
    if mean.inputs[0] != x or set(square.inputs) != {sub.outputs[0]}:
        return None
    shape = graph.program.shape(x or "")
    if any(graph.program.shape(one.outputs[0]) != (*shape[:-1], 1) for one in (mean, spread)):
        return None
    if square.kind == "Pow" and square.call != Power(2):
        return None
    width = shape[-1:]
    return "LayerNorm", lambda x: F.layer_norm(x, width, None, None, epsilon), (x,)


def _linear(program: Program) -> None:
    """Turn a product with a constant matrix, and a bias behind it, into PyTorch's linear layer."""
    graph = _Graph(program)
    for step in program.steps:
        if step.kind != "MatMul" or not program.is_constant(step.inputs[1]):
            continue
        name = step.inputs[1] or ""
        weight = program.values[name]
        if weight.dim() == 2 and not program.is_constant(step.inputs[0]):
            program.values[f"{name}/transposed"] = weight.t().contiguous()
            step.kind, step.call = "Linear", F.linear
            step.inputs = (step.inputs[0], f"{name}/transposed")
    for step in program.steps:
        if step.kind != "Add":
            continue
        for product, constant in _pairs(step):
            maker = graph.maker(product, "Linear")
            if maker is None or not program.is_constant(constant) or len(maker.inputs) > 2:
                continue
            bias, width = program.values[constant or ""], program.shape(step.outputs[0])[-1]
            is_bias = bias.dim() == 1 and len(bias) == width == program.shape(product or "")[-1]
            if is_bias and program.users[product or ""] == 1:
                step.kind, step.call = "Linear", F.linear
                step.inputs = (*maker.inputs, constant)
                break


_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "Relu": torch.relu_,
    "Silu": lambda x: F.silu(x, inplace=True),
    "HardSwish": lambda x: F.hardswish(x, inplace=True),
    "Sigmoid": torch.sigmoid_,
}


class FusedConv(Struct):
    """A convolution, then optionally a sum with another value, then optionally an activation."""

    settings: ConvSettings
    adds: bool = False
    activation: str | None = None
    then: Callable[..., Tensor] | None = None

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None = None
    ) -> Tensor:
        """Compute it, everything behind the convolution in its output's memory."""
        made = self.settings(x, weight, bias)
        if other is not None:
            made.add_(other)
        return made if self.then is None else self.then(made)


def _epilogues(program: Program) -> None:
    graph = _Graph(program)
    for step in program.steps:
        if step.kind == "Conv":
            step.call = FusedConv(step.call)  # type: ignore[arg-type]
            step.inputs = (*step.inputs, None)[:3]
        elif step.kind == "Add":
            for product, other in _pairs(step):
                maker = graph.maker(product, "Conv")
                if maker is None or not _is_private(program, maker):
                    continue
                conv = maker.call
                assert isinstance(conv, FusedConv)
                same = program.shape(product or "") == program.shape(other or "")
                if same and not conv.adds and conv.then is None and product != other:
                    step.kind, step.call = "Conv", replace(conv, adds=True)
                    step.inputs = (*maker.inputs, other)
                    break
        elif step.kind in _IN_PLACE or step.kind == "Clip":
            maker = graph.maker(step.inputs[0], "Conv")
            if maker is None or not _is_private(program, maker):
                continue
            conv = maker.call
            assert isinstance(conv, FusedConv)
            if conv.then is None:
                then = _IN_PLACE.get(step.kind, step.call)
                if isinstance(step.call, partial):
                    then = partial(torch.clamp_, **step.call.keywords)
                step.call = replace(conv, activation=step.kind, then=then)
                step.kind, step.inputs = "Conv", maker.inputs


def _is_private(program: Program, step: Step) -> bool:
    return program.users[step.outputs[0]] == 1
