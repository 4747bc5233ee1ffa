"""One ONNX node while it is turned into a PyTorch call, and the table of known operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

Tensor = Any
"""A `torch.Tensor`; mypy does not know PyTorch, which is optional."""
Call = Callable[..., Any]
"""What a node computes: tensors in, a tensor or a tuple of tensors out."""

DTYPES: Final = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float32,
    11: torch.float32,
    12: torch.int32,
    13: torch.int64,
    16: torch.float32,
}
"""ONNX element type → PyTorch type. All floating-point types are one: the session's precision
decides how wide it is. Unsigned integers wider than 8 bits only occur in index arithmetic.
"""
_REQUIRED: Final = object()


class Unsupported(Exception):  # noqa: N818 - becomes a ModelError that names the alternative backend
    """The graph contains something that this backend does not compute; says what."""


class Node:
    """One node: its attributes, and its inputs as far as they are known before anything runs.

    Args:
        kind: the operator, such as `Conv`.
        opset: version of ONNX's operators that the model uses.
        attributes: as `onnx.helper.get_attribute_value` returns them.
        values: one per input. Constants have numbers; other inputs are on the device `meta`: they
            have a shape and a type only. None stands for an optional input that is absent.
    """

    def __init__(
        self, kind: str, opset: int, attributes: Mapping[str, Any], values: Sequence[Tensor | None]
    ) -> None:
        self.kind = kind
        self.opset = opset
        self.values: tuple[Any, ...] = tuple(values)
        self.outputs = 1
        """How many outputs the node has."""
        self.on_host: set[int] = set()
        """Positions of inputs whose numbers were read, so that they are not passed to the call."""
        self._attributes = dict(attributes)
        self._read: set[str] = set()

    def attribute(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return an attribute; strings are decoded. Raises: Unsupported if a required one is
        missing.
        """
        self._read.add(name)
        value = self._attributes.get(name, default)
        if value is _REQUIRED:
            raise Unsupported(f"operator {self.kind} without the attribute {name}")
        return value.decode() if isinstance(value, bytes) else value

    def has(self, index: int) -> bool:
        """Return whether an optional input is present."""
        return index < len(self.values) and self.values[index] is not None

    def host(self, index: int) -> NDArray[Any] | None:
        """Return a constant input's numbers, None if it is absent.

        Raises:
            Unsupported: it is not constant, so that shapes would depend on the images.
        """
        if not self.has(index):
            return None
        value = self.values[index]
        if value.is_meta:
            raise Unsupported(
                f"operator {self.kind} whose input {index} is computed from the images"
            )
        self.on_host.add(index)
        found: NDArray[Any] = value.numpy()
        return found

    def integers(self, index: int, attribute: str, *, since: int) -> list[int] | None:
        """Return integers that were an attribute before an opset and are an input from it on."""
        found = self.attribute(attribute, None) if self.opset < since else self.host(index)
        return None if found is None else as_ints(found)

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Return an input's shape."""
        return tuple(self.values[index].shape)

    def rank(self) -> int:
        """Return the first input's number of dimensions."""
        return len(self.shape())

    def ignore(self, *names: str) -> None:
        """Accept attributes that have no effect on inference."""
        self._read.update(names)

    def require(self, condition: bool, what: str) -> None:
        """Raise Unsupported, with what is not supported, unless the condition is true."""
        if not condition:
            raise Unsupported(f"operator {self.kind} {what}")

    def check_all_read(self) -> None:
        """Raise Unsupported if an attribute was not looked at: it might change the result."""
        if unknown := sorted(set(self._attributes) - self._read):
            raise Unsupported(f"operator {self.kind} with the attribute {unknown[0]}")


OPERATORS: Final[dict[str, Callable[[Node], Call]]] = {}
"""Operator → function that turns a node into a PyTorch call."""


def operator(*kinds: str) -> Callable[[Callable[[Node], Call]], Callable[[Node], Call]]:
    """Register a function for one or several operators."""

    def register(function: Callable[[Node], Call]) -> Callable[[Node], Call]:
        OPERATORS.update(dict.fromkeys(kinds, function))
        return function

    return register


def bind(node: Node) -> Call:
    """Return what a node computes.

    Raises:
        Unsupported: the operator or one of its attributes is unknown.
    """
    if node.kind not in OPERATORS:
        raise Unsupported(f"operator {node.kind}")
    call = OPERATORS[node.kind](node)
    node.check_all_read()
    return call


def as_ints(values: Any) -> list[int]:
    """Return numbers of an array as Python's integers."""
    return [int(value) for value in np.ravel(np.asarray(values))]


class Held:
    """A constant of an operator's own, such as an index. It is moved to each device once, because
    a CUDA graph cannot contain such a copy.
    """

    def __init__(self, values: NDArray[Any]) -> None:
        self._tensors = {torch.device("cpu"): torch.from_numpy(np.ascontiguousarray(values))}

    def on(self, other: Tensor) -> Tensor:
        """Return it on another tensor's device."""
        if other.device not in self._tensors:
            self._tensors[other.device] = self._tensors[torch.device("cpu")].to(other.device)
        return self._tensors[other.device]
