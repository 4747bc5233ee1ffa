"""A job's rows as text, in plan order: CSV or JSON lines, made part by part and column by column,
in memory that one part bounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv

from imagemill.errors import OutputError, UsageError
from imagemill.job import documents, ledger, store
from imagemill.job.columns import COLUMNS
from imagemill.job.documents import Frozen
from imagemill.job.paths import JobPaths
from imagemill.system import files

_ROWS = 1_024
"""Made into text at a time: with 21,000 logits a row some 300 MB, and never beyond the 2 GB of an
Arrow string array.
"""
_LINE_BREAKS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\u0085\u2028\u2029"}
"""Line breaks to Unicode and so to some readers of JSON lines, but not to JSON."""


class Form(StrEnum):
    """What rows are exported as."""

    CSV = "csv"
    JSONL = "jsonl"


def export(
    paths: JobPaths,
    frozen: Frozen,
    form: Form,
    *,
    columns: Sequence[str] | None = None,
    partial: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[bytes]:
    """Turn a job's rows into text.

    Args:
        paths: of the output.
        frozen: the job.
        form: CSV, with a header, text quoted, a null as an empty cell and lists as JSON in one; or
        one JSON object a line.
        columns: which ones, in this order; None: all.
        partial: take what is committed of a job that is not finished.
        say: told how much lacks then.

    Returns:
        the text in pieces, UTF-8. Numbers have as many digits as it takes to read the same float32
        again.

    Raises:
        UsageError: a column is not known. OutputError: the job is not finished, or its plan is
            damaged. PartError, while iterating: a part is damaged.
    """
    known = [*COLUMNS, *(saved.value for saved in frozen.job.save)]
    if unknown := [name for name in columns or () if name not in known]:
        raise UsageError(
            f"--columns {','.join(columns or ())}: the job has no column {unknown[0]!r}. It has"
            f" {', '.join(known)}."
        )
    shards = documents.planned(paths, frozen)
    done = ledger.committed(paths, shards)
    if len(done) < len(shards) or not store.exists(paths, paths.summary):
        rows = sum(shard.count for shard in shards if shard.number in done)
        lacking = (
            f"{paths.output} is not finished: {rows:,} of {sum(shard.count for shard in shards):,}"
            " rows are there"
        )
        if not partial:
            raise OutputError(
                f"{lacking}. Repeat the run command to resume it, or add --partial for these rows."
            )
        say(f"{lacking}, which are exported in plan order")
    chosen = list(dict.fromkeys(columns or known))
    tables = ledger.tables(
        paths, [shard.number for shard in shards if shard.number in done], chosen
    )
    return _csv(tables, chosen) if form is Form.CSV else _json_lines(tables, chosen)


def write(pieces: Iterable[bytes], file: Path) -> None:
    """Write an export to a file, which appears whole or not at all. Raises: OutputError, and what
    making the pieces raises.
    """
    if file.exists() and not file.is_file():
        raise OutputError(
            f"--output {file} is not a regular file. Name a file, or leave it out for standard"
            " output."
        )
    files.write_whole(file, pieces)


def _csv(tables: Iterable[Any], columns: Sequence[str]) -> Iterator[bytes]:
    yield ",".join(f'"{name}"' for name in columns).encode() + b"\n"
    for batch in _batches(tables):
        arrays = [_cells(array, alone=len(columns) == 1) for array in batch.columns]
        text = pa.BufferOutputStream()
        pv.write_csv(
            pa.table(arrays, names=list(columns)), text, pv.WriteOptions(include_header=False)
        )
        yield text.getvalue().to_pybytes()


def _cells(array: Any, *, alone: bool) -> Any:
    """A column as CSV knows it: lists as JSON. Where it is `alone` a null is `""`, for readers pass
    over empty lines.
    """
    if pa.types.is_nested(array.type):
        array = pc.if_else(array.is_valid(), _json(array), pa.scalar(None, pa.string()))
    return pc.fill_null(array.cast(pa.string()), "") if alone else array


def _json_lines(tables: Iterable[Any], columns: Sequence[str]) -> Iterator[bytes]:
    for batch in _batches(tables):
        lines = _objects(columns, batch.columns).to_pylist()
        yield "".join(line + "\n" for line in lines).encode()


def _batches(tables: Iterable[Any]) -> Iterator[Any]:
    for table in tables:
        yield from table.to_batches(max_chunksize=_ROWS)


def _objects(names: Sequence[str], values: Sequence[Any]) -> Any:
    """JSON objects with these members, as a string array."""
    pieces: list[Any] = []
    for name, array in zip(names, values, strict=True):
        pieces += [pa.scalar((", " if pieces else "{") + json.dumps(name) + ": "), _json(array)]
    return pc.binary_join_element_wise(*pieces, pa.scalar("}"), pa.scalar(""))


def _json(array: Any) -> Any:
    """Each value of a column as JSON, a string array without nulls.

    Built by Arrow, column by column: some 20 times as fast as a dict a row.
    """
    kind = array.type
    if pa.types.is_struct(kind):
        text = _objects([field.name for field in kind], array.flatten())
    elif pa.types.is_nested(kind):
        ends = pc.cumulative_sum(pc.fill_null(pc.list_value_length(array), 0).cast(pa.int32()))
        offsets = pa.concat_arrays([pa.array([0], pa.int32()), ends])
        joined = pc.binary_join(pa.ListArray.from_arrays(offsets, _json(array.flatten())), ", ")
        text = pc.binary_join_element_wise(pa.scalar("["), joined, pa.scalar("]"), pa.scalar(""))
    elif pa.types.is_string(kind):
        text = pa.array(
            [None if value is None else _quoted(value) for value in array.to_pylist()], pa.string()
        )
    else:
        text = array.cast(pa.string())
    return pc.if_else(array.is_valid(), text, pa.scalar("null"))


def _quoted(value: str) -> str:
    text = json.encoder.encode_basestring(value)
    return text if text.isascii() else text.translate(_LINE_BREAKS)
