"""Names of folders and files that every file system takes."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

FAILED = "_failed"
"""The folder of failed images; no label gets this name."""
MANIFEST = "sorted.csv"
"""The list of the files; no label gets this name either."""
_FOLDER_BYTES, _FILE_BYTES = 120, 200
"""Well below the 255 of most file systems, so that a number fits behind the name."""
_UNUSABLE = re.compile(r'[\x00-\x1f\x7f-\x9f/\\:*?"<>|\u2028\u2029\ud800-\udfff]')
_WINDOWS = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?=\.|$)", re.IGNORECASE)

Id = TypeVar("Id", bound=Hashable)


def usable(text: str, limit: int = _FOLDER_BYTES) -> str:
    """Return a text as a file name: one component, never hidden, at most `limit` bytes of UTF-8.

    Example:
        >>> usable("../sea/lion\\n")
        '_sea_lion_'
    """
    name = _UNUSABLE.sub("_", unicodedata.normalize("NFC", text)).strip(" ").lstrip(".")
    name = name.encode()[:limit].decode(errors="ignore").rstrip(" .")
    return f"_{name}" if _WINDOWS.match(name) else name or "_"


def file_name(path: bytes) -> str:
    """Return the name of an image's file as a usable one, with its suffix."""
    name = path.rpartition(b"/")[2].decode("utf-8", "backslashreplace")
    stem, dot, suffix = name.rpartition(".")
    if not dot or len(suffix.encode()) > 10:
        return usable(name, _FILE_BYTES)
    return f"{usable(stem, _FILE_BYTES)}.{usable(suffix)}"


def folders(values: Iterable[tuple[Id, str]]) -> Mapping[Id, str]:
    """Return a folder's name for each value, from what people call it.

    If the names of several values would be the same folder, also on a file system that ignores
    case, each gets its id, or the hash of a long one, behind the name.
    """
    found, length = {value: usable(text) for value, text in values}, 0
    while True:  # `crane~1` may be a name, too, and short hashes may be equal
        used, length = Counter([FAILED, MANIFEST, *map(fold, found.values())]), length + 8
        if max(used.values()) == 1:
            return found
        found = {
            value: name if used[fold(name)] == 1 else f"{name}~{_mark(value, length)}"
            for value, name in found.items()
        }


def fold(name: str) -> str:
    """Return what two names share if a file system that ignores case takes them for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _mark(value: object, length: int) -> str:
    if isinstance(value, int):
        return str(value)
    return hashlib.sha256(str(value).encode("utf-8", "backslashreplace")).hexdigest()[:length]
