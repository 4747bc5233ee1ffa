"""What a source is: it lists its pictures once, and fetches any one of them at any time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from imagemill.plan import Entry

IMAGE_SUFFIXES = frozenset(
    """.apng .avif .avifs .bmp .bw .cur .dcx .dds .dib .emf .fit .fits .flc .fli .ftu .gbr .gif .heic .heif .hif .icns .ico .im .j2c .j2k
    .jfif .jif .jng .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .jxl .mpo .msp .pbm .pcd .pcx .pfm .pgm .png .pnm .ppm .psd .pxr .qoi .ras .rgb
    .rgba .sgi .svg .tga .tif .tiff .vda .vst .webp .wmf .xbm .xpm""".split()
)
"""Suffixes that make an entry a picture, lower case; whether it can be read is another matter and becomes its row."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Which entries of a source are planned."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    all_files: bool = False


@dataclass(slots=True)
class Skipped:
    """What a listing left out: counts that the summary reports."""

    by_suffix: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    by_filter: int = 0


class Source(Protocol):
    """One source of pictures."""

    name: str
    """As rows name it: an absolute path or URL, bytes that are not UTF-8 shown as `\\xNN`."""
    ordered: bool
    """Whether entries come ordered by the components of their paths as bytes, else in an order of the source's own."""

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        """List the pictures in bounded memory and in the same order each time, counting what is left out.

        Raises: SourceError.
        """
        ...

    def fetch(self, path: bytes, max_bytes: int) -> bytes:
        """Read one picture's encoded bytes. Called from many threads at once. Raises: BadPicture."""
        ...


def shown(name: bytes) -> str:
    """A name for people: UTF-8, other bytes as `\\xNN`."""
    return name.decode("utf-8", "backslashreplace")
