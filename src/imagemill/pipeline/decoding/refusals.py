"""Why an image is not decoded: the budgets, and what the errors of decoders mean."""

from __future__ import annotations

import re
import struct

from msgspec import Struct
from PIL import Image

from imagemill.records import BadImage, Limits, Status

_TOO_LARGE = (
    "Decompressed data too large",
    "Too much memory used in text chunks",
    "decompression bomb",
    "Security limit exceeded",
)
_CUT = (
    "truncated",
    "Truncated",
    "unexpected end",
    "not enough",
    "buffer is not large enough",
    "EOF",
    "broken PNG file (chunk b'')",
)
_UNSUPPORTED = (
    "nsupported",
    "not supported",
    "nimplemented",
    "not implemented",
    "not available",
    "cannot handle",
    "Unknown compression",
)


class Seen(Struct):
    """What was learnt of an image before it failed."""

    width: int | None = None
    height: int | None = None


def check_budget(width: int, height: int, limits: Limits) -> None:
    """Raises: BadImage, where an image has more pixels than `limits.max_pixels`."""
    if width * height > limits.max_pixels:
        text = f"{width}×{height} are {width * height} pixels, more than the budget of"
        text += f" {limits.max_pixels} pixels per image"
        raise BadImage(Status.TOO_LARGE, text, width, height)


def judge(error: BaseException, data: bytes) -> Status:
    """Tell what an error of a decoder means for the image."""
    text = str(error)
    if isinstance(error, Image.DecompressionBombError) or any(sign in text for sign in _TOO_LARGE):
        return Status.TOO_LARGE
    if isinstance(error, NotImplementedError) or any(sign in text for sign in _UNSUPPORTED):
        return Status.UNSUPPORTED
    ends = (EOFError, IndexError, struct.error)
    if (
        isinstance(error, ends)
        or isinstance(error.__cause__, ends)
        or any(sign in text for sign in _CUT)
        or _is_cut(data)
    ):
        return Status.TRUNCATED
    return Status.CORRUPT


def _is_cut(data: bytes) -> bool:
    """Tell from a broken file's own account of its length whether its end is missing."""
    if data[:3] == b"\xff\xd8\xff":
        return b"\xff\xd9" not in data[-1024:] and b"\xff\xda" not in data
    if data.startswith(b"\x89PNG"):
        at = 8
        while at + 8 <= len(data):
            length, kind = struct.unpack_from(">I4s", data, at)
            if kind == b"IEND":
                return False
            if not kind.isalpha():
                return False
            at += 12 + length
        return True
    if data[:4] == b"\xff\x4f\xff\x51":  # a JPEG 2000 code stream
        return not data.endswith(b"\xff\xd9")
    if data[:4] == b"RIFF" and len(data) >= 8:
        return int(struct.unpack_from("<I", data, 4)[0]) + 8 > len(data) + 1
    if data[:2] == b"BM" and len(data) >= 6:
        return int(struct.unpack_from("<I", data, 2)[0]) > len(data)
    if data[4:8] == b"ftyp" or data[4:8] == b"jP  ":
        at = 0
        while at + 8 <= len(data):
            length = int(struct.unpack_from(">I", data, at)[0])
            if length < 8:
                return False
            at += length
        return at != len(data)
    return False


def one_line(error: BaseException) -> str:
    """Say an exception in one line that is the same each time: no addresses, no more than 300
    characters.
    """
    text = re.sub(r"<(\S+)[^<>]* at 0x[0-9a-fA-F]+>", r"<\1>", " ".join(str(error).split()))
    return (text or type(error).__name__)[:300]
