"""A list of images, `@FILE`: one path or URL a line, in the list's order. Relative paths are
relative to the list's own folder.

The list itself may lie in an object store (`@s3://bucket/list.txt`) or on the web; its relative
paths then mean objects and pages there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from imagemill.errors import SourceError
from imagemill.pipeline.sources import locations
from imagemill.pipeline.sources.base import Skipped, matcher, shown
from imagemill.records import AS_GIVEN, Access, Entry, Filters


class ListSource:
    """A list of paths and URLs. Each line is planned, whatever its suffix.
    Empty lines are passed over.

    A line that starts with a double quote is a JSON string, for names that hold a line break;
    `failed.txt` of a job is such a list.
    """

    def __init__(self, position: int, file: bytes, access: Access = AS_GIVEN) -> None:
        self.name = "@" + shown(file)
        self._position = position
        self._file = file
        self._access = access

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        """Yield the lines in the order of the list; their sizes are not known."""
        wanted = matcher(filters)
        remedy = "Give a text file with one path or URL a line."
        with locations.listing(self.name, self._file, self._access, "\n", remedy) as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n") and number == 1 and "\r" in line.rstrip("\r"):
                    raise SourceError(
                        f"source {self.name} has carriage returns and no line feeds, so all of"
                        " it is one line. End its lines with line feeds."
                    )
                path = self._path(line.rstrip("\r\n").encode("utf-8", "surrogateescape"), number)
                if not path:
                    continue
                locations.check(self._file, path, f"source {self.name}, line {number}")
                if wanted(path):
                    yield Entry(self._position, path, -1)
                else:
                    skipped.by_filter += 1

    def fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:  # noqa: ARG002 - the path says it
        """Return the bytes of the image that a line names."""
        return locations.fetch_beside(self._file, path, max_bytes, self._access)

    def _path(self, line: bytes, number: int) -> bytes:
        if b"\0" in line:
            raise SourceError(
                f"source {self.name}, line {number}: has a NUL byte, which no path can hold. Write"
                " one path or URL a line."
            )
        if not line.startswith(b'"'):
            return line
        try:
            return os.fsencode(json.loads(line))
        except (ValueError, TypeError) as error:
            raise SourceError(
                f"source {self.name}, line {number}: starts with a quote but is no JSON string."
                " Quote it, or write it plain."
            ) from error
