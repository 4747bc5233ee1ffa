"""What `--truth` says: where the true labels of images are."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final

from msgspec import Struct

from imagemill.errors import UsageError
from imagemill.pipeline.sources.table import is_table, split_column

_FORMS: Final = (
    "folders, regex:PATTERN, @FILE.csv#path,label (also .tsv, .parquet), column:NAME, or cls"
)


class TruthKind(StrEnum):
    """A place of true labels."""

    FOLDERS = "folders"
    """The name of the folder that an image is in."""
    REGEX = "regex"
    """A group of a regular expression in the path."""
    TABLE = "table"
    """Two columns of a CSV or Parquet file: path and label."""
    COLUMN = "column"
    """A column of the tables that are the job's sources."""
    CLS = "cls"
    """The member `.cls` beside the image, in WebDataset archives."""


class Truth(Struct, frozen=True):
    """Where the true labels of images are."""

    text: str
    """As the user wrote it."""
    kind: TruthKind
    pattern: re.Pattern[str] | None = None
    """Of REGEX. Its group `label`, or else its first group, is the label."""
    file: str = ""
    """Of TABLE: path or URL."""
    path_column: str | None = None
    """Of TABLE; None: found by its name."""
    label_column: str | None = None
    """Of TABLE and COLUMN; None: found by its name."""

    def label_in(self, path: str) -> str | None:
        """Return the label that a REGEX finds in a path; None if it does not match."""
        assert self.pattern is not None
        found = self.pattern.search(path)
        return found["label" if "label" in self.pattern.groupindex else 1] if found else None


def parse(text: str) -> Truth:
    """Return what a value of `--truth` means.

    Raises:
        UsageError: it has none of the five forms, or the pattern is not valid.

    Example:
        >>> parse("@truth.csv#file,class").label_column
        'class'
    """
    if text in (TruthKind.FOLDERS, TruthKind.CLS):
        return Truth(text, TruthKind(text))
    form, _, rest = text.partition(":")
    if form == TruthKind.REGEX and rest:
        return Truth(text, TruthKind.REGEX, pattern=_compile(text, rest))
    if form == TruthKind.COLUMN and rest:
        return Truth(text, TruthKind.COLUMN, label_column=rest)
    if not text.startswith("@"):
        hint = f"for a table, write @{text}. Otherwise " if is_table(split_column(text)[0]) else ""
        raise UsageError(f"--truth {text}: {hint}write {_FORMS}.")
    file, columns = split_column(text[1:])
    if not is_table(file):
        raise UsageError(f"--truth {text}: the file must be a .csv, .tsv or .parquet table.")
    path, _, label = (columns or "").rpartition(",")
    return Truth(
        text, TruthKind.TABLE, file=file, path_column=path or None, label_column=label or None
    )


def _compile(text: str, pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"--truth {text}: the pattern is not valid: {error}.") from error
    if not compiled.groups:
        raise UsageError(
            f"--truth {text}: the pattern has no group. Put the label in parentheses, such as"
            r" regex:_(\w+)\.jpg$."
        )
    return compiled
