"""Types of the columns of Parquet files: which hold text, images, or values that can be kept."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from imagemill.errors import SourceError
from imagemill.pipeline.sources.kept import Keeper
from imagemill.records import KeptType


def plain_type(kind: Any) -> Any:
    """Return a column's type without its dictionary or extension."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    return plain_type(kind.value_type) if pa.types.is_dictionary(kind) else kind


def is_text(kind: Any) -> bool:
    """Return whether a type is text, of whatever width."""
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def is_bytes(kind: Any) -> bool:
    """Return whether a type is bytes, of whatever width."""
    tests = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(test(kind) for test in tests)


def has_bytes(kind: Any) -> bool:
    """Return whether a type can hold images: bytes, or a struct with such a field `bytes`."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return is_bytes(plain_type(kind.field("bytes").type))
    return is_bytes(kind)


def format_type(kind: Any) -> str:
    """Return a type's name for messages."""
    if pa.types.is_struct(kind):
        return f"struct of {', '.join(field.name for field in kind)}"
    return str(kind)


def kept_columns(schema: Any, name: str, keeper: Keeper) -> dict[str, Any]:
    """Return the kept columns of a table with the Arrow types that their values are cast to.

    Whole numbers become int64, floats double, and what has a text form but no such type, such as
    timestamps and decimals, text.

    Raises:
        SourceError: a column holds bytes or is nested, or has another type in another source.
    """
    found = {}
    for column in keeper.add_columns(f"source {name}", schema.names):
        kind = plain_type(schema.field(column).type)
        if is_bytes(kind) or not _has_text_form(kind):
            raise SourceError(
                f"--keep {column}: source {name} holds {format_type(kind)} there. Only text,"
                " numbers and booleans can be kept."
            )
        found[column] = pa.string()
        if pa.types.is_null(kind):
            continue
        kept = KeptType.TEXT
        if pa.types.is_boolean(kind):
            kept = KeptType.BOOLEAN
        elif pa.types.is_integer(kind) and kind != pa.uint64():
            kept = KeptType.WHOLE
        elif pa.types.is_floating(kind):
            kept = KeptType.FLOAT
        keeper.add_type(f"source {name}", column, kept)
        found[column] = pa.type_for_alias(kept.value)
    return found


def _has_text_form(kind: Any) -> bool:
    """Return whether Arrow can write the values of a type as text, which lists cannot be."""
    try:
        pa.array([], kind).cast(pa.string())
    except pa.ArrowException:
        return False
    return True


def plain_values(array: Any, goal: Any) -> list[Any]:
    """Return the values of a column as one of the types of `kept_columns`."""
    array = plain_array(array)
    if pa.types.is_string(goal) and is_text(array.type):
        texts = array.cast(pa.large_binary()).to_pylist()  # perhaps not UTF-8
        return [
            None if text is None else text.decode("utf-8", "backslashreplace") for text in texts
        ]
    found: list[Any] = array.cast(goal).to_pylist()
    return found


def plain_array(array: Any) -> Any:
    """Return a column without its dictionary or extension."""
    if isinstance(array.type, pa.BaseExtensionType):
        return plain_array(array.storage)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
