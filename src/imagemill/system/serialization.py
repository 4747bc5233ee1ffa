"""Records to plain JSON values and back, led by the records' own type hints."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Turn a record into dicts, lists, strings and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def from_plain(kind: type[T], value: Any) -> T:
    """Make the record `kind` from what `to_plain` gave. Raises: TypeError, ValueError, KeyError
    where it does not fit.
    """
    return typing.cast("T", _convert(kind, value))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(
        kind, vars(__import__("sys").modules[kind.__module__]) | {"np": Any, "NDArray": Any}
    )


def _convert(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        options = [option for option in arguments if option is not type(None)]
        fitting = [
            option
            for option in options
            if isinstance(value, list | tuple) == str(option).startswith("tuple[")
        ]
        return _convert((fitting or options)[0], value)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], item) for item in value)
        return tuple(_convert(option, item) for option, item in zip(arguments, value, strict=True))
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise TypeError(f"{kind.__name__} is not an object")
        hints = _hints(kind)
        return kind(
            **{name: _convert(hints[name], item) for name, item in value.items() if name in hints}
        )
    if isinstance(kind, type) and issubclass(kind, Enum | Path):
        return kind(value)
    return value


def dumps(value: Any) -> bytes:
    """A record as indented JSON, ending in a newline; names that are not UTF-8 survive as
    escapes.
    """
    return (json.dumps(to_plain(value), indent=2) + "\n").encode("ascii")
