"""Records as JSON documents, checked against the records' own type hints when they are read."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

import msgspec

from imagemill.errors import ImagemillError

T = TypeVar("T")


def encode(value: Any) -> bytes:
    """Return a record as indented JSON that ends in a newline.

    The JSON is ASCII: file names that are not UTF-8 become escapes.
    """
    return (json.dumps(to_plain(value), indent=2) + "\n").encode("ascii")


def decode(
    data: bytes, kind: type[T], where: str, error: type[ImagemillError], remedy: str = ""
) -> T:
    """Return the record that a JSON document holds. Unknown keys are ignored, unless the
    class forbids them.

    Args:
        data: the document.
        kind: the record's class.
        where: the file's name, for the message.
        error: the class to raise.
        remedy: what the user can do, one sentence.

    Raises:
        ImagemillError: of class `error`. The data is not JSON, or a key is missing or has a value
        of the wrong type. The message names the file and the key.
    """
    try:
        return from_plain(kind, json.loads(data))
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} cannot be read: {problem}. {remedy}".rstrip()) from problem


def to_plain(value: Any) -> Any:
    """Return a record as dicts, lists, strings and numbers."""
    return msgspec.to_builtins(value, str_keys=True, enc_hook=str)


def from_plain(kind: type[T], value: Any) -> T:
    """Return the record that `to_plain` turned into `value`.

    Raises:
        ValueError: a key is missing or has a value of the wrong type, for example
        "limits.max_pixels: expected `int`, got `str`".
    """
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise ValueError(_key_first(str(error))) from None


def _key_first(message: str) -> str:
    """Rewrite msgspec's "Expected … - at `$.key`" as "key: expected …"."""
    found = re.fullmatch(r"(.*) - at `\$\.?(.*)`", message, re.DOTALL)
    text, key = found.groups() if found else (message, "")
    text = text[:1].lower() + text[1:]
    return f"{key}: {text}" if key else text
