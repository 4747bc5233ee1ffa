"""The text of `imagemill models`."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from imagemill.display.text import wrap_parts
from imagemill.errors import counted, printable

if TYPE_CHECKING:
    from imagemill.models.listing import ModelRow

_ANY_WIDTH: Final = 1_000
"""Columns of an output that is no terminal: one line per model, for `grep`."""
_LAST_COLUMNS: Final = 20
"""Room that a table needs for its last column, which is wrapped."""


class _Line(Struct, frozen=True):
    """What is shown of one model."""

    name: str
    cells: tuple[str, ...]
    """One per column."""
    parts: tuple[str, ...]
    """Of the last column, which may take several lines."""


def format_models(
    rows: Sequence[ModelRow],
    models_dir: str,
    word: str | None = None,
    *,
    types: Sequence[str] = (),
    missing: Sequence[str] = (),
    width: int | None = None,
) -> str:
    """Return the models by family. Those that only the models folder has come first.

    Args:
        rows: as `listing.listing` returns them, filtered by `word`.
        models_dir: the models folder.
        word: what the rows were filtered by; None: they were not.
        types: of networks that run from elsewhere, filtered by `word`.
        missing: extras that are not installed.
        width: columns; None: those of the terminal.
    """
    width = width or shutil.get_terminal_size((_ANY_WIDTH, 24)).columns
    own = [_own(row) for row in rows if not row.home]
    published = [(row.family, _published(row)) for row in rows if row.home]
    lines: list[str] = []
    if own:
        lines += [f"In the models folder {printable(models_dir)}", *_table(own, own, width), ""]
    for family in dict.fromkeys(family for family, _ in published):
        heading = _Line(family, ("top-1", "  params", "licence"), ())
        members = [line for other, line in published if other == family]
        everything = [heading, *(line for _, line in published)]
        lines += [*_table(members, everything, width, heading), ""]
    if not rows and not types:
        lines += [f"No name, family, licence or origin in this list contains {word!r}.", ""]
    columns = min(width - 1, 100)
    if word and types:
        elsewhere = f"From a folder or as hf:owner/name: {', '.join(types)}."
        lines += [*textwrap.wrap(elsewhere, columns, break_on_hyphens=False), ""]
    return "\n".join([*lines, *textwrap.wrap(_others(missing), columns)])


def _others(missing: Sequence[str]) -> str:
    """Return what else `--model` takes, and what some of it needs."""
    needs = {name: f" (pip install 'imagemill[{name}]')" for name in missing}
    return (
        "Other classifiers run, too: an ONNX file; a folder of transformers or timm;"
        f" hf:owner/name, a repository of the Hugging Face Hub{needs.get('hub', '')}. Without ONNX"
        f" they are exported first{needs.get('export', '')}. See docs/models.md."
    )


def _published(row: ModelRow) -> _Line:
    top1 = f"{row.top1:.2f} %" if row.top1 else ""
    parts = [row.needs or "installed"]
    if row.origin is not None:
        parts = [row.origin]
        if row.origin != "damaged":
            parts = ["installed", _size(row), *([] if row.verified else [row.origin])]
    if row.alias:
        parts.append(f"or {row.alias}")
    return _Line(row.name, (top1, f"{row.parameters / 1e6:6.1f} M", row.licence), tuple(parts))


def _own(row: ModelRow) -> _Line:
    names = [printable(label, 20) for label in row.labels]
    if row.classes and row.classes > len(names):
        names.append("…")
    classes = "" if row.classes is None else counted(row.classes, "class")
    parts = [f"--model {printable(shlex.quote(row.typed))}" if row.typed else row.origin or ""]
    if names:
        parts.append(f"classes: {', '.join(names)}")
    if row.licence != "unknown":
        parts.append(f"licence {row.licence}")
    return _Line(row.name, (classes, f"{_size(row):>11}"), tuple(parts))


def _size(row: ModelRow) -> str:
    return f"{(row.bytes_on_disk or 0) / 2**20:,.1f} MiB"


def _table(
    lines: Sequence[_Line], everything: Sequence[_Line], width: int, heading: _Line | None = None
) -> Iterator[str]:
    """Yield lines in columns as wide as `everything` needs; a few for each if that is too wide."""
    names = max(len(line.name) for line in everything)
    columns = zip(*(line.cells for line in everything), strict=True)
    sizes = [max(map(len, column)) for column in columns]
    indent = 2 + names + sum(2 + size for size in sizes) + 2
    is_wide = indent + _LAST_COLUMNS < width
    if heading and is_wide:
        yield f"{heading.name:<{names + 2}}{_aligned(heading.cells, sizes)}".rstrip()
    elif heading:
        yield heading.name
    for line in lines:
        if not is_wide:
            yield f"  {line.name}"
            cells = [cell.strip() for cell in line.cells if cell]
            yield from _below([*cells, *line.parts], width)
            continue
        row = f"  {line.name:<{names}}{_aligned(line.cells, sizes)}"
        if any(indent + len(part) >= width for part in line.parts):  # a command stays in one piece
            yield row.rstrip()
            yield from _below(line.parts, width)
            continue
        first, *others = wrap_parts(line.parts, width - indent - 1) or [""]
        yield f"{row}  {first}".rstrip()
        yield from (" " * indent + other for other in others)


def _below(parts: Sequence[str], width: int) -> Iterator[str]:
    """Yield lines below a model's name."""
    space = " " * 4
    for part in wrap_parts(parts, width - len(space) - 1):
        yield from textwrap.wrap(
            part, width - 1, initial_indent=space, subsequent_indent=space, break_on_hyphens=False
        )


def _aligned(cells: Sequence[str], sizes: Sequence[int]) -> str:
    return "".join(f"  {cell:<{size}}" for cell, size in zip(cells, sizes, strict=True))
