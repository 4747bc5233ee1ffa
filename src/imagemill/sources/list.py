"""A list of picture files, `@FILE`: one path a line, in the list's order, relative to the list's own folder or absolute."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from imagemill.errors import SourceError
from imagemill.plan import Entry
from imagemill.sources.base import Filters, Skipped, matcher, shown
from imagemill.sources.files import read_file


class ListSource:
    """See the module's docstring. Each line is planned, whatever its suffix: the list has chosen. Empty lines are passed over.

    A line that starts with a double quote is a JSON string, for names that hold a line break; `failed.txt` of a job is such a list.
    """

    ordered = False

    def __init__(self, position: int, file: bytes) -> None:
        self.name = "@" + shown(file)
        self._position = position
        self._file = file
        self._folder = os.path.dirname(file)  # noqa: PTH120 - bytes, for names that are not UTF-8

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        """See `Source.entries`. The order is the list's; sizes are not known."""
        wanted = matcher(filters)
        try:
            with open(self._file, "rb") as lines:  # noqa: PTH123
                for number, line in enumerate(lines, 1):
                    path = self._path(line.rstrip(b"\r\n"), number)
                    if not path:
                        continue
                    if wanted(path):
                        yield Entry(self._position, path, -1)
                    else:
                        skipped.by_filter += 1
        except OSError as error:
            raise SourceError(f"source {self.name} cannot be read: {error.strerror}. Give a text file with one path a line.") from error

    def fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:  # noqa: ARG002 - the path says it
        """See `Source.fetch`."""
        return read_file(os.path.join(self._folder, path), max_bytes)  # noqa: PTH118

    def _path(self, line: bytes, number: int) -> bytes:
        if not line.startswith(b'"'):
            return line
        try:
            return os.fsencode(json.loads(line))
        except (ValueError, TypeError) as error:
            raise SourceError(
                f"source {self.name}, line {number}: starts with a quote but is no JSON string. Quote it, or write it plain."
            ) from error
