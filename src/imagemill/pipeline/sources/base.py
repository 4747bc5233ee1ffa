"""What a source is: it lists its images once, and fetches any one of them at any time."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Protocol

from msgspec import Struct, field

from imagemill.errors import counted
from imagemill.records import BadImage, Entry, Filters, Status

IMAGE_SUFFIXES = frozenset(
    """.apng .avif .avifs .bmp .bw .cur .dcx .dds .dib .emf .fit .fits .flc .fli .ftu .gbr .gif
    .heic .heif .hif .icns .ico .im .j2c .j2k .jfif .jif .jng .jp2 .jpc .jpe .jpeg .jpf .jpg
    .jpx .jxl .mpo .msp .pbm .pcd .pcx .pfm .pgm .png .pnm .ppm .psd .pxr .qoi .ras .rgb .rgba
    .sgi .svg .tga .tif .tiff .vda .vst .webp .wmf .xbm .xpm""".split()
)
"""Suffixes that make an entry an image, lower case; whether it can be read is another matter and
becomes its row.
"""
_FOLDERS_REMEMBERED = 1_000
_SLASH, _HOST = re.compile(rb"(?<=[^/])/"), re.compile(rb"(?:[\w+.-]+://[^/]*/)?")
ARCHIVES = {
    ".tar": "*.tar",
    ".gz": "*.tar.gz",
    ".tgz": "*.tgz",
    ".zip": "*.zip",
    ".parquet": "*.parquet",
}
"""Suffixes of archives and tables that a source may hold unopened → the pattern that names them as
sources.
"""
MOST_SUFFIXES = 30
OTHER_SUFFIXES = "others"
"""Stands for suffixes beyond the first `MOST_SUFFIXES`: scan.000001, scan.000002, …"""


class Skipped(Struct):
    """What a listing left out: counts that the summary reports."""

    by_suffix: Counter[str] = field(default_factory=Counter)
    """At most `MOST_SUFFIXES` of them; the others are counted as `OTHER_SUFFIXES`."""
    hidden: int = 0
    by_filter: int = 0
    archive_notes: list[str] = []
    """What users should know of archives, a line each."""
    broken_links: int = 0
    """Links that lead nowhere and may have led to a folder of images, such as one on a disk that is
    not mounted.
    """
    first_broken_link: str = ""
    empty_sources: int = 0
    """Sources that hold no image, beside others that do."""
    first_empty_source: str = ""

    def add_suffix(self, suffix: str) -> None:
        """Count a file that is no image."""
        known = suffix in self.by_suffix or suffix in ARCHIVES
        known = known or len(self.by_suffix) < MOST_SUFFIXES
        self.by_suffix[suffix if known else OTHER_SUFFIXES] += 1

    def counts(self) -> dict[str, Any]:
        """Return the counts by the names that `job.json` and the summary give them."""
        return {
            "skipped_by_suffix": dict(sorted(self.by_suffix.items())),
            "skipped_hidden": self.hidden,
            "skipped_by_filter": self.by_filter,
            "skipped_broken_links": self.broken_links,
        }

    def add_broken_link(self, path: str) -> None:
        """Count a link that leads nowhere."""
        self.broken_links += 1
        self.first_broken_link = self.first_broken_link or path

    def add_empty_source(self, name: str) -> None:
        """Count a source without an image."""
        self.empty_sources += 1
        self.first_empty_source = self.first_empty_source or name

    def notes(self) -> list[str]:
        """Return a line for each thing that a listing did not find and that a user would miss."""
        found = list(self.archive_notes)
        if self.broken_links:
            lead = "leads" if self.broken_links == 1 else "lead"
            found.append(
                f"note: {counted(self.broken_links, 'link')} {lead} nowhere, first:"
                f" {self.first_broken_link}. If its disk is not mounted, the images there are left"
                " out"
            )
        if self.empty_sources:
            hold = "holds" if self.empty_sources == 1 else "hold"
            found.append(
                f"note: {counted(self.empty_sources, 'source')} {hold} no images, first:"
                f" {self.first_empty_source}"
            )
        return found


def too_large(size: int, max_bytes: int) -> BadImage:
    """Return the error of an image that has more than `max_bytes`."""
    return BadImage(Status.TOO_LARGE, f"has {size} bytes, more than --max-bytes {max_bytes}")


class Source(Protocol):
    """One source of images."""

    name: str
    """As rows name it: an absolute path or URL, bytes that are not UTF-8 shown as `\\xNN`."""

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        """List the images in bounded memory and in the same order each time, counting what is left
        out.

        Raises: SourceError.
        """
        ...

    def fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:
        """Read one image's encoded bytes. Called from many threads at once, in any order.

        Args:
            path, locator: as `entries` gave them, perhaps to another process.
            max_bytes: an image that is longer is `too_large`; no more than this is read.

        Raises: BadImage.
        """
        ...


def suffix_of(name: bytes) -> str:
    """Return the suffix of a file, as `IMAGE_SUFFIXES` and `Skipped` have it."""
    return os.path.splitext(name)[1].lower().decode("utf-8", "backslashreplace")  # noqa: PTH122


def shown(name: bytes) -> str:
    """A name for people: UTF-8, other bytes as `\\xNN`."""
    return name.decode("utf-8", "backslashreplace")


def matcher(filters: Filters) -> Callable[[bytes], bool]:
    """Whether a path is wanted. A pattern with a slash is held against the whole relative path,
    else against the name; `*` crosses slashes.

    A path that ends in a slash is a folder: `--exclude` closes it and all below it, `--include`
    says nothing about it.
    """

    def compiled(patterns: tuple[str, ...]) -> list[tuple[bool, re.Pattern[str]]]:
        return [
            ("/" in pattern.rstrip("/"), re.compile(fnmatch.translate(pattern.rstrip("/"))))
            for pattern in patterns
        ]

    include, exclude = compiled(filters.include), compiled(filters.exclude)
    whole = [rule for rule in exclude if rule[0]]

    def matches(rules: list[tuple[bool, re.Pattern[str]]], path: str) -> bool:
        name = path.rpartition("/")[2]
        return any(rule.match(path if whole else name) for whole, rule in rules)

    @lru_cache(_FOLDERS_REMEMBERED)
    def is_closed(folder: bytes) -> bool:
        host = _HOST.match(folder)
        assert host is not None
        for slash in _SLASH.finditer(folder):
            rules = exclude if slash.start() >= host.end() else whole  # a host is no folder
            if matches(rules, os.fsdecode(folder[: slash.start()])):
                return True
        return False

    def wanted(path: bytes) -> bool:
        text = os.fsdecode(path.rstrip(b"/"))
        folder = path[: path.rfind(b"/", 0, -1) + 1]
        if exclude and (matches(exclude, text) or is_closed(folder)):
            return False
        return path.endswith(b"/") or not include or matches(include, text)

    return wanted


_is_dotted = re.compile(rb"\.(?!\.?(?:\\|\Z))").match
"""Some tools write `.` or `..` before a backslash: these hide nothing."""


def chooser(filters: Filters, skipped: Skipped) -> Callable[[bytes], bool]:
    """Return a function that tells by its path whether a member of an archive or a store is
    planned, and counts the others. A dot at the start of a name hides it and all below it.
    """
    wanted = matcher(filters)

    def chosen(path: bytes) -> bool:
        if any(map(_is_dotted, path.split(b"/"))):
            skipped.hidden += 1
        elif (suffix := suffix_of(path)) not in IMAGE_SUFFIXES and not filters.all_files:
            skipped.add_suffix(suffix)
        elif not wanted(path):
            skipped.by_filter += 1
        else:
            return True
        return False

    return chosen
