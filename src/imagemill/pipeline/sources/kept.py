"""Columns of your own tables that go along into `predictions/`: `--keep`.

Their values are read while the sources are listed, and the plan keeps them. So failed images have
them too, and a table that changes later changes no row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from imagemill.errors import SourceError, UsageError, printable
from imagemill.records import Kept, KeptType, Saved

MAX_TEXT: Final = 2**15
"""Characters of a text that is kept. Longer ones, such as web pages, would fill plan and memory."""
_MAX_NAMES: Final = 50
"""Columns that an error names. The keys of JSON files may be any number."""
_encode: Final = json.JSONEncoder(separators=(",", ":")).encode
_WORDS: Final = {
    KeptType.TEXT: "text",
    KeptType.WHOLE: "whole numbers",
    KeptType.FLOAT: "floats",
    KeptType.BOOLEAN: "booleans",
}
_TYPES: Final = {
    str: KeptType.TEXT,
    int: KeptType.WHOLE,
    float: KeptType.FLOAT,
    bool: KeptType.BOOLEAN,
}


def resolve_kept(keep: Iterable[str | tuple[str, str]]) -> dict[str, str]:
    """Return the columns that `--keep` names, and their names in `predictions/`.

    Args:
        keep: texts such as `id,caption=text`, or pairs of a column and its name.

    Raises:
        UsageError: a column is given twice, or a name is empty, taken, or imagemill's own.

    Example:
        >>> resolve_kept(["id,caption=text"])
        {'id': 'id', 'caption': 'text'}
    """
    from imagemill.job.columns import COLUMNS  # brings pyarrow

    found: dict[str, str] = {}
    own = {*COLUMNS, *(saved.value for saved in Saved)}
    taken: dict[str, str] = {}
    for column, name in (pair for item in keep for pair in _pairs(item)):
        given = f"--keep {printable(str(Kept(column, name)))}"
        if not column or not name or not name.isprintable():
            raise UsageError(f"{given}: write --keep COLUMN or --keep COLUMN=NEW, in one line.")
        if column in found:
            raise UsageError(f"{given}: the column {column!r} is given twice.")
        # Many readers, such as DuckDB, ignore the case of names.
        if name.casefold() in own:
            raise UsageError(
                f"{given}: imagemill has a column {name.casefold()!r} of its own. Give yours"
                f" another name: --keep {column}=NEW."
            )
        if (other := taken.setdefault(name.casefold(), column)) != column:
            raise UsageError(
                f"{given}: the column {other!r} has this name already. Give one of them another"
                " name: --keep COLUMN=NEW."
            )
        found[column] = name
    return found


def _pairs(item: str | tuple[str, str]) -> Iterable[tuple[str, str]]:
    if not isinstance(item, str):
        return [item]
    for word in item.split(","):
        if word.count("=") > 1:
            raise UsageError(f"--keep {printable(word)}: write --keep COLUMN or --keep COLUMN=NEW.")
    pairs = (word.partition("=") for word in item.split(","))
    return [(column, name if equals else column) for column, equals, name in pairs]


class Keeper:
    """Packs the values of the kept columns for the plan, and finds their types. All sources of a
    listing share one.

    Args:
        names: as `resolve_kept` returns them.
        frozen: the columns of a job that is appended to, whose types stay.
    """

    def __init__(self, names: Mapping[str, str] | None = None, frozen: Sequence[Kept] = ()) -> None:
        self._names = names or {kept.column: kept.name for kept in frozen}
        self._types = {kept.column: (kept.type, "the job") for kept in frozen}
        self._is_frozen = bool(frozen)
        self._found: dict[str, None] = {}
        self.columns = tuple(self._names)
        """The kept columns, as the sources name them."""

    def add_columns(self, source: str, columns: Sequence[str]) -> list[str]:
        """Note the columns that a source has, and return those that are kept. Raises: SourceError
        if the source has two of that name.
        """
        kept = [column for column in self.columns if column in columns]
        for column in kept:
            if columns.count(column) > 1:
                raise SourceError(f"{source} has several columns {column!r}, so none can be kept.")
        self._found.update(dict.fromkeys(kept))
        if self.columns and len(self._found) < _MAX_NAMES:
            self._found.update(dict.fromkeys(columns))
        return kept

    def add_type(self, source: str, column: str, kind: KeptType, *, is_json: bool = False) -> None:
        """Note the type that a column has in a source. JSON has one kind of number, so a column
        of whole numbers and floats there holds floats. Raises: SourceError if the column has
        another type elsewhere.
        """
        known, first = self._types.setdefault(column, (kind, source))
        if kind is known:
            return
        is_fixed = self._is_frozen and known is KeptType.WHOLE
        if is_json and {kind, known} == {KeptType.WHOLE, KeptType.FLOAT} and not is_fixed:
            self._types[column] = KeptType.FLOAT, first
            return
        raise SourceError(
            f"--keep {column}: the column holds {_WORDS[known]} in {first}, and {_WORDS[kind]} in"
            f" {source}. Give it one type in all sources, or do not keep it."
        )

    def pack(self, source: str, values: Mapping[str, Any], *, is_json: bool = False) -> bytes:
        """Return the values of one image for the plan; empty if there are none.

        Args:
            source: what holds them, for messages.
            values: by column; columns that are not kept do not matter.
            is_json: whether each value has a type of its own. Otherwise `add_type` was called.

        Raises:
            SourceError: a value is nested, too long, or beyond 64 bits; or of another type than
            others of its column.
        """
        found = [values.get(column) for column in self.columns]
        if found.count(None) == len(found):
            return b""
        for place, value in enumerate(found):
            if is_json and value is not None:
                if type(value) not in _TYPES:
                    what = "a list" if isinstance(value, list) else "an object"
                    raise SourceError(
                        f"--keep {self.columns[place]}: {source} holds {what}. Only text, numbers"
                        " and booleans can be kept."
                    )
                self.add_type(source, self.columns[place], _TYPES[type(value)], is_json=True)
            if isinstance(value, str):
                if len(value) > MAX_TEXT:
                    raise SourceError(
                        f"--keep {self.columns[place]}: {source} holds a text of {len(value):,}"
                        f" characters. At most {MAX_TEXT:,} can be kept."
                    )
                found[place] = _as_utf8(value)
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise SourceError(
                    f"--keep {self.columns[place]}: {source} holds the number {value}, which has"
                    " more than 64 bits."
                )
        return _encode(found).encode()

    def kept(self) -> tuple[Kept, ...]:
        """Return the columns with the types that the listed sources have. A column without a value
        is text. Raises: SourceError if no listed source has a column.
        """
        for column in self.columns:
            if column not in self._found and not self._is_frozen:
                names = ", ".join(map(printable, self._found))
                there = (
                    f"The columns are {names}."
                    if names
                    else "Folders and lists of paths have none: give a table."
                )
                raise SourceError(f"--keep {column}: no source has this column. {there}")
        return tuple(
            Kept(column, name, self._types.get(column, (KeptType.TEXT, ""))[0])
            for column, name in self._names.items()
        )


def _as_utf8(text: str) -> str:
    """Return a text that UTF-8 can hold. Bytes that are not UTF-8 become `\\xNN`."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a pair of surrogates, escaped in JSON
        return text.encode("utf-8", "backslashreplace").decode()


NOTHING: Final = Keeper()
"""Keeps no column."""
