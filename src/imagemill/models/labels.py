"""The names of a model's classes: ImageNet's, those of a text file, and what a stranger's file may
call them.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Final

from imagemill.errors import ModelError, UsageError, printable

MAX_LABELS: Final = 250_000
"""More than the largest known classifier has (203,094)."""
MAX_LABEL: Final = 1_000
"""Characters."""
CONTROL: Final = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")


def imagenet_labels() -> tuple[str, ...]:
    """Return the 1,000 classes of ImageNet-1k in the order of every published classifier's
    logits.
    """
    file = resources.files("imagemill") / "data/imagenet_labels.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())


def read_text(file: Path, where: str, remedy: str) -> str:
    """Return the text of a file: UTF-8, or UTF-16 with a byte order mark, as PowerShell writes it.

    Raises:
        UsageError: the file cannot be read, or is no such text. The message begins with `where` and
        ends with the remedy.
    """
    try:
        data = file.read_bytes()
        text = data.decode(
            "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{where} cannot be read: {reason}. {remedy}") from error
    if "\0" in text:
        raise UsageError(f"{where} is not a text file: it contains null characters. {remedy}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_labels(file: Path, named_by: str = "--labels") -> tuple[str, ...]:
    """Read a list of labels, one a line, in the order of the model's scores; blank lines at the end
    are ignored. Messages begin with what names the file.

    Raises:
        UsageError: as `read_text`, or the file has a blank line before its last label.
    """
    remedy = "Give a text file in UTF-8 with one label a line."
    lines = read_text(file, f"{named_by} {file}", remedy).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UsageError(
                f"{named_by} {file}: line {number} of {len(lines)} is blank, so the labels after it"
                " may be those of other classes. Write the missing label there, or delete the line"
                " if no label is missing."
            )
    return tuple(lines)


def check_labels(
    where: str, labels: Sequence[str], *, may_be_blank: bool = False
) -> tuple[str, ...]:
    """Return labels from a file of a stranger.

    Args:
        where: the file and the key, for the message.
        labels: one per class.
        may_be_blank: whether a class may have a name without letters.

    Raises:
        ModelError: there are too many, or one is blank, too long, or has a control character.
    """
    if len(labels) > MAX_LABELS:
        raise ModelError(f"{where} has {len(labels):,} labels, at most {MAX_LABELS:,} are read.")
    for number, label in enumerate(labels):
        is_blank = not label.strip() and not may_be_blank
        if is_blank or len(label) > MAX_LABEL or CONTROL.search(label):
            raise ModelError(
                f"{where}: label {number} is '{printable(label, 80)}'. A label has 1 to"
                f" {MAX_LABEL:,} characters and no control characters. Give the labels with"
                " --labels FILE."
            )
    return tuple(labels)
